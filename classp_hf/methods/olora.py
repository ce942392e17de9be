"""O-LoRA: a LoRA a task, each in directions orthogonal to the earlier ones' (Wang et al. 2023)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import FoldedAdapters
from .base import Context, Method, flag


@dataclass
class OLoRA(FoldedAdapters):
    """Penalty `lambda * sum_{i<t} ||A_i A_t^T||_F^2` on the LoRA factors A of every layer (arXiv 2310.14152, eq. 9).

    It is applied as a gradient term. An adapter is merged into the base weights when its task ends; only its A's are
    kept, rank x in_features numbers a layer and task. The authors' code sums absolute values, unlike the paper.

    Raises:
        ValueError: `olora_lambda` out of its range; before training, a model without exactly one LoRA adapter
            (`peft.LoraConfig`) or with one on embeddings or with `lora_bias`, FSDP, quantised base weights,
            `reset_optimizer=False`, or other methods than `replay`, `lwf` and `logit_adjustment`.
    """

    name = "olora"
    adapter_type = "LORA"
    parts = ("directions",)
    ranges = {"olora_lambda": (">= 0", lambda v: v >= 0)}

    olora_lambda: float = flag(0.5, "Strength of the orthogonality to earlier adapters.")

    directions: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Canonical name of the layer -> all earlier A's, (tasks * rank, in_features), float32."""

    def check(self, context: Context, others: Sequence[Method]) -> None:
        super().check(context, others)
        for name, layer, adapter in self.layers(context.model):
            if adapter not in layer.lora_A or layer.lora_bias.get(adapter):
                raise ValueError(
                    f"{name!r} is an embedding or has lora_bias; 'olora' takes none: leave it out of target_modules."
                )

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        if not self.directions or not self.olora_lambda:
            return
        for name, layer, adapter in self.layers(model):
            A = layer.lora_A[adapter].weight
            if name in self.directions and A.grad is not None:
                old = self.directions[name] = self.directions[name].to(A.device)
                A.grad.add_((A.float() @ old.T @ old).to(A.dtype), alpha=2 * self.olora_lambda)

    def renew(self, layer: Any, adapter: str) -> None:
        layer.reset_lora_parameters(adapter, init_lora_weights=True)

    def neutralise(self, layer: Any, adapter: str, name: str) -> None:
        if layer.lora_B[adapter].weight.any():  # else it was never trained
            A = layer.lora_A[adapter].weight.detach().float().clone()
            old = self.directions.get(name)
            self.directions[name] = A if old is None else torch.cat([old.to(A.device), A])
            layer.lora_B[adapter].weight.zero_()

    def check_state(self, state: Mapping[str, Mapping[str, Tensor]], model: nn.Module) -> None:
        widths = {name: layer.in_features for name, layer, _ in self.layers(model)}
        for name, old in state.get("directions", {}).items():
            width = widths.get(name)
            if old.ndim != 2 or old.shape[1] != width:
                raise ValueError(
                    f"The memory holds LoRA directions of shape {tuple(old.shape)} for {name!r}, where the model has "
                    f"{'no adapter' if width is None else f'inputs of width {width}'}. Load the model it is of."
                )
