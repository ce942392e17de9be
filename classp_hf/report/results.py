"""`results.json`, the environment that it records, and tables of it in Markdown, aligned so that terminals show them.

`results` is the content of `results.json`; its accuracy matrix R is as in `classp_hf.metrics`. `arms` are name ->
results of the same tasks.
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import replacing
from ..redaction import UNPRINTABLE

AnyPath = str | os.PathLike
Names = Sequence[str]
Results = Mapping[str, Any]
# Metric of R -> what it means.
_METRICS = {
    "average_accuracy": "mean over all tasks at the end",
    "learning_accuracy": "mean over tasks, each right after its own training",
    "backward_transfer": "gain of each earlier task since it was learned; negative = forgetting",
    "forward_transfer": "gain of each task before its own training, over the model at the start",
    "forgetting": "what each earlier task lost since its best; positive = forgetting",
    "retained_accuracy": "% of what each task had learned that is left at the end",
}


class Scale:
    """How the values of R are written, the same for all of `runs`: shares of one in percent, others in their unit."""

    def __init__(self, *runs: Results) -> None:
        values: list[float] = [v for results in runs for row in results["accuracy_matrix"] for v in row]
        largest, higher = max(map(abs, values)), runs[0].get("greater_is_better", True)
        self.metric = runs[0].get("metric", "accuracy")
        self.percent = higher and largest <= 1
        self.low, self.high = (min(0.0, *values), 1.0) if self.percent else (min(values), max(values))
        self.digits = 1 if self.percent or largest >= 100 else 3
        self.title = self.metric + (" in %" if self.percent else "" if higher else ", lower is better")

    def share(self, value: float) -> float:
        """Where the value lies between the lowest, 0, and the highest, 1."""
        return (value - self.low) / ((self.high - self.low) or 1.0)

    def text(self, value: float | None, sign: str = "") -> str:
        """The value as it is shown; adding 0.0 makes -0.0 a plain zero."""
        shown = round((100 if self.percent else 1) * (value or 0), self.digits) + 0.0
        return "n/a" if value is None else f"{shown:{sign}.{self.digits}f}"


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

    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "datasets", "peft", "classp_hf"):
        with suppress(importlib.metadata.PackageNotFoundError):  # a checkout on the path is not installed
            versions[package] = importlib.metadata.version(package)
    cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    hardware = {
        "platform": platform.platform(),
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "num_processes": num_processes,
    }
    folder, commit = Path(__file__).parents[2], None
    if (folder / ".git").exists():  # a virtual environment inside another project's checkout has no commit
        command = ["git", "-C", str(folder), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
        with suppress(OSError, subprocess.SubprocessError):  # no git, no commit yet, not a checkout git trusts
            commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    return {"versions": versions, "hardware": hardware, "commit": commit}


def peak_memory() -> int | None:
    """Bytes: the most that PyTorch has held of the GPU, else this process of the machine's memory. None on Windows."""
    import torch

    if torch.cuda.is_available() and (held := torch.cuda.max_memory_reserved()):
        return held
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def sequence_tables(results: Results) -> list[str]:
    """R, a row a stage and a column a task, bold where the task was just trained; the metrics with their meaning."""
    scale, learned = Scale(results), learned_tasks(results)
    matrix = [["", *map(plain, results["tasks"])]]
    for t, (stage, row) in enumerate(zip(stages(results), results["accuracy_matrix"])):
        cells = [f"**{scale.text(v)}**" if t == j > learned else scale.text(v) for j, v in enumerate(row, 1)]
        matrix.append([plain(stage), *cells])
    metrics = [["metric", "value", "meaning"], *([plain(name), *rest] for name, *rest in metric_rows(results))]
    tables = [markdown_table(matrix, "<" + ">" * len(results["tasks"])), markdown_table(metrics, "<><")]
    if learned:
        tables.append("Tasks learned before this run count as learned with what they had at its start.")
    return tables


def metric_rows(results: Results) -> list[list[str]]:
    """Name, value and meaning of every metric of R, as text."""
    scale, rows = Scale(results), []
    for key, meaning in _METRICS.items():
        value, name = results["metrics"][key], key.replace("_", " ").replace("accuracy", scale.metric)
        if isinstance(value, list):
            text = ", ".join("n/a" if share is None else f"{100 * share:.1f}" for share in value)
        else:
            text = scale.text(value, "+" if "transfer" in key else "")
        rows.append([name, text, meaning])
    return rows


def format_comparison(arms: Mapping[str, Results]) -> str:
    """A row an arm, with what each task's accuracy was when learned and is at the end."""
    scale, tasks = Scale(*arms.values()), next(iter(arms.values()))["tasks"]
    table = [["arm", *map(plain, tasks), "ACC", "LA", "BWT", "forgetting", "seconds"]]
    for arm, results in arms.items():
        R = results["accuracy_matrix"]
        kept = [f"{scale.text(R[j + 1][j])} -> {scale.text(R[-1][j])}" for j in range(len(tasks) - 1)]
        keys = ("average_accuracy", "learning_accuracy", "backward_transfer", "forgetting")
        values = [scale.text(results["metrics"][key], "+" if "transfer" in key else "") for key in keys]
        table.append([arm, *kept, scale.text(R[-1][-1]), *values, f"{results['seconds']:.0f}"])
    note = f"{scale.title[0].upper()}{scale.title[1:]}: right after the task's own training -> after the last task."
    return markdown_table(table, "<" + ">" * (len(tasks) + 5)) + "\n\n" + note


def stages(results: Results) -> list[str]:
    """Names of the rows of R."""
    tasks, learned = results["tasks"], learned_tasks(results)
    before = [f"learned before: {task}" for task in tasks[:learned]]
    return ["at the start", *before, *(f"after {task}" for task in tasks[learned:])]


def learned_tasks(results: Results) -> int:
    """So many tasks, the first, were learned before this run."""
    return results["arguments"].get("learned_tasks", 0)


def plain(text: str) -> str:
    """`text` on one line, as Markdown that shows it as it is."""
    line = " ".join(UNPRINTABLE.sub(" ", text).split())
    return re.sub(r"[\\`*\[\]<>~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", line)


def markdown_table(rows: Sequence[Names], aligned: str) -> str:
    """A pipe table that is also aligned as text; the first row is the header, `aligned` is `<` or `>` a column."""
    rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    widths = [max(2, *map(len, column)) for column in zip(*rows)]
    ruler = ["-" * width if side == "<" else "-" * (width - 1) + ":" for side, width in zip(aligned, widths)]
    lines = [[f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths)] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [lines[0], ruler, *lines[1:]])
