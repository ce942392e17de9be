"""Interpolation towards the old weights after each task: WiSE-FT (Wortsman et al. 2022), used in sequence."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import Context, Method, flag


@dataclass
class Interpolate(Method):
    """After a task, `w = w_old + alpha (w_new - w_old)` (arXiv 2109.01903, eq. 1); nothing changes during training.

    The paper (WiSE-FT, Wortsman et al. 2022) interpolates once, between the pre-trained and the fine-tuned model. Here
    every task but the first is interpolated, between the weights at its start and at its end.
    """

    name = "interpolate"
    learns_at_end = False
    needs_start = True
    end_order = 1
    ranges = {"interpolation_weight": ("in [0, 1]", lambda v: 0 <= v <= 1)}

    interpolation_weight: float = flag(0.5, "alpha: 0 keeps the old weights, 1 the new ones.")

    old: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def before_task(self, context: Context) -> None:
        self.old = context.starting_weights() if context.seen_tasks else {}

    @torch.no_grad()
    def after_task(self, context: Context) -> None:
        for n, p in self.parameters(context.model):
            if n in self.old:
                p.copy_(self.old[n].to(p.device).lerp(p.detach(), self.interpolation_weight))
        self.old = {}
