"""The threshold that lets a stated share of a gradient's nonzero coordinates through, from a sample of them."""

import math
from typing import Any

import torch
from torch import Tensor

from .shards import is_sharded

SAMPLE, EXACT = 1024, 4096


def cuts_for_density(grads: list[Tensor], density: float) -> Tensor:
    """For each gradient a cut c such that the share `density` of its nonzero coordinates has |g| > c.

    c is the (1 - density) quantile of |g| over the nonzero coordinates of a sample. Tensors of up to 4,096 coordinates
    are their own sample: at most `density` of the nonzero ones pass. Larger ones are rows of their last dimension. At
    least 1,024 coordinates are looked at, evenly spread, of every row one or more, in another column from row to row.
    The sample are at least 1,024 of the nonzero ones among them, evenly spread; where there are fewer, each with
    others of its row. If m coordinates of the sample are not 0, the standard error of the share that passes is about
    sqrt(density (1 - density) / m): 0.009 for density 0.1 where touched rows are dense. Where fewer than 1,024 were
    found, rows with more nonzeros count for more. Where none was found c is infinite, and nothing passes. Gradients
    (of one device) and cuts (float32) stay on the device; DTensors are gathered, one at a time: a collective call."""
    share = min(density + 1e-6, 1 - 1e-6)  # so that rounding takes nothing from a product that is whole
    given: list[Any] = grads
    samples = [_sample(g.full_tensor() if is_sharded(g) else g.detach()).abs() for g in given]
    nonzero = torch.stack([sample.count_nonzero() for sample in samples])
    largest = [sample.topk(min(sample.numel(), int(share * sample.numel()) + 2)).values for sample in samples]
    first_out = (nonzero * share).long().unbind()
    cuts = torch.stack([values.take(i).float() for values, i in zip(largest, first_out)])
    return torch.where(nonzero == 0, math.inf, cuts)


def _sample(g: Tensor) -> Tensor:
    if g.numel() <= EXACT:
        return g.reshape(-1) if g.numel() else g.new_zeros(1)
    order = sorted(range(g.ndim), key=g.stride, reverse=True)  # as it lies in memory: no copy
    columns, flat = g.shape[order[-1]], g.permute(order).reshape(-1)
    step = _coprime(max(1, min(columns - 1, flat.numel() // SAMPLE)), columns, -1)  # so that it visits all columns
    looked_at = flat[::step]
    if g.device.type == "cpu" and not torch.compiler.is_compiling() and looked_at.all():
        return looked_at[:: looked_at.numel() // SAMPLE]  # as below, and quicker
    found = (looked_at != 0).cumsum(0)
    # Beside which of the nonzero coordinates found each of the sample lies, and how many lie there before it.
    middle = (2 * torch.arange(SAMPLE, device=g.device) + 1) * found[-1]
    which, before = middle // (2 * SAMPLE), middle % (2 * SAMPLE) // (2 * found[-1]).clamp(min=1)
    first = torch.searchsorted(found, which, right=True).clamp_(max=found.numel() - 1) * step
    golden = _coprime(max(1, round(0.618 * columns)), columns, 1)
    return flat.take(first // columns * columns + (first + before * golden) % columns)


def _coprime(n: int, columns: int, direction: int) -> int:
    """The next number from `n` on in `direction` that has no divisor in common with `columns`."""
    while math.gcd(n, columns) != 1:
        n += direction
    return n
