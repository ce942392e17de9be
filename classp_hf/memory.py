"""The continual memory as a file: what earlier tasks needed, keyed by parameter name, beside the model.

`continual_memory.safetensors` holds tensors named `<kind>/<parameter name>`: `accumulator/…` (the CLASSP optimizer's
state), `<method>.<part>/…` (such as `ewc.fisher/…` and `ewc.anchor/…`) and `head.<task>/…` (per-task heads). Its
metadata carry a format version, the hyperparameters and a digest of everything else in the file. Accumulators are stored
in the optimizer's `state_dtype`; those of one byte come with `accumulator_base/…` and make a file of format version 2.

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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

from .files import replacing
from .optim.state import STATE_DTYPES, compress, expand, random_bits
from .redaction import UNPRINTABLE, redact

logger = logging.get_logger(__name__)

_limited = reprlib.Repr()
_limited.maxstring = _limited.maxother = 200
_quoted = _limited.repr  # of text from a file, which may be long

MEMORY_NAME = "continual_memory.safetensors"
FORMAT = "classp_hf.continual_memory"
FORMAT_VERSION, LOW_BIT_VERSION = "1", "2"
# Some 150,000 tensors. A header of safetensors' own limit, 100 MB, takes 7 s and 1 GB to parse.
MAX_HEADER_BYTES = 16 << 20

# Wrappers put these into parameter names: DDP, torch.compile, activation checkpointing, FSDP, PEFT.
_WRAPPERS = re.compile(
    r"^(?:module\.)+|\b_orig_mod\.|\b_checkpoint_wrapped_module\.|\b_fsdp_wrapped_module\.|^base_model\.model\."
    r"|\bbase_layer\.|\bmodules_to_save\.[^.]+\."
)


def canonical_name(name: str) -> str:
    """The parameter's name in the bare model: without the prefixes of DDP, FSDP, torch.compile and PEFT.

    >>> canonical_name("module.base_model.model.bert.pooler.dense.base_layer.weight")
    'bert.pooler.dense.weight'
    """
    previous = None
    while name != previous:
        previous, name = name, _WRAPPERS.sub("", name)
    return name


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`(canonical name, parameter)` of every parameter that requires a gradient; under FSDP2 the sharded ones."""
    reshard(model)
    for name, p in model.named_parameters():
        if p.requires_grad:
            yield canonical_name(name), p


