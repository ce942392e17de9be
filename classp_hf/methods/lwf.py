"""Learning without Forgetting: the model answers as the old one did, on the new task's inputs (Li & Hoiem 2016)."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..names import is_language_model, local, reshard, trainable_parameters
from .base import Context, Method, flag


@dataclass
class LwF(Method):
    """Loss term `lambda * T^2 * KL(softmax(old / T) || softmax(new / T))` (arXiv 1606.09282, eq. 2-3).

    It is averaged as the loss is. `old` are the logits of the model as it was at the start of the task, on the new
    task's inputs. The method needs no data of earlier tasks, and costs one more forward pass a step and one more copy
    of the weights. Under FSDP2 the copy is sharded as they are, and the model itself takes the old weights for that
    pass. If the model has logits for every token, only those that predict a token with a label count.

    Raises:
        ValueError: a hyperparameter out of its range; before training, `heads="per_task"`, regression, and several
            labels an example.
    """

    name = "lwf"
    learns_at_end = False
    needs_start = True
    ranges = {"lwf_lambda": (">= 0", lambda v: v >= 0), "lwf_temperature": ("> 0", lambda v: v > 0)}

    lwf_lambda: float = flag(1.0, "Strength of the distillation term.")
    lwf_temperature: float = flag(2.0, "Temperature T of both distributions.")

    teacher: Any = field(default=None, init=False, repr=False)
    """The frozen copy; of a sharded model, whose parameters are exchanged with `weights`, the model itself."""
    weights: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    answers: Tensor | None = field(default=None, init=False, repr=False)
    autocast: Any = field(default=None, init=False, repr=False)

    def check(self, context: Context, others: Sequence[Method]) -> None:
        config = getattr(context.model, "config", None)
        if context.per_task_heads:
            raise ValueError("The method 'lwf' compares the outputs of one head; heads='per_task' has several.")
        if getattr(config, "num_labels", 2) == 1 and not is_language_model(context.model):
            raise ValueError("The method 'lwf' compares probabilities of labels, and the model has one label.")
        if getattr(config, "problem_type", None) == "multi_label_classification":
            raise ValueError("The method 'lwf' compares probabilities of labels that exclude each other.")

    def before_task(self, context: Context) -> None:
        self.teacher, self.weights, self.answers = None, {}, None
        if context.seen_tasks and self.lwf_lambda:
            sharded = reshard(context.model)
            self.weights = context.starting_weights() if sharded else {}
            self.teacher = context.model if sharded else context.frozen_copy()
        self.autocast = context.accelerator.autocast if context.accelerator is not None else nullcontext

    @torch.no_grad()
    def before_forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        if self.teacher is None:
            return
        # a decoder's inputs are made from the labels
        with_labels = is_language_model(self.teacher) and self.teacher.config.is_encoder_decoder
        given = {k: v for k, v in inputs.items() if k != "labels" or with_labels}
        if self.weights:
            self._exchange(model.eval())
        try:
            with self.autocast():
                self.answers = self.teacher(**given)["logits"]
        finally:
            if self.weights:
                self._exchange(model.train())

    def _exchange(self, model: nn.Module) -> None:
        for n, p in trainable_parameters(model):
            now, other = local(p.detach()), local(self.weights[n])
            kept = now.clone()
            now.copy_(other)
            other.copy_(kept)

    def loss_term(self, outputs: Any, inputs: Mapping[str, Tensor], count: Tensor | int | None) -> Tensor | None:
        if "logits" not in outputs:  # said at the first task's first step, not after its training
            raise ValueError("The method 'lwf' compares logits, and this model answers without any.")
        if self.answers is None:
            return None
        new, old, labels = outputs["logits"], self.answers, inputs["labels"]
        self.answers = None
        if new.ndim > 2:
            new, old = (logits[:, -labels.shape[1] :] for logits in (new, old))  # prompt tuning puts some before
            if is_language_model(self.teacher) and not self.teacher.config.is_encoder_decoder:
                # the logits of a causal model are the next token's
                new, old, labels = new[:, :-1], old[:, :-1], labels[:, 1:]
            new, old = (logits[labels != -100] for logits in (new, old))
        T = self.lwf_temperature
        new, old = (F.log_softmax(logits.float() / T, -1) for logits in (new, old))
        divergence = F.kl_div(new, old, reduction="sum", log_target=True)
        return self.lwf_lambda * T * T * divergence / (max(len(new), 1) if count is None else count)

    def after_task(self, context: Context) -> None:
        self.teacher, self.weights = None, {}
