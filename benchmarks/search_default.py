"""The search behind ClasspTrainer's defaults: small runs on tuning sequences, validation data only, in a plain loop.

    python benchmarks/search_default.py --output benchmarks/results/search_default.jsonl

all-MiniLM-L6-v2, 800 training examples a task (of the half that reported runs never see), one epoch, batches of 16 of
similar length, 32 tokens, float32 (lines that do not say so: bf16 autocast), clipping 1.0, linear decay, no dropout,
up to 400 validation examples a task, seeds 0 and 1, one thread. One JSON line a run: sequence, seed, setting, and `R`,
the validation accuracy in % of every task seen so far after each task. Lines that are there are not run again. About
25 seconds a task on one core; two-task runs from one first task repeat it.

A setting: `opt` (adamw, classp with p=2 and its memory kept), `lr`, `tau` (logit adjustment: 0.5, or "mean" for
(t-1)/t), `tau_end` (its value at the end of the task, linear between), `asym` (only labels that become rarer), `ref`
("mean": frequencies of all earlier tasks instead of what the head is taken to hold), `lwf` (strength, T=2), `merge`
(weight of the new task), `wise` (interpolation).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from classp_hf import CLASSP, embedded, load_task
from classp_hf.tasks import SENTIMENT, prepare_tasks

EXAMPLES, BATCH = 800, 16
SEQUENCES = ("nyt>amazon", "amazon>movie", "tweets>amazon", "amazon>tweets>movie>nyt")
ADAMW, KEPT = {"opt": "adamw", "lr": 2e-4}, {"opt": "classp", "lr": 1e-3}
SETTINGS = [
    *({**ADAMW, "lr": lr} for lr in (1e-4, 2e-4, 3e-4)),
    *({**KEPT, "lr": lr} for lr in (1e-3, 2e-3)),
    *({**KEPT, "tau": tau} for tau in (0.5, 1.0)),
    {**KEPT, "tau": 1.0, "tau_end": 0.0},
    {**KEPT, "tau": 1.0, "tau_end": 0.0, "asym": True, "ref": "mean"},
    {**KEPT, "tau": 0.5, "asym": True, "ref": "mean"},
    {**KEPT, "lwf": 1.0},
    {**KEPT, "tau": 0.5, "lwf": 1.0},
    {**ADAMW, "tau": 1.0},
    {**ADAMW, "lwf": 1.0},
]


def load(domain: str):
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_path())
    task = load_task(f"icwsm14/{domain}")
    half = task.train_dataset.train_test_split(0.5, seed=0)["train"]
    task = dataclasses.replace(task, train_dataset=half, test_dataset=None)
    task = prepare_tasks([task], tokenizer, {n: i for i, n in enumerate(SENTIMENT)}, 32)[0]
    return [(list(d["input_ids"]), list(d["labels"])) for d in (task.train_dataset, task.eval_dataset)]


def collate(ids, labels, indices):
    width = max(len(ids[i]) for i in indices)
    x = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in indices])
    return {"input_ids": x, "attention_mask": (x != 0).long()}, torch.tensor([labels[i] for i in indices])


def batches(ids, generator):
    order = torch.randperm(len(ids), generator=generator).tolist()
    found = []
    for start in range(0, len(ids), 256):
        chunk = sorted(order[start : start + 256], key=lambda i: len(ids[i]))
        found += [chunk[k : k + BATCH] for k in range(0, len(chunk), BATCH)]
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def logits_of(model, batch):
    return model(**batch).logits


@torch.no_grad()
def predict(model, ids, labels, indices):
    model.eval()
    out = torch.zeros(len(ids), 3)
    indices = sorted(indices, key=lambda i: len(ids[i]))
    for start in range(0, len(indices), 64):
        chunk = indices[start : start + 64]
        out[chunk] = logits_of(model, collate(ids, labels, chunk)[0])
    return out


def accuracy(model, ids, labels) -> float:
    indices = list(range(len(ids)))[:: max(1, len(ids) // 400)][:400]
    right = predict(model, ids, labels, indices)[indices].argmax(-1) == torch.tensor(labels)[indices]
    return round(100 * float(right.float().mean()), 2)


def train(model, data, seed, t, c, optimizer, frequencies):
    ids, labels = data
    chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).tolist()[:EXAMPLES]
    ids, labels = [ids[i] for i in chosen], [labels[i] for i in chosen]
    generator = torch.Generator().manual_seed(1000 * seed + t)
    teacher = predict(model, ids, labels, range(len(ids))) if t and c.get("lwf") else None
    # logit adjustment
    log_p = torch.log((torch.bincount(torch.tensor(labels), minlength=3) + 1.0) / (len(labels) + 3))
    start = end = 0.0
    change = torch.zeros(3)
    if t and c.get("tau"):
        start = t / (t + 1) if c["tau"] == "mean" else c["tau"]
        end = c.get("tau_end", start)
        held = torch.stack(frequencies["seen"]).mean(0).log() if c.get("ref") == "mean" else frequencies["held"]
        change = (log_p - held).clamp(max=0) if c.get("asym") else log_p - held
        frequencies["held"] = log_p - end * change
    else:
        frequencies["held"] = log_p
    frequencies["seen"].append(log_p.exp())

    parameters = list(model.parameters())
    order = batches(ids, generator)
    model.train()
    for k, indices in enumerate(order):
        batch, y = collate(ids, labels, indices)
        z = logits_of(model, batch)
        loss = F.cross_entropy(z + (start + (end - start) * k / len(order)) * change, y)
        if teacher is not None:
            kl = F.kl_div((z / 2).log_softmax(-1), (teacher[indices] / 2).softmax(-1), reduction="none").sum(-1)
            loss = loss + c["lwf"] * 4 * kl.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = c["lr"] * (1 - k / len(order))
        optimizer.step()
        optimizer.zero_grad()


def run(sequence: str, seed: int, c: dict, data: dict) -> list[list[float]]:
    set_seed(seed)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = AutoModelForSequenceClassification.from_pretrained(embedded.model_path(), num_labels=3, **no_dropout)
    optimizer, frequencies, R = None, {"seen": []}, []
    tasks = sequence.split(">")
    for t, task in enumerate(tasks):
        if c["opt"] == "adamw":
            optimizer = torch.optim.AdamW(model.parameters(), lr=c["lr"], weight_decay=0.0, fused=True)
        elif optimizer is None:
            optimizer = CLASSP(model.parameters(), lr=c["lr"])
        train(model, data[task][0], seed, t, c, optimizer, frequencies)
        R.append([accuracy(model, *data[seen][1]) for seen in tasks[: t + 1]])
    return R


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    done = [(line["sequence"], line["seed"], line["setting"]) for line in known]
    data = {domain: load(domain) for domain in embedded.DOMAINS}
    for setting in SETTINGS:
        for sequence in SEQUENCES:
            for seed in options.seeds:
                if (sequence, seed, setting) not in done:
                    line = {
                        "sequence": sequence,
                        "seed": seed,
                        "setting": setting,
                        "R": run(sequence, seed, setting, data),
                        "precision": "fp32",
                        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
                    }
                    with options.output.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    print(line, flush=True)


if __name__ == "__main__":
    main()
