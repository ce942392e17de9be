"""`python -m classp_hf blend START TUNED --output_dir DIR`: models between a model and what it was tuned to."""

from __future__ import annotations

import argparse
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from datasets import Value
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithPadding
from transformers.utils import logging

from .files import read_table
from .guard import general_answers
from .language import prepare_language_tasks
from .matching import match_rows, named_as_in
from .memory import MEMORY_NAME, ContinualMemory, NoMemoryError
from .names import mean_over_weights, samples
from .rehearsal import kind_of_model, measure
from .remember import load_saved
from .report import markdown_table, new_figure, save_figure, series_style, write_json
from .tasks import Task, prepare_tasks

logger = logging.get_logger(__name__)

PATHS = ("line", "depth", "memory")
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
# Metric of the task -> what the best point has.
BEST = {None: "the largest share", "accuracy": "the highest accuracy", "loss": "the lowest task loss"}


def _weights(model: str) -> dict[str, Tensor]:
    """The tensors of a folder or a Hub repository, which stay in their files until they are used."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json"]))
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    if missing := [name for name in sorted(names) if not (folder / name).is_file()]:
        adapter = (folder / "adapter_config.json").is_file()
        kind = "an adapter: merge it into its model first" if adapter else "no weights"
        raise ValueError(f"{model} holds {kind} ({missing[0]} is not there). Save the whole model as safetensors.")
    return {name: t for file in sorted(names) for name, t in load_file(folder / file).items()}


def _accumulators(folder: str, model: nn.Module) -> dict[str, Tensor]:
    try:
        found = named_as_in(model, ContinualMemory.load(folder)).get("accumulator")
    except NoMemoryError:
        return {}
    return {n: found[n] for n, p in model.named_parameters() if n in found and found[n].shape[1:] == p.shape[1:]}


def _renamed(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return named_as_in(model, ContinualMemory({f"weights/{n}": t for n, t in weights.items()})).get("weights")


class _Blender:
    """Puts points between both models into `model`, which is loaded from the tuned one."""

    def __init__(self, model: nn.Module, start: str, tuned: str) -> None:
        self.state = model.state_dict()
        own = _weights(tuned)
        if not own.keys() <= self.state.keys():  # Transformers converts the file's names
            own = {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters()}
        old = _renamed(model, _weights(start))
        if any(n.startswith(f"{model.base_model_prefix}.") for n in old.keys() - own.keys()):  # of the start's, too
            with suppress(ValueError):  # a class that is not known here
                whole, found = load_saved(start, dtype="auto", output_loading_info=True)
                old |= _renamed(model, {n: t for n, t in whole.state_dict().items() if n not in found["missing_keys"]})
        fitting = {n for n, t in own.items() if n in old and old[n].shape == t.shape} | {*match_rows(old, model, True)}
        self.pairs = {n: (old[n], t) for n, t in own.items() if n in fitting and t.ndim and t.is_floating_point()}
        self.only_tuned = [n for n in own if n not in self.pairs]
        layers = {n: re.search(r"\.(\d+)\.", n) for n, _ in model.named_parameters()}
        deepest = max((int(m[1]) for m in layers.values() if m), default=0) or 1
        self.depth, other = {}, 0.0  # embeddings count as the first layer, what follows the last one as the last
        for n, m in layers.items():
            self.depth[n] = int(m[1]) / deepest if m else other
            other = 1.0 if m else other
        self.old, self.new = _accumulators(start, model), _accumulators(tuned, model)
        self.old_mean = mean_over_weights(self.old.values()) or 1.0
        self.new_mean = mean_over_weights(map(self._grown, self.new)) or 1.0

    def _grown(self, name: str) -> Tensor:
        now, before = self.new[name], self.old.get(name)
        return now if before is None or before.shape != now.shape else (now - before).clamp_(min=0)

    def share(self, path: str, name: str, share: float, rows: int) -> Tensor:
        """How much of the way to the tuned model the first `rows` of a parameter go."""
        if path != "memory":
            return torch.tensor(share + (1 - share) * self.depth.get(name, 1.0) if path == "depth" else share)
        # a model without a memory counts all its weights alike
        old = self.old[name][:rows] / self.old_mean if name in self.old else torch.ones(())
        new = self._grown(name)[:rows] / self.new_mean if name in self.new else torch.ones(())
        towards, back = share * new, (1 - share) * old
        return torch.where(towards + back > 0, towards / (towards + back), share)

    @torch.no_grad()
    def put(self, path: str, share: float) -> None:
        """Make the model the point `share` (0: start, 1: tuned) of `path`; what only the tuned one has stays."""
        for name, (start, tuned) in self.pairs.items():
            rows = min(len(start), len(tuned))  # an embedding may have gained or lost some
            part = self.share(path, name, share, rows)
            self.state[name][:rows].copy_(torch.lerp(start[:rows].float(), tuned[:rows].float(), part))


def blend(
    start: str, tuned: str, output_dir: str, guard: str | None = None, eval_file: str | None = None,
    max_rise: float = 0.02, shares: tuple[float, ...] = SHARES, samples_drawn: int = 32, length: int = 128,
) -> dict[str, Any]:  # fmt: skip
    """Score models between `start` and `tuned`, and save the one that is best at the task at a bounded cost.

    A model is scored at each `share` of three paths from start to tuned: `line`, every weight alike (WiSE-FT, arXiv
    2109.01903); `depth`, from `share` of the way in the first layer to all of it in the last (LiNeS, arXiv
    2410.17146); `memory`, each weight by the importance that the method `merge` gives it, if a continual memory lies
    beside either model. Tensors that the start lacks, such as a new head, are the tuned model's.

    The saved model has the best task score of those whose guard loss rose by at most `max_rise`; without `eval_file`
    it is the one with the largest share. `output_dir` also gets the tokenizer, the tuned model's memory, `blend.json`
    and `blend.png`. Weights are mapped from their files: one model is in memory, and a copy of each whose file has
    other names than its class in Transformers.

    Args:
        start: folder or Hub id of the model before its training, saved as safetensors.
        tuned: the same of the model after it.
        output_dir: folder for the chosen model, the table and the figure.
        guard: texts for the guard loss of a language model, a file or a Hub id, with `:column` (default: the start's
            own samples and plain English); for a classifier, a file like `eval_file` that it should still do well on.
        eval_file: .json, .jsonl, .csv or .parquet with the columns `text` and `label` for a classifier (scored by
            accuracy), else `messages`, `prompt` and `completion`, or `text` (scored by loss).
        max_rise: how much the guard loss may rise, as a share of its value at the first point.
        shares: the points of a path that are scored, from 0 (start; must be the first) to 1 (tuned).
        samples_drawn: number of texts for the guard at most.
        length: tokens of such a text at most.

    Returns:
        The content of `blend.json`: `points` (each `path`, `share`, `task`, `guard_loss`, `guard_kl`, `rise`),
        `chosen` (index of the saved point), `metric` ("loss", "accuracy" or None), `rule` (of the choice),
        `only_tuned` (names of tensors that only the tuned model has), `start`, `tuned` and `guard_texts`.

    Raises:
        ValueError: a model without safetensors weights; a classifier without a file to score it on; other columns.
    """
    _weights(tuned)  # says what is wrong with an adapter
    model = load_saved(tuned, dtype="auto").eval().to(PartialState().device)
    tokenizer, causal = AutoTokenizer.from_pretrained(tuned), kind_of_model(model) == "causal"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if not causal and kind_of_model(model) != "sequence":
        raise ValueError(f"{tuned} is no causal language model and gives a text no label: it cannot be scored.")
    if not causal and guard is None and eval_file is None:
        raise ValueError("A classifier has no general text: give eval_file, guard, or both (text and label).")
    blender = _Blender(model, start, tuned)
    blender.put("line", 0.0)
    if causal:
        answers, guard = general_answers(model, tokenizer, guard, samples_drawn, length, seed=0)
    kept = _batches(model, tokenizer, guard) if guard is not None and not causal else None
    task = _batches(model, tokenizer, eval_file) if eval_file is not None else None
    metric = None if task is None else "loss" if causal else "accuracy"
    points: list[dict[str, Any]] = []
    for path in PATHS if blender.old or blender.new else PATHS[:2]:
        for share in shares if path == "line" else [s for s in shares if s < 1 and (path == "depth" or s > 0)]:
            blender.put(path, share)
            score = _score(model, task)[metric] if task and metric else None
            loss, kl = measure(model, answers) if causal else (_score(model, kept)["loss"] if kept else None, None)
            first = points[0]["guard_loss"] if points else loss
            rise = loss / first - 1 if loss is not None and first else None
            numbers = {"task": score, "guard_loss": loss, "guard_kl": kl, "rise": rise}
            points.append({"path": path, "share": share, **numbers})
            logger.info(str(points[-1]))

    def rank(i: int) -> tuple[float, float]:
        score = points[i]["task"] if metric else points[i]["share"]
        return -score if metric == "loss" else score, -(points[i]["rise"] or 0.0)

    chosen = max((i for i, p in enumerate(points) if (p["rise"] or 0.0) <= max_rise), key=rank)
    rule = f"{BEST[metric]} of the points whose guard loss rose by at most {100 * max_rise:g} %"
    results: dict[str, Any] = {"start": start, "tuned": tuned, "metric": metric, "guard_texts": guard, "rule": rule}
    results |= {"chosen": chosen, "points": points, "only_tuned": blender.only_tuned}
    blender.put(points[chosen]["path"], points[chosen]["share"])
    folder = Path(output_dir)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tuned).save_pretrained(folder)  # without the padding of the scoring
    weights = samples(model)
    del model, blender
    try:
        memory = ContinualMemory.load(tuned)
        memory.put("samples", weights)  # by which it knows its model
        memory.save(folder)
    except NoMemoryError:
        (folder / MEMORY_NAME).unlink(missing_ok=True)
    write_json(folder / "blend.json", results)
    try:
        plot_frontier(results, folder / "blend.png")
    except ImportError as error:
        logger.warning(f"No figure: {error}")
    return results


def _batches(model: Any, tokenizer: Any, file: str) -> list[Any]:
    """The rows of `file` as a model's inputs."""
    rows = read_table(file)["train"]
    names = [model.config.id2label[i] for i in range(getattr(model.config, "num_labels", 0))]
    counted = getattr(rows.features.get("label"), "dtype", "").startswith("int")
    if counted and {str(label) for label in rows["label"]} <= set(names):  # names that look like numbers
        rows, counted = rows.cast_column("label", Value("string")), False
    tasks = [Task("scored", rows, rows, label_names=names if counted else None)]
    if kind_of_model(model) == "causal":
        tasks = prepare_language_tasks(tasks, tokenizer, encoder_decoder=False)
        collate: Any = DataCollatorForSeq2Seq(tokenizer, model)
    else:
        tasks, collate = prepare_tasks(tasks, tokenizer, model.config.label2id), DataCollatorWithPadding(tokenizer)
    return list(DataLoader(tasks[0].train_dataset, batch_size=8, collate_fn=collate))


