"""CLASSP's memory under DeepSpeed's ZeRO, whose flat buffers hold the states of many parameters.

CLASSP's update is elementwise: a flat buffer is to it one more parameter. What of it belongs to which parameter
DeepSpeed's accessors tell (`deepspeed.utils.safe_get_full_optimizer_state`). Each rank looks at its own gradients:
with DeepSpeed's clipping, Trainer's default, one that is not finite makes those of all ranks so.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .compat import linked_states
from .names import Accumulators, trainable_parameters


def zero_optimizer(optimizer: Any) -> Any | None:
    """`optimizer` if it is ZeRO's, around the one that takes the steps, which is its attribute `optimizer`."""
    base = sys.modules.get("deepspeed.runtime.base_optimizer")  # without it there is none
    return optimizer if base is not None and isinstance(optimizer, base.ZeROOptimizer) else None


def check_zero(plugin: Any, group: Mapping[str, Any], needs_gradients: str | None = None) -> None:
    """Raise a ValueError for what does not run under DeepSpeed: in accelerate's `plugin`, in CLASSP's hyperparameters
    `group`, or what was asked for that reads or changes gradients or weights by parameter, `needs_gradients`."""
    config = plugin.deepspeed_config
    zero = config.get("zero_optimization") or {}
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") or "none"
    parts = "flat buffers hold the gradients of all parameters together"
    for name, wrong, reason in (
        ("offload_optimizer", offload != "none", "another optimizer may take CLASSP's place. Leave it out"),
        ("an optimizer in its configuration", "optimizer" in config, "--optim is not asked. Leave it out"),
        (str(needs_gradients), needs_gradients is not None, f"{parts}. Use FSDP2 or DDP"),
        ("density", group.get("density") is not None, f"{parts}. Use threshold, FSDP2 or DDP"),
        ("state_dtype", group.get("state_dtype", "float32") != "float32", "its accessors know float32 alone"),
    ):
        if wrong:
            raise ValueError(f"DeepSpeed with {name} is not supported: {reason}.")


def link(zero: Any) -> None:
    """Make the accumulators, and tell parameters where theirs is, which DeepSpeed does at the first step."""
    with linked_states(zero):
        for group in zero.optimizer.param_groups:
            for flat in group["params"]:
                if not zero.optimizer.state.get(flat):
                    zero.optimizer.set_accumulator(flat, torch.zeros_like(flat, dtype=torch.float32))


def get_accumulators(zero: Any, model: nn.Module) -> Accumulators:
    """The whole accumulators, on the CPU: each a collective call on every rank."""
    from deepspeed.utils import safe_get_full_optimizer_state

    offset = zero.optimizer.param_groups[0]["offset"]

    def make(p: Tensor) -> Tensor:
        return (safe_get_full_optimizer_state(p, "accumulator") - offset).clamp_(min=0).cpu()

    named = trainable_parameters(model)
    return Accumulators({n: p for n, p in named if hasattr(p, "ds_id") or hasattr(p, "_hp_mapping")}, make)


def set_accumulators(zero: Any, model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Make `values` (canonical name -> whole tensor) the accumulators, each rank its part."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    offset = zero.optimizer.param_groups[0]["offset"]
    p: Any  # with DeepSpeed's own attributes
    for n, p in trainable_parameters(model):
        if n in values:
            whole = values[n].to(p.device, torch.float32) + offset
            if hasattr(p, "ds_id"):  # stage 3: padded to parts of one size, which the other call does not do (0.19)
                size, rank = p.ds_tensor.numel(), torch.distributed.get_rank(p.ds_process_group)
                own = whole.flatten()[rank * size :][:size]
                safe_set_local_optimizer_state(p, nn.functional.pad(own, (0, size - len(own))), "accumulator")
            else:
                safe_set_full_optimizer_state(p, whole, "accumulator")
