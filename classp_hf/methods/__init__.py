"""Continual-learning methods: one file each. A new method is one new file and one line here."""

from .base import Method
from .ewc import EWC
from .l2sp import L2SP
from .replay import Replay

METHODS: dict[str, type[Method]] = {m.name: m for m in (Method, EWC, L2SP, Replay)}

__all__ = ["EWC", "L2SP", "METHODS", "Method", "Replay"]
