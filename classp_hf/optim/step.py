"""A step of CLASSP on tensors: what goes into one call, what may not go in, and Algorithm 1 itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._torch import FUSED_DEVICES, fused_adagrad_, is_sharded, local, over_shards
from .density import cut_for_threshold, cuts_for_density
from .state import compress, expand, random_bits

# Weights in one call that needs temporaries of their size, which on a CPU should stay in the cache.
CPU_BLOCK, BLOCK = 2**19, 2**24


class Piece(NamedTuple):
    """Consecutive coordinates of one parameter, which are updated in one call."""

    param: Tensor
    weight: Tensor
    grad: Tensor
    accumulator: Tensor
    base: Tensor | None  # of a uint8 accumulator
    start: int
    cut: float | Tensor | None  # |g| up to it is ignored
    fused: bool


def classp_(
    weights: list[Tensor],
    grads: list[Tensor],
    accumulators: list[Tensor],
    *,
    lr: float | Tensor,
    power: float,
    eps: float,
    apply_decay: bool,
    maximize: bool,
) -> None:
    """Algorithm 1 on tensors of one device and dtype; changes `weights` and `accumulators` in place.

    Args:
        weights: float32 or float64.
        grads: float32, zero where g^2 does not exceed the threshold. Such coordinates do not change.
        accumulators: float32; accumulator + eps > 0.
    """
    if power == 2:
        torch._foreach_addcmul_(accumulators, grads, grads)
    else:
        powers = torch._foreach_abs(grads)
        if power != 1:
            torch._foreach_pow_(powers, power)
        torch._foreach_add_(accumulators, powers)
        del powers  # so that the roots take their place in memory
    sign, steps = 1 if maximize else -1, grads
    if apply_decay:
        roots = torch._foreach_add(accumulators, eps)
        if power == 2:
            torch._foreach_sqrt_(roots)
        elif power != 1:
            torch._foreach_pow_(roots, 1 / power)
        if not isinstance(lr, Tensor) and weights[0].dtype == grads[0].dtype:
            torch._foreach_addcdiv_(weights, grads, roots, value=sign * lr)
            return
        steps = list(torch._foreach_div(grads, roots))
    if isinstance(lr, Tensor):
        torch._foreach_add_(weights, torch._foreach_mul(steps, lr.float()), alpha=sign)
    else:
        torch._foreach_add_(weights, steps, alpha=sign * lr)


def update(batch: list[Piece], group: dict[str, Any], found: Tensor | None) -> None:
    """Algorithm 1 on a batch in place, and nothing if `found` is 1."""
    grads = [piece.grad.float() for piece in batch]
    weights, fused = [piece.weight for piece in batch], batch[0].fused
    wide = weights if weights[0].dtype in (torch.float32, torch.float64) else [w.float() for w in weights]
    low_bit = batch[0].accumulator.dtype != torch.float32
    random = [random_bits(g, w, piece.start) for g, w, piece in zip(grads, weights, batch)] if low_bit else []
    grads = [_shrink(g, piece.cut, None if fused else found) for g, piece in zip(grads, batch)]
    accumulators = [expand(piece.accumulator, piece.base) for piece in batch]

    lr = float(group["lr"]) if found is None else group["lr"]
    if isinstance(lr, Tensor):  # never read back: a Python float would synchronise, and recompile
        lr = lr.reshape(()).to(weights[0].device)
    if group["weight_decay"]:
        decay = lr * group["weight_decay"]
        torch._foreach_mul_(wide, 1 - (decay if found is None else decay * (1 - found)))
    if fused:
        fused_adagrad_(wide, grads, accumulators, lr, group["maximize"], found)
    else:
        names, eps = ("power", "apply_decay", "maximize"), group["eps"] - group["offset"]
        classp_(wide, grads, accumulators, lr=lr, eps=eps, **{name: group[name] for name in names})
    if wide is not weights:
        torch._foreach_copy_(weights, wide)
    for piece, values, bits in zip(batch, accumulators, random):
        store(piece.accumulator, piece.base, values, bits)


def store(accumulator: Tensor, base: Tensor | None, values: Tensor, random: Tensor) -> None:
    """Put `values` into a low-bit accumulator."""
    compressed, new_base = compress(values, accumulator.dtype, random)
    accumulator.copy_(compressed)
    if base is not None:
        base.copy_(new_base)  # type: ignore[arg-type]


def pieces(params: list[Tensor], states: dict[Tensor, Any], group: dict[str, Any]) -> Iterator[Piece]:
    """The parameters, of one device, in pieces of at most a block of weights where the step needs temporaries."""
    may_fuse, block = _may_fuse(group, params[0].device), _block(params[0].device)
    for p, cut in zip(params, cuts(params, group)):
        state = states[p]
        weight, grad = local(p), local(p.grad)  # type: ignore[arg-type]
        accumulator, base, count = local(state["accumulator"]), state.get("base"), weight.numel()
        if count == 0:
            continue
        if not (weight.is_contiguous() and grad.is_contiguous() and accumulator.is_contiguous()):
            if accumulator.dtype == torch.float32:  # else its rounding knows the order of the coordinates
                order = sorted(range(weight.ndim), key=weight.stride, reverse=True)
                weight, grad, accumulator = weight.permute(order), grad.permute(order), accumulator.permute(order)
            if not (weight.is_contiguous() and accumulator.is_contiguous()):
                yield Piece(p, weight, grad, accumulator, base, 0, cut, False)
                continue
            grad = grad.contiguous()
        fused = may_fuse and weight.dtype != torch.float64
        if count <= block or (fused and cut is None and weight.dtype == grad.dtype == torch.float32):
            yield Piece(p, weight, grad, accumulator, base, 0, cut, fused)
            continue
        weight, grad, accumulator = weight.view(-1), grad.view(-1), accumulator.view(-1)
        for start in range(0, count, block):
            here = slice(start, start + block)
            bases = None if base is None else base[start // 256 : (start + block) // 256]
            yield Piece(p, weight[here], grad[here], accumulator[here], bases, start, cut, fused)


def batches(pieces: Iterable[Piece], group: dict[str, Any]) -> Iterator[list[Piece]]:
    """What goes into one call: pieces of one dtype and form of the step; a block of weights if with temporaries."""
    filling: dict[Any, tuple[list[Piece], int]] = {}
    for piece in pieces:
        kind = piece.weight.dtype, piece.grad.dtype, piece.fused
        in_place = piece.fused and piece.cut is None and kind[0] == kind[1] == torch.float32
        count, block = 0 if in_place else piece.weight.numel(), _block(piece.weight.device)
        batch, filled = filling.get(kind, ([], 0))
        if batch and (group["foreach"] is False or filled + count > block):
            yield batch
            batch, filled = [], 0
        batch.append(piece)
        filling[kind] = batch, filled + count
    yield from (batch for batch, _ in filling.values())


def cuts(params: list[Tensor], group: dict[str, Any]) -> list[Any]:
    """What |g| has to exceed, for parameters of one device: a float, or a tensor if not read back; None if nothing."""
    if group["density"] in (None, 1):
        return [cut_for_threshold(group["threshold"]) if group["threshold"] else None] * len(params)
    found = cuts_for_density([p.grad for p in params], group["density"])  # type: ignore[misc]
    return found.tolist() if reads_back(found.device) else list(found.unbind())


def reads_back(device: torch.device) -> bool:
    """Whether the host looks at gradients before the step."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def _block(device: torch.device) -> int:
    return CPU_BLOCK if reads_back(device) else BLOCK


