"""What a training costs a language model: loss on general text, and how far the model went from where it started."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from .files import replacing
from .names import bare_model, is_language_model, reshard, samples, trainable_parameters
from .rehearsal import Answers, answer, divergence, draw_samples, read_texts

logger = logging.get_logger(__name__)

GUARD_NAME = "guard.st"
"""In checkpoints: the fixed texts, the first new examples (their token ids) and the starting model's answers."""
ENGLISH = Path(__file__).with_name("guard_texts.txt")
"""24 paragraphs of plain English, written for this package (Apache-2.0)."""
SHARE = 0.03
"""Of the training's time, for all evaluations."""
_TOP_K, _BATCH, _NEW, _WATCHED, _LEAST = 32, 8, 16, 3, 10


def general_texts(model: Any, tokenizer: Any, source: str | None, count: int, length: int, seed: int):
    """Token ids of the fixed texts, and what they are: those of `source`, else own samples and plain English."""
    if source is not None:
        return read_texts(source, tokenizer, count, length), Path(source).name
    texts, what = draw_samples(model, tokenizer, count, length, seed, batch_size=32), "the model's own samples"
    if tokenizer is None:
        return texts, what
    return texts + read_texts(str(ENGLISH), tokenizer, 1000, length), f"{what} and plain English"


def check_causal(model: Any) -> None:
    """Raise a ValueError unless `model` is a causal language model."""
    if not is_language_model(model) or getattr(bare_model(model).config, "is_encoder_decoder", False):
        raise ValueError(
            f"The guard measures causal language models, and {type(bare_model(model)).__name__} is none. Leave --guard "
            "(GuardCallback) out."
        )


@torch.no_grad()
def measure(model: Any, answers: Answers) -> tuple[float, float]:
    """Loss on the texts of `answers` in nats a token, and `KL(answers || model)` in nats a position; no dropout."""
    device, was_training = next(model.parameters()).device, model.training
    loss = kl = 0.0
    model.eval()
    try:
        for rows in torch.arange(len(answers)).split(_BATCH):
            inputs = answers.inputs(rows, device)
            logits = model(**inputs)["logits"].float()
            kl += float(divergence(model, answers, rows, logits=logits)) * int(answers.lengths[rows].sum())
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)[:, 1:]
            loss += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"))
    finally:
        model.train(was_training)
        reshard(model)
    positions = int(answers.lengths.sum())
    return loss / max(positions - len(answers), 1), kl / positions


def spacing(steps: int, step: float, evaluation: float, least: int = 0) -> int:
    """Steps between evaluations, so that all of them, that before and that at the end too, take `SHARE` of the time.

    Args:
        steps: of the training.
        step, evaluation: seconds that one takes.
        least: evaluations between start and end at least, whatever they cost.
    """
    count = max(math.floor(SHARE * steps * step / max(evaluation, 1e-9)) - 2, least, 0)
    return max(math.ceil(steps / (count + 1)), 1)


