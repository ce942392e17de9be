"""How the default learning rates, power and eps were chosen: small runs on tuning sequences, validation data only.

    python benchmarks/choose_defaults.py --output benchmarks/results/choose_defaults.jsonl

Sequences amazon -> movie and nyt -> tweets (no reported result uses these), all-MiniLM-L6-v2, 800 training examples a
task, 2 epochs, batch 32, 40 tokens, clipping 1.0, linear decay, no dropout, 300 validation examples a task, seed 0,
one thread. One JSON line a run: its setting, `cpu_capability` (newer lines) and `R`, the validation accuracy in % of
every task seen so far after each task. Lines that are there already are not run again. About 2 minutes a run on one
core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from classp_hf import CLASSP, embedded, load_task
from classp_hf.tasks import SENTIMENT, prepare_tasks

SEED, EPOCHS, BATCH = 0, 2, 32
SEQUENCES = ("amazon>movie", "nyt>tweets")
SETTINGS = [
    *({"optimizer": "AdamW", "lr": lr} for lr in (5e-5, 1e-4, 2e-4)),
    *({"optimizer": "CLASSP", "lr": lr, "power": 2, "eps": 1e-6} for lr in (5e-4, 1e-3, 2e-3)),
    *({"optimizer": "CLASSP", "lr": lr, "power": 2, "eps": 1e-8} for lr in (3e-4, 1e-3)),
    *({"optimizer": "CLASSP", "lr": lr, "power": 1, "eps": 1e-8} for lr in (3e-4, 1e-3, 3e-3)),
    {"optimizer": "CLASSP", "lr": 3e-3, "power": 1, "eps": 1e-3},
    {"optimizer": "CLASSP", "lr": 1e-2, "power": 1, "eps": 1e-3},
    {"optimizer": "CLASSP", "lr": 1e-2, "power": 1, "eps": 1e-2},
]


def collate(dataset, indices):
    rows = dataset[indices]
    width = max(map(len, rows["input_ids"]))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows["input_ids"]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor(rows["labels"])}


@torch.no_grad()
def accuracy(model, dataset) -> float:
    model.eval()
    correct = 0
    for start in range(0, len(dataset), 64):
        batch = collate(dataset, range(start, min(start + 64, len(dataset))))
        correct += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return round(100 * correct / len(dataset), 2)


def run(sequence: str, setting: dict) -> list[list[float]]:
    path = embedded.model_path()
    tasks = [
        load_task(f"icwsm14/{domain}", seed=SEED, max_train_samples=800, max_eval_samples=300)
        for domain in sequence.split(">")
    ]
    label2id = {name: i for i, name in enumerate(SENTIMENT)}
    tasks = prepare_tasks(tasks, AutoTokenizer.from_pretrained(path), label2id, max_length=40)
    set_seed(SEED)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3, **no_dropout)
    kwargs = {k: v for k, v in setting.items() if k != "optimizer"}
    optimizer, R = None, []
    for t, task in enumerate(tasks):
        torch.manual_seed(SEED + t)
        if setting["optimizer"] == "AdamW":
            optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, **kwargs)
        elif optimizer is None:  # its accumulators are kept from task to task
            optimizer = CLASSP(model.parameters(), **kwargs)
        data = task.train_dataset
        steps, step = EPOCHS * -(-len(data) // BATCH), 0
        for _ in range(EPOCHS):
            order = torch.randperm(len(data)).tolist()
            model.train()
            for start in range(0, len(data), BATCH):
                optimizer.zero_grad()
                model(**collate(data, order[start : start + BATCH])).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = setting["lr"] * (1 - step / steps)
                optimizer.step()
                step += 1
        R.append([accuracy(model, seen.eval_dataset) for seen in tasks[: t + 1]])
    return R


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    torch.set_num_threads(1)
    known = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    capability = torch.backends.cpu.get_cpu_capability()
    done = [{k: v for k, v in line.items() if k not in ("R", "cpu_capability")} for line in known]
    for sequence in SEQUENCES:
        for setting in SETTINGS:
            described = {"sequence": sequence, **setting}
            if described in done:
                continue
            line = {**described, "R": run(sequence, setting), "cpu_capability": capability}
            with output.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
