"""The continual memory for scripts that build a Trainer of their own: found beside the model, written beside the output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .memory import (
    ContinualMemory,
    NoMemoryError,
    bare_model,
    canonical_name,
    full_tensor,
    like_parameter,
    match_accumulators,
    trainable_parameters,
)
from .methods import Elastic, Merge
from .optim import CLASSP
from .optim_args import parse_optim_args
from .redaction import UNPRINTABLE

logger = logging.get_logger(__name__)


class ContinualMemoryCallback(TrainerCallback):
    """Makes two runs of one script, the second started from the first's output, continual learning.

    When training with CLASSP begins, the memory beside the model (`model.config.name_or_path`) is put into the optimizer;
    it is written into every checkpoint and into `output_dir`. With `--optim_args anchor_strength=...` or `merge_weight=...`
    the run is also anchored to the weights it started from, or merged with them when it ends. Under any other optimizer
    it does nothing. `register` gives one to every Trainer.
    """

    def __init__(self) -> None:
        self.optimizer: CLASSP | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        self.optimizer = optimizer if isinstance(optimizer, CLASSP) else None
        if self.optimizer is None:
            return
        # a second callback would do everything twice
        if getattr(self.optimizer, "_memory_callback", self) is not self:
            self.optimizer = None
            return
        self.optimizer._memory_callback = self  # type: ignore[attr-defined]
        _, uses = parse_optim_args(args.optim_args)
        start = str(bare_model(model).config.name_or_path)
        memory = _find(uses.get("memory"), start, getattr(bare_model(model).config, "_commit_hash", None))
        self.tasks = list(memory.metadata.get("tasks", [])) if memory is not None else []
        stored: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        if memory is None:
            logger.info(f"No continual memory beside {start!r}: this run begins one.")
        else:
            try:
                stored, self.kept = match_accumulators(memory.get("accumulator"), model)
            except ValueError as error:
                raise ValueError(
                    f"{error}\nThe memory was read from {uses.get('memory', start)!r}; `--optim_args memory=none` begins with an "
                    "empty one."
                ) from None
            logger.warning(
                f"Going on from the continual memory of {', '.join(self.tasks) or 'an earlier run'} in {start!r}."
            )
        resumed = state.global_step > 0  # the checkpoint's optimizer state holds the accumulators already
        if not resumed:
            for n, p in trainable_parameters(model):
                if n in stored:
                    self.optimizer.set_accumulator(p, like_parameter(stored[n], p.detach(), torch.float32))
        self.merge = Merge(uses["merge_weight"]) if stored and uses.get("merge_weight") else None
        self.elastic = Elastic(uses["anchor_strength"]) if stored and uses.get("anchor_strength") else None
        weights = _starting_weights(model, start) if resumed and (self.merge or self.elastic) else None
        if self.elastic is not None:
            self.elastic.start(model, stored, weights)
        if self.merge is not None:
            self.merge.start(model, stored, weights)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.optimizer is not None and self.elastic is not None:
            self.elastic.pull(model, self.optimizer)

    def on_save(self, args, state, control, model=None, **kwargs):
        if self.optimizer is not None:
            self._write(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", args, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.optimizer is None:
            return
        if self.merge is not None:
            self.merge.finish(dict(trainable_parameters(model)), self._accumulators(model), len(self.tasks) or 1)
        self._write(Path(args.output_dir), args, model)

    def _accumulators(self, model: nn.Module) -> dict[str, Tensor]:
        assert self.optimizer is not None
        return {n: self.optimizer.accumulator(p) for n, p in trainable_parameters(model)}

    def _write(self, folder: Path, args: Any, model: nn.Module) -> None:
        assert self.optimizer is not None
        memory = ContinualMemory()
        accumulators = self._accumulators(model)
        memory.put("accumulator", self.kept)
        memory.put("accumulator", {n: full_tensor(s) for n, s in accumulators.items()})
        numbers = {
            k: v for k, v in self.optimizer.defaults.items() if isinstance(v, (int, float, bool, str, type(None)))
        }
        memory.metadata = {
            "tasks": [*self.tasks, UNPRINTABLE.sub("?", Path(args.output_dir).resolve().name) or "root"],
            "optimizer": {"name": "CLASSP", **numbers, "lr": args.learning_rate},
        }
        if args.should_save:
            memory.save(folder)


def _find(wanted: str | None, start: str, revision: str | None) -> ContinualMemory | None:
    """The memory asked for, or the one beside the model that came from `start`, a folder or a Hub repository."""
    if wanted == "none":
        return None
    if wanted is not None:
        return ContinualMemory.load(wanted)
    found = None
    try:
        found = ContinualMemory.load(start, revision=None if Path(start).is_dir() else revision) if start else None
    except NoMemoryError:  # most models have none
        pass
    except FileNotFoundError as error:
        logger.warning(
            f"Whether a continual memory belongs to {start!r} could not be found out, so none is used. {error}"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        there = [found is not None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(there, found is not None)
        if any(there) and not all(there):  # ranks that begin differently would train different models
            raise RuntimeError(
                f"Only some processes could read the continual memory of {start!r}. Start the run again."
            )
    return found


def _starting_weights(model: nn.Module, start: str) -> dict[str, Tensor]:
    """What the run started from: a resumed run's model holds the checkpoint already."""
    bare = bare_model(model)
    fresh = type(bare).from_pretrained(start, config=bare.config, dtype=bare.dtype)
    return {canonical_name(n): p.detach() for n, p in fresh.named_parameters()}