@torch.no_grad()
def _score(model: Any, batches: list[Any]) -> dict[str, float]:
    """Mean loss and accuracy over all labels."""
    loss = right = count = 0.0
    for batch in batches:
        inputs = {k: t.to(model.device) for k, t in batch.items()}
        labels = inputs.pop("labels")
        logits = model(**inputs)["logits"].float()
        if logits.ndim == 3:  # each token is to be foretold by those before
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss += float(F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        count += int((labels != -100).sum())
    return {"loss": loss / count, "accuracy": right / count}


def format_blend(results: dict[str, Any]) -> str:
    """The points as a Markdown table, the chosen one in bold."""
    rows = [["path", "share", results["metric"] or "task", "guard loss", "rise", "KL from start"]]
    for i, p in enumerate(results["points"]):
        task, loss, kl = ("" if p[k] is None else f"{p[k]:.4f}" for k in ("task", "guard_loss", "guard_kl"))
        rise = "" if p["rise"] is None else f"{100 * p['rise']:+.1f} %"
        cells = [p["path"], f"{p['share']:g}", task, loss, rise, kl]
        rows.append([f"**{c}**" if c and i == results["chosen"] else c for c in cells])
    return markdown_table(rows, "<>>>>>") + f"\n\nBold: saved ({results['rule']})."


def plot_frontier(results: dict[str, Any], path: Path) -> None:
    """Write the task's score over the guard loss, a line a path; without the task the share."""
    figure = new_figure(5.5, 4.0)
    axes = figure.subplots()
    metric, points = results["metric"], results["points"]
    x, y = "share" if points[0]["guard_loss"] is None else "guard_loss", "task" if metric else "share"
    for i, name in enumerate(dict.fromkeys(p["path"] for p in points)):
        own = [p for p in points if p["path"] == name]
        axes.plot([p[x] for p in own], [p[y] for p in own], label=name, linewidth=1, **series_style(i))
    saved = points[results["chosen"]]
    axes.plot(saved[x], saved[y], "o", color="black", fillstyle="none", markersize=14, label="saved")
    axes.set_xlabel("share" if x == "share" else "guard loss (nats)")
    axes.set_ylabel(f"task {metric}" if metric else "share of the way to the tuned model")
    axes.grid(color="0.9")
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """`python -m classp_hf blend`."""
    command = argparse.ArgumentParser(
        "python -m classp_hf blend", description=blend.__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    command.add_argument("start", metavar="START")
    command.add_argument("tuned", metavar="TUNED")
    command.add_argument("--output_dir", required=True)
    command.add_argument("--guard", metavar="TEXTS")
    command.add_argument("--eval_file", metavar="FILE")
    command.add_argument("--max_rise", type=float, metavar="SHARE")
    try:
        results = blend(**vars(command.parse_args(arguments)))
    except (ValueError, OSError) as error:
        command.error(str(error))
    print("\n" + format_blend(results))
