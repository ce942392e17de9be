"""What a run leaves behind to be read: JSON, tables, figures and a model card; and what must never get into them.

Everything here takes plain data. R is the accuracy matrix: T+1 rows of T floats in [0, 1], row 0 before any training,
row t after task t. `results` is the content of `results.json`, as `ContinualTrainer.train_sequence` returns it.
A reader sees the old file or the new one, never a part (`files.replacing`).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .files import replacing
from .redaction import UNPRINTABLE, public_arguments, public_command

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).with_name("model_card_template.md")

Matrix = Sequence[Sequence[float]]

# Metric of R -> (label, sign of its format, meaning).
_METRICS = {
    "average_accuracy": ("average {metric}", "", "mean over all tasks at the end"),
    "learning_accuracy": ("learning {metric}", "", "mean over tasks, each right after its own training"),
    "backward_transfer": ("backward transfer", "+", "{points} since each earlier task was learned; negative = forgetting"),
    "forward_transfer": ("forward transfer", "+", "{points} over the model at the start, each task before its own training"),
    "forgetting": ("forgetting", "", "{points} {below} each earlier task's best; positive = forgetting"),
    "retained_accuracy": ("retained {metric}", "", "% of each task's own learned {metric} left at the end"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scale:
    """How the values of R are written.

    Args:
        metric: its name.
        percent: shares of one, written in percent; else in their own unit.
        digits: after the point.
        greater_is_better: of the metric.
    """

    metric: str = "accuracy"
    percent: bool = True
    digits: int = 1
    greater_is_better: bool = True

    @classmethod
    def of(cls, results: Mapping[str, Any]) -> Scale:
        """The scale for the content of a `results.json`."""
        metric = results.get("metric", "accuracy")
        greater = results.get("greater_is_better", True)
        largest = max(abs(v) for row in results["accuracy_matrix"] for v in row)
        percent = greater and largest <= 1
        return cls(metric, percent, 1 if percent or largest >= 100 else 3, greater)

    def text(self, value: float | None, sign: str = "") -> str:
        """The value as it is shown; adding 0.0 makes -0.0 a plain zero."""
        if value is None:
            return "n/a"
        return format(round((100 if self.percent else 1) * value, self.digits) + 0.0, f"{sign}.{self.digits}f")

    @property
    def title(self) -> str:
        lower = "" if self.greater_is_better else ", lower is better"
        return f"{self.metric} in %" if self.percent else f"{self.metric}{lower}"


# Class to load a model with -> the Hub's name of what it does, and a text's.
_KINDS = {
    "AutoModelForSequenceClassification": ("text-classification", "text classifier"),
    "AutoModelForCausalLM": ("text-generation", "language model"),
    "AutoModelForSeq2SeqLM": ("text2text-generation", "sequence-to-sequence model"),
}

_HUB_ID = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*")

# Arguments that say where a run was written or shown, not how the model was trained.
_PLACES = {
    *("accelerator_config", "dataloader_pin_memory", "disable_tqdm", "logging_dir", "method", "output_dir"),
    *("enable_jit_checkpoint", "keep_task_models"),
    "model_license",
    *("hub_model_id", "push_to_hub", "report_to", "resume_from_checkpoint", "run_name", "sequence_metric"),
}


# ---- JSON, environment ------------------------------------------------------------------------------------------------


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically; the folder is created.

    Raises:
        ValueError: NaN or infinity, which JSON does not have (None is what an undefined metric is).
        TypeError: an object that JSON does not know.
    """
    text = json.dumps(obj, indent=2, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def environment(num_processes: int = 1) -> dict[str, Any]:
    """What a number needs to be reproduced, beside the command.

    Returns:
        `versions` (package -> version, or "not installed"), `hardware` (`platform`, `cpu`, `cpu_count`,
        `torch_threads` of this process, `gpus`: a name each, `num_processes`), and `commit` of the checkout that
        classp_hf runs from, with "-dirty" for uncommitted changes; None for an installed package.
    """
    import torch

    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "datasets", "peft", "classp_hf"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    hardware = {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in gpus],
        "num_processes": num_processes,
    }
    return {"versions": versions, "hardware": hardware, "commit": _commit(Path(__file__).resolve().parents[1])}


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _commit(folder: Path) -> str | None:
    """HEAD of the checkout whose top is `folder`: a virtual environment inside another project's has none."""

    def git(*command: str) -> str:
        # No optional locks: several ranks ask at the same time.
        command = ("git", "-C", str(folder), "--no-optional-locks", *command)
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, no commit yet, one git does not trust
        return None


