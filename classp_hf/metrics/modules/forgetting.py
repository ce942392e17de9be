"""`evaluate` module of `classp_hf.metrics.forgetting`."""

from __future__ import annotations

from classp_hf.metrics import matrix
from classp_hf.metrics.modules import base


class Forgetting(base.MatrixMetric):
    function = staticmethod(matrix.forgetting)
    bibtex = base.CHAUDHRY_2018
    example = "0.25"
