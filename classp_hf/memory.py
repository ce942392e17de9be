"""The continual memory: what earlier tasks needed, keyed by parameter name, as a file beside the model.

It is a safetensors file under a name that no loader takes for weights, of tensors named `<kind>/<parameter name>`;
docs/concepts/memory.md lists the kinds. Names, not positions: `torch.optim.Optimizer.load_state_dict` maps state by
order (pytorch#1489), which a new head or adapter shifts.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.utils import logging

from .files import replacing
from .names import Accumulators, bare_model, full_shape, full_tensor, model_source
from .redaction import UNPRINTABLE

logger = logging.get_logger(__name__)

_limited = reprlib.Repr()
_limited.maxstring = _limited.maxother = 200
_quoted = _limited.repr  # of text from a file, which may be long

MEMORY_NAME = "continual_memory.st"
OLD_NAME = "continual_memory.safetensors"
"""What versions before 0.2 wrote; read until 0.3."""
FORMAT, FORMAT_VERSION = "classp_hf.continual_memory", "1"
_AGAIN = "Copy it again from where the run wrote it."


class NoMemoryError(FileNotFoundError):
    """There is none at that place; other errors leave open whether there is one."""


@dataclass
class ContinualMemory:
    """Tensors keyed `<kind>/<parameter name>`, and JSON metadata.

    Attributes:
        tensors: any dtype, on the CPU; of most kinds in the shape of the parameter they belong to.
        metadata: JSON-serialisable; `tasks` (names seen so far), `optimizer` and `method` (hyperparameters).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def put(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Add `tensors` (parameter name -> tensor) under `kind`; sharded ones whole, by a collective call each."""
        for name, tensor in tensors.items():
            self.tensors[f"{kind}/{name}"] = full_tensor(tensor).cpu().contiguous()

    def get(self, kind: str) -> dict[str, Tensor]:
        """Return the tensors of `kind`, keyed by parameter name; empty if there are none."""
        return {k.removeprefix(f"{kind}/"): t for k, t in self.tensors.items() if k.startswith(f"{kind}/")}

    def kinds(self) -> list[str]:
        """Return the kinds of its tensors, sorted: `"accumulator"`, `"ewc.anchor"`, `"samples"`, ..."""
        return sorted({key.split("/", 1)[0] for key in self.tensors})

    def parts_of(self, owner: str) -> dict[str, dict[str, Tensor]]:
        """Return part -> tensors by name, for all kinds `<owner>.<part>`; `owner` is a method's name, or "head"."""
        return {k.removeprefix(f"{owner}."): self.get(k) for k in self.kinds() if k.startswith(f"{owner}.")}

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks trained on so far, the oldest first."""
        return list(self.metadata.get("tasks", []))

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `continual_memory.st` into `folder` (created if missing), by atomic rename, and return its path."""
        if nameless := [key for key in self.tensors if "/" not in key]:
            raise ValueError(f"Tensors of a memory are keyed <kind>/<parameter name>, got {shorten(nameless)}.")
        return write_memory(folder, [(kind, self.get(kind)) for kind in self.kinds()], self.metadata)

    @classmethod
    def load(cls, path_or_repo: str | os.PathLike, revision: str | None = None) -> ContinualMemory:
        """Read a memory from a file, from a folder that holds one, or from a model repository on the Hub.

        Args:
            path_or_repo: a file, a folder, or a Hub id such as `"me/my-model"`.
            revision: branch, tag or commit of the Hub repository.

        Raises:
            FileNotFoundError: there is no memory ([`NoMemoryError`]), or the Hub could not be asked.
            ValueError: not a memory, a truncated or altered one, one of another format version, or one with content
                that no run writes: other metadata, NaN, infinite or negative accumulators. The digest detects damage,
                not forgery: whoever alters a file can compute a new one.
        """
        path = find_memory(path_or_repo, revision)
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
            reason = UNPRINTABLE.sub(" ", str(error).partition("\n")[0])[:300]  # PyTorch's goes on with frames of C++
            raise ValueError(
                f"{path} is not a readable safetensors file ({reason}): it is truncated or damaged. {_AGAIN}"
            ) from error
        form, version, digest = (header.get(key) for key in ("format", "format_version", "sha256"))
        if form != FORMAT:
            raise ValueError(
                f"{path} is not a continual memory (its `format` is {_quoted(form)}, not {FORMAT!r}). Pass the "
                f"{MEMORY_NAME} that a run of classp_hf wrote, or the folder that holds it."
            )
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {_quoted(version)}; this version of classp_hf reads {FORMAT_VERSION}. "
                "Install the version of classp_hf that wrote it."
            )
        if _digest(sorted(tensors.items()), {k: v for k, v in header.items() if k != "sha256"}) != digest:
            raise ValueError(
                f"The content of {path} does not match its own digest: it was altered or damaged after it was "
                f"written. {_AGAIN}"
            )
        try:
            metadata = json.loads(header.get("content", ""))
            _check_metadata(metadata)
            _check_tensors(tensors)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} holds what no run of classp_hf writes: {error}. Use the memory that a run wrote, or start "
                "without a memory."
            ) from error
        low_bit = [k for k, t in tensors.items() if k.startswith("accumulator/") and t.dtype == torch.bfloat16]
        return cls(tensors | {k: tensors[k].float() for k in low_bit}, metadata)


