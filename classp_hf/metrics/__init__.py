"""Continual-learning metrics of the accuracy matrix R: numpy functions, and an `evaluate.Metric` of each (`load`).

R has shape (T+1, T): row 0 is the model before any training, row t the model after task t; R[t, j] is the score on
task j = 1..T, `R[t][j - 1]` in Python. Any finite score where higher is better will do (accuracy, F1, Matthews
correlation); results are in its unit, except for the ratios `retained_accuracy` and `gap_recovered`.

Every function takes R as lists or an array, and raises ValueError if R is ragged, of another shape, or not finite.
What is not defined (a mean over no task, a division by zero) is `float("nan")`; in `summarize`, for JSON, None.

>>> R = [[0.25, 0.25],  # before any training
...      [1.0, 0.375],  # after task 1
...      [0.75, 0.875]]  # after task 2
>>> backward_transfer(R), forgetting(R), retained_accuracy(R)
(-0.25, 0.25, [0.75, 1.0])
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import evaluate


def _check_matrix(R: ArrayLike) -> NDArray[np.float64]:
    matrix = np.asarray(R, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] + 1 or not matrix.size:
        layout = "a row before any training, then one after each task; a column a task"
        raise ValueError(f"The accuracy matrix must have shape (T+1, T), got {matrix.shape}. Pass {layout}.")
    if not np.isfinite(matrix).all():
        raise ValueError(f"The accuracy matrix must be finite, got {matrix.tolist()}. Evaluate all tasks in all rows.")
    return matrix


def _mean(values: ArrayLike) -> float:
    """nan, without numpy's warning, for no values."""
    return float(np.asarray(values, np.float64).mean()) if np.size(values) else math.nan


# Two-sided 95% quantiles of Student's t, by degrees of freedom; beyond them to 0.003 by the first terms of its series.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def confidence(values: ArrayLike) -> tuple[float, float]:
    """The mean of independent runs (or of paired differences) and half the width of its 95% interval, by Student's t;
    0.0 for one run, of which no interval is known."""
    freedom = np.size(values) - 1
    if freedom < 1:
        return _mean(values), 0.0
    t = _T95.get(freedom, 1.96 + 2.37 / freedom + 2.8 / freedom**2)
    return _mean(values), float(t * np.asarray(values, np.float64).std(ddof=1) / math.sqrt(freedom + 1))


def average_accuracy(R: ArrayLike) -> float:
    """Average accuracy at the end: ACC = mean_j R[T, j]. Higher is better.

    Source: Lopez-Paz & Ranzato 2017, section 2 (arXiv 1706.08840).
    """
    return _mean(_check_matrix(R)[-1])


def learning_accuracy(R: ArrayLike) -> float:
    """Learning accuracy: LA = mean_j R[j, j], each task right after its own training. Higher is better.

    A method that learns little also does well on `backward_transfer` and `forgetting`: read them beside this one.

    Source: Riemer et al. 2019 (arXiv 1810.11910).
    """
    return _mean(_check_matrix(R)[1:].diagonal())


def backward_transfer(R: ArrayLike) -> float:
    """Backward transfer: BWT = mean_{j<T} (R[T, j] - R[j, j]). Negative = forgetting; nan for T = 1.

    Source: Lopez-Paz & Ranzato 2017, section 2 (arXiv 1706.08840).
    """
    R = _check_matrix(R)
    return _mean((R[-1] - R[1:].diagonal())[:-1])


def forward_transfer(R: ArrayLike) -> float:
    """Forward transfer: FWT = mean_{j>1} (R[j-1, j] - R[0, j]). Positive = earlier tasks help; nan for T = 1.

    The baseline R[0, j] is the model the sequence started from; in the paper, a random one.

    Source: Lopez-Paz & Ranzato 2017, section 2 (arXiv 1706.08840).
    """
    R = _check_matrix(R)
    return _mean((R[:-1].diagonal() - R[0])[1:])


def forgetting(R: ArrayLike) -> float:
    """Forgetting: F = mean_{j<T} (max_{j<=t<T} R[t, j] - R[T, j]). Positive = forgetting; nan for T = 1.

    The paper's maximum is over all t < T; here it starts at row j, for what was not learned yet cannot be forgotten.

    Source: Chaudhry et al. 2018, section 3 (arXiv 1801.10112).
    """
    R = _check_matrix(R)
    T = R.shape[1]
    return _mean([R[j:T, j - 1].max() - R[T, j - 1] for j in range(1, T)])


