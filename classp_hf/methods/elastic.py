"""Elastic memory: the optimizer's memory of gradients as the importance of a pull back to the last boundary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ..memory import CompactCopy, like_parameter, local, mean_over_weights
from ..optim import CLASSP, kernels
from .base import Method

if TYPE_CHECKING:
    from ..tasks import Task
    from ..trainer import ContinualTrainer


@dataclass
class Elastic(Method):
    """EWC without a Fisher pass: a pull `strength * A_i * (w_i - a_i)`, A = s / mean(s) (Kirkpatrick et al. 2017, eq. 3).

    s is the accumulator (`sum |g|^p`) that CLASSP keeps, or that the trainer gathers under another optimizer; mean(s) its
    mean over all weights at the boundary; a the weights at the boundary, held in 2 bytes a weight.

    Under CLASSP the pull is divided by the root of the memory as a gradient is, but kept out of the memory (it would feed on
    itself), and applied implicitly after the step, which is stable at any strength::

        c_i = lr * strength * A_i / (eps + s_i)^(1/p)
        w_i <- w_i - c_i / (1 + c_i) * (w_i - a_i)

    Under any other optimizer it is added to the clipped gradient. The first task trains freely. A run that starts from a
    model and its memory has both anchor and importance in them: nothing else is saved.
    """

    name: ClassVar[str] = "elastic"
    uses_accumulators: ClassVar[bool] = True

    anchor_strength: float = field(
        default=0.1, metadata={"help": "Strength of the pull towards the weights of the last task boundary."}
    )

    scale: float = field(default=0.0, init=False, repr=False)
    anchor: dict[str, CompactCopy] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.anchor_strength >= 0:
            raise ValueError(f"anchor_strength must be >= 0, got {self.anchor_strength}")

    def before_task(self, trainer: ContinualTrainer, task: Task) -> None:
        memory = {n: s for n, s in trainer.accumulators().items() if n not in self.excluded}
        self.start(trainer.model, memory)
        self._trainer = trainer

    def start(self, model: nn.Module, memory: dict[str, Tensor], weights: dict[str, Tensor] | None = None) -> None:
        """Anchor `model` at `weights` (default: where it is) if `memory` (canonical name -> accumulator) is not empty."""
        mean = mean_over_weights(memory.values())
        self.anchor = {}
        if self.anchor_strength and mean > 0:
            self.scale = self.anchor_strength / mean
            self.anchor = {
                n: CompactCopy(p.detach() if weights is None else like_parameter(weights[n], p.detach(), p.dtype))
                for n, p in self.parameters(model)
                if n in memory  # a new adapter has none, and was nowhere when the run started
            }

    @torch.no_grad()
    def penalty_gradient(self, model: nn.Module) -> None:
        if not self.anchor or isinstance(self._trainer.bare_optimizer, CLASSP):
            return
        memory = self._trainer.accumulators()
        for name, p in self.parameters(model):
            if p.grad is not None and name in self.anchor and name in memory:
                g, w, s = (local(t) for t in (p.grad, p.detach(), memory[name]))
                copied = self.anchor[name]
                if kernels.pulls(g, w, s, copied.values):
                    kernels.pull_([(g, w, copied.values, copied.scale, s)], self.scale)
                else:
                    g.add_(copied.difference(w).mul_(s).to(g.dtype), alpha=self.scale)

    def after_step(self, model: nn.Module) -> None:
        if self.anchor and isinstance(self._trainer.bare_optimizer, CLASSP):
            self.pull(model, self._trainer.bare_optimizer)

    @torch.no_grad()
    def pull(self, model: nn.Module, optimizer: CLASSP) -> None:
        """The implicit step towards the anchor that belongs to a step of `optimizer`."""
        names = {id(p): name for name, p in self.parameters(model)}
        for group in optimizer.param_groups:
            for p in group["params"]:
                name = names.get(id(p))
                if name in self.anchor and p in optimizer.state:
                    s, w = local(optimizer.accumulator(p)), local(p.detach())
                    strength, copied = float(group["lr"]) * self.scale, self.anchor[name]
                    if kernels.pulls(w, s, copied.values):
                        kernels.pull_(
                            [(w, w, copied.values, copied.scale, s)], strength, (group["eps"], group["power"])
                        )
                    else:
                        c = (s + group["eps"]).pow_(-1 / group["power"]).mul_(s).mul_(strength)
                        w.sub_(copied.difference(w).mul_(c / (1 + c)))

    def after_task(self, trainer: ContinualTrainer, task: Task) -> None:
        self.anchor = {}
