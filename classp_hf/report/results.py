"""`results.json`, the environment that it records, and tables of it for the terminal and in Markdown.

R is the accuracy matrix: T+1 rows of T floats, row 0 before any training, row t after task t. `results` is the content
of `results.json`, as `ContinualTrainer.train_sequence` returns it. `arms` are name -> results, all of the same tasks.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from ..files import replacing

AnyPath = str | os.PathLike
Names = Sequence[str]
Matrix = Sequence[Sequence[float]]
Results = Mapping[str, Any]
LEARNED_BEFORE = "Tasks learned before this run count as learned with what they had at its start."
# Metric of R -> what it means.
_METRICS = {
    "average_accuracy": "mean over all tasks at the end",
    "learning_accuracy": "mean over tasks, each right after its own training",
    "backward_transfer": "{points} since each earlier task was learned; negative = forgetting",
    "forward_transfer": "{points} over the model at the start, each task before its own training",
    "forgetting": "{points} {below} each earlier task's best; positive = forgetting",
    "retained_accuracy": "% of each task's own learned {metric} left at the end",
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How the values of R are written: shares of one in `percent`, others in their own unit, with so many `digits`."""

    metric: str = "accuracy"
    percent: bool = True
    digits: int = 1
    greater_is_better: bool = True

    @classmethod
    def of(cls, results: Results) -> Self:
        greater = results.get("greater_is_better", True)
        largest = max(abs(v) for row in results["accuracy_matrix"] for v in row)
        percent = greater and largest <= 1
        return cls(results.get("metric", "accuracy"), percent, 1 if percent or largest >= 100 else 3, greater)

    def text(self, value: float | None, sign: str = "") -> str:
        """The value as it is shown; adding 0.0 makes -0.0 a plain zero."""
        shown = round((100 if self.percent else 1) * (value or 0), self.digits) + 0.0
        return "n/a" if value is None else f"{shown:{sign}.{self.digits}f}"

    @property
    def title(self) -> str:
        return self.metric + (" in %" if self.percent else "" if self.greater_is_better else ", lower is better")


def write_json(path: AnyPath, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically; the folder is created. ValueError for NaN and infinity."""
    text = json.dumps(obj, indent=2, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def environment(num_processes: int = 1) -> dict[str, Any]:
    """What a number needs to be reproduced, beside the command: `versions` of packages; `hardware` (`cpu_capability`:
    the vector instructions PyTorch uses, `cpu_count`: the CPUs this process may run on); `commit` of the checkout that
    classp_hf runs from, with "-dirty" for changed files, or None for an installed package."""
    import torch

    packages = ("torch", "transformers", "accelerate", "datasets", "peft", "classp_hf")
    versions = {"python": platform.python_version(), **dict.fromkeys(packages, "not installed")}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    hardware = {
        "platform": platform.platform(),
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(gpus)],
        "num_processes": num_processes,
    }
    folder, commit = Path(__file__).parents[2], None
    if (folder / ".git").exists():  # a virtual environment inside another project's checkout has no commit
        command = ["git", "-C", str(folder), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
        with suppress(OSError, subprocess.SubprocessError):  # no git, no commit yet, not a checkout git trusts
            commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    return {"versions": versions, "hardware": hardware, "commit": commit}


def format_sequence(
    tasks: Names, R: Matrix, metrics: Results, title: str, scale: Scale | None = None, learned: int = 0
) -> str:
    """A table for the terminal: a row a stage, a column a task; then the metrics of `summarize` and how to read them.

    Args:
        scale (`Scale`, default: accuracy in %): how values are written.
        learned (`int`, default 0): so many tasks, the first, were learned before this run.
    """
    scale = scale or Scale()
    rows = [[stage, *map(scale.text, row)] for stage, row in zip(stages(tasks, R, learned), R)]
    table = _pad([["", *tasks], *rows], "<" + ">" * len(tasks))
    readings = [f"{label:<17}  {value:>5}  ({meaning})" for label, value, meaning in metric_rows(metrics, scale)]
    return "\n".join([title, *map("  ".join, table), "", *readings, *[LEARNED_BEFORE][: learned > 0]])


def format_comparison(arms: Mapping[str, Results]) -> str:
    """A Markdown table: a row an arm, with what each task's accuracy was when learned and is at the end."""
    tasks, scale = common_tasks(arms)
    table = [["arm", *tasks, "ACC", "LA", "BWT", "forgetting", "seconds"]]
    for arm, results in arms.items():
        R = results["accuracy_matrix"]
        kept = [f"{scale.text(R[j + 1][j])} -> {scale.text(R[-1][j])}" for j in range(len(tasks) - 1)]
        keys = ("average_accuracy", "learning_accuracy", "backward_transfer", "forgetting")
        values = [scale.text(results["metrics"][key], "+" if "transfer" in key else "") for key in keys]
        table.append([arm, *kept, scale.text(R[-1][-1]), *values, f"{results['seconds']:.0f}"])
    note = f"{scale.title[0].upper()}{scale.title[1:]}: right after the task's own training -> after the last task."
    return markdown_table(table, "<" + ">" * (len(tasks) + 5)) + "\n\n" + note


def metric_rows(metrics: Results, scale: Scale) -> list[list[str]]:
    """Label, value as text, and meaning of every metric of R."""
    words = {"metric": scale.metric, "points": "points" if scale.percent else "difference"}
    words["below"] = "below" if scale.greater_is_better else "above"
    rows = []
    for key, meaning in _METRICS.items():
        value, sign = metrics[key], "+" if "transfer" in key else ""
        text = ", ".join(map(Scale().text, value)) if isinstance(value, list) else scale.text(value, sign)
        rows.append([key.replace("_", " ").replace("accuracy", scale.metric), text, meaning.format(**words)])
    return rows


def stages(tasks: Names, R: Matrix, learned: int = 0) -> list[str]:
    """Names of the rows of R, the first `learned` tasks not trained in this run; ValueError unless R is (T+1) x T."""
    if len(R) != len(tasks) + 1 or any(len(row) != len(tasks) for row in R):
        shape = f"{len(R)} rows of {sorted({len(row) for row in R})} columns"
        raise ValueError(f"{len(tasks)} tasks need {len(tasks) + 1} rows of {len(tasks)} columns, got {shape}.")
    return ["at the start", *(f"{'learned before:' if t < learned else 'after'} {x}" for t, x in enumerate(tasks))]


def common_tasks(arms: Mapping[str, Results]) -> tuple[list[str], Scale]:
    """The tasks and the scale of all arms; ValueError if there is no arm, or their tasks differ."""
    sequences = {tuple(results["tasks"]) for results in arms.values()}
    if len(sequences) != 1:
        raise ValueError(f"Only arms of the same tasks can be compared, got {sorted(sequences)}.")
    rows = [row for r in arms.values() if stages(r["tasks"], r["accuracy_matrix"]) for row in r["accuracy_matrix"]]
    return list(*sequences), Scale.of({**next(iter(arms.values())), "accuracy_matrix": rows})


def markdown_table(rows: Sequence[Names], aligned: str) -> str:
    """A pipe table that is also aligned as text; the first row is the header, `aligned` is `<` or `>` a column."""
    first, *others = _pad([[cell.replace("|", r"\|") for cell in row] for row in rows], aligned)
    ruler = ["-" * len(cell) if side == "<" else "-" * (len(cell) - 1) + ":" for cell, side in zip(first, aligned)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (first, ruler, *others))


def _pad(rows: Sequence[Names], aligned: str) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [[f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths)] for row in rows]
