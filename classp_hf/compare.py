"""Which method is best for your tasks and your model: every one tuned alike, then run over several seeds.

    python -m classp_hf compare --tasks reviews:reviews.csv tweets:tweets.csv --arms classp ewc naive
    accelerate launch -m classp_hf compare --model_name_or_path google-bert/bert-base-uncased --seeds 5

Each arm tries its three settings on validation data, with one seed. The best by the mean accuracy over all tasks at
the end is frozen, and trained with `--seeds` others, measured on test data. The splits are the same in all runs (of a
source without a test split its validation split is tested on, and a tenth of its training data tuned on); a seed
chooses the training examples, and all arms see the same, so that their differences are paired. Runs that are finished
are kept in `--output_dir`, and the same command, also with more arms or seeds, goes on from them. Every flag of the
main job (`python -m classp_hf demo --help`) is accepted, and holds for all arms.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import PrinterCallback

from . import demo, report
from .files import replacing
from .methods.base import flag
from .metrics import confidence
from .redaction import public_arguments
from .sequence import STATE_NAME
from .tasks import sample_train, with_test_split
from .trainer import ContinualTrainer
from .training_args import greater_is_better

BASELINE = "naive"
# Flags that begin so may differ between two commands for one folder: they change no result.
ANY_VALUE = (
    *("arms", "seeds", "output_dir", "verbose", "disable_tqdm", "resume_from_checkpoint", "report_to", "project"),
    *("dataloader_", "logging_", "log_", "hub_", "save_", "run_name", "trackio", "push_to_hub"),
)
# What is tuned: the strength of a method, else the learning rate; three values each, the middle one the main job's.
ADAMW_RATES, CLASSP_RATES = ("learning_rate", 5e-5, 1e-4, 2e-4), ("learning_rate", 5e-4, 1e-3, 2e-3)
GRIDS: dict[str, tuple[Any, ...]] = {
    "classp": CLASSP_RATES,
    "classp_paper": CLASSP_RATES,
    "ewc": ("ewc_lambda", 0.03, 0.1, 0.3),
    "l2sp": ("l2sp_alpha", 0.03, 0.1, 0.3),
    "elastic": ("anchor_strength", 0.03, 0.1, 0.3),
    "merge": ("merge_weight", 0.3, 1, 3),
    "interpolate": ("interpolation_weight", 0.3, 0.5, 0.7),
    "ema": ("ema_decay", 0.95, 0.98, 0.99),
    "lwf": ("lwf_lambda", 0.5, 1, 2),
    "logit_adjustment": ("prior_strength", 0.125, 0.25, 0.5),
    "pseudo_rehearsal": ("rehearse_lambda", 0.5, 1, 2),
    "olora": ("olora_lambda", 0.05, 0.5, 5),
    "osf": ("learning_rate", 3e-5, 1e-4, 3e-4),
}


@dataclass
class CompareArguments(demo.SequenceArguments):
    """Options of the comparison, beside the main job's."""

    arms: list[str] = flag(("classp", "pseudo_rehearsal", "ewc", BASELINE), f"What to compare, of: {demo.KNOWN}.")
    seeds: int = flag(3, "Seeds that every arm is run with at its chosen setting.")

    def __post_init__(self) -> None:
        super().__post_init__()
        demo.check_arms(self.arms, "--arms")
        self.arms = list(dict.fromkeys([*self.arms, BASELINE]))
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {self.seeds}")
        if len(self.tasks) < 2:
            raise ValueError(f"One task is no sequence: pass two or more as --tasks, got {self.tasks}.")


class Comparison:
    """The runs in a folder, each a JSON file once it is finished; `words` of the command line hold for all of them,
    and trainers are put into `trainers`."""

    def __init__(self, parser: Any, words: list[str], trainers: list[ContinualTrainer]) -> None:
        self.parser, self.words, self.trainers, self.done = parser, words, trainers, 0
        self.given, self.args, *_ = parser.parse_args_into_dataclasses(words)
        self.folder, self.main_process = Path(self.args.output_dir), self.args.process_index == 0
        if self.args.push_to_hub:
            raise ValueError("compare keeps no model: leave --push_to_hub out, and train the best with `demo`.")
        if not greater_is_better(self.args):
            raise ValueError(f"compare needs a metric where higher is better, got {self.args.sequence_metric!r}.")
        flags = public_arguments(vars(parser.parse_args(words)))
        self.flags = {k: str(v) for k, v in flags.items() if not k.startswith(ANY_VALUE)}
        path = self.folder / "flags.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        if changed := [k for k, v in self.flags.items() if known.get(k, v) != v]:
            raise ValueError(
                f"{self.folder} holds runs with another {', '.join(changed)}. Pass the same flags, or another "
                "--output_dir."
            )
        whole = replace(self.given, max_train_samples=None)  # a seed chooses from all of it
        self.tasks = [with_test_split(task) for task in whole.load_tasks(self.args)]

    def run(self, arm: str, setting: str, seed: int, stage: str) -> dict[str, Any]:
        """The results of one run, trained now unless its file is there. `stage`: "tune" on validation data, "test"."""
        name = f"{stage} {arm} {setting} seed {seed}"
        path, folder = self.folder / "runs" / f"{name}.json", self.folder / "unfinished" / name
        self.done += 1
        if not path.is_file():
            started = time.monotonic()
            words = [*self.words, f"--{setting}", "--seed", str(seed)]
            tasks = [sample_train(task, self.given.max_train_samples, seed) for task in self.tasks]
            if stage == "tune":
                tasks = [replace(task, test_dataset=task.eval_dataset) for task in tasks]
            if (folder / STATE_NAME).is_file():
                words += ["--resume_from_checkpoint", "True"]
            trainer = demo.build_trainer(self.parser, words, arm, tasks, folder)
            trainer.remove_callback(PrinterCallback)
            self.trainers.append(trainer)
            results = trainer.train_sequence(tasks)
            self.trainers.clear()
            if self.main_process:
                report.write_json(self.folder / "flags.json", self.flags)
                report.write_json(path, results)
                spent, accuracy = time.monotonic() - started, 100 * results["metrics"]["average_accuracy"]
                total = len(self.given.arms) * (3 + self.given.seeds)
                print(f"[{self.done}/{total}] {name}: ACC {accuracy:.1f}, {spent:.0f} s", flush=True)
            trainer.accelerator.wait_for_everyone()
        if self.main_process:
            shutil.rmtree(folder, ignore_errors=True)
        return json.loads(path.read_text())


