"""Three language-model tasks after one another, by method: what each keeps of the earlier tasks and of general text.

    python benchmarks/language_sequence.py run       # every arm, several seeds
    python benchmarks/language_sequence.py table     # docs/language_sequence.md, of the runs there are

SmolLM2-135M-Instruct learns to answer with the sentiment of editorial sentences (one word, chat template), then to
write other such sentences in title case (chat template), then plain sentences of film reviews. Measured after each:
the loss of every task on held-out rows, in nats a token of the answer or text, in the training's precision; the
accuracy of the one-word answers; the loss on general text (Python's documentation), and the KL from the starting
model there.

Settings are those that `first_finetuning.py` chose for its set-up `domain`, on another domain. A finished run is a
line of `--output`, never run again; `--part 0 2` and `--part 1 2` share the rest between two processes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from compare_methods import GPU, PRECISION, read_lines
from datasets import Dataset
from first_finetuning import ARMS, BASE, LONGEST, QUESTION, chosen, documentation, start, tokenizer, windows
from peft import LoraConfig, get_peft_model
from report_first_finetuning import NAMES
from report_performance import ROOT, cpu, wrapped

from classp_hf import (
    METHODS,
    ContinualTrainer,
    ContinualTrainingArguments,
    Task,
    embedded,
    load_task,
    register,
    rehearsal,
    report,
)
from classp_hf.metrics import confidence
from classp_hf.remember import pretrained_memory
from classp_hf.report import environment
from classp_hf.tasks import SENTIMENT

TASKS = ("sentiment", "title", "films")
STEPS, TEST = 40, 64  # of a task; 8 texts a step
TITLE = "Write this text in title case, with every word capitalised.\n\n"
OUTPUT = Path("benchmarks/results/language_sequence.jsonl")
RUN = ("adamw_3e-05", "adamw_0.0001", "adamw_0.0003", "lora", "ewc_pretrained", "classp", "classp_pretrained")
RUN += ("classp_strong", "rehearsal", "classp_rehearsal")


def chat(question: str, texts: list[str], answers: list[str]) -> Dataset:
    return Dataset.from_dict({
        "prompt": [[{"role": "user", "content": question + text}] for text in texts],
        "completion": [[{"role": "assistant", "content": answer}] for answer in answers],
    })  # fmt: skip


@functools.cache
def tasks(seed: int) -> tuple[list[Task], list[int]]:
    """The tasks with training rows by `seed`, and the labels of the first one's test rows."""
    split = {}
    for domain in ("nyt", "movie"):
        given = load_task(f"icwsm14/{domain}")
        short = [part.filter(lambda row: len(row["text"].split()) <= LONGEST)
                 for part in (given.train_dataset, given.test_dataset)]  # fmt: skip
        split[domain] = short[0].shuffle(seed=seed)[: 16 * STEPS], short[1][: 2 * TEST]
    made: list[list[Dataset]] = [[], [], []]
    for (rows, size), films in zip(((split["nyt"][0], 8 * STEPS), (split["nyt"][1], TEST)), split["movie"]):
        texts, labels = rows["text"], rows["label"]
        made[0].append(chat(QUESTION, texts[:size], [SENTIMENT[label] for label in labels[:size]]))
        made[1].append(chat(TITLE, texts[size:], [" ".join(map(str.capitalize, t.split())) for t in texts[size:]]))
        made[2].append(Dataset.from_dict({"text": films["text"][:size]}))
    named = zip(TASKS, made, strict=True)
    return [Task(name, train, test, test) for name, (train, test) in named], split["nyt"][1]["label"][:TEST]


@functools.cache
def general() -> rehearsal.Answers:
    """The starting model's answers to general text."""
    return rehearsal.answer(start(), windows(documentation(0), 48), 64)


