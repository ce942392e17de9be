"""Exponential moving average of the weights over the steps of a task (Polyak & Juditsky 1992; Qiao et al. 2025)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..names import local
from .base import Context, Method, flag, placed


@dataclass
class EMA(Method):
    """`average <- decay * average + (1 - decay) * w` after every step, from the weights at the start of the task.

    The average (Polyak & Juditsky 1992) replaces the weights when the task ends. The first task is left as it is, so
    that methods differ only in how they keep it. With `ema_balanced` every tensor's share of `w` follows from its
    gradient g (Qiao et al. 2025, arXiv 2410.10868, as their code has it; absolute sums):
    `2 (1 + |g|) / (|w - average| |g - g of the step before|)`, and `1 - decay` where that is not in (0, 1).

    Raises:
        ValueError: `ema_decay` out of its range; before training, `ema_balanced` under FSDP.
    """

    name = "ema"
    learns_at_end = False
    end_order = 0
    parts = per_parameter = ("average", "gradients")
    ranges = {"ema_decay": ("in [0, 1)", lambda v: 0 <= v < 1)}

    ema_decay: float = flag(0.98, "Share of the average that every step keeps, in [0, 1).")
    ema_balanced: bool = flag(False, "Balance each step's share by its gradients instead (arXiv 2410.10868).")

    average: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    gradients: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Of the last step, with `ema_balanced`."""

    def check(self, context: Context, others: Sequence[Method]) -> None:
        if self.ema_balanced and context.sharded:
            raise ValueError("ema_balanced sums over whole tensors, which does not run sharded. Use DDP.")

    def before_task(self, context: Context) -> None:
        if not context.resumed:  # else the average goes on
            started = {n: p.detach().float().clone() for n, p in self.parameters(context.model)}
            self.average, self.gradients = started if context.seen_tasks else {}, {}

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        for n, p in self.parameters(model):
            if n in self.average:
                average, w = placed(self.average, n, p), local(p.detach()).float()
                average.lerp_(w, self._balance(n, p, w - average) if self.ema_balanced else 1 - self.ema_decay)

    def _balance(self, name: str, p: nn.Parameter, moved: Tensor) -> Tensor | float:
        """The share of the weights in the new average."""
        if p.grad is None:
            return 1 - self.ema_decay
        g = p.grad.float().clone()
        turned = g - placed(self.gradients, name, p) if name in self.gradients else torch.zeros_like(g)
        self.gradients[name] = g
        share = 2 * (1 + g.abs().sum()) / (moved.abs().sum() * turned.abs().sum())
        return torch.where((share > 0) & (share < 1), share, 1 - self.ema_decay)

    @torch.no_grad()
    def after_task(self, context: Context) -> None:
        for n, p in self.parameters(context.model):
            if n in self.average:
                local(p.detach()).copy_(placed(self.average, n, p))
        self.average, self.gradients = {}, {}
