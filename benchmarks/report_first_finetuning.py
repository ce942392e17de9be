"""docs/first_finetuning.md and its figure, from the committed runs of first_finetuning.py.

python benchmarks/report_first_finetuning.py
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

from compare_methods import read_lines
from first_finetuning import ARMS, REPORTED_ON, STEPS, TUNED_ON, chosen, score
from report_performance import ROOT, cpu, wrapped

from classp_hf import report
from classp_hf.metrics import confidence

RATES = [arm for arm in ARMS if arm.startswith("adamw_")]
NAMES = {
    **{arm: f"AdamW, {arm.removeprefix('adamw_')}" for arm in RATES},
    "lora": "AdamW, LoRA",
    "ewc_pretrained": "EWC, pretrained memory",
    "classp": "CLASSP, empty memory",
    "classp_pretrained": "CLASSP, pretrained memory",
    "classp_strong": "CLASSP, pretrained, weighed up",
    "rehearsal": "AdamW + rehearsal",
    "classp_rehearsal": "CLASSP + rehearsal",
    "real_text": "AdamW + rehearsal of real text",
}
HALF = "half-way back"
MEASURED = {  # the column's name, the axis
    **dict.fromkeys(
        ("domain", "domain_movie"), ("new text", "loss on new text of the domain (nats a token; left is better)")
    ),
    "sentiment": ("accuracy, %", "accuracy on the new task (%; right is better)"),
}
LEAST = 0.01  # nats: of a rise under AdamW that others are divided by
Runs = dict[str, dict[int, dict[str, Any]]]  # arm -> seed -> line


def collect(lines: list[dict[str, Any]], setup: str) -> Runs:
    """The reported runs at the chosen settings; interpolated ones under the name of their rate."""
    found: Runs = defaultdict(dict)
    for line in (line for line in lines if line["stage"] == "report" and line["setup"] == setup):
        if line["arm"] == "interpolation":
            rate = float(line["setting"].split()[1])
            found[f"AdamW, {rate:g}, {HALF}"][line["seed"]] = line
        elif line["setting"] == chosen(setup, line["arm"], lines):
            found[NAMES[line["arm"]]][line["seed"]] = line
    return found


def rise(line: dict[str, Any]) -> float:
    return line["after"]["general_loss"] - line["before"]["general_loss"]


def cost_under_adamw(curve: list[dict[str, Any]], wanted: float) -> tuple[float, bool]:
    """The rise at which AdamW's rates, in their order and with lines between them, first score `wanted` on the new
    task; if they never do, that of the rate that scores best, and False."""
    start = score({**curve[0], "after": curve[0]["before"]})
    points = [(start, 0.0), *((score(line), rise(line)) for line in curve)]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 < wanted <= x1:
            return y0 + (y1 - y0) * (wanted - x0) / (x1 - x0), True
    return max(points)[1], False


def new_task(line: dict[str, Any], when: str = "after") -> float:
    return line[when]["task"] * (100 if line["setup"] == "sentiment" else 1)


def cell(values: list[float], digits: int = 3) -> str:
    middle, half = confidence(values)
    return f"{middle:.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{middle:.{digits}f}"


def rows(found: Runs, setup: str) -> list[list[str]]:
    head = "|general text|rise|rise, AdamW = 1|KL, general|KL, own samples|seconds|seeds"
    table = [["", *f"{MEASURED[setup][0]}{head}".split("|")]]
    first, digits = next(iter(next(iter(found.values())).values())), 1 if setup == "sentiment" else 3
    before = first["before"]["general_loss"]
    table.append(["before", f"{new_task(first, 'before'):.{digits}f}", f"{before:.3f}", *[""] * 6])
    for name, runs in found.items():
        lines = [runs[seed] for seed in sorted(runs)]
        shares, all_reached = [], True
        for seed in sorted(runs):
            curve = [found[NAMES[arm]][seed] for arm in RATES if seed in found.get(NAMES[arm], {})]
            if len(curve) > 1:
                cost, reached = cost_under_adamw(curve, score(runs[seed]))
                if cost >= LEAST:
                    shares.append(rise(runs[seed]) / cost)
                    all_reached &= reached
        bound = "" if all_reached else "≤ "
        share = f"{bound}{cell(shares, 2)}" if len(shares) == len(runs) else ""
        after = [[line["after"][key] for line in lines] for key in ("general_loss", "kl_general", "kl_own")]
        table.append([
            name, cell([new_task(line) for line in lines], digits), cell(after[0]),
            cell([rise(line) for line in lines]), "1" if name in [NAMES[arm] for arm in RATES] else share,
            cell(after[1]), cell(after[2]), f"{confidence([line['seconds'] for line in lines])[0]:.0f}",
            str(len(lines)),
        ])  # fmt: skip
    return table


def plot(found: Runs, setup: str, path: Path) -> None:
    """The new task (x) against the rise of general text (y): AdamW's rates a curve, half-way points grey."""
    figure = report.new_figure(7.6, 4.8)
    axes = figure.subplots()
    curve = [name for name in (NAMES[arm] for arm in RATES) if name in found]
    middle = {name: [confidence([f(line) for line in runs.values()]) for f in (new_task, rise)]
              for name, runs in found.items()}  # fmt: skip
    line = [(middle[name][0][0], middle[name][1][0]) for name in curve]
    axes.plot(*zip(*line), color="black", marker="o", label="AdamW's rates")
    others = [name for name in found if name not in curve]
    for i, name in enumerate([*(n for n in others if HALF not in n), *(n for n in others if HALF in n)]):
        (x, dx), (y, dy) = middle[name]
        half = HALF in name
        style = {**report.series_style(i), "linestyle": "none", **({"color": "0.7", "marker": "x"} if half else {})}
        label = name if not half else HALF if name == next(n for n in others if HALF in n) else None
        axes.errorbar(x, y, xerr=dx or None, yerr=dy or None, capsize=2, label=label, **style)
    axes.set_xlabel(MEASURED[setup][1])
    axes.set_ylabel("rise of the loss on general text (nats; down is better)")
    axes.grid(color="0.9")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    report.save_figure(figure, path)


