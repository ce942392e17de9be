"""`evaluate` module of `classp_hf.metrics.retained_accuracy`."""

from __future__ import annotations

from classp_hf.metrics import matrix
from classp_hf.metrics.modules import base


class RetainedAccuracy(base.MatrixMetric):
    function = staticmethod(matrix.retained_accuracy)
    bibtex = ""
    example = "[0.75, 1.0]"
