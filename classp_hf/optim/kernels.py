"""The compiled CPU code, `kernels.c`: built when the package is installed, wherever there is a C compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["BUILT", "classp_step_", "density_thresholds", "pull_", "pulls", "square_products_", "takes"]

_VERSION = 4
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("n", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("w", "g", "s", "base")),
        ("threshold", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("w_dtype", "g_dtype", "s_dtype")),
    ]


class _Hyperparameters(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("step", "decay", "power", "eps")),
        ("apply_decay", ctypes.c_int32),
    ]


class _DensityTensor(ctypes.Structure):
    _fields_ = [
        ("one", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("g", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("density", ctypes.c_double),
        ("threshold", ctypes.c_float),
        ("g_dtype", ctypes.c_int32),
    ]


class _Products(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "examples", "tokens", "rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("left", "right", "total")),
    ]


class _PulledTensor(ctypes.Structure):
    _fields_ = [
        ("n", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("target", "w", "a", "values", "scale")),
        ("columns", ctypes.c_int64),
        ("f", ctypes.c_void_p),
    ]


class _Pull(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_float) for name in ("strength", "eps", "power")), ("implicit", ctypes.c_int32)]


def _load() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.is_file():
            library = ctypes.CDLL(str(path))
            if library.classp_version() == _VERSION:  # else a build of another version of the source
                library.classp_step.restype = ctypes.c_int64
                for function, tensor, hyper in (
                    (library.classp_step, _Tensor, _Hyperparameters),
                    (library.classp_pull, _PulledTensor, _Pull),
                ):
                    pointers = ctypes.POINTER(tensor), ctypes.POINTER(hyper)
                    function.argtypes = [pointers[0], ctypes.c_int64, pointers[1], ctypes.c_int]
                library.classp_thresholds.argtypes = [ctypes.POINTER(_DensityTensor), ctypes.c_int64, ctypes.c_int]
                library.classp_square_products.argtypes = [ctypes.POINTER(_Products), ctypes.c_int]
                return library
    return None


_library = _load()

BUILT = _library is not None
"""Whether the compiled step is there. Without it CLASSP takes PyTorch's operations one by one, several times slower."""


def takes(param: Tensor, grad: Tensor, accumulator: Tensor | None) -> bool:
    """Whether the compiled step can update `param` (plain tensors: the local parts of sharded ones)."""
    tensors = [t for t in (param, grad, accumulator) if t is not None]
    return (
        BUILT
        and all(type(t) is Tensor and t.device.type == "cpu" for t in tensors)
        and param.dtype in (torch.float32, torch.bfloat16)
        and grad.dtype in (torch.float32, torch.bfloat16)
        and param.is_contiguous()
    )


def classp_step_(
    params: list[Tensor],
    grads: list[Tensor],
    accumulators: list[Tensor],
    bases: list[Tensor | None],
    thresholds: list[float],
    *,
    lr: float,
    power: float,
    eps: float,
    apply_decay: bool,
    weight_decay: float,
    maximize: bool,
) -> int:
    """Algorithm 1 on all of `params`, which `takes` accepts, in one pass over them on `torch.get_num_threads()` threads.

    `params` and `accumulators` (with their `bases`: see state.py) change in place.

    Returns:
        How many gradients are NaN or infinite. Those coordinates are passed over.
    """
    assert _library is not None
    grads = [g.contiguous() for g in grads]
    tensors = (_Tensor * len(params))(
        *(
            _Tensor(
                p.numel(),
                p.data_ptr(),
                g.data_ptr(),
                s.data_ptr(),
                _address(base),
                threshold,
                _DTYPES[p.dtype],
                _DTYPES[g.dtype],
                _DTYPES[s.dtype],
            )
            for p, g, s, base, threshold in zip(params, grads, accumulators, bases, thresholds)
        )
    )
    hyperparameters = _Hyperparameters(lr if maximize else -lr, 1 - lr * weight_decay, power, eps, apply_decay)
    bad = _library.classp_step(tensors, len(params), ctypes.byref(hyperparameters), torch.get_num_threads())
    torch.autograd.graph.increment_version([*params, *accumulators])
    return bad


