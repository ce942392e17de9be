"""Time of EWC's and the elastic memory's pull on all-MiniLM-L6-v2, as shares of a training step in the same run.

    python benchmarks/bench_penalty.py --threads 2

A training step is forward and backward, clipping, and a step of AdamW (fused) or, for `elastic, CLASSP`, of CLASSP, in
float32 on CPUs, under bf16 autocast on GPUs. Its batch is that of `recipes/sentiment_sequence.py`, the embedded run
(32 texts of up to 64 tokens), or that of `benchmarks/compare_methods.py` (16 texts of 32 tokens). `naive`: `(lambda /
2) * sum F (w - a)^2` as a part of the loss, its gradient by autograd. F is that of 64 texts.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench_step import seconds
from compare_methods import PRECISION
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from classp_hf import CLASSP, EWC, L2SP, ContinualTrainingArguments, Elastic, embedded, report
from classp_hf.methods import Context
from classp_hf.methods.fisher import sum_squared_gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30, help="everything is done once a round")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/bench_penalty.json"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    device, precision = options.device, PRECISION if options.device == "cuda" else "fp32"
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    path = embedded.model_path()
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3).to(device)
    parameters = dict(model.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [text for text, _ in embedded.icwsm14("nyt")[:64]]
    labels = torch.arange(64, device=device) % 3
    examples = [
        {**tokenizer(t, truncation=True, max_length=32, return_tensors="pt").to(device), "labels": label[None]}
        for t, label in zip(texts, labels)
    ]
    fisher = sum_squared_gradients(model, examples, parameters, size=16)
    mean = sum(f.sum() for f in fisher.values()) / sum(f.numel() for f in fisher.values())
    small = tokenizer(texts[:16], truncation=True, max_length=32, padding="max_length", return_tensors="pt").to(device)
    large = tokenizer(texts[:32], truncation=True, max_length=64, padding=True, return_tensors="pt").to(device)
    runs = {
        "sentiment_sequence": {**large, "labels": labels[:32]},
        "compare_methods": {**small, "labels": labels[:16]},
    }

    anchor = {n: p.detach().clone() for n, p in parameters.items()}
    ewc, l2sp, elastic, elastic_classp = EWC(ewc_lambda=0.1), L2SP(), Elastic(), Elastic()
    ewc.importance = {n: f / mean for n, f in fisher.items()}
    ewc.anchor = l2sp.anchor = anchor
    optimizers = {
        "AdamW": torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True),
        "CLASSP": CLASSP(model.parameters(), lr=1e-5),
    }

    def step(optimizer, run) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**runs[run]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def naive() -> None:
        # grad + add, as a term of the loss does it, without the rest of the backward pass
        terms = [(ewc.importance[n] * (p - anchor[n]) ** 2).sum() for n, p in parameters.items()]
        loss = 0.1 / 2 * torch.stack(terms).sum()
        for p, g in zip(parameters.values(), torch.autograd.grad(loss, list(parameters.values()))):
            p.grad.add_(g)

    accumulators = {n: f.clone() for n, f in fisher.items()}
    step(optimizers["CLASSP"], "compare_methods")  # its state, filled with what 64 texts needed
    for n, p in parameters.items():
        optimizers["CLASSP"].set_accumulator(p, accumulators[n])
    args = ContinualTrainingArguments(output_dir="unused", use_cpu=device == "cpu")
    for method, name in ((elastic, "AdamW"), (elastic_classp, "CLASSP")):
        context = Context(model, args, ["earlier"], lambda: accumulators, optimizers[name])
        method.before_task(context)

    done = {
        **{f"step, {o}, {run}": partial(step, optimizers[o], run) for o in optimizers for run in runs},
        "naive autograd": naive,
        "ewc": lambda: ewc.before_step(model),
        "l2sp": lambda: l2sp.before_step(model),
        "elastic, AdamW": lambda: elastic.before_step(model),
        "elastic, CLASSP": lambda: elastic_classp.after_step(model),
    }
    times = {name: np.empty(options.rounds) for name in done}
    for i in range(-3, options.rounds):  # three rounds to warm up
        for name, do in done.items():
            times[name][max(i, 0)] = seconds(do, device)
    shares: dict[str, dict[str, list[float]]] = {run: {} for run in runs}
    for run, found in shares.items():
        for name, t in times.items():
            if not name.startswith("step"):
                baseline = np.median(times[f"step, {'CLASSP' if name.endswith('CLASSP') else 'AdamW'}, {run}"])
                found[name] = [round(float(q), 4) for q in np.percentile(t / baseline, [25, 50, 75])]
                quartiles = (f"{100 * q:7.1f}%" for q in found[name])
                print(f"  {run:<20}{name:<16}{1000 * np.median(t):8.1f} ms;", *quartiles)
    command = f"python benchmarks/bench_penalty.py --threads {options.threads} --rounds {options.rounds}"
    command += f" --device {device}" * (device != "cpu")
    found = {"command": command, "precision": precision, "shares_of_a_step": shares}
    report.write_json(options.output, {**found, **report.environment()})


if __name__ == "__main__":
    main()