def reshard(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model. If so, it holds its sharded parameters from here on.

    After a forward pass without a backward one some modules hold whole copies, which no optimizer and no memory knows.
    """
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.reshard()
    return bool(sharded)


def bare_model(model: nn.Module) -> Any:
    """The Transformers model inside a PEFT model; any other model as it is."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_language_model(model: nn.Module) -> bool:
    """Whether the model writes text: causal or sequence-to-sequence."""
    can_generate = getattr(bare_model(model), "can_generate", None)
    return can_generate is not None and bool(can_generate())


@dataclass
class ContinualMemory:
    """Tensors keyed `<kind>/<parameter name>`, and JSON metadata.

    Attributes:
        tensors: any dtype, on the CPU; the shape of the parameter they belong to.
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

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `continual_memory.safetensors` into `folder` (created if missing), by atomic rename."""
        path = Path(folder) / MEMORY_NAME
        tensors = self._stored()
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION if tensors.keys() == self.tensors.keys() else LOW_BIT_VERSION,
            "content": json.dumps(self.metadata, sort_keys=True),
        }
        header["sha256"] = _digest(tensors, header)
        with replacing(path) as temporary:
            # clone: safetensors refuses tensors that share storage (tied weights)
            save_file({k: t.clone() for k, t in tensors.items()}, temporary, metadata=header)
        return path

    def _stored(self) -> dict[str, Tensor]:
        """The tensors as the file has them."""
        dtype = STATE_DTYPES[self.metadata.get("optimizer", {}).get("state_dtype", "float32")]
        stored = dict(self.tensors)
        for name, t in self.get("accumulator").items() if dtype != torch.float32 else ():
            stored[f"accumulator/{name}"], base = compress(t, dtype, random_bits(t, t))
            if base is not None:
                stored[f"accumulator_base/{name}"] = base
        return stored

    @classmethod
    def load(cls, path_or_repo: str | os.PathLike, revision: str | None = None) -> ContinualMemory:
        """Read a memory from a file, from a folder that holds one, or from a model repository on the Hub.

        Args:
            path_or_repo: a file, a folder, or a Hub id such as `"me/my-model"`.
            revision: branch, tag or commit of the Hub repository.

        Raises:
            FileNotFoundError: no memory there ([`NoMemoryError`]), or it could not be found out.
            ValueError: not a memory, a truncated or altered one, one of another format version, or one with content that
                no run writes: other metadata, NaN, infinite or negative accumulators, a path as a name. The digest tells
                damage, not intent: whoever alters a file can make it anew.
        """
        path = _resolve(path_or_repo, revision)
        try:
            with open(path, "rb") as start:
                length = int.from_bytes(start.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length:,} bytes, more than {MAX_HEADER_BYTES:,}")
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
            said = UNPRINTABLE.sub(" ", str(error).partition("\n")[0])[:300]  # PyTorch's goes on with frames of C++
            raise ValueError(
                f"{path} is not a readable safetensors file ({said}): it is truncated or damaged. "
                "Copy it again from where the run wrote it."
            ) from error
        if header.get("format") != FORMAT:
            raise ValueError(
                f"{path} is not a continual memory (its `format` is {_quoted(header.get('format'))}, not {FORMAT!r}). "
                f"Pass the {MEMORY_NAME} that a run of classp_hf wrote, or the folder that holds it."
            )
        if header.get("format_version") not in (FORMAT_VERSION, LOW_BIT_VERSION):
            raise ValueError(
                f"{path} has format version {_quoted(header.get('format_version'))}; this version of classp_hf reads "
                f"{FORMAT_VERSION} and {LOW_BIT_VERSION}. Install the version of classp_hf that wrote it."
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
                f"{path} holds what no run of classp_hf writes: {error}. Use the memory that a run wrote, or start without "
                "a memory."
            ) from error
        return cls(tensors, metadata)

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise a ValueError that says which names or shapes differ, unless every kind fits the model.

        Args:
            shapes: canonical name -> shape of every parameter that will be trained.
        """
        problems = []
        for kind in self.kinds():
            stored = {name: tuple(t.shape) for name, t in self.get(kind).items()}
            for label, names in (
                ("only in the memory", stored.keys() - shapes.keys()),
                ("only in the model", shapes.keys() - stored.keys()),
            ):
                if names:
                    problems.append(f"  {kind}: {len(names)} {label}: {_shorten(sorted(names))}")
            differing = [
                f"{name} {stored[name]} in the memory, {shapes[name]} in the model"
                for name in sorted(stored.keys() & shapes.keys())
                if stored[name] != tuple(shapes[name])
            ]
            if differing:
                problems.append(f"  {kind}: {len(differing)} of another shape: {_shorten(differing)}")
        if problems:
            raise ValueError(
                "The continual memory does not fit this model's trainable parameters:\n" + "\n".join(problems) + "\n"
                "It belongs to another model, head or adapter. Load the model it was saved with, or start without a "
                "memory."
            )


def match_accumulators(
    stored: Mapping[str, Tensor], model: nn.Module, excluded: frozenset[str] = frozenset(), resumed: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Which of the `stored` accumulators (canonical name -> tensor) the model trains on with, and which it only keeps.

    So that full and adapter fine-tuning may alternate: the memory of base weights that are frozen now is kept for when
    they are trained again; an adapter the model does not have any more takes its memory with it, for it was a memory of
    other weights; and so does an earlier adapter of the same name, which is told from one that goes on by its B, zero in a
    LoRA that has not learned yet. New adapters, and base weights of a model whose adapter was trained so far, begin
    without a memory. Every case is logged.

    Args:
        stored: from `ContinualMemory.get("accumulator")`.
        excluded: parameters that have no memory (per-task heads).
        resumed: the memory is that of a checkpoint of this run, whose weights may not be in the model yet.

    Returns:
        Accumulators of parameters that are trained, and of parameters that are frozen.

    Raises:
        ValueError: anything else that differs: it belongs to another model.
    """
    shapes = {n: s for n, s in memory_shapes(model).items() if n not in excluded}
    frozen = {canonical_name(n): tuple(p.shape) for n, p in model.named_parameters() if not p.requires_grad}
    adapters = {n for n in {*stored, *shapes} if _is_adapter(n)}
    begun = {n for n in shapes if n in adapters and (resumed or not _is_new_lora(n, model))}
    gone = {n for n in stored if n in adapters and n not in begun}
    kept = {n: t for n, t in stored.items() if n not in gone and n not in shapes and frozen.get(n) == tuple(t.shape)}
    used = {n: t for n, t in stored.items() if n not in gone and n not in kept}
    new = {n for n in shapes if n not in used and (n in adapters or gone or adapters & stored.keys())}
    if used or not stored:
        ContinualMemory({f"accumulator/{n}": t for n, t in used.items()}).check_fits(
            {n: s for n, s in shapes.items() if n not in new}
        )
    if gone:
        logger.warning(
            f"The continual memory of {len(gone)} adapter weights ({_shorten(sorted(gone), 1)}) is dropped: that adapter is merged, "
            "removed or begun anew, and its memory says nothing of the weights it was merged into."
        )
    if kept:
        logger.warning(
            f"The continual memory of {len(kept)} weights that are frozen now is kept for when they are trained."
        )
    if new:
        logger.warning(f"{len(new)} weights ({_shorten(sorted(new), 1)}) begin without a continual memory.")
    return used, kept


