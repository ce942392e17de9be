"""What methods on PEFT adapters share: the task's adapter is folded into the base weights when the task ends."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..names import bare_model, canonical_name
from .base import Context, Method

logger = logging.get_logger(__name__)

COMPANIONS = ("replay", "lwf", "logit_adjustment")  # methods that do not look at weights


@dataclass
class FoldedAdapters(Method):
    """Adapters that every task uses afresh: added to the base weights after it, and renewed before the next. What is
    saved between tasks and at the end is a plain model without adapters."""

    folds_adapters = True
    adapter_type: ClassVar[str]
    """PEFT's name for it, as in `PeftConfig.peft_type`."""

    def renew(self, layer: Any, adapter: str) -> None:
        """Make the layer's adapter that of a new task, without effect on the layer's output."""
        raise NotImplementedError

    def neutralise(self, layer: Any, adapter: str, name: str) -> None:
        """Take the effect out of an adapter that was just added to the base weight. `name`: of the layer."""
        raise NotImplementedError

    def layers(self, model: nn.Module) -> Iterator[tuple[str, Any, str]]:
        """`(canonical name, PEFT layer, name of its adapter)`."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                yield canonical_name(name), module, module.active_adapters[0]

    def check(self, context: Context, others: Sequence[Method]) -> None:
        configs = getattr(context.model, "peft_config", {})
        found = [str(getattr(c.peft_type, "value", c.peft_type)) for c in configs.values()]
        strangers = [m.name for m in others if m.name not in COMPANIONS]
        fits = found == [self.adapter_type]
        dtypes = [layer.get_base_layer().weight.dtype for _, layer, _ in self.layers(context.model) if fits]
        problems = {
            f"needs a model with one {self.adapter_type} adapter, got {', '.join(found) or 'none'}. Build it with "
            "peft.get_peft_model.": not fits,
            "changes the base weights, which does not run sharded yet. Use DDP.": context.sharded,
            "begins every task with a new adapter, which an optimizer's memory of the old one does not fit. Pass "
            "--reset_optimizer.": not getattr(context.args, "reset_optimizer", False),
            f"begins every task with a new adapter and cannot be combined with {', '.join(strangers)}, which hold on "
            f"to the old one's weights; {', '.join(COMPANIONS)} can.": strangers,
            "adds to the base weights, which are quantised here.": not all(d.is_floating_point for d in dtypes),
        }
        for problem, found_it in problems.items():
            if found_it:
                raise ValueError(f"The method {self.name!r} {problem}")
        if low := [d for d in dtypes if d.itemsize < 4]:
            logger.warning(f"Adding to {low[0]} weights rounds away much of what a task learned. Load it in float32.")

    @torch.no_grad()
    def prepare_model(self, model: nn.Module, seen_tasks: Sequence[str]) -> None:
        if seen_tasks:
            self.fold(model)  # an adapter that was loaded is part of what the new task begins with
            for _, layer, adapter in self.layers(model):
                self.renew(layer, adapter)

    def after_task(self, context: Context) -> None:
        self.fold(context.model)

    @torch.no_grad()
    def fold(self, model: nn.Module) -> None:
        """Add the adapters to the base weights; what the model answers stays."""
        for name, layer, adapter in self.layers(model):
            layer.merge(adapter_names=[adapter])
            layer.merged_adapters.clear()
            self.neutralise(layer, adapter, name)


def folded_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State of the bare model inside a PEFT model whose adapters have no effect, with heads trained in PEFT's copy."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    bare = bare_model(model)
    adapted = tuple(f"{name}." for name, module in bare.named_modules() if isinstance(module, BaseTunerLayer))
    return {
        canonical_name(key): value
        for key, value in bare.state_dict().items()
        if ".original_module." not in key and (not key.startswith(adapted) or ".base_layer." in key)
    }