# ---- Tables -----------------------------------------------------------------------------------------------------------


def format_sequence(
    tasks: Sequence[str],
    accuracy_matrix: Matrix,
    metrics: Mapping[str, Any],
    title: str,
    scale: Scale | None = None,
    learned: int = 0,
) -> str:
    """A table for the terminal: a row a stage, a column a task; then the metrics and how to read them.

    Args:
        tasks: T names.
        accuracy_matrix: R, (T+1) x T.
        metrics: of `metrics.summarize`; None is written "n/a".
        title: the first line.
        scale: how values are written. Default: accuracy in %.
        learned: so many tasks, the first, were learned before this run.
    """
    _check_matrix(tasks, accuracy_matrix)
    scale = scale or Scale()
    rows = [[stage, *map(scale.text, row)] for stage, row in zip(_stages(tasks, learned), accuracy_matrix)]
    table = _pad([["", *tasks], *rows], "<" + ">" * len(tasks))
    readings = [f"{label:<17}  {value:>5}  ({meaning})" for label, value, meaning in _metric_rows(metrics, scale)]
    note = [LEARNED_BEFORE] if learned else []
    return "\n".join([title, *("  ".join(cells) for cells in table), "", *readings, *note])


def format_comparison(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table: a row an arm, with what each task's accuracy was when learned and is at the end.

    Args:
        arms: name -> results, all of the same tasks.

    Raises:
        ValueError: no arms, or arms of different tasks.
    """
    tasks = _common_tasks(arms)
    scale = Scale.of(next(iter(arms.values())))
    header = ["arm", *tasks, "ACC", "LA", "BWT", "forgetting", "seconds"]
    rows = []
    for arm, results in arms.items():
        R, metrics = results["accuracy_matrix"], results["metrics"]
        kept = [f"{scale.text(R[j + 1][j])} -> {scale.text(R[-1][j])}" for j in range(len(tasks) - 1)]
        keys = ("average_accuracy", "learning_accuracy", "backward_transfer", "forgetting")
        values = [scale.text(metrics[key], _METRICS[key][1]) for key in keys]
        rows.append([arm, *kept, scale.text(R[-1][-1]), *values, f"{results['seconds']:.0f}"])
    note = f"{scale.title[0].upper()}{scale.title[1:]}: right after the task's own training -> after the last task."
    return _markdown([header, *rows], "<" + ">" * (len(header) - 1)) + "\n\n" + note


def _metric_rows(metrics: Mapping[str, Any], scale: Scale) -> list[list[str]]:
    words = {
        "metric": scale.metric,
        "points": "points" if scale.percent else "difference",
        "below": "below" if scale.greater_is_better else "above",
    }

    def text(key: str, sign: str) -> str:
        value = metrics[key]
        return ", ".join(map(Scale().text, value)) if isinstance(value, list) else scale.text(value, sign)

    return [
        [label.format(**words), text(key, sign), meaning.format(**words)]
        for key, (label, sign, meaning) in _METRICS.items()
    ]


LEARNED_BEFORE = "Tasks learned before this run count as learned with what they had at its start."


def _stages(tasks: Sequence[str], learned: int = 0) -> list[str]:
    """What the rows of R are; the first `learned` tasks were not trained on in this run."""
    return [
        "at the start",
        *(f"{'learned before:' if t < learned else 'after'} {task}" for t, task in enumerate(tasks)),
    ]


def _check_matrix(tasks: Sequence[str], R: Matrix) -> None:
    if len(R) != len(tasks) + 1 or any(len(row) != len(tasks) for row in R):
        shape = f"{len(R)} rows of {sorted({len(row) for row in R})} columns"
        raise ValueError(f"{len(tasks)} tasks need {len(tasks) + 1} rows of {len(tasks)} columns, got {shape}.")


def _common_tasks(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    sequences = {tuple(results["tasks"]) for results in arms.values()}
    if len(sequences) != 1:
        raise ValueError(f"Only arms of the same tasks can be compared, got {sorted(sequences)}.")
    tasks = list(sequences.pop())
    for results in arms.values():
        _check_matrix(tasks, results["accuracy_matrix"])
    return tasks


def _pad(rows: Sequence[Sequence[str]], aligned: str) -> list[list[str]]:
    """Pad cells to their column's width; `aligned` is `<` or `>` a column."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [[f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths)] for row in rows]


def _markdown(rows: Sequence[Sequence[str]], aligned: str) -> str:
    """A pipe table that is also aligned as text; the first row is the header."""
    first, *others = _pad([[cell.replace("|", r"\|") for cell in row] for row in rows], aligned)
    ruler = ["-" * len(cell) if side == "<" else "-" * (len(cell) - 1) + ":" for cell, side in zip(first, aligned)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (first, ruler, *others))


# ---- Figures ----------------------------------------------------------------------------------------------------------

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito
_MARKERS = "osD^vPX"
_MANY = 20
"""With more tasks than these the matrix is colours alone, and other figures show `_SHOWN` tasks, evenly spread."""
_SHOWN = 12


def _spread(count: int) -> list[int]:
    """Which of `count` tasks are shown, the first and the last among them."""
    return list(range(count)) if count <= _MANY else [round(i * (count - 1) / (_SHOWN - 1)) for i in range(_SHOWN)]


def plot_accuracy_matrix(
    tasks: Sequence[str], R: Matrix, path: str | os.PathLike, title: str, scale: Scale | None = None
) -> None:
    """Write R as a PNG heat map with the values in its cells (of more than 20 tasks, colours with a scale); frames mark each
    task's own training.

    Raises:
        ImportError: matplotlib is missing.
    """
    _check_matrix(tasks, R)
    scale = scale or Scale()
    low, high = (0.0, 1.0) if scale.percent else (min(map(min, R)), max(map(max, R)))
    T = len(tasks)
    stages = _stages(tasks)
    longest = max(map(len, stages))
    many = T > _MANY
    width = max(2.0 + 0.085 * longest + (0.15 if many else 0.75) * T, 4.8, 0.1 * len(title))
    figure = _figure(width, 1.3 + 0.06 * longest + (0.15 if many else 0.42) * T)
    from matplotlib.patches import Rectangle

    axes = figure.add_subplot(frame_on=False)
    # Pale to dark blue; its luminance falls evenly, so it reads in grey and with any colour vision.
    image = axes.imshow(R, cmap="Blues", vmin=low, vmax=high, aspect="auto")
    if many:
        figure.colorbar(image, format=lambda value, _: scale.text(value))
    for t, row in enumerate([] if many else R):
        for j, value in enumerate(row):
            colour = "white" if value > low + 0.65 * (high - low) else "black"
            axes.text(j, t, scale.text(value), ha="center", va="center", color=colour)
    for j in range(T):
        axes.add_patch(
            Rectangle((j - 0.5, j + 0.5), 1, 1, fill=False, edgecolor="#D55E00", lw=1 if many else 2, clip_on=False)
        )
    names = {"fontsize": 7} if many else {}
    axes.set_xticks(range(T), tasks, rotation=60 if many else 30, ha="right", rotation_mode="anchor", **names)
    axes.set_yticks(range(T + 1), stages, **names)
    axes.set_title(f"{title}\n{scale.title}, framed: the task just trained", fontsize=10)
    _save(figure, path)


def plot_retention(arms: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Write a PNG with a panel a task (of more than 20, for twelve of them) and a line an arm: the task's accuracy at every
    stage of the sequence.

    Args:
        arms: name -> results, all of the same tasks.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no arms, or arms of different tasks.
    """
    tasks = _common_tasks(arms)
    scale = Scale.of(next(iter(arms.values())))
    factor = 100 if scale.percent else 1
    T = len(tasks)
    chosen = _spread(T)
    columns = min(T, 3)
    lines = -(-len(chosen) // columns)
    figure = _figure(max(1.0 + columns * max(2.6, 0.45 * (min(T, 10) + 1)), 5.0), 1.0 + 2.3 * lines)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    shown = [factor * v for results in arms.values() for row in results["accuracy_matrix"] for v in row]
    lowest, highest = min(0.0, *shown), 100 if scale.percent else 1.05 * max(shown)
    every = -(-(T + 1) // 12)
    for number, axes in enumerate(panels):
        if number >= len(chosen):
            axes.set_axis_off()
            continue
        j = chosen[number]
        axes.axvline(j + 1, color="0.6", linestyle="--", label="the task's own training" if j == 0 else None)
        for a, (arm, results) in enumerate(arms.items()):
            style = {"color": _PALETTE[a % 7], "marker": _MARKERS[a % 7], "linestyle": ("-", ":", "-.")[a // 7 % 3]}
            values = [factor * row[j] for row in results["accuracy_matrix"]]
            # earlier arms larger: seen under later ones of the same value
            size = max(8 - 2 * a, 4) if T <= _MANY else 2
            # Not clipped: markers at 0 and 100 stay whole.
            axes.plot(values, **style, markersize=size, clip_on=False, label=arm if j == 0 else None)
        axes.set_title(f"{j + 1}. {tasks[j]}", fontsize=10)
        axes.set_ylim(lowest, highest)
        axes.set_xticks(range(0, T + 1, every), ["start", *(str(t) for t in range(every, T + 1, every))])
        axes.tick_params(labelbottom=True, labelsize=8)
        axes.grid(axis="y", color="0.9")
    figure.supxlabel("after task", fontsize=10)
    figure.supylabel(scale.title, fontsize=10)
    figure.legend(loc="outside upper center", ncols=min(len(arms) + 1, 4), frameon=False, fontsize=9)
    _save(figure, path)


def plot_importance(importance: Mapping[str, Sequence[float]], tasks: Sequence[str], path: str | os.PathLike) -> None:
    """Write a PNG with a line a task (of more than 20, for twelve of them) over the layers: how much the memory of gradients
    grew there, 1 = the median layer.

    Args:
        importance: layer -> mean accumulator a weight before any training here and after every task.
        tasks: their names; a task in which nothing grew (it was not trained on) has no line. What was there before has one.

    Raises:
        ImportError: matplotlib is missing.
    """
    layers = list(importance)
    figure = _figure(max(5.5, 1.5 + 0.42 * len(layers)), 4.4)
    axes = figure.subplots()
    shown = {0, *(j + 1 for j in _spread(len(tasks)))}
    for t, name in enumerate(["earlier runs", *tasks]):
        if t not in shown:
            continue
        means = [importance[layer] for layer in layers]
        grown = [max(m[t] - m[t - 1], 0.0) if t else m[0] for m in means]
        middle = statistics.median(grown)
        if middle > 0:
            style = {"color": _PALETTE[t % 7], "marker": _MARKERS[t % 7], "linestyle": ("-", ":", "-.")[t // 7 % 3]}
            axes.plot(range(len(layers)), [g / middle or None for g in grown], **style, label=name)
    axes.set_yscale("log")
    axes.set_xticks(range(len(layers)), layers, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_ylabel("growth of the memory a weight\n(1 = median of the layers)")
    axes.grid(axis="y", color="0.9")
    if len(axes.lines) > 7:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    else:
        axes.legend(frameon=False, fontsize=9)
    axes.set_title("What each task leaves in the memory, layer by layer", fontsize=10)
    _save(figure, path)


def write_figures(folder: str | os.PathLike, results: Mapping[str, Any]) -> None:
    """Write a run's `accuracy_matrix.png`, `retention.png` and, of a run with a memory of gradients, `importance.png` into
    `folder`; without matplotlib, say so and go on."""
    method = results["method"]["name"]
    name = results["optimizer"]["name"] + ("" if method == "none" else f" + {method}")
    try:
        matrix, path = results["accuracy_matrix"], Path(folder) / "accuracy_matrix.png"
        plot_accuracy_matrix(results["tasks"], matrix, path, name, Scale.of(results))
        plot_retention({name: results}, Path(folder) / "retention.png")
        if results.get("importance"):
            plot_importance(results["importance"], results["tasks"], Path(folder) / "importance.png")
    except ImportError as error:
        logger.warning(f"No figures: {error}")


def _figure(width: float, height: float) -> Any:
    """An empty figure in inches, off pyplot: the caller's backend and open figures stay as they are."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "classp_hf[demo]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | os.PathLike) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


# ---- Model card -------------------------------------------------------------------------------------------------------


def write_model_card(
    path: str | os.PathLike,
    *,
    results: Mapping[str, Any],
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> None:
    """Write the model card, with the metadata that the Hub reads, to `path` (the model folder's README.md).

    How to continue is told where the folder holds a continual memory.

    Args:
        path: the name of its folder is the model's, unless the arguments have a `hub_model_id`.
        results: content of `results.json`; arguments and command are stripped of secrets once more.
        base_model: Hub id, or a local folder, of which only the last part is told. None: unknown.
        license: the Hub's name of the model's license, such as "apache-2.0".
        tags: further ones.

    Raises:
        ValueError: R and the tasks do not fit together.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    from .memory import MEMORY_NAME

    path = Path(path)
    tasks, R = results["tasks"], results["accuracy_matrix"]
    _check_matrix(tasks, R)
    arguments = public_arguments(results["arguments"])
    method, optimizer = results["method"], results["optimizer"]
    methods = [m for m in method.get("parts", [method]) if m["name"] != "none"]
    # ClasspTrainer adds the logit adjustment by itself; a run without it goes on without it
    adjusted = any(m["name"] == "logit_adjustment" for m in methods)
    trainer = "ClasspTrainer" if optimizer["name"] == "CLASSP" and adjusted else "ContinualTrainer"
    repo = arguments.get("hub_model_id") or path.resolve().parent.name
    scale = Scale.of(results)
    pipeline, kind = _KINDS[results.get("auto_class", "AutoModelForSequenceClassification")]
    on_hub = base_model is not None and bool(_HUB_ID.fullmatch(base_model)) and not Path(base_model).exists()
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["continual-learning", optimizer["name"].lower(), *(m["name"] for m in methods), *tags],
        base_model=base_model if on_hub else None,
        datasets=results.get("datasets") or None,
        license=license,
        model_name=repo.split("/")[-1],
        eval_results=[
            EvalResult(
                task_type=pipeline,
                dataset_type=task,
                dataset_name=task,
                metric_type=scale.metric,
                metric_name=f"{scale.metric} after the last task",
                metric_value=round(value, 4),
            )
            for task, value in zip(tasks, R[-1])
        ],
    )
    names = [_plain(task) for task in tasks]
    learned = arguments.get("learned_tasks", 0)
    rows = [
        [stage, *(f"**{scale.text(v)}**" if t == j + 1 > learned else scale.text(v) for j, v in enumerate(row))]
        for t, (stage, row) in enumerate(zip(_stages(names, learned), R))
    ]
    measured = [[_plain(cell) for cell in row] for row in _metric_rows(results["metrics"], scale)]
    command = public_command(shlex.split(results["command"]))
    base = base_model if on_hub or base_model is None else Path(base_model).name
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=_plain(repo.split("/")[-1]),
        repo=_literal(repo),
        metric=_plain(scale.title),
        kind=kind,
        auto_class=results.get("auto_class", "AutoModelForSequenceClassification"),
        results=results,
        names=" → ".join(names),
        labels=", ".join(map(_code, results.get("label_names") or [])),
        base=base and _literal(base),
        base_text=_code(base) if base else "unknown",
        optimizer_text=_plain(_call_text(optimizer)),
        method_text=_plain(_call_text(method)),
        matrix_table=_markdown([["", *names], *rows], "<" + ">" * len(names)),
        learned_note=LEARNED_BEFORE if learned else None,
        metrics_table=_markdown([["metric", "value", "meaning"], *measured], "<><"),
        command=command,
        fence="`" * max(3, 1 + _longest_run(command)),
        changed=[f"- {_code(k)}: {_code(v)}" for k, v in _changed_arguments(arguments).items()],
        figures=[n for n in ("accuracy_matrix", "retention", "importance") if (path.parent / f"{n}.png").is_file()],
        has_memory=(path.parent / MEMORY_NAME).is_file(),
        memory_name=MEMORY_NAME,
        trainer=trainer,
        folds=results.get("folds_adapters", False),
        method_call=_method_call(methods),
        argument_calls=[
            _keyword(k, arguments[k])
            for k, default in (
                ("learning_rate", None),
                ("optim", "classp" if trainer == "ClasspTrainer" else None),
                ("optim_args", None),
                ("heads", "shared"),
                ("reset_optimizer", False),
            )
            if arguments.get(k, default) != default
        ],
    )
    with replacing(path) as temporary:
        temporary.write_text(str(card).rstrip() + "\n", encoding="utf-8")


def _plain(text: str) -> str:
    """`text` on one line, as Markdown that shows it as it is."""
    line = " ".join(UNPRINTABLE.sub(" ", text).split())
    return re.sub(r"[\\`*\[\]<>~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", line)


def _code(value: Any) -> str:
    """A value on one line as a Markdown code span, which ends at the first run of as many backticks as it began with."""
    line = UNPRINTABLE.sub(" ", str(value))
    ticks = "`" * (1 + _longest_run(line))
    return f"{ticks} {line} {ticks}" if len(ticks) > 1 else f"`{line}`"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _literal(text: str) -> str:
    """Python source of a string, in double quotes as formatters want them."""
    return json.dumps(text, ensure_ascii=False)


def _method_call(methods: Sequence[Mapping[str, Any]]) -> str | None:
    calls = [f'METHODS["{m["name"]}"]({_keywords(m)})' for m in methods]
    return f"[{', '.join(calls)}]" if len(calls) > 1 else calls[0] if calls else None


def _keywords(described: Mapping[str, Any]) -> str:
    return ", ".join(_keyword(k, v) for k, v in described.items() if k not in ("name", "parts") and v is not None)


def _keyword(name: str, value: Any) -> str:
    return f"{name}={_literal(value) if isinstance(value, str) else repr(value)}"


def _call_text(described: Mapping[str, Any]) -> str:
    keywords = _keywords(described)
    return described["name"] + (f" ({keywords})" if keywords else "")


def _changed_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are not at their defaults, sorted; None, "" and empty containers count as the same."""
    from .training_args import ContinualTrainingArguments

    defaults = {f.name: f.default for f in dataclasses.fields(ContinualTrainingArguments)}
    return {
        k: v
        for k, v in sorted(arguments.items())
        if k not in _PLACES and v != defaults.get(k) and (v or isinstance(defaults.get(k), (bool, int, float)))
    }
