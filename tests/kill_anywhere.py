"""Kill a run of `train_sequence` again and again, resume it every time, and compare the end with an undisturbed run's.

    python tests/kill_anywhere.py --kills 20 --ranks 1
    python tests/kill_anywhere.py --kills 20 --ranks 2

Half of the kills come at a random time, half at a named event: a file opened for writing, renamed or removed, in the
middle of a file of tensors, between a gradient and its step, in an evaluation, in EWC's Fisher pass, in a merge. Runs
are processes of their own, forked from a server that has imported the libraries once (`multiprocessing`'s forkserver).
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = str(Path(__file__).parent)

MEMORY_NAME = "continual_memory.st"
SECONDS = 3.0
"""A run takes about as long."""

context = multiprocessing.get_context("forkserver")


@dataclass
class Run:
    """One run, whole or in several attempts: everything that must be the same in all of them."""

    folder: Path
    ranks: int = 1
    optim: str = "classp"
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the arguments."""


@dataclass
class Event:
    """What happens when `name` is met for the `count`th time in a process."""

    name: str
    count: int = 1
    action: str = "kill"
    """`kill`: SIGKILL. `term`: SIGTERM. `full`: no file may grow beyond 30 kB from here on. `all`: note every
    event."""


# ---- In the process of a rank ----


