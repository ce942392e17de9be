"""What `accelerate launch` leaves undone on CPUs: starting every process, and using every core."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType, str_to_bool

if TYPE_CHECKING:
    from transformers import TrainingArguments


def prepare_cpu_launch() -> None:
    """Make `accelerate launch [--cpu] [--num_processes N]` do on CPUs what it says. Call it first thing in a script.

    - Without mpirun, accelerate starts one process on CPUs whatever N is, silently, with an N times smaller global
      batch (accelerate#2741). If this process was started so, it replaces itself by torch's launcher with N processes.
    - A single process is limited to one thread, unless OMP_NUM_THREADS is set: it gets all physical cores.

    Where a GPU is used, or the script was not started by `accelerate launch`, nothing happens.

    Raises:
        ValueError: `--cpu` with a configuration file for FSDP or DeepSpeed, which accelerate then ignores.
    """
    import torch

    if torch.cuda.is_available() and not str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")):
        return
    launcher = _accelerate_launch()
    if launcher is None or "WORLD_SIZE" in os.environ:
        return
    import psutil
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    process, flags = launcher
    arguments, _ = launch_command_parser().parse_known_args(flags)
    several_hosts = arguments.mpirun_hostfile is not None or (arguments.num_machines or 1) > 1
    count = arguments.num_processes or 1
    if arguments.config_file is not None or (os.path.isfile(default_config_file) and not arguments.cpu):
        config = load_config_from_file(arguments.config_file)
        if config.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"`accelerate launch --cpu` ignores the {config.distributed_type.value} of {arguments.config_file}. Leave --cpu out "
                "and pass --use_cpu to the script."
            )
        count = arguments.num_processes or max(config.num_processes, 1)
    if count > 1 and not several_hosts:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        sys.stdout.flush()
        sys.stderr.flush()
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.execv(sys.executable, [*command, *sys.orig_argv[1:]])
    if count == 1 and arguments.num_cpu_threads_per_process is None and "OMP_NUM_THREADS" not in process.environ():
        torch.set_num_threads(psutil.cpu_count(logical=False) or 1)


def shard_on_cpus(args: TrainingArguments) -> None:
    """Make FSDP, if it is asked for, shard on CPUs, before a Trainer is built with `args`.

    accelerate looks for it only where there are several GPUs: on CPUs every process would silently hold the whole model.
    """
    asked = args.fsdp or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false"))
    if asked and args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU  # the device and gloo stay


def _accelerate_launch() -> tuple[Any, list[str]] | None:
    """The `accelerate launch` that started this process, and its flags; they are nowhere in the environment."""
    import psutil

    parent = psutil.Process().parent()
    command = parent.cmdline() if parent is not None else []
    for i, word in enumerate(command):
        if word in ("launch", "accelerate.commands.launch") or word.endswith("accelerate-launch"):
            return parent, command[i + 1 :]
    return None
