"""Continual-learning metrics on the accuracy matrix.

`matrix` holds the metrics as pure numpy functions, re-exported here; `modules/NAME.py` is the same metric as an
`evaluate.Metric`, for `load(NAME)` or, by path, for `evaluate.load`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from classp_hf.metrics.matrix import (
    METRICS,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    gap_recovered,
    learning_accuracy,
    retained_accuracy,
    summarize,
)

if TYPE_CHECKING:
    import evaluate

__all__ = [
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "gap_recovered",
    "learning_accuracy",
    "load",
    "retained_accuracy",
    "summarize",
]


def load(name: str, **kwargs: Any) -> evaluate.Metric:
    """Load a metric of the accuracy matrix as an `evaluate.Metric`, from this package and without network.

    Args:
        name: name of the metric, e.g. "backward_transfer".
        **kwargs: passed on to `evaluate.load` (`cache_dir`, `experiment_id`, …).

    Returns:
        The metric; `metric.compute(accuracy_matrix=R)` gives `{name: value}`, R of shape (T+1, T).

    Raises:
        ValueError: there is no metric of that name.
    """
    names = [metric.__name__ for metric in METRICS]
    if name not in names:
        raise ValueError(f"There is no metric {name!r} of the accuracy matrix. Choose one of {names}.")
    import evaluate  # here, because it imports torch and transformers

    return evaluate.load(str(Path(__file__).parent / "modules" / f"{name}.py"), **kwargs)
