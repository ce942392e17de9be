"""`python -m classp_hf [options] SCRIPT ...`: run a script nobody edited as continual learning.

python -m classp_hf run_glue.py --optim classp --learning_rate 1e-3 ...
python -m classp_hf --rehearse 0.25 run_clm.py ...
python -m classp_hf --method ewc run_glue.py --optim adamw_torch ...
python -m classp_hf --optim classp --learning_rate 1e-3 --anchor 0.1 train_sentence_transformer.py
accelerate launch -m classp_hf --memory previous/output -m trl.scripts.sft --optim classp ...
python -m classp_hf --memory pretrained --method ewc run_clm.py ...
python -m classp_hf remember MODEL --output_dir DIR
python -m classp_hf --guard run_clm.py ...
python -m classp_hf demo
python -m classp_hf compare --tasks ... --arms classp ewc naive
python -m classp_hf blend START TUNED --output_dir DIR ...

The script's name ends the options. Those given here hold for every Trainer that the script builds, whatever it says
itself.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from transformers import HfArgumentParser
from transformers.training_args import OptimizerNames

from .engine import ContinualCallback
from .guard import GuardCallback, LaunchedGuard
from .launch import prepare_cpu_launch
from .live import CLASSP_NAME, NONE, check_strength
from .methods import METHODS, Elastic, Merge, Method, PseudoRehearsal, make_methods
from .methods.base import flag
from .optim_args import parse_optim_args
from .registration import register
from .rehearsal import TEXT_SUFFIXES

# Subcommand, of the module whose `main()` reads the rest of the command line.
COMMANDS = ("demo", "compare", "remember", "blend")
# Option -> the method that it adds, with the option's value as its first hyperparameter.
SHORTCUTS: dict[str, Any] = {"anchor": Elastic, "merge": Merge, "rehearse": PseudoRehearsal}
# Values of boolean options, which may also stand without one.
BOOLEANS = ("true", "false", "t", "f", "yes", "no", "y", "n", "1", "0")
GUARD = ("guard", "guard_stop", "guard_every")
# Methods that work in any script.
HERE = [m for m in METHODS.values() if m is not Method and not m.needs_trainer()]


@dataclass
class Options:
    """The options before the script's name, beside the hyperparameters of the methods."""

    memory: str | None = flag(
        None,
        "The continual memory to go on from: a file, a model's folder or a Hub id; `none` begins an empty one, "
        "`pretrained` that of a model without one, from its own samples. Default: the one beside the model.",
    )
    memory_strength: float | None = flag(
        None, "Training steps' worth that a memory of `pretrained` or `remember` counts. Default: those it is of."
    )
    method: str | None = flag(None, f"A method, or several joined by '+': {', '.join(m.name for m in HERE)}.")
    anchor: float | None = flag(None, "The method `elastic` at this strength.")
    merge: float | None = flag(None, "The method `merge` at this weight.")
    rehearse: float | None = flag(None, "The method `pseudo_rehearsal` with this share of the batch.")
    optim: str | None = flag(
        None, "The optimizer, also of scripts without such a flag: `classp`, or a name that Transformers knows."
    )
    learning_rate: float | None = flag(None, "The learning rate, also of scripts that have no such flag.")
    optim_args: str | None = flag(None, "The optimizer's own options, key=value pairs separated by commas.")
    guard: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": "",
            "help": (
                "Measure what the training costs a language model: on its own samples and plain English, or, as "
                "--guard=TEXTS, on a file or a Hub id."
            ),
        },
    )
    guard_stop: float | None = flag(
        None, "End the training when the guard's loss has risen by this share, with the weights measured before."
    )
    guard_every: int | None = flag(None, "Steps between its evaluations. Default: they take under 3%% of the time.")


