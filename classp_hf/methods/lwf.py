"""Learning without Forgetting: the new model answers as the old one did, on the new task's inputs (Li & Hoiem 2016)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Method

if TYPE_CHECKING:
    from ..tasks import Task
    from ..trainer import ContinualTrainer


@dataclass
class LwF(Method):
    """Loss term `lambda * T^2 * KL(softmax(old / T) || softmax(new / T))` (arXiv 1606.09282, eq. 2-3), mean over examples.

    `old` are the logits of a frozen copy of the model as the task found it. No data of earlier tasks; the cost is one
    more forward pass a step and one more copy of the weights. With logits a token, the mean is over the tokens that
    `attention_mask` shows, of encoder-decoders over those that have a label.
    """

    name: ClassVar[str] = "lwf"

    lwf_lambda: float = field(default=1.0, metadata={"help": "Strength of the distillation term."})
    lwf_temperature: float = field(default=2.0, metadata={"help": "Temperature T of both distributions."})

    teacher: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.lwf_lambda >= 0:
            raise ValueError(f"lwf_lambda must be >= 0, got {self.lwf_lambda}")
        if not self.lwf_temperature > 0:
            raise ValueError(f"lwf_temperature must be > 0, got {self.lwf_temperature}")

    def check_trainer(self, trainer: ContinualTrainer) -> None:
        if trainer.is_fsdp_enabled:
            raise ValueError(
                "The method 'lwf' keeps a whole copy of the model, which does not run sharded yet. Use DDP."
            )
        if trainer.task_heads is not None:
            raise ValueError("The method 'lwf' compares the outputs of one head; heads='per_task' has several.")

    def before_task(self, trainer: ContinualTrainer, task: Task) -> None:
        self.teacher = None
        if not trainer.seen_tasks or not self.lwf_lambda:
            return
        self.teacher = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model))
        for wrapped in ("forward", "_original_forward"):  # accelerate's autocast wrapper would call the new model
            self.teacher.__dict__.pop(wrapped, None)
        self.teacher.eval().requires_grad_(False)
        self._autocast = trainer.accelerator.autocast

    def penalty(self, model: nn.Module, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
        if self.teacher is None:
            return None
        new = outputs["logits"]
        self.teacher.to(new.device)
        with torch.no_grad(), self._autocast():
            # the inputs of an encoder-decoder are made from the labels
            encoder_decoder = getattr(self.teacher.config, "is_encoder_decoder", False)
            old = self.teacher(**{k: v for k, v in inputs.items() if k != "labels" or encoder_decoder})["logits"]
        T = self.lwf_temperature
        divergence = F.kl_div(
            F.log_softmax(new.float() / T, -1), F.log_softmax(old.float() / T, -1), reduction="none", log_target=True
        ).sum(-1)
        shown = inputs["labels"] != -100 if encoder_decoder else inputs.get("attention_mask")
        if divergence.ndim > 1 and shown is not None and shown.shape == divergence.shape:
            divergence = divergence[shown.bool()]
        return self.lwf_lambda * T * T * divergence.mean()

    def after_task(self, trainer: ContinualTrainer, task: Task) -> None:
        self.teacher = None
