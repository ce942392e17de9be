"""The compiled CPU step, `kernels.c`: built when the package is installed, wherever there is a C compiler."""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["BUILT", "classp_step_", "takes"]

_VERSION = 1
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("w", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("s", ctypes.c_void_p),
        ("base", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("threshold", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("w_dtype", "g_dtype", "s_dtype")),
    ]


class _Hyperparameters(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("step", "decay", "power", "eps")),
        ("apply_decay", ctypes.c_int32),
    ]


def _load() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.is_file():
            library = ctypes.CDLL(str(path))
            if library.classp_version() == _VERSION:  # else a build of another version of the source
                library.classp_step.restype = ctypes.c_int64
                library.classp_step.argtypes = [
                    ctypes.POINTER(_Tensor),
                    ctypes.c_int64,
                    ctypes.POINTER(_Hyperparameters),
                    ctypes.c_int,
                ]
                return library
    return None


_library = _load()

BUILT = _library is not None
"""Whether the compiled step is there. Without it CLASSP takes PyTorch's operations one by one, several times slower."""


def takes(param: Tensor, grad: Tensor) -> bool:
    """Whether the compiled step can update `param` (a plain tensor: the local part of a sharded one)."""
    return (
        BUILT
        and param.device.type == "cpu"
        and param.dtype in (torch.float32, torch.bfloat16)
        and grad.dtype in (torch.float32, torch.bfloat16)
        and param.is_contiguous()
        and not torch.compiler.is_compiling()
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
                p.data_ptr(),
                g.data_ptr(),
                s.data_ptr(),
                None if base is None else base.data_ptr(),
                p.numel(),
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
