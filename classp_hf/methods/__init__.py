"""Continual-learning methods: one file each. A new method is one new file and one line here."""

from .base import Combined, Method
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
from .replay import Replay

METHODS: dict[str, type[Method]] = {
    m.name: m for m in (Method, EWC, L2SP, Elastic, Merge, Interpolate, EMA, LwF, LogitAdjustment, Replay, OLoRA, OSF)
}

__all__ = ["METHODS", "Combined", "Method", *(m.__name__ for m in list(METHODS.values())[1:])]