@torch.no_grad()
def accuracy(model: Any) -> float:
    """Of the one-word answers, by the logits of the three words."""
    rows, labels = tasks(0)[0][0].test_dataset, torch.tensor(tasks(0)[1])
    words = [tokenizer()(word, add_special_tokens=False)["input_ids"][0] for word in SENTIMENT]
    asked = [tokenizer().apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in rows["prompt"]]
    ids, lengths = rehearsal.padded(asked)
    right = 0
    for batch in torch.arange(len(ids)).split(16):
        last, which = torch.unique(lengths[batch].long() - 1, return_inverse=True)
        given = ids[batch, : last.max() + 1].long().to(model.device)
        logits = model(input_ids=given, logits_to_keep=last.to(model.device))["logits"]
        found = logits[torch.arange(len(batch)), which][:, words].argmax(-1).cpu()
        right += int((found == labels[batch]).sum())
    return right / len(ids)


class Measured(transformers.TrainerCallback):
    """What is measured beside the tasks' losses: before the first training and after each."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def measure(self, model: Any) -> None:
        training = model.training
        model.eval()
        loss, kl = rehearsal.measure(model, general())
        self.found.append({"general": round(loss, 4), "kl": round(kl, 4), "accuracy": round(accuracy(model), 4)})
        model.train(training)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self.found:
            self.measure(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.measure(model)


def run(name: str, seed: int, precision: str, steps: int = STEPS) -> dict[str, Any]:
    """Train one arm over the sequence; returns the line to keep."""
    arm = ARMS[name]
    setting = chosen("domain", name, read_lines(ROOT / "benchmarks/results/first_finetuning.jsonl"))
    flags = f"{BASE} {arm.flags} {setting} --max_steps {steps} --reset_optimizer {'adamw' in arm.flags}"
    clock = time.perf_counter if GPU else time.process_time
    with tempfile.TemporaryDirectory(prefix="language_sequence_") as folder:
        register()
        methods = [m for m in METHODS.values() if any(f.init for f in fields(m))]
        parser = transformers.HfArgumentParser((ContinualTrainingArguments, *methods))
        words = f"{flags} --seed {seed} --bf16 {precision == 'bf16'} --use_cpu {not GPU}"
        args, *configured = parser.parse_args_into_dataclasses([*words.split(), "--output_dir", folder])
        transformers.set_seed(seed)
        model, measured = start(), Measured()
        if arm.lora:
            model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        if arm.memory == "pretrained":
            pretrained_memory(model, tokenizer(), 2.0)  # into the cache: it is computed once a model
        method = [m for m in configured if m.name == arm.method]
        began = clock()
        trainer = ContinualTrainer(
            model, args, processing_class=tokenizer(), method=method, memory=arm.memory, callbacks=[measured]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        results = trainer.train_sequence(tasks(seed)[0])
    found = environment()
    return {
        "arm": name,
        "seed": seed,
        "setting": setting,
        "R": [[round(v, 4) for v in row] for row in results["accuracy_matrix"]],
        "beside": measured.found,
        "seconds": round(clock() - began, 1),
        "flags": flags,
        "precision": precision,
        "commit": found["commit"],
        "hardware": {k: found["hardware"][k] for k in ("cpu", "cpu_capability", "torch_threads", "gpus")},
        "versions": {k: found["versions"][k] for k in ("torch", "transformers")},
    }


def cell(values: list[float], digits: int = 2) -> str:
    middle, half = confidence(values)
    return f"{middle:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Over the stages, a line an arm: the loss of the first task, of the second one, and that of general text."""
    figure = report.new_figure(10, 4)
    for column, axes in enumerate(figure.subplots(1, 3)):
        for i, arm in enumerate(arm for arm in RUN if any(line["arm"] == arm for line in lines)):
            mine = [line for line in lines if line["arm"] == arm]
            each = [
                [row[column] for row in line["R"]] if column < 2 else [m["general"] for m in line["beside"]]
                for line in mine
            ]
            middle = [confidence(list(of))[0] for of in zip(*each)]
            axes.plot(["start", *TASKS], middle, label=None if column else NAMES[arm], **report.series_style(i))
        axes.set_title(f"loss of {TASKS[column] if column < 2 else 'general text'} (nats a token)", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="0.9")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    report.save_figure(figure, path)


