"""Time of EWC's and the elastic memory's pull on all-MiniLM-L6-v2, as shares of a training step in the same run.

    python benchmarks/bench_penalty.py --threads 2

A training step is forward and backward, clipping, and a step of AdamW (fused) or, for `elastic, CLASSP`, of CLASSP. Its batch is that
of `recipes/sentiment_sequence.py`, the embedded run (32 texts of up to 64 tokens, float32), or that of `recipes/compare_methods.py` (16
texts of 32 tokens, bf16 autocast). `naive`: `(lambda / 2) * sum F (w - a)^2` as a part of the loss, its gradient by autograd. F is that of
64 texts.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
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
    small = dict(tokenizer(texts[:16], truncation=True, max_length=32, padding="max_length", return_tensors="pt"))
    large = dict(tokenizer(texts[:32], truncation=True, max_length=64, padding=True, return_tensors="pt"))
    runs = {  # batch, whether in bf16
        "sentiment_sequence": ({**large, "labels": labels[:32]}, False),
        "compare_methods": ({**small, "labels": labels[:16]}, True),
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
        batch, bf16 = runs[run]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
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
    step(optimizers["CLASSP"], "compare_methods")  # its state, filled with what 64 texts needed
    for n, p in parameters.items():
        optimizers["CLASSP"].state[p]["accumulator"].copy_(accumulators[n])
    for method, name in ((elastic, "AdamW"), (elastic_classp, "CLASSP")):
        method.start(model, accumulators)
        method._trainer = SimpleNamespace(bare_optimizer=optimizers[name], accumulators=lambda: accumulators)

    done = {
        **{f"step, {o}, {run}": partial(step, optimizers[o], run) for o in optimizers for run in runs},
        "naive autograd": naive,
        "ewc": lambda: ewc.penalty_gradient(model),
        "l2sp": lambda: l2sp.penalty_gradient(model),
        "elastic, AdamW": lambda: elastic.penalty_gradient(model),
        "elastic, CLASSP": lambda: elastic_classp.after_step(model),
    }
    times = {name: np.empty(options.rounds) for name in done}
    for i in range(-3, options.rounds):  # three rounds to warm up
        for name, do in done.items():
            began = time.perf_counter()
            do()
            times[name][max(i, 0)] = time.perf_counter() - began
    shares: dict[str, dict[str, list[float]]] = {run: {} for run in runs}
    for run, found in shares.items():
        for name, t in times.items():
            if not name.startswith("step"):
                baseline = np.median(times[f"step, {'CLASSP' if name.endswith('CLASSP') else 'AdamW'}, {run}"])
                found[name] = [round(float(q), 4) for q in np.percentile(t / baseline, [25, 50, 75])]
                print(
                    f"  {run:<20}{name:<16}{1000 * np.median(t):8.1f} ms;", *(f"{100 * q:7.1f}%" for q in found[name])
                )
    command = f"python benchmarks/bench_penalty.py --threads {options.threads} --rounds {options.rounds}"
    report.write_json(options.output, {"command": command, "shares_of_a_step": shares, **report.environment()})


if __name__ == "__main__":
    main()
