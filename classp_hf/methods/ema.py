"""Exponential moving average of the weights over the steps of a task (Polyak & Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ..memory import like_parameter
from .base import Method

if TYPE_CHECKING:
    from ..tasks import Task
    from ..trainer import ContinualTrainer


@dataclass
class EMA(Method):
    """`average <- decay * average + (1 - decay) * w` after every step, begun at the task's first weights.

    The average replaces the weights when the task ends. The first task is left as it is, so that methods differ only in
    how they hold on to it.
    """

    name: ClassVar[str] = "ema"

    ema_decay: float = field(default=0.98, metadata={"help": "Share of the average that every step keeps, in [0, 1)."})

    average: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")

    def before_task(self, trainer: ContinualTrainer, task: Task) -> None:
        started = {n: p.detach().float().clone() for n, p in self.parameters(trainer.model)}
        self.average = started if trainer.seen_tasks else {}

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        if self.average:
            for n, p in self.parameters(model):
                if self.average[n].device != p.device or type(self.average[n]) is not type(p.detach()):
                    self.average[n] = like_parameter(self.average[n], p.detach(), torch.float32)
                self.average[n].lerp_(p.detach().float(), 1 - self.ema_decay)

    @torch.no_grad()
    def after_task(self, trainer: ContinualTrainer, task: Task) -> None:
        for n, p in self.parameters(trainer.model):
            if n in self.average:
                p.copy_(self.average[n])
        self.average = {}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"average": self.average} if self.average else {}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        if unknown := state.keys() - {"average"}:
            raise ValueError(f"The method {self.name!r} keeps an average, got {sorted(unknown)}")
        self.average = {n: t.float() for n, t in state.get("average", {}).items()}
