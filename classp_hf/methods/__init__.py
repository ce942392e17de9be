"""Continual-learning methods: one file each. A new method is one new file and one line here."""

from collections.abc import Sequence

from .base import Context, Method, describe_methods
from .elastic import Elastic
from .ema import EMA
from .ewc import EWC
from .interpolate import Interpolate
from .l2sp import L2SP
from .logit_adjustment import LogitAdjustment
from .lwf import LwF
from .merge import Merge
from .olora import OLoRA
from .osf import OSF
from .pseudo_rehearsal import PseudoRehearsal
from .replay import Replay

METHODS: dict[str, type[Method]] = {
    m.name: m for m in (Method, EWC, L2SP, Elastic, Merge, Interpolate, EMA, LwF, LogitAdjustment, Replay, OLoRA, OSF)
} | {PseudoRehearsal.name: PseudoRehearsal}
"""Name -> class of every method; "none" stands for no method."""


def make_methods(method: Method | str | Sequence[Method | str | Sequence] | None) -> list[Method]:
    """Return the methods that `method` names, in its order.

    Args:
        method: a method, names joined by "+" (of `METHODS`, with their default hyperparameters), a list of any of
            these, or None. "none" stands for no method.

    Raises:
        ValueError: an unknown name, or a method that occurs twice.
    """
    if isinstance(method, Method):
        methods = [method]
    elif isinstance(method, str):
        names = method.split("+") if method else []
        if unknown := [name for name in names if name not in METHODS]:
            raise ValueError(f"Unknown method {unknown[0]!r}. Known: {', '.join(METHODS)}, and several joined by '+'.")
        methods = [METHODS[name]() for name in names]
    else:
        methods = [m for part in method or () for m in make_methods(part)]
    methods = [m for m in methods if type(m) is not Method]
    if len({m.name for m in methods}) < len(methods):
        raise ValueError(f"A run takes every method once, got {' + '.join(m.name for m in methods)}.")
    return methods


__all__ = [
    "METHODS",
    "Context",
    "Method",
    "describe_methods",
    "make_methods",
    *(m.__name__ for m in list(METHODS.values())[1:]),
]
