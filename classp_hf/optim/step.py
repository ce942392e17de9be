"""A step of CLASSP on tensors: what must not go in, what goes into one call, and Algorithm 1 itself."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .density import cuts_for_density
from .shards import local, over_shards
from .state import BLOCK, expand, random_bits, store

FUSED_DEVICES = ("cpu", "cuda") if torch.__version__ >= (2, 13) else ()  # type: ignore[operator]
"""Where `torch._fused_adagrad_` runs, with a tensor as learning rate too (CUDA: pytorch#153038)."""

CPU_CALL, CALL = 2**18, 2**24
"""Weights in one call that needs temporaries of their size; on a CPU those should stay in the cache."""


class _Piece(NamedTuple):
    """Consecutive coordinates of one parameter, which are updated in one call."""

    weight: Tensor
    grad: Tensor
    accumulator: Tensor
    base: Tensor | None  # of a uint8 accumulator
    start: int
    cut: float | Tensor | None  # |g| up to it is ignored

    def is_contiguous(self) -> bool:
        return self.weight.is_contiguous() and self.grad.is_contiguous() and self.accumulator.is_contiguous()

    def split(self, most: int) -> list["_Piece"]:
        """Pieces of at most `most` weights, if they can be views."""
        count = self.weight.numel()
        if count <= most or not self.is_contiguous():
            return [self]
        views = [t.view(-1).split(most) for t in self[:3]]
        bases = itertools.repeat(None) if self.base is None else self.base.split(most // BLOCK)
        return [
            _Piece(weight, grad, accumulator, base, start, self.cut)
            for weight, grad, accumulator, base, start in zip(*views, bases, range(0, count, most))
        ]


def find_bad(work: list[tuple[dict[str, Any], list[Tensor]]]) -> Tensor | None:
    """1.0 if a gradient, of parameters with their group, is bad on any rank; else 0.0. Collective.

    On CPUs it raises RuntimeError for a bad one, and else returns None.
    """
    found = []
    for group, params in work:
        grads = [local(p.grad) for p in params]  # type: ignore[arg-type]
        dtype = torch.promote_types(grads[0].dtype, torch.float32)
        if reads_back(grads[0].device) and dtype == grads[0].dtype and all(g.is_contiguous() for g in grads):
            flat = [g.view(-1) for g in grads]  # BLAS reads them up to twice as fast as a norm does
            norms = torch.stack([torch.dot(g, g) for g in flat]).sqrt()
        else:
            norms = torch.stack(torch._foreach_norm(grads, 2, dtype))
        # of a norm up to this 2**24 additions of |g|^p stay finite; the norm's own squares do up to 2**63
        bad = (~(norms <= 2.0 ** min(104 / group["power"], 63))).any().float()
        found.append(over_shards(bad, params[0], "max"))  # one verdict on all ranks
    if not found:
        return None
    worst = torch.stack([bad.to(found[0].device) for bad in found]).amax()
    if not all(reads_back(bad.device) for bad in found):
        return worst
    if worst:
        raise RuntimeError(
            "CLASSP got NaN, infinite or overflowing gradients. Nothing was updated. Lower the learning rate, "
            "clip the gradients, or check data and loss."
        )
    return None


def batches(params: list[Tensor], group: dict[str, Any], states: Mapping[Tensor, Any]) -> Iterator[list[_Piece]]:
    """What goes into one call: pieces whose temporaries fit; with `foreach=False` one piece.

    The parameters, of `group`, have one device, dtype and sharding, and so have their gradients.
    """
    device = params[0].device
    fused, most = may_fuse(group, device), CPU_CALL if reads_back(device) else CALL
    batch: list[_Piece] = []
    filled = 0
    for p, cut in zip(params, cuts(params, group)):
        grad: Any = p.grad
        state = states[p]
        if state["accumulator"].shape != p.shape:
            raise ValueError(
                f"A parameter of shape {tuple(p.shape)} had the shape {tuple(state['accumulator'].shape)} when CLASSP "
                "began. Build a new optimizer, or a new Trainer, of the resized model."
            )
        whole = _Piece(local(p), local(grad), local(state["accumulator"]), state.get("base"), 0, cut)
        in_place = fused and cut is None and whole.is_contiguous() and p.dtype == grad.dtype == torch.float32
        for piece in [whole] if in_place else whole.split(most):
            size = 0 if in_place else piece.weight.numel()
            if batch and (group["foreach"] is False or filled + size > most):
                yield batch
                batch, filled = [], 0
            batch.append(piece)
            filled += size
    if batch:
        yield batch


def update(batch: list[_Piece], group: dict[str, Any], found_inf: Tensor | None) -> None:
    """Algorithm 1 on a batch in place, and nothing if `found_inf` is 1."""
    device, lr = batch[0].weight.device, group["lr"]
    fused = may_fuse(group, device)
    dtype = torch.promote_types(batch[0].weight.dtype, torch.float32)
    w = [piece.weight.to(dtype).contiguous() for piece in batch]
    s = [expand(piece.accumulator, piece.base).to(dtype).contiguous() for piece in batch]
    g = [piece.grad.to(dtype).contiguous() for piece in batch]
    if found_inf is None:
        lr = float(lr)
        decay = lr * group["weight_decay"]
    else:
        if isinstance(lr, Tensor):  # never read back: a Python float would synchronise, and recompile
            lr = lr.reshape(()).to(device, torch.float32)
        found_inf = found_inf.to(device)
        decay = lr * group["weight_decay"] * (1 - found_inf)
        if not fused:
            g = [x.masked_fill(found_inf > 0, 0.0) for x in g]
    g = [hardshrink(x, piece.cut) for x, piece in zip(g, batch)]

    if group["weight_decay"]:
        torch._foreach_mul_(w, 1 - decay)
    if fused:
        steps = [torch.ones((), device=device)] * len(w)  # they matter only if lr decays with them
        constants: dict[str, Any] = {"lr_decay": 0.0, "weight_decay": 0.0, "eps": 0.0}
        torch._fused_adagrad_(w, g, s, steps, lr=lr, **constants, maximize=group["maximize"], found_inf=found_inf)
    else:
        signed = lr if group["maximize"] else -lr
        classp_(w, g, s, signed, group["power"], group["eps"] - group["offset"], group["apply_decay"])

    for piece, new_w, new_s, x in zip(batch, w, s, g):
        if new_w is not piece.weight:
            piece.weight.copy_(new_w)
        if piece.accumulator.dtype != torch.float32:
            store(piece.accumulator, piece.base, new_s.float(), random_bits(x, new_w, piece.start))
        elif new_s is not piece.accumulator:
            piece.accumulator.copy_(new_s)


def classp_(
    w: list[Tensor], g: list[Tensor], s: list[Tensor], lr: float | Tensor, p: float, eps: float, apply_decay: bool
) -> None:
    """Algorithm 1 with `w + lr g ...`, in place, on tensors of one dtype. g is 0 where the threshold masks it."""
    if p == 2:
        torch._foreach_addcmul_(s, g, g)
    else:
        powers = torch._foreach_abs(g)
        if p != 1:
            torch._foreach_pow_(powers, p)
        torch._foreach_add_(s, powers)
        del powers  # so that the roots take their place in memory
    if isinstance(lr, Tensor):
        g, lr = list(torch._foreach_mul(g, lr)), 1.0
    if not apply_decay:
        torch._foreach_add_(w, g, alpha=lr)
        return
    roots = torch._foreach_add(s, eps)
    if p == 2:
        torch._foreach_sqrt_(roots)
    elif p != 1:
        torch._foreach_pow_(roots, 1 / p)
    torch._foreach_addcdiv_(w, g, roots, value=lr)


def cuts(params: list[Tensor], group: dict[str, Any]) -> list[Any]:
    """What |g| has to exceed, for parameters of one device: a float, or a tensor if not read back; None if nothing."""
    if group["density"] in (None, 1):
        return [math.sqrt(group["threshold"]) or None] * len(params)
    found = cuts_for_density([p.grad for p in params], group["density"])  # type: ignore[misc]
    return found.tolist() if reads_back(found.device) else list(found.unbind())


def hardshrink(g: Tensor, cut: float | Tensor | None) -> Tensor:
    """`g`, and 0 where |g| does not exceed `cut`."""
    if isinstance(cut, Tensor):
        return torch.where(g.abs() > cut, g, 0.0)
    return g if cut is None else torch.hardshrink(g, cut)


def reads_back(device: torch.device) -> bool:
    """Whether the host looks at gradients before the step."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def may_fuse(group: dict[str, Any], device: torch.device) -> bool:
    """Whether PyTorch's fused Adagrad takes the step."""
    wanted = group["fused"] is not False and not group["foreach"] and not torch.compiler.is_compiling()
    holds_eps = group["offset"] == group["eps"]  # not if eps was changed, or after a state of an older version
    return wanted and holds_eps and group["power"] == 2 and group["apply_decay"] and device.type in FUSED_DEVICES
