"""Accumulators in two bytes or one byte a weight.

An accumulator only grows and is used through a root, so a few leading bits of it are enough, provided that increments smaller
than the last bit are not lost: every update is rounded up or down at random, right on average (stochastic rounding).

- `bfloat16`: the leading 16 bits of the float32.
- `uint8`: its exponent and 4 bits of its mantissa, counted from a base (int16) that every block of 256 weights has, so that the
  block's largest accumulator has the code 255. Code 0 is zero, code c the float32 whose bits are `(base + c) << 19`. 255 codes
  are 16 octaves: what is smaller than 1/65536 of its block's largest becomes the smallest code or zero, right on average.

Error: one rounding of a value v changes it by at most the gap h between codes, `v / 16` (`v / 128` in bfloat16) at most, and by
nothing on average. Over any number of steps the errors' variance is at most the integral of h over the growth, so the
relative standard deviation of an accumulator is at most `sqrt(1 / 32) = 0.18` (`0.063`), half of that in its square root.

The random bits are a hash of gradient, weight and index, not a generator's: the same run rounds alike, resumed or not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["STATE_DTYPES", "compress", "expand", "random_bits"]

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}

_BLOCK, _SHIFT, _WORD = 256, 19, 0xFFFFFFFF


def random_bits(grad: Tensor, param: Tensor, start: int = 0) -> Tensor:
    """32 bits a weight, int64, flat, from its gradient and value (any floating dtype) and its index, from `start` on."""
    g, w = (t.detach().float().reshape(-1).view(torch.int32).long() & _WORD for t in (grad, param))
    index = torch.arange(start, start + g.numel(), device=g.device) * 0x9E3779B1
    x = (g ^ (w << 16 | w >> 16) ^ index) & _WORD
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD
    return x ^ x >> 16


def compress(values: Tensor, dtype: torch.dtype, random: Tensor) -> tuple[Tensor, Tensor | None]:
    """Accumulators `values` (float32, >= 0) in `dtype`, of the same shape, and the bases of uint8 (int16, one a block).

    What `expand` gave comes out as it was, whatever the `random` bits.
    """
    if dtype == torch.float32:
        return values, None
    values = values.contiguous()
    bits = values.reshape(-1).view(torch.int32).long()
    if dtype == torch.bfloat16:
        rounded = bits + (random >> 16) & ~0xFFFF
        return rounded.int().view(torch.float32).to(dtype).view(values.shape), None
    code = torch.where(bits == 0, 0, bits + (random >> 32 - _SHIFT) >> _SHIFT)
    blocks = F.pad(code, (0, -code.numel() % _BLOCK)).view(-1, _BLOCK)
    base = (blocks.amax(1) - 255).clamp_(min=0)
    b = base.repeat_interleave(_BLOCK)[: code.numel()]
    lowest = (b + 1 << _SHIFT).int().view(torch.float32)
    u = (random * 0x9E3779B1 & _WORD) >> 8
    up = u.float() * 2.0**-24 * lowest < values.reshape(-1)
    return torch.where(code > b, code - b, up.long()).to(torch.uint8).view(values.shape), base.to(torch.int16)


def expand(accumulator: Tensor, base: Tensor | None) -> Tensor:
    """The float32 values of an accumulator: itself if it is kept in float32."""
    if base is None:
        return accumulator.float()
    code = accumulator.reshape(-1).int()
    b = base.int().repeat_interleave(_BLOCK)[: code.numel()]
    return torch.where(code > 0, code + b << _SHIFT, 0).view(torch.float32).view(accumulator.shape)