def retained_accuracy(R: ArrayLike) -> list[float]:
    """Retained accuracy of each task j = 1..T: R[T, j] / R[j, j]. 1 = nothing lost; the last entry is 1 by definition.

    nan where R[j, j] is 0. A ratio, so only for scores that are never negative.

    Source: this project. Riemer et al. 2019 call the final average accuracy, `average_accuracy` here, by this name.
    """
    R = _check_matrix(R)
    return [float(last / own) if own != 0 else math.nan for last, own in zip(R[-1], R[1:].diagonal(), strict=True)]


def performance_maintenance(R: ArrayLike) -> float:
    """Performance maintenance: PM = mean_{j<T} mean_{t>j} (R[t, j] - R[j, j]). Negative = forgetting; nan for T = 1.

    As backward transfer, over all later rows instead of the last: what was lost on the way counts, too.

    Source: New et al. 2023, section 4 (arXiv 2301.07799).
    """
    R = _check_matrix(R)
    return _mean([(R[j + 1 :, j - 1] - R[j, j - 1]).mean() for j in range(1, R.shape[1])])


METRICS = [average_accuracy, learning_accuracy, backward_transfer, forward_transfer, forgetting, retained_accuracy]
METRICS += [performance_maintenance]


def summarize(R: ArrayLike, greater_is_better: bool = True) -> dict[str, Any]:
    """Every metric of R by its name, ready for `json.dump`: Python floats, None where a metric is not defined;
    `retained_accuracy` is a list of T.

    Args:
        R: accuracy matrix, shape (T+1, T), row 0 before any training.
        greater_is_better: False for a loss or perplexity. The two averages are then those of R, lower is better; the
            transfers and `forgetting` are those of -R, so that their signs keep their meaning; `retained_accuracy` is
            R[j, j] / R[T, j], 1 = nothing lost.
    """
    R = _check_matrix(R)
    values: dict[str, Any] = {metric.__name__: metric(R if greater_is_better else -R) for metric in METRICS}
    if not greater_is_better:
        values |= {name: -values[name] for name in ("average_accuracy", "learning_accuracy")}
        values["retained_accuracy"] = [1 / x if x else math.nan for x in values["retained_accuracy"]]
    shares = [None if math.isnan(share) else share for share in values["retained_accuracy"]]
    values = {k: None if np.isnan(v).any() else v for k, v in values.items()}
    return values | {"retained_accuracy": shares}


def gap_recovered(acc: float, acc_sequential: float, acc_joint: float) -> float:
    """Share of the gap to joint training: G = (acc - acc_sequential) / (acc_joint - acc_sequential).

    0 = no better than plain sequential training, 1 = as good as joint training; nan where there is no gap.

    Args:
        acc: average accuracy of the method.
        acc_sequential: that of the same optimizer and budget, task after task, without any method.
        acc_joint: that of training on all tasks together.
    """
    gap = acc_joint - acc_sequential
    return float((acc - acc_sequential) / gap) if gap > 0 else math.nan


def relative_performance(scores: ArrayLike, expert: ArrayLike) -> float:
    """Performance relative to a single-task expert: sum(scores) / sum(expert), over the steps that both have.

    1 = learns as fast and as well as a model that is trained on this task alone; nan where the expert's sum is 0.

    Args:
        scores: the task's learning curve within the sequence, shape (n,), higher is better: the `eval_...` values of
            `trainer.state.log_history`, for instance.
        expert: that of the model trained on this task alone, evaluated after the same steps.

    Source: New et al. 2023, section 4 (arXiv 2301.07799).
    """
    count = min(np.size(scores), np.size(expert))
    ours, theirs = (float(np.sum(np.asarray(curve)[:count])) for curve in (scores, expert))
    return ours / theirs if theirs else math.nan


def sample_efficiency(scores: ArrayLike, expert: ArrayLike) -> float:
    """Sample efficiency: (best score / the expert's) * (evaluations that the expert needed for its best / ours).

    Above 1 = better or faster than a model that is trained on this task alone; nan where the expert's best is 0. The
    curves are as in `relative_performance`; smooth noisy ones first.

    Source: New et al. 2023, section 4 (arXiv 2301.07799).
    """
    gain = float(np.max(scores) / np.max(expert)) if np.max(expert) else math.nan
    return gain * float((np.argmax(expert) + 1) / (np.argmax(scores) + 1))


def load(name: str, **kwargs: Any) -> evaluate.Metric:
    """Return the metric of that name, one of `METRICS`, as an `evaluate.Metric`, without a network.

    `metric.compute(accuracy_matrix=R)` returns `{name: value}`. `kwargs` are those of `evaluate.load`. ValueError: no
    such metric.
    """
    import evaluate  # here, because it imports torch and transformers

    return evaluate.load(str(Path(__file__).with_name("accuracy_matrix.py")), name, **kwargs)