def density_thresholds(grads: Sequence[Tensor], strides: Sequence[int], density: float) -> list[float]:
    """The (1 - density) quantile of the positive squares of `grad.reshape(-1)[::stride]`, 0 where there are none.

    Args:
        grads: of the dtypes that `takes` accepts, none with more than 8,192 coordinates in its sample.
    """
    assert _library is not None
    grads = [g.contiguous() for g in grads]
    tensors = (_DensityTensor * len(grads))(
        *(
            _DensityTensor(1, -(-g.numel() // stride), g.data_ptr(), stride, density, 0.0, _DTYPES[g.dtype])
            for g, stride in zip(grads, strides)
        )
    )
    _library.classp_thresholds(tensors, len(grads), torch.get_num_threads())
    return [t.threshold for t in tensors]


def square_products_(total: Tensor, left: Tensor, right: Tensor) -> bool:
    """Add to `total`, (rows, columns), the sum over examples of the squares of `left[example].T @ right[example]`.

    No example's product is ever whole: each tile of it is squared where it was made.

    Args:
        left: (examples, tokens, rows).
        right: (examples, tokens, columns).

    Returns:
        Whether it was done; not where the tensors are no float32 ones on the CPU, or nothing was built.
    """
    tensors = (total, left, right)
    if (
        not BUILT
        or any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors)
        or not total.is_contiguous()
    ):
        return False
    assert _library is not None
    left, right = left.contiguous(), right.contiguous()
    examples, tokens, rows = left.shape
    pointers = (t.data_ptr() for t in (left, right, total))
    given = _Products(0, examples, tokens, rows, right.shape[-1], *pointers)
    _library.classp_square_products(ctypes.byref(given), torch.get_num_threads())
    torch.autograd.graph.increment_version([total])
    return True


def pulls(*tensors: Tensor | None) -> bool:
    """Whether `pull_` can work on these: plain, contiguous float32 (a copy: int16) on the CPU."""
    return BUILT and all(
        type(t) in (Tensor, torch.nn.Parameter)
        and t.device.type == "cpu"
        and t.dtype in (torch.float32, torch.int16)
        and t.is_contiguous()
        for t in tensors
        if t is not None
    )


def pull_(
    tensors: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]],
    strength: float,
    implicit: tuple[float, float] | None = None,
) -> None:
    """Pull weights towards an anchor, in one pass on `torch.get_num_threads()` threads.

    Where the importance f is zero in a whole block of 256 weights, it is all that is read.

    Args:
        tensors: target (changed in place), weight w, anchor a, its scale, importance f (None: 1), of equal shapes, which `pulls`
            accepts. The scale is None for a float32 anchor; an int16 one is `anchor * scale`, one scale a row.
        strength: adds `strength * f * (w - a)` to the target, a gradient.
        implicit: eps and power of a CLASSP step. The target is the weight itself, f its accumulator s; with
            `c = strength * s / (eps + s)^(1/power)` it becomes `w - c / (1 + c) * (w - a)`.
    """
    assert _library is not None
    given = (_PulledTensor * len(tensors))(
        *(
            _PulledTensor(
                w.numel(),
                target.data_ptr(),
                w.data_ptr(),
                None if scale is not None else a.data_ptr(),
                None if scale is None else a.data_ptr(),
                _address(scale),
                w.shape[-1] if w.ndim else 1,
                _address(f),
            )
            for target, w, a, scale, f in tensors
        )
    )
    eps, power = implicit or (0.0, 0.0)
    hyperparameters = _Pull(strength, eps, power, implicit is not None)
    _library.classp_pull(given, len(tensors), ctypes.byref(hyperparameters), torch.get_num_threads())
    torch.autograd.graph.increment_version([target for target, *_ in tensors])


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
