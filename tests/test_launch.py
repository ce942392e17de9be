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
if {help}:
    prepare_cpu_launch()
print("WORLD", os.environ.get("WORLD_SIZE", "1"), "THREADS", torch.get_num_threads())
"""


def launch(tmp_path, *flags, help=True):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(help=help))
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(script)]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert run.returncode == 0, run.stderr
    return [line for line in run.stdout.splitlines() if line.startswith("WORLD")]


def test_every_process_is_started(tmp_path):
    assert len(launch(tmp_path, "--cpu", "--num_processes", "2", help=False)) == 1  # else the workaround can go
    lines = launch(tmp_path, "--cpu", "--num_processes", "2")
    assert [line.split()[1] for line in lines] == ["2", "2"]


def test_a_configuration_file_says_how_many(tmp_path):
    lines = launch(tmp_path, "--cpu", "--config_file", str(CONFIGURATIONS / "ddp.yaml"))
    assert [line.split()[1] for line in lines] == ["2", "2"]


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs two cores on Linux")
def test_one_process_gets_the_cores_it_may_run_on(tmp_path):
    assert launch(tmp_path) == [f"WORLD 1 THREADS {len(os.sched_getaffinity(0))}"]
    assert launch(tmp_path, "--num_cpu_threads_per_process", "1") == ["WORLD 1 THREADS 1"]


@pytest.fixture
def launched(monkeypatch):
    """Prepares as if `command` had started this process; returns the numbers of threads that were set."""

    def call(*command, error=None, **environment):
        class Parent(psutil.Process):
            def cmdline(self):
                return list(command)

            def environ(self):
                if error is not None:
                    raise error
                return environment

        threads = []
        monkeypatch.setattr(psutil, "Process", Parent)
        monkeypatch.setattr(os, "execv", lambda *command: pytest.fail(f"started {command}"))
        monkeypatch.setattr(torch, "set_num_threads", threads.append)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        prepare_cpu_launch()
        return threads

    return call


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_threads_are_the_cores_unless_they_are_given(launched, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert launched("accelerate", "launch", "script.py") == [3]
    assert launched("accelerate", "launch", "script.py", OMP_NUM_THREADS="1") == []
    assert launched("accelerate", "launch", "--num_cpu_threads_per_process", "1", "script.py") == []


def test_a_configuration_that_cpus_do_not_know_is_refused(launched):
    with pytest.raises(ValueError, match="`accelerate launch --cpu` ignores the FSDP of"):
        launched("accelerate", "launch", "--cpu", "--config_file", str(CONFIGURATIONS / "fsdp2.yaml"), "script.py")


@pytest.mark.parametrize("error", [psutil.AccessDenied(), psutil.NoSuchProcess(1), None])
def test_another_parent_is_left_alone(error, launched):
    """One that may not be read, one that has ended, and a launcher that is not accelerate's."""
    assert launched("sky", "launch", "--num_processes", "2", error=error) == []
