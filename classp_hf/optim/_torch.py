"""What the optimizer needs of PyTorch beyond its public names: the fused Adagrad step, and the parts of DTensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FUSED_DEVICES = ("cpu", "cuda") if torch.__version__ >= (2, 13) else ()  # type: ignore[operator]
"""Where `torch._fused_adagrad_` runs, with a tensor as learning rate too (CUDA: pytorch#153038)."""


def fused_adagrad_(
    weights: list[Tensor],
    grads: list[Tensor],
    sums: list[Tensor],
    lr: float | Tensor,
    maximize: bool,
    found_inf: Tensor | None = None,
) -> None:
    """`sums += grads^2; weights -= lr * grads / sqrt(sums)` in one pass, in place; nothing where `found_inf` is 1.

    All tensors are contiguous, of one dtype and device.
    """
    lr = lr.reshape(()).float() if isinstance(lr, Tensor) else lr
    # The step number matters only with lr_decay.
    steps = [torch.ones((), device=weights[0].device)] * len(weights)
    torch._fused_adagrad_(
        weights,
        grads,
        sums,
        steps,
        lr=lr,
        lr_decay=0.0,
        weight_decay=0.0,
        eps=0.0,
        maximize=maximize,
        found_inf=found_inf,
    )


def is_sharded(x: Any) -> bool:
    """Whether `x` is a DTensor, which holds one rank's part of a tensor."""
    if type(x) in (Tensor, torch.nn.Parameter):
        return False  # without the import, which takes long
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def local(x: Tensor) -> Tensor:
    """This rank's part of a sharded (DTensor) tensor, maybe empty, sharing its memory; any other tensor as it is."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def over_shards(values: list[Tensor], tensors: list[Tensor], operation: str) -> list[Tensor]:
    """Combine what every rank computed from its part of a tensor, by `operation` ("sum" or "max").

    Collective: every rank must call it with the same tensors in the same order, whatever is empty on it. One
    all-reduce for all tensors that are sharded alike.

    Args:
        values: of any shapes, which are the same on every rank.
        tensors: which tensor each value belongs to. Values of tensors that are not sharded are returned as they are.
    """
    alike: dict[Any, list[int]] = {}
    for i, t in enumerate(tensors):
        if is_sharded(t):
            key = t.device_mesh, t.placements, values[i].dtype  # type: ignore[attr-defined]
            alike.setdefault(key, []).append(i)
    values = list(values)
    for (mesh, placements, _), indices in alike.items():
        from torch.distributed.tensor import DTensor, Partial, Replicate

        parts = [Replicate() if placement.is_replicate() else Partial(operation) for placement in placements]
        joined = torch.cat([values[i].reshape(-1) for i in indices])
        joined = DTensor.from_local(joined, mesh, parts, run_check=False).full_tensor()
        for i, value in zip(indices, joined.split([values[i].numel() for i in indices])):
            values[i] = value.view_as(values[i])
    return values
