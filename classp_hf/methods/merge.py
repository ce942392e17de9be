"""Consolidation merge: at the boundary, old and new weights are averaged by how much each task needed them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ..memory import full_tensor, like_parameter, mean_over_weights
from .base import Method

if TYPE_CHECKING:
    from ..tasks import Task
    from ..trainer import ContinualTrainer


@dataclass
class Merge(Method):
    """After a task, `w = (F_old w_old + a F_new w_new) / (F_old + a F_new)` for every weight; nothing changes before.

    Mode-IMM (Lee et al. 2017, arXiv 1703.08475, eq. 10) or Fisher merging (Matena & Raffel 2022, arXiv 2111.09832) with
    a Fisher that costs nothing: F is the growth of the accumulator `sum |g|^p` over the task, divided by its mean.
    F_old is that of all earlier tasks, counted once a task, so that T tasks weigh alike at a = 1.

    The old weights and accumulators wait on the CPU while the task trains.
    """

    name: ClassVar[str] = "merge"
    uses_accumulators: ClassVar[bool] = True

    merge_weight: float = field(
        default=1.0, metadata={"help": "Weight a of the new task: 0 keeps the old weights, 1 counts tasks alike."}
    )

    old: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.merge_weight >= 0:
            raise ValueError(f"merge_weight must be >= 0, got {self.merge_weight}")

    def before_task(self, trainer: ContinualTrainer, task: Task) -> None:
        self.old = {}
        self.start(trainer.model, trainer.accumulators())

    def start(self, model: nn.Module, memory: dict[str, Tensor], weights: dict[str, Tensor] | None = None) -> None:
        """Remember `memory` (canonical name -> accumulator) and `weights` (default: the model's own)."""
        for n, p in self.parameters(model):
            if n in memory:
                w = full_tensor(p.detach()) if weights is None else weights[n]
                self.old[n] = w.cpu().clone(), full_tensor(memory[n]).cpu().clone()

    def after_task(self, trainer: ContinualTrainer, task: Task) -> None:
        self.finish(dict(self.parameters(trainer.model)), trainer.accumulators(), len(trainer.seen_tasks) or 1)

    @torch.no_grad()
    def finish(self, parameters: dict[str, nn.Parameter], memory: dict[str, Tensor], tasks: int) -> None:
        """Merge into `parameters`; `memory` holds the accumulators now, `tasks` counts the earlier ones."""
        grown = {n: full_tensor(memory[n]).cpu() - s for n, (_, s) in self.old.items()}
        old_mean = mean_over_weights(s for _, s in self.old.values())
        new_mean = mean_over_weights(grown.values())
        if old_mean > 0 and new_mean > 0:
            for n, (w_old, s) in self.old.items():
                w_new = full_tensor(parameters[n].detach()).cpu().float()
                f_old = s.mul_(tasks / old_mean)
                f_new = grown[n].mul_(self.merge_weight / new_mean)
                share = torch.where(f_old + f_new > 0, f_new / (f_old + f_new), 1.0)
                merged = w_old.float().lerp_(w_new, share)
                parameters[n].copy_(like_parameter(merged, parameters[n].detach(), parameters[n].dtype))
        self.old = {}
