"""Training speed of ContinualTrainer with CLASSP against Trainer with fused AdamW, and what evaluating costs, in one
run.

    python benchmarks/bench_sequence.py --threads 2

Both train all-MiniLM-L6-v2 on the same examples of icwsm14/nyt (32 tokens, batch 16), in float32 on CPUs, under bf16
autocast on GPUs. Evaluated is the test split, as `prepare_tasks` sorts it by length and shuffled, after every
training, by the same trainer.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench_step import seconds as seconds_of
from compare_methods import PRECISION
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, logging

from classp_hf import ContinualTrainer, ContinualTrainingArguments, embedded, load_task, report
from classp_hf.tasks import SENTIMENT, prepare_tasks

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="both train once a round")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/bench_sequence.json"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    precision = PRECISION if options.device == "cuda" else "fp32"
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_path())
    label2id = {name: i for i, name in enumerate(SENTIMENT)}
    task = prepare_tasks([load_task("icwsm14/nyt", max_eval_samples=300)], tokenizer, label2id, 32)[0]
    splits = {"sorted": task.test_dataset, "shuffled": task.test_dataset.shuffle(seed=0)}
    speeds: dict[str, list[float]] = {"Trainer, AdamW": [], "ContinualTrainer, CLASSP": []}
    seconds: dict[str, list[float]] = {name: [] for name in splits}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name, cls, optim in (
                ("Trainer, AdamW", Trainer, "adamw_torch_fused"),
                ("ContinualTrainer, CLASSP", ContinualTrainer, "classp"),
            ):
                torch.manual_seed(0)
                model = AutoModelForSequenceClassification.from_pretrained(
                    embedded.model_path(), num_labels=3, label2id=label2id, id2label=dict(enumerate(SENTIMENT))
                )
                args = ContinualTrainingArguments(
                    output_dir=folder,
                    optim=optim,
                    learning_rate=5e-5,
                    max_steps=options.steps,
                    per_device_train_batch_size=BATCH,
                    per_device_eval_batch_size=64,
                    bf16=precision == "bf16",
                    use_cpu=options.device == "cpu",
                    save_strategy="no",
                    logging_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    dataloader_pin_memory=False,
                )
                collator = DataCollatorWithPadding(tokenizer)
                trainer = cls(model=model, args=args, data_collator=collator, train_dataset=task.train_dataset)
                speeds[name].append(options.steps * BATCH / seconds_of(trainer.train, options.device))
                for order, dataset in splits.items():
                    seconds[order].append(seconds_of(partial(trainer.evaluate, dataset), options.device))
    ratios = np.array(speeds["ContinualTrainer, CLASSP"]) / np.array(speeds["Trainer, AdamW"])
    saved = np.array(seconds["sorted"]) / np.array(seconds["shuffled"])
    rows = {
        "samples_a_second": {name: round(float(np.median(values)), 1) for name, values in speeds.items()},
        "classp_to_adamw": [round(float(q), 3) for q in np.percentile(ratios, [25, 50, 75])],
        "evaluation_ms_an_example": {
            order: round(1000 * float(np.median(values)) / len(task.test_dataset), 2)
            for order, values in seconds.items()
        },
        "evaluation_sorted_to_shuffled": [round(float(q), 3) for q in np.percentile(saved, [25, 50, 75])],
    }
    for name, row in rows.items():
        print(f"  {name}: {row}")
    command = (
        f"python benchmarks/bench_sequence.py --threads {options.threads} --rounds {options.rounds} "
        f"--steps {options.steps}" + f" --device {options.device}" * (options.device != "cpu")
    )
    report.write_json(options.output, {"command": command, "precision": precision, **rows, **report.environment()})


if __name__ == "__main__":
    main()
