"""Continual fine-tuning for Hugging Face Transformers: train on task B without forgetting task A."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded on first use (PEP 562): importing the package has no side effect and is cheap.
_EXPORTS = {
    "CLASSP": ".optim",
    "ClasspTrainer": ".trainer",
    "ContinualMemory": ".memory",
    "ContinualMemoryCallback": ".callback",
    "ContinualTrainer": ".trainer",
    "ContinualTrainingArguments": ".training_args",
    "EMA": ".methods",
    "EWC": ".methods",
    "EWCTrainer": ".trainer",
    "Elastic": ".methods",
    "Interpolate": ".methods",
    "L2SP": ".methods",
    "LogitAdjustment": ".methods",
    "LwF": ".methods",
    "METHODS": ".methods",
    "Merge": ".methods",
    "Method": ".methods",
    "MoFO": ".optim",
    "OLoRA": ".methods",
    "OSF": ".methods",
    "Replay": ".methods",
    "Task": ".tasks",
    "label_names": ".tasks",
    "load_task": ".tasks",
    "register": ".registration",
}

__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from .callback import ContinualMemoryCallback
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
        Replay,
    )
    from .optim import CLASSP, MoFO
    from .registration import register
    from .tasks import Task, label_names, load_task
    from .trainer import ClasspTrainer, ContinualTrainer, EWCTrainer
    from .training_args import ContinualTrainingArguments


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
