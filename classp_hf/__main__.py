"""`python -m classp_hf [options] SCRIPT ...`: run a script nobody edited as continual learning.

python -m classp_hf run_glue.py --optim classp --learning_rate 1e-3 ...
python -m classp_hf --method ewc run_glue.py --optim adamw_torch ...
python -m classp_hf --optim classp --learning_rate 1e-3 --anchor 0.1 train_sentence_transformer.py
accelerate launch -m classp_hf --memory previous/output -m trl.scripts.sft --optim classp ...
python -m classp_hf --guard run_clm.py ...
python -m classp_hf demo
python -m classp_hf blend START TUNED --output_dir DIR ...

The script's name ends the options. Those given here hold for every Trainer that the script builds, whatever it says
itself.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from dataclasses import fields
from itertools import pairwise
from typing import Any

from .methods import METHODS, Elastic, Merge, Method, PseudoRehearsal, make_methods
from .rehearsal import TEXT_SUFFIXES


def parser() -> argparse.ArgumentParser:
    """The options before the script's name."""
    from transformers import HfArgumentParser

    here = [m for m in METHODS.values() if m is not Method and not m.needs_trainer()]
    result = argparse.ArgumentParser(
        prog="python -m classp_hf",
        usage="python -m classp_hf [options] (SCRIPT | -m MODULE) [arguments of the script ...], or: "
        "demo | blend [arguments]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("--memory", help="the continual memory to go on from: a file, a model's folder or a Hub id; "
                        "`none` begins an empty one. Default: the one beside the model")  # fmt: skip
    result.add_argument("--method", help="a method, or several joined by '+': "
                        f"{', '.join(m.name for m in here)}")  # fmt: skip
    result.add_argument("--anchor", type=float, metavar="STRENGTH", help="the method `elastic` at this strength")
    result.add_argument("--rehearse", type=float, metavar="FRACTION", help="the method `pseudo_rehearsal` with this "
                        "share of the batch")  # fmt: skip
    result.add_argument("--merge", type=float, metavar="WEIGHT", help="the method `merge` at this weight")
    result.add_argument("--optim", help="the optimizer, also of scripts without such a flag: `classp`, or a name that "
                        "Transformers knows")  # fmt: skip
    result.add_argument(
        "--learning_rate", type=float, help="the learning rate, also of scripts that have no such flag"
    )
    result.add_argument("--optim_args", help="the optimizer's own options, key=value pairs separated by commas")
    result.add_argument("--guard", nargs="?", const="", metavar="TEXTS", help="measure what the training costs a "
                        "language model: on its own samples and plain English, or, as --guard=TEXTS, on a file or a "
                        "Hub id")  # fmt: skip
    result.add_argument("--guard_stop", type=float, metavar="SHARE", help="end the training when the guard's loss has "
                        "risen by this share (0.1: 10%%), with the weights of the last evaluation before")  # fmt: skip
    result.add_argument("--guard_every", type=int, metavar="STEPS", help="steps between the guard's evaluations. "
                        "Default: as many as keep them under 3%% of the time")  # fmt: skip
    known: Any = HfArgumentParser([m for m in here if any(f.init for f in fields(m))])  # type: ignore[misc]
    group = result.add_argument_group("options of the methods")
    for action in known._actions:
        if action.dest != "help":
            group._add_action(action)
    return result


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our options, and what begins with the script's name."""
    flags = {a.option_strings[0] for a in parser()._actions if a.option_strings and a.nargs not in (0, "?")}
    i = 0
    while i < len(arguments) and arguments[i] != "-m" and arguments[i].startswith("-"):
        i += 2 if arguments[i] in flags else 1
    return arguments[:i], arguments[i:]


def _options(own: argparse.Namespace, command: argparse.ArgumentParser) -> dict[str, Any]:
    """What `register` is given."""
    from .guard import GuardCallback
    from .optim_args import parse_optim_args

    try:
        methods = make_methods(own.method)
        for method in methods:
            if method.needs_trainer():
                raise ValueError(
                    f"the method {method.name!r} changes the data, the model or the loss: it needs "
                    "classp_hf.ContinualTrainer"
                )
        named = {m.name for m in methods}
        for cls, value in ((Elastic, own.anchor), (Merge, own.merge), (PseudoRehearsal, own.rehearse)):
            if value is not None and cls.name not in named:
                methods.append(cls(value))
        made = []
        for method in methods:
            given = {f.name: getattr(own, f.name) for f in fields(method) if f.init}
            changed = {k: v for k, v in given.items() if v != command.get_default(k)}
            made.append(type(method)(**{**method.hyperparameters(), **changed}))
        if own.optim == "classp":
            parse_optim_args(own.optim_args)
        if own.learning_rate is not None and not own.learning_rate > 0:
            raise ValueError(f"--learning_rate must be > 0, got {own.learning_rate}")
        guard = {"texts": own.guard or None, "stop": own.guard_stop, "every": own.guard_every}
        guarded = own.guard is not None or guard["stop"] is not None or guard["every"] is not None
        GuardCallback(**guard)  # raises for bad values
    except ValueError as error:
        command.error(str(error))
    return {
        "method": made or None,
        "memory": own.memory,
        "optim": own.optim,
        "learning_rate": own.learning_rate,
        "optim_args": own.optim_args,
        "guard": guard if guarded else None,
    }


def _check_script_arguments(command: argparse.ArgumentParser, arguments: list[str]) -> None:
    """What is wrong with the script's `--optim_args` is known before it loads data and model."""
    from .optim_args import parse_optim_args

    pairs = dict(pairwise(arguments)) | dict(a.split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
    if pairs.get("--optim") == "classp" and "--optim_args" in pairs:
        try:
            parse_optim_args(pairs["--optim_args"])
        except ValueError as error:
            command.error(str(error))


def main() -> None:
    command = parser()
    own, script = _split(sys.argv[1:])
    options = command.parse_args(own)
    if not script:
        command.print_usage(sys.stderr)
        sys.exit(2)
    from .launch import prepare_cpu_launch
    from .registration import register

    if script[0] == "demo" and not os.path.isfile("demo"):
        from .demo import main as demo

        sys.argv = ["demo", *script[1:]]
        demo()
        return
    if script[0] == "blend" and not os.path.isfile("blend"):
        from .blend import main as blend

        blend(script[1:])
        return
    as_module = script[0] == "-m"
    if as_module and len(script) < 2:
        command.error("-m needs the name of a module")
    if options.guard == "" and script[0].partition(":")[0].endswith((*TEXT_SUFFIXES,)):
        command.error(f"{script[0]!r} stands where the script does: write --guard={script[0]}")
    if not as_module and not os.path.isfile(script[0]):
        command.error(f"there is no script {script[0]!r}")
    _check_script_arguments(command, script)
    prepare_cpu_launch()
    given = _options(options, command)
    register(**given)
    if as_module:
        sys.argv = script[1:]
        runpy.run_module(script[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = script
        sys.path[0] = os.path.dirname(os.path.abspath(script[0]))  # as `python SCRIPT` has it
        runpy.run_path(script[0], run_name="__main__")
    from .engine import ContinualCallback
    from .guard import LaunchedGuard

    unused = [f"--{k}" for k, v in given.items() if v is not None]
    if unused and not (ContinualCallback.applied or LaunchedGuard.applied):
        sys.exit(
            f"classp_hf: error: {', '.join(unused)} had no effect: {sys.argv[0]!r} trained no transformers.Trainer"
        )


if __name__ == "__main__":
    main()
