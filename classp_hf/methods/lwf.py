"""Learning without Forgetting: the new model answers as the old one did, on the new task's inputs (Li & Hoiem
2016)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..names import is_language_model
from .base import Context, Method, flag


@dataclass
class LwF(Method):
    """Loss term `lambda * T^2 * KL(softmax(old / T) || softmax(new / T))` (arXiv 1606.09282, eq. 2-3).

    It is averaged as the loss is. `old` are the logits of a frozen copy of the model at the start of the task, on the
    new task's inputs. The method needs no data of earlier tasks, and costs one more forward pass a step and one more
    copy of the weights. If the model has logits for every token, only those that predict a token with a label count.

    Raises:
        ValueError: a hyperparameter out of its range; before training, FSDP, `heads="per_task"` and a model with one
            label.
    """

    name = "lwf"
    needs_start = True
    ranges = {"lwf_lambda": (">= 0", lambda v: v >= 0), "lwf_temperature": ("> 0", lambda v: v > 0)}

    lwf_lambda: float = flag(1.0, "Strength of the distillation term.")
    lwf_temperature: float = flag(2.0, "Temperature T of both distributions.")

    teacher: Any = field(default=None, init=False, repr=False)
    autocast: Any = field(default=None, init=False, repr=False)

    def check(self, context: Context, others: Sequence[Method]) -> None:
        labels = getattr(getattr(context.model, "config", None), "num_labels", 2)
        if context.sharded:
            raise ValueError("The method 'lwf' keeps a whole copy of the model, which FSDP's shards are not. Use DDP.")
        if context.per_task_heads:
            raise ValueError("The method 'lwf' compares the outputs of one head; heads='per_task' has several.")
        if labels == 1 and not is_language_model(context.model):
            raise ValueError("The method 'lwf' compares probabilities of labels, and the model has one label.")

    def before_task(self, context: Context) -> None:
        self.teacher = context.frozen_copy() if context.seen_tasks and self.lwf_lambda else None
        self.autocast = context.accelerator.autocast if context.accelerator is not None else nullcontext

    def loss_term(self, outputs: Any, inputs: Mapping[str, Tensor], count: Tensor | int | None) -> Tensor | None:
        if self.teacher is None:
            return None
        new, labels = outputs["logits"], inputs["labels"]
        generates = is_language_model(self.teacher)
        made_from_labels = generates and self.teacher.config.is_encoder_decoder  # the decoder's inputs are
        with torch.no_grad(), self.autocast():
            old = self.teacher(**{k: v for k, v in inputs.items() if k != "labels" or made_from_labels})["logits"]
        if new.ndim > 2:
            if generates and not made_from_labels:  # a causal model's logits are the next token's
                new, old, labels = new[:, :-1], old[:, :-1], labels[:, 1:]
            new, old = (logits[labels != -100] for logits in (new, old))
        T = self.lwf_temperature
        new, old = (F.log_softmax(logits.float() / T, -1) for logits in (new, old))
        divergence = F.kl_div(new, old, reduction="sum", log_target=True)
        return self.lwf_lambda * T * T * divergence / (max(len(new), 1) if count is None else count)

    def after_task(self, context: Context) -> None:
        self.teacher = None
