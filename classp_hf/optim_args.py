"""The value of `--optim_args` for `--optim classp`: what it may hold, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .optim import CLASSP


def _boolean(text: str) -> bool:
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]


OPTIM_ARGS: dict[str, Callable[[str], Any]] = {
    **{"threshold": float, "power": float, "eps": float, "apply_decay": _boolean, "density": float},
    **{"maximize": _boolean, "foreach": _boolean, "fused": _boolean, "state_dtype": str},
}
"""What `--optim_args` may set of the optimizer. `lr` and `weight_decay` have flags of their own."""

MEMORY_ARGS: dict[str, Callable[[str], Any]] = {"anchor_strength": float, "merge_weight": float, "memory": str}
"""Of an older version: strengths of `Elastic` and `Merge`, and the memory to go on from (path, Hub id or `none`)."""


def parse_optim_args(optim_args: str | Mapping[str, str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cast and check `"key=value,key=value"`, each split at its first `=`, or transformers' mapping of strings.

    Returns what is for CLASSP, and the keys of `MEMORY_ARGS`. ValueError: an unknown key, a value that does not parse
    or is out of range, or text that is not `key=value`.
    """
    if isinstance(optim_args, str):
        pairs = [part.partition("=") for part in optim_args.split(",") if part.strip()]
        if malformed := [key.strip() for key, equals, _ in pairs if not equals]:
            raise ValueError(f"--optim_args must be key=value pairs separated by commas, got {malformed[0]!r}.")
        optim_args = {key.strip(): value.strip() for key, _, value in pairs}
    known, result = OPTIM_ARGS | MEMORY_ARGS, {}
    for key, text in (optim_args or {}).items():
        if key not in known:
            hint = {"lr": " (use --learning_rate)", "weight_decay": " (use --weight_decay)"}.get(key, "")
            raise ValueError(f"Unknown key {key!r} in --optim_args{hint}. CLASSP knows: {', '.join(known)}.")
        try:
            result[key] = known[key](text)
        except (ValueError, KeyError):
            kind = "true or false" if known[key] is _boolean else "a number"
            raise ValueError(f"{key}={text} in --optim_args does not parse: {key} must be {kind}.") from None
    optimizer, memory = ({k: v for k, v in result.items() if k in keys} for keys in (OPTIM_ARGS, MEMORY_ARGS))
    CLASSP([torch.zeros(1)], lr=0.0, **optimizer)  # its own range checks, before any training time is lost
    for key in ("anchor_strength", "merge_weight"):
        if not 0 <= memory.get(key, 0.0) < float("inf"):
            raise ValueError(f"{key} must be finite and >= 0, got {memory[key]} in --optim_args.")
    return optimizer, memory
