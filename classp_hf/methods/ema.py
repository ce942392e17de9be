"""Exponential moving average of the weights over the steps of a task (Polyak & Juditsky 1992)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..names import local
from .base import Context, Method, flag, placed


@dataclass
class EMA(Method):
    """`average <- decay * average + (1 - decay) * w` after every step, from the weights at the start of the task.

    The average (Polyak & Juditsky 1992) replaces the weights when the task ends. The first task is left as it is, so
    that methods differ only in how they keep it.
    """

    name = "ema"
    parts = per_parameter = ("average",)
    ranges = {"ema_decay": ("in [0, 1)", lambda v: 0 <= v < 1)}

    ema_decay: float = flag(0.98, "Share of the average that every step keeps, in [0, 1).")

    average: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

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
