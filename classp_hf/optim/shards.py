"""DTensors, of which every rank holds a part (FSDP2)."""

from typing import Any

import torch
from torch import Tensor


def is_sharded(x: Any) -> bool:
    """Whether `x` is a DTensor."""
    if type(x) in (Tensor, torch.nn.Parameter):
        return False  # without the import, which takes long
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor, maybe empty, sharing its memory; any other tensor as it is."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def sharding(x: Tensor) -> Any:
    """How a DTensor lies on the ranks, hashable; None of any other tensor."""
    return (x.device_mesh, x.placements) if is_sharded(x) else None  # type: ignore[attr-defined]


def over_shards(value: Tensor, of: Tensor, operation: str) -> Tensor:
    """Combine what every rank computed from its parts of tensors sharded as `of` is, by `operation` ("sum" or "max").

    A collective call on every rank; of a tensor that is not sharded, `value` as it is.
    """
    if not is_sharded(of):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = sharding(of)
    parts = [Replicate() if placement.is_replicate() else Partial(operation) for placement in placements]
    return DTensor.from_local(value, mesh, parts, run_check=False).full_tensor()
