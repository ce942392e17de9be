"""Which tensors of a continual memory belong to a model, told by name, shape and a few values of every weight."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .memory import ContinualMemory, shorten
from .names import bare_model, by_training, canonical_name, full_shape, full_tensor, samples


@dataclass
class Match:
    """Which accumulators of a memory belong to a model, by canonical name.

    Attributes:
        replaced: names of parameters that were initialised again since it was written.
        accumulators: of parameters that are trained, in the parameter's shape.
        kept: of parameters that are frozen now or not in the model: they stay in the file.
        notes: what was done, one clause each.
    """

    replaced: set[str]
    accumulators: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def named_as_in(model: nn.Module, memory: ContinualMemory) -> ContinualMemory:
    """`memory` with the names that the parameters have in `model`: a base model (`AutoModel`) lacks the
    `base_model_prefix` of one with a head, and sentence-transformers puts it into a module of a list."""
    prefixes = (getattr(module, "base_model_prefix", "") for module in model.modules())
    before = re.compile(rf"^(0\.(auto_)?model\.)?({re.escape(next(filter(None, prefixes), ''))}\.)?")
    own = [canonical_name(n) for n, _ in model.named_parameters()]
    new_names = {before.sub("", n): n for n in own} | {n: n for n in own}
    tensors = {}
    for key, t in memory.tensors.items():
        kind, _, name = key.partition("/")
        own_name = canonical_name(name)  # version 0.2 had others under prompt tuning; some are a task's
        tensors[f"{kind}/{new_names.get(own_name) or new_names.get(before.sub('', own_name), name)}"] = t
    return ContinualMemory(tensors, memory.metadata)


def match_accumulators(
    memory: ContinualMemory, model: nn.Module, excluded: frozenset[str] = frozenset(), same_run: bool = False
) -> Match:
    """Match the accumulators of `memory` with the parameters of `model`, by the rules in docs/architecture.md.

    Args:
        excluded: parameters that have no memory (per-task heads).
        same_run: the memory is that of a checkpoint of this run, whose weights may not be in the model yet.

    Raises:
        ValueError: less than a tenth of it fits: it belongs to another model.
    """
    stored = {n: t for n, t in memory.get("accumulator").items() if n not in excluded}
    parameters = {canonical_name(n): p for n, p in by_training(model)}
    fitting = match_rows(stored, model, zeros=True)
    written = {} if same_run else memory.get("samples")
    written = {n: t for n, t in written.items() if n not in stored or fitting.get(n) is stored[n]}  # of its own shape
    changed, compared = _changed(written, model), len(written.keys() & parameters.keys())
    replaced = {n for n, distance in changed.items() if distance > 0.5 and 2 * len(changed) < compared}
    result, dropped, needed, used = Match(replaced=replaced), 0, 0, 0
    for n, t in stored.items():
        p, adapter = parameters.get(n), _is_adapter(n)
        if adapter and not same_run and _is_fresh(n, parameters):
            dropped += 1
            continue
        if p is None:
            result.kept[n] = t
        elif n in fitting and n not in replaced:
            (result.accumulators if p.requires_grad else result.kept)[n] = fitting[n]
            used += fitting[n].numel()
            if t.shape != (shape := full_shape(p)):
                result.notes.append(f"{n} keeps {min(shape[0], len(t))} rows of {len(t)} and has {shape[0]}")
        needed += 0 if adapter and n in result.kept else t.numel()
    own = {n for n, p in parameters.items() if p.requires_grad} - excluded
    if used < 0.1 * needed:
        begun = f"; {len(replaced)} of the model's parameters were initialised again" if replaced else ""
        raise ValueError(
            f"The continual memory does not fit this model: of its {len(stored)} tensors "
            f"({shorten(sorted(stored), 2)}) {len(result.accumulators)} have the name and shape of a parameter that "
            f"is trained ({shorten(sorted(own), 2)}){begun}. It belongs to another model or adapter; start without a "
            "memory, or load that one."
        )
    empty = sorted(own - result.accumulators.keys()) if stored else []
    anew, kept, trained = sorted(replaced - stored.keys()), len(result.kept), len(changed.keys() - replaced)
    notes = {
        f"{len(empty)} parameters begin without a memory ({shorten(empty, 2)})": empty,
        f"{len(anew)} parameters were initialised again ({shorten(anew, 2)})": anew,
        f"{kept} tensors are kept for parameters that are frozen or not in this model": kept,
        f"that of {dropped} adapter weights is dropped, for that adapter is merged or new": dropped,
        f"{trained} of {compared} parameters were changed after it was written, by a training or a merge that it "
        "knows nothing of": trained,
    }
    result.notes += [note for note, holds in notes.items() if holds]
    return result


def match_rows(stored: Mapping[str, Tensor], model: nn.Module, zeros: bool) -> dict[str, Tensor]:
    """Of `stored` (canonical name -> tensor of the parameter's shape) what fits `model`; new rows of an embedding, or
    of an output layer over the vocabulary, are 0 or, unless `zeros`, the parameter's own."""
    output = getattr(bare_model(model), "get_output_embeddings", lambda: None)()
    per_token = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    per_token |= {id(getattr(output, "weight", None)), id(getattr(output, "bias", None))}
    result: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        n, shape = canonical_name(name), full_shape(p)
        if (t := stored.get(n)) is None:
            continue
        if t.shape == shape:
            result[n] = t
        elif id(p) in per_token and t.ndim == len(shape) and t.shape[1:] == shape[1:]:
            result[n] = torch.zeros(shape) if zeros else full_tensor(p).float().cpu().clone()
            rows = min(len(t), shape[0])
            result[n][:rows] = t[:rows]
    return result


def _changed(written: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
    """Parameters whose values are not those `written`, up to bfloat16's rounding -> their distance (1: from 0)."""
    now = samples(model) if written else {}
    pairs = {n: (t.float(), now[n]) for n, t in written.items() if n in now and t.shape == now[n].shape}
    return {
        n: float((old - new).norm() / old.norm().clamp(min=1e-12))
        for n, (old, new) in pairs.items()
        if not torch.allclose(old, new, rtol=2**-7, atol=1e-6)
    }


def _is_adapter(name: str) -> bool:
    # PEFT's own table, without importing it where no adapter can be
    peft = sys.modules.get("peft")
    prefixes = tuple(peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.values()) if peft is not None else ("lora_",)
    return any(part.startswith(prefixes) for part in name.split("."))


def _is_fresh(name: str, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether the adapter is not in the model, or has not learned yet: a LoRA, DoRA, VeRA or IA3 that still is what
    such a one begins as. Of other kinds it is not known."""
    if name not in parameters:
        return True
    first = re.sub(r"lora_(?:(embedding_)?[AB]|magnitude_vector)\b", r"lora_\1B", name)
    p = parameters.get(first.replace("vera_lambda_d", "vera_lambda_b"))
    begins = 1.0 if ".ia3_l." in name else 0.0 if ".lora_" in name or ".vera_lambda_" in name else None
    return p is not None and begins is not None and bool((full_tensor(p) == begins).all())
