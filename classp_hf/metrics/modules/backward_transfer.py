"""`evaluate` module of `classp_hf.metrics.backward_transfer`."""

from __future__ import annotations

from classp_hf.metrics import matrix
from classp_hf.metrics.modules import base


class BackwardTransfer(base.MatrixMetric):
    function = staticmethod(matrix.backward_transfer)
    bibtex = base.LOPEZ_PAZ_2017
    example = "-0.25"
