"""What `accelerate launch` starts on CPUs, with and without our help; real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from classp_hf.launch import prepare_cpu_launch

CONFIGURATIONS = Path(__file__).parents[1] / "recipes" / "accelerate"

SCRIPT = """
import os, torch
from classp_hf.launch import prepare_cpu_launch
if {cores} and "WORLD_SIZE" not in os.environ:
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[: {cores}])
if {help}:
    prepare_cpu_launch()
print("WORLD", os.environ.get("WORLD_SIZE", "1"), "THREADS", torch.get_num_threads())
"""


def launch(tmp_path, *flags, help=True, cores=0, error=None, **environment):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(help=help, cores=cores))
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | environment
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(script)]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert (run.returncode == 0) == (error is None), run.stderr
    assert error is None or error in run.stderr
    return [line for line in run.stdout.splitlines() if line.startswith("WORLD")]


def test_every_process_is_started(tmp_path):
    assert len(launch(tmp_path, "--cpu", "--num_processes", "2", help=False)) == 1  # else the workaround can go
    lines = launch(tmp_path, "--cpu", "--num_processes", "2")
    assert [line.split()[1] for line in lines] == ["2", "2"]


def test_a_configuration_file_says_how_many_or_is_refused(tmp_path):
    lines = launch(tmp_path, "--cpu", "--config_file", str(CONFIGURATIONS / "ddp.yaml"))
    assert [line.split()[1] for line in lines] == ["2", "2"]
    ignored = "`accelerate launch --cpu` ignores the FSDP of"
    launch(tmp_path, "--cpu", "--config_file", str(CONFIGURATIONS / "fsdp2.yaml"), error=ignored)


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs two cores on Linux")
def test_one_process_gets_the_cores_it_may_run_on_unless_told_otherwise(tmp_path):
    assert launch(tmp_path) == [f"WORLD 1 THREADS {len(os.sched_getaffinity(0))}"]
    assert launch(tmp_path, cores=1) == ["WORLD 1 THREADS 1"]
    assert launch(tmp_path, OMP_NUM_THREADS="1") == ["WORLD 1 THREADS 1"]
    assert launch(tmp_path, "--num_cpu_threads_per_process", "1") == ["WORLD 1 THREADS 1"]


@pytest.mark.parametrize("error", [psutil.AccessDenied(), psutil.NoSuchProcess(1), None])
def test_another_parent_is_left_alone(error, monkeypatch):
    """One that may not be read, one that has ended, and a launcher that is not accelerate's."""

    class Parent(psutil.Process):
        def cmdline(self):
            return ["sky", "launch", "--num_processes", "2"]

        def environ(self):
            if error is not None:
                raise error
            return {}

    monkeypatch.setattr(psutil, "Process", Parent)
    monkeypatch.setattr(Parent, "parent", lambda self: self)
    monkeypatch.setattr(os, "execv", lambda *command: pytest.fail(f"started {command}"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    threads = torch.get_num_threads()
    prepare_cpu_launch()
    assert torch.get_num_threads() == threads
