"""`python -m classp_hf blend START TUNED --output_dir DIR`: models between a model and what it was tuned to."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from torch import Tensor
from transformers.utils import logging

from .guard import check_causal, general_texts
from .language import prepare_language_tasks
from .memory import MEMORY_NAME, ContinualMemory, NoMemoryError, find_memory
from .names import is_language_model, mean_over_weights, samples
from .rehearsal import answer, measure
from .report import markdown_table, new_figure, save_figure, series_style, write_json
from .tasks import Task, prepare_tasks

logger = logging.get_logger(__name__)

PATHS = ("line", "depth", "memory")
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class _Files:
    """The tensors of a model's folder or Hub repository, or of its memory, read one by one."""

    def __init__(self, files: list[Path], prefix: str = "") -> None:
        self.files = [safe_open(path, framework="pt").__enter__() for path in files]
        self.prefix = prefix
        self.where = {key: file for file in self.files for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118

    def get(self, name: str, base: str = "") -> Tensor | None:
        """The tensor `name`, also where only one of both models has the head's prefix `base`; None: there is none."""
        for known in (name, name.removeprefix(f"{base}."), f"{base}.{name}"):
            if self.prefix + known in self.where:
                return self.where[self.prefix + known].get_tensor(self.prefix + known)
        return None


def _weights(model: str) -> _Files:
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json"]))
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    if missing := [name for name in sorted(names) if not (folder / name).is_file()]:
        kind = (
            "an adapter: merge it into its model first" if (folder / "adapter_config.json").is_file() else "no weights"
        )
        raise ValueError(f"{model} holds {kind} ({missing[0]} is not there). Save the whole model as safetensors.")
    return _Files([folder / name for name in sorted(names)])


def _accumulators(model: str) -> _Files | None:
    try:
        path = find_memory(model)
    except NoMemoryError:
        return None
    files = _Files([path], "accumulator/")
    return files if files.where else None


class _Blender:
    """Puts points between both models into `model`, which is loaded from the tuned one."""

    def __init__(self, model: Any, start: str, tuned: str) -> None:
        self.start, self.tuned, self.base = _weights(start), _weights(tuned), model.base_model_prefix
        self.state = model.state_dict()
        names = [name for name, _ in model.named_parameters()]
        if not any(name in self.state for name in self.tuned.where):
            raise ValueError(f"The weights of {tuned} have other names than its model's: save it again.")
        numbered = [re.search(r"\.(\d+)\.", name) for name in names]
        count = max((int(m[1]) for m in numbered if m), default=0)
        first = next((i for i, m in enumerate(numbered) if m), 0)
        # embeddings count as the first layer, what follows the last one as the last
        self.depth = {
            n: int(m[1]) / max(count, 1) if m else float(i > first) for i, (n, m) in enumerate(zip(names, numbered))
        }
        self.old, self.new = _accumulators(start), _accumulators(tuned)
        means = [
            mean_over_weights(t for n in names if (t := which(n)) is not None) for which in (self._f_old, self._f_new)
        ]
        self.means = [mean or 1.0 for mean in means]
        self.only_tuned: list[str] = []

    def _f_old(self, name: str) -> Tensor | None:
        return _checked(self.old.get(name, self.base)) if self.old is not None else None

    def _f_new(self, name: str) -> Tensor | None:
        now, before = self.new.get(name, self.base) if self.new is not None else None, self._f_old(name)
        if now is None or before is None or now.shape != before.shape:
            return _checked(now)
        return (_checked(now) - before).clamp_(min=0)  # type: ignore[operator]

    def share(self, path: str, name: str, share: float) -> float | Tensor:
        """How much of the way to the tuned model the weights of a parameter go."""
        if path == "line":
            return share
        if path == "depth":
            return share + (1 - share) * self.depth.get(name, 1.0)
        parts = (self._f_old(name), self._f_new(name))
        # a model without a memory counts all its weights alike
        old, new = (1.0 if f is None else f / mean for f, mean in zip(parts, self.means))
        towards, back = share * new, (1 - share) * old
        total = torch.as_tensor(towards + back)
        return torch.where(total > 0, towards / total.clamp(min=1e-30), share)

    @torch.no_grad()
    def put(self, path: str, share: float) -> None:
        """Make the model the point `share` (0: start, 1: tuned) of `path`; what only the tuned one has stays."""
        self.only_tuned = []
        for name in self.tuned.where:
            if name not in self.state:
                continue
            tuned, start = _found(self.tuned.get(name)), self.start.get(name, self.base)
            if start is None or start.shape[1:] != tuned.shape[1:] or not (tuned.ndim and tuned.is_floating_point()):
                self.only_tuned.append(name)
            else:
                n, part = min(len(start), len(tuned)), self.share(path, name, share)  # rows both have
                part = part[:n] if isinstance(part, Tensor) and part.ndim else float(part)
                # not in place: safetensors gives views of the mapped file, which the next reading would see
                tuned = torch.cat([torch.lerp(start[:n].float(), tuned[:n].float(), part).to(tuned.dtype), tuned[n:]])
            self.state[name].copy_(tuned)


def _found(t: Tensor | None) -> Tensor:
    assert t is not None
    return t


def _checked(t: Tensor | None) -> Tensor | None:
    if t is not None and not (t.is_floating_point() and torch.isfinite(t).all() and (t >= 0).all()):
        raise ValueError("The continual memory holds what no run of this version writes: use the one a run wrote.")
    return None if t is None else t.float()


def blend(
    start: str,
    tuned: str,
    output_dir: str,
    guard: str | None = None,
    eval_file: str | None = None,
    max_rise: float = 0.02,
    shares: tuple[float, ...] = SHARES,
    samples_drawn: int = 32,
    length: int = 128,
) -> dict[str, Any]:
    """Score models between `start` and `tuned`, and save the one that is best at the task at a bounded cost.

    Three paths lead from one to the other, and at each `share` of them a model is scored: `line`, every weight alike
    (WiSE-FT, arXiv 2109.01903); `depth`, from `share` of the way in the first layer to all of it in the last (LiNeS,
    arXiv 2410.17146); `memory`, by how much each model's training needed a weight, as the method `merge` weighs, if
    a continual memory lies beside either (a model without one counts all its weights alike). Tensors that the start
    lacks, such as a new head, are the tuned model's.

    The point that is saved, with tokenizer and the tuned model's memory, has the best task score of those whose guard
    loss rose by at most `max_rise`; without `eval_file` it is the one with the largest share. Into `output_dir` go
    also `blend.json` and `blend.png`. Weights are read tensor by tensor: one model is in memory.

    Args:
        start, tuned: folders or Hub ids of models saved as safetensors.
        guard: texts for the guard loss ([`~classp_hf.rehearsal.read_texts`]), default the start's own samples and
            plain English; of a classifier a file of rows that it is to keep, like `eval_file`.
        eval_file: .json, .jsonl, .csv or .parquet with the columns `text` and `label` for a classifier (scored by
            accuracy), else `messages`, `prompt` and `completion`, or `text` (by loss on what is to be written).
        max_rise: a share of the start's guard loss.
        samples_drawn, length: texts for the guard, and tokens of a text, at most.

    Returns:
        The content of `blend.json`: `points` (each `path`, `share`, `task`, `guard_loss`, `guard_kl`, `rise`),
        `chosen` (its number), `metric`, `rule`, `only_tuned`.

    Raises:
        ValueError: a model without such weights; a classifier without a file to score it on; rows of another kind.
    """
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    _weights(tuned)  # says what is wrong with an adapter
    config = AutoConfig.from_pretrained(tuned)
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None:
        raise ValueError(f"{tuned} names no class of Transformers in its config ({config.architectures}).")
    model, tokenizer = cls.from_pretrained(tuned, dtype="auto").eval(), AutoTokenizer.from_pretrained(tuned)
    model = model.to(PartialState().device)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    blender, causal = _Blender(model, start, tuned), is_language_model(model)
    blender.put("line", 0.0)
    if causal:
        check_causal(model)
        texts, what = general_texts(model, tokenizer, guard, samples_drawn, length, seed=0)
        answers = answer(model, texts, 32, batch_size=8)
    elif guard is None and eval_file is None:
        raise ValueError("A classifier has no general text: give eval_file, guard, or both (text and label).")
    task = _scorer(model, tokenizer, eval_file) if eval_file else None
    kept = _scorer(model, tokenizer, guard) if guard and not causal else None
    points: list[dict[str, Any]] = []
    for path in PATHS if blender.old or blender.new else PATHS[:2]:
        for share in shares if path == "line" else [s for s in shares if s < 1 and (path == "depth" or s > 0)]:
            blender.put(path, share)
            point: dict[str, Any] = {"path": path, "share": share, "task": task()[0] if task else None}
            point["guard_loss"], point["guard_kl"] = (
                measure(model, answers) if causal else (kept()[1] if kept else None, None)
            )
            first = points[0]["guard_loss"] if points else point["guard_loss"]
            point["rise"] = point["guard_loss"] / first - 1 if first else None
            points.append(point)
            logger.info(str(point))
    sign = -1 if causal else 1  # a loss, or an accuracy

    def rank(i: int) -> tuple[float, float]:
        point = points[i]
        return point["share"] if task is None else sign * point["task"], -(point["rise"] or 0.0)

    chosen = max((i for i, p in enumerate(points) if (p["rise"] or 0.0) <= max_rise), key=rank)
    best = "the largest share" if task is None else "the lowest task loss" if causal else "the highest accuracy"
    results = {
        "start": start,
        "tuned": tuned,
        "metric": None if task is None else "loss" if causal else "accuracy",
        "guard_texts": what if causal else guard,
        "rule": f"{best} of the points whose guard loss rose by at most {100 * max_rise:g} %",
        "chosen": chosen,
        "points": points,
        "only_tuned": blender.only_tuned,
    }
    blender.put(points[chosen]["path"], points[chosen]["share"])
    folder = Path(output_dir)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tuned).save_pretrained(folder)  # without the padding of the scoring
    weights = samples(model)
    del model, blender.state
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


