"""Time of an optimizer step on all-MiniLM-L6-v2's 22.7M weights, as ratios to torch's fused AdamW in the same run.

    python benchmarks/bench_step.py --threads 1
    python benchmarks/bench_step.py --threads 2 --weights 100000000
    python benchmarks/bench_step.py --device cuda --weights 1000000000 --dtype bfloat16

Gradients: `dense`, random numbers; `batch`, of a batch of 16 texts of up to 32 tokens; `embedding`, those of its word
embedding alone, of which most rows have none. `bound`: bytes that the step has to read and write against AdamW's.
`bandwidth`, on a GPU: those bytes a second, against what copying the weights reaches in the same run. `one by one`:
Algorithm 1 in PyTorch's elementwise operations, one tensor after the other. Extra memory: the peak of what a step
allocates, in percent of the parameters.
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

# maker, its keywords, bytes a weight beside those of weight (read, written) and gradient: None if they depend on the
# gradients, and where no bound is of interest
STEPS: dict[str, tuple[Callable[..., Any], dict[str, Any], int | None]] = {
    "AdamW, fused": (torch.optim.AdamW, {"fused": True}, 4),  # of the weights' dtype: see bytes_a_weight
    "Adagrad, fused": (torch.optim.Adagrad, {"fused": True}, 2),
    "SGD, fused": (torch.optim.SGD, {"fused": True, "lr": 1e-3}, 0),
    "CLASSP p=2": (CLASSP, {}, 8),
    "CLASSP p=1": (CLASSP, {"power": 1.0}, 8),
    "CLASSP p=2, density 0.1": (CLASSP, {"density": 0.1}, None),
    "CLASSP p=2, bfloat16 memory": (CLASSP, {"state_dtype": "bfloat16"}, 4),
    "CLASSP p=2, uint8 memory": (CLASSP, {"state_dtype": "uint8"}, 2),
    "CLASSP p=2, foreach": (CLASSP, {"foreach": True}, None),
    "CLASSP p=2, one by one": (CLASSP, {"foreach": False, "fused": False}, None),
}


def bytes_a_weight(name: str, size: int) -> int | None:
    """What a dense step reads and writes; `size`: bytes of a weight, a gradient and a number of torch's own states."""
    make, _, state = STEPS[name]
    if state is None:
        return None
    return 3 * size + (state if make is CLASSP else state * size)


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
    embedding = [model.get_input_embeddings().weight.grad]
    dense = [1e-3 * torch.randn(g.shape, generator=generator) for g in real]
    return {"dense": dense, "batch": real, "embedding": embedding}


def seconds(step: Callable[[], Any], device: str) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - began


def peak_allocation(step: Callable[[], Any], device: str) -> int:
    """Bytes beyond what was there before, at the worst moment of a step."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and gradients")
    parser.add_argument(
        "--output", type=Path, default=None, help="default: benchmarks/results/bench_step_<options>.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype, device = getattr(torch, options.dtype), options.device
    table: dict[str, dict[str, Any]] = {}
    for kind, grads in gradients(options.weights).items():
        count = sum(g.numel() for g in grads)
        grads = [g.to(device, dtype) for g in grads]
        # shared: a step costs the same anywhere
        params = [torch.nn.Parameter(0.02 * torch.randn_like(g)) for g in grads]
        for p, g in zip(params, grads):
            p.grad = g
        steps = {name: make(params, **kwargs).step for name, (make, kwargs, _) in STEPS.items()}
        copies = [torch.empty_like(g) for g in grads]
        steps["copy"] = lambda copies=copies, grads=grads: torch._foreach_copy_(copies, grads)
        times = {name: np.empty(options.rounds) for name in steps}
        for i in range(-3, options.rounds):  # three rounds to warm up
            for name, step in steps.items():
                times[name][max(i, 0)] = seconds(step, device)
        baseline = np.median(times["AdamW, fused"])
        copied = 2 * dtype.itemsize / np.median(times["copy"])
        rows = table[kind] = {}
        print(
            f"{kind}: AdamW {1000 * baseline:.1f} ms a step; ratios to it: quartiles, bound; bandwidth; extra memory"
        )
        for name in STEPS:
            quartiles = [round(float(q), 2) for q in np.percentile(times[name] / baseline, [25, 50, 75])]
            read = bytes_a_weight(name, dtype.itemsize) if kind == "dense" else None
            bound = read and round(read / bytes_a_weight("AdamW, fused", dtype.itemsize), 2)
            bandwidth = round(float(read / np.median(times[name]) / copied), 2) if read and device == "cuda" else None
            extra = round(100 * peak_allocation(steps[name], device) / (dtype.itemsize * count), 2)
            rows[name] = {"ratio": quartiles, "bound": bound, "bandwidth": bandwidth, "extra_memory_percent": extra}
            print(
                f"  {name:<28}",
                *(f"{q:6.2f}" for q in quartiles),
                f"{bound or '':>6} {bandwidth or '':>6} {extra:8.2f} %",
            )
        rows["AdamW, fused"]["milliseconds"] = round(1000 * float(baseline), 1)
        rows["AdamW, fused"]["copy_gb_per_second"] = round(float(copied) * count / 1e9, 1)
    command = f"python benchmarks/bench_step.py --threads {options.threads} --rounds {options.rounds}"
    name = f"bench_step_{options.threads}"
    for option in ("weights", "device", "dtype"):
        if (value := getattr(options, option)) != parser.get_default(option):
            command += f" --{option} {value}"
            name += f"_{value}"
    output = options.output or Path(f"benchmarks/results/{name}.json")
    given = {"threads": options.threads, "device": device, "dtype": options.dtype}
    report.write_json(output, {"command": command, **given, "steps": table, **report.environment()})


if __name__ == "__main__":
    main()
