"""What `accelerate launch` leaves undone on CPUs: starting every process, and using every core."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, str_to_bool


def prepare_cpu_launch() -> None:
    """Make `accelerate launch [--cpu] [--num_processes N]` do on CPUs what it says. Call it first thing in a script.

    Without mpirun accelerate starts one process on CPUs, whatever N is (accelerate#2741), and with one thread. It then
    becomes torch's launcher of N, or takes every core it may run on, unless told how many threads. Raises `ValueError`
    for `--cpu` with a file for FSDP or DeepSpeed.
    """
    on_cpus = str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")) or not torch.cuda.is_available()
    if not on_cpus or "WORLD_SIZE" in os.environ or (launcher := _accelerate_launch()) is None:
        return
    arguments, _ = launch_command_parser().parse_known_args(launcher[0])
    count = arguments.num_processes or 1
    if arguments.config_file is not None or (os.path.isfile(default_config_file) and not arguments.cpu):
        config = load_config_from_file(arguments.config_file)
        if config.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"`accelerate launch --cpu` ignores the {config.distributed_type.value} of {arguments.config_file}; "
                "pass --use_cpu to the script instead."
            )
        count = arguments.num_processes or config.num_processes
    if count > 1 and arguments.mpirun_hostfile is None and (arguments.num_machines or 1) == 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        sys.stdout.flush()
        os.execv(sys.executable, [*command, *sys.orig_argv[1:]])
    if count == 1 and arguments.num_cpu_threads_per_process is None and "OMP_NUM_THREADS" not in launcher[1]:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)


def shard_on_cpus(args: Any) -> None:
    """Make FSDP, if the `TrainingArguments` ask for it, shard on CPUs, before a Trainer is built with them. accelerate
    looks for it where there are several GPUs: on CPUs every process would silently hold the whole model."""
    asked = args.fsdp or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false"))
    if asked and args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU  # the device and gloo stay


def _accelerate_launch() -> tuple[list[str], dict[str, str]] | None:
    """Flags and environment of the `accelerate launch` that started this process, and did not hand them on."""
    try:
        parent = psutil.Process(os.getppid())
        command, environment = "\0".join(parent.cmdline()), parent.environ()
    except psutil.Error:  # it has ended, or is another user's
        return None
    found = re.search(r"accelerate([^\0]*\0|-|\.commands\.)launch\0(.*)", command, re.DOTALL)
    return (found[2].split("\0"), environment) if found else None