def parser() -> argparse.ArgumentParser:
    classes: Any = [Options, *(m for m in HERE if any(f.init for f in fields(m)))]
    usage = "python -m classp_hf [options] (SCRIPT | -m MODULE) [arguments of the script ...], or: "
    return HfArgumentParser(
        classes,
        prog="python -m classp_hf",
        usage=f"{usage}{' | '.join(COMMANDS)} [arguments]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def split(arguments: list[str], command: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Our options, and what begins with the script's name."""
    actions = {name: action for action in command._actions for name in action.option_strings}
    i = 0
    while i < len(arguments) and arguments[i] != "-m" and arguments[i].startswith("-"):
        action, after = actions.get(arguments[i]), arguments[i + 1 : i + 2]
        boolean = action is not None and action.const is True and after and after[0].lower() in BOOLEANS
        i += 2 if boolean or (action is not None and action.nargs not in (0, "?")) else 1
    return arguments[:i], arguments[i:]


def for_register(own: argparse.Namespace, command: argparse.ArgumentParser) -> dict[str, Any]:
    """What `register` is given; a ValueError for what cannot work in a script nobody edits."""
    methods = {m.name: m for m in make_methods(own.method)}
    methods |= {cls.name: cls(v) for name, cls in SHORTCUTS.items() if (v := getattr(own, name)) is not None}
    for name, cls in SHORTCUTS.items():
        first = next(iter(cls().hyperparameters()))
        if getattr(own, name) is not None and getattr(own, first) != command.get_default(first):
            raise ValueError(f"--{name} and --{first} say the same: pass one of them")
    for name, method in methods.items():
        if method.needs_trainer():
            raise ValueError(f"the method {name!r} changes the data, the model or the loss: it needs ContinualTrainer")
        given = {key: getattr(own, key) for key in method.hyperparameters()}
        methods[name] = replace(method, **{k: v for k, v in given.items() if v != command.get_default(k)})
    for cls in HERE:
        changed = [k for k in cls().hyperparameters() if getattr(own, k) != command.get_default(k)]
        if changed and cls.name not in methods:
            how = [*(f"--{k} VALUE" for k, v in SHORTCUTS.items() if v is cls), f"--method {cls.name}"]
            raise ValueError(f"--{changed[0]} is for the method {cls.name!r}: pass {' or '.join(how)} with it")
    if own.optim == CLASSP_NAME:
        parse_optim_args(own.optim_args)
    known = {CLASSP_NAME, *(optimizer.value for optimizer in OptimizerNames)}
    if own.optim is not None and own.optim not in known:
        raise ValueError(f"--optim {own.optim} is unknown. Known: {', '.join(sorted(known))}")
    if own.learning_rate is not None and not 0 < own.learning_rate < float("inf"):
        raise ValueError(f"--learning_rate must be > 0 and finite, got {own.learning_rate}")
    if check_strength(own.memory_strength) is not None and own.memory == NONE:
        raise ValueError("--memory_strength is what a memory counts, and --memory none begins with an empty one")
    guard = {"texts": own.guard or None, "stop": own.guard_stop, "every": own.guard_every}
    GuardCallback(**guard)  # raises for bad values
    asked = any(getattr(own, name) is not None for name in GUARD)
    options = {f.name: getattr(own, f.name) for f in fields(Options) if f.name not in (*SHORTCUTS, *GUARD)}
    options |= {"method": list(methods.values()) or None, "guard": guard if asked else None}
    return {k: v for k, v in options.items() if v is not None}


def check_script_arguments(arguments: list[str]) -> None:
    """What is wrong with the script's `--optim_args` is known before it loads data and model."""
    pairs = dict(pairwise(arguments)) | dict(a.split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
    if pairs.get("--optim") == CLASSP_NAME:
        parse_optim_args(pairs.get("--optim_args"))


def main() -> None:
    command = parser()
    own, script = split(sys.argv[1:], command)
    options = command.parse_args(own)
    if not script:
        command.print_usage(sys.stderr)
        sys.exit(2)
    if script[0] in COMMANDS and not os.path.isfile(script[0]):
        if own:
            command.error(f"{own[0]} stands before {script[0]!r}, which has options of its own: write them behind it")
        sys.argv = script
        importlib.import_module(f".{script[0]}", __package__).main()
        return
    as_module = script[0] == "-m"
    if script == ["-m"]:
        command.error("-m needs the name of a module")
    if not as_module and not os.path.isfile(script[0]):
        texts = f"; the guard's texts are given as --guard={script[0]}" if options.guard == "" else ""
        command.error(f"there is no script {script[0]!r}{texts}")
    if options.guard == "" and script[0].endswith(TEXT_SUFFIXES):
        command.error(f"{script[0]!r} stands where the script does: write --guard={script[0]}")
    try:
        check_script_arguments(script)
        given = for_register(options, command)
        prepare_cpu_launch()
    except ValueError as error:
        command.error(str(error))
    register(**given)
    sys.argv = script[1:] if as_module else script
    ContinualCallback.script = sys.argv[0]
    try:
        if as_module:
            runpy.run_module(script[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(script[0]))  # as `python SCRIPT` has it
            runpy.run_path(os.path.abspath(script[0]), run_name="__main__")
    except SystemExit as ended:  # sys.exit(main())
        if ended.code not in (None, 0):
            raise
    if given and not (ContinualCallback.applied or LaunchedGuard.applied):
        unused = ", ".join(f"--{k}" for k in given)
        if ContinualCallback.reached:  # it evaluates only
            print(f"classp_hf: warning: {unused} had no effect: {sys.argv[0]!r} trained no Trainer", file=sys.stderr)
            return
        sys.exit(f"classp_hf: error: {unused} had no effect: {sys.argv[0]!r} trained no transformers.Trainer")


if __name__ == "__main__":
    main()
