"""Elastic memory: the optimizer's memory of gradients as the importance of a pull back to the last boundary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ..memory import CompactCopy, like_parameter, local, mean_over_weights
from .base import Method, refuse_deepspeed

if TYPE_CHECKING:
    from ..tasks import Task
    from ..trainer import ContinualTrainer


@dataclass
class Elastic(Method):
    """EWC without a Fisher pass: gradient `strength * s_i / mean(s) * (w_i - a_i)`.

    s is the accumulator (`sum |g|^p`) that CLASSP keeps, or that the trainer gathers under another optimizer; mean(s) its
    mean over all weights at the boundary; a the weights at the boundary, held in 2 bytes a weight. The pull is added
    after clipping, so CLASSP divides it by the root of the memory as it does any gradient.

    The first task trains freely. A run that starts from a model and its memory has both anchor and importance in them:
    nothing else is saved.
    """

    name: ClassVar[str] = "elastic"
    uses_accumulators: ClassVar[bool] = True

    anchor_strength: float = field(
        default=0.1, metadata={"help": "Strength of the pull towards the weights of the last task boundary."}
    )

    scale: float = field(default=0.0, init=False, repr=False)
    anchor: dict[str, CompactCopy] = field(default_factory=dict, init=False, repr=False)
    importance: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.anchor_strength >= 0:
            raise ValueError(f"anchor_strength must be >= 0, got {self.anchor_strength}")

    def check_trainer(self, trainer: ContinualTrainer) -> None:
        refuse_deepspeed(self, trainer)

    def before_task(self, trainer: ContinualTrainer, task: Task) -> None:
        self.anchor, self.importance = {}, {}
        memory = {n: s for n, s in trainer.accumulators().items() if n not in self.excluded}
        self.start(trainer.model, memory)
        self._trainer = trainer

    def start(self, model: nn.Module, memory: dict[str, Tensor], weights: dict[str, Tensor] | None = None) -> None:
        """Anchor `model` at `weights` (default: where it is) if `memory` (canonical name -> accumulator) is not empty."""
        mean = mean_over_weights(memory.values())
        if self.anchor_strength and mean > 0:
            self.scale = self.anchor_strength / mean
            self.anchor = {
                n: CompactCopy(p.detach() if weights is None else like_parameter(weights[n], p.detach(), p.dtype))
                for n, p in self.parameters(model)
            }

    @torch.no_grad()
    def penalty_gradient(self, model: nn.Module) -> None:
        if not self.anchor:
            return
        if not self.importance:  # not before: wrappers move the accumulators to their devices when training begins
            self.importance = self._trainer.accumulators()
        for name, p in self.parameters(model):
            if p.grad is not None and name in self.anchor and name in self.importance:
                grad = local(p.grad)
                pull = self.anchor[name].difference(local(p.detach())).mul_(local(self.importance[name]))
                grad.add_(pull.to(grad.dtype), alpha=self.scale)

    def after_task(self, trainer: ContinualTrainer, task: Task) -> None:
        self.anchor, self.importance = {}, {}
