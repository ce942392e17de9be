"""Makes `--optim classp` known to transformers. The only file that touches private names of transformers.

Transformers has no public way to add an optimizer name: `OptimizerNames` is a closed enum and the table of handlers is
private. Only processes that call `register` know the name.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from packaging import version

from .optim import CLASSP
from .optim_args import parse_optim_args

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

NAME = "classp"
TRANSFORMERS_LEARNING_RATE = 5e-5
MINIMUM_TRANSFORMERS = "5.23.0"


def refuse_deepspeed_offload(deepspeed_config: Mapping[str, Any] | None) -> None:
    """Raise if DeepSpeed would train with another optimizer than the one asked for.

    With CPU offload and its default `zero_force_ds_cpu_optimizer: true`, accelerate replaces any optimizer by
    DeepSpeedCPUAdam without a word.
    """
    config = deepspeed_config or {}
    device = ((config.get("zero_optimization") or {}).get("offload_optimizer") or {}).get("device", "none")
    if device not in (None, "none") and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f"DeepSpeed's optimizer offload (offload_optimizer.device={device!r}) would silently replace CLASSP by "
            'DeepSpeedCPUAdam. Turn the offload off, or set "zero_force_ds_cpu_optimizer": false in the DeepSpeed config.'
        )


def deepspeed_config(args: TrainingArguments) -> dict[str, Any] | None:
    """The DeepSpeed configuration in force, from `--deepspeed` or from `accelerate launch`; None without DeepSpeed."""
    return args.deepspeed_plugin.deepspeed_config if args.deepspeed_plugin is not None else None


def register() -> None:
    """Add `classp` to the names `--optim` accepts, for this process. Calling it again changes nothing.

    Every Trainer of the process then gets a [`ContinualMemoryCallback`], which does nothing under other optimizers.

    Raises:
        ImportError: the installed transformers is older than the supported one, or its private names have moved.
    """
    from transformers.training_args import OptimizerNames

    if NAME in OptimizerNames._value2member_map_:
        return
    found = importlib.metadata.version("transformers")
    if version.parse(found) < version.parse(MINIMUM_TRANSFORMERS):
        raise ImportError(
            f"classp_hf needs transformers >= {MINIMUM_TRANSFORMERS}, found {found}. "
            f'Run: pip install "transformers>={MINIMUM_TRANSFORMERS}"'
        )
    try:
        from transformers.trainer import DEFAULT_CALLBACKS
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext  # noqa: F401

        from .callback import ContinualMemoryCallback

        member = str.__new__(OptimizerNames, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        OptimizerNames._member_map_[NAME.upper()] = member
        OptimizerNames._member_names_.append(NAME.upper())
        OptimizerNames._value2member_map_[NAME] = member
        _OPTIMIZER_HANDLERS[member] = _handler
        DEFAULT_CALLBACKS.append(ContinualMemoryCallback)  # type: ignore[arg-type]
    except (ImportError, AttributeError, TypeError) as error:
        raise ImportError(
            f"transformers {found} keeps its optimizer names or default callbacks elsewhere than classp_hf knows ({error}), so `--optim "
            f"{NAME}` cannot be added. Install transformers {MINIMUM_TRANSFORMERS}, or use classp_hf.ClasspTrainer, "
            "which does not need it."
        ) from error


def _handler(context: Any) -> tuple[type[CLASSP], dict[str, Any]]:
    refuse_deepspeed_offload(deepspeed_config(context.args))
    if context.args.learning_rate == TRANSFORMERS_LEARNING_RATE:
        default = inspect.signature(CLASSP).parameters["lr"].default
        logger.warning(
            f"CLASSP trains with learning_rate={TRANSFORMERS_LEARNING_RATE}, Transformers' default, which is far too small for "
            f"it. Pass --learning_rate; {default} is a good start."
        )
    return CLASSP, {**context.optimizer_kwargs, **parse_optim_args(context.optim_args)[0]}
