"""Figures of the accuracy matrix and of what the memory holds, as PNG files. Only the functions import matplotlib."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..files import replacing
from .results import AnyPath, Matrix, Names, Results, Scale, common_tasks, stages

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito
MARKERS = "osD^vPX"
# With more tasks than these the matrix is colours alone, and other figures show `_SHOWN` tasks, evenly spread.
_MANY, _SHOWN = 20, 12


def plot_accuracy_matrix(tasks: Names, R: Matrix, path: AnyPath, title: str, scale: Scale | None = None) -> None:
    """Write R as a heat map with values (of many tasks, with a colour bar), framed where a task was just trained."""
    names, scale = [_text(name) for name in stages(tasks, R)], scale or Scale()
    low, high = (0.0, 1.0) if scale.percent else (min(map(min, R)), max(map(max, R)))
    longest, T, many = max(map(len, names)), len(tasks), len(tasks) > _MANY
    width = max(2.0 + 0.085 * longest + (0.15 if many else 0.75) * T, 4.8, 0.1 * len(title))
    figure = new_figure(width, 1.3 + 0.06 * longest + (0.15 if many else 0.42) * T)
    from matplotlib.patches import Rectangle

    axes = figure.add_subplot(frame_on=False)
    # Pale to dark blue; its luminance falls evenly, so it reads in grey and with any colour vision.
    image = axes.imshow(R, cmap="Blues", vmin=low, vmax=high, aspect="auto")
    if many:
        figure.colorbar(image, format=lambda value, _: scale.text(value))
    for t, j in [] if many else [(t, j) for t in range(T + 1) for j in range(T)]:
        colour = "white" if R[t][j] > low + 0.65 * (high - low) else "black"
        axes.text(j, t, scale.text(R[t][j]), ha="center", va="center", color=colour)
    frame = {"fill": False, "edgecolor": PALETTE[1], "linewidth": 1 if many else 2, "clip_on": False}
    for j in range(T):
        axes.add_patch(Rectangle((j - 0.5, j + 0.5), 1, 1, **frame))  # type: ignore[arg-type]
    turned = {"rotation": 60 if many else 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(T), map(_text, tasks), fontsize=7 if many else None, **turned)
    axes.set_yticks(range(T + 1), names, fontsize=7 if many else None)
    axes.set_title(_text(f"{title}\n{scale.title}, framed: the task just trained"), fontsize=10)
    save_figure(figure, path)


def plot_retention(arms: Mapping[str, Results], path: AnyPath) -> None:
    """Write a panel a task (of many, for twelve of them) with a line an arm: the task's accuracy at every stage."""
    tasks, scale = common_tasks(arms)
    factor = 100 if scale.percent else 1
    lines = {_text(arm): [[factor * v for v in row] for row in arms[arm]["accuracy_matrix"]] for arm in arms}
    T, chosen, columns = len(tasks), _spread(len(tasks)), min(len(tasks), 3)
    rows, every = -(-len(chosen) // columns), -(-(T + 1) // 12)
    figure = new_figure(max(1.0 + columns * max(2.6, 0.45 * (min(T, 10) + 1)), 5.0), 1.0 + 2.3 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    shown = [v for R in lines.values() for row in R for v in row]
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()
    for j, axes in zip(chosen, panels):
        axes.axvline(j + 1, color="0.6", linestyle="--", label="the task's own training" if j == 0 else None)
        for a, (arm, R) in enumerate(lines.items()):
            # Earlier arms larger: seen under later ones of the same value. Not clipped: whole at 0 and 100.
            style = {**_style(a), "markersize": max(8 - 2 * a, 4) if T <= _MANY else 2, "clip_on": False}
            axes.plot([row[j] for row in R], label=arm if j == 0 else None, **style)
        axes.set_title(_text(f"{j + 1}. {tasks[j]}"), fontsize=10)
        axes.set_ylim(min(0.0, *shown), 100 if scale.percent else 1.05 * max(shown))
        axes.set_xticks(range(0, T + 1, every), ["start", *map(str, range(every, T + 1, every))])
        axes.tick_params(labelbottom=True, labelsize=8)
        axes.grid(axis="y", color="0.9")
    figure.supxlabel("after task", fontsize=10)
    figure.supylabel(_text(scale.title), fontsize=10)
    figure.legend(loc="outside upper center", ncols=min(len(arms) + 1, 4), frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_importance(importance: Mapping[str, Sequence[float]], tasks: Names, path: AnyPath) -> None:
    """Write a line a task (of many, for twelve of them) over the layers: how much the memory of gradients grew; 1 is
    the median layer. `importance`: layer -> mean accumulator a weight, at the start and after every task."""
    layers, names = range(len(importance)), ["earlier runs", *map(_text, tasks)]
    figure = new_figure(max(5.5, 1.5 + 0.42 * len(layers)), 4.4)
    axes = figure.subplots()
    for t in [0, *(j + 1 for j in _spread(len(tasks)))]:
        grown = [max(means[t] - means[t - 1], 0.0) if t else means[0] for means in importance.values()]
        if middle := statistics.median(grown):
            axes.plot(layers, [g / middle or None for g in grown], label=names[t], **_style(t))
    axes.set_yscale("log")
    axes.set_xticks(layers, importance, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_ylabel("growth of the memory a weight\n(1 = median of the layers)")
    axes.grid(axis="y", color="0.9")
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle("What each task leaves in the memory, layer by layer", fontsize=10)
    save_figure(figure, path)


def write_figures(folder: AnyPath, results: Results) -> None:
    """Write accuracy_matrix.png, retention.png and, of a memory, importance.png; without matplotlib warn and go on."""
    folder, tasks, R, method = Path(folder), results["tasks"], results["accuracy_matrix"], results["method"]["name"]
    name = results["optimizer"]["name"] + ("" if method == "none" else f" + {method}")
    try:
        plot_accuracy_matrix(tasks, R, folder / "accuracy_matrix.png", name, Scale.of(results))
        plot_retention({name: results}, folder / "retention.png")
        if results.get("importance"):
            plot_importance(results["importance"], tasks, folder / "importance.png")
    except ImportError as error:
        logging.get_logger(__name__).warning(f"No figures: {error}")


def new_figure(width: float, height: float) -> Any:
    """An empty figure in inches, off pyplot: the caller's backend and open figures stay as they are."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "classp_hf[demo]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: AnyPath) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _style(i: int) -> dict[str, Any]:
    return {"color": PALETTE[i % 7], "marker": MARKERS[i % 7], "linestyle": ("-", ":", "-.")[i // 7 % 3]}


def _spread(count: int) -> list[int]:
    """Which of `count` tasks are shown, the first and the last among them."""
    return list(range(count)) if count <= _MANY else [round(i * (count - 1) / (_SHOWN - 1)) for i in range(_SHOWN)]


def _text(name: str) -> str:
    """A name as matplotlib shows it unchanged: two dollar signs would make a formula of it, or an error."""
    return name.replace("$", r"\$")
