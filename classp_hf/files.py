"""Files that are whole or not there, on the disk when something relies on them; and what to do when a disk is full."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def read_table(path: str | os.PathLike, *config: str) -> Any:
    """The splits of a file of rows. "null" and "NA" in it are texts, not missing values."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    suffix = Path(path).suffix
    if suffix not in READERS:
        raise ValueError(f"Cannot read rows from {path}: give a file that ends in {', '.join(READERS)}.")
    settings = {"keep_default_na": False, "sep": "\t" if suffix == ".tsv" else ","} if "sv" in suffix else {}
    try:
        return load_dataset(READERS[suffix], *config, data_files=str(path), **settings)
    except DatasetGenerationError as error:
        raise ValueError(f"{path} cannot be read ({error.__cause__}). Save it in UTF-8, all rows alike.") from error


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path beside `path` to write to; synced, it replaces `path` when the block ends. It goes on an error; what
    a killed process left there is overwritten by the next one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".classp_hf-{path.name}.tmp")
    try:
        yield temporary
        os.umask(umask := os.umask(0))
        os.chmod(temporary, 0o666 & ~umask)  # safetensors' 0600 would keep collaborators out
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Return when the files and folders in `folder`, at any depth, are on the disk. Links are not followed."""
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in [*names, "."]):
            if path.is_dir() or (path.is_file() and not path.is_symlink()):
                _sync(path)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    with suppress(FileNotFoundError, PermissionError):  # of other programs: removed meanwhile, or not ours to open
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # Windows, folders on some networks
                raise
        finally:
            os.close(handle)


@contextmanager
def explaining_full_disks(folder: Path) -> Iterator[None]:
    """Turn what libraries raise when they have no room left into an `OSError` that says what to do."""
    try:
        yield
    except Exception as error:
        # safetensors tells the number in its text; torch.save tells none, whatever went wrong with the file
        told = re.search(r"\(os error (\d+)\)|PytorchStreamWriter|iostream error", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1] or errno.ENOSPC) if told else None
        if number not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise OSError(
            f"There is no room left: {error}. {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free in {folder}. "
            "Make room, or raise the quota or the limit on file sizes; then start the same command with "
            "--resume_from_checkpoint True. What was saved before is whole."
        ) from error
