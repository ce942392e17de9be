"""Optimizers. This package imports torch alone."""

from .classp import CLASSP
from .mofo import MoFO

__all__ = ["CLASSP", "MoFO"]
