"""Time of an optimizer step on all-MiniLM-L6-v2's 22.7M weights, as ratios to torch's fused AdamW in the same run.

    python benchmarks/bench_step.py --threads 1

`plain loop` is CLASSP's per-tensor arithmetic alone, one whole tensor after the other, without its check of the gradients:
what the blocks of `CLASSP.step` are measured against. `sparse`: 300 rows of the word embedding have a gradient, the rest none.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

from classp_hf import CLASSP, embedded, report
from classp_hf.optim.classp import classp_

STATE = {"threshold": 0.0, "density": None, "eps": 1e-6, "apply_decay": True, "weight_decay": 0.0, "maximize": False}


def parameters(shapes: list[torch.Size], sparse: bool) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i, shape in enumerate(shapes):
        p = torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator))
        p.grad = 1e-3 * torch.randn(shape, generator=generator)
        if sparse and i == 0:
            p.grad[torch.randperm(len(p), generator=generator)[300:]] = 0
        made.append(p)
    return made


def plain_loop(params: list[torch.nn.Parameter]):
    accumulators = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step() -> None:
        for p, s in zip(params, accumulators):
            classp_(p, p.grad, s, lr=1e-3, power=2.0, **STATE)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30, help="every optimizer steps once a round")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/bench_step.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = [p.shape for p in AutoModel.from_pretrained(embedded.model_path()).parameters()]
    ratios: dict[str, dict[str, list[float]]] = {}
    for gradients in ("dense", "sparse"):

        def fresh(sparse=gradients == "sparse"):
            return parameters(shapes, sparse)

        steps = {
            "AdamW, fused": torch.optim.AdamW(fresh(), fused=True).step,
            "Adagrad, fused": torch.optim.Adagrad(fresh(), fused=True).step,
            "CLASSP p=2": CLASSP(fresh()).step,
            "CLASSP p=1": CLASSP(fresh(), power=1.0).step,
            "CLASSP p=2, plain loop": plain_loop(fresh()),
        }
        times = {name: np.empty(options.rounds) for name in steps}
        for i in range(-3, options.rounds):  # three rounds to warm up
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                if i >= 0:
                    times[name][i] = time.perf_counter() - began
        baseline = np.median(times["AdamW, fused"])
        ratios[gradients] = {
            n: [round(float(q), 2) for q in np.percentile(t / baseline, [25, 50, 75])] for n, t in times.items()
        }
        print(f"{gradients}: AdamW {1000 * baseline:.1f} ms a step; ratios to it, quartiles")
        for name, quartiles in ratios[gradients].items():
            print(f"  {name:<24}", *(f"{q:6.2f}" for q in quartiles))
    command = f"python benchmarks/bench_step.py --threads {options.threads} --rounds {options.rounds}"
    report.write_json(options.output, {"command": command, "ratios": ratios, **report.environment()})


if __name__ == "__main__":
    main()
