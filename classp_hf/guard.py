"""What a training costs a language model: loss on general text, and how far the model went from where it started."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast, broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.utils import logging

from .files import replacing
from .names import bare_model, is_language_model, reshard, samples, trainable_parameters
from .rehearsal import Answers, answer, draw_samples, measure, padded, read_texts, readable

logger = logging.get_logger(__name__)

# In checkpoints: token ids of the fixed texts, and the starting model's answers to them and to new examples.
GUARD_NAME = "guard.st"
# 24 paragraphs of plain English, written for this package (Apache-2.0).
ENGLISH = Path(__file__).with_name("guard_texts.txt")
SHARE = 0.03  # of the training's time, for all evaluations


def check_causal(model: Any) -> None:
    if not is_language_model(model) or bare_model(model).config.is_encoder_decoder:
        name = type(bare_model(model)).__name__
        raise ValueError(f"The guard measures causal language models, and {name} is none: leave the guard out.")


def general_answers(
    model: Any, tokenizer: Any, source: str | None, count: int, length: int, seed: int
) -> tuple[Answers, str]:
    """The starting model's answers to the fixed texts, and what these are: those of `source`, else own samples and
    plain English."""
    check_causal(model)
    length = readable(model, length)
    if source is not None:
        texts, what = read_texts(source, tokenizer, count, length), Path(source).name
    else:
        texts, what = draw_samples(model, tokenizer, count, length, seed), "the model's own samples"
        if tokenizer is not None:
            texts, what = texts + read_texts(str(ENGLISH), tokenizer, 1000, length), f"{what} and plain English"
    return answer(model, texts, 32, batch_size=8), what


def spacing(steps: int, step: float, evaluation: float, least: int = 0) -> int:
    """Steps between evaluations, such that all of them, also before and after, take `SHARE` of the time: seconds a
    `step` and an `evaluation`. At `least` so many lie between start and end, whatever they take."""
    count = max(int(SHARE * steps * step / max(evaluation, 1e-9)) - 2, least)
    return max(math.ceil(steps / (count + 1)), 1)


class GuardCallback(TrainerCallback):
    """Measures what a training costs a causal language model. Without `stop` it changes nothing in the training.

    Before the training, every few steps and at the end it measures the loss on fixed texts (`guard_loss`, nats a
    token), KL(starting model || model) on them (`guard_kl`, nats a token) and on the first 16 new examples
    (`guard_kl_new`, which predicts forgetting: "RL's Razor", arXiv 2509.04259). It keeps the starting model's answers
    (the 32 most probable tokens at each position), not its weights. The values go into `state.log_history` and to
    loggers: to all with `register` or [`ContinualTrainer`], to those behind it in a plain Trainer's `callbacks`.
    Further trainings of the same model, as in a sequence, are measured from the same start.

    Args:
        texts: a file or a Hub id, with `:column`. Default: the model's own samples and 24 paragraphs of plain English.
        every: steps between evaluations, >= 1. Default: as many as keep all evaluations under 3% of the training's
            time, if need be none but those before and after; `stop` asks for nine between, whatever they take. The
            time to draw the samples is not counted.
        stop: end the training when the loss has risen by more than this share, > 0 (0.1: 10%), and restore the trained
            weights of the previous evaluation, of which the CPU's memory holds one copy (of a sharded model every rank
            its part). The memory of gradients and the optimizer are not restored. A resumed training restores no
            weights from before its checkpoint. Default: never.
        samples: number of texts at most, of `texts` or drawn, >= 1.
        length: tokens of a text at most, >= 8.

    Raises:
        ValueError: an argument out of range; when Trainer is built, another kind of model, or `stop` with
            `load_best_model_at_end`; when training begins, `texts` that hold no texts.
    """

    applied: ClassVar[bool] = False  # whether any training of this process began with one

    def __init__(
        self, texts: str | None = None, every: int | None = None, stop: float | None = None, samples: int = 32,
        length: int = 128,
    ) -> None:  # fmt: skip
        for name, value, least in (("every", every, 1), ("samples", samples, 1), ("length", length, 8)):
            if value is not None and value < least:
                raise ValueError(f"The guard's {name} must be >= {least}, got {value}.")
        if stop is not None and not stop > 0:
            raise ValueError(f"The guard's stop must be > 0, got {stop}. 0.1 allows the loss to rise by 10%.")
        self.texts, self.every, self.stop, self.samples, self.length = texts, every, stop, samples, length
        # where checkpoints lie; `ContinualTrainer` gives a sequence's present task
        self.folder: Callable[[Any], Path] = lambda args: Path(args.output_dir)
        self.checkpoint: Path | None = None
        self.model: Any = None
        # the starting model's to the texts, "general", and to the first new examples, "new"
        self.answers: dict[str, Answers] = {}
        self.known: dict[str, Any] = {}
        self.pending: dict[str, float] = {}  # values that the next log takes along

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if self.stop is not None and args.load_best_model_at_end:
            raise ValueError("The guard's stop and load_best_model_at_end both choose the weights: leave one out.")
        if self.stop is not None and getattr(args, "deepspeed_plugin", None):
            raise ValueError("The guard's stop puts weights back, which DeepSpeed keeps in buffers of its own.")
        check_causal(model)

    def on_train_begin(self, args, state, control, model=None, processing_class=None, train_dataloader=None, **kwargs):
        type(self).applied = True
        self.first, self.spacing, self.good, self.stopped = state.global_step, self.every, {}, None
        rows = _first_examples(train_dataloader, readable(model, self.length))
        resumed = bool(state.global_step) and self._resume(args, state)
        if not resumed and (not self.answers or self.model not in (None, model)):
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            seed = args.seed + 104729  # other samples than pseudo-rehearsal's
            found, what = general_answers(model, tokenizer, self.texts, self.samples, self.length, seed)
            self.answers, self.known = {"general": found}, {"what": what, "training": 0, "history": []}
        new = self.answers.pop("new", None)
        if rows and not resumed:
            self.answers["new"] = answer(model, rows, 32, batch_size=8)
        elif rows and new is not None:  # whose texts no file holds
            new.ids, lengths = padded(rows)
            self.answers |= {"new": new} if torch.equal(lengths, new.lengths) else {}
        self.known["training"] += not resumed
        self.model, started = model, _now(model)
        self._take(state)
        self.seconds = _now(model) - started
        if self._is_beyond():
            raise ValueError(
                f"The guard's loss of the resumed checkpoint is beyond stop={self.stop:g} already. Resume from an "
                "earlier one, or start again."
            )
        self._keep(args, state)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        done, last = state.global_step - self.first, state.global_step >= state.max_steps
        if done == 1:
            self.clock = _now(model)
        if self.spacing is None and done == 4:
            step, least = (_now(model) - self.clock) / 3, 0 if self.stop is None else 9
            found = spacing(state.max_steps - self.first, step, self.seconds, least)
            self.spacing = broadcast_object_list([found])[0]  # clocks of ranks differ
        counted = done if self.every is None else state.global_step  # a resumed run's steps are the same
        if not (last or control.should_training_stop) and (self.spacing is None or counted % self.spacing):
            return
        self.pending, control.should_log = self._take(state), True
        if not self._is_beyond():
            return self._keep(args, state)
        self._restore()
        self.stopped, control.should_training_stop = state.global_step, True
        if args.process_index == 0:
            logger.warning(
                f"The guard stopped the training at step {self.stopped}: the loss on general text had risen by more "
                f"than {100 * (self.stop or 0):g} %. The weights are those of step {self.good_step}."
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs.update(self.pending)
        if "model" in kwargs:  # Trainer's own event: the entry is written already
            state.log_history[-1].update(self.pending)
        self.pending = {}

    def on_save(self, args, state, control, **kwargs):
        if args.should_save and not state.is_hyper_param_search:
            self.write(self.folder(args) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args, state, control, model=None, **kwargs):
        now = samples(model)
        if any(not torch.equal(t, now[n]) for n, t in self.measured.items()):  # loaded, put back or merged
            state.log_history.append({**self._take(state), "step": state.global_step})
        self.good, self.checkpoint = {}, None
        if args.process_index == 0:
            logger.warning(self.report()["summary"])

    def _take(self, state: Any) -> dict[str, float]:
        values = dict(zip(("guard_loss", "guard_kl"), measure(self.model, self.answers["general"])))
        if "new" in self.answers:
            values["guard_kl_new"] = measure(self.model, self.answers["new"])[1]
        values = broadcast_object_list([values])[0]  # ranks have to agree on whether to stop
        self.measured = samples(self.model)
        self.known["history"].append({"training": self.known["training"], "step": state.global_step, **values})
        return values

    def _is_beyond(self) -> bool:
        first, last = (self.known["history"][i]["guard_loss"] for i in (0, -1))
        return self.stop is not None and bool(last > (1 + self.stop) * first)

    def _keep(self, args: Any, state: Any) -> None:
        self.good_step = state.global_step
        if self.stop is not None and (args.process_index == 0 or reshard(self.model)):
            self.good = {n: p.detach().to("cpu", copy=True) for n, p in trainable_parameters(self.model)}

    @torch.no_grad()
    def _restore(self) -> None:
        sharded = reshard(self.model)
        for name, p in trainable_parameters(self.model):
            if name in self.good:
                p.copy_(self.good[name])
            if not sharded:
                p.copy_(broadcast(p.detach()))

    def write(self, folder: Path) -> None:
        """Write `guard.st`, by atomic rename, if any training has begun."""
        tensors = {f"{k}/{n}": t.contiguous() for k, a in self.answers.items() for n, t in vars(a).items()}
        if "new" in self.answers:  # nobody's training examples lie beside a model
            tensors["new/ids"] = torch.zeros_like(tensors["new/ids"])
        if tensors:
            with replacing(folder / GUARD_NAME) as temporary:
                save_file(tensors, temporary, metadata={"guard": json.dumps(self.known)})

    def read(self, folder: Path) -> bool:
        """Go on from the `guard.st` in `folder`. False: there is none. ValueError: no guard wrote it."""
        path = folder / GUARD_NAME
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                known, keys = json.loads(file.metadata()["guard"]), file.keys()
                kinds, parts = {key.partition("/")[0] for key in keys}, [f.name for f in fields(Answers)]
                answers = {k: Answers(*(file.get_tensor(f"{k}/{part}") for part in parts)) for k in kinds}
            right = "general" in answers and known.keys() == {"what", "training", "history"}
            if not right or not all(a.whole() for a in answers.values()):
                raise ValueError("texts and answers do not belong together")
            float(known["history"][0]["guard_loss"])
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not what a guard wrote ({error}). Delete it to measure from here on."
            ) from error
        self.answers, self.known = answers, known
        return True

    def _resume(self, args: Any, state: Any) -> bool:
        step = self.folder(args) / f"checkpoint-{state.global_step}"
        given = (self.checkpoint, args.resume_from_checkpoint, step)
        if any(self.read(Path(str(folder))) for folder in given if folder is not None):
            return True
        logger.warning(f"There is no {GUARD_NAME} in {step}: the guard measures from this checkpoint on.")
        return False

    def report(self) -> dict[str, Any]:
        """Return what the training cost, once it has begun: `texts` (a description), `tokens` (their number);
        `loss_before`, `loss_after` (nats a token), `rise` (a share); `kl`, `kl_new` (nats a token; the latter from the
        start of the last training, or None); `history`, a list of all measurements; `summary`, a sentence."""
        history = self.known["history"]
        before, after, kl = history[0]["guard_loss"], history[-1]["guard_loss"], history[-1]["guard_kl"]
        new, rise = history[-1].get("guard_kl_new"), after / before - 1 if before else 0.0
        summary = f"General text: loss {before:.2f} -> {after:.2f} ({100 * rise:+.1f} %), {kl:.2f} nats from the start"
        summary += "." if new is None else f"; {new:.2f} nats on the new data."
        tokens = int(self.answers["general"].lengths.sum())
        found = {"summary": summary, "texts": self.known["what"], "tokens": tokens, "loss_before": before}
        return {**found, "loss_after": after, "rise": rise, "kl": kl, "kl_new": new, "history": history}


class LaunchedGuard(GuardCallback):
    """The guard that `register(guard=...)` gives every Trainer, with the arguments given there."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__(**self.options)


def guards(trainer: Any) -> list[GuardCallback]:
    """The guards among a Trainer's callbacks."""
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, GuardCallback)]


def _first_examples(dataloader: Any, length: int) -> list[list[int]]:
    """Token ids of the first examples that are trained on; of a stream none, which reading would use up."""
    dataset: Any = getattr(dataloader, "dataset", None)
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        return []
    rows = [row for i in range(min(16, len(dataset))) if isinstance(row := dataset[i], dict) and "input_ids" in row]
    masks = [row.get("attention_mask", [1] * len(row["input_ids"])) for row in rows]
    ids = [[int(i) for i, m in zip(row["input_ids"], mask) if m][:length] for row, mask in zip(rows, masks)]
    return [row for row in ids if len(row) > 1]


def _now(model: Any) -> float:
    """Seconds, when the device has done what it was given."""
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()
