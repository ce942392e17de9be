"""SIGTERM, with which schedulers announce that a machine will be taken away: save, and leave."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)


class PreemptionCallback(TrainerCallback):
    """After a SIGTERM the present step is finished and a checkpoint saved, as after any other step; then the process
    exits with 143. One that comes between two trainings waits for `leave_if_asked`.

    It is in place of Trainer's `JITCheckpointCallback` (docs/architecture.md says why).
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.asked = trainer, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM in this block, if `args.enable_jit_checkpoint` asks for it."""
        if not self.trainer.args.enable_jit_checkpoint:
            yield
            return
        previous = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _agreed(self) -> bool:
        """Whether any rank was asked: all must leave at the same step."""
        args, accelerator = self.trainer.args, self.trainer.accelerator
        if not args.enable_jit_checkpoint or args.world_size == 1:
            return self.asked
        return bool(accelerator.reduce(torch.tensor(float(self.asked), device=accelerator.device), "sum") > 0)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= self._agreed()

    def on_save(self, args, state, control, **kwargs):
        self.leave_if_asked(f"step {state.global_step} is saved in {args.output_dir}")

    def leave_if_asked(self, saved: str = "everything so far is saved") -> None:
        """Exit now if a SIGTERM came. Call it on every rank, when everything is saved."""
        if self._agreed():
            logger.warning(
                f"SIGTERM: {saved}. The same command with --resume_from_checkpoint True goes on from there."
            )
            raise SystemExit(128 + signal.SIGTERM)
