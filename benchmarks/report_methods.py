"""Tables and figures of `compare_methods.py`: docs/results.md, its images, README's part between the marks.

    python benchmarks/report_methods.py

No number there is written by hand.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from compare_methods import ARMS, REPORTED, TUNING, frozen_setting, job_of, read_lines
from plot_methods import BARS, BASELINE, JOINT, NAMES, RATES, half_width, plot_cost, plot_gap, plot_old_new
from report_performance import ROOT, cpu, wrapped
from summarize_seeds import interval

from classp_hf import report
from classp_hf.metrics import gap_recovered, summarize

Lines = list[dict[str, Any]]
Runs = dict[str, dict[int, list[list[float]]]]  # arm -> seed -> R

FILES = {"compare_methods.jsonl": 300, "pseudo_rehearsal.jsonl": 300, "compare_methods_2.jsonl": 600}
"""Results, oldest first -> test examples a task. Settings that a file does not choose are those of the ones before."""
ENOUGH = 3  # seeds

README_ARMS = (BASELINE, JOINT, "classp", "classp_pseudo_rehearsal_no_counts", "classp_pseudo_rehearsal")
README_ARMS += ("pseudo_rehearsal", "classp_dropped", "classp_logit_adjustment", "ewc", "lwf")  # the first seven run
PAIRS = {  # what is said to work: the arm with it, the arm without it
    "CLASSP, its step and its memory": ("classp", BASELINE),
    "the memory of CLASSP": ("classp", "classp_dropped"),
    "that memory being of the old task": ("classp", "classp_other_memory"),
    "the step of CLASSP without a memory": ("classp_dropped", BASELINE),
    "rehearsal on AdamW": ("pseudo_rehearsal", BASELINE),
    "rehearsal on AdamW, beyond its compute": ("pseudo_rehearsal", "adamw_110_steps"),
    "rehearsed texts being like the old task's": ("pseudo_rehearsal", "pseudo_rehearsal_new_counts"),
    "rehearsal beside CLASSP, of texts that its memory draws": ("classp_pseudo_rehearsal_no_counts", "classp"),
    "such texts, in place of counted tokens": ("classp_pseudo_rehearsal_no_counts", "classp_pseudo_rehearsal"),
    "rehearsal beside CLASSP, of counted tokens": ("classp_pseudo_rehearsal", "classp"),
    "as many such texts as the batch has, in place of a quarter": (
        "classp_pseudo_rehearsal_full",
        "classp_pseudo_rehearsal",
    ),
    "both, beyond AdamW with twice the steps": ("classp_pseudo_rehearsal", "adamw_160_steps"),
    "CLASSP beside rehearsal": ("classp_pseudo_rehearsal", "pseudo_rehearsal"),
    "logit adjustment beside CLASSP": ("classp_logit_adjustment", "classp"),
    "a second task at a fifth of the rate": ("adamw_2e-5", BASELINE),
    "a second task at a tenth of the rate": ("adamw_1e-5", BASELINE),
    "EWC": ("ewc", BASELINE),
    "LwF": ("lwf", BASELINE),
    "balanced EMA": ("ema_balanced", BASELINE),
}
README_POINTS = (  # with names of `PAIRS`
    "CLASSP against AdamW {CLASSP, its step and its memory}: its step alone gives {the step of CLASSP without a "
    "memory}, its memory {the memory of CLASSP}. That memory against one of another task: {that memory being of the "
    "old task}.",
    "Rehearsal on AdamW {rehearsal on AdamW}, against AdamW with as much compute {rehearsal on AdamW, beyond its "
    "compute}. Beside CLASSP {rehearsal beside CLASSP, of counted tokens}, without counts {rehearsal beside CLASSP, "
    "of texts that its memory draws}. CLASSP beside rehearsal {CLASSP beside rehearsal}.",
)
MARKS = ("<!-- results: written by benchmarks/report_methods.py -->", "<!-- end of results -->")


class Source:
    """One file of runs: those reported at the settings that were chosen, and the runs that chose them."""

    def __init__(self, name: str, lines: Lines, known: Lines) -> None:
        reported = [line for line in lines if line["stage"] == "report"]
        self.name, self.examples = name, FILES[name]
        self.frozen = {arm: frozen_setting(arm, known) for arm in {line["arm"] for line in reported}}
        self.lines = [line for line in reported if line["setting"] == self.frozen[line["arm"]]]
        arms = {ARMS[arm].tuned_as or arm for arm in self.frozen}
        tuned = [line for line in known if line["stage"] == "tune" and line["arm"] in arms]
        self.tuned = list({job_of(line): line for line in tuned}.values())  # the later of two alike
        self.found = [collect(self.lines, sequence) for sequence in REPORTED]

    def __str__(self) -> str:
        return f"`{self.name.removesuffix('.jsonl')}`"

    def seeds(self, *arms: str) -> list[int]:
        """Those that all `arms` have on all of `REPORTED`."""
        return sorted(set.intersection(*(set(over_sequences(self.found, arm)) for arm in arms)))


def collect(lines: Lines, sequence: str) -> Runs:
    """The runs of `sequence`, which a longer run that begins with it holds too; one of its own counts more."""
    found: Runs = defaultdict(dict)
    tasks = sequence.split(">")
    for line in sorted(lines, key=lambda line: -len(line["sequence"])):
        done = line["sequence"].split(">")
        if line["arm"] == JOINT:
            if sorted(tasks) == sorted(done):
                order = [done.index(task) for task in tasks]
                found[JOINT][line["seed"]] = [[line["R"][0][i] for i in order]]
        elif done[: len(tasks)] == tasks:
            found[line["arm"]][line["seed"]] = [row[: len(tasks)] for row in line["R"][: len(tasks) + 1]]
    return {arm: found[arm] for arm in ARMS if arm in found}


def at_the_end(runs: dict[int, list[list[float]]]) -> dict[int, np.ndarray]:
    """seed -> accuracy on each task at the end, and their mean, ACC."""
    return {seed: np.array([*R[-1], np.mean(R[-1])]) for seed, R in runs.items()}


def over_sequences(found: list[Runs], arm: str) -> dict[int, float]:
    """seed -> ACC, the mean over the sequences, of the seeds that all of them have."""
    each = [at_the_end(runs.get(arm, {})) for runs in found]
    return {seed: float(np.mean([of[seed][-1] for of in each])) for seed in sorted(set.intersection(*map(set, each)))}


def gap(found: list[Runs], arm: str) -> tuple[float, float, float] | None:
    """G of ACC's mean over sequences and seeds, and its 95% interval from a bootstrap of the seeds, paired."""
    each = [over_sequences(found, name) for name in (arm, BASELINE, JOINT)]
    seeds = sorted(set.intersection(*map(set, each)))
    if not seeds or arm in (BASELINE, JOINT):
        return None
    acc = np.array([[of[seed] for seed in seeds] for of in each])
    drawn = acc[:, np.random.default_rng(0).integers(len(seeds), size=(10_000, len(seeds)))].mean(-1)
    low, high = np.percentile((drawn[0] - drawn[1]) / (drawn[2] - drawn[1]), [2.5, 97.5])
    return float(gap_recovered(*map(float, acc.mean(1)))), float(low), float(high)


