"""docs/performance.md from the committed results of the bench_*.py programs.

python benchmarks/report_performance.py
"""

from __future__ import annotations

import json
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

from classp_hf import report

ROOT = Path(__file__).resolve().parents[1]


def wrapped(text: str, **how: Any) -> str:
    """A paragraph of Markdown in lines of at most 100 characters."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False, **how)


def load(name: str, results: Path) -> dict[str, Any] | None:
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The finished runs; a last line that a killed process left unfinished is not one."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def cpu(hardware: dict[str, Any]) -> str:
    return " ".join([hardware["cpu"], *(f"({hardware[k]})" for k in ["cpu_capability"] if k in hardware)])


def source(found: dict[str, Any]) -> str:
    torch, gpus = found["versions"]["torch"], ", ".join(found["hardware"]["gpus"]) or "none"
    run = f"`{found['command']}`, commit {found['commit'][:7]}, torch {torch}"
    return wrapped(f"{run}, {cpu(found['hardware'])}, GPUs: {gpus}.")


def spread(quartiles: list[float], digits: int = 2, percent: bool = False) -> str:
    low, middle, high = (f"{100 * q:.{digits}f} %" if percent else f"{q:.{digits}f}" for q in quartiles)
    return f"{middle} ({low} to {high})"


def steps(found: dict[str, Any]) -> list[str]:
    parts = []
    for kind, rows in found["steps"].items():
        shown = [n for n in ("bound", "bandwidth") if any(row[n] is not None for row in rows.values())]
        table = [["", "time, AdamW = 1 (quartiles)", *shown, "extra memory"]]
        for name, row in rows.items():
            figures = ["" if row[n] is None else f"{row[n]:.2f}" for n in shown]
            table.append([name, spread(row["ratio"]), *figures, f"{row['extra_memory_percent']:.1f} %"])
        first = rows["AdamW, fused"]
        where = f"{found['threads']} thread{'s' * (found['threads'] > 1)}" if found["device"] == "cpu" else "GPU"
        took = f"AdamW {first['milliseconds']} ms, a copy {first['copy_gb_per_second']} GB/s"
        parts += [f"**{where}, {found['dtype']}, gradients: {kind}** ({took})"]
        parts += [report.markdown_table(table, "<" + ">" * (len(table[0]) - 1))]
    return [*parts, source(found)]


STEP = (
    "The weights are all-MiniLM-L6-v2's, 22.7M, or one tensor of `--weights`. With p=2 CLASSP's step is PyTorch's "
    "fused Adagrad, which reads the gradient and reads and writes weight and accumulator: 20 bytes a float32 weight "
    "against AdamW's 28, which is the `bound` where memory is what takes the time; `bandwidth`, on a GPU: those bytes "
    "a second, against what copying the weights reaches in the same run. Before it CLASSP looks at every gradient "
    "once, to keep what is not finite out of the memory. Other powers, and memories of fewer bytes, take PyTorch's "
    "elementwise operations in blocks, which pass over the weights several times. `batch`: the gradients of a real "
    "batch of 16 texts; `embedding`: those of its word embedding alone, of which most rows have none. Extra memory: "
    "what a step allocates at its peak, in percent of the parameters."
)
NO_GPU = (
    "**GPU**: none was at hand, so there is no row. `bash benchmarks/gpu.sh` runs every benchmark that a GPU can, and "
    "`python benchmarks/bench_step.py --device cuda --weights 1000000000` measures this one."
)


def page(results: Path) -> str:
    parts = [
        "# Performance",
        wrapped(
            "Written by `python benchmarks/report_performance.py` from the JSON under "
            "[benchmarks/results/](../benchmarks/results); every number comes from one run of the program named "
            "below its table, as a ratio within that run. Quartiles lie far apart where other programs shared the "
            "cores."
        ),
        "## A step of the optimizer",
        wrapped(STEP),
    ]
    paths = [*sorted(results.glob("bench_step_*.json")), *sorted(results.glob("gpu/bench_step*.json"))]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if all(run["device"] == "cpu" for run in found):
        parts += [wrapped(NO_GPU)]
    for run in found:
        parts += steps(run)
    if found := load("bench_sequence", results):
        speed, evaluation = spread(found["classp_to_adamw"], 3), spread(found["evaluation_sorted_to_shuffled"], 3)
        text = (
            f"`ContinualTrainer` with CLASSP trains {speed} times as many samples a second as Transformers' "
            f"`Trainer` with fused AdamW (quartiles over rounds of one run, {found['precision']}). Evaluating takes "
            f"{evaluation} of the time once a split is sorted by length."
        )
        parts += ["## A whole training", wrapped(text), source(found)]
    if found := load("bench_penalty", results):
        shares = found["shares_of_a_step"]
        table = [["share of a training step (quartiles)", *shares]]
        names = next(iter(shares.values()))
        table += [[name, *(spread(of[name], 1, percent=True) for of in shares.values())] for name in names]
        text = (
            "Of a step of `sentiment_sequence` (batches of 32 texts of up to 64 tokens) and of `compare_methods` "
            f"(16 texts of 32 tokens), {found['precision']}."
        )
        parts += ["## A penalty", wrapped(text), report.markdown_table(table, "<>>"), source(found)]
    if found := load("bench_fisher", results):
        table = [["", "times faster (quartiles)", "ms an example", "peak MiB beside the model"]]
        for name, row in found["rows"].items():
            table.append([name, spread(row["speedup"]), f"{row['ms_an_example']:.1f}", f"{row['peak_mib']:.0f}"])
        parts += ["## EWC's Fisher", report.markdown_table(table, "<>>>"), source(found)]
    if found := load("bench_long_sequence", results):
        table = [["", "tasks 3 to 14", "the last twelve", "ratio"]]
        for name, label in (
            ("ms_a_step", "ms a training step"),
            ("resident_mib", "memory of the process, MiB"),
            ("disk_mib", "disk, MiB"),
        ):
            early, late = found["early_late"][name]
            table.append([label, f"{early:.1f}", f"{late:.1f}", f"{late / early:.3f}"])
        parts += ["## Fifty tasks", report.markdown_table(table, "<>>>"), source(found)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    (ROOT / "docs/performance.md").write_text(page(ROOT / "benchmarks/results"), encoding="utf-8")


if __name__ == "__main__":
    main()
