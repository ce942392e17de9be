"""Makes `--optim classp` known to transformers. The only file that touches private names of transformers.

Transformers has no public way to add an optimizer name: `OptimizerNames` is a closed enum and the table of handlers is
private. Only processes that call `register` know the name.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
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


def refuse_deepspeed(args: TrainingArguments) -> None:
    """Raise if DeepSpeed is asked for, by `--deepspeed` or by `accelerate launch`.

    It holds weights, gradients and the optimizer's state in flat buffers of its own (and with optimizer offload may put
    another optimizer in the place of the one asked for).
    """
    if args.deepspeed_plugin is not None:
        raise ValueError(
            "DeepSpeed is not supported: its flat buffers hide gradients and accumulators by parameter, so the memory of earlier "
            "tasks would silently be neither used nor saved. Use FSDP2, which shards as ZeRO-3 does "
            "(`accelerate launch --config_file recipes/accelerate/fsdp2.yaml`), or DDP."
        )


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
    refuse_deepspeed(context.args)
    if context.args.learning_rate == TRANSFORMERS_LEARNING_RATE:
        default = inspect.signature(CLASSP).parameters["lr"].default
        logger.warning(
            f"CLASSP trains with learning_rate={TRANSFORMERS_LEARNING_RATE}, Transformers' default, which is far too small for "
            f"it. Pass --learning_rate; {default} is a good start."
        )
    return CLASSP, {**context.optimizer_kwargs, **parse_optim_args(context.optim_args)[0]}
