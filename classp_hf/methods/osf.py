"""Orthogonal subspace fine-tuning: a task trains the weights' small singular directions only (Nayak et al. 2025)."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from .adapters import FoldedAdapters
from .base import Context, Method


@dataclass
class OSF(FoldedAdapters):
    """ "Sculpting Subspaces" (arXiv 2504.07097) by PEFT's own tuner, decomposing the weights again before every task.

    Each adapted weight is split by its SVD. The large singular directions are frozen, and the others are trained with
    gradients orthogonal to them. Before the next task the present weights are split again, so that what the last task
    learned can become part of the frozen directions. Their rank is `effective_rank` of `peft.OSFConfig`, the same for
    all tasks (the paper chooses it by layer and task).

    Raises:
        ValueError: before training, peft below 0.21, a model without exactly one OSF adapter, and what `OLoRA` also
            refuses: FSDP, quantised weights, `reset_optimizer=False` and most other methods.
    """

    name = "osf"
    adapter_type = "OSF"

    def check(self, context: Context, others: Sequence[Method]) -> None:
        if Version(version("peft")).release < (0, 21):  # its layers do not keep the factors they began with
            raise ValueError(f"The method 'osf' needs peft >= 0.21, got {version('peft')}: pip install -U peft.")
        super().check(context, others)

    def renew(self, layer: Any, adapter: str) -> None:
        from peft.tuners.osf.utils import decompose_weight_matrix

        parts = decompose_weight_matrix(layer.get_base_layer().weight.data, layer.effective_rank[adapter])
        for part in ("U_low", "S_low", "V_low"):
            layer.osf_svd_params[adapter][part].copy_(parts[part])
            getattr(layer, f"_osf_{part}_init")[adapter].copy_(parts[part])
        for part in ("U_high", "V_high"):
            if adapter in (kept := getattr(layer, f"_osf_{part}")):  # PEFT keeps what it cannot derive
                kept[adapter].copy_(parts[part])

    def neutralise(self, layer: Any, adapter: str, name: str) -> None:
        for part in ("U_low", "S_low", "V_low"):
            getattr(layer, f"_osf_{part}_init")[adapter].copy_(layer.osf_svd_params[adapter][part])