def gap_text(found: list[Runs], arm: str) -> str:
    return f"{g[0]:.2f} ({g[1]:.2f} to {g[2]:.2f})" if (g := gap(found, arm)) else ""


# ---- Tables ----


def controls(sources: list[Source], pairs: Iterable[str] = PAIRS) -> tuple[str, str]:
    """What is and what is not separated from its control, as a sentence and as a table; newest runs first."""
    header = ["what is added", "with it - without it", "runs", "seeds", "ACC of both"]
    header += [f"{s.replace('>', ' → ')}: {what}" for s in REPORTED for what in ("old", "new", "ACC")]
    rows, sides = [], defaultdict(list)
    for what, pair in ((what, PAIRS[what]) for what in pairs):
        said = (0, "missing", what)  # of the file with most seeds, the newest of equals
        for source in sources:
            seeds = source.seeds(*pair)
            if len(seeds) < ENOUGH:
                continue
            ends = [[at_the_end(runs[arm]) for arm in pair] for runs in source.found]
            difference = np.array([[a[seed] - b[seed] for seed in seeds] for a, b in ends])  # sequences, seeds, 3
            both = list(difference[..., -1].mean(0))
            cells = [what, " - ".join(f"`{arm}`" for arm in pair), str(source), str(len(seeds)), interval(both)]
            rows.append([*cells, *(interval(list(of)) for each in difference for of in each.T)])
            mean, half = float(np.mean(both)), half_width(both)
            side = "above" if mean > half else "below" if mean < -half else "not"
            said = max(said, (len(seeds), side, f"{what} ({interval(both)}, {len(seeds)} seeds)"), key=lambda x: x[0])
        sides[said[1]].append(said[2])
    kinds = {"above": "Better than without it", "not": "Not separated from what is without it"}
    kinds |= {"below": "Worse than without it", "missing": f"Not run with {ENOUGH} seeds, so that nothing is claimed"}
    text = " ".join(f"{kinds[side]}: {'; '.join(sides[side])}." for side in kinds if sides[side])
    return text, report.markdown_table([header, *rows], "<<<" + ">" * (len(header) - 3))


