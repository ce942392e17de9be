"""Accumulators in two bytes or one byte a weight.

A few leading bits are enough for what only grows and is used through a root, if increments below the last bit are not
lost: every update is rounded up or down at random, right on average.
- `bfloat16`: the leading 16 bits of the float32.
- `uint8`: exponent and 4 bits of mantissa, counted from a base (int16) of each block of 256 weights, whose largest has
  the code 255. Code 0 is zero, code c the float32 with the bits `(base + c) << 19`. 255 codes are 16 octaves: what is
  below 1/65536 of its block's largest becomes the smallest code or zero.
Error: one rounding of a value v changes it by at most the gap h between codes, up to `v / 16` (`v / 128` in bfloat16),
and by nothing on average. Over any number of steps the errors' variance is at most the integral of h over the growth,
so an accumulator's relative standard deviation is at most `sqrt(1 / 32) = 0.18` (`0.063`), half of that in its root.
The random bits are a hash of gradient, weight and index, not a generator's: the same run rounds alike, resumed or not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}
BLOCK, _SHIFT, _GOLDEN = 256, 19, 0x9E3779B1 - 2**32


def random_bits(grad: Tensor, param: Tensor, start: int = 0) -> Tensor:
    """32 bits a weight, int32, flat, from its gradient and value (any dtype) and its index, from `start` on."""
    x, w = (t.detach().float().reshape(-1).view(torch.int32) for t in (grad, param))
    index = torch.arange(x.numel(), dtype=torch.int32, device=x.device) + start % 2**31
    x = x ^ (w << 16 | w >> 16 & 0xFFFF) ^ index.mul_(_GOLDEN)
    x = x.bitwise_xor_(x >> 16 & 0xFFFF).mul_(0x7FEB352D)
    x = x.bitwise_xor_(x >> 15 & 0x1FFFF).mul_(0x846CA68B - 2**32)
    return x.bitwise_xor_(x >> 16 & 0xFFFF)


def compress(values: Tensor, dtype: torch.dtype, random: Tensor) -> tuple[Tensor, Tensor | None]:
    """Accumulators `values` (float32, >= 0) in `dtype`, of the same shape, and the blocks' bases of uint8.

    `random`: an integer with 32 random bits a weight. What `expand` gave comes out as it was, whatever they are.
    """
    values, random = values.contiguous(), random.int()
    bits, shape = values.view(-1).view(torch.int32), values.shape
    if dtype == torch.bfloat16:
        return (bits + (random >> 16 & 0xFFFF) & ~0xFFFF).view(torch.float32).to(dtype).view(shape), None
    code = torch.where(bits == 0, 0, bits + (random >> 32 - _SHIFT & 2**_SHIFT - 1) >> _SHIFT)
    base = (F.pad(code, (0, -code.numel() % BLOCK)).view(-1, BLOCK).amax(1) - 255).clamp_(min=0)
    b = base[:, None].expand(-1, BLOCK).reshape(-1)[: code.numel()]
    u = random * _GOLDEN >> 8 & 0xFFFFFF
    up = u.float() * 2.0**-24 * (b + 1 << _SHIFT).view(torch.float32) < values.reshape(-1)
    return torch.where(code > b, code - b, up.int()).to(torch.uint8).view(shape), base.to(torch.int16)


def store(accumulator: Tensor, base: Tensor | None, values: Tensor, random: Tensor) -> None:
    """Put `values` into a low-bit accumulator; arguments as of `compress`."""
    compressed, new_base = compress(values, accumulator.dtype, random)
    accumulator.copy_(compressed)
    if base is not None:
        base.copy_(new_base)  # type: ignore[arg-type]


def expand(accumulator: Tensor, base: Tensor | None) -> Tensor:
    """The float32 values of an accumulator: itself if it is kept in float32."""
    if base is None:
        return accumulator.float()
    b = base.int()[:, None].expand(-1, BLOCK).reshape(-1)[: accumulator.numel()]
    code = accumulator.reshape(-1).int()
    return torch.where(code > 0, code + b << _SHIFT, 0).view(torch.float32).view(accumulator.shape)
