"""The metrics of `classp_hf.metrics.matrix` for `evaluate`: `evaluate.load("…/accuracy_matrix.py", "forgetting")`."""

import inspect
from typing import Any

import datasets
import evaluate

from classp_hf.metrics import matrix

_INPUTS = """
Args:
    accuracy_matrix (`list[list[float]]`): R, T+1 rows of T values; row 0 before any training, row t after task t.
Returns:
    {name}: nan where it is not defined.
Raises:
    ValueError: the matrix is not (T+1) x T with T >= 1, or not finite.
Example:
    >>> import classp_hf.metrics
    >>> metric = classp_hf.metrics.load("{name}")
    >>> metric.compute(accuracy_matrix={R})
    {{'{name}': {value}}}
"""
_EXAMPLE = [[0.25, 0.25], [1.0, 0.375], [0.75, 0.875]]
_CITATIONS = {
    "Lopez-Paz": """@inproceedings{lopezpaz2017gradient,
  title = {Gradient Episodic Memory for Continual Learning},
  author = {Lopez-Paz, David and Ranzato, Marc'Aurelio},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2017}\n}""",
    "Chaudhry": """@inproceedings{chaudhry2018riemannian,
  title = {Riemannian Walk for Incremental Learning: Understanding Forgetting and Intransigence},
  author = {Chaudhry, Arslan and Dokania, Puneet K. and Ajanthan, Thalaiyasingam and Torr, Philip H. S.},
  booktitle = {European Conference on Computer Vision},
  year = {2018}\n}""",
    "Riemer": """@inproceedings{riemer2019learning,
  title = {Learning to Learn without Forgetting by Maximizing Transfer and Minimizing Interference},
  author = {Riemer, Matthew and Cases, Ignacio and Ajemian, Robert and Liu, Miao and Rish, Irina and Tu, Yuhai and
    Tesauro, Gerald},
  booktitle = {International Conference on Learning Representations},
  year = {2019}\n}""",
}


class AccuracyMatrix(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        functions = {function.__name__: function for function in matrix.METRICS}
        if self.config_name not in functions:
            raise ValueError(
                f"Unknown metric {self.config_name!r} of the accuracy matrix. Choose one of {[*functions]}."
            )
        self.function = functions[self.config_name]
        description = inspect.getdoc(self.function) or ""
        citation = next((c for author, c in _CITATIONS.items() if f"Source: {author}" in description), "")
        inputs = _INPUTS.format(name=self.config_name, R=_EXAMPLE, value=self.function(_EXAMPLE))
        features = datasets.Features({"accuracy_matrix": datasets.Sequence(datasets.Value("float64"))})
        return evaluate.MetricInfo(description, citation, features, inputs_description=inputs)

    def _compute(self, *, accuracy_matrix: Any) -> dict[str, Any]:
        return {self.config_name: self.function(accuracy_matrix)}
