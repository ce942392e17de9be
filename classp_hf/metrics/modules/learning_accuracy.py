"""`evaluate` module of `classp_hf.metrics.learning_accuracy`."""

from __future__ import annotations

from classp_hf.metrics import matrix
from classp_hf.metrics.modules import base


class LearningAccuracy(base.MatrixMetric):
    function = staticmethod(matrix.learning_accuracy)
    bibtex = base.RIEMER_2019
    example = "0.9375"