def page(lines: list[dict[str, Any]]) -> str:
    parts = [
        "# What the first fine-tuning costs, by method",
        "SmolLM2-135M-Instruct is trained on plain sentences of one domain (set-up domain), or to answer in one word "
        "what the sentiment of such a sentence is (set-up sentiment: the chat template, the loss on the answer "
        "alone). Measured are the loss on new text of the domain, or the accuracy on new sentences; the loss on "
        "general text (Python's documentation), in nats a token; and the KL from the starting model, in fp32. Every "
        f"arm's setting was chosen on another domain ({TUNED_ON}) by the first of these, one seed, whatever it cost "
        "the model; then it was run on the domain of the table. Mean ± half the width of the 95 % interval over "
        "seeds. Written by `python benchmarks/report_first_finetuning.py`.",
        "**Rise, AdamW = 1**: the rise of the loss on general text over that at which AdamW's rates, with lines "
        "between them, do as well on the new task; ≤ where in some seed no rate does, and the best one's rise is "
        f"taken; empty where AdamW's own rise there is below {LEAST} nats in some seed. Half-way "
        "back: weights half-way between start and end (`interpolate`, `blend`). Seconds: CPU seconds of the training, "
        "samples and answers included, beside other work.",
    ]
    for setup in STEPS:
        if found := collect(lines, setup):
            order = [n for n in NAMES.values() if n in found] + sorted(n for n in found if HALF in n)
            found = {name: found[name] for name in order}
            plot(found, setup, ROOT / f"docs/images/first_finetuning_{setup}.png")
            table = rows(found, setup)
            settings = {arm: chosen(setup, arm, lines).replace("--", "") for arm in NAMES if NAMES[arm] in found}
            seeds = sorted({len(runs) for runs in found.values()})
            first = next(iter(next(iter(found.values())).values()))
            commits = sorted({line["commit"][:7] for runs in found.values() for line in runs.values()})
            tuned_as = setup.removesuffix("_movie")
            where = f"{first['precision']} autocast, {cpu(first['hardware'])}, one thread, torch "
            where += f"{first['versions']['torch']}, commits {', '.join(commits)}"
            parts += [
                f"## {tuned_as.capitalize()} {REPORTED_ON[setup]}: {STEPS[setup]} steps of 8 texts, "
                + f"{' or '.join(map(str, seeds))} seeds",
                report.markdown_table(table, "<" + ">" * (len(table[0]) - 1)),
                f"![The new task against general text](images/first_finetuning_{setup}.png)",
                "Chosen: " + "; ".join(f"{NAMES[arm]}: {flags}" for arm, flags in settings.items() if flags) + ".",
                f"`python benchmarks/first_finetuning.py tune --setups {tuned_as}`, then `report`; {where}.",
            ]
    plain = ("#", "|", "!")
    return "\n\n".join(p if p.startswith(plain) else wrapped(p) for p in parts) + "\n"


if __name__ == "__main__":
    lines = read_lines(ROOT / "benchmarks/results/first_finetuning.jsonl")
    Path(ROOT / "docs/first_finetuning.md").write_text(page(lines))
