"""Continual-learning metrics of the accuracy matrix: numpy functions (`matrix`), and an `evaluate.Metric` of each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from classp_hf.metrics import matrix
from classp_hf.metrics.matrix import *  # noqa: F403

if TYPE_CHECKING:
    import evaluate

__all__ = [*matrix.__all__, "load"]


def load(name: str, **kwargs: Any) -> evaluate.Metric:
    """Load a metric of the accuracy matrix as an `evaluate.Metric`, from this package and without a network.

    Args:
        name: name of the metric, such as "backward_transfer".
        **kwargs: passed on to `evaluate.load` (`cache_dir`, `experiment_id`, …).

    Returns:
        The metric; `metric.compute(accuracy_matrix=R)` gives `{name: value}`, R of shape (T+1, T).

    Raises:
        ValueError: there is no metric of that name.
        ImportError: `evaluate` is not installed.
    """
    try:
        import evaluate  # here, because it imports torch and transformers
    except ImportError as error:
        raise ImportError('load() needs the evaluate library: pip install "evaluate>=0.4.1"') from error
    return evaluate.load(str(Path(__file__).with_name("accuracy_matrix.py")), name, **kwargs)
