"""Exponential moving average of the weights over the steps of a task (Polyak & Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..names import local
from .base import Context, Method, placed


@dataclass
class EMA(Method):
    """`average <- decay * average + (1 - decay) * w` after every step, begun at the task's first weights.

    The average replaces the weights when the task ends. The first task is left as it is, so that methods differ only in
    how they hold on to it.
    """

    name: ClassVar[str] = "ema"
    needs_start: ClassVar[bool] = True
    per_parameter: ClassVar[tuple[str, ...]] = ("average",)

    ema_decay: float = field(default=0.98, metadata={"help": "Share of the average that every step keeps, in [0, 1)."})

    average: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")

    def before_task(self, context: Context) -> None:
        if not context.resumed:  # else the average goes on
            started = {n: p.detach().float().clone() for n, p in self.parameters(context.model)}
            self.average = started if context.seen_tasks else {}

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        for n, p in self.parameters(model):
            if n in self.average:
                placed(self.average, n, p).lerp_(local(p.detach()).float(), 1 - self.ema_decay)

    @torch.no_grad()
    def after_task(self, context: Context) -> None:
        for n, p in self.parameters(context.model):
            if n in self.average:
                local(p.detach()).copy_(placed(self.average, n, p))
        self.average = {}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"average": self.average} if self.average else {}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.average = {n: t.float() for n, t in state.get("average", {}).items()}
