"""Tables and plots of `compare_methods.py`: reads its JSON lines, writes docs/results.md and its figures.

    python benchmarks/report_methods.py

No number in docs/results.md is written by hand.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from compare_methods import ARMS, EVAL_EXAMPLES, REPORTED, TRAIN_EXAMPLES, TUNING, frozen_setting, read_lines
from report_performance import ROOT, cpu, wrapped
from summarize_seeds import interval

from classp_hf import report
from classp_hf.metrics import gap_recovered, summarize

BASELINE, JOINT, OURS = "adamw", "joint", "classp_logit_adjustment"


def collect(lines: list[dict[str, Any]], sequence: str) -> dict[str, dict[int, list[list[float]]]]:
    """arm -> seed -> R of `sequence`, which a longer run that begins with it holds too."""
    found: dict[str, dict[int, list[list[float]]]] = defaultdict(dict)
    tasks = sequence.split(">")
    for line in lines:
        done = line["sequence"].split(">")
        if line["stage"] != "report":
            continue
        if line["arm"] == JOINT:
            if sorted(tasks) == sorted(done):
                order = [done.index(task) for task in tasks]
                found[JOINT][line["seed"]] = [[line["R"][0][i] for i in order]]
        elif done[: len(tasks)] == tasks:
            found[line["arm"]][line["seed"]] = [row[: len(tasks)] for row in line["R"][: len(tasks) + 1]]
    return {arm: found[arm] for arm in ARMS if arm in found}


def table(found: dict[str, dict[int, list[list[float]]]], tasks: list[str]) -> str:
    """A Markdown table, best ACC first; replay-free methods, those that store data, and joint training."""
    two = len(tasks) == 2
    header = ["method", "seeds", "ACC", "ACC - AdamW's, paired", f"`{OURS}`'s ACC - its, paired", "LA", "BWT"]
    header += [f"{task} at the end" for task in tasks] if two else ["forgetting"]
    header.append("gap recovered G")
    acc = {arm: {seed: float(np.mean(R[-1])) for seed, R in runs.items()} for arm, runs in found.items()}

    def paired(arm: str, other: str) -> str:
        common = [s for s in acc[arm] if s in acc.get(other, {})]
        return interval([acc[arm][s] - acc[other][s] for s in common]) if common and arm != other else ""

    rows: dict[str, list[tuple[float, list[str]]]] = defaultdict(list)
    for arm, runs in found.items():
        metrics = [summarize(R) for R in runs.values()] if arm != JOINT else []
        cells = [f"`{arm}`", str(len(runs)), interval(list(acc[arm].values())), paired(arm, BASELINE)]
        cells.append(paired(OURS, arm) if arm not in (BASELINE, JOINT) and OURS in acc else "")
        for key in ("learning_accuracy", "backward_transfer", *(() if two else ("forgetting",))):
            cells.append(interval([m[key] for m in metrics]) if metrics else "")
        cells += [interval([R[-1][j] for R in runs.values()]) for j in range(2 if two else 0)]
        three = [acc[arm], acc.get(BASELINE, {}), acc.get(JOINT, {})]
        common = set.intersection(*map(set, three)) if arm not in (BASELINE, JOINT) else ()  # the seeds that all have
        means = (float(np.mean([of[seed] for seed in common])) for of in three)
        cells.append(f"{gap_recovered(*means):.2f}" if common else "")
        rows[ARMS[arm].kind].append((float(np.mean(list(acc[arm].values()))), cells))
    text = []
    for kind in ("replay-free", "stores data", "upper bound"):
        if rows[kind]:
            ordered = [cells for _, cells in sorted(rows[kind], key=lambda row: -row[0])]
            shown = report.markdown_table([header, *ordered], "<" + ">" * (len(header) - 1))
            text.append(f"{kind[0].upper()}{kind[1:]}:\n\n{shown}")
    return "\n\n".join(text)


def traces(lines: list[dict[str, Any]], tasks: tuple[str, str]) -> dict[str, np.ndarray]:
    """arm -> (seeds, points, 3): step, accuracy on the old task and on the new one while it trains; last the end."""
    found: dict[str, list[list[list[float]]]] = defaultdict(list)
    for line in lines:
        if line["stage"] == "report" and line["trace"] and tuple(line["sequence"].split(">")[:2]) == tasks:
            end = [line["trace"][-1][0] + 20, *line["R"][2][:2]]
            found[line["arm"]].append([[0, *line["R"][1][:2]], *line["trace"], end])
    return {arm: np.array(found[arm]) for arm in ARMS if arm in found}


def equal_plasticity(found: dict[str, np.ndarray], slack: float = 0.02) -> str:
    """Old-task accuracy where the new task is learned as well as by AdamW, less `slack`; and the stability gap."""
    if BASELINE not in found:
        return ""
    wanted = float(found[BASELINE][:, -1, 2].mean()) - slack
    rows = []
    for arm, runs in found.items():
        mean = runs.mean(0)
        reached = [point for point in mean if point[2] >= wanted]
        best = f"{100 * max(p[1] for p in reached):.1f}" if reached else "not reached"
        lowest = runs[:, :, 1].min(1).mean()
        ends = [f"{100 * v:.1f}" for v in (lowest, *mean[-1][1:])]
        rows.append((float(best) if reached else -1.0, [f"`{arm}`", best, *ends]))
    header = ["method", f"old task where new >= {100 * wanted:.1f}", "old task at its lowest (min-ACC)"]
    header += ["old task at the end", "new task at the end"]
    return report.markdown_table([header, *(cells for _, cells in sorted(rows, key=lambda r: -r[0]))], "<>>>>")


def plot_front(found: dict[str, np.ndarray], tasks: tuple[str, str], path: Path) -> None:
    figure = report.new_figure(8, 5.2)
    axes = figure.subplots()
    shown = [(arm, found[arm]) for arm in README_ARMS if arm in found]  # more would hide each other
    for i, (arm, runs) in enumerate(shown):
        mean = 100 * runs.mean(0)
        style = report.series_style(i)
        line = {**style, "marker": None, "linewidth": 3 if arm == OURS else 1, "alpha": 0.7}
        axes.plot(mean[1:, 2], mean[1:, 1], **line)
        axes.plot(mean[-1:, 2], mean[-1:, 1], label=arm, markersize=11 if arm == OURS else 7, **style)
    axes.set_xlabel(f"accuracy on the new task ({tasks[1]}), %")
    axes.set_ylabel(f"accuracy on the old task ({tasks[0]}), %")
    axes.set_title(f"{tasks[0]}, then {tasks[1]}: each line follows one training, the marker is its end", fontsize=10)
    axes.grid(color="0.92")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    report.save_figure(figure, path)


def costs(lines: list[dict[str, Any]]) -> str:
    by_arm: dict[str, list[dict[str, Any]]] = defaultdict(list)
    reported = [line for line in lines if line["stage"] == "report" and line["arm"] != JOINT]
    arms: dict[str, set[str]] = defaultdict(set)
    for line in reported:
        arms[line["commit"]].add(line["arm"])
    together = max((c for c in arms if BASELINE in arms[c]), key=lambda c: len(arms[c]), default=None)
    for line in reported:
        if line["commit"] == together:
            by_arm[line["arm"]].append(line)
    base = np.median([line["seconds_a_step"] for line in by_arm.get(BASELINE, [])]) if by_arm.get(BASELINE) else None
    rows = []
    for arm, runs in ((a, by_arm[a]) for a in ARMS if a in by_arm):
        step = np.array([line["seconds_a_step"] for line in runs])
        low, middle, high = np.percentile(step, [25, 50, 75]) / (base or np.nan)
        boundary = np.median([line["seconds_a_boundary"] for line in runs])
        held = np.median([line["bytes_a_weight"] for line in runs])
        rows.append([f"`{arm}`", f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{boundary:.1f}", f"{held:.1f}"])
    header = ["method", "time a step, AdamW = 1 (quartiles)", "seconds a boundary"]
    header.append("bytes a weight held while training")
    return report.markdown_table([header, *rows], "<>>>")


def tuning(lines: list[dict[str, Any]]) -> str:
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["stage"] == "tune" and line["setting"] in ARMS[line["arm"]].settings:
            scores[line["arm"]][line["setting"]].append(float(np.mean(line["R"][-1])))
    rows = []
    for arm in (a for a in ARMS if a in scores):
        mean = {s: 100 * float(np.mean(scores[arm][s])) for s in ARMS[arm].settings if scores[arm][s]}
        best = max(mean, key=mean.__getitem__)
        named = {s: f"{s.replace('--', '')}: {v:.1f}" for s, v in mean.items()}
        rows.append([f"`{arm}`", ", ".join(f"**{text}**" if s == best else text for s, text in named.items())])
    return report.markdown_table([["method", "settings tried: validation ACC; chosen in bold"], *rows], "<<")


README_ARMS = {
    OURS: "`ClasspTrainer`",
    "classp": "CLASSP, the paper's rule alone",
    "logit_adjustment": "logit adjustment",
    "lwf": "LwF",
    "ewc": "EWC",
    "merge": "merge",
    "interpolate": "interpolation (WiSE-FT)",
    "l2sp": "L2-SP",
    BASELINE: "nothing (AdamW)",
    "adagrad": "AdaGrad",
    "mofo": "MoFO",
    "lora": "LoRA",
    "olora": "O-LoRA",
    "osf": "OSF",
    "classp_replay_5": "`ClasspTrainer` + replay of 5%",
    "replay_5": "replay of 5%",
    JOINT: "joint training (upper bound)",
}
MARKS = ("<!-- results: written by benchmarks/report_methods.py -->", "<!-- end of results -->")


def all_sequences() -> list[str]:
    """Those of two tasks, then the longer ones."""
    return list(dict.fromkeys([*(">".join(s.split(">")[:2]) for s in REPORTED), *REPORTED]))


def readme_table(lines: list[dict[str, Any]]) -> str:
    """Old and new task and their mean on two tasks, ACC on four: the rows of `README_ARMS`, best first of a kind."""
    sequences = all_sequences()
    found = {sequence: collect(lines, sequence) for sequence in sequences}
    shown = [sequence for sequence in sequences if BASELINE in found[sequence]]
    header = ["method", *(f"{s.replace('>', ', ')}: {'old / new / ' if s.count('>') == 1 else ''}ACC" for s in shown)]
    rows = []
    for arm, name in README_ARMS.items():
        cells, order = [name], []
        for sequence in shown:
            runs = found[sequence].get(arm)
            if runs is None:
                cells.append("")
                continue
            tasks = [f"{100 * np.mean([R[-1][j] for R in runs.values()]):.1f}" for j in (0, 1)]
            acc = [float(np.mean(R[-1])) for R in runs.values()]
            cells.append(" / ".join([*(tasks if sequence.count(">") == 1 else []), interval(acc)]))
            order.append(float(np.mean(acc)))
        if order:
            kind = ["replay-free", "stores data", "upper bound"].index(ARMS[arm].kind)
            rows.append((kind, -order[0], cells))
    return report.markdown_table([header, *(cells for *_, cells in sorted(rows))], "<" + ">" * len(shown))


def protocol(lines: list[dict[str, Any]], frozen: dict[str, str]) -> list[str]:
    versions = ", ".join(sorted({line["torch"] for line in lines}))
    hardware = [line["hardware"] for line in lines]
    ran_on = {f"{cpu(h)}, {h['torch_threads']} thread a run, GPUs: {', '.join(h['gpus']) or 'none'}" for h in hardware}
    machines = "; ".join(sorted(ran_on))
    # lines that do not say their precision are older
    precisions = {line.get("precision", "bf16" if "--bf16 True" in line["flags"] else "fp32") for line in lines}
    shown = " and ".join(sorted({"bf16": "bf16 autocast", "fp32": "float32"}[p] for p in precisions))
    commits = ", ".join(sorted({line["commit"][:7] for line in lines}))
    tuned = [a for a in ARMS if a in frozen and ARMS[a].tuned_as is None]
    edges = ", ".join(f"`{a}`" for a in tuned if frozen[a] in (ARMS[a].settings[0], ARMS[a].settings[-1]))
    if edges:
        edges = f"A best setting at the edge of its grid may be bettered beyond it: {edges}. "
    unreported = ", ".join(f"`{a}`" for a in ARMS if a not in frozen)
    if unreported:
        unreported = f"Arms of the comparison without a reported run, about which nothing is claimed: {unreported}."
    return [
        f"`python benchmarks/compare_methods.py all` ({len(lines)} runs; commits {commits}; {machines}; torch "
        f"{versions}). all-MiniLM-L6-v2 (22.7M weights, all trained, one shared head, no dropout), "
        f"{shown}, {TRAIN_EXAMPLES} training examples a task, 32 tokens, "
        "80 steps of 16 (two epochs) for every method on every task, clipping 1.0, linear decay. R is measured on "
        f"{EVAL_EXAMPLES} test examples a task (one accuracy: binomial error 2.9 points); the training examples, "
        "their order and the new head differ from seed to seed and are the same for all methods of a seed: "
        "differences are paired. ± is the half width of the 95% interval of the mean over seeds.",
        f"Settings were chosen on {', '.join(TUNING)} by validation accuracy (mean ACC, one seed), three settings a "
        "method, on a half of the training data that no reported run sees, and then frozen (table at the end). "
        "Methods on AdamW use the learning rate 1e-4 (on which `adamw` itself ties with the 2e-4 it chose), those "
        "on CLASSP 1e-3. Which of CLASSP's additions to offer at all was searched before, also on tuning sequences "
        "and validation data alone: that search ([log.md](log.md)) is a budget the other methods did not have. "
        f"{edges}`joint` trains on all tasks' data together, with as many steps as the sequence has; methods "
        f"that store data take as many steps as the others. `{OURS}` is what `ClasspTrainer` does by itself.",
        unreported,
        "ACC: mean accuracy at the end. LA: mean accuracy right after each task's training. BWT: change since, "
        "negative = forgetting. G: share of the gap between `adamw` and `joint` that is recovered, of the means "
        "over seeds ([metrics.md](metrics.md)). What the methods are: [methods/](methods/README.md).",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=ROOT / "benchmarks/results/compare_methods.jsonl")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results.md")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="its table is written anew")
    options = parser.parse_args()
    lines = read_lines(options.input)
    frozen = {arm: frozen_setting(arm, lines) for arm in {line["arm"] for line in lines if line["stage"] == "report"}}
    lines = [line for line in lines if line["stage"] == "tune" or line["setting"] == frozen[line["arm"]]]
    reported = [line for line in lines if line["stage"] == "report"]
    parts = [
        "# What each method keeps, and what it costs",
        wrapped(
            "Generated by `python benchmarks/report_methods.py` from "
            "[compare_methods.jsonl](../benchmarks/results/compare_methods.jsonl); nothing here is written by hand."
        ),
        "## Protocol",
        *map(wrapped, protocol(lines, frozen)),
    ]
    sequences = all_sequences()
    for sequence in sequences:
        found = collect(lines, sequence)
        tasks = sequence.split(">")
        if BASELINE not in found:
            continue
        parts += [f"## {' → '.join(tasks)}", table(found, tasks)]
        if len(tasks) == 2 and (seen := traces(lines, (tasks[0], tasks[1]))):
            image = options.output.parent / "images" / f"front_{'_'.join(tasks)}.png"
            plot_front(seen, (tasks[0], tasks[1]), image)
            parts += [
                f"![Old-task against new-task accuracy along training](images/{image.name})",
                "While the second task trains (150 of the test examples, steps 2, 6, 15, 30, 60 and the end):",
                equal_plasticity(seen),
            ]
    if reported:
        parts += [
            "## Cost",
            wrapped(
                "Time of a step (forward, backward, optimizer; runs side by side on the machine's cores, so ratios "
                "rather than seconds; of the runs at the commit at which most methods ran), time of a method before "
                "and after a task, and what optimizer and method hold beside weights and gradients."
            ),
            costs(lines),
        ]
    parts += ["## Settings", tuning(lines)]
    options.output.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    before, mark, rest = options.readme.read_text(encoding="utf-8").partition(MARKS[0])
    text = f"{before}{mark}\n\n{readme_table(lines)}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"
    options.readme.write_text(text, encoding="utf-8")
    print(f"{options.output}: {len(lines)} runs")


if __name__ == "__main__":
    main()
