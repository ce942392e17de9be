"""What the first fine-tuning of a pretrained language model costs it, by method: SmolLM2-135M-Instruct on real text.

    python benchmarks/first_finetuning.py tune     # every arm x setting on the tuning domain
    python benchmarks/first_finetuning.py report   # the chosen settings on the reported domain, several seeds
    python benchmarks/first_finetuning.py table    # the Markdown table of what is there

Set-ups: `sentiment`, an instruction through the chat template whose answer is one word; `domain`, plain text of one
domain; `domain_movie`, of another one, with the settings tuned for `domain`. Measured before and after: the new task
(accuracy by the logits of the three words; loss of held-out text), the loss on general text (windows of Python's
documentation), the KL from the starting model on it and on the model's own samples, all in float32. Every finished
run is a line of `--output` and is never run again; `--part 0 2` and `--part 1 2` share the rest between two processes.
`--precision bf16` trains under autocast, faster on CPUs with AMX.
`seconds`: of the training, with samples and answers drawn; CPU time where there is no GPU. Every run of AdamW is
measured twice: as it is, and half-way back to the start (arm `interpolation`).
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import os
import pydoc_data.topics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from compare_methods import GPU, PRECISION, grid, read_lines
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from classp_hf import (
    METHODS,
    ContinualTrainer,
    ContinualTrainingArguments,
    Task,
    embedded,
    load_task,
    register,
    rehearsal,
)
from classp_hf.language import prepare_language_tasks
from classp_hf.remember import pretrained_memory
from classp_hf.report import environment
from classp_hf.tasks import SENTIMENT

BASE = (
    "--per_device_train_batch_size 8 --max_length 128 --save_strategy no --logging_strategy no --report_to none "
    "--disable_tqdm True --dataloader_pin_memory False --log_level error --warmup_steps 4"
)
STEPS = {"sentiment": 40, "domain": 60, "domain_movie": 60}
TUNED_ON, REPORTED_ON = "amazon", {"sentiment": "nyt", "domain": "nyt", "domain_movie": "movie"}
TEST_EXAMPLES, WINDOWS, WINDOW = 240, 48, 64
LONGEST = 30  # words of a text
QUESTION = "Is the sentiment of this text negative, neutral or positive? Answer with one word.\n\n"


@dataclass
class Arm:
    """What is run: flags that never change, and the settings to choose from, at most three."""

    flags: str
    settings: list[str]
    method: str = "none"
    memory: str = "none"
    lora: bool = False
    interpolated: bool = False  # measured half-way back to the start, too
    tuned_as: str = ""  # another arm, whose choice this one takes


RATES = {"adamw": (3e-5, 1e-4, 3e-4), "classp": (3e-4, 1e-3, 3e-3)}
ADAMW, CLASSP = "--optim adamw_torch_fused", "--optim classp"
REHEARSAL = "--rehearse_fraction 0.25 --rehearse_samples 64 --rehearse_length 64"
STRENGTHS = [f"--memory_strength {k} --learning_rate {lr}" for k, lr in ((640, 3e-3), (6400, 1e-2), (64000, 3e-2))]
ADAMW_LR, CLASSP_LR = grid("learning_rate", *RATES["adamw"]), grid("learning_rate", *RATES["classp"])
ARMS = {
    **{
        f"adamw_{rate:g}": Arm(f"{ADAMW} --learning_rate {rate}", [""], interpolated=True)
        for rate in (1e-5, *RATES["adamw"])
    },
    "lora": Arm(ADAMW, grid("learning_rate", 3e-4, 1e-3, 3e-3), lora=True),
    "classp": Arm(CLASSP, CLASSP_LR),
    # the Fisher of the task itself, when it ends, changes nothing that is measured
    "ewc_pretrained": Arm(
        f"{ADAMW} --learning_rate 1e-4 --fisher_samples 1", grid("ewc_lambda", 0.1, 1, 10), "ewc", "pretrained"
    ),
    "classp_pretrained": Arm(CLASSP, CLASSP_LR, memory="pretrained"),
    "classp_strong": Arm(CLASSP, STRENGTHS, memory="pretrained"),
    "rehearsal": Arm(f"{ADAMW} {REHEARSAL}", ADAMW_LR, "pseudo_rehearsal"),
    "classp_rehearsal": Arm(f"{CLASSP} {REHEARSAL}", CLASSP_LR, "pseudo_rehearsal"),
    "real_text": Arm(
        f"{ADAMW} {REHEARSAL} --rehearse_texts documentation", ADAMW_LR, "pseudo_rehearsal", tuned_as="rehearsal"
    ),
}


@dataclass(frozen=True)
class Job:
    """One run. Its JSON is its identity."""

    stage: str
    setup: str
    arm: str
    setting: str
    seed: int


# ---- Data ----


@functools.cache
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(embedded.smollm2())


def start() -> Any:
    # On CPUs the backward pass of PyTorch's fused attention takes a quarter of a step.
    attention = "sdpa" if GPU else "eager"
    return transformers.AutoModelForCausalLM.from_pretrained(
        embedded.smollm2(), dtype=torch.float32, attn_implementation=attention
    )


@functools.cache
def documentation(part: int) -> list[str]:
    """Texts of Python's documentation; the two parts share none. Part 0 is measured on, part 1 is for training."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())][part::2]


