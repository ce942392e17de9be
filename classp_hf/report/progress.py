"""What a terminal shows: one progress bar over a whole sequence, with Trainer's own bars below it; tables."""

import logging
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback

from ..redaction import UNPRINTABLE
from .results import Names, Scale


class SequenceProgress(TrainerCallback):
    """The bar: the present task, its step, and the mean metric of the tasks before it when they were last evaluated.
    Where standard error is no terminal nothing is shown, whatever `disable` says."""

    def __init__(self, tasks: Names, metric: str, greater_is_better: bool, disable: bool) -> None:
        self.tasks = [UNPRINTABLE.sub(" ", task) for task in tasks]
        self.run: dict[str, Any] = {"metric": metric, "greater_is_better": greater_is_better}
        self.begun, self.step, self.kept = 0, "", ""
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        kwargs: dict[str, Any] = {"bar_format": form, "miniters": 0, "smoothing": 0, "dynamic_ncols": True}
        self.bar = tqdm(desc="Evaluation", total=len(tasks), disable=disable or None, **kwargs)

    def begin(self, t: int, matrix: Sequence[Sequence[float]]) -> None:
        """The task `t`, from 0, begins; the number of tasks means the end. `matrix`: the rows of R so far."""
        self.begun, self.step = t, ""
        if t:
            scale = Scale({**self.run, "accuracy_matrix": matrix})
            mean = scale.text(statistics.mean(matrix[-1][:t])) + ("%" if scale.percent else "")
            self.kept = f"; {'earlier' if t < len(self.tasks) else 'all'} tasks: {scale.metric} {mean}"
        self._show(t)
        self.bar.refresh()

    def on_step_end(self, args, state, control, **kwargs):
        self.step = f", step {state.global_step}/{state.max_steps}"
        self._show(self.begun + state.global_step / max(state.max_steps, 1))

    def on_prediction_step(self, args, state, control, **kwargs):
        self.bar.update(0)  # Trainer's bar has moved it

    def _show(self, done: float) -> None:
        t, T = self.begun, len(self.tasks)
        what = f"Task {t + 1}/{T} {self.tasks[t]}" if t < T else f"{T}/{T} tasks"
        self.bar.set_description_str(f"{what}{self.step}{self.kept}", refresh=False)
        self.bar.n = done
        self.bar.update(0)


@contextmanager
def showing_progress(trainer: Any, *args: Any) -> Iterator[SequenceProgress]:
    """A [`SequenceProgress`] of `args` that follows `trainer` in this block; what is logged is written above it."""
    progress = SequenceProgress(*args)
    loggers = [logging.root, logging.getLogger("transformers")]
    trainer.add_callback(progress)
    try:
        with progress.bar, nullcontext() if progress.bar.disable else logging_redirect_tqdm(loggers):
            yield progress
    finally:
        trainer.remove_callback(progress)