class GuardCallback(TrainerCallback):
    """Measures what a training costs a causal language model, while any [`transformers.Trainer`] trains it.

    Before the training, every few steps and at the end: the loss on fixed texts (`guard_loss`, nats a token), the KL
    from the starting model on them (`guard_kl`, nats) and on the first 16 examples of the new data (`guard_kl_new`,
    which predicts forgetting: "RL's Razor", arXiv 2509.04259). The starting model's answers are kept (the 32 most
    probable tokens at each position), not its weights. The training itself is the same to the last bit.

    Values go into `state.log_history` and to the loggers that stand behind this callback: all of them if `register`
    or [`ContinualTrainer`] has it, none of `report_to` if it is in a plain Trainer's `callbacks`. A line at the end
    says what the training cost. The next training of the same model goes on from the same start, as in a sequence.

    Args:
        texts: a file or a Hub id, with `:column` ([`~classp_hf.rehearsal.read_texts`]). Default: samples that the model
            draws of itself, and 24 paragraphs of plain English.
        every: steps between evaluations. Default: such that all evaluations take less than 3% of the training's time,
            which may leave those before and after it alone; with `stop` at least nine between. Drawing the samples,
            once, comes on top.
        stop: end the training when the loss has risen by more than this share (0.1: 10%), and put the trained weights
            of the last evaluation before that back. They are kept in the memory of the CPU, once (by sharded models:
            every rank its part); the memory of gradients and the optimizer stay as they are. Default: never.
        samples: texts at most, of `texts` or drawn.
        length: tokens of a text at most.

    Raises:
        ValueError: bad arguments, another kind of model, `stop` with `load_best_model_at_end`.
    """

    def __init__(
        self,
        texts: str | None = None,
        every: int | None = None,
        stop: float | None = None,
        samples: int = 32,
        length: int = 128,
    ) -> None:
        for name, value, least in (("every", every, 1), ("samples", samples, 1), ("length", length, 8)):
            if value is not None and value < least:
                raise ValueError(f"The guard's {name} must be >= {least}, got {value}.")
        if stop is not None and not stop > 0:
            raise ValueError(f"The guard's stop must be > 0, got {stop}. 0.1 allows the loss to rise by 10%.")
        self.texts, self.every, self.stop, self.samples, self.length = texts, every, stop, samples, length
        self.place: Callable[[], Path | None] = lambda: None
        """Where a sequence writes its present task."""
        self.checkpoint: Path | None = None
        self.model: Any = None
        self.general: Answers | None = None
        self.new: Answers | None = None
        self.what = ""
        self.history: list[dict[str, Any]] = []
        self._training = 0
        self._pending: dict[str, float] = {}

    # ---- Events of Trainer ----

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if model is not None:
            check_causal(model)
        if self.stop is not None and args.load_best_model_at_end:
            raise ValueError("The guard's stop and load_best_model_at_end both choose the weights: leave one out.")

    def on_train_begin(
        self, args, state, control, model=None, processing_class=None, train_dataloader=None, **kwargs
    ):
        check_causal(model)
        self._first, self._k, self._good, self._stopped = state.global_step, self.every, {}, None
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        resumed = self._resumed(args, state) if state.global_step else None
        if resumed is not None:
            self.read(resumed)
        elif self.general is None or (self.model is not None and self.model is not model):
            seed, self.history, self._training = args.seed + 104729, [], 0  # of rehearsal: + 7919 a task
            texts, self.what = general_texts(model, tokenizer, self.texts, self.samples, self.length, seed)
            self.general = answer(model, texts, _TOP_K, batch_size=_BATCH)
        if resumed is None:
            rows = _first_examples(train_dataloader, self.length)
            self.new = answer(model, rows, _TOP_K, batch_size=_BATCH) if rows else None
            self._training += 1
        self.model = model
        started = _now(model)
        self._evaluate(state)
        self._seconds = _now(model) - started
        self._keep(args, state)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step, last = state.global_step, control.should_training_stop or state.global_step >= state.max_steps
        if step == self._first + 1:
            self._clock = _now(model)
        if self._k is None and step == self._first + 1 + _WATCHED:
            each = (_now(model) - self._clock) / _WATCHED
            least = _LEAST - 1 if self.stop is not None else 0
            k = spacing(state.max_steps - self._first, each, self._seconds, least)
            self._k = broadcast_object_list([k])[0]  # clocks of ranks differ
        if not last and (self._k is None or (step - self._first) % self._k):
            return
        values = self._evaluate(state)
        self._pending, control.should_log = values, True
        if self.stop is None:
            return
        if values["guard_loss"] <= (1 + self.stop) * self.history[0]["guard_loss"]:
            self._keep(args, state)
        else:
            self._restore()
            self._stopped, control.should_training_stop = step, True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or not self._pending:
            return
        logs.update(self._pending)
        if "model" in kwargs and state.log_history:  # Trainer's own event: the entry is written already
            state.log_history[-1].update(self._pending)
        self._pending = {}

    def on_save(self, args, state, control, **kwargs):
        if args.should_save and not state.is_hyper_param_search and self.general is not None:
            self.write((self.place() or Path(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if not _same(self._measured, samples(model)):  # other weights were loaded, put back or merged
            state.log_history.append({**self._evaluate(state), "step": state.global_step})
        self._good, self.checkpoint = {}, None
        folder = self.place()
        if args.should_save and folder is not None:  # for a sequence that is resumed at this boundary
            self.write(folder)
        if args.process_index == 0:
            if self._stopped is not None:
                logger.warning(
                    f"The guard stopped the training at step {self._stopped}: the loss on general text had risen by "
                    f"more than {100 * self.stop:g} %. The weights are those of step {self._good_step}."  # type: ignore[operator]
                )
            logger.warning(self.report()["summary"])

    # ---- Evaluations, and the weights of the last good one ----

    def _evaluate(self, state: Any) -> dict[str, float]:
        loss, kl = measure(self.model, self.general)  # type: ignore[arg-type]
        values = {"guard_loss": loss, "guard_kl": kl}
        if self.new is not None:
            values["guard_kl_new"] = measure(self.model, self.new)[1]
        values = broadcast_object_list([values])[0]  # ranks have to agree on whether to stop
        self._measured = {n: t.clone() for n, t in samples(self.model).items()}
        self.history.append({"training": self._training, "step": state.global_step, **values})
        return dict(values)

    def _keep(self, args: Any, state: Any) -> None:
        if self.stop is not None:
            self._good_step, self._ranks = state.global_step, args.world_size
            if args.process_index == 0 or reshard(self.model):
                named = trainable_parameters(self.model)
                self._good = {n: p.detach().to("cpu", copy=True) for n, p in named}

    @torch.no_grad()
    def _restore(self) -> None:
        sharded = reshard(self.model)
        for name, p in trainable_parameters(self.model):
            if name in self._good:
                p.copy_(self._good[name])
            if self._ranks > 1 and not sharded:
                p.copy_(broadcast(p.detach()))

    # ---- The file in checkpoints ----

    def _resumed(self, args: Any, state: Any) -> Path | None:
        given = args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else None
        step = (self.place() or Path(args.output_dir)) / f"checkpoint-{state.global_step}"
        for folder in (self.checkpoint, given, step):
            if folder is not None and (Path(folder) / GUARD_NAME).is_file():
                return Path(folder)
        logger.warning(f"There is no {GUARD_NAME} in {step}: the guard measures from this checkpoint on.")
        return None

    def write(self, folder: Path) -> None:
        """Write `guard.st`, by atomic rename."""
        parts = {"general": self.general, "new": self.new}
        tensors = {f"{k}/{n}": t.contiguous() for k, a in parts.items() if a is not None for n, t in vars(a).items()}
        known = {"what": self.what, "training": self._training, "history": self.history}
        with replacing(folder / GUARD_NAME) as temporary:
            save_file(tensors, temporary, metadata={"guard": json.dumps(known)})

    def read_if_there(self, folder: Path, model: Any) -> None:
        """Go on from the start that a sequence's earlier task had, if its folder tells."""
        if (folder / GUARD_NAME).is_file():
            self.read(folder)
            self.model = model

    def read(self, folder: Path) -> None:
        """Go on from the `guard.st` in `folder`.

        Raises:
            ValueError: it is damaged, or holds what no guard writes.
        """
        path = folder / GUARD_NAME
        try:
            with safe_open(path, framework="pt") as file:
                known = json.loads((file.metadata() or {})["guard"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            parts = {key.partition("/")[0] for key in tensors}
            found = {k: Answers(**{n: tensors[f"{k}/{n}"] for n in Answers.__annotations__}) for k in parts}
            if "general" not in found or not all(map(_whole, found.values())) or not known["history"]:
                raise ValueError("texts and answers do not belong together")
            self.history, self._training, self.what = known["history"], int(known["training"]), str(known["what"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not what a guard wrote ({error}). Delete it to measure from here on.") from error
        self.general, self.new = found["general"], found.get("new")

    # ---- What it cost ----

    def report(self) -> dict[str, Any]:
        """`texts`, `tokens`, `loss_before` and `loss_after` (nats a token), `rise` (a share), `kl` and `kl_new` (nats;
        the latter from the start of the last training), `history` (all evaluations) and `summary`, a sentence."""
        first, last = self.history[0], self.history[-1]
        before, after, new = first["guard_loss"], last["guard_loss"], last.get("guard_kl_new")
        rise = after / before - 1 if before else 0.0
        summary = f"General text: loss {before:.2f} -> {after:.2f} ({100 * rise:+.1f} %), "
        summary += f"{last['guard_kl']:.2f} nats from the start"
        summary += "." if new is None else f"; {new:.2f} nats on the new data."
        tokens = int(self.general.lengths.sum()) if self.general is not None else 0
        return {
            "summary": summary,
            "texts": self.what,
            "tokens": tokens,
            "loss_before": before,
            "loss_after": after,
            "rise": rise,
            "kl": last["guard_kl"],
            "kl_new": new,
            "history": self.history,
        }


class LaunchedGuard(GuardCallback):
    """The guard that `register(guard=...)` gives every Trainer, with the arguments given there."""

    options: ClassVar[dict[str, Any]] = {}
    applied: ClassVar[bool] = False
    """Whether any training of this process began with one."""

    def __init__(self) -> None:
        super().__init__(**self.options)

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        LaunchedGuard.applied = True


def guards(trainer: Any) -> list[GuardCallback]:
    """The guards among a Trainer's callbacks."""
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, GuardCallback)]


def _first_examples(dataloader: Any, length: int) -> list[list[int]]:
    """Token ids of the first examples that are trained on; of a stream none, which reading would use up."""
    dataset = getattr(dataloader, "dataset", None)
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        return []
    rows = [dataset[i] for i in range(min(_NEW, len(dataset)))]  # type: ignore[arg-type]
    ids = [row["input_ids"] for row in rows if isinstance(row, dict) and "input_ids" in row]
    return [found for row in ids if len(found := [int(i) for i in row][:length]) > 1]


def _whole(answers: Answers) -> bool:
    """Whether shapes and kinds of the tensors belong together."""
    ids, lengths, values, indices = vars(answers).values()
    integers = not any(t.is_floating_point() for t in (ids, lengths, indices)) and values.is_floating_point()
    shapes = ids.ndim == 2 and lengths.shape == ids.shape[:1] and values.shape == indices.shape
    if not (integers and shapes and values.shape[:-1] == ids.shape and len(ids)):
        return False
    return min(int(ids.min()), int(indices.min())) >= 0 < int(lengths.min()) <= int(lengths.max()) <= ids.shape[1]


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def _now(model: Any) -> float:
    """Seconds, when the device has done what it was given."""
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()
