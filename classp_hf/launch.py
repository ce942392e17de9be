"""What `accelerate launch` leaves undone on CPUs."""

from __future__ import annotations

import os
import sys

from accelerate.utils import str_to_bool


def start_cpu_processes() -> None:
    """Make `accelerate launch --cpu --num_processes N` run N processes. Call it first thing in a script.

    Without mpirun, accelerate starts one process on CPUs whatever N is, silently, with an N times smaller global batch
    (accelerate#2741). If that is how this process was started, it replaces itself by torch's launcher with N processes
    (gloo); otherwise nothing happens.
    """
    if not str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")) or "WORLD_SIZE" in os.environ:
        return
    count = _processes_asked_for()
    if count > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [*launcher, *sys.orig_argv[1:]])


def _processes_asked_for() -> int:
    """`--num_processes` of the `accelerate launch` that started this process; it is nowhere in the environment."""
    import psutil
    from accelerate.commands.launch import launch_command_parser

    parent = psutil.Process().parent()
    command = parent.cmdline() if parent is not None else []
    for i, word in enumerate(command):
        if word in ("launch", "accelerate.commands.launch") or word.endswith("accelerate-launch"):
            arguments, _ = launch_command_parser().parse_known_args(command[i + 1 :])
            # a machine's own launcher (mpirun, several hosts) is accelerate's business
            alone = arguments.mpirun_hostfile is None and (arguments.num_machines or 1) == 1
            return (arguments.num_processes or 1) if alone else 1
    return 1