_Parts = Iterable[tuple[str, Mapping[str, Tensor]]]


def write_memory(folder: str | os.PathLike, parts: _Parts, metadata: Mapping[str, Any], writes: bool = True) -> Path:
    """As [`ContinualMemory.save`], of kinds with their tensors by name, of which the last of a name counts.

    The tensors are taken, made whole and written one after another, so that one of them is all there is in memory;
    safetensors' own functions need all at once. If any is sharded, call it on every rank; those that do not write only
    take part in making tensors whole.
    """
    path = Path(folder) / MEMORY_NAME
    # stored in bfloat16, which holds them exactly
    low_bit = metadata.get("optimizer", {}).get("state_dtype", "float32") != "float32"
    sources = {f"{kind}/{name}": (tensors, name) for kind, tensors in parts for name in tensors}

    def take(key: str) -> Tensor:
        tensors, name = sources[key]
        return full_tensor(tensors[name])

    if not writes:
        for key in sorted(sources):
            take(key)
        return path
    forms: dict[str, tuple[torch.dtype, torch.Size]] = {}
    for key, (tensors, name) in sources.items():
        t = tensors.parameters[name] if isinstance(tensors, Accumulators) else tensors[name]
        dtype = torch.float32 if isinstance(tensors, Accumulators) else t.dtype
        forms[key] = torch.bfloat16 if low_bit and key.startswith("accumulator/") else dtype, full_shape(t)
    layout: dict[str, Any] = {}
    end = 0
    for key in sorted(forms, key=lambda k: (-forms[k][0].itemsize, k)):  # no tensor begins within a number of its own
        dtype, shape = forms[key]
        offset, end = end, end + math.prod(shape) * dtype.itemsize
        layout[key] = {"dtype": _name_of(dtype), "shape": list(shape), "data_offsets": [offset, end]}
    content = json.dumps(metadata, sort_keys=True)
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "content": content}

    def start(digest: str) -> bytes:
        text = json.dumps({"__metadata__": header | {"sha256": digest}, **layout}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    keys = iter(sorted(sources))
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            begin = file.write(start("0" * 64))

            def written() -> Iterator[tuple[str, Tensor]]:
                for key in keys:
                    t = take(key).to("cpu", forms[key][0]).contiguous()
                    file.seek(begin + layout[key]["data_offsets"][0])
                    file.write(_bytes(t))
                    yield key, t

            digest = _digest(written(), header)
            file.seek(0)
            file.write(start(digest))
    except OSError:  # of this rank alone: the others take part until the last tensor
        for key in keys:
            take(key)
        raise
    path.with_name(OLD_NAME).unlink(missing_ok=True)
    return path


def find_memory(path_or_repo: str | os.PathLike, revision: str | None = None) -> Path:
    """The memory's file, downloaded from the Hub if need be; without a network the one in the Hub's local cache."""
    path, repo = Path(path_or_repo), str(path_or_repo)
    candidates = [path / MEMORY_NAME, path / OLD_NAME] if os.path.isdir(path) else [path]
    if found := next((c for c in candidates if os.path.isfile(c)), None):  # Path's own raises for long names
        return found
    looks_local = os.path.exists(path) or path.suffix in (".st", ".safetensors")
    if looks_local or repo.startswith((".", "/", "~")) or len(path.parts) > 2:
        raise NoMemoryError(f"There is no continual memory at {candidates[0]}. Pass the folder of a model with one.")
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    certain, reason = True, None
    for name in (MEMORY_NAME, OLD_NAME):
        try:
            return Path(hf_hub_download(repo, name, revision=revision))
        except (hub.EntryNotFoundError, hub.HfHubHTTPError, hub.HFValidationError) as error:
            reason = error
            if isinstance(error, hub.LocalEntryNotFoundError):  # no network: the cache may know that there is none
                certain &= try_to_load_from_cache(repo, name, revision=revision) is not None
            elif not isinstance(error, (hub.EntryNotFoundError, hub.RepositoryNotFoundError, hub.HFValidationError)):
                certain = False
    raise (NoMemoryError if certain else FileNotFoundError)(
        f"{repo!r} is neither a local folder with a {MEMORY_NAME} nor a Hub repository that holds one "
        f"({type(reason).__name__}: {reason})."
    ) from reason


def memory_beside(model: Any) -> ContinualMemory | None:
    """The memory in the folder or Hub repository that `model` was loaded from, at the model's own commit; None if
    there is none, or if that cannot be found out. Collective: every rank must call it.
    """
    source, found = model_source(model), None
    try:
        with suppress(NoMemoryError):  # most models have none
            if source:
                found = ContinualMemory.load(source, getattr(bare_model(model).config, "_commit_hash", None))
    except FileNotFoundError as error:
        logger.warning(
            f"Whether a continual memory belongs to {source!r} could not be found out, so none is used. {error}"
        )
    if len(set(gather_object([found is not None]))) > 1:  # ranks that begin differently would train different models
        raise RuntimeError(f"Only some processes could read the continual memory of {source!r}. Start again.")
    return found


def warn_of_unused_memory(model: Any, why: str) -> None:
    """Say that the memory, if any, in the folder that `model` was loaded from is not used, then `why`."""
    folder = Path(model_source(model) or "/nowhere").absolute()
    if any((folder / name).is_file() for name in (MEMORY_NAME, OLD_NAME)):
        logger.warning(f"A continual memory lies beside this model ({folder}) and is not used. {why}")


def _digest(tensors: Iterable[tuple[str, Tensor]], header: Mapping[str, str]) -> str:
    """Of the header and of tensors with their keys, in the order of the keys."""
    digest = hashlib.sha256()
    for key in sorted(header):
        digest.update(f"{key}={header[key]}\n".encode())
    for key, t in tensors:
        digest.update(f"{key} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(_bytes(t))
    return digest.hexdigest()


def _bytes(t: Tensor) -> Any:
    """The content of a contiguous tensor on the CPU, not copied."""
    return t.reshape(-1).view(torch.uint8).numpy().data if t.numel() else b""


@functools.cache
def _name_of(dtype: torch.dtype) -> str:
    """What safetensors calls it."""
    start = save({"x": torch.empty(0, dtype=dtype)})
    return json.loads(start[8 : 8 + int.from_bytes(start[:8], "little")])["x"]["dtype"]


def _check_metadata(metadata: Any) -> None:
    for part in ("the metadata", "optimizer", "method"):
        value = metadata.get(part, {}) if part in ("optimizer", "method") else metadata
        if not isinstance(value, dict):
            raise ValueError(f"{part} must be a JSON object, got {_quoted(value)}")
    tasks = metadata.get("tasks", [])
    if not isinstance(tasks, list) or not all(isinstance(t, str) and t and not UNPRINTABLE.search(t) for t in tasks):
        raise ValueError(f"tasks must be a list of names, got {_quoted(tasks)}")
    power = metadata.get("optimizer", {}).get("power", 1.0)
    for what, number in (("the optimizer's power", power), ("steps", metadata.get("steps", 1))):
        if type(number) not in (int, float) or not 0 < number <= sys.float_info.max:
            raise ValueError(f"{what} must be a finite number > 0, got {_quoted(number)}")


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """What holds for every memory; whether it fits the model, `match_accumulators` and `Method.check_state` say."""
    for key, t in tensors.items():
        kind, _, name = key.partition("/")
        own = kind in ("accumulator", "samples", "initial_head") or kind.startswith("head.")
        if not kind or not name or UNPRINTABLE.search(key):
            raise ValueError(f"{_quoted(key)} is no name of a tensor")
        if t.ndim > 64:  # PyTorch's own limit, at which writing it again would fail
            raise ValueError(f"{_quoted(key)} has {t.ndim} dimensions")
        real = t.is_floating_point() and t.dtype.itemsize > 1
        if not real and (own or t.is_floating_point() or t.is_complex()):
            raise ValueError(f"{_quoted(key)} has dtype {t.dtype}, not one for real numbers in 16 bits or more")
        low, high = (float(x) for x in t.reshape(-1).float().aminmax()) if real and t.numel() else (0.0, 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{_quoted(key)} holds NaN or infinity")
        if low < 0 and (kind == "accumulator" or kind.endswith(".importance")):
            raise ValueError(f"{_quoted(key)} holds {low:g}, and sums of powers of |g| are never negative")


def shorten(items: Sequence[str], limit: int = 5) -> str:
    """The first `limit` items, and how many more there are."""
    shown = [item if item.isprintable() and len(item) < 300 else _quoted(item) for item in items[:limit]]
    return ", ".join(shown) + (f", … ({len(items) - limit} more)" if len(items) > limit else "")
