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
    """Train with the logits `z + tau min(0, log p_new - log p_old)`, predict with z.

    p_new are the label frequencies of the task being trained (one example added to every label), p_old their mean over
    the earlier tasks. A shared head begins a new task by unlearning the labels that are rare in it, and drags the encoder
    along. The term lowers those labels' logits while training, so that part of the drop need not be learned; labels
    that become more frequent are learned as ever.

    After Menon et al. 2021 (arXiv 2007.07314, eq. 10), who correct one long-tailed dataset towards uniform frequencies; the
    minimum is this project's: correcting in both directions costs the new task (docs/log.md). It costs no time: the state
    is one number a label. For single-label classifiers with a shared head.
    """

    name: ClassVar[str] = "logit_adjustment"

    prior_strength: float = field(
        default=0.25,
        metadata={"help": "tau, in [0, 1]: how much of the drop in label frequencies the logits are spared."},
    )

    frequencies: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Label -> its frequency, summed over the tasks."""
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
        new = counts / counts.sum()
        if self.frequencies:
            old = torch.stack([self.frequencies[label].cpu() for label in self._labels])
            self.correction = self.prior_strength * (new / (old / old.sum())).log().clamp(max=0)
            self.frequencies = dict(zip(self._labels, old + new))
        else:
            self.frequencies = dict(zip(self._labels, new))
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
        stored, labels = set(state.get("frequencies", {})), set(bare_model(model).config.id2label.values())
        if stored and stored != labels:
            raise ValueError(
                f"The continual memory was written with the labels {sorted(stored)}, the model has {sorted(labels)}. Load "
                "the model it was saved with, or start without a memory."
            )
        for label, t in state.get("frequencies", {}).items():
            if t.ndim or not 0 < float(t) < float("inf"):
                raise ValueError(
                    f"The continual memory's frequency of {label!r} is {t.tolist()!r:.80}, not a number > 0. Use the memory "
                    "that a run wrote, or start without a memory."
                )

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"frequencies": self.frequencies} if self.frequencies else {}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        if unknown := state.keys() - {"frequencies"}:
            raise ValueError(f"The method {self.name!r} keeps label frequencies, got {sorted(unknown)}")
        self.frequencies = {label: t.float() for label, t in state.get("frequencies", {}).items()}
