"""The threshold that lets a stated share of a gradient's nonzero coordinates through, from a sample of them."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ._torch import is_sharded

__all__ = ["cut_for_threshold", "cuts_for_density"]

SAMPLE, EXACT = 1024, 4096


def cut_for_threshold(threshold: float) -> float:
    """The largest float32 whose square does not exceed `threshold`: `|g|` is larger where `g^2 > threshold`."""
    cut = torch.tensor(threshold, dtype=torch.float64).sqrt().float()
    if float(cut) ** 2 > threshold:  # the square of a float32 is exact in float64
        cut = torch.nextafter(cut, torch.zeros(()))
    return float(cut)


def cuts_for_density(grads: list[Tensor], density: float) -> Tensor:
    """For each gradient a cut c such that the share `density` of its nonzero coordinates has |g| > c.

    c is the (1 - density) quantile of |g| over the nonzero coordinates of a sample. Tensors of up to 4,096 coordinates
    are their own sample: at most `density` of the nonzero ones pass. Larger ones are rows of their last dimension. At
    least 1,024 coordinates are looked at, evenly spread, of every row one or more, in another column from row to row.
    The sample are 1,024 of the nonzero ones among them, evenly spread; where there are fewer, each with others of its
    row. If m coordinates of the sample are not 0, the standard error of the share that passes is about
    sqrt(density (1 - density) / m): 0.009 for density 0.1 where touched rows are dense. Where fewer than 1,024 were
    found, rows with more nonzeros count for more. Where none was found c is infinite, and nothing passes.

    Args:
        grads: of one device. Sharded (DTensor) ones are gathered for it, one at a time: a collective call.

    Returns:
        float32, one cut a gradient. On a GPU nothing is read back to the host.
    """
    samples = [_sample(g.full_tensor() if is_sharded(g) else g.detach()) for g in grads]  # type: ignore[attr-defined]
    k = [min(sample.numel(), int(density * sample.numel() + 1e-6) + 1) for sample in samples]
    largest = [sample.abs().topk(n).values.float() for sample, n in zip(samples, k)]
    nonzero = torch.stack([sample.count_nonzero() for sample in samples])
    # how many of the sample may pass: density * nonzero, rounded down, in integers, the same on every device
    one = 2**40
    pass_ = (round(density * one) * nonzero + one // 10**6) // one
    cuts = torch.cat([*largest, largest[0].new_zeros(1)])[_starts(tuple(k), nonzero.device) + pass_]
    cuts = torch.where(pass_ == nonzero, 0.0, cuts)
    return torch.where(nonzero == 0, math.inf, cuts).nan_to_num(nan=math.inf, posinf=math.inf)


def _sample(g: Tensor) -> Tensor:
    if g.numel() <= EXACT:
        return g.reshape(-1)
    order = sorted(range(g.ndim), key=g.stride, reverse=True)  # as it lies in memory: no copy
    columns, flat = g.shape[order[-1]], g.permute(order).reshape(-1)
    step = max(1, min(columns - 1, flat.numel() // SAMPLE))
    while math.gcd(step, columns) != 1:  # else some columns would never be looked at
        step -= 1
    looked_at = flat[::step]
    if g.device.type == "cpu" and not torch.compiler.is_compiling() and looked_at.all():
        return flat.take(_dense_indices(looked_at.numel(), step, columns))  # as below, without its many operations
    found = (looked_at != 0).cumsum(0)
    which, nth = _spread(found[-1])
    which = torch.searchsorted(found, which, right=True).clamp_(max=found.numel() - 1)
    return flat.take(_indices(which, nth, step, columns))


def _spread(found: Tensor) -> tuple[Tensor, Tensor]:
    """For each of the sample: beside which of the nonzero coordinates found it lies, and how many lie there before."""
    middle = (2 * torch.arange(SAMPLE, device=found.device) + 1) * found
    return middle // (2 * SAMPLE), middle % (2 * SAMPLE) // (2 * found).clamp(min=1)


def _indices(which: Tensor, nth: Tensor, step: int, columns: int) -> Tensor:
    """Flat indices: of what was looked at, then in the same row in golden-ratio steps."""
    q = max(1, round(0.618 * columns))
    while math.gcd(q, columns) != 1:
        q += 1
    first = which * step
    return first // columns * columns + (first + nth * q) % columns


@functools.lru_cache(maxsize=64)
def _dense_indices(looked_at: int, step: int, columns: int) -> Tensor:
    return _indices(*_spread(torch.tensor(looked_at)), step, columns)


@functools.lru_cache(maxsize=64)  # so that no later step copies from the host
def _starts(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    size = torch.tensor(sizes)
    return (size.cumsum(0) - size).to(device)
