"""Logit adjustment: tasks differ in how often each label occurs; the model need not unlearn the old frequencies."""

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..classification import is_single_label_classifier
from ..names import bare_model
from .base import Context, Method, flag


@dataclass
class LogitAdjustment(Method):
    """Train with the logits `z + tau min(0, log p_new - log p_old)`, predict with z.

    p_new are the label frequencies of the training data (one example added to every label), p_old the mean of the
    earlier tasks' frequencies; a label that they did not have counts as one example. A shared head begins a new task
    by unlearning the labels that are rare in it, which changes the encoder too. The term lowers those labels' logits
    while training, so that part of the drop need not be learned. It does not change labels that become more frequent.

    After Menon et al. 2021 (arXiv 2007.07314, eq. 10), who correct one long-tailed dataset towards uniform
    frequencies; the minimum is this project's, because correcting in both directions costs the new task
    (docs/log.md). The state is one number a label, and the cost in time is negligible.

    Raises:
        ValueError: `prior_strength` out of its range; before training, a model that is not a single-label classifier
            with one shared head; when training begins, a dataset without a length or a column of labels.
    """

    name = "logit_adjustment"
    parts = ("frequencies",)
    positive = {"frequencies": "frequency"}
    ranges = {"prior_strength": ("in [0, 1]", lambda v: 0 <= v <= 1)}

    prior_strength: float = flag(0.25, "tau, in [0, 1]: how much of the drop in frequencies the logits are spared.")

    frequencies: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Label -> its frequency, summed over the tasks that have ended."""
    correction: Tensor | None = field(default=None, init=False, repr=False)

    def check(self, context: Context, others: Sequence[Method]) -> None:
        if not is_single_label_classifier(context.model) or context.per_task_heads:
            raise ValueError(
                "The method 'logit_adjustment' needs a single-label classifier with one shared head: it corrects the "
                "frequencies of the labels. Leave it out of --method."
            )

    def before_task(self, context: Context) -> None:
        new, one = _frequencies(context.train_dataset, context.model)
        self.correction = None
        if total := math.fsum(map(float, self.frequencies.values())):  # the number of earlier tasks
            old = torch.stack([self.frequencies[n] / total if n in self.frequencies else one for n in new])
            self.correction = self.prior_strength * (torch.stack(list(new.values())) / old).log().clamp(max=0)

    def adjust_logits(self, logits: Tensor) -> Tensor:
        return logits if self.correction is None else logits + self.correction.to(logits.device)

    def after_task(self, context: Context) -> None:
        new, _ = _frequencies(context.task_dataset, context.model)
        self.frequencies |= {n: self.frequencies.get(n, 0) + f for n, f in new.items()}
        self.correction = None


def label_column(dataset: Any) -> str | None:
    """The column that holds the labels of a dataset of known length; None if there is none."""
    columns = (getattr(dataset, "column_names", None) or ()) if isinstance(dataset, Sized) else ()
    return next((c for c in ("labels", "label", "label_ids") if c in columns), None)


def _frequencies(dataset: Any, model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """Label -> frequency in the dataset, one example added to every label, and the frequency of one example."""
    column = label_column(dataset)
    if column is None:
        raise ValueError(
            "Method 'logit_adjustment' needs a dataset of known length with a column 'labels' or 'label', got a "
            f"{type(dataset).__name__} with the columns {getattr(dataset, 'column_names', None)}. Drop the method."
        )
    id2label = bare_model(model).config.id2label
    counts = torch.bincount(torch.as_tensor(dataset[column][:]), minlength=len(id2label)).float() + 1
    return {id2label[i]: f for i, f in enumerate(counts / counts.sum())}, 1 / counts.sum()
