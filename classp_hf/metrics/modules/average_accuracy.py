"""`evaluate` module of `classp_hf.metrics.average_accuracy`."""

from __future__ import annotations

from classp_hf.metrics import matrix
from classp_hf.metrics.modules import base


class AverageAccuracy(base.MatrixMetric):
    function = staticmethod(matrix.average_accuracy)
    bibtex = base.LOPEZ_PAZ_2017
    example = "0.8125"
