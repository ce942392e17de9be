"""Files that are whole or not there, on the disk when something relies on them; and errors that say what to do."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path beside `path` to write to; synced, it replaces `path` when the block ends. It goes on an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".classp_hf-{path.name}-{os.getpid()}.tmp")
    try:
        yield temporary
        os.umask(umask := os.umask(0))
        os.chmod(temporary, 0o666 & ~umask)  # safetensors' 0600 would keep collaborators out
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Delete what killed processes left of `replacing` in `folder` and its sub-folders. Nobody may write there now."""
    for place in [folder, *(p for p in folder.glob("*") if p.is_dir() and not p.is_symlink())]:
        for path in place.glob(".classp_hf-*-[0-9]*.tmp"):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Return when the files and folders in `folder`, at any depth, are on the disk. Links are not followed."""
    for path in (Path(place, name) for place, _, names in os.walk(folder) for name in [*names, "."]):
        if path.is_dir() or (path.is_file() and not path.is_symlink()):
            _sync(path)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    # of other programs: removed meanwhile, or not ours to open
    with suppress(FileNotFoundError, PermissionError), ExitStack() as stack:
        handle = os.open(path, os.O_RDONLY)
        stack.callback(os.close, handle)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # Windows, folders on some networks
                raise


@contextmanager
def writing(what: str, path: str | os.PathLike) -> Iterator[None]:
    """Turn a full disk, or a place one may not write to, into an `OSError` that names `what`, `path` and a remedy."""
    try:
        yield
    except Exception as error:
        # safetensors tells the number in its text; torch.save tells none, whatever went wrong with the file
        told = re.search(r"\(os error (\d+)\)|PytorchStreamWriter|iostream error", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1] or errno.ENOSPC) if told else None
        if number not in _NO_ROOM | _NOT_WRITABLE:
            raise
        free = next(shutil.disk_usage(p).free for p in [Path(path), *Path(path).parents] if os.path.isdir(p))
        room = f"Make room there ({free / 1e6:,.1f} MB are free) or raise the quota or the limit on file sizes"
        remedy = room if number in _NO_ROOM else "Make it a writable folder, or choose another --output_dir"
        again = f"{remedy}; then start the same command with --resume_from_checkpoint True"
        raise OSError(f"Writing {what} to {path} failed: {error}. {again}. What was saved before is whole.") from error
