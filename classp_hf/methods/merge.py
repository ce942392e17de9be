"""Consolidation merge: at the boundary, old and new weights are averaged by how much each task needed them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..names import full_tensor, like_parameter, mean_over_weights
from .base import Context, Method, flag


@dataclass
class Merge(Method):
    """When a task ends, `w = (F_old w_old + a F_new w_new) / (F_old + a F_new)` for every weight.

    Nothing changes during training, nor for a task that begins without a memory, such as the first. This is mode-IMM
    (Lee et al. 2017, arXiv 1703.08475, eq. 10) or Fisher merging (Matena & Raffel 2022, arXiv 2111.09832) without a
    Fisher pass: F is the growth of the accumulator `sum |g|^p` over the task, divided by its mean. F_old is that of
    all earlier tasks times their number, so that all tasks weigh alike at a = 1. Where random rounding makes a low-bit
    accumulator smaller, its growth counts as 0.

    The old weights and accumulators stay on the CPU while the task trains; its checkpoints hold the accumulators.
    """

    name = "merge"
    learns_at_end = False
    uses_accumulators = True
    needs_start = True
    end_order = 1
    parts = per_parameter = ("memory",)
    ranges = {"merge_weight": (">= 0", lambda v: v >= 0)}

    merge_weight: float = flag(1.0, "Weight a of the new task: 0 keeps the old weights, 1 counts tasks alike.")

    weights: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    memory: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def before_task(self, context: Context) -> None:
        if not context.resumed:
            names, memory = dict(self.parameters(context.model)), context.accumulators()
            self.memory = {n: full_tensor(s).to("cpu", copy=True) for n, s in memory.items() if n in names}
        self.weights = {n: full_tensor(w).cpu() for n, w in context.starting_weights().items() if n in self.memory}

    @torch.no_grad()
    def after_task(self, context: Context) -> None:
        now, old = context.accumulators(), self.memory
        parameters = {n: p for n, p in self.parameters(context.model) if n in self.weights and n in now}
        grown = {n: (full_tensor(now[n]).cpu() - old[n]).clamp_(min=0) for n in parameters}
        old_mean, new_mean = mean_over_weights(old[n] for n in parameters), mean_over_weights(grown.values())
        for n, p in parameters.items() if old_mean > 0 and new_mean > 0 else ():
            f_old = old[n] * ((len(context.seen_tasks) or 1) / old_mean)
            f_new = grown[n].mul_(self.merge_weight / new_mean)
            share = torch.where(f_old + f_new > 0, f_new / (f_old + f_new), 1.0)
            merged = self.weights[n].float().lerp_(full_tensor(p).cpu().float(), share)
            p.copy_(like_parameter(merged, p.detach(), p.dtype))
        self.weights, self.memory = {}, {}