def _scorer(model: Any, tokenizer: Any, file: str) -> Callable[[], tuple[float, float]]:
    """A function that gives the model's score on the rows of `file`, and its loss."""
    from datasets import load_dataset
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    form = {"jsonl": "json"}.get(suffix := Path(file).suffix[1:], suffix)
    rows = load_dataset(form, data_files=file, split="train")
    given, causal = [Task("scored", rows, rows)], is_language_model(model)
    prepared = (
        prepare_language_tasks(given, tokenizer, False)
        if causal
        else prepare_tasks(given, tokenizer, model.config.label2id)
    )
    collate: Any = DataCollatorForSeq2Seq(tokenizer, model) if causal else DataCollatorWithPadding(tokenizer)
    columns = ("input_ids", "attention_mask", "token_type_ids", "labels", "label")
    data = [{k: v for k, v in row.items() if k in columns} for row in prepared[0].train_dataset]

    @torch.no_grad()
    def score() -> tuple[float, float]:
        loss = right = count = 0.0
        for i in range(0, len(data), 8):
            batch = collate(data[i : i + 8]).to(model.device)
            labels = batch.pop("labels")
            logits = model(**batch)["logits"].float()
            if causal:
                logits, labels = logits[:, :-1], labels[:, 1:]
            loss += float(torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
            count += int((labels != -100).sum())
        return (loss if causal else right) / count, loss / count

    return score


def format_blend(results: dict[str, Any]) -> str:
    """The points as a Markdown table, the chosen one in bold."""
    rows = [["path", "share", results["metric"] or "task", "guard loss", "rise", "KL from start"]]
    for i, p in enumerate(results["points"]):
        numbers = (p["task"], p["guard_loss"], p["guard_kl"])
        task, loss, kl = ("" if v is None else f"{v:.4f}" for v in numbers)
        rise = "" if p["rise"] is None else f"{100 * p['rise']:+.1f} %"
        cells = [p["path"], f"{p['share']:g}", task, loss, rise, kl]
        rows.append([f"**{c}**" if c and i == results["chosen"] else c for c in cells])
    return markdown_table(rows, "<>>>>>") + f"\n\nBold: saved ({results['rule']})."


def plot_frontier(results: dict[str, Any], path: Path) -> None:
    """Write the task's score over the guard loss, a line a path; without the task the share."""
    figure = new_figure(5.5, 4.0)
    axes = figure.subplots()
    metric, points = results["metric"], results["points"]
    for i, name in enumerate(PATHS):
        own = [p for p in points if p["path"] == name]
        xs = [p["share"] if p["guard_loss"] is None else p["guard_loss"] for p in own]
        ys = [p["share"] if metric is None else p["task"] for p in own]
        if own:
            axes.plot(xs, ys, label=name, linewidth=1, **series_style(i))
        if points[results["chosen"]] in own:
            j = own.index(points[results["chosen"]])
            axes.plot(xs[j], ys[j], "o", color="black", fillstyle="none", markersize=14, label="saved")
    axes.set_xlabel("share" if points[0]["guard_loss"] is None else "guard loss (nats)")
    axes.set_ylabel(f"task {metric}" if metric else "share of the way to the tuned model")
    axes.grid(color="0.9")
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """`python -m classp_hf blend`."""
    command = argparse.ArgumentParser(
        prog="python -m classp_hf blend", description=blend.__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_argument("start", metavar="START")
    command.add_argument("tuned", metavar="TUNED")
    command.add_argument("--output_dir", required=True)
    command.add_argument("--guard", metavar="TEXTS")
    command.add_argument("--eval_file", metavar="FILE")
    command.add_argument("--max_rise", type=float, default=0.02, metavar="SHARE")
    try:
        results = blend(**vars(command.parse_args(arguments)))
    except (ValueError, FileNotFoundError) as error:
        command.error(str(error))
    print(format_blend(results))
