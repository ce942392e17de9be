"""What a run leaves to be gone on from, and reads back: state file, checkpoints, weights and optimizer at a
boundary."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn, no_grad
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .compat import load_whole, saved_weights
from .methods.adapters import folded_state_dict
from .names import (
    canonical_name,
    full_tensor,
    has_adapters,
    like_parameter,
    local,
    reshard,
    trainable_parameters,
)

TRAINER_STATE = "trainer_state.json"


def optimizer_state(optimizer: Any, model: nn.Module, keep: bool = True) -> dict[str, Any]:
    """The optimizer's state by parameter name and unsharded, for any number of processes. Call it on every rank; one
    that does not `keep` it holds a single whole tensor at a time."""
    state: dict[str, Any] = {}
    for n, p in trainable_parameters(model):
        for k, v in optimizer.state.get(p, {}).items():
            whole = full_tensor(v).cpu() if isinstance(v, Tensor) else v
            if keep:
                state.setdefault(n, {})[k] = whole
    return {"state": state}


def load_optimizer_state(optimizer: Any, model: nn.Module, state: dict[str, Any]) -> None:
    """Take back what `optimizer_state` gave. The groups, which this task's schedule has set, stay as they are."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    positions = {p: i for i, p in enumerate(parameters)}
    by_name = state["state"]
    by_position = {
        positions[p]: {
            k: like_parameter(v, p.detach(), v.dtype) if isinstance(v, Tensor) and v.shape == p.shape else v
            for k, v in by_name[n].items()
        }
        for n, p in trainable_parameters(model)
        if n in by_name
    }
    optimizer.load_state_dict({"state": by_position, "param_groups": optimizer.state_dict()["param_groups"]})


def load_weights(model: Any, folder: Path) -> None:
    """Read back what `save_model` wrote into `folder`: adapters or a whole model, sharded files or one."""
    if not has_adapters(model) and reshard(model):  # the same trainer once more, after an error
        saved = saved_weights(model, folder)
        with no_grad():
            for name, tensor in model.state_dict().items():
                local(tensor).copy_(local(like_parameter(saved[canonical_name(name)], tensor, tensor.dtype)))
    elif not has_adapters(model):
        load_whole(model, folder)
    elif adapters := [f for f in (folder, folder / model.active_adapter) if (f / "adapter_config.json").is_file()]:
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(adapters[0]), device="cpu"), model.active_adapter)
    else:  # a whole model, whose adapters were folded into it
        saved = saved_weights(model, folder)
        with no_grad():
            for name, tensor in folded_state_dict(model).items():
                tensor.copy_(saved[name])


def checkpoints(folder: Path) -> list[Path]:
    """Trainer's own; a copy under another name (`checkpoint-best`) is a user's."""
    named = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
    return sorted(path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if named.fullmatch(path.name))


def last_complete_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint in `folder`, the same on every rank."""
    found = [c for c in checkpoints(folder) if is_complete(c)]
    last = max(found, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)
    return broadcast_object_list([last and str(last)])[0]


def is_complete(checkpoint: Path) -> bool:
    """Whether `trainer_state.json`, which is written last, is whole."""
    try:
        json.loads((checkpoint / TRAINER_STATE).read_text())
    except (OSError, ValueError):  # not there, or cut off
        return False
    return True


def read_state(path: Path) -> dict[str, Any]:
    """The state of a sequence from its file; a ValueError for anything that no sequence writes."""

    def numbers(value: Any, *shape: int) -> bool:
        array = np.asarray(value)
        return array.dtype.kind in "if" and array.shape == shape and bool(np.isfinite(array).all())

    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        rows, T = state["accuracy_matrix"], len(state["config"]["tasks"])
        sound = (
            numbers(rows, len(rows), T)
            and len(rows) <= T + 1
            and numbers(state["steps"], len(rows) - 1)
            and numbers([state["seconds"], state["boundary_seconds"]], 2)
            and set(state["informed"]) == {"tasks", "methods"}
            and all(numbers(means, len(means)) for means in state["importance"].values())
            and isinstance(state.get("optimizer", {}), dict)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        sound = False
    if not sound:
        raise ValueError(
            f"{path} is not what an interrupted sequence leaves: it is damaged, or was edited. Restore it, or choose "
            "another output_dir."
        )
    return state
