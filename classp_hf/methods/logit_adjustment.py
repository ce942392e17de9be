"""Logit adjustment: tasks differ in how often each label occurs; the model need not unlearn the old frequencies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory import bare_model
from .base import Method

if TYPE_CHECKING:
    from datasets import Dataset

    from ..tasks import Task
    from ..trainer import ContinualTrainer


@dataclass
class LogitAdjustment(Method):
    """Train with the logits `z + tau (log p_new - log p_old)`, predict with z (after Menon et al. 2021, arXiv 2007.07314).

    p_new are the label frequencies of the task being trained (one example added to every label), log p_old what the
    shared head holds already: log p_1 after the first task, then `log p_old + (1 - tau) (log p_new - log p_old)`. With
    tau = 1 the head keeps the frequencies of the first task; with tau = 0 this is plain training. Menon et al. correct
    one long-tailed dataset towards uniform frequencies; here a later task is corrected towards the earlier ones.

    Without it, a shared head first unlearns the labels that are rare in the new task, and drags the encoder along. It
    costs nothing: the state is one number a label. For single-label classifiers with a shared head.
    """

    name: ClassVar[str] = "logit_adjustment"

    prior_strength: float = field(
        default=1.0,
        metadata={"help": "tau, in [0, 1]: how much of the change in label frequencies is kept off the model."},
    )

    log_prior: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    correction: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.prior_strength <= 1:
            raise ValueError(f"prior_strength must be in [0, 1], got {self.prior_strength}")

    def check_trainer(self, trainer: ContinualTrainer) -> None:
        if not trainer.classifies or trainer.task_heads is not None:
            raise ValueError(
                "The method 'logit_adjustment' needs a single-label classifier with one shared head: it corrects the "
                "frequencies of the labels. Leave it out of --method."
            )

    def before_task(self, trainer: ContinualTrainer, task: Task) -> None:
        id2label = bare_model(trainer.model).config.id2label
        self._labels = [id2label[i] for i in range(len(id2label))]

    def extend_train_dataset(self, dataset: Dataset, earlier: Sequence[Dataset]) -> Dataset:
        counts = torch.bincount(torch.tensor(dataset["labels"][:]), minlength=len(self._labels)).float() + 1
        new = (counts / counts.sum()).log()
        if self.log_prior:
            old = torch.stack([self.log_prior[label].cpu() for label in self._labels])
            self.correction = self.prior_strength * (new - old)
            new = new - self.correction
        self.log_prior = dict(zip(self._labels, new))
        return dataset

    def penalty(self, model: nn.Module, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
        if self.correction is None:
            return None
        logits = outputs["logits"].float()
        self.correction = self.correction.to(logits.device)
        labels = inputs["labels"].view(-1)
        return F.cross_entropy(logits + self.correction, labels) - F.cross_entropy(logits, labels)

    def after_task(self, trainer: ContinualTrainer, task: Task) -> None:
        self.correction = None

    def check_state(self, state: Mapping[str, Mapping[str, Tensor]], model: nn.Module) -> None:
        stored, labels = set(state.get("log_prior", {})), set(bare_model(model).config.id2label.values())
        if stored and stored != labels:
            raise ValueError(
                f"The continual memory was written with the labels {sorted(stored)}, the model has {sorted(labels)}. Load "
                "the model it was saved with, or start without a memory."
            )

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"log_prior": self.log_prior} if self.log_prior else {}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        if unknown := state.keys() - {"log_prior"}:
            raise ValueError(f"The method {self.name!r} keeps a log_prior, got {sorted(unknown)}")
        self.log_prior = {label: t.float() for label, t in state.get("log_prior", {}).items()}
