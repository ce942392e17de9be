"""What the six `evaluate.Metric` modules share: input, documentation, and how they call their function.

`evaluate.load` copies a module's file into its cache and takes the first metric class it finds in there. So a module
imports this file, never the class `MatrixMetric` itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import datasets
import evaluate

_INPUTS = """
Args:
    accuracy_matrix (list of T+1 lists of T floats): R; row 0 before any training, row t after task t; column j is
        the accuracy on task j.
Returns:
    {name}: nan where it is not defined.
Raises:
    ValueError: the matrix is not (T+1) x T with T >= 1, or not finite.
Example:
    >>> from classp_hf.metrics import load
    >>> metric = load("{name}")
    >>> metric.compute(accuracy_matrix=[[0.25, 0.25], [1.0, 0.375], [0.75, 0.875]])
    {{'{name}': {example}}}
"""

LOPEZ_PAZ_2017 = """\
@inproceedings{lopezpaz2017gradient,
  title     = {Gradient Episodic Memory for Continual Learning},
  author    = {Lopez-Paz, David and Ranzato, Marc'Aurelio},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2017}
}"""
CHAUDHRY_2018 = """\
@inproceedings{chaudhry2018riemannian,
  title     = {Riemannian Walk for Incremental Learning: Understanding Forgetting and Intransigence},
  author    = {Chaudhry, Arslan and Dokania, Puneet K. and Ajanthan, Thalaiyasingam and Torr, Philip H. S.},
  booktitle = {European Conference on Computer Vision},
  year      = {2018}
}"""
RIEMER_2019 = """\
@inproceedings{riemer2019learning,
  title     = {Learning to Learn without Forgetting by Maximizing Transfer and Minimizing Interference},
  author    = {Riemer, Matthew and Cases, Ignacio and Ajemian, Robert and Liu, Miao and Rish, Irina and Tu, Yuhai and
               Tesauro, Gerald},
  booktitle = {International Conference on Learning Representations},
  year      = {2019}
}"""


class MatrixMetric(evaluate.Metric):
    """A function of `classp_hf.metrics.matrix` as an `evaluate.Metric`; a subclass sets the three attributes."""

    function: Callable[[Any], Any]  # its docstring, with formula, sign and source, is the description
    bibtex: str
    example: str  # the value for the matrix of the example in _INPUTS, as Python prints it

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.getdoc(self.function) or "",
            citation=self.bibtex,
            inputs_description=_INPUTS.format(name=self.function.__name__, example=self.example),
            features=datasets.Features({"accuracy_matrix": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, *, accuracy_matrix: Any) -> dict[str, Any]:
        return {self.function.__name__: self.function(accuracy_matrix)}