def _is_adapter(name: str) -> bool:
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    return any(part.startswith(tuple(PEFT_TYPE_TO_PREFIX_MAPPING.values())) for part in name.split("."))


def _is_new_lora(name: str, model: nn.Module) -> bool:
    if ".lora_" not in name:
        return False
    B = re.sub(r"lora_(embedding_)?[AB]\b", r"lora_\1B", name)
    return any(canonical_name(n) == B and not full_tensor(p.detach()).any() for n, p in model.named_parameters())


def memory_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Canonical name -> full (unsharded) shape of the trainable parameters."""
    return {name: tuple(p.shape) for name, p in trainable_parameters(model)}


def full_tensor(t: Tensor) -> Tensor:
    """The whole tensor of a sharded one (a collective call on every rank), any other tensor as it is."""
    from torch.distributed.tensor import DTensor

    return t.full_tensor() if isinstance(t, DTensor) else t


def like_parameter(full: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """`full` on the device of `p`, in `dtype`, sharded as `p` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    full = full.to(device=p.device, dtype=dtype, copy=True)
    if not isinstance(p, DTensor):
        return full
    # every rank has it all: nothing to send
    return distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)


def local(t: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    from torch.distributed.tensor import DTensor

    return t.to_local() if isinstance(t, DTensor) else t


def mean_over_weights(tensors: Iterable[Tensor]) -> float:
    """The mean over all elements of all tensors; 0.0 for none."""
    total, count = 0.0, 0
    for t in tensors:
        total += _total(t)
        count += t.numel()
    return total / count if count else 0.0


def _total(t: Tensor) -> float:
    return float(full_tensor(t.sum(dtype=torch.float32 if t.device.type == "mps" else torch.float64)))


def layer_means(accumulators: Mapping[str, Tensor]) -> dict[str, float]:
    """Layer -> mean accumulator a weight, layers in the model's order.

    A layer is what shares its name up to the first number (`bert.encoder.layer.3`), else up to the second part
    (`bert.embeddings`).
    """
    sums: dict[str, list[float]] = {}
    for name, t in accumulators.items():
        numbered = re.match(r"(.*?\.\d+)\.", name)
        parts = name.split(".")
        layer = sums.setdefault(
            numbered[1] if numbered else ".".join(parts[: min(2, len(parts) - 1)]) or name, [0.0, 0]
        )
        layer[0] += _total(t)
        layer[1] += t.numel()
    return {layer: total / max(count, 1) for layer, (total, count) in sums.items()}


@torch.no_grad()
def gather_(accumulators: dict[str, Tensor], model: nn.Module, power: float) -> None:
    """`s <- s + |g|^power` for every trainable parameter that has a gradient: CLASSP's memory under any optimizer.

    `accumulators` (canonical name -> float32, of the parameter's shape, device and sharding) is changed in place.
    """
    for n, p in trainable_parameters(model):
        if p.grad is not None:
            if n not in accumulators:
                accumulators[n] = torch.zeros_like(p, dtype=torch.float32)
            elif accumulators[n].device != p.device or type(accumulators[n]) is not type(p.detach()):
                accumulators[n] = like_parameter(accumulators[n], p.detach(), torch.float32)
            g = p.grad.float()
            accumulators[n].add_(g.square() if power == 2 else g.abs().pow_(power))


class CompactCopy:
    """A copy of a weight tensor in 2 bytes a weight: int16 with a float32 scale a row; 16-bit weights as they are.

    The error is at most max|row| / 65,534 a weight, hundreds of times finer than bfloat16: what counts is how far a weight
    has moved since, which is small beside the weight.

    Args:
        weight: any floating dtype and shape; of a sharded tensor the local part is copied.
    """

    def __init__(self, weight: Tensor) -> None:
        weight = local(weight)
        if weight.element_size() == 2 or weight.numel() == 0:
            self.values, self.scale = weight.clone(), None
        else:
            rows = weight.reshape(-1, weight.shape[-1]) if weight.ndim else weight.reshape(1, 1)
            self.scale = (rows.abs().amax(1, keepdim=True) / 32767).clamp_(min=torch.finfo(torch.float32).tiny)
            self.values = (rows / self.scale).round_().to(torch.int16)

    def difference(self, weight: Tensor) -> Tensor:
        """`weight - copy`, float32."""
        copied = self.values.float()
        if self.scale is None:
            return weight.float() - copied
        return torch.addcmul(weight.float().reshape(copied.shape), copied, self.scale, value=-1).reshape(weight.shape)


class NoMemoryError(FileNotFoundError):
    """There is none at that place; other errors leave open whether there is one."""


def _resolve(path_or_repo: str | os.PathLike, revision: str | None) -> Path:
    path = Path(path_or_repo)
    if os.path.isdir(path):  # Path's own raise for a name that is too long
        path = path / MEMORY_NAME
    if os.path.isfile(path):
        return path
    looks_local = (
        os.path.exists(path) or path.name == MEMORY_NAME or os.fspath(path_or_repo).startswith((".", "/", "~"))
    )
    if looks_local or len(path.parts) > 2:
        place = redact(os.fspath(path_or_repo))
        raise NoMemoryError(f"There is no continual memory at {place}. Pass the folder of a model saved with one.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(str(path_or_repo), MEMORY_NAME, revision=revision))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        certain = isinstance(error, (EntryNotFoundError, HFValidationError, RepositoryNotFoundError))
        certain = certain and not isinstance(error, LocalEntryNotFoundError)
        said = redact(str(error))
        raise (NoMemoryError if certain else FileNotFoundError)(
            f"{redact(repr(str(path_or_repo)))} is neither a local folder with a {MEMORY_NAME} nor a Hub repository that "
            f"holds one ({type(error).__name__}: {said})."
        ) from (error if said == str(error) else None)  # a traceback would show the secret again


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
    if _is_nested(metadata, 20):
        raise ValueError("the metadata are nested more than 20 deep")


def _is_nested(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_is_nested(v, levels - 1) for v in inner)


def _expanded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file with its accumulators in float32."""
    result = {key: t for key, t in tensors.items() if not key.startswith("accumulator_base/")}
    bases = {key: t for key, t in tensors.items() if key not in result}
    for key, t in result.items():
        if key.startswith("accumulator/"):
            base = bases.pop(key.replace("accumulator/", "accumulator_base/", 1), None)
            fits = base is None or (base.dtype == torch.int16 and base.shape == (-(-t.numel() // 256),))
            if (t.dtype == torch.uint8) != (base is not None) or not fits:
                raise ValueError(f"{_quoted(key)} has dtype {t.dtype} and not the base that belongs to it")
            if t.dtype in (torch.uint8, torch.bfloat16):
                result[key] = expand(t, base)
    if bases:
        raise ValueError(f"there are bases of accumulators that are not there: {_shorten(sorted(bases))}")
    return result


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """What holds for every memory; whether it fits the model, `check_fits` and `Method.check_state` say."""
    for key, t in tensors.items():
        kind, _, name = key.partition("/")
        own = kind in ("accumulator", "initial_head") or kind.startswith("head.")
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


def _shorten(items: list[str], limit: int = 5) -> str:
    shown = [item if item.isprintable() and len(item) < 300 else _quoted(item) for item in items[:limit]]
    return ", ".join(shown) + (f", … ({len(items) - limit} more)" if len(items) > limit else "")