def windows(texts: list[str], count: int) -> list[list[int]]:
    """`count` windows of tokens, spread evenly over the texts."""
    ids = tokenizer()("\n\n".join(texts), verbose=False)["input_ids"]
    return [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW, (len(ids) - WINDOW) // count)][:count]


@functools.cache
def task(setup: str, stage: str, seed: int) -> tuple[Task, Any]:
    """The task, tokenised, with training examples by `seed`; and its test rows."""
    given = load_task(f"icwsm14/{TUNED_ON if stage == 'tune' else REPORTED_ON[setup]}")
    given = replace(given, **{
        part: getattr(given, part).filter(lambda row: len(row["text"].split()) <= LONGEST)
        for part in ("train_dataset", "test_dataset")
    })  # fmt: skip
    train = given.train_dataset.shuffle(seed=seed).select(range(8 * STEPS[setup]))
    test = given.test_dataset.select(range(TEST_EXAMPLES))
    if setup != "sentiment":
        splits = [Dataset.from_dict({"text": part["text"]}) for part in (train, test)]
    else:
        splits = [
            Dataset.from_dict({
                "prompt": [[{"role": "user", "content": QUESTION + text}] for text in part["text"]],
                "completion": [[{"role": "assistant", "content": SENTIMENT[label]}] for label in part["label"]],
            })
            for part in (train, test)
        ]  # fmt: skip
    whole = Task(setup, *splits, splits[1])
    return prepare_language_tasks([whole], tokenizer(), False, 128)[0], test


# ---- Measures ----


@functools.cache
def references(setup: str, stage: str) -> dict[str, Any]:
    """The starting model's answers to general text, to samples that no arm trains on and to the domain's texts."""
    model = start()
    texts = {
        "general": windows(documentation(0), WINDOWS),
        "own": rehearsal.draw_samples(model, tokenizer(), 48, WINDOW, seed=999),
    }
    if setup != "sentiment":
        texts["new"] = task(setup, stage, 0)[0].test_dataset["input_ids"]
    return {name: rehearsal.answer(model, rows, 64) for name, rows in texts.items()}


@torch.no_grad()
def scores(model: Any, setup: str, stage: str) -> dict[str, float]:
    model.eval()
    prepared, rows = task(setup, stage, 0)
    result, reference = {}, references(setup, stage)
    result["general_loss"], result["kl_general"] = rehearsal.measure(model, reference["general"])
    result["kl_own"] = rehearsal.measure(model, reference["own"])[1]
    test = prepared.test_dataset
    if setup != "sentiment":
        return {**result, "task": rehearsal.measure(model, reference["new"])[0]}
    words = [tokenizer()(word, add_special_tokens=False)["input_ids"][0] for word in SENTIMENT]
    answered = [next(i for i, label in enumerate(row["labels"]) if label != -100) for row in test]
    ids, lengths = rehearsal.padded([row["input_ids"][:end] for row, end in zip(test, answered, strict=True)])
    right, labels = 0, torch.tensor(rows["label"])
    for batch in torch.arange(len(ids)).split(16):
        part, ends = ids[batch], lengths[batch].long()
        logits = model(input_ids=part[:, : ends.max()].long().to(model.device))["logits"]
        found = logits[torch.arange(len(ends)), ends - 1][:, words].argmax(-1).cpu()
        right += int((found == labels[batch]).sum())
    return {**result, "task": right / len(ids)}


@functools.cache
def scores_before(setup: str, stage: str) -> dict[str, float]:
    return scores(start(), setup, stage)


# ---- Runs ----


def run(job: Job, precision: str) -> list[dict[str, Any]]:
    """The lines of one run: its own and, where the arm says so, that of the weights half-way back."""
    arm, flags = ARMS[job.arm], f"{BASE} {ARMS[job.arm].flags} {job.setting}"
    with tempfile.TemporaryDirectory(prefix="first_finetuning_") as folder:
        register()
        methods = [m for m in METHODS.values() if any(f.init for f in fields(m))]
        parser = transformers.HfArgumentParser((ContinualTrainingArguments, *methods))
        words = f"{flags} --max_steps {STEPS[job.setup]} --seed {job.seed}"
        words += f" --bf16 {precision == 'bf16'} --use_cpu {not GPU}"
        args, *configured = parser.parse_args_into_dataclasses([*words.split(), "--output_dir", folder])
        if "documentation" in flags:
            texts = Path(folder, "documentation.txt")
            texts.write_text("\n\n".join(map(tokenizer().decode, windows(documentation(1), 160))))
            configured = [copy.copy(m) for m in configured]
            for method in configured:
                if method.name == "pseudo_rehearsal":
                    method.rehearse_texts = str(texts)
        transformers.set_seed(job.seed)
        model = start()
        before = scores_before(job.setup, job.stage)
        if arm.lora:
            model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        if arm.memory == "pretrained":
            pretrained_memory(model, tokenizer(), 2.0)  # into the cache: it is computed once a model
        method = [m for m in configured if m.name == arm.method]
        train = task(job.setup, job.stage, job.seed)[0].train_dataset
        started = time.process_time() if not GPU else time.perf_counter()
        trainer = ContinualTrainer(
            model, args, train_dataset=train, processing_class=tokenizer(), method=method, memory=arm.memory
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        seconds = (time.process_time() if not GPU else time.perf_counter()) - started
        after = [(job, scores(model, job.setup, job.stage))]
        if arm.interpolated:
            with torch.no_grad():
                for p, old in zip(model.parameters(), start().to(model.device).parameters(), strict=True):
                    p.lerp_(old, 0.5)
            half = replace(job, arm="interpolation", setting=arm.flags.removeprefix(ADAMW).strip())
            after.append((half, scores(model, job.setup, job.stage)))
    found = environment()
    common = {
        "seconds": round(seconds, 1),
        "flags": flags,
        "precision": precision,
        "commit": found["commit"],
        "hardware": {k: found["hardware"][k] for k in ("cpu", "cpu_capability", "torch_threads", "gpus")},
        "versions": {k: found["versions"][k] for k in ("torch", "transformers")},
    }
    before = {k: round(v, 4) for k, v in before.items()}
    return [
        {**asdict(who), "before": before, "after": {k: round(v, 4) for k, v in scored.items()}, **common}
        for who, scored in after
    ]


def job_of(line: dict[str, Any]) -> Job:
    return Job(**{f.name: line[f.name] for f in fields(Job)})


def score(line: dict[str, Any]) -> float:
    """Higher is better: what tuning goes by."""
    return line["after"]["task"] if line["setup"] == "sentiment" else -line["after"]["task"]


def chosen(setup: str, arm: str, lines: list[dict[str, Any]]) -> str:
    """The setting with the best new-task score on the tuning domain, whatever it costs the model."""
    if len(ARMS[arm].settings) == 1:
        return ARMS[arm].settings[0]
    arm, setup = ARMS[arm].tuned_as or arm, setup.removesuffix("_movie")
    found: dict[str, list[float]] = {}
    for line in lines:
        if (line["stage"], line["setup"], line["arm"]) == ("tune", setup, arm):
            found.setdefault(line["setting"], []).append(score(line))
    if found.keys() != set(ARMS[arm].settings):
        raise ValueError(f"{arm!r} is not tuned on {setup!r}. Run: first_finetuning.py tune --arms {arm}")
    return max(found, key=lambda setting: mean(found[setting]))


def jobs(options: argparse.Namespace, lines: list[dict[str, Any]]) -> Iterator[Job]:
    tuning = options.stage == "tune"
    seeds = options.tuning_seeds if tuning else options.seeds
    for seed, setup, arm in itertools.product(seeds, options.setups, options.arms):
        if not tuning:
            yield Job("report", setup, arm, chosen(setup, arm, lines), seed)
        elif len(ARMS[arm].settings) > 1 and not ARMS[arm].tuned_as and setup != "domain_movie":
            yield from (Job("tune", setup, arm, setting, seed) for setting in ARMS[arm].settings)


def table(lines: list[dict[str, Any]], stage: str) -> str:
    """Mean and standard deviation over seeds, an arm and setting a row."""
    rows = [
        "| set-up | arm | setting | seeds | new task | general loss | KL general | KL own | seconds |",
        "|---" * 9 + "|",
    ]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines:
        if line["stage"] == stage:
            groups.setdefault((line["setup"], line["arm"], line["setting"]), []).append(line)
    for setup in STEPS:
        mine = {k: v for k, v in groups.items() if k[0] == setup}
        first = next(iter(mine.values()), None)
        for when, group in [("before", first), *(("after", v) for v in mine.values())]:
            if group is None:
                continue
            cells = []
            for key, scale in (("task", 100 if setup == "sentiment" else 1), ("general_loss", 1), ("kl_general", 1),
                               ("kl_own", 1)):  # fmt: skip
                values = [scale * line[when][key] for line in group]
                digits = 1 if scale == 100 else 3
                spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{mean(values):.{digits}f}{spread}")
            names = (setup, "before", "", "") if when == "before" else (
                setup, group[0]["arm"], group[0]["setting"].replace("--", ""), str(len(group)))  # fmt: skip
            seconds = "" if when == "before" else f"{mean(line['seconds'] for line in group):.0f}"
            rows.append("| " + " | ".join([*names, *cells, seconds]) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stage", choices=["tune", "report", "table"])
    add("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    add("--setups", nargs="+", default=list(STEPS), choices=list(STEPS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of `report`")
    add("--tuning_seeds", nargs="+", type=int, default=[0], help="of `tune`")
    add("--output", type=Path, default=Path("benchmarks/results/first_finetuning.jsonl"))
    add("--precision", choices=["fp32", "bf16"], default=PRECISION)
    add("--part", nargs=2, type=int, default=[0, 1], metavar=("I", "N"), help="every Nth of the runs, from the Ith on")
    options = parser.parse_args()
    os.environ.update(HF_DATASETS_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
    transformers.utils.logging.disable_progress_bar()
    lines = read_lines(options.output)
    if options.stage == "table":
        for stage in ("tune", "report"):
            print(f"\n{stage}\n\n{table(lines, stage)}")
        return
    finished = {job_of(line) for line in lines}
    todo = [job for job in dict.fromkeys(jobs(options, lines)) if job not in finished]
    todo = todo[options.part[0] :: options.part[1]]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for i, job in enumerate(todo):
        lines = run(job, options.precision)
        with options.output.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        values = " ".join(f"{k} {v:.3f}" for k, v in lines[0]["after"].items() if math.isfinite(v))
        print(f"{i + 1}/{len(todo)} {job.setup} {job.arm} {job.setting} seed {job.seed}: {values}", flush=True)


if __name__ == "__main__":
    main()