def settings(arm: str) -> list[str]:
    name, *values = GRIDS.get(arm, ADAMW_RATES)
    return [f"{name}={value:g}" for value in values]


def tables(tuned: dict[str, dict[str, float]], runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The comparison, best arm first; the scores that chose the settings; and what follows from them."""
    scores = {arm: [100 * r["metrics"]["average_accuracy"] for r in found] for arm, found in runs.items()}
    order = sorted(runs, key=lambda arm: -confidence(scores[arm])[0])
    best = order[0]

    def cell(values: list[float], sign: str = "") -> str:
        middle, half = confidence(values)
        return f"{round(middle, 1) + 0.0:{sign}.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")

    rows = [["arm", "setting", "ACC", f"against {BASELINE}", "LA", "forgetting", "seconds"]]
    for arm in order:
        gained = "" if arm == BASELINE else cell(differences(scores[arm], scores[BASELINE]), "+")
        others = (cell([100 * r["metrics"][k] for r in runs[arm]]) for k in ("learning_accuracy", "forgetting"))
        seconds = f"{confidence([r['seconds'] for r in runs[arm]])[0]:.0f}"
        rows.append([arm, chosen(tuned[arm]), cell(scores[arm]), gained, *others, seconds])
    grid = [["arm", "setting 1", "setting 2", "setting 3"]]
    grid += [[arm, *(f"{setting}: {score:.1f}" for setting, score in tuned[arm].items())] for arm in order]
    words = [f"Highest: {best} with --{chosen(tuned[best]).replace('=', ' ')}."]
    gaps = {arm: confidence(differences(scores[best], scores[arm])) for arm in order[1:]}
    close = [arm for arm, (middle, half) in gaps.items() if abs(middle) <= half]
    if len(scores[best]) < 2:
        words.append("One seed separates nothing: pass --seeds 3 or more.")
    elif close:
        words.append(f"Not separated from it: {', '.join(close)}.")
        if BASELINE in close:
            words.append("Plain fine-tuning is among them: these runs show no need for a method.")
    if edges := [arm for arm in order if chosen(tuned[arm]) != list(tuned[arm])[1]]:
        words.append(f"At the edge of the grid, where a setting beyond may be better: {', '.join(edges)}.")
    return [
        report.markdown_table(rows, "<<>>>>>"),
        "In percent, mean ± half the width of its 95 % interval over seeds; differences are paired by seed. An "
        "interval is of one comparison: of many arms the best is partly so by chance.",
        " ".join(words),
        "Validation accuracy over all tasks at the end, by which the settings were chosen:",
        report.markdown_table(grid, "<>>>"),
    ]


def chosen(scores: dict[str, float]) -> str:
    """The best setting; of equals the middle one, which is the main job's."""
    middle = list(scores)[1]
    return max(scores, key=lambda setting: (scores[setting], setting == middle))


def differences(ours: list[float], others: list[float]) -> list[float]:
    return [a - b for a, b in zip(ours, others, strict=True)]


def _run(trainers: list[ContinualTrainer]) -> None:
    parser = demo.command_parser(CompareArguments, __doc__, output_dir="outputs/comparison", logging_strategy="no")
    comparison = Comparison(parser, sys.argv[1:], trainers)
    given, first, folder = comparison.given, comparison.args.seed, comparison.folder
    demo.quiet(given, comparison.main_process)
    if not given.verbose:
        logging.getLogger("classp_hf").setLevel(logging.WARNING)
    tuned, runs, points = {}, {}, {}
    for arm in given.arms:
        found = {setting: comparison.run(arm, setting, first, "tune") for setting in settings(arm)}
        tuned[arm] = {setting: 100 * r["metrics"]["average_accuracy"] for setting, r in found.items()}
        best = chosen(tuned[arm])
        runs[arm] = [comparison.run(arm, best, seed, "test") for seed in range(first + 1, first + 1 + given.seeds)]
        ends = [r["accuracy_matrix"][-1] for r in runs[arm]]
        points[arm] = [100 * mean(e[:-1]) for e in ends], [100 * e[-1] for e in ends]
    if comparison.main_process:
        title, parts = " -> ".join(given.tasks), tables(tuned, runs)
        with replacing(folder / "comparison.md") as path:
            path.write_text("\n\n".join([f"# {title}", *parts]) + "\n", encoding="utf-8")
        print("\n" + "\n\n".join(parts))
        with suppress(ImportError):  # of matplotlib: every run has said so
            report.plot_old_new(points, folder / "comparison.png", title)
        print(f"\nTable, figure and runs: {folder}")


def main() -> None:
    demo.main(_run)


if __name__ == "__main__":
    main()
