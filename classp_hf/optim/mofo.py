"""MoFO: Adam that updates only the weights with the largest momenta (Chen et al. 2024, arXiv 2407.20999)."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class MoFO(Optimizer):
    """Momentum-filtered optimizer (Chen et al. 2024, arXiv 2407.20999, Algorithm 1), without weight decay.

    It keeps Adam's moments m and v for every weight, and takes Adam's step only for the weights whose |m| is among the
    `fraction` largest of their tensor. All others stay where earlier tasks put them.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, >= 0.
        fraction: share of every tensor's weights that a step updates, in (0, 1]; 1 is Adam.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment, > 0.

    Raises:
        ValueError: a hyperparameter out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        fraction: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        for name, value, good, domain in (
            ("lr", lr, lr >= 0, ">= 0"),
            ("fraction", fraction, 0 < fraction <= 1, "in (0, 1]"),
            ("betas", betas, all(0 <= beta < 1 for beta in betas), "in [0, 1)"),
            ("eps", eps, eps > 0, "> 0"),
        ):
            if not good:
                raise ValueError(f"{name} must be {domain}, got {value}")
        super().__init__(params, {"lr": lr, "fraction": fraction, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one optimization step and return the loss of `closure`, which re-evaluates the model, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"]
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                denominator = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
                rejected = p.numel() - math.ceil(group["fraction"] * p.numel())
                if rejected:
                    size = m.abs()
                    m = torch.where(size > size.flatten().kthvalue(rejected).values, m, 0.0)
                p.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**t))
        return loss
