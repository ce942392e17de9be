"""Files that are whole or not there: replacing them, syncing what a run left; and full disks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from classp_hf.files import explaining_full_disks, replacing, sync_folder


def listing(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("old")
    with path.open() as reader, replacing(str(path)) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == path.parent
        assert temporary.name == ".classp_hf-a.txt.tmp"
    assert reader.closed and path.read_text() == "new" and listing(path.parent) == ["a.txt"]
    with pytest.raises(OSError, match="of a disk"), replacing(path) as temporary:
        temporary.write_text("hal")
        raise OSError("of a disk")
    assert path.read_text() == "new" and listing(path.parent) == ["a.txt"]


def test_what_a_killed_process_left_is_replaced(tmp_path):
    code = f"""
import os, signal
from classp_hf.files import replacing
with replacing({str(tmp_path / "a.json")!r}) as temporary:
    temporary.write_text("a long text, cut off")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert len(listing(tmp_path)) == 1
    with replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("new")
    assert listing(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "new"


def test_a_safetensors_file_is_replaced_and_others_may_read_it(tmp_path):
    """safetensors writes a file of its own first, with mode 0600, and renames it to the path it was given."""
    path = tmp_path / "memory.safetensors"
    for value in (1.0, 2.0):
        with replacing(path) as temporary:
            save_file({"x": torch.full((3,), value)}, temporary)
    assert load_file(path)["x"].tolist() == [2.0] * 3 and listing(tmp_path) == [path.name]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_syncing_passes_over_what_is_no_file_of_the_run(tmp_path, monkeypatch):
    """A dangling link, a link to elsewhere, a loop and a named pipe, whose opening would wait for a writer."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    for folder in (run / "00-task" / "checkpoint-1", outside):
        folder.mkdir(parents=True)
    for path in (run / "model", run / "00-task" / "checkpoint-1" / "state", outside / "data"):
        path.touch()
    (run / "dangling").symlink_to("nowhere")
    (run / "data").symlink_to(outside / "data")
    (run / "00-task" / "loop").symlink_to(run)
    os.mkfifo(run / "pipe")
    (run / "gone").touch()
    opened = []
    original = os.open

    def opening(path, flags, *args, **kwargs):
        opened.append(os.path.relpath(path, tmp_path))
        assert opened[-1] != "run/pipe", "would wait for ever"
        if str(path).endswith("gone"):  # a logger's file, removed after it was listed
            os.unlink(path)
        return original(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", opening)
    sync_folder(run)
    inside = ["00-task", "00-task/checkpoint-1", "00-task/checkpoint-1/state", "gone", "model"]
    assert sorted(opened) == [".", "run", *(f"run/{name}" for name in inside)]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"),
        Exception("Error while serializing: I/O error: File too large (os error 27)"),
    ],
)
def test_a_full_disk_says_what_to_do(tmp_path, error):
    said = (
        rf"no room left: .*[\d,.]+ MB are free in {tmp_path}. Make room.*--resume_from_checkpoint True. What was saved"
    )
    with pytest.raises(OSError, match=said), explaining_full_disks(tmp_path):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("of a collective call"), ConnectionError("of the Hub"), PermissionError(13, "denied")]
)
def test_other_errors_pass(error, tmp_path):
    with pytest.raises(type(error)) as raised, explaining_full_disks(tmp_path):
        raise error
    assert raised.value is error
