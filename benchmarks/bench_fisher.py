"""Time and memory of EWC's Fisher on all-MiniLM-L6-v2: one backward pass an example against one a batch, in one run.

    python benchmarks/bench_fisher.py --threads 2

`ordinary`: the gradient of each batch's loss, as training takes it, of which no squares can be had: what a pass costs
at least. `vmap`: `torch.func.vmap(grad)` over groups of four examples of equal length, whose gradients it holds at
once. The examples are texts of icwsm14/nyt, cut to 32 tokens. Peak memory: of all tensors alive at once beside the
model, counted over 16 examples apart from the timed runs.
"""

from __future__ import annotations

import argparse
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bench_step import seconds
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from classp_hf import embedded, report
from classp_hf.methods.fisher import sum_squared_gradients

VMAPPED = 4


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operations made and that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if (
                isinstance(t, torch.Tensor)
                and (key := t.untyped_storage()._cdata) not in self.alive
                and key not in old
            ):
                self.alive[key] = t.untyped_storage().nbytes()
                weakref.finalize(t.untyped_storage(), self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def one_by_one(model, examples, size):
    parameters = dict(model.named_parameters())
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for example in examples:
        inputs = {k: t for k, t in example.items() if k != "labels"}
        loss = F.cross_entropy(model(**inputs).logits, example["labels"])
        for t, g in zip(total.values(), torch.autograd.grad(loss, list(parameters.values()))):
            t.addcmul_(g, g)
    return total


def by_batches(model, examples, size):
    return sum_squared_gradients(model, examples, dict(model.named_parameters()), size)


def batches_of_equal_shape(examples, size):
    for length in {e["input_ids"].shape[1] for e in examples}:
        same = [e for e in examples if e["input_ids"].shape[1] == length]
        for some in (same[i : i + size] for i in range(0, len(same), size)):
            yield {k: torch.cat([e[k] for e in some]) for k in some[0]}


def ordinary(model, examples, size):
    for batch in batches_of_equal_shape(examples, size):
        inputs = {k: t for k, t in batch.items() if k != "labels"}
        torch.autograd.grad(F.cross_entropy(model(**inputs).logits, batch["labels"]), list(model.parameters()))


def by_vmap(model, examples, size):
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}

    def loss(weights, example):
        # without the mask, which is all ones: making the attention's of it is not possible under vmap
        inputs = {k: example[k][None] for k in ("input_ids", "token_type_ids")}
        logits = torch.func.functional_call(model, weights, kwargs=inputs).logits
        return F.cross_entropy(logits, example["labels"][None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    for batch in batches_of_equal_shape(examples, min(size, VMAPPED)):
        for n, g in gradients(parameters, batch).items():
            total[n] += g.square().sum(0)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="every way is timed once a round")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/bench_fisher.json"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    path = embedded.model_path()
    # eager: the fused attention has no rule for vmap
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3, attn_implementation="eager").eval()
    model.to(options.device)
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [text for text, _ in embedded.icwsm14("nyt")[: options.examples]]
    examples = [
        {**tokenizer(text, truncation=True, max_length=32, return_tensors="pt"), "labels": torch.tensor([i % 3])}
        for i, text in enumerate(texts)
    ]
    examples = [{k: t.to(options.device) for k, t in example.items()} for example in examples]
    ways = {
        "one backward an example": one_by_one,
        "one backward a batch": by_batches,
        "vmap": by_vmap,
        "ordinary": ordinary,
    }
    reference = one_by_one(model, examples[:16], 1)
    peaks = {}
    for name, way in ways.items():
        with PeakMemory() as memory:
            found = way(model, examples[:16], options.batch_size)
        peaks[name] = round(memory.peak / 2**20, 1)
        for n, t in reference.items() if found else ():
            torch.testing.assert_close(found[n], t, rtol=1e-3, atol=1e-5 * float(t.max()) + 1e-12)
        del found
    del reference
    times = {name: np.empty(options.rounds) for name in ways}
    for i in range(options.rounds):
        for name, way in ways.items():
            took = seconds(partial(way, model, examples, options.batch_size), options.device)
            times[name][i] = took / len(examples)
    baseline = times["one backward an example"]
    rows = {
        name: {
            "speedup": [round(float(q), 2) for q in np.percentile(baseline / t, [25, 50, 75])],
            "ms_an_example": round(1000 * float(np.median(t)), 2),
            "peak_mib": peaks[name],
        }
        for name, t in times.items()
    }
    print("times faster than one backward an example (quartiles), ms an example, peak MiB beside the model")
    for name, row in rows.items():
        quartiles = " ".join(f"{q:6.2f}" for q in row["speedup"])
        print(f"  {name:<24}{quartiles}  {row['ms_an_example']:8.1f} ms  {row['peak_mib']:8.1f} MiB")
    command = (
        f"python benchmarks/bench_fisher.py --threads {options.threads} --rounds {options.rounds} "
        f"--examples {options.examples} --batch_size {options.batch_size}"
        + f" --device {options.device}"
        * (options.device != "cpu")
    )
    report.write_json(options.output, {"command": command, "rows": rows, **report.environment()})


if __name__ == "__main__":
    main()
