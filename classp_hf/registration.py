"""Makes `--optim classp` and the memory known to every Trainer of a process."""

from typing import Any

from .compat import add_optimizer, set_default_callback
from .engine import ContinualCallback
from .guard import LaunchedGuard
from .live import CLASSP_NAME
from .optim import CLASSP
from .optim_args import parse_optim_args
from .zero import check_zero

OPTIONS = {"method", "memory", "memory_strength", "optim", "learning_rate", "optim_args", "guard"}


def register(**options: Any) -> None:
    """Add `classp` to the names `--optim` accepts, for this process, and give every Trainer a [`ContinualCallback`].

    The callback does nothing under another optimizer without a method. A second call replaces the options.

    Args:
        options: `method`, `memory` and `memory_strength` are arguments of [`ContinualCallback`]. `optim`,
            `learning_rate` and `optim_args` replace those in the training arguments of every Trainer. `guard`, a dict
            of arguments, gives every Trainer a [`~classp_hf.guard.GuardCallback`]. Default: none of them.

    Raises:
        TypeError: an option of another name.
        ValueError: an option in a script that the launcher runs, whose own options stay.
        ImportError: the installed version of transformers lacks the private names that this needs.
    """
    if unknown := sorted(options.keys() - OPTIONS):
        raise TypeError(f"register() knows {', '.join(sorted(OPTIONS))}; got {', '.join(unknown)}.")
    if ContinualCallback.script is not None:  # in a script that the launcher runs
        if options:
            raise ValueError(
                f"register({', '.join(options)}) stands in a script that `python -m classp_hf` runs, whose options "
                "come before the script's name. Leave one of them out."
            )
        return register_optimizer()
    guard = options.pop("guard", None)
    ContinualCallback.launched = {k: v for k, v in options.items() if v is not None}
    register_optimizer()
    LaunchedGuard.options = guard or {}
    set_default_callback(LaunchedGuard, guard is not None)


def register_optimizer() -> None:
    """As `register`, and what it was given before stays."""
    add_optimizer(CLASSP_NAME, _classp, ContinualCallback)


def _classp(args: Any) -> tuple[type[CLASSP], dict[str, Any]]:
    options = parse_optim_args(args.optim_args)[0]
    if (plugin := getattr(args, "deepspeed_plugin", None)) is not None:
        check_zero(plugin, options)
    return CLASSP, {"lr": args.learning_rate, **options}
