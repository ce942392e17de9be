"""docs/performance.md from the committed results of the bench_*.py programs.

python benchmarks/report_performance.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from classp_hf import report

ROOT = Path(__file__).parents[1]


def load(name: str, results: Path) -> dict[str, Any] | None:
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def source(found: dict[str, Any]) -> str:
    hardware = found["hardware"]
    return f"`{found['command']}`, commit {found['commit'][:7]}, torch {found['versions']['torch']}, {hardware['cpu']}, GPUs: {', '.join(hardware['gpus']) or 'none'}."


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
        parts += [
            f"**{where}, {found['dtype']}, gradients: {kind}** (AdamW {first['milliseconds']} ms, a copy {first['copy_gb_per_second']} GB/s)"
        ]
        parts += [report._markdown(table, "<" + ">" * (len(table[0]) - 1))]
    return [*parts, source(found)]


def page(results: Path) -> str:
    parts = [
        "# Performance",
        "Written by `python benchmarks/report_performance.py` from the JSON under [benchmarks/results/](../benchmarks/results); every number comes from one run of the "
        "program named below its table, as a ratio within that run.",
        "## A step of the optimizer",
        "all-MiniLM-L6-v2's 22.7M float32 weights. A dense step of CLASSP reads the gradient and reads and writes weight and accumulator: 20 bytes a weight against AdamW's 28, which is the "
        "`bound` where memory is what takes the time; `bandwidth`, on a GPU: those bytes a second, against what copying the weights reaches in the same run. `batch`: the gradients of a real batch of 16 texts; "
        "`embedding`: those of its word embedding alone, of which most rows have none: a block of 256 weights in which no gradient passes costs reading its gradients. Extra memory: what a step "
        "allocates at its peak, in percent of the parameters.",
    ]
    if not list(results.glob("bench_step_*cuda*.json")):
        parts += [
            "**GPU**: none was at hand, so there is no row. `python benchmarks/bench_step.py --device cuda --weights 1000000000` measures one; what is known of that step without a GPU is in "
            "[architecture.md](architecture.md#gpus)."
        ]
    for path in sorted(results.glob("bench_step_*.json")):
        parts += steps(json.loads(path.read_text()))
    if found := load("bench_sequence", results):
        parts += [
            "## A whole training",
            f"`ContinualTrainer` with CLASSP trains {spread(found['classp_to_adamw'], 3)} times as many samples a second as Transformers' `Trainer` with fused AdamW (quartiles over rounds of one run). "
            f"Evaluating takes {spread(found['evaluation_sorted_to_shuffled'], 3)} of the time once a split is sorted by length.",
            source(found),
        ]
    if found := load("bench_penalty", results):
        shares = found["shares_of_a_step"]
        table = [["share of a training step (quartiles)", *shares]]
        names = next(iter(shares.values()))
        table += [[name, *(spread(of[name], 1, percent=True) for of in shares.values())] for name in names]
        what = "Of a step of the recipes: `sentiment_sequence` (batches of 32 texts of up to 64 tokens, float32), `compare_methods` (16 texts of 32 tokens, bf16 autocast)."
        parts += ["## A penalty", what, report._markdown(table, "<>>"), source(found)]
    if found := load("bench_fisher", results):
        table = [["", "times faster (quartiles)", "ms an example", "peak MiB beside the model"]]
        table += [[n, spread(r["speedup"]), f"{r['ms_an_example']:.1f}", f"{r['peak_mib']:.0f}"] for n, r in found["rows"].items()]  # fmt: skip
        parts += ["## EWC's Fisher", report._markdown(table, "<>>>"), source(found)]
    if found := load("bench_long_sequence", results):
        named = {
            "ms_a_step": "ms a training step",
            "resident_mib": "memory of the process, MiB",
            "disk_mib": "disk, MiB",
        }
        table = [["", "tasks 3 to 14", "the last twelve", "ratio"]]
        table += [[label, *(f"{x:.1f}" for x in found["early_late"][n]), f"{found['early_late'][n][1] / found['early_late'][n][0]:.3f}"] for n, label in named.items()]  # fmt: skip
        parts += ["## Fifty tasks", report._markdown(table, "<>>>"), source(found)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/performance.md")
    options = parser.parse_args()
    options.output.write_text(page(options.results), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
