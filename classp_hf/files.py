"""Files that are whole or not there, on the disk when something relies on them; and errors that say what to do."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
_TEMPORARIES = (".*.tmp", ".tmp??????")  # ours and those of safetensors


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path beside `path` to write to; it replaces `path` when the block ends, and is gone when it raises.

    The new content is on the disk before it takes the old one's place: neither a killed process nor a power cut leaves a
    part of it. The folder is created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # safetensors' 0600 would keep collaborators out
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Delete what killed processes left half-written anywhere in `folder`. Nobody may be writing there."""
    for pattern in _TEMPORARIES:
        for path in folder.rglob(pattern):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Return when everything in `folder`, at any depth, is on the disk: only a power cut tells the difference."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        _sync(path)


def _sync(path: Path) -> None:
    if os.name != "posix":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync folders
            raise
    finally:
        os.close(handle)


@contextmanager
def writing(what: str, path: str | os.PathLike) -> Iterator[None]:
    """Writing `what` to `path`: a full disk and a folder that cannot be written to get an error that says what to do.

    Raises:
        OSError: names both, how much room there is, and the remedy. Every other error is passed on.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = _error_number(error)
        if number in _NO_ROOM:
            remedy = f"Make room there{_free(Path(path))} or raise the quota or the limit on file sizes"
        elif number in _NOT_WRITABLE:
            remedy = "Make it a folder that can be written to, or choose another --output_dir"
        else:
            raise
        raise OSError(
            f"Writing {what} to {path} failed: {error}. {remedy}; then start the same command with "
            "--resume_from_checkpoint True. What was saved before is whole."
        ) from error


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors tells the number in its text; torch.save tells none, whatever went wrong with the file
    told = re.search(r"\(os error (\d+)\)", str(error))
    torch_failed = "PytorchStreamWriter" in str(error) or "iostream error" in str(error)
    return int(told[1]) if told else errno.ENOSPC if torch_failed else None


def _free(path: Path) -> str:
    there = next((p for p in [path, *path.parents] if p.is_dir()), None)
    return f" ({shutil.disk_usage(there).free / 1e6:,.1f} MB are free)" if there else ""