class Watch:
    """Counts the events of this process, and acts at one of them."""

    def __init__(self, folder: Path, event: Event | None) -> None:
        self.folder, self.event, self.seen = str(folder), event, Counter()
        self.acted = False

    def __call__(self, name: str, half: str | None = None) -> None:
        name = re.sub(r"\d+", "N", name)
        self.seen[name] += 1
        event = self.event
        if event is None or self.acted or event.name != name or self.seen[name] < event.count:
            return
        self.acted = True
        if event.action == "kill":
            if half is not None:
                os.truncate(half, os.path.getsize(half) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        elif event.action == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif event.action == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    def audit(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            written = flags & (os.O_WRONLY | os.O_RDWR)
        elif event in ("os.rename", "os.remove", "os.mkdir", "shutil.rmtree"):
            path, written = args[0], True
        else:
            return
        if written and isinstance(path, (str, os.PathLike)) and str(path).startswith(self.folder):
            self(f"{event} {Path(path).name}")


def install(watch: Watch) -> Any:
    """Send the events of this process to `watch`; returns a callback for the trainer."""
    import torch
    import transformers.modeling_utils
    from transformers import TrainerCallback

    import classp_hf.memory
    import classp_hf.methods.merge
    from classp_hf import EWC, Merge

    sys.addaudithook(watch.audit)

    def saved(module, name, path_position):
        original = getattr(module, name)

        def save(*args, **kwargs):
            original(*args, **kwargs)
            path = str(args[path_position])
            watch(f"half of {Path(path).name}", half=path)

        setattr(module, name, save)

    saved(torch, "save", 1)
    saved(transformers.modeling_utils, "safe_save_file", 1)
    replacing = classp_hf.memory.replacing

    @contextmanager
    def replacing_memory(path):
        with replacing(path) as temporary:
            yield temporary
            watch(f"half of {temporary.name}", half=str(temporary))

    classp_hf.memory.replacing = replacing_memory

    def around(cls, name):
        original = getattr(cls, name)

        def method(self, *args, **kwargs):
            watch(f"before {cls.__name__}.{name}")
            watch.inside = cls.__name__
            original(self, *args, **kwargs)
            watch.inside = None
            watch(f"after {cls.__name__}.{name}")

        setattr(cls, name, method)

    watch.inside = None
    around(EWC, "after_task")
    around(Merge, "after_task")
    like = classp_hf.methods.merge.like_parameter

    def like_parameter(*args):
        watch("a weight of the merge")
        return like(*args)

    classp_hf.methods.merge.like_parameter = like_parameter

    class Events(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            watch("before the optimizer's step")

        def on_optimizer_step(self, *args, **kwargs):
            watch("after the optimizer's step")

        def on_step_end(self, *args, **kwargs):
            watch("step end")

        def on_prediction_step(self, *args, **kwargs):
            watch("evaluating")

        def on_save(self, *args, **kwargs):
            watch("checkpoint saved")

        def on_train_begin(self, *args, **kwargs):
            watch("training begins")

        def on_train_end(self, *args, **kwargs):
            watch("training ends")

    return Events()


def build(run: Run, watch: Watch | None = None, callbacks: tuple = ()) -> tuple[Any, list[Any]]:
    """A trainer and three tasks: a BERT of 20,000 weights with dropout, CLASSP with EWC, a merge and a replay."""
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import BertConfig, BertForSequenceClassification

    from classp_hf import EWC, ContinualTrainer, ContinualTrainingArguments, LogitAdjustment, Merge, Replay, Task

    def pad(features):
        if watch is not None and watch.inside == "EWC":
            watch("an example of the Fisher")
        width = max(len(f["input_ids"]) for f in features)
        ids = torch.tensor([list(f["input_ids"]) + [0] * (width - len(f["input_ids"])) for f in features])
        return {
            "input_ids": ids,
            "attention_mask": (ids != 0).long(),
            "labels": torch.tensor([f["labels"] for f in features]),
        }

    def split(position, rows, seed):
        rng = np.random.default_rng([seed, position])
        keys = rng.integers(0, 3, rows)
        ids = [[1, *rng.integers(10, 40, rng.integers(1, 4)).tolist(), 2 + int(key), 9] for key in keys]
        return Dataset.from_dict({"input_ids": ids, "labels": ((keys + position) % 3).tolist()})

    torch.manual_seed(0)
    names = dict(enumerate(("negative", "neutral", "positive")))
    config = BertConfig(
        **{"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 48, "max_position_embeddings": 16, "initializer_range": 0.15},
        **{"hidden_dropout_prob": 0.1, "id2label": names, "label2id": {n: i for i, n in names.items()}},
    )
    model = BertForSequenceClassification(config)
    arguments = {
        "per_device_train_batch_size": 8 // run.ranks,
        "per_device_eval_batch_size": 12 // run.ranks,
        "max_steps": 6,
        "save_steps": 2,
        "save_total_limit": 1,
        "learning_rate": 1e-2,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "optim": run.optim,
        "sequence_metric": "loss",  # tells more than the accuracy
        "sequence_metric_greater_is_better": False,
        **run.changes,
    }
    args = ContinualTrainingArguments(output_dir=str(run.folder), **arguments)
    tasks = [
        Task(f"task-{t}", *(split(t, rows, seed) for seed, rows in ((0, 40), (1, 24), (2, 24)))) for t in range(3)
    ]
    method = [Replay(0.1), EWC(ewc_lambda=0.1, fisher_samples=12), Merge(), LogitAdjustment()]
    return ContinualTrainer(model, args, pad, method=method, callbacks=list(callbacks)), tasks


def rank_main(run: Run, rank: int, port: int, event: Event | None, resume: bool, started) -> None:
    """One rank of one attempt."""
    log = os.open(run.folder.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if run.ranks > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run.ranks, "LOCAL_WORLD_SIZE": run.ranks}
        os.environ |= {k: str(v) for k, v in places.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    import matplotlib.figure
    import torch

    gc.freeze()  # what the server imported: Trainer collects garbage before every training
    matplotlib.figure.Figure.savefig = lambda self, path, **_: Path(path).write_bytes(bytes(40_000))
    torch.set_num_threads(1)
    watch = Watch(run.folder, event)
    trainer, tasks = build(run, watch, (install(watch),))
    started.set()
    trainer.train_sequence(tasks, resume_from_checkpoint=resume)
    if event is not None and event.action == "all":
        run.folder.with_suffix(f".{rank}.events").write_text(json.dumps(watch.seen))


# ---- Outside ----


def prepare() -> None:
    """Let the server import everything once."""
    paths = [HERE, str(Path(HERE).parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    libraries = ["classp_hf.trainer", "classp_hf.methods.ewc", "matplotlib.figure", "peft", "transformers.models.bert"]
    context.set_forkserver_preload(["kill_anywhere", *libraries, "transformers.models.bert.modeling_bert", "datasets"])


def attempt(
    run: Run, event: Event | None = None, rank: int | None = 0, resume: bool = False, seconds: float | None = None
) -> list[int]:
    """Start every rank, let `event` happen in one of them (None: in all), or kill all after so many seconds of
    training.

    Returns:
        Exit codes; a rank that dies takes the others with it, as a launcher sees to, and a killed one has -9.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = context.Event()
    processes = [
        context.Process(target=rank_main, args=(run, r, port, event if rank in (r, None) else None, resume, started))
        for r in range(run.ranks)
    ]
    for process in processes:
        process.start()
    if seconds is not None:
        started.wait(120)
        processes[0].join(seconds)
        for process in processes:
            process.kill()
    deadline = time.monotonic() + 200
    while any(process.is_alive() for process in processes):
        processes[0].join(0.02)
        if any(process.exitcode not in (None, 0, 143) for process in processes) or time.monotonic() > deadline:
            for process in processes:
                process.kill()
    return [process.exitcode for process in processes]


def log(run: Run) -> str:
    return "".join(p.read_text() for p in sorted(run.folder.parent.glob(f"{run.folder.name}.*.log")))


def undisturbed(run: Run) -> list[dict[str, int]]:
    """Run it whole. Returns how often each event came, for every rank."""
    codes = attempt(run, Event("", action="all"), rank=None)
    assert codes == [0] * run.ranks, log(run)[-3000:]
    return [json.loads(run.folder.with_suffix(f".{r}.events").read_text()) for r in range(run.ranks)]


def differences(a: Path, b: Path) -> list[str]:
    """What two finished runs differ in: R and all else in results.json that is no time or place; every file's
    content."""
    keys = ["tasks", "accuracy_matrix", "metrics", "method", "optimizer", "importance"]
    results = [json.loads((folder / "results.json").read_text()) for folder in (a, b)]
    found = [f"results.json: {k}" for k in keys if results[0][k] != results[1][k]]
    files = [{str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} for folder in (a, b)]
    # which of the last task's checkpoints are left depends on where it was interrupted
    files = [{f for f in names if "checkpoint-" not in f} for names in files]
    found += [f"only one has {f}" for f in sorted(files[0] ^ files[1])]
    compared = {f for f in files[0] & files[1] if f.endswith((".safetensors", ".st", "optimizer.pt", "config.json"))}
    assert {"model.safetensors", MEMORY_NAME} <= compared
    return found + [f for f in sorted(compared) if content(a / f) != content(b / f)]


def content(path: Path) -> Any:
    """The file's bytes; of a safetensors file with metadata these, which it orders at random, and the tensors' bytes;
    of an optimizer its state (the next task sets the rest)."""
    if path.name == "optimizer.pt":
        import torch

        state = torch.load(path, weights_only=True)["state"]
        return {(i, k): torch.as_tensor(v).numpy().tobytes() for i, s in state.items() for k, v in s.items()}
    if path.name != MEMORY_NAME:
        return path.read_bytes()
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in sorted(file.keys())}


def kill_again_and_again(
    whole: Run, events: list[dict[str, int]], kills: int, seed: int, names: list[str] | None = None
) -> tuple[list[str], int]:
    """Kill runs like `whole` until so many kills have struck; every second one at a random time, unless `names` are
    given.

    Returns:
        What each kill struck, and how many runs were finished in the end. All of them ended as `whole` did.
    """
    rng = random.Random(seed)
    left = list(names or [])
    struck: list[str] = []
    finished, run, resume = 0, None, False
    began = time.monotonic()
    attempts = 0
    while len(struck) < kills or run is not None:
        if run is None:
            run, resume = (
                Run(whole.folder.with_name(f"killed-{finished}"), whole.ranks, whole.optim, whole.changes),
                False,
            )
        event, seconds, rank = None, None, 0
        if len(struck) < kills:
            if names is None and len(struck) % 2:
                seconds = rng.uniform(0, 1) * SECONDS
            else:
                if not left:
                    left = rng.sample(sorted(events[0]), len(events[0]))
                name = left.pop()
                rank = rng.choice([r for r in range(whole.ranks) if name in events[r]])
                event = Event(name, rng.randint(1, min(events[rank][name], 3)) if names is None else 1)
        codes = attempt(run, event, rank, resume, seconds)
        attempts += 1
        resume = True
        if -signal.SIGKILL in codes:
            struck.append(f"{event.name} #{event.count}" if event else f"after {seconds:.2f} s")
            print(f"{time.monotonic() - began:6.1f} s  kill {len(struck):2}: {struck[-1]}", flush=True)
            continue
        assert codes == [0] * whole.ranks, log(run)[-3000:]
        assert not (found := differences(whole.folder, run.folder)), (found, struck)
        finished, run = finished + 1, None
        print(f"{time.monotonic() - began:6.1f} s  run {finished} ended as the undisturbed one", flush=True)
        assert attempts < 5 * kills + 5, "too many events that do not happen"
    return struck, finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--optim", default="classp", help="classp or any other of Trainer's")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        whole = Run(Path(folder) / "whole", given.ranks, given.optim)
        events = undisturbed(whole)
        print(f"{len(events[0])} kinds of events, {sum(events[0].values())} events in an undisturbed run's first rank")
        struck, finished = kill_again_and_again(whole, events, given.kills, given.seed)
    print(
        f"{len(struck)} kills on {given.ranks} rank(s): {finished} runs, all ended bit for bit as the undisturbed one"
    )


if __name__ == "__main__":
    main()
