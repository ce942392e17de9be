"""What the trainers assume of a single-label text classifier: its loss, and the metric that fills R."""

from typing import Any

import numpy as np
from torch import Tensor, nn

from .names import bare_model, model_class


def classification_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy summed over the batch and divided by `num_items_in_batch` (its mean when that is None), with
    `label_smoothing` in [0, 1] as in `torch.nn.functional.cross_entropy`. Raises `ValueError` for float labels.

    Many encoders of Transformers average over the micro-batch whatever `num_items_in_batch` says, while Trainer takes
    every model whose `forward` has `**kwargs` to honour it: their gradients grow with the accumulation steps and with
    the number of ranks.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    if labels.is_floating_point():
        raise ValueError(
            f"The labels are {labels.dtype}, not class ids. For several labels an example build the model with "
            'problem_type="multi_label_classification", for regression with num_labels=1.'
        )
    how = {"reduction": "mean" if num_items_in_batch is None else "sum", "label_smoothing": label_smoothing}
    loss = nn.functional.cross_entropy(logits.float(), labels.to(logits.device), **how)  # type: ignore[arg-type]
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def is_single_label_classifier(model: nn.Module) -> bool:
    bare, kind = bare_model(model), model_class(model)
    kind = next(cls for cls in kind.__mro__ if "forward" in vars(cls))  # a user's own may have a loss of its own
    if not (kind.__module__.startswith("transformers.") and kind.__name__.endswith("ForSequenceClassification")):
        return False
    return bare.config.num_labels > 1 and bare.config.problem_type in (None, "single_label_classification")


def accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    labels = prediction.label_ids  # `preprocess_logits_for_metrics` may have chosen the classes already
    chosen = logits if np.ndim(logits) == np.ndim(labels) else np.argmax(logits, axis=-1)
    return {"accuracy": float(np.mean(chosen == labels))}