def table(found: Runs, tasks: list[str]) -> str:
    """A Markdown table, best ACC first; replay-free methods, controls, those that store data, and joint training."""
    two = len(tasks) == 2
    header = ["method", "seeds", "ACC", "ACC - AdamW's, paired", "LA", "BWT"]
    header += [f"{task} at the end" for task in tasks] if two else ["forgetting"]
    header.append("gap recovered G")
    acc = {arm: {seed: float(np.mean(R[-1])) for seed, R in runs.items()} for arm, runs in found.items()}
    rows: dict[str, list[tuple[float, list[str]]]] = defaultdict(list)
    for arm, runs in found.items():
        metrics = [summarize(R) for R in runs.values()] if arm != JOINT else []
        common = [seed for seed in acc[arm] if seed in acc.get(BASELINE, {}) and arm != BASELINE]
        paired = interval([acc[arm][s] - acc[BASELINE][s] for s in common]) if common else ""
        cells = [f"`{arm}`", str(len(runs)), interval(list(acc[arm].values())), paired]
        for key in ("learning_accuracy", "backward_transfer", *(() if two else ("forgetting",))):
            cells.append(interval([m[key] for m in metrics]) if metrics else "")
        cells += [interval([R[-1][j] for R in runs.values()]) for j in range(2 if two else 0)]
        cells.append(gap_text([found], arm))
        rows[ARMS[arm].kind].append((float(np.mean(list(acc[arm].values()))), cells))
    text = []
    for kind in ("replay-free", "control", "stores data", "upper bound"):
        if rows[kind]:
            ordered = [cells for _, cells in sorted(rows[kind], key=lambda row: -row[0])]
            shown = report.markdown_table([header, *ordered], "<" + ">" * (len(header) - 1))
            text.append(f"{kind[0].upper()}{kind[1:]}:\n\n{shown}")
    return "\n\n".join(text)


def step_costs(lines: Lines) -> dict[str, np.ndarray]:
    """arm -> quartiles of a step's time, that of AdamW's median on the same sequence at the same commit = 1."""
    base: dict[Any, list[float]] = defaultdict(list)
    found: dict[str, list[Any]] = defaultdict(list)
    for line in lines:
        where = line["sequence"], line["commit"]
        found[line["arm"]].append((where, line["seconds_a_step"]))
        if line["arm"] == BASELINE:
            base[where].append(line["seconds_a_step"])
    ratios = {arm: [t / np.median(base[s]) for s, t in found[arm] if s in base] for arm in ARMS if arm in found}
    return {arm: np.percentile(of, [25, 50, 75]) for arm, of in ratios.items() if of}


