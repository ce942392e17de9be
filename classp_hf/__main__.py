"""`python -m classp_hf SCRIPT ...`: run a script nobody edited with `--optim classp` available to it.

python -m classp_hf run_glue.py --optim classp --learning_rate 1e-3 --optim_args "density=0.1" ...
python -m classp_hf -m trl.scripts.sft --optim classp ...
accelerate launch -m classp_hf run_glue.py --optim classp ...
"""

from __future__ import annotations

import os
import runpy
import sys

USAGE = "usage: python -m classp_hf (SCRIPT | -m MODULE) [arguments of the script ...]"


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\n{USAGE}")
        sys.exit(0 if arguments else 2)

    as_module = arguments[0] == "-m"
    if as_module and len(arguments) < 2:
        sys.exit(f"{USAGE}\nclassp_hf: error: -m needs the name of a module")
    if not as_module and not os.path.isfile(arguments[0]):
        sys.exit(f"{USAGE}\nclassp_hf: error: there is no script {arguments[0]!r}")

    from .launch import prepare_cpu_launch
    from .registration import register

    prepare_cpu_launch()
    register()
    if as_module:
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))  # as `python SCRIPT` has it
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
