"""Fifty tasks with ClasspTrainer on all-MiniLM-L6-v2: time of a step, memory of the process and disk, early and late
in one run.

    python benchmarks/bench_long_sequence.py --threads 2

Each task: 6 steps of 16 texts of icwsm14, 32 tokens, float32; after each, all tasks are evaluated on 16 texts. Early
and late: the tasks 3 to 14 and the last twelve, three of each domain.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback, logging

from classp_hf import ClasspTrainer, ContinualTrainingArguments, embedded, load_task, report
from classp_hf.tasks import SENTIMENT

DOMAINS = ("nyt", "movie", "amazon", "tweets")


class Kept(TrainerCallback):
    """Seconds of every step, and what there is when a task begins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[list[float]] = []
        self.resident: list[float] = []
        self.disk: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps.append([])
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * 4096 / 2**20)
        self.disk.append(sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file()) / 2**20)

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps[-1].append(time.perf_counter() - self.began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tasks", type=int, default=50, help="at least 26")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/bench_long_sequence.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    loaded = [load_task(f"icwsm14/{d}", max_train_samples=96, max_eval_samples=16) for d in DOMAINS]
    tasks = [dataclasses.replace(loaded[t % len(loaded)], name=f"{t:02d}") for t in range(options.tasks)]
    model = AutoModelForSequenceClassification.from_pretrained(
        embedded.model_path(),
        num_labels=len(SENTIMENT),
        label2id={name: i for i, name in enumerate(SENTIMENT)},
        id2label=dict(enumerate(SENTIMENT)),
    )
    with tempfile.TemporaryDirectory() as folder:
        kept = Kept(Path(folder))
        args = ContinualTrainingArguments(
            output_dir=folder,
            max_steps=6,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            max_length=32,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(embedded.model_path())
        trainer = ClasspTrainer(model=model, args=args, processing_class=tokenizer, callbacks=[kept])
        began = time.perf_counter()
        trainer.train_sequence(tasks)
        seconds = time.perf_counter() - began
    early, late = slice(2, 14), slice(-12, None)
    rows = {
        "ms_a_step": [1000 * float(np.median(kept.steps[part])) for part in (early, late)],
        "resident_mib": [float(np.median(kept.resident[part])) for part in (early, late)],
        "disk_mib": [float(np.median(kept.disk[part])) for part in (early, late)],
    }
    rows = {name: [round(value, 1) for value in values] for name, values in rows.items()}
    for name, (first, last) in rows.items():
        print(f"  {name:<14}{first:10.1f} early {last:10.1f} late, ratio {last / first:.3f}")
    command = f"python benchmarks/bench_long_sequence.py --threads {options.threads} --tasks {options.tasks}"
    found = {"command": command, "early_late": rows, "seconds": round(seconds), **report.environment()}
    report.write_json(options.output, found)


if __name__ == "__main__":
    main()
