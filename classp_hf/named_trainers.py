"""`ClasspTrainer` and `EWCTrainer`: `ContinualTrainer` with an optimizer or a method of their own."""

from collections.abc import Sequence
from typing import Any, Literal

from transformers.trainer_utils import has_length

from .live import CLASSP_NAME
from .methods import EWC, Elastic, LogitAdjustment, Merge, Method, PseudoRehearsal, Replay, make_methods
from .names import bare_model
from .optim import CLASSP
from .trainer import ContinualTrainer

_CONSOLIDATION: dict[str, Any] = {"none": [], "anchor": [Elastic], "merge": [Merge], "both": [Elastic, Merge]}


class ClasspTrainer(ContinualTrainer):
    """[`ContinualTrainer`] with the CLASSP optimizer (arXiv 2405.09637), whatever `args.optim` says.

    Args:
        consolidation: further uses of the memory: `"anchor"` pulls weights back to the last boundary during training
            ([`~classp_hf.Elastic`]), `"merge"` averages old and new weights when a task ends ([`~classp_hf.Merge`]),
            `"both"` does both, and `"none"`, the default, is the paper's method.
        anchor_strength: strength of the anchor, >= 0. Default: that of `Elastic`.
        merge_weight: weight of the new task in the merge, >= 0. Default: that of `Merge`.
        pseudo_rehearsal: whether to hold the model to its own answers to random texts of the tokens that earlier tasks
            had, whose counts the memory keeps ([`~classp_hf.PseudoRehearsal`] with `rehearse_lambda=0.25`). A step
            takes 1.3 times as long. Default: True for single-label classification of texts with one shared head, a
            `processing_class`, data with `input_ids` and a length, and without `replay`.
        logit_adjustment: whether to correct for labels that are rarer in the new task
            ([`~classp_hf.LogitAdjustment`]). Default: False.
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
        pseudo_rehearsal: bool | None = None,
        logit_adjustment: bool = False,
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
        if logit_adjustment and not any(m.name == LogitAdjustment.name for m in methods):
            methods.append(LogitAdjustment())
        self._rehearses = pseudo_rehearsal
        super().__init__(*args, method=methods, **kwargs)

    def _complete_methods(self) -> None:
        rehearses, own = self._rehearses, {m.name for m in self.methods}
        if rehearses is None:
            rehearses = self.task_heads is None and Replay.name not in own and self._has_texts()
        if rehearses and PseudoRehearsal.name not in own:
            self.methods.append(PseudoRehearsal(rehearse_lambda=0.25))

    def _has_texts(self) -> bool:
        """Whether tokens can be counted and drawn for this model, and it has answers to keep."""
        if not self.classifies or self.processing_class is None or bare_model(self.model).config.is_encoder_decoder:
            return False
        data = self.train_dataset  # None: tasks will bring their own
        if data is not None and not ("input_ids" in (getattr(data, "column_names", None) or ()) and has_length(data)):
            return False
        try:
            return bare_model(self.model).get_input_embeddings().weight is not None
        except (NotImplementedError, AttributeError):  # of characters or sounds
            return False


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
