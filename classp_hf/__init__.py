"""Continual fine-tuning for Hugging Face Transformers: train on task B without forgetting task A."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Loaded on first use (PEP 562): importing the package has no side effect and is cheap.
_EXPORTS = {
    **dict.fromkeys(("CLASSP", "MoFO"), ".optim"),
    **dict.fromkeys(("ClasspTrainer", "EWCTrainer"), ".named_trainers"),
    "ContinualTrainer": ".trainer",
    **dict.fromkeys(("EMA", "EWC", "Elastic", "Interpolate", "L2SP", "LogitAdjustment", "LwF"), ".methods"),
    **dict.fromkeys(("METHODS", "Merge", "Method", "OLoRA", "OSF", "PseudoRehearsal", "Replay"), ".methods"),
    **dict.fromkeys(("Task", "label_names", "load_task"), ".tasks"),
    "ContinualCallback": ".engine",
    "ContinualMemory": ".memory",
    "GuardCallback": ".guard",
    "ContinualTrainingArguments": ".training_args",
    "register": ".registration",
}

__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from .engine import ContinualCallback
    from .guard import GuardCallback
    from .memory import ContinualMemory
    from .methods import (
        EMA,
        EWC,
        L2SP,
        METHODS,
        OSF,
        Elastic,
        Interpolate,
        LogitAdjustment,
        LwF,
        Merge,
        Method,
        OLoRA,
        PseudoRehearsal,
        Replay,
    )
    from .named_trainers import ClasspTrainer, EWCTrainer
    from .optim import CLASSP, MoFO
    from .registration import register
    from .tasks import Task, label_names, load_task
    from .trainer import ContinualTrainer
    from .training_args import ContinualTrainingArguments


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
