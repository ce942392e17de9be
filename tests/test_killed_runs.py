"""Runs that are killed, asked to leave, or out of room, in processes of their own; the programs are in
kill_anywhere.py."""

from __future__ import annotations

import json
import subprocess

import kill_anywhere
import pytest
from kill_anywhere import Event, Run, attempt, differences, kill_again_and_again, log, undisturbed

from classp_hf import ContinualTrainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Undisturbed runs on one and on two ranks, and their events."""
    kill_anywhere.prepare()
    runs: dict = {}

    def get(ranks):
        if ranks not in runs:
            run = Run(tmp_path_factory.mktemp(f"ranks{ranks}") / "whole", ranks)
            runs[ranks] = run, undisturbed(run)
        return runs[ranks]

    return get


def beside(run, name):
    return Run(run.folder.with_name(name), run.ranks)


def leftovers(folder):
    return [p for p in folder.rglob("*") if p.name.endswith(".tmp") or p.name.startswith(".tmp")]


ONE_RANK = [
    "half of model.safetensors",
    "open trainer_state.json",
    "shutil.rmtree checkpoint-N",
    "an example of the Fisher",
    "a weight of the merge",
    "half of .classp_hf-continual_memory.st.tmp",
    "os.rename .classp_hf-sequence_state.json.tmp",
    "shutil.rmtree N-task-N",
    "os.rename .classp_hf-results.json.tmp",
]


def test_killed_anywhere_on_one_rank(whole):
    """The last event comes first. Each is the first of its kind in its process, and most processes are killed
    twice."""
    run, events = whole(1)
    missing = [name for name in ONE_RANK if name not in events[0]]
    assert not missing, sorted(events[0])
    struck, _ = kill_again_and_again(run, events, len(ONE_RANK), seed=0, names=ONE_RANK)
    assert len(struck) == len(ONE_RANK)


def test_killed_anywhere_on_two_ranks(whole):
    names = ["half of rng_state_N.pth", "open trainer_state.json", "training ends"]
    run, events = whole(2)
    struck, _ = kill_again_and_again(run, events, len(names), seed=0, names=names)
    assert len(struck) == len(names)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_leaves(whole, ranks):
    """Asked on the last rank in a step of the first task, then on the first one after the second task's training,
    which is evaluated before it leaves."""
    undisturbed, _ = whole(ranks)
    run = beside(undisturbed, "terminated")
    run.changes = {"enable_jit_checkpoint": True, "save_strategy": "no"}
    codes = attempt(run, Event("before the optimizer's step", 3, "term"), ranks - 1)
    assert codes == [143] * ranks, log(run)
    assert [p.name for p in run.folder.glob("*/checkpoint-*")] == ["checkpoint-3"]
    assert "SIGTERM: step 3 is saved in" in log(run)
    codes = attempt(run, Event("after EWC.after_task", 2, "term"), 0, resume=True)
    assert codes == [143] * ranks, log(run)
    assert len(json.loads((run.folder / "sequence_state.json").read_text())["accuracy_matrix"]) == 3
    assert attempt(run, resume=True) == [0] * ranks
    assert not differences(undisturbed.folder, run.folder)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, where one may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(whole, small_disk):
    undisturbed, _ = whole(1)
    run = Run(small_disk / "run")
    stuffing = small_disk / "stuffing"
    codes = attempt(run, Event("checkpoint saved", 2))
    assert codes == [-9]
    good = kept(run.folder / "00-task-0/checkpoint-4")
    free = int(
        subprocess.run(["df", "--output=avail", "-k", small_disk], capture_output=True, text=True).stdout.split()[1]
    )
    stuffing.write_bytes(bytes((free - 150) * 1024))
    assert attempt(run, resume=True) == [1]
    said = log(run)
    assert "OSError: There is no room left: " in said
    assert f"0.0 MB are free in {run.folder}" in said or f"0.1 MB are free in {run.folder}" in said
    assert "start the same command with --resume_from_checkpoint True. What was saved before is whole." in said
    assert kept(run.folder / "00-task-0/checkpoint-4") == good
    stuffing.unlink()
    assert attempt(run, resume=True) == [0]
    assert not differences(undisturbed.folder, run.folder)


def kept(checkpoint):
    return {p.name: p.read_bytes() for p in checkpoint.iterdir()}


@pytest.mark.parametrize("event", [("after EWC.after_task", 2), ("os.remove results.json", 1)])
def test_no_room_wherever_it_ends(whole, event):
    """A limit on file sizes stands for a full disk: the system refuses the same calls."""
    undisturbed, _ = whole(1)
    run = beside(undisturbed, f"full{event[1]}")
    assert attempt(run, Event(*event, action="full")) == [1], log(run)
    assert "OSError: There is no room left" in log(run) and f"free in {run.folder}. Make room" in log(run)
    assert attempt(run, resume=True) == [0], log(run)
    assert not differences(undisturbed.folder, run.folder)
    assert not leftovers(run.folder)


def test_a_run_whose_last_boundary_is_gone(make_model, make_tasks, make_args, collator, tmp_path):
    from shutil import rmtree

    def trainer(**changes):
        return ContinualTrainer(make_model(), make_args(**changes), collator)

    trainer().train_sequence(make_tasks(2))
    rmtree(tmp_path / "run" / "01-second")
    with pytest.raises(FileNotFoundError, match=r"01-second, the model after task 'second', is gone"):
        trainer(resume_from_checkpoint="True").train_sequence(make_tasks(2))
