"""Figures of the accuracy matrix and of what the memory holds, as PNG files. Only the functions import matplotlib."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..files import replacing
from ..metrics import confidence
from .results import AnyPath, Results, Scale, stages

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito
_SHOWN = 12  # so many tasks, the first, have a panel or a line of their own


def write_figures(folder: AnyPath, results: Results) -> None:
    """Write accuracy_matrix.png, retention.png and, of a memory, importance.png; without matplotlib warn and go on."""
    folder, method = Path(folder), results["method"]["name"]
    name = results["optimizer"]["name"] + ("" if method == "none" else f" + {method}")
    try:
        plot_accuracy_matrix(results, folder / "accuracy_matrix.png", name)
        plot_retention({name: results}, folder / "retention.png")
        if results.get("importance"):
            plot_importance(results, folder / "importance.png")
    except ImportError as error:
        logging.get_logger(__name__).warning(f"No figures: {error}")


def plot_accuracy_matrix(results: Results, path: AnyPath, title: str) -> None:
    """Write R as a heat map with values, framed where a task was just trained."""
    R, T, scale = results["accuracy_matrix"], len(results["tasks"]), Scale(results)
    names = [*map(_text, stages(results))]
    margin = 0.08 * max(map(len, names))
    figure = new_figure(max(2.0 + margin + 0.75 * T, 4.8, 0.1 * len(title)), 1.3 + margin + 0.42 * T)
    from matplotlib.patches import Rectangle

    axes = figure.add_subplot(frame_on=False)
    # Pale to dark blue; its luminance falls evenly, so it reads in grey and with any colour vision.
    axes.imshow(R, cmap="Blues", vmin=scale.low, vmax=scale.high, aspect="auto")
    for j in range(T):
        axes.add_patch(Rectangle((j - 0.5, j + 0.5), 1, 1, fill=False, ec=_PALETTE[1], lw=2, clip_on=False))
        for t in range(T + 1):
            colour = "white" if scale.share(R[t][j]) > 0.65 else "black"
            axes.text(j, t, scale.text(R[t][j]), ha="center", va="center", color=colour)
    axes.set_xticks(range(T), map(_text, results["tasks"]), rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(T + 1), names)
    axes.set_title(_text(f"{title}\n{scale.title}, framed: the task just trained"), fontsize=10)
    save_figure(figure, path)


def plot_retention(arms: Mapping[str, Results], path: AnyPath) -> None:
    """Write a panel for each of the first twelve tasks, with a line an arm: the task's accuracy at every stage."""
    scale, tasks = Scale(*arms.values()), next(iter(arms.values()))["tasks"]
    factor, T, count = 100 if scale.percent else 1, len(tasks), min(len(tasks), _SHOWN)
    columns, rows, every = min(T, 3), math.ceil(count / 3), math.ceil((T + 1) / 12)
    figure = new_figure(max(1.0 + columns * max(2.6, 0.45 * (min(T, 10) + 1)), 5.0), 1.0 + 2.3 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes in panels[count:]:
        axes.set_axis_off()
    for j, axes in enumerate(panels[:count]):
        axes.axvline(j + 1, color="0.6", linestyle="--", label="the task's own training")
        for a, (arm, results) in enumerate(arms.items()):
            # Earlier arms larger: seen under later ones of the same value. Not clipped: whole at 0 and 100.
            style = {**series_style(a), "markersize": max(8 - 2 * a, 4), "clip_on": False}
            axes.plot([factor * row[j] for row in results["accuracy_matrix"]], label=_text(arm), **style)
        axes.set_title(_text(f"{j + 1}. {tasks[j]}"), fontsize=10)
        axes.set_ylim(factor * min(0.0, scale.low), 100 if scale.percent else 1.05 * max(0.0, scale.high))
        axes.set_xticks(range(0, T + 1, every), ["start", *map(str, range(every, T + 1, every))])
        axes.tick_params(labelbottom=True, labelsize=8)
        axes.grid(axis="y", color="0.9")
    figure.supxlabel("after task", fontsize=10)
    figure.supylabel(_text(scale.title), fontsize=10)
    legend = panels[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=min(len(arms) + 1, 4), frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_old_new(points: Mapping[str, tuple[list[float], list[float]]], path: AnyPath, title: str) -> None:
    """Write a point an arm, with 95% intervals: the mean of the earlier tasks at the end (x) against the last one (y),
    both in percent, a value a seed."""
    figure = new_figure(6.4, 4.6)
    axes = figure.subplots()
    for a, (arm, (old, new)) in enumerate(points.items()):
        (x, dx), (y, dy) = confidence(old), confidence(new)
        style = {**series_style(a), "linestyle": "none"}
        axes.errorbar(x, y, xerr=dx or None, yerr=dy or None, capsize=3, label=_text(arm), **style)
    axes.set_xlabel("earlier tasks, at the end (%)")
    axes.set_ylabel("last task, at the end (%)")
    axes.set_title(_text(title), fontsize=10)
    axes.grid(color="0.9")
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_importance(results: Results, path: AnyPath) -> None:
    """Write a line for each of the first twelve tasks over the layers: how much the memory of gradients grew.

    1 is the median layer. The results' `importance`: layer -> mean accumulator a weight, at the start and after each
    task.
    """
    importance, layers = results["importance"], range(len(results["importance"]))
    figure = new_figure(max(5.5, 1.5 + 0.42 * len(layers)), 4.4)
    axes = figure.subplots()
    for t, name in enumerate(["earlier runs", *results["tasks"][:_SHOWN]]):
        grown = [max(means[t] - means[t - 1], 0.0) if t else means[0] for means in importance.values()]
        if middle := statistics.median(grown):
            axes.plot(layers, [g / middle or None for g in grown], label=_text(name), **series_style(t))
    axes.set_yscale("log")
    axes.set_xticks(layers, importance, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_ylabel("growth of the memory a weight\n(1 = median of the layers)")
    axes.grid(axis="y", color="0.9")
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle("What each task leaves in the memory, layer by layer", fontsize=10)
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, in inches, outside pyplot. ImportError: matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "classp_hf[demo]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: AnyPath) -> None:
    """Write the figure to `path` as PNG, 150 dots an inch, atomically."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def series_style(i: int) -> dict[str, Any]:
    """Colour, marker and line of the `i`-th series, told apart without colours too."""
    return {"color": _PALETTE[i % 7], "marker": "osD^vPX*"[i % 8], "linestyle": ("-", ":", "-.")[i // 7 % 3]}


def _text(name: str) -> str:
    """A name as matplotlib shows it unchanged: two dollar signs would make a formula of it, or an error."""
    return name.replace("$", r"\$")
