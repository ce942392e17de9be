"""Elastic memory: the optimizer's memory of gradients as the importance of a pull back to the last boundary."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..names import local, mean_over_weights
from ..optim import CLASSP
from .base import Context, Method, flag

logger = logging.get_logger(__name__)


@dataclass
class Elastic(Method):
    """EWC without a Fisher pass: the gradient `strength * A_i * (w_i - a_i)`, with A = s / mean(s).

    This is the penalty of Kirkpatrick et al. 2017 (arXiv 1612.00796, eq. 3) with another importance. s is the present
    accumulator (`sum |g|^p`). a are the weights, and mean(s) is the mean of s over all weights, at the last task
    boundary. Under CLASSP the pull is divided by the root of the memory as a gradient is, does not enter the memory
    (it would increase itself), and is applied implicitly after the step, which is stable at any strength::

        c_i = lr * strength * A_i / (eps + s_i)^(1/p)
        w_i <- w_i - c_i / (1 + c_i) * (w_i - a_i)

    Under any other optimizer it is added to the clipped gradient. A task that begins without a memory trains freely:
    the first one, unless `memory="pretrained"`.
    """

    name = "elastic"
    learns_at_end = False
    uses_accumulators = True
    needs_start = True
    parts = ("means",)
    positive = {"means": "mean accumulator"}
    ranges = {"anchor_strength": (">= 0", lambda v: v >= 0)}

    anchor_strength: float = flag(0.1, "Strength of the pull towards the weights of the last task boundary.")

    anchor: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    means: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """mean(s) by the name of every weight that had a memory at the boundary: a new adapter had none."""
    context: Any = field(default=None, init=False, repr=False)

    def before_task(self, context: Context) -> None:
        self.anchor, self.context = {}, context
        if not context.resumed:
            memory = {n: s for n, s in context.accumulators().items() if n not in self.excluded}
            mean = mean_over_weights(memory.values())
            self.means = {n: torch.tensor(mean) for n in memory} if mean > 0 else {}
        if self.anchor_strength and not self.means:
            logger.warning("Nothing is anchored while this task trains: there is no memory of earlier gradients.")
        elif self.anchor_strength:
            self.anchor = {n: w for n, w in context.starting_weights().items() if n in self.means}

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        if self.anchor and not isinstance(self.context.optimizer, CLASSP):
            memory = self.context.accumulators()
            for n, p in self.parameters(model):
                if p.grad is not None and n in self.anchor and n in memory:
                    g, w, a, s = (local(t) for t in (p.grad, p.detach(), self.anchor[n], memory[n]))
                    pull = (w.float() - a.float()).mul_(s)
                    g.add_(pull.to(g.dtype), alpha=self.anchor_strength / float(self.means[n]))

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        if self.anchor and isinstance(optimizer := self.context.optimizer, CLASSP):
            names = {p: n for n, p in self.parameters(model) if n in self.anchor and p in optimizer.state}
            for group in optimizer.param_groups:
                for p in (p for p in group["params"] if p in names):
                    a, w, s = (local(t) for t in (self.anchor[names[p]], p.detach(), optimizer.accumulator(p)))
                    strength = float(group["lr"]) * self.anchor_strength / float(self.means[names[p]])
                    c = (s + group["eps"]).pow_(-1 / group["power"]).mul_(s).mul_(strength)
                    w.sub_((w.float() - a.float()).mul_(c / (1 + c)))

    def after_task(self, context: Context) -> None:
        self.anchor, self.means, self.context = {}, {}, None
