"""The continual memory: what earlier tasks needed, keyed by parameter name, as a file beside the model.

`continual_memory.st` is a safetensors file under a name that no loader takes for weights. It holds tensors named
`<kind>/<parameter name>`: `accumulator/…` (`sum |g|^p`), `<method>.<part>/…` (such as `ewc.importance/…`),
`head.<task>/…` (per-task heads) and `samples/…` (a few values of every weight, by which a memory knows its model). Its
metadata carry a format version, tasks, hyperparameters and a digest of everything else. Accumulators of low-bit
optimizers are stored in bfloat16, which holds them exactly.

Names, not positions: `torch.optim.Optimizer.load_state_dict` maps state by order (pytorch#1489), which a new head or
adapter shifts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

from .files import replacing
from .names import bare_model, canonical_name, full_tensor, samples
from .optim.state import STATE_DTYPES, expand
from .redaction import UNPRINTABLE

logger = logging.get_logger(__name__)

_limited = reprlib.Repr()
_limited.maxstring = _limited.maxother = 200
_quoted = _limited.repr  # of text from a file, which may be long

MEMORY_NAME = "continual_memory.st"
OLD_NAME = "continual_memory.safetensors"
"""What versions before 0.2 wrote; read until 0.3. Loaders that take every `*.safetensors` file for weights read it
too."""
FORMAT = "classp_hf.continual_memory"
FORMAT_VERSIONS = ("1", "2")
"""The first is written. The second, of version 0.1, has accumulators in uint8 with `accumulator_base/…`."""
# Some 150,000 tensors. A header of safetensors' own limit, 100 MB, takes 7 s and 1 GB to parse.
MAX_HEADER_BYTES = 16 << 20


class NoMemoryError(FileNotFoundError):
    """There is none at that place; other errors leave open whether there is one."""


@dataclass
class ContinualMemory:
    """Tensors keyed `<kind>/<parameter name>`, and JSON metadata.

    Attributes:
        tensors: any dtype, on the CPU; of most kinds in the shape of the parameter they belong to.
        metadata: JSON-serialisable; by convention `tasks` (names seen so far), `optimizer` and `method`
            (hyperparameters).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def put(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Add `tensors` (parameter name -> tensor) under `kind`."""
        for name, tensor in tensors.items():
            self.tensors[f"{kind}/{name}"] = tensor.detach().cpu().contiguous()

    def get(self, kind: str) -> dict[str, Tensor]:
        """The tensors of `kind`, keyed by parameter name; empty if there are none."""
        prefix = f"{kind}/"
        return {key[len(prefix) :]: t for key, t in self.tensors.items() if key.startswith(prefix)}

    def kinds(self) -> list[str]:
        return sorted({key.split("/", 1)[0] for key in self.tensors})

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks it remembers, the oldest first."""
        return list(self.metadata.get("tasks", []))

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `continual_memory.st` into `folder` (created if missing), by atomic rename."""
        path = Path(folder) / MEMORY_NAME
        low_bit = self.metadata.get("optimizer", {}).get("state_dtype", "float32") != "float32"
        # clone: safetensors refuses tensors that share storage (tied weights)
        tensors = {
            k: t.bfloat16() if low_bit and k.startswith("accumulator/") else t.clone() for k, t in self.tensors.items()
        }
        content = json.dumps(self.metadata, sort_keys=True)
        header = {"format": FORMAT, "format_version": FORMAT_VERSIONS[0], "content": content}
        header["sha256"] = _digest(tensors, header)
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=header)
        path.with_name(OLD_NAME).unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path_or_repo: str | os.PathLike, revision: str | None = None) -> ContinualMemory:
        """Read a memory from a file, from a folder that holds one, or from a model repository on the Hub.

        Args:
            path_or_repo: a file, a folder, or a Hub id such as `"me/my-model"`.
            revision: branch, tag or commit of the Hub repository.

        Raises:
            FileNotFoundError: no memory there ([`NoMemoryError`]), or it could not be found out.
            ValueError: not a memory, a truncated or altered one, one of another format version, or one with content
                that no run writes: other metadata, NaN, infinite or negative accumulators, a path as a name. The
                digest tells damage, not intent: whoever alters a file can make it anew.
        """
        path = find_memory(path_or_repo, revision)
        try:
            with open(path, "rb") as start:
                length = int.from_bytes(start.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length:,} bytes, more than {MAX_HEADER_BYTES:,}")
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
            reason = UNPRINTABLE.sub(" ", str(error).partition("\n")[0])[:300]  # PyTorch's goes on with frames of C++
            raise ValueError(
                f"{path} is not a readable safetensors file ({reason}): it is truncated or damaged. "
                "Copy it again from where the run wrote it."
            ) from error
        if header.get("format") != FORMAT:
            raise ValueError(
                f"{path} is not a continual memory (its `format` is {_quoted(header.get('format'))}, not {FORMAT!r}). "
                f"Pass the {MEMORY_NAME} that a run of classp_hf wrote, or the folder that holds it."
            )
        if header.get("format_version") not in FORMAT_VERSIONS:
            raise ValueError(
                f"{path} has format version {_quoted(header.get('format_version'))}; this version of classp_hf reads "
                f"{' and '.join(FORMAT_VERSIONS)}. Install the version of classp_hf that wrote it."
            )
        expected = header.pop("sha256", None)
        if _digest(tensors, header) != expected:
            raise ValueError(
                f"The content of {path} does not match its own digest: it was altered or damaged after it was "
                "written. Copy it again from where the run wrote it."
            )
        try:
            metadata = json.loads(header.get("content", ""), object_pairs_hook=_distinct)
            _check_metadata(metadata)
            tensors = _expanded(tensors)
            _check_tensors(tensors)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} holds what no run of classp_hf writes: {error}. Use the memory that a run wrote, or start "
                "without a memory."
            ) from error
        return cls(tensors, metadata)


@dataclass
class Match:
    """Which tensors of a memory belong to a model.

    Attributes:
        accumulators: canonical name -> accumulator of parameters that are trained, in the parameter's shape.
        kept: of parameters that are frozen now or not in the model: they stay in the file.
        notes: what was done, one clause each.
    """

    accumulators: dict[str, Tensor]
    kept: dict[str, Tensor]
    notes: list[str]


def match_accumulators(
    memory: ContinualMemory, model: nn.Module, excluded: frozenset[str] = frozenset(), same_run: bool = False
) -> Match:
    """Match the accumulators of `memory` with the parameters of `model`, tensor by tensor.

    Used is what has a trained parameter of its name and shape; of an embedding that gained or lost rows the rows both
    have. Everything else begins empty: new parameters (a new head), parameters of another shape, and those whose
    values are not the ones the memory was written with while most others are (a head that was replaced). Parameters
    that are frozen or gone keep their place in the file. An adapter's memory goes with its adapter: it says nothing of
    the weights it was merged into, nor of the next adapter of that name (a LoRA whose B is zero has learned nothing
    yet).

    Args:
        excluded: parameters that have no memory (per-task heads).
        same_run: the memory is that of a checkpoint of this run, whose weights may not be in the model yet.

    Raises:
        ValueError: less than a tenth of it fits: it belongs to another model.
    """
    stored = {n: t for n, t in memory.get("accumulator").items() if n not in excluded}
    parameters = {canonical_name(n): p for n, p in model.named_parameters()}
    embeddings = {canonical_name(n) for n, p in _embeddings(model)}
    changed = {} if same_run else _changed(memory.get("samples"), model)
    compared = sum(n in parameters for n in memory.get("samples"))
    replaced = {n for n, distance in changed.items() if distance > 0.5 and 2 * len(changed) < compared}
    fresh = set() if same_run else {n for n in stored if _is_adapter(n) and _is_fresh(n, parameters)}
    result, dropped = Match({}, {}, []), []
    for n, t in stored.items():
        p = parameters.get(n)
        fits = p is not None and p.shape == t.shape and n not in replaced
        if n in fresh:
            dropped.append(n)
        elif p is None or (fits and not p.requires_grad):
            result.kept[n] = t
        elif fits:
            result.accumulators[n] = t
        elif p.requires_grad and n in embeddings and p.ndim == t.ndim and p.shape[1:] == t.shape[1:]:
            result.accumulators[n] = _with_rows(t, torch.zeros(p.shape))
            result.notes.append(f"{n} keeps {min(len(p), len(t))} rows of {len(t)} and has {len(p)}")
    own = {n for n, p in parameters.items() if p.requires_grad} - excluded
    fitting = sum(t.numel() for n, t in (result.accumulators | result.kept).items() if n in parameters)
    needed = sum(
        t.numel() for n, t in stored.items() if n not in dropped and not (_is_adapter(n) and n in result.kept)
    )
    if needed and fitting < 0.1 * needed:
        raise ValueError(
            f"The continual memory does not fit this model: of its {len(stored)} tensors "
            f"({shorten(sorted(stored), 2)}) {len(result.accumulators)} have the name and shape of a parameter that "
            f"is trained ({shorten(sorted(own), 2)}). It belongs to another model; start without a memory, or load "
            "that model."
        )
    if empty := sorted(own - result.accumulators.keys()) if stored else []:
        result.notes.append(f"{len(empty)} parameters begin without a memory ({shorten(empty, 2)})")
    if result.kept:
        result.notes.append(f"{len(result.kept)} tensors are kept for parameters that are frozen or not in this model")
    if dropped:
        result.notes.append(f"that of {len(dropped)} adapter weights is dropped, for that adapter is merged or new")
    if trained := changed.keys() - replaced:
        result.notes.append(
            f"{len(trained)} of {compared} parameters were changed after it was written, by a training or a merge "
            "that it knows nothing of"
        )
    return result


def match_rows(stored: Mapping[str, Tensor], model: nn.Module, zeros: bool) -> dict[str, Tensor]:
    """Of `stored` (canonical name -> tensor of the parameter's shape) what fits `model`; an embedding's new rows are 0
    or, unless `zeros`, the parameter's own."""
    parameters = {canonical_name(n): p for n, p in model.named_parameters()}
    embeddings = {canonical_name(n) for n, _ in _embeddings(model)}
    result = {}
    for n, t in stored.items():
        p = parameters.get(n)
        if p is not None and p.shape == t.shape:
            result[n] = t
        elif p is not None and n in embeddings and p.shape[1:] == t.shape[1:]:
            own = full_tensor(p.detach()).float().cpu()
            result[n] = _with_rows(t, torch.zeros_like(own) if zeros else own.clone())
    return result


def _with_rows(stored: Tensor, into: Tensor) -> Tensor:
    rows = min(len(stored), len(into))
    into[:rows] = stored[:rows]
    return into


def _embeddings(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """`(name, weight)` of the layers with a row a token: embeddings, and an output layer over the vocabulary."""
    output = getattr(bare_model(model), "get_output_embeddings", lambda: None)()
    rows = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if output is not None and output.weight is not None:
        rows |= {id(output.weight), id(getattr(output, "bias", None))}
    return [(n, p) for n, p in model.named_parameters() if id(p) in rows]


def _changed(written: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
    """Parameters whose values are not those `written`, up to bfloat16's rounding -> their distance, 1 = as far as from
    0."""
    now = samples(model) if written else {}
    distances = {}
    for n, t in written.items():
        if n in now and t.shape == now[n].shape and not torch.allclose(t.float(), now[n], rtol=2**-7, atol=1e-6):
            distances[n] = float((t.float() - now[n]).norm() / t.float().norm().clamp(min=1e-12))
    return distances


def _is_adapter(name: str) -> bool:
    # PEFT's own table, without importing it where no adapter can be
    peft = sys.modules.get("peft")
    prefixes = tuple(peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.values()) if peft is not None else ("lora_",)
    return any(part.startswith(prefixes) for part in name.split("."))


def _is_fresh(name: str, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether the adapter is not in the model, or is a LoRA that has not learned yet."""
    if name not in parameters:
        return True
    B = parameters.get(re.sub(r"lora_(embedding_)?[AB]\b", r"lora_\1B", name)) if ".lora_" in name else None
    return B is not None and not full_tensor(B.detach()).any()


def find_memory(path_or_repo: str | os.PathLike, revision: str | None = None) -> Path:
    """The memory's file, downloaded from the Hub if need be.

    Raises:
        FileNotFoundError: as [`ContinualMemory.load`].
    """
    path = Path(path_or_repo)
    if os.path.isdir(path):  # Path's own raise for a name that is too long
        path = next((path / name for name in (MEMORY_NAME, OLD_NAME) if (path / name).is_file()), path / MEMORY_NAME)
    if os.path.isfile(path):
        return path
    looks_local = os.path.exists(path) or path.suffix in (".st", ".safetensors")
    if looks_local or os.fspath(path_or_repo).startswith((".", "/", "~")) or len(path.parts) > 2:
        raise NoMemoryError(f"There is no continual memory at {path}. Pass the folder of a model saved with one.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        try:
            return Path(hf_hub_download(str(path_or_repo), MEMORY_NAME, revision=revision))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            return Path(hf_hub_download(str(path_or_repo), OLD_NAME, revision=revision))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        certain = isinstance(error, (EntryNotFoundError, HFValidationError, RepositoryNotFoundError))
        certain = certain and not isinstance(error, LocalEntryNotFoundError)
        raise (NoMemoryError if certain else FileNotFoundError)(
            f"{str(path_or_repo)!r} is neither a local folder with a {MEMORY_NAME} nor a Hub repository that "
            f"holds one ({type(error).__name__}: {error})."
        ) from error


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for key in sorted(header):
        digest.update(f"{key}={header[key]}\n".encode())
    for key in sorted(tensors):
        t = tensors[key].detach().contiguous()
        digest.update(f"{key} {t.dtype} {tuple(t.shape)}\n".encode())
        if math.prod(t.shape):
            digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("its metadata hold a key twice")
    return dict(pairs)


def _check_metadata(metadata: Any) -> None:
    parts = {"the metadata": metadata}
    if isinstance(metadata, dict):
        parts |= {key: metadata.get(key, {}) for key in ("optimizer", "method")}
    for part, value in parts.items():
        if not isinstance(value, dict):
            raise ValueError(f"{part} must be a JSON object, got {_quoted(value)}")
    tasks = metadata.get("tasks", [])
    if not isinstance(tasks, list) or not all(isinstance(t, str) and t and not UNPRINTABLE.search(t) for t in tasks):
        raise ValueError(f"tasks must be a list of names, got {_quoted(tasks)}")
    power = metadata.get("optimizer", {}).get("power", 1.0)
    if type(power) not in (int, float) or not 0 < power <= sys.float_info.max:
        raise ValueError(f"the optimizer's power must be a finite number > 0, got {_quoted(power)}")
    state_dtype = metadata.get("optimizer", {}).get("state_dtype", "float32")
    if not isinstance(state_dtype, str) or state_dtype not in STATE_DTYPES:
        raise ValueError(
            f"the optimizer's state_dtype must be one of {', '.join(STATE_DTYPES)}, got {_quoted(state_dtype)}"
        )
    steps = metadata.get("steps", 1)
    if type(steps) not in (int, float) or not 0 < steps <= sys.float_info.max:
        raise ValueError(f"steps must be a finite number > 0, got {_quoted(steps)}")
    if _is_nested(metadata, 20):
        raise ValueError("the metadata are nested more than 20 deep")


def _is_nested(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_is_nested(v, levels - 1) for v in inner)


def _expanded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file with its accumulators in float32."""
    result = {key: t for key, t in tensors.items() if not key.startswith("accumulator_base/")}
    for key, t in result.items():
        if key.startswith("accumulator/") and t.dtype in (torch.uint8, torch.bfloat16):
            base = tensors.get(key.replace("accumulator/", "accumulator_base/", 1))
            shape = () if base is None else (*base.shape, base.dtype)
            if shape != ((-(-t.numel() // 256), torch.int16) if t.dtype == torch.uint8 else ()):
                raise ValueError(f"{_quoted(key)} has dtype {t.dtype} and not the base that belongs to it")
            result[key] = expand(t, base)
    return result


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """What holds for every memory; whether it fits the model, `match_accumulators` and `Method.check_state` say."""
    for key, t in tensors.items():
        kind, _, name = key.partition("/")
        own = kind in ("accumulator", "samples", "initial_head") or kind.startswith("head.")
        # names are keys and never become paths; one that could is no parameter's or task's
        names = [kind, name, kind.removeprefix("head.").replace("%2F", "/")] if own else [kind]
        parts = [part for n in names for part in n.replace("\\", "/").split("/")]
        if not name or any(part in ("", ".", "..") or UNPRINTABLE.search(part) for part in parts):
            raise ValueError(f"{_quoted(key)} is no name of a tensor")
        if t.ndim > 64:
            raise ValueError(f"{_quoted(key)} has {t.ndim} dimensions")
        real = t.is_floating_point() and t.dtype.itemsize > 1
        if not real and (own or t.is_floating_point() or t.is_complex()):
            raise ValueError(f"{_quoted(key)} has dtype {t.dtype}, not one for real numbers in 16 bits or more")
        if real and t.numel():
            low, high = (float(x) for x in t.reshape(-1).float().aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"{_quoted(key)} holds NaN or infinity")
            if low < 0 and (kind == "accumulator" or kind.endswith(".importance")):
                raise ValueError(f"{_quoted(key)} holds {low:g}, and sums of powers of |g| are never negative")


def shorten(items: Sequence[str], limit: int = 5) -> str:
    """The first `limit` items, and how many more there are."""
    shown = [item if item.isprintable() and len(item) < 300 else _quoted(item) for item in items[:limit]]
    return ", ".join(shown) + (f", … ({len(items) - limit} more)" if len(items) > limit else "")
