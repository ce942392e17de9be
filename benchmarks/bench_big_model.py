"""What the memory of a big model costs: seconds and peak bytes of writing, reading and matching it.

    python benchmarks/bench_big_model.py --output benchmarks/results/bench_big_model.json

A Llama of random weights in bfloat16 takes one CLASSP step in Trainer, with gradient checkpointing; its memory is
written, read, matched with the model and put into the optimizer. `peak_ratio`: the most that a phase allocates beyond
what was there when it began, over the size of the memory (4 bytes a weight). Linux: it reads `/proc/self/status`,
whose `RssAnon` counts no pages of files.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from classp_hf import ContinualCallback, ContinualMemory, register
from classp_hf.matching import match_accumulators
from classp_hf.report import environment


def allocated() -> int:
    """Bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@contextmanager
def measured(found: dict[str, Any], phase: str, size: int) -> Iterator[None]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, lest it hide what is allocated
    before = peak = allocated()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.005):
            peak = max(peak, allocated())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    found[phase] = {"seconds": round(seconds, 2), "peak_ratio": round((peak - before) / size, 3)}
    print(phase, found[phase], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="16 make 1.04 billion weights")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=options.layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=True,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    weights = sum(p.numel() for p in model.parameters())
    size = 4 * weights
    found: dict[str, Any] = {}
    register()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, optim="classp", learning_rate=1e-3, max_steps=1, per_device_train_batch_size=1, use_cpu=True,
            gradient_checkpointing=True, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        row = list(range(16))
        engine = ContinualCallback(memory="none")
        trainer = Trainer(
            model, args, train_dataset=Dataset.from_dict({"input_ids": [row], "labels": [row]}), callbacks=[engine]
        )
        engine.saves_at_end = False
        trainer.train()
        model.zero_grad()
        with measured(found, "write", size):
            engine.write(folder, args)
        with measured(found, "read", size):
            memory = ContinualMemory.load(folder)
        with measured(found, "match", size):
            match_accumulators(memory, model)
        with measured(found, "go on", size):
            engine.load(memory, model, args)
            engine.put(False)
    result = {"weights": weights, "memory_bytes": size, "phases": found, "environment": environment()}
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