def costs(lines: Lines) -> str:
    rows = []
    for arm, (low, middle, high) in step_costs([line for line in lines if line["arm"] != JOINT]).items():
        boundary, held = (
            np.median([line[key] for line in lines if line["arm"] == arm])
            for key in ("seconds_a_boundary", "bytes_a_weight")
        )
        rows.append([f"`{arm}`", f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{boundary:.1f}", f"{held:.1f}"])
    header = ["method", "time a step, AdamW = 1 (quartiles)", "seconds a boundary", "bytes a weight held"]
    return report.markdown_table([header, *rows], "<>>>") if rows else ""


def tuning(lines: Lines, frozen: dict[str, str]) -> str:
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        scores[line["arm"]][line["setting"]].append(float(np.mean(line["R"][-1])))
    rows = []
    for arm in (a for a in ARMS if a in frozen and a in scores):
        mean = {s: 100 * float(np.mean(scores[arm][s])) for s in ARMS[arm].settings if s in scores[arm]}
        named = {s: f"{s.replace('--', '')}: {v:.1f}" for s, v in mean.items()}
        seeds = len({line["seed"] for line in lines if line["arm"] == arm})
        shown = ", ".join(f"**{t}**" if s == frozen[arm] else t for s, t in named.items())
        rows.append([f"`{arm}`", str(seeds), shown])
    return report.markdown_table([["method", "seeds", "settings tried: validation ACC; chosen in bold"], *rows], "<><")


# ---- Pages ----


def origin(lines: Lines) -> str:
    """Commits, processor, precision: what a number needs to be reproduced."""
    machines = {f"{cpu(h)}, {h['torch_threads']} thread" for h in (line["hardware"] for line in lines)}
    # lines that do not say their precision are older
    precisions = {line.get("precision", "bf16" if "--bf16 True" in line["flags"] else "fp32") for line in lines}
    shown = {"bf16": "bf16 autocast", "fp32": "float32"}
    parts = [f"{len(lines)} runs", ", ".join(sorted(shown[p] for p in precisions)), "; ".join(sorted(machines))]
    parts.append("commits " + ", ".join(sorted({line["commit"][:7] for line in lines})))
    return "; ".join([*parts, "torch " + ", ".join(sorted({line["torch"] for line in lines}))])


PROTOCOL = (
    "all-MiniLM-L6-v2 (22.7M weights, all trained, one shared head, no dropout), 640 training examples a task, 32 "
    "tokens, 80 steps of 16 (two epochs) for every method on every task, clipping 1.0, linear decay. The training "
    "examples, their order and the new head differ from seed to seed and are the same for all methods of a seed: "
    "differences are paired. ± is the half width of the 95% interval of the mean over seeds.",
    f"Settings were chosen on {', '.join(TUNING)} by validation accuracy (mean ACC, 300 examples a task), "
    "three settings a method and a fourth beyond the edge of the grid where the best was there (once), on a half of "
    "the training data that no reported run sees, and then frozen. Methods on AdamW use the learning rate 1e-4, those "
    "on CLASSP 1e-3. Which of CLASSP's additions to offer at all was searched before, also on tuning sequences and "
    "validation data alone: that search ([log.md](log.md)) is a budget the other methods did not have.",
    "Controls take over the setting of what they control and are not tuned themselves. `classp_dropped` goes on from "
    "the same first task as `classp` with an empty memory, `classp_other_memory` with that of a training on amazon; "
    "`pseudo_rehearsal_new_counts` draws texts with the new task's token frequencies; `adamw_110_steps` trains the "
    "second task for what rehearsal costs, `adamw_160_steps` for twice the steps; `adamw_1e-5` and so on train the "
    "second task at that rate, after the same first task as `adamw`. `joint` trains on all tasks' data together, with "
    "as many steps as the sequence has. `classp_pseudo_rehearsal` is what `ClasspTrainer` does by itself.",
    "ACC: mean accuracy at the end. LA: mean accuracy right after each task's training. BWT: change since, negative = "
    "forgetting. G: share of the gap between `adamw` and `joint` that is recovered, of the means over seeds, with a "
    "95% interval from a bootstrap of the seeds, which is too narrow for few ([metrics.md](metrics.md)). What the "
    "methods are: [methods/](methods/README.md).",
)


def section(source: Source) -> list[str]:
    own = [arm for arm in ARMS if arm in source.frozen and ARMS[arm].tuned_as is None and not ARMS[arm].first]
    tried = {(line["arm"], line["setting"]) for line in source.tuned}
    grids = {arm: [s for s in ARMS[arm].settings if (arm, s) in tried] for arm in own}
    edges = [f"`{arm}`" for arm, grid in grids.items() if source.frozen[arm] in (grid[0], grid[-1])]
    error = 100 * np.sqrt(0.25 / source.examples)
    text = (
        f"[{source.name}](../benchmarks/results/{source.name}), by `python benchmarks/compare_methods.py`: "
        f"{origin(source.lines)}. {source.examples} test examples a task (one accuracy: binomial error {error:.1f} "
        f"points). The runs that chose the settings: {origin(source.tuned)}. Best at the edge of their grid: "
        f"{', '.join(edges) or 'none'}."
    )
    parts = [f"## Runs of {source}", wrapped(text)]
    longer = {line["sequence"] for line in source.lines if line["arm"] == BASELINE} - set(REPORTED)
    for sequence in (*REPORTED, *sorted(longer, key=lambda s: (s.count(">"), s))):
        parts += [
            f"### {' → '.join(sequence.split('>'))}",
            table(collect(source.lines, sequence), sequence.split(">")),
        ]
    if shown := costs(source.lines):
        text = "Time of a step: the processor's in `compare_methods_2`, the clock's on shared machines before. "
        text += "Seconds of a method before and after a task; bytes held beside weights and gradients."
        parts += ["### Cost", wrapped(text), shown]
    return [*parts, "### Settings", tuning(source.tuned, source.frozen)]


def readme_block(source: Source) -> str:
    """A table of seven of `README_ARMS`, and what each part of them gains; all of it is in the page."""
    header = ["", *(f"{s.replace('>', ', ')}: old / new / ACC" for s in REPORTED), "G"]
    shown = [arm for arm in README_ARMS if len(source.seeds(arm)) >= ENOUGH][:7]
    rows = []
    for arm in (arm for arm in NAMES if arm in shown):
        ends = [np.array(list(at_the_end(runs[arm]).values())) for runs in source.found]
        cells = [" / ".join(interval(list(of[:, i])).split(" ")[0] for i in (0, 1)) for of in ends]
        cells = [f"{cell} / {interval(list(of[:, 2]))}" for cell, of in zip(cells, ends)]
        g = gap(source.found, arm)
        rows.append([NAMES[arm], *cells, f"{g[0]:.2f}" if g else {BASELINE: "0", JOINT: "1"}[arm]])
    text = (
        f"Short trainings: 640 examples and 80 steps a task; {len(source.seeds(BASELINE))} seeds, {source.examples} "
        "test examples. G: share of the gap between AdamW and joint training that is recovered, over both sequences. "
        "Paired differences of ACC:"
    )
    known = {what: gained(source.found, *pair) for what, pair in PAIRS.items()}
    points = [*(point.format_map(known) for point in README_POINTS), on_four_tasks(source)]
    points = [wrapped(f"- {point}", subsequent_indent="  ") for point in points if point]
    return "\n\n".join([report.markdown_table([header, *rows], "<>>>"), wrapped(text), "\n".join(points)])


def gained(found: list[Runs], arm: str, base: str) -> str:
    """Paired difference of ACC over the sequences, with its interval, and whether that holds 0."""
    ours, others = over_sequences(found, arm), over_sequences(found, base)
    both = [ours[seed] - others[seed] for seed in ours if seed in others]
    if len(both) < ENOUGH:
        return "not known"
    return interval(both) + ("" if abs(np.mean(both)) > half_width(both) else " (not separated)")


def on_four_tasks(source: Source) -> str:
    """Gain over AdamW, and G, of `README_ARMS` on the sequences of four tasks that `source` has."""
    long = sorted({line["sequence"] for line in source.lines if line["sequence"].count(">") == 3})
    found = [runs for runs in (collect(source.lines, s) for s in long) if JOINT in runs and BASELINE in runs]
    base, shown = over_sequences(found, BASELINE) if found else {}, []
    for arm in (arm for arm in NAMES if arm in README_ARMS and len(base) >= ENOUGH):
        if (g := gap(found, arm)) and over_sequences(found, arm).keys() == base.keys():
            shown.append(f"{NAMES[arm]} {gained(found, arm, BASELINE)}, G {g[0]:.2f}")
    what = f"{len(found)} sequences of four tasks, {len(base)} seeds, against AdamW"
    return f"{what}: {'; '.join(shown)}." if shown else ""


def figures(source: Source, images: Path) -> list[str]:
    recovered = {arm: g for arm in NAMES if len(source.seeds(arm)) > 1 and (g := gap(source.found, arm))}
    spent, grey = step_costs(source.lines), {name for arm, name in NAMES.items() if ARMS[arm].kind == "control"}
    plot_gap({NAMES[arm]: g for arm, g in recovered.items() if arm in BARS}, grey, images / "gap_recovered.png")
    points = {NAMES[arm]: (spent[arm][1], g[0]) for arm, g in recovered.items() if arm in spent and arm not in RATES}
    plot_cost({NAMES[BASELINE]: (1.0, 0.0), **points}, grey, images / "gap_and_cost.png")
    names = ["gap_recovered", *(f"old_new_{s.replace('>', '_')}" for s in REPORTED), "gap_and_cost"]
    for sequence, runs, name in zip(REPORTED, source.found, names[1:]):
        ends = {NAMES[arm]: np.array([R[-1] for R in runs[arm].values()]) for arm in NAMES if arm in runs}
        curve = [NAMES[arm] for arm in RATES]
        plot_old_new(ends, grey, NAMES[JOINT], curve, sequence.split(">"), images / f"{name}.png")
    titles = [
        "Gap recovered",
        *(f"Old task against new task: {s.replace('>', ', ')}" for s in REPORTED),
        "Gap and cost",
    ]
    return [f"![{title}](images/{name}.png)" for title, name in zip(titles, names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=ROOT / "benchmarks/results", help="the folder of the results")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results.md")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="its table is written anew")
    options = parser.parse_args()
    known: Lines = []
    sources: list[Source] = []
    for name in FILES:
        lines = read_lines(options.input / name)
        known = [*known, *lines]
        sources.insert(0, Source(name, lines, known))
    sources = [source for source in sources if source.lines]
    # of README's methods most, the newest of equals
    shown = max(sources, key=lambda source: sum(len(source.seeds(arm)) >= ENOUGH for arm in README_ARMS))
    said, table_of_controls = controls(sources)
    text = f"In points of ACC, the mean over {' and '.join(REPORTED)}, paired by seed (± 95%). {said}"
    parts = ["# What each method keeps, and what it costs", wrapped(text), table_of_controls]
    parts += [wrapped(f"Figures: the runs of {shown}."), *figures(shown, options.output.parent / "images")]
    parts += ["## Protocol", "Generated by `python benchmarks/report_methods.py`, nothing by hand."]
    parts += [*map(wrapped, PROTOCOL), *(part for source in sources for part in section(source))]
    options.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    before, mark, rest = options.readme.read_text(encoding="utf-8").partition(MARKS[0])
    block = readme_block(shown)
    text = f"{before}{mark}\n\n{block}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"
    options.readme.write_text(text, encoding="utf-8")
    print(f"{options.output}: {', '.join(f'{len(source.lines)} of {source}' for source in sources)}")


if __name__ == "__main__":
    main()
