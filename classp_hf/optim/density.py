"""The threshold that lets a stated share of a gradient's nonzero coordinates through, estimated from a sample of them."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ._torch import is_sharded

__all__ = ["cut_for_density", "cut_for_threshold"]

SAMPLE = 2048
EXACT = 4096


def cut_for_threshold(threshold: float) -> float:
    """The largest float32 whose square does not exceed `threshold`: `g^2 > threshold` is `|g|` > it."""
    cut = torch.tensor(threshold, dtype=torch.float64).sqrt().float()
    if float(cut) ** 2 > threshold:  # the square of a float32 is exact in float64
        cut = torch.nextafter(cut, torch.zeros(()))
    return float(cut)


def cut_for_density(grad: Tensor, density: float) -> Tensor:
    """A cut c, 0-dim: about the share `density` of the nonzero coordinates of `grad` have `|g| > c`, and no more than that.

    The (1 - density) quantile of |g| over the nonzero coordinates of a sample. Up to 4,096 coordinates are all in it, and
    at most `density` times the nonzero ones pass, rounded up. Larger tensors are seen as rows of their last dimension: a
    row is touched if the coordinate looked at in it, in another column from row to row, is not zero; 2,048 coordinates
    spread evenly over touched rows and columns are the sample. If m of them are nonzero, the standard error of the share
    that passes is about sqrt(density (1 - density) / m), at most 0.011 where touched rows are dense. Where no touched row
    is found, nothing passes. Rows with some zeros count in proportion to the square of their share of nonzeros.

    Nothing is read back to the host. A sharded (DTensor) gradient is gathered for it, which is a collective call.
    """
    g = grad.full_tensor() if is_sharded(grad) else grad.detach()  # type: ignore[attr-defined]
    if g.numel() <= EXACT:
        sample = g.reshape(-1)
    else:
        order = sorted(range(g.ndim), key=g.stride, reverse=True)  # as it lies in memory: no copy
        columns, flat = g.shape[order[-1]], g.permute(order).reshape(-1)
        step = max(1, columns - 1)  # meets every row, at another column each
        touched = (flat[::step] != 0).cumsum(0)
        odd, across = _positions(columns, g.device)
        which = torch.searchsorted(touched, odd * touched[-1] // (2 * SAMPLE), right=True)
        rows = which.clamp_(max=touched.numel() - 1) * step // columns
        sample = flat.take(rows * columns + across)
    values = sample.abs().float().sort().values  # zeros first, NaN last
    zeros, positive = (values == 0).sum(), (values > 0).sum()
    # ceil((1 - density) * positive - 1e-6), in integers: the same on every device
    one = 2**40
    rank = (round((1 - density) * one) * positive + (one - 1 - one // 10**6)) // one
    index = torch.where(rank > 0, zeros + rank, 0)
    cut = torch.cat([values.new_zeros(1), values]).gather(0, index.reshape(1)).squeeze(0)
    return torch.where(positive > 0, cut, math.inf)


@functools.lru_cache(maxsize=64)
def _positions(columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of the sample: an odd number, evenly spread up to 2 * SAMPLE, and a column, in golden-ratio steps."""
    i = torch.arange(SAMPLE, device=device)
    q = max(1, round(columns * 0.618))
    while math.gcd(q, columns) != 1:
        q += 1
    return 2 * i + 1, i * q % columns
