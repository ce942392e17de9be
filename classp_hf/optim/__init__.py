"""Optimizers. This package imports torch alone."""

from .classp import CLASSP

__all__ = ["CLASSP"]
