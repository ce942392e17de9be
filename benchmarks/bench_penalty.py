"""Time of EWC's and the elastic memory's pull on all-MiniLM-L6-v2, as shares of a training step in the same run.

    python benchmarks/bench_penalty.py --threads 2

A training step is a batch of 16 texts of 32 tokens, forward and backward in bf16 autocast, clipping, and a step of AdamW
(fused) or, for `elastic, CLASSP`, the same with CLASSP. `naive`: `(lambda / 2) * sum F (w - a)^2` as a part of the loss, its
gradient by autograd. F is that of 64 texts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from classp_hf import CLASSP, EWC, L2SP, Elastic, embedded, report
from classp_hf.methods.fisher import batches_of_equal_shape, sum_squared_gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30, help="everything is done once a round")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/bench_penalty.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    path = embedded.model_path()
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
    parameters = dict(model.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [text for text, _ in embedded.icwsm14("nyt")[:64]]
    labels = torch.arange(64) % 3
    examples = [
        {**tokenizer(t, truncation=True, max_length=32, return_tensors="pt"), "labels": label[None]}
        for t, label in zip(texts, labels)
    ]
    batches = (batch for _, batch in batches_of_equal_shape(enumerate(examples), 16))
    fisher = sum_squared_gradients(model, batches, parameters)
    mean = sum(f.sum() for f in fisher.values()) / sum(f.numel() for f in fisher.values())
    batch = dict(tokenizer(texts[:16], truncation=True, max_length=32, padding="max_length", return_tensors="pt"))
    batch["labels"] = labels[:16]

    anchor = {n: p.detach().clone() for n, p in parameters.items()}
    ewc, l2sp, elastic, elastic_classp = EWC(ewc_lambda=0.1), L2SP(), Elastic(), Elastic()
    ewc.importance = {n: f / mean for n, f in fisher.items()}
    ewc.anchor = l2sp.anchor = anchor
    optimizers = {
        "AdamW": torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True),
        "CLASSP": CLASSP(model.parameters(), lr=1e-5),
    }

    def step(optimizer) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
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
    step(optimizers["CLASSP"])  # its state, filled with what 64 texts needed
    for n, p in parameters.items():
        optimizers["CLASSP"].state[p]["accumulator"].copy_(accumulators[n])
    for method, name in ((elastic, "AdamW"), (elastic_classp, "CLASSP")):
        method.start(model, accumulators)
        method._trainer = SimpleNamespace(bare_optimizer=optimizers[name], accumulators=lambda: accumulators)

    done = {
        "step, AdamW": lambda: step(optimizers["AdamW"]),
        "naive autograd": naive,
        "ewc": lambda: ewc.penalty_gradient(model),
        "l2sp": lambda: l2sp.penalty_gradient(model),
        "elastic, AdamW": lambda: elastic.penalty_gradient(model),
        "step, CLASSP": lambda: step(optimizers["CLASSP"]),
        "elastic, CLASSP": lambda: elastic_classp.after_step(model),
    }
    times = {name: np.empty(options.rounds) for name in done}
    for i in range(-3, options.rounds):  # three rounds to warm up
        for name, do in done.items():
            began = time.perf_counter()
            do()
            if i >= 0:
                times[name][i] = time.perf_counter() - began
    shares = {}
    for name, t in times.items():
        baseline = np.median(times["step, CLASSP" if name.endswith("CLASSP") else "step, AdamW"])
        shares[name] = [round(float(q), 4) for q in np.percentile(t / baseline, [25, 50, 75])]
        print(f"  {name:<16}{1000 * np.median(t):8.1f} ms;", *(f"{100 * q:7.1f}%" for q in shares[name]))
    command = f"python benchmarks/bench_penalty.py --threads {options.threads} --rounds {options.rounds}"
    report.write_json(options.output, {"command": command, "shares_of_a_step": shares, **report.environment()})


if __name__ == "__main__":
    main()
