"""docs/first_finetuning.md and its figure, from the committed runs of first_finetuning.py.

python benchmarks/report_first_finetuning.py
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

from compare_methods import read_lines
from first_finetuning import ARMS, DOMAINS, STEPS, chosen, score
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
    "classp_strong": "the same, weighed up",
    "rehearsal": "AdamW + rehearsal",
    "classp_rehearsal": "CLASSP + rehearsal",
    "real_text": "AdamW + rehearsal of real text",
}
HALF = "half-way back"
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


def cell(values: list[float], digits: int = 3) -> str:
    middle, half = confidence(values)
    return f"{middle:.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{middle:.{digits}f}"


def rows(found: Runs) -> list[list[str]]:
    table = [
        [
            "",
            "new text",
            "general text",
            "rise",
            "rise, AdamW = 1",
            "KL, general",
            "KL, own samples",
            "seconds",
            "seeds",
        ]
    ]
    before = next(iter(next(iter(found.values())).values()))["before"]
    table.append(["before", f"{before['task']:.3f}", f"{before['general_loss']:.3f}", *[""] * 6])
    for name, runs in found.items():
        lines = [runs[seed] for seed in sorted(runs)]
        shares, all_reached = [], True
        for seed in sorted(runs):
            curve = [found[NAMES[arm]][seed] for arm in RATES if seed in found.get(NAMES[arm], {})]
            if len(curve) > 1:
                cost, reached = cost_under_adamw(curve, score(runs[seed]))
                shares.append(rise(runs[seed]) / cost)
                all_reached &= reached
        share = ("" if all_reached else "≤ ") + (cell(shares, 2) if shares else "")
        after = [[line["after"][key] for line in lines] for key in ("task", "general_loss", "kl_general", "kl_own")]
        table.append([
            name, cell(after[0]), cell(after[1]), cell([rise(line) for line in lines]),
            "1" if name in [NAMES[arm] for arm in RATES] else share,
            cell(after[2]), cell(after[3]), f"{confidence([line['seconds'] for line in lines])[0]:.0f}",
            str(len(lines)),
        ])  # fmt: skip
    return table


def plot(found: Runs, path: Path) -> None:
    """New text (x) against the rise of general text (y): AdamW's rates a curve, half-way points grey."""
    figure = report.new_figure(7.6, 4.8)
    axes = figure.subplots()
    curve = [name for name in (NAMES[arm] for arm in RATES) if name in found]
    middle = {name: [confidence([f(line) for line in runs.values()]) for f in (lambda x: x["after"]["task"], rise)]
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
    axes.set_xlabel("loss on new text of the domain (nats a token; left is better)")
    axes.set_ylabel("rise of the loss on general text (nats; down is better)")
    axes.grid(color="0.9")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    report.save_figure(figure, path)


def page(lines: list[dict[str, Any]]) -> str:
    parts = [
        "# What the first fine-tuning costs, by method",
        "SmolLM2-135M-Instruct is trained on plain sentences of one domain; measured are the loss on new text of that "
        "domain and on general text (Python's documentation), in nats a token, and the KL from the starting model, in "
        f"fp32. Every arm's setting was chosen on another domain ({DOMAINS['tune']}) by the loss on its new text, one "
        f"seed, whatever it cost the model; then it was run on {DOMAINS['report']}. Mean ± half the width of the "
        "95 % interval over seeds. Written by `python benchmarks/report_first_finetuning.py`.",
        "**Rise, AdamW = 1**: the rise of the loss on general text over that at which AdamW's rates, with lines "
        "between them, reach the same loss on new text; ≤ where in some seed no rate does, and the best one's rise "
        "is taken. Half-way back: weights half-way between start and end (`interpolate`, `blend`). Seconds: CPU "
        "seconds of the training, samples and answers included, beside other work.",
    ]
    for setup in STEPS:
        if found := collect(lines, setup):
            order = [n for n in NAMES.values() if n in found] + sorted(n for n in found if HALF in n)
            found = {name: found[name] for name in order}
            plot(found, ROOT / f"docs/images/first_finetuning_{setup}.png")
            table = rows(found)
            settings = {arm: chosen(setup, arm, lines).replace("--", "") for arm in NAMES if NAMES[arm] in found}
            seeds = sorted({len(runs) for runs in found.values()})
            first = next(iter(next(iter(found.values())).values()))
            commits = sorted({line["commit"][:7] for runs in found.values() for line in runs.values()})
            where = f"{first['precision']} autocast, {cpu(first['hardware'])}, one thread, torch "
            where += f"{first['versions']['torch']}, commits {', '.join(commits)}"
            parts += [
                f"## {setup.capitalize()}: {STEPS[setup]} steps of 8 texts, {' or '.join(map(str, seeds))} seeds",
                report.markdown_table(table, "<" + ">" * (len(table[0]) - 1)),
                f"![New text against general text](images/first_finetuning_{setup}.png)",
                "Chosen: " + "; ".join(f"{NAMES[arm]}: {flags}" for arm, flags in settings.items() if flags) + ".",
                f"`python benchmarks/first_finetuning.py tune --setups {setup}`, then `report`; {where}.",
            ]
    plain = ("#", "|", "!")
    return "\n\n".join(p if p.startswith(plain) else wrapped(p) for p in parts) + "\n"


if __name__ == "__main__":
    lines = read_lines(ROOT / "benchmarks/results/first_finetuning.jsonl")
    Path(ROOT / "docs/first_finetuning.md").write_text(page(lines))