def page(lines: list[dict[str, Any]]) -> str:
    rows = [["", *(f"{name}: learned" for name in TASKS), *(f"{name}: at the end" for name in TASKS[:-1])]]
    rows[0] += ["accuracy: learned, %", "at the end, %", "rise of general text", "KL", "seconds", "seeds"]
    for arm in (arm for arm in RUN if any(line["arm"] == arm for line in lines)):
        mine = [line for line in lines if line["arm"] == arm]
        losses = [[line["R"][i + 1][i] for line in mine] for i in range(len(TASKS))]
        losses += [[line["R"][-1][i] for line in mine] for i in range(len(TASKS) - 1)]
        right = [[100 * line["beside"][i]["accuracy"] for line in mine] for i in (1, -1)]
        rise = [line["beside"][-1]["general"] - line["beside"][0]["general"] for line in mine]
        kl = [line["beside"][-1]["kl"] for line in mine]
        cells = [*map(cell, losses), *(cell(r, 1) for r in right), cell(rise, 3), cell(kl, 3)]
        rows.append([NAMES[arm], *cells, cell([line["seconds"] for line in mine], 0).split()[0], str(len(mine))])
    first = lines[0]
    parts = [
        "# Three language-model tasks, by method",
        " ".join((__doc__ or "").split("\n\n")[2].split()),
        f"At the start: {', '.join(f'{n} {loss:.2f}' for n, loss in zip(TASKS, first['R'][0]))} nats; accuracy "
        f"{100 * first['beside'][0]['accuracy']:.1f} %; general text {first['beside'][0]['general']:.3f} nats. "
        f"Mean ± half the width of the 95 % interval over seeds. {TEST} held-out rows a task, {STEPS} steps of 8 a "
        "task; seconds: CPU time where there is no GPU, measuring included.",
    ]
    tuned = {line["arm"]: line["setting"].replace("--", "") for line in lines if line["setting"]}
    settings = "; ".join(f"{NAMES[arm]}: {tuned[arm]}" for arm in RUN if arm in tuned)
    runs = {(x["precision"], cpu(x["hardware"]), x["versions"]["torch"], x["commit"][:7]) for x in lines}
    origin = "; ".join(
        f"{precision}, {where}, torch {torch}, commit {of}" for precision, where, torch, of in sorted(runs)
    )
    table = report.markdown_table(rows, "<" + ">" * (len(rows[0]) - 1))
    origins = f"`python benchmarks/language_sequence.py run`, then `table`; {origin}."
    parts = [parts[0], *map(wrapped, parts[1:]), table, "![Losses over the stages](images/language_sequence.png)"]
    return "\n\n".join([*parts, *map(wrapped, [f"Settings: {settings or 'none'}.", origins])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stage", choices=["run", "table"])
    add("--arms", nargs="+", default=list(RUN), choices=list(RUN), metavar="ARM", help=", ".join(RUN))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=STEPS, help="of a task")
    add("--output", type=Path, default=OUTPUT)
    add("--precision", choices=["fp32", "bf16"], default=PRECISION)
    add("--part", nargs=2, type=int, default=[0, 1], metavar=("I", "N"), help="every Nth of the runs, from the Ith on")
    options = parser.parse_args()
    os.environ.update(HF_DATASETS_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
    transformers.utils.logging.disable_progress_bar()
    lines = read_lines(options.output)
    if options.stage == "table":
        (ROOT / "docs/language_sequence.md").write_text(page(lines))
        plot(lines, ROOT / "docs/images/language_sequence.png")
        return
    embedded.smollm2()
    alike = [line for line in lines if f"--max_steps {options.steps} " in line["flags"]]
    finished = {(line["arm"], line["seed"]) for line in alike if line["precision"] == options.precision}
    asked = [(arm, seed) for seed, arm in itertools.product(options.seeds, options.arms)]
    todo = [job for job in asked[options.part[0] :: options.part[1]] if job not in finished]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for i, (arm, seed) in enumerate(todo):
        line = run(arm, seed, options.precision, options.steps)
        with options.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{i + 1}/{len(todo)} {arm} seed {seed}: {line['R'][-1]} {line['beside'][-1]}", flush=True)


if __name__ == "__main__":
    main()
