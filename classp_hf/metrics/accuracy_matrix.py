"""The metrics of `classp_hf.metrics` for `evaluate`: `evaluate.load("…/accuracy_matrix.py", "forgetting")`."""

import inspect
from typing import Any

import datasets
import evaluate

from classp_hf import metrics

_INPUTS = """
Args:
    accuracy_matrix (`list[list[float]]`): R, T+1 rows of T values; row 0 before any training, row t after task t.
Raises:
    ValueError: the matrix is not (T+1) x T with T >= 1, or not finite.
Example:
    >>> import classp_hf.metrics
    >>> metric = classp_hf.metrics.load("forgetting")
    >>> metric.compute(accuracy_matrix=[[0.25, 0.25], [1.0, 0.375], [0.75, 0.875]])
    {'forgetting': 0.25}
"""


class AccuracyMatrix(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        names = [function.__name__ for function in metrics.METRICS]
        if self.config_name not in names:
            raise ValueError(f"Unknown metric {self.config_name!r} of the accuracy matrix. Choose one of {names}.")
        description = inspect.getdoc(getattr(metrics, self.config_name)) or ""
        features = datasets.Features({"accuracy_matrix": datasets.Sequence(datasets.Value("float64"))})
        citation = description.partition("Source: ")[2]
        return evaluate.MetricInfo(description, citation, features, inputs_description=_INPUTS)

    def _compute(self, *, accuracy_matrix: Any) -> dict[str, Any]:
        return {self.config_name: getattr(metrics, self.config_name)(accuracy_matrix)}
