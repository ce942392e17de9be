"""CLASSP's step on a GPU: one Triton launch for all tensors of one kind, each weight read and written once.

The same operations in the same order as `kernels.c`, low-bit accumulators (`state.py`) included. A block of 1,024 weights in which
no gradient passes costs reading its gradients. Nothing is read back to the host within a step.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Stepper", "takes"]

_BLOCK = tl.constexpr(256)  # weights that share the base of a uint8 accumulator
_ROWS = tl.constexpr(4)  # such blocks a program
_WEIGHTS = _BLOCK.value * _ROWS.value
_INTERPRETED = triton.knobs.runtime.interpret  # Triton's interpreter, which runs on CPUs
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8}


def takes(param: Tensor, grad: Tensor, accumulator: Tensor | None) -> bool:
    """Whether the step can update `param` (plain tensors: the local parts of sharded ones).

    Not while a CUDA graph is captured: neither can what the kernel reads be sent then, nor a kernel be loaded.
    """
    tensors = [t for t in (param, grad, accumulator) if t is not None]
    return (
        all(type(t) is Tensor and t.is_cuda and t.data_ptr() % 16 == 0 for t in tensors)
        and param.dtype in _DTYPES
        and grad.dtype in _DTYPES
        and param.is_contiguous()
        and not torch.cuda.is_current_stream_capturing()
        and works(param.device)
    )


def works(device: torch.device) -> bool:
    """Whether a small step on `device` gives what PyTorch's operations give; asked once, with a warning if not.

    Triton needs a C compiler and Python's headers at run time, and GPUs of some age.
    """
    if device not in _WORKS:
        g = torch.linspace(-1, 1, 3000, device=device, dtype=torch.float32)
        w, s, x = torch.ones_like(g), torch.zeros_like(g), torch.where(g.square() > 0.25, g, 0.0)
        hyperparameters = {"lr": 0.1, "power": 2.0, "eps": 1e-6, "apply_decay": True, "weight_decay": 0.0, "maximize": False}  # fmt: skip
        problem = ""
        try:
            Stepper()(0, [w], [g], [s], [None], [0.25], **hyperparameters)  # type: ignore[arg-type]
            if not (torch.allclose(s, x.square()) and torch.allclose(w, 1 - 0.1 * x / (x.square() + 1e-6).sqrt())):
                problem = "it gives other weights than PyTorch's operations"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            warnings.warn(
                f"CLASSP's Triton step does not work on {device} ({problem}). PyTorch's operations are used instead, which "
                "are slower.",
                stacklevel=2,
            )
        _WORKS[device] = not problem
    return _WORKS[device]


_WORKS: dict[torch.device, bool] = {}


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=inside, other=0)
    else:  # the compiler joins loads without a mask to wide ones
        return tl.load(pointers)


@triton.jit
def _store(pointers, values, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointers, values, mask=inside)
    else:
        tl.store(pointers, values)


@triton.jit
def _hash(g, w, index):
    """As `random_bits` of state.py."""
    w = w.to(tl.uint32, bitcast=True)
    x = g.to(tl.uint32, bitcast=True) ^ ((w << 16) | (w >> 16)) ^ (index.to(tl.uint32) * 0x9E3779B1)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _update(
    block, w, g, s, base, n, threshold, bad, lr, grad_scale, weight_decay, eps, power, sign,
    KIND: tl.constexpr, APPLY_DECAY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = block * _ROWS + tl.arange(0, _ROWS)
    at = row[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    inside = at < n
    raw = _load(g + at, inside, MASKED).to(tl.float32)
    x = raw
    if grad_scale is not None:
        x = x / tl.load(grad_scale)
    finite = tl.abs(x) <= _LARGEST
    wrong = tl.sum(tl.sum((~finite).to(tl.int32), 1), 0)
    if wrong > 0:
        tl.atomic_add(bad, wrong)
    passed = finite & tl.where(threshold == 0, x != 0, x * x > threshold)
    x = tl.where(passed, x, 0.0)
    updates = tl.max(tl.max(passed.to(tl.int32), 1), 0)
    if (updates > 0) | (weight_decay != 0):
        rate = tl.load(lr).to(tl.float32)
        value = _load(w + at, inside, MASKED).to(tl.float32)
        stored = _load(s + at, inside, MASKED)
        bits = tl.zeros_like(at).to(tl.uint32)
        if s.dtype.element_ty == tl.float32:
            a = stored
        else:
            bits = _hash(raw, value, at)
            if s.dtype.element_ty == tl.bfloat16:
                a = stored.to(tl.float32)
            else:
                code = stored.to(tl.int32)
                offset = tl.load(base + row, mask=row * _BLOCK < n, other=0).to(tl.int32)
                a = tl.where(code > 0, (code + offset[:, None]) << 19, 0).to(tl.float32, bitcast=True)

        if KIND == 2:
            a += x * x
        elif KIND == 1:
            a += tl.abs(x)
        else:
            a += tl.where(passed, tl.exp2(power * tl.log2(tl.abs(tl.where(passed, x, 1.0)))), 0.0)
        step = sign * rate * x
        if APPLY_DECAY:
            if KIND == 2:
                step = tl.div_rn(step, tl.sqrt_rn(a + eps))
            elif KIND == 1:
                step = tl.div_rn(step, a + eps)
            else:
                step = tl.div_rn(step, tl.exp2(tl.log2(a + eps) / power))
        value = value * (1 - rate * weight_decay) + step
        _store(w + at, value.to(w.dtype.element_ty), inside, MASKED)

        if s.dtype.element_ty == tl.float32:
            _store(s + at, a, inside, MASKED)
        else:
            exact = a.to(tl.uint32, bitcast=True)
            if s.dtype.element_ty == tl.bfloat16:
                rounded = ((exact + (bits >> 16)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
                _store(s + at, rounded, inside, MASKED)
            else:
                code = tl.where(a == 0, 0, ((exact + (bits >> 13)) >> 19).to(tl.int32))
                offset = tl.maximum(tl.max(code, 1) - 255, 0)
                tl.store(base + row, offset.to(tl.int16), mask=row * _BLOCK < n)
                offset = offset[:, None]
                # below the lowest code: that or none, right on average
                lowest = ((offset + 1) << 19).to(tl.float32, bitcast=True)
                chance = ((bits * 0x9E3779B1) >> 8).to(tl.float32) * 5.9604644775390625e-08
                code = tl.where(code > offset, code - offset, (chance * lowest < a).to(tl.int32))
                _store(s + at, code.to(tl.uint8), inside, MASKED)


@triton.jit
def _step_all(
    table, tensor_of, thresholds, bad, lr, grad_scale, found_inf, weight_decay, eps, power, sign,
    W: tl.constexpr, G: tl.constexpr, S: tl.constexpr, KIND: tl.constexpr, APPLY_DECAY: tl.constexpr,
):  # fmt: skip
    """All tensors of a table, whose rows are the addresses of weight, gradient, accumulator and bases, the size, the first block."""
    k = tl.load(tensor_of + tl.program_id(0))
    row = table + 6 * k
    w = tl.multiple_of(tl.load(row).to(tl.pointer_type(W)), 16)
    g = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(G)), 16)
    s = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(S)), 16)
    base = tl.load(row + 3).to(tl.pointer_type(tl.int16))
    n = tl.load(row + 4)
    block = tl.program_id(0).to(tl.int64) - tl.load(row + 5)
    threshold = tl.load(thresholds + k)
    go = True
    if found_inf is not None:
        go = tl.load(found_inf) == 0
    if go:
        if (block + 1) * (_ROWS * _BLOCK) <= n:
            _update(block, w, g, s, base, n, threshold, bad, lr, grad_scale, weight_decay, eps, power, sign,
                    KIND, APPLY_DECAY, False)  # fmt: skip
        else:
            _update(block, w, g, s, base, n, threshold, bad, lr, grad_scale, weight_decay, eps, power, sign,
                    KIND, APPLY_DECAY, True)  # fmt: skip


class Stepper:
    """Launches the steps of one optimizer, and reports the gradients they passed over."""

    def __init__(self) -> None:
        self._tables: dict[Any, tuple[list[int], Tensor, list[list[int]], Tensor]] = {}
        self._bad: dict[torch.device, Tensor] = {}
        self._sent: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def __call__(
        self,
        group: int,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        accumulators: Sequence[Tensor],
        bases: Sequence[Tensor | None],
        thresholds: Sequence[float | Tensor],
        *,
        lr: float | Tensor,
        power: float,
        eps: float,
        apply_decay: bool,
        weight_decay: float,
        maximize: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Algorithm 1 on all of `params`, which `takes` accepts; they and `accumulators` (with their `bases`) change in place.

        Args:
            group: number of the parameter group.
            lr: a float, or a 1-element tensor, which is not read back.
            grad_scale: 1-element tensor that the gradients are divided by, as `torch.amp.GradScaler` passes it.
            found_inf: 1-element tensor; if it is not 0, nothing happens.
        """
        kinds: dict[Any, list[int]] = {}
        for i, tensors in enumerate(zip(params, grads, accumulators)):
            if tensors[0].numel():
                kinds.setdefault((tensors[0].device, *(t.dtype for t in tensors)), []).append(i)
        for kind, members in kinds.items():
            device = kind[0]
            f32 = {"device": device, "dtype": torch.float32}
            on_gpu = isinstance(lr, Tensor) and lr.is_cuda
            rate = lr.to(device) if on_gpu else torch.full((1,), float(lr), **f32)  # type: ignore[union-attr]
            limits = [thresholds[i] for i in members]
            if all(isinstance(t, Tensor) for t in limits):
                limit = torch.stack([t.to(**f32) for t in limits])  # type: ignore[union-attr]
                if grad_scale is not None:  # they were found in scaled gradients
                    limit /= grad_scale.to(device) ** 2
            else:
                limit = torch.full((len(members),), float(limits[0]), **f32)
            chosen = [(params[i], grads[i].contiguous(), accumulators[i], bases[i]) for i in members]
            options = {} if _INTERPRETED else {"enable_fp_fusion": False}
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                table, tensor_of, blocks = self._table((group, *kind), device, chosen)
                _step_all[(blocks,)](
                    table,
                    tensor_of,
                    limit,
                    self._counter(device),
                    rate,
                    None if grad_scale is None else grad_scale.to(device),
                    None if found_inf is None else found_inf.to(device),
                    *(float(x) for x in (weight_decay, eps, power, 1 if maximize else -1)),
                    **dict(zip("WGS", (_DTYPES[dtype] for dtype in kind[1:]))),
                    KIND=int(power) if power in (1, 2) else 0,
                    APPLY_DECAY=apply_decay,
                    **options,
                )
            torch.autograd.graph.increment_version([t for w, _, s, _ in chosen for t in (w, s)])

    def _counter(self, device: torch.device) -> Tensor:
        if device not in self._bad:
            self._bad[device] = torch.zeros(1, dtype=torch.int32, device=device)
        return self._bad[device]

    def _table(
        self, key: Any, device: torch.device, chosen: list[tuple[Tensor, Tensor, Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor, int]:
        """What `_step_all` reads. Made anew where something has moved, as gradients may at every step."""
        blocks = [triton.cdiv(w.numel(), _WEIGHTS) for w, *_ in chosen]
        rows = [
            [*(0 if t is None else t.data_ptr() for t in tensors), tensors[0].numel(), first]
            for tensors, first in zip(chosen, itertools.accumulate(blocks, initial=0))
        ]
        known = self._tables.get(key)
        if known is None or known[0] != blocks:
            of = torch.arange(len(blocks), dtype=torch.int32, device="cpu")
            of = of.repeat_interleave(torch.tensor(blocks, device="cpu"))
            known = blocks, _to(device, of), [], torch.empty(0, device="cpu")
        if known[2] != rows:
            known = *known[:2], rows, _to(device, torch.tensor(rows, device="cpu"))
        self._tables[key] = known
        return known[3], known[1], sum(blocks)

    def send(self, devices: set[torch.device], over_ranks: Callable[[Tensor], Tensor] | None = None) -> None:
        """Send for the number of bad gradients, one message a device at a time; for `found` at a later step.

        Args:
            over_ranks: sums a number over the ranks that hold the parts of sharded tensors.
        """
        if self._sent:
            return
        for device in devices:
            bad = self._counter(device)
            bad = bad.clone() if over_ranks is None else over_ranks(bad)
            if device.type != "cuda":
                self._sent.append((bad, None))
                continue
            with torch.cuda.device(device):
                host = torch.empty(1, dtype=bad.dtype, device="cpu", pin_memory=True).copy_(bad, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._sent.append((host, event))

    def found(self) -> int:
        """How many NaN or infinite gradients the steps before passed over.

        As far as it is known without waiting; where there are several ranks it waits for the step before, so that all raise
        at the same step.
        """
        events = [event for _, event in self._sent if event is not None]
        if events and torch.cuda.is_current_stream_capturing():
            return 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for event in events:
                event.synchronize()
        if not all(event.query() for event in events):
            return 0
        found = sum(int(number) for number, _ in self._sent)
        if found:
            for bad in self._bad.values():
                bad.zero_()
        self._sent.clear()
        return found


def _to(device: torch.device, t: Tensor) -> Tensor:
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t
