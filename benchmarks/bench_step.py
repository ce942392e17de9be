"""Time of an optimizer step on all-MiniLM-L6-v2's 22.7M weights, as ratios to torch's fused AdamW in the same run.

    python benchmarks/bench_step.py --threads 1
    python benchmarks/bench_step.py --threads 2 --weights 100000000

Gradients: `dense`, random numbers; `batch`, of a batch of 16 texts of up to 32 tokens, in which most rows of the word embedding have
none. `bound`: bytes that the step has to read and write against AdamW's 28 a weight. `naive`: the published pseudo-code, one whole
tensor and one PyTorch operation after the other. Extra memory: the peak of what a step allocates, in percent of the parameters.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from classp_hf import CLASSP, embedded, report

NAIVE: dict[str, Any] = {"fused": False, "foreach": False}
STEPS: dict[str, tuple[Callable[..., Any], dict[str, Any], float | None]] = {
    "AdamW, fused": (torch.optim.AdamW, {"fused": True}, 28),
    "Adagrad, fused": (torch.optim.Adagrad, {"fused": True}, 20),
    "SGD, fused": (torch.optim.SGD, {"fused": True, "lr": 1e-3}, 12),
    "CLASSP p=2": (CLASSP, {}, 20),
    "CLASSP p=1": (CLASSP, {"power": 1.0}, 20),
    "CLASSP p=2, density 0.1": (CLASSP, {"density": 0.1}, None),
    "CLASSP p=2, bfloat16 memory": (CLASSP, {"state_dtype": "bfloat16"}, 16),
    "CLASSP p=2, uint8 memory": (CLASSP, {"state_dtype": "uint8"}, 14),
    "CLASSP p=2, foreach": (CLASSP, {"foreach": True}, None),
    "CLASSP p=2, naive": (CLASSP, NAIVE, None),
}


def gradients(weights: int | None) -> dict[str, list[torch.Tensor]]:
    """Gradients of every parameter, by kind; of one tensor of so many `weights` only random ones."""
    generator = torch.Generator().manual_seed(0)
    if weights is not None:
        return {"dense": [1e-3 * torch.randn(weights, generator=generator)]}
    model = AutoModelForSequenceClassification.from_pretrained(embedded.model_path(), num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_path())
    texts = [text for text, _ in embedded.icwsm14("nyt")[:16]]
    batch = tokenizer(texts, truncation=True, max_length=32, padding=True, return_tensors="pt")
    model(**batch, labels=torch.arange(16) % 3).loss.backward()
    real = [p.grad for p in model.parameters() if p.grad is not None]
    return {"dense": [1e-3 * torch.randn(g.shape, generator=generator) for g in real], "batch": real}


def peak_allocation(step: Callable[[], Any]) -> int:
    """Bytes beyond what was there before, at the worst moment of a step."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([0, *(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))])
    return int(held.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--weights", type=int, help="one tensor of so many weights instead of MiniLM's")
    parser.add_argument("--rounds", type=int, default=30, help="every optimizer steps once a round")
    parser.add_argument(
        "--output", type=Path, default=None, help="default: benchmarks/results/bench_step_<threads>.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table: dict[str, dict[str, Any]] = {}
    for kind, grads in gradients(options.weights).items():
        count = sum(g.numel() for g in grads)
        params = [
            torch.nn.Parameter(0.02 * torch.randn_like(g)) for g in grads
        ]  # shared: a step costs the same anywhere
        for p, g in zip(params, grads):
            p.grad = g
        steps = {name: make(params, **kwargs).step for name, (make, kwargs, _) in STEPS.items()}
        times = {name: np.empty(options.rounds) for name in steps}
        for i in range(-3, options.rounds):  # three rounds to warm up
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                if i >= 0:
                    times[name][i] = time.perf_counter() - began
        baseline = np.median(times["AdamW, fused"])
        rows = table[kind] = {}
        print(f"{kind}: AdamW {1000 * baseline:.1f} ms a step; ratios to it: quartiles, bound; extra memory")
        for name, t in times.items():
            quartiles = [round(float(q), 2) for q in np.percentile(t / baseline, [25, 50, 75])]
            bytes_a_weight = STEPS[name][2]
            bound = None if bytes_a_weight is None or kind != "dense" else round(bytes_a_weight / 28, 2)
            extra = round(100 * peak_allocation(steps[name]) / (4 * count), 2)
            rows[name] = {"ratio": quartiles, "bound": bound, "extra_memory_percent": extra}
            print(f"  {name:<28}", *(f"{q:6.2f}" for q in quartiles), f"{bound or '':>6} {extra:8.2f} %")
        rows["AdamW, fused"]["milliseconds"] = round(1000 * float(baseline), 1)
    command = f"python benchmarks/bench_step.py --threads {options.threads} --rounds {options.rounds}"
    name = f"bench_step_{options.threads}"
    if options.weights is not None:
        command += f" --weights {options.weights}"
        name += f"_{options.weights}"
    output = options.output or Path(f"benchmarks/results/{name}.json")
    report.write_json(output, {"command": command, "threads": options.threads, "steps": table, **report.environment()})


if __name__ == "__main__":
    main()
