"""The figures of `report_methods.py`: read in three seconds, controls in grey."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from classp_hf import report
from classp_hf.metrics import confidence

BASELINE, JOINT = "adamw", "joint"
NAMES = {
    BASELINE: "AdamW",
    "ewc": "EWC",
    "lwf": "LwF",
    "logit_adjustment": "logit adjustment",
    "adamw_110_steps": "AdamW, 110 steps",
    "classp_dropped": "CLASSP, memory dropped",
    "classp_other_memory": "CLASSP, other memory",
    "classp": "CLASSP",
    "classp_logit_adjustment": "CLASSP + logit adjustment",
    "pseudo_rehearsal_new_counts": "rehearsal, new counts",
    "pseudo_rehearsal": "rehearsal",
    "classp_pseudo_rehearsal": "ClasspTrainer",
    "classp_pseudo_rehearsal_no_counts": "ClasspTrainer, no counts",
    "classp_logit_adjustment_pseudo_rehearsal": "CLASSP + both",
    **{f"adamw_{rate}": f"AdamW, {rate}" for rate in ("1e-5", "2e-5", "5e-5", "2e-4")},
    JOINT: "joint training",
}
BARS = {"ewc", "lwf", "classp_dropped", "classp", "classp_logit_adjustment", "pseudo_rehearsal_new_counts"}
BARS |= {"pseudo_rehearsal", "classp_pseudo_rehearsal", "classp_pseudo_rehearsal_no_counts"}
RATES = ("adamw_1e-5", "adamw_2e-5", "adamw_5e-5", BASELINE, "adamw_2e-4")  # of the second task
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.6"


def half_width(values: Any) -> float:
    """Of the 95% interval of the mean; 0 for one value."""
    return confidence(values)[1]


def label(axes: Any, points: Mapping[str, Any], taken: Collection[Any] = ()) -> None:
    """Write each name beside its point, where it covers least of other names, points and `taken`, corners of boxes."""
    axes.autoscale_view()
    to_axes = (axes.transData - axes.transAxes).transform
    at = {name: to_axes(point) for name, point in points.items()}
    boxes = [np.ravel(to_axes(corners)) for corners in taken]
    boxes += [np.array([*point - 0.015, *point + 0.015]) for point in at.values()]

    def covered(box: np.ndarray) -> float:
        shared = [np.prod(np.clip(np.minimum(box[2:], o[2:]) - np.maximum(box[:2], o[:2]), 0, None)) for o in boxes]
        return float(sum(shared) + 9 * np.clip([*-box[:2], *box[2:] - 1], 0, None).sum())

    for name, (x, y) in sorted(at.items(), key=lambda item: -item[1][1]):
        w, h = 0.0105 * len(name) + 0.005, 0.04
        places = [(x + far, y + up * h) for up in (-0.5, -1.2, 0.2, -1.9, 0.9) for far in (0.016, -0.016 - w)]
        places += [(x - w / 2, y + up * h) for up in (0.5, -1.5, 1.3, -2.3)]
        best = min((np.array([a, b, a + w, b + h]) for a, b in places), key=covered)
        boxes.append(best)
        axes.text(*(best[:2] + best[2:]) / 2, name, transform=axes.transAxes, fontsize=8, ha="center", va="center")


def plot_old_new(
    values: Mapping[str, np.ndarray],
    controls: Collection[str],
    star: str,
    curve: Collection[str],
    tasks: list[str],
    path: Path,
) -> None:
    """Accuracy on the old task against the new one: name -> (seeds, 2); `curve` names points of one line."""
    figure = report.new_figure(7, 5)
    axes, points, taken = figure.subplots(), {}, []
    for name, of in values.items():
        (x, y), (a, b) = 100 * of.mean(0), (100 * half_width(column) for column in of.T)
        style = {"color": GREY if name in controls else BLUE, "marker": "o", "markersize": 5}
        style |= {"color": ORANGE, "marker": "*", "markersize": 15} if name == star else {}
        axes.errorbar(x, y, xerr=a, yerr=b, elinewidth=0.8, ecolor="0.8", **style)
        points[name] = (x, y)
        taken += [((x - a, y - 0.1), (x + a, y + 0.1)), ((x - 0.1, y - b), (x + 0.1, y + b))]
    line = np.array([points[name] for name in curve if name in points])
    if len(line) > 1:
        axes.plot(*line.T, color=GREY, linewidth=1, zorder=1)
    axes.margins(0.08)
    label(axes, points, taken)
    axes.set_xlabel(f"accuracy on the old task ({tasks[0]}) at the end, %")
    axes.set_ylabel(f"accuracy on the new task ({tasks[1]}) at the end, %")
    note = "; line: AdamW's rates" if len(line) > 1 else ""
    axes.set_title(f"{tasks[0]}, then {tasks[1]}: up and to the right is better (grey: controls{note})", fontsize=10)
    axes.grid(color="0.95")
    report.save_figure(figure, path)


def plot_gap(gaps: Mapping[str, tuple[float, float, float]], controls: Collection[str], path: Path) -> None:
    """Bars of the gap recovered: name -> G and its interval."""
    figure = report.new_figure(7, 0.9 + 0.4 * len(gaps))
    axes = figure.subplots()
    names = [name + " (control)" * (name in controls) for name in gaps]
    value, low, high = np.array([*gaps.values()]).T
    errors = {"xerr": np.clip([value - low, high - value], 0, None), "ecolor": "0.3", "capsize": 3}
    axes.barh(names, value, color=[GREY if name in controls else BLUE for name in gaps], **errors)
    for i, v in enumerate(value):
        axes.text(max(high[i], v, 0) + 0.02, i, f"{v:.2f}", va="center", fontsize=9)
    axes.axvline(1, color=ORANGE)
    axes.margins(x=0.12)
    axes.set_xlabel("gap recovered: 0 is AdamW, 1 is joint training")
    axes.invert_yaxis()
    report.save_figure(figure, path)


def plot_cost(points: Mapping[str, tuple[float, float]], controls: Collection[str], path: Path) -> None:
    """What a step costs against the gap recovered."""
    figure = report.new_figure(7, 4)
    axes = figure.subplots()
    for name, point in points.items():
        axes.plot(*point, "o", color=GREY if name in controls else BLUE)
    axes.margins(0.12)
    label(axes, points)
    axes.set_xlabel("time of a step, AdamW = 1")
    axes.set_ylabel("gap recovered")
    axes.grid(color="0.95")
    report.save_figure(figure, path)