def largest_gradient(power: float) -> float:
    """The largest |g| of which 2**24 additions of |g|^power stay finite in float32."""
    largest = torch.finfo(torch.float32).max
    return min((largest * 2.0**-24) ** (1 / power), largest)


def refuse_bad(grads: list[tuple[Tensor, float]]) -> None:
    """Raise RuntimeError if a gradient, given with its power, is not finite or too large, on any rank. Reads back."""
    shards, limits = [local(g) for g, _ in grads], [largest_gradient(power) for _, power in grads]
    # The norm bounds the largest and takes a twentieth of its time on a CPU. It may overflow for good gradients.
    norms = [float(norm) for norm in torch._foreach_norm(shards)] if shards else []
    bad = [
        not norm <= limit and not float(shard.abs().max()) <= limit
        for norm, shard, limit in zip(norms, shards, limits)
    ]
    if any(is_sharded(g) for g, _ in grads):  # every rank must come to the same verdict
        flags = over_shards([torch.tensor(float(b)) for b in bad], [g for g, _ in grads], "max")
        bad = [bool(flag) for flag in flags]
    if any(bad):
        shape = tuple(next(g.shape for (g, _), b in zip(grads, bad) if b))
        raise RuntimeError(
            f"CLASSP got NaN, infinite or overflowing gradients in {sum(bad)} of {len(bad)} tensors (first shape: "
            f"{shape}). Nothing was updated. Lower the learning rate, clip the gradients, or check data and loss."
        )


def bad_flags(grads: list[tuple[Tensor, float]]) -> list[Tensor]:
    """For every gradient, given with its power: 1.0 if it is not finite or too large, on any rank; else 0.0."""
    alike: dict[Any, dict[int, Tensor]] = {}
    for i, (grad, power) in enumerate(grads):
        shard = local(grad)
        if shard.numel():  # an empty one has no maximum
            alike.setdefault((shard.device, shard.dtype, power), {})[i] = shard
    flags = [torch.zeros((), device=g.device) for g, _ in grads]
    for (_, _, power), shards in alike.items():
        largest = torch.stack(torch._foreach_norm(list(shards.values()), math.inf)).float()
        for i, flag in zip(shards, (~(largest <= largest_gradient(power))).float().unbind()):
            flags[i] = flag
    return over_shards(flags, [g for g, _ in grads], "max")


def _shrink(g: Tensor, cut: float | Tensor | None, found: Tensor | None) -> Tensor:
    """Zero where |g| <= `cut`, and everywhere if `found` is 1."""
    if found is not None:
        cut = cut if isinstance(cut, Tensor) else torch.full_like(found, -1.0 if cut is None else cut)
        cut = cut.masked_fill(found > 0, math.inf)
    if isinstance(cut, Tensor):
        return torch.where(g.abs() > cut, g, 0.0)
    return g if cut is None else torch.hardshrink(g, cut)


def _may_fuse(group: dict[str, Any], device: torch.device) -> bool:
    """Whether PyTorch's fused Adagrad is this step."""
    possible = group["power"] == 2 and group["apply_decay"] and group["state_dtype"] == "float32"
    needed = group["fused"] is not False and not group["foreach"] and not torch.compiler.is_compiling()
    return possible and needed and device.type in FUSED_DEVICES
