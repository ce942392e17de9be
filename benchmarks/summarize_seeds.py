"""Means with 95% intervals, and paired differences, over runs of the recipe that differ in their seed alone.

for seed in 0 1 2 3 4; do
  accelerate launch recipes/sentiment_sequence.py --seed $seed --output_dir outputs/seeds/$seed
done
python benchmarks/summarize_seeds.py outputs/seeds/* --output benchmarks/results/sentiment_seeds.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from classp_hf.metrics import confidence
from classp_hf.report import write_json


def interval(values: list[float]) -> str:
    """Mean ± half width of its 95% interval, in points; without the interval for one value."""
    middle, half = confidence([100 * v for v in values])
    return f"{middle:.1f} ± {half:.1f}" if len(values) > 1 else f"{middle:.1f}"


def columns(run: dict) -> dict[str, float]:
    R, T = run["accuracy_matrix"], len(run["tasks"])
    named = {f"{task}, learned": R[j + 1][j] for j, task in enumerate(run["tasks"])}
    named |= {f"{task}, at the end": R[T][j] for j, task in enumerate(run["tasks"][:-1])}
    return named | {k: run["metrics"][k] for k in ("average_accuracy", "learning_accuracy", "backward_transfer")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="output_dir of each run")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--arms", nargs=2, default=["classp", "naive"], help="the difference shown is first - second")
    arguments = parser.parse_args()

    runs = {
        arm: [json.loads((folder / arm / "results.json").read_text()) for folder in sorted(arguments.folders)]
        for arm in arguments.arms
    }
    kept = ["tasks", "accuracy_matrix", "metrics", "optimizer", "method"]
    kept += ["versions", "hardware", "commit", "command", "seconds"]
    raw = {arm: [{k: r[k] for k in kept} | {"seed": r["arguments"]["seed"]} for r in rs] for arm, rs in runs.items()}
    write_json(arguments.output, raw)

    first, second = ([columns(r) for r in raw[arm]] for arm in arguments.arms)
    print(f"{len(first)} seeds: mean ± half width of the 95% interval, in points\n")
    print(f"| | {arguments.arms[0]} | {arguments.arms[1]} | paired difference |\n|---|---:|---:|---:|")
    for name in first[0]:
        a, b = [c[name] for c in first], [c[name] for c in second]
        print(f"| {name} | {interval(a)} | {interval(b)} | {interval([x - y for x, y in zip(a, b)])} |")


if __name__ == "__main__":
    main()
