"""`ClasspTrainer` and `EWCTrainer`: `ContinualTrainer` with an optimizer or a method of their own."""

from collections.abc import Sequence
from typing import Any, Literal

from transformers.utils import logging

from .live import CLASSP_NAME
from .methods import EWC, Elastic, LogitAdjustment, Merge, Method, make_methods
from .methods.logit_adjustment import label_column
from .optim import CLASSP
from .trainer import ContinualTrainer

logger = logging.get_logger(__name__)

_CONSOLIDATION: dict[str, Any] = {"none": [], "anchor": [Elastic], "merge": [Merge], "both": [Elastic, Merge]}


class ClasspTrainer(ContinualTrainer):
    """[`ContinualTrainer`] with the CLASSP optimizer (arXiv 2405.09637), whatever `args.optim` says.

    Args:
        consolidation: further uses of the memory: `"anchor"` pulls weights back to the last boundary during training
            ([`~classp_hf.Elastic`]), `"merge"` averages old and new weights when a task ends ([`~classp_hf.Merge`]),
            `"both"` does both, and `"none"`, the default, is the paper's method.
        anchor_strength: strength of the anchor, >= 0. Default: that of `Elastic`.
        merge_weight: weight of the new task in the merge, >= 0. Default: that of `Merge`.
        logit_adjustment: whether to correct for labels that are rarer in the new task
            ([`~classp_hf.LogitAdjustment`]). Default: True for single-label classification with one shared head, the
            trainer's own loss and a column of labels.
        method: further methods, run before these.
        kwargs: as in [`ContinualTrainer`].

    Raises:
        ValueError: what [`ContinualTrainer`] refuses, another optimizer than CLASSP in `optimizers` or
            `optimizer_cls_and_kwargs`, an unknown `consolidation`, and a strength that it does not use.
    """

    default_optim = CLASSP_NAME

    def __init__(
        self,
        *args: Any,
        consolidation: Literal["none", "anchor", "merge", "both"] = "none",
        anchor_strength: float | None = None,
        merge_weight: float | None = None,
        logit_adjustment: bool | None = None,
        method: Method | str | Sequence[Method | str] | None = None,
        **kwargs: Any,
    ) -> None:
        if consolidation not in _CONSOLIDATION:
            raise ValueError(f"consolidation must be 'none', 'anchor', 'merge' or 'both', got {consolidation!r}")
        given = kwargs.get("optimizers", (None, None))[0] or (kwargs.get("optimizer_cls_and_kwargs") or (None,))[0]
        if given is not None and not isinstance(given, CLASSP) and given is not CLASSP:
            name = getattr(given, "__name__", type(given).__name__)
            raise ValueError(
                f"ClasspTrainer trains with CLASSP, got {name}. Use ContinualTrainer for other optimizers."
            )
        methods = make_methods(method)
        for cls, strength in ((Elastic, anchor_strength), (Merge, merge_weight)):
            if cls in _CONSOLIDATION[consolidation]:
                methods.append(cls() if strength is None else cls(strength))
            elif strength is not None:
                raise ValueError(
                    f"{cls.name} is not used with consolidation={consolidation!r}, but its strength was given."
                )
        self._logit_adjustment = logit_adjustment
        super().__init__(*args, method=methods, **kwargs)

    def _complete_methods(self) -> None:
        adjust = self._logit_adjustment
        if adjust is None:
            adjust = self.classifies and self.task_heads is None and self.compute_loss_func == self.adjusted_loss
            if adjust and self.train_dataset is not None and label_column(self.train_dataset) is None:
                logger.warning("Labels of this training dataset cannot be counted, so logits are not adjusted.")
                adjust = False
        if adjust and not any(m.name == LogitAdjustment.name for m in self.methods):
            self.methods.append(LogitAdjustment())


class EWCTrainer(ContinualTrainer):
    """[`ContinualTrainer`] with Elastic Weight Consolidation (arXiv 1612.00796) and the optimizer of `args.optim`.

    Args:
        ewc_lambda: strength of the penalty, >= 0. Default: that of `EWC`. To set other hyperparameters, pass
            `method=EWC(ewc_mode="summed", ...)`.
        method: further methods. EWC runs before them, unless they include one.
        kwargs: as in [`ContinualTrainer`].

    Raises:
        ValueError: what [`ContinualTrainer`] refuses, and `ewc_lambda` together with an EWC in `method`.
    """

    def __init__(
        self,
        *args: Any,
        ewc_lambda: float | None = None,
        method: Method | str | Sequence[Method | str] | None = None,
        **kwargs: Any,
    ) -> None:
        methods = make_methods(method)
        if not any(m.name == EWC.name for m in methods):
            methods.insert(0, EWC() if ewc_lambda is None else EWC(ewc_lambda=ewc_lambda))
        elif ewc_lambda is not None:
            raise ValueError("Pass ewc_lambda or an EWC in method, not both: method=EWC(ewc_lambda=...).")
        super().__init__(*args, method=methods, **kwargs)
