"""What `accelerate launch` starts on CPUs, with and without our help; real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGURATIONS = Path(__file__).parents[1] / "recipes" / "accelerate"

SCRIPT = """
import os, torch
from classp_hf.launch import prepare_cpu_launch
if {help}:
    prepare_cpu_launch()
print("WORLD", os.environ.get("WORLD_SIZE", "1"), "THREADS", torch.get_num_threads())
"""


def launch(tmp_path, *flags, help=True, error=None, **environment):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(help=help))
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | environment
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(script)]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert (run.returncode == 0) == (error is None), run.stderr
    assert error is None or error in run.stderr
    return [line for line in run.stdout.splitlines() if line.startswith("WORLD")]


def test_every_process_is_started(tmp_path):
    assert len(launch(tmp_path, "--cpu", "--num_processes", "2", help=False)) == 1  # else the workaround can go
    lines = launch(tmp_path, "--cpu", "--num_processes", "2")
    assert len(lines) == 2
    assert all(line.startswith("WORLD 2") for line in lines)


def test_a_configuration_file_says_how_many(tmp_path):
    lines = launch(tmp_path, "--cpu", "--config_file", str(CONFIGURATIONS / "ddp.yaml"))
    assert [line.split()[1] for line in lines] == ["2", "2"]


def test_a_configuration_that_the_launcher_ignores_on_cpus_is_refused(tmp_path):
    launch(
        tmp_path,
        "--cpu",
        "--config_file",
        str(CONFIGURATIONS / "fsdp2.yaml"),
        error="`accelerate launch --cpu` ignores the FSDP of",
    )


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core: nothing to gain")
def test_one_process_gets_all_cores_unless_told_otherwise(tmp_path):
    assert launch(tmp_path, help=False) == ["WORLD 1 THREADS 1"]
    assert launch(tmp_path) != ["WORLD 1 THREADS 1"]
    assert launch(tmp_path, OMP_NUM_THREADS="1") == ["WORLD 1 THREADS 1"]
    assert launch(tmp_path, "--num_cpu_threads_per_process", "1") == ["WORLD 1 THREADS 1"]
