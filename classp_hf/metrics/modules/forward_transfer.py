"""`evaluate` module of `classp_hf.metrics.forward_transfer`."""

from __future__ import annotations

from classp_hf.metrics import matrix
from classp_hf.metrics.modules import base


class ForwardTransfer(base.MatrixMetric):
    function = staticmethod(matrix.forward_transfer)
    bibtex = base.LOPEZ_PAZ_2017
    example = "0.125"
