"""Compare continual-learning methods over sequences of real tasks: settings chosen on some, results reported on others.

    python recipes/compare_methods.py tune       # every arm x setting on the tuning sequences, validation data
    python recipes/compare_methods.py report     # the best setting of every arm on the reported sequences, test data
    python recipes/compare_methods.py all --seeds 0 1 2 3 4 --processes 2 --arms classp adamw ewc

Every finished run is a line of `--output` and is never run again; stop and restart at will. `tune` and `report` use halves of
the training data that share no example, `tune` measures on validation data and `report` on test data (the protocol of Cha &
Cho 2024, arXiv 2403.09066). A method does nothing before the second task, so methods on the same optimizer share the first
task's training (`--first_tasks`, a folder that may be deleted). Tables and plots: `python benchmarks/report_methods.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TUNING = ("nyt>amazon", "tweets>amazon")
REPORTED = ("nyt>movie>tweets>amazon", "movie>nyt>amazon>tweets", "amazon>tweets")
"""The first two tasks of the long ones are the two-task sequences nyt>movie and movie>nyt: what comes later cannot change them. The
last is the reverse of a tuning sequence on which little is forgotten."""

BASE = (
    "--max_steps 80 --per_device_train_batch_size 16 --per_device_eval_batch_size 64 --max_length 32 --bf16 True "
    "--save_strategy no --logging_strategy no --report_to none --disable_tqdm True "
    "--dataloader_pin_memory False --log_level error"
)
TRAIN_EXAMPLES, EVAL_EXAMPLES, TRACE_EXAMPLES = 640, 300, 150
TRACE_STEPS = (2, 6, 15, 30, 60)
ADAMW, CLASSP = "--optim adamw_torch_fused --reset_optimizer", "--optim classp"


@dataclass
class Arm:
    """What is run: flags that never change, and the settings to choose from (three an arm: the same budget for all)."""

    flags: str
    settings: list[str]
    method: str = "none"
    kind: str = "replay-free"  # or "stores data", "upper bound"
    peft: str | None = None  # or "lora", "osf"
    optimizer: str | None = None
    tuned_as: str | None = None
    """Take over the setting chosen for this arm instead of tuning again."""
    alone: bool = False
    """Differs from its plain optimizer in the first task already."""


def grid(flag: str, *values: Any) -> list[str]:
    return [f"{flag} {value}" for value in values]


ADAMW_LR = grid("--learning_rate", 5e-5, 1e-4, 2e-4)
CLASSP_LR = grid("--learning_rate", 5e-4, 1e-3, 2e-3)
AT = f"{ADAMW} --learning_rate 1e-4"  # of the methods on AdamW; `adamw` itself chooses its own

ARMS: dict[str, Arm] = {
    # one optimizer after another, no method
    "adamw": Arm(ADAMW, ADAMW_LR),
    "sgd": Arm("--optim sgd --optim_args momentum=0.9 --reset_optimizer", grid("--learning_rate", 1e-2, 3e-2, 0.1)),
    "adagrad": Arm("--optim adagrad --reset_optimizer", grid("--learning_rate", 2e-4, 5e-4, 1e-3)),
    "mofo": Arm(
        "--reset_optimizer",
        [f"--learning_rate 1e-4 --mofo_fraction {f}" for f in (0.05, 0.15, 0.4)],
        optimizer="MoFO",
        alone=True,
    ),
    "lora": Arm(ADAMW, grid("--learning_rate", 5e-4, 1e-3, 2e-3), peft="lora", alone=True),
    "olora": Arm(
        f"{ADAMW} --learning_rate 1e-3", grid("--olora_lambda", 0.05, 0.5, 5), "olora", peft="lora", alone=True
    ),
    "osf": Arm(ADAMW, grid("--learning_rate", 1e-4, 3e-4, 1e-3), "osf", peft="osf", alone=True),
    # methods from papers, on AdamW
    "ewc": Arm(AT, grid("--ewc_lambda", 0.03, 0.1, 0.3), method="ewc"),
    "ewc_summed": Arm(f"{AT} --ewc_mode summed", grid("--ewc_lambda", 0.03, 0.1, 0.3), method="ewc", tuned_as="ewc"),
    "l2sp": Arm(AT, grid("--l2sp_alpha", 0.03, 0.1, 0.3), method="l2sp"),
    "interpolate": Arm(AT, grid("--interpolation_weight", 0.3, 0.5, 0.7), method="interpolate"),
    "ema": Arm(AT, grid("--ema_decay", 0.9, 0.95, 0.98), method="ema"),
    "lwf": Arm(AT, grid("--lwf_lambda", 0.5, 1, 2), method="lwf"),
    "logit_adjustment": Arm(AT, grid("--prior_strength", 0.25, 0.5, 1), method="logit_adjustment"),
    "merge": Arm(AT, grid("--merge_weight", 0.3, 1, 3), method="merge"),
    # CLASSP and the uses of its memory
    "classp": Arm(CLASSP, CLASSP_LR),
    "classp_elastic": Arm(f"{CLASSP} --learning_rate 1e-3", grid("--anchor_strength", 0.03, 0.1, 0.3), "elastic"),
    "classp_merge": Arm(f"{CLASSP} --learning_rate 1e-3", grid("--merge_weight", 0.3, 1, 3), "merge"),
    "classp_logit_adjustment": Arm(  # what ClasspTrainer does by itself
        f"{CLASSP} --learning_rate 1e-3", grid("--prior_strength", 0.25, 0.5, 1), "logit_adjustment"
    ),
    "classp_elastic_logit_adjustment": Arm(
        f"{CLASSP} --learning_rate 1e-3 --prior_strength 0.25",
        grid("--anchor_strength", 0.03, 0.1, 0.3),
        "elastic+logit_adjustment",
    ),
    "classp_merge_logit_adjustment": Arm(
        f"{CLASSP} --learning_rate 1e-3 --prior_strength 0.25",
        grid("--merge_weight", 1, 3, 10),
        "merge+logit_adjustment",
    ),
    "classp_interpolate_logit_adjustment": Arm(
        f"{CLASSP} --learning_rate 1e-3 --prior_strength 0.25",
        grid("--interpolation_weight", 0.5, 0.7, 0.85),
        "interpolate+logit_adjustment",
    ),
    "classp_lwf": Arm(f"{CLASSP} --learning_rate 1e-3", grid("--lwf_lambda", 0.5, 1, 2), "lwf"),
    "classp_logit_adjustment_lwf": Arm(
        f"{CLASSP} --learning_rate 1e-3 --prior_strength 0.25",
        grid("--lwf_lambda", 0.25, 0.5, 1),
        "logit_adjustment+lwf",
    ),
    # its memory in two bytes and one byte a weight
    **{
        f"classp_{dtype}": Arm(
            f"{CLASSP} --optim_args state_dtype={dtype} --learning_rate 1e-3",
            grid("--prior_strength", 0.25, 0.5, 1),
            "logit_adjustment",
            tuned_as="classp_logit_adjustment",
        )
        for dtype in ("bfloat16", "uint8")
    },
    # methods that store data
    **{
        f"replay_{percent}": Arm(
            f"{ADAMW} --replay_fraction {percent / 100}", ADAMW_LR, "replay", kind="stores data", tuned_as="replay_5"
        )
        for percent in (1, 5, 10)
    },
    **{
        f"classp_replay_{percent}": Arm(
            f"{CLASSP} --learning_rate 1e-3 --replay_fraction {percent / 100}",
            grid("--prior_strength", 0.25, 0.5, 1),
            "replay+logit_adjustment",
            kind="stores data",
            tuned_as="classp_logit_adjustment",
        )
        for percent in (1, 5, 10)
    },
    "joint": Arm(ADAMW, ADAMW_LR, kind="upper bound", tuned_as="adamw", alone=True),
}


@dataclass(frozen=True)
class Job:
    """One run. Its JSON is its identity."""

    stage: str  # "tune" or "report"
    arm: str
    setting: str
    sequence: str
    seed: int

    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


@dataclass(frozen=True)
class FirstTask:
    """The training of a first task by a plain optimizer, shared by the methods that run on it."""

    stage: str
    domain: str
    seed: int
    flags: str

    @classmethod
    def of(cls, job: Job) -> FirstTask | None:
        if ARMS[job.arm].alone:
            return None
        words = f"{ARMS[job.arm].flags} {job.setting}".split()
        kept = [w for i, w in enumerate(words) if {w, words[i - 1]} & {"--optim", "--optim_args", "--learning_rate"}]
        if "--reset_optimizer" in words:
            kept += ["--reset_optimizer", "--gather_memory"]  # for the methods that use the memory without CLASSP
        return cls(job.stage, job.sequence.split(">")[0], job.seed, " ".join(kept))

    def folder(self, cache: Path) -> Path:
        what = f"{BASE} {self.flags} {TRAIN_EXAMPLES}"
        return cache / f"{self.stage}_{self.domain}_{self.seed}_{hashlib.sha256(what.encode()).hexdigest()[:12]}"


# ---- One run, in a process of its own --------------------------------------------------------------------------------


@dataclass
class MoFOArguments:
    mofo_fraction: float = field(default=0.15, metadata={"help": "Share of the weights that MoFO updates."})


@functools.cache
def tokenizer_and_labels():
    from transformers import AutoTokenizer

    from classp_hf import embedded
    from classp_hf.tasks import SENTIMENT

    return AutoTokenizer.from_pretrained(embedded.model_path()), list(SENTIMENT)


def build_model(peft: str | None = None, folder: Path | None = None):
    from transformers import AutoModelForSequenceClassification

    from classp_hf import embedded

    if folder is not None:
        return AutoModelForSequenceClassification.from_pretrained(folder)
    _, labels = tokenizer_and_labels()
    model = AutoModelForSequenceClassification.from_pretrained(
        embedded.model_path(),
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    if peft is not None:
        from peft import LoraConfig, OSFConfig, TaskType, get_peft_model

        common = {"task_type": TaskType.SEQ_CLS, "target_modules": "all-linear"}
        lora, osf = LoraConfig(r=16, lora_alpha=32, **common), OSFConfig(effective_rank=0.5, **common)
        model = get_peft_model(model, {"lora": lora, "osf": osf}[peft])
    return model


@functools.cache
def prepared_task(domain: str, stage: str, seed: int):
    """The tokenised task: `tune` and `report` see halves of the training split that share no example."""
    from classp_hf import load_task
    from classp_hf.tasks import prepare_tasks

    tokenizer, labels = tokenizer_and_labels()
    task = load_task(f"icwsm14/{domain}", max_eval_samples=EVAL_EXAMPLES)
    halves = task.train_dataset.train_test_split(test_size=0.5, seed=0)
    half = halves["train" if stage == "tune" else "test"].shuffle(seed=seed)
    measured = task.eval_dataset if stage == "tune" else task.test_dataset
    task = dataclasses.replace(
        task,
        train_dataset=half.select(range(TRAIN_EXAMPLES)),
        eval_dataset=measured.shuffle(seed=0).select(range(TRACE_EXAMPLES)),  # for the trace while training
        test_dataset=measured,
    )
    return prepare_tasks([task], tokenizer, {n: i for i, n in enumerate(labels)}, max_length=32)[0]


def start() -> None:
    """Set up a worker process."""
    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging

    from classp_hf import register

    torch.set_num_threads(1)
    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    register()


def parse(flags: str, seed: int, folder: str) -> tuple[Any, ...]:
    import torch
    from transformers import HfArgumentParser

    from classp_hf import METHODS, ContinualTrainingArguments

    methods = [m for m in METHODS.values() if any(f.init for f in dataclasses.fields(m))]
    parser = HfArgumentParser((ContinualTrainingArguments, MoFOArguments, *methods))
    device = "" if torch.cuda.is_available() else "--use_cpu True"
    words = f"{BASE} {device} {flags} --seed {seed}".split()
    return parser.parse_args_into_dataclasses([*words, "--output_dir", folder])


def train_first_task(first: FirstTask, cache: Path) -> None:
    """Train it and keep model and memory in its folder, which appears when it is complete."""
    from transformers import PrinterCallback, set_seed

    import classp_hf

    start()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        args = parse(first.flags, first.seed, folder)[0]
        set_seed(first.seed)
        tokenizer, _ = tokenizer_and_labels()
        trainer = classp_hf.ContinualTrainer(model=build_model(), args=args, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train_sequence([prepared_task(first.domain, first.stage, first.seed)])
        for checkpoint in Path(folder).glob("00-*"):
            shutil.rmtree(checkpoint)  # the same model once more
        if not first.folder(cache).is_dir():
            shutil.copytree(folder, f"{folder}.done")
            os.rename(f"{folder}.done", first.folder(cache))


def run(job: Job, cache: Path) -> dict[str, Any]:
    """Train one arm over one sequence; returns the line to keep."""
    from datasets import concatenate_datasets
    from transformers import PrinterCallback, TrainerCallback, set_seed

    import classp_hf

    start()
    arm = ARMS[job.arm]
    sequence = [prepared_task(domain, job.stage, job.seed) for domain in job.sequence.split(">")]
    tokenizer, _ = tokenizer_and_labels()
    first = FirstTask.of(job)
    learned = first.folder(cache) if first is not None else None
    with tempfile.TemporaryDirectory(prefix="compare_methods_") as folder:
        flags = f"{arm.flags} {job.setting}"
        args, mofo, *configured = parse(flags, job.seed, folder)
        if learned is not None:
            args.learned_tasks = 1
            if args.optim_name == "classp" or any(
                classp_hf.METHODS[m].uses_accumulators for m in arm.method.split("+")
            ):
                args.memory = str(learned)
        tasks = sequence
        if job.arm == "joint":  # as many steps as the sequence has in all
            args.max_steps *= len(sequence)
            together = concatenate_datasets([task.train_dataset for task in sequence])
            tasks = [dataclasses.replace(sequence[0], name="joint", train_dataset=together)]
        set_seed(job.seed)
        model = build_model(arm.peft, learned)
        by_name = {m.name: m for m in configured}
        chosen = [by_name.get(name, name) for name in arm.method.split("+")]
        kwargs: dict[str, Any] = {}
        if arm.optimizer == "MoFO":
            kwargs["optimizer_cls_and_kwargs"] = (
                classp_hf.MoFO,
                {"lr": args.learning_rate, "fraction": mofo.mofo_fraction},
            )
        trainer = classp_hf.ContinualTrainer(
            model=model, args=args, processing_class=tokenizer, method=chosen, **kwargs
        )
        trainer.remove_callback(PrinterCallback)

        trace: list[list[float]] = []
        costs = {"steps": 0, "step_seconds": 0.0, "bytes_a_weight": 0.0}

        class Watch(TrainerCallback):
            """Accuracy on the first two tasks while the second trains; what a step costs, the trace left out."""

            def on_step_begin(self, args, state, control, **kwargs):
                self.began = time.perf_counter()

            def on_step_end(self, args, state, control, optimizer=None, **kwargs):
                costs["steps"] += 1
                costs["step_seconds"] += time.perf_counter() - self.began
                second = len(trainer.seen_tasks) == 1 and len(tasks) > 1
                if second and job.stage == "report" and state.global_step in TRACE_STEPS:
                    found = [trainer.evaluate(task.eval_dataset)["eval_accuracy"] for task in sequence[:2]]
                    trace.append([state.global_step, *found])
                if second and state.global_step == args.max_steps:
                    weights = sum(p.numel() for p in trainer.model.parameters())
                    held = held_bytes([optimizer.state, trainer.method.parts(), trainer._gathered], set())
                    costs["bytes_a_weight"] = held / weights

        trainer.add_callback(Watch())
        started = time.perf_counter()
        results = trainer.train_sequence(tasks)
        R = results["accuracy_matrix"]
        if job.arm == "joint":
            final = [trainer.evaluate(task.test_dataset)["eval_accuracy"] for task in sequence]
            R = [final]
        line = {
            **dataclasses.asdict(job),
            "R": [[round(v, 4) for v in row] for row in R],
            "trace": [[round(v, 4) for v in point] for point in trace],
            "seconds": round(time.perf_counter() - started, 1),
            "seconds_a_step": round(costs["step_seconds"] / costs["steps"], 4),
            "seconds_a_boundary": round(results["boundary_seconds"] / len(tasks), 2),
            "bytes_a_weight": round(costs["bytes_a_weight"], 2),
            "optimizer": results["optimizer"],
            "method": results["method"],
            "flags": f"{BASE} {flags}",
            "commit": results["commit"],
            "hardware": {k: results["hardware"][k] for k in ("cpu", "torch_threads", "gpus")},
            "torch": results["versions"]["torch"],
        }
    return line


def held_bytes(held: Any, seen: set[int]) -> int:
    """Bytes of all tensors reachable from containers, dataclasses and modules, each storage once."""
    import torch

    if id(held) in seen:
        return 0
    seen.add(id(held))
    if isinstance(held, torch.Tensor):
        pointer = held.untyped_storage().data_ptr()
        if pointer in seen:
            return 0
        seen.add(pointer)
        return held.numel() * held.element_size()
    if isinstance(held, torch.nn.Module):
        return sum(held_bytes(p, seen) for p in held.parameters())
    if isinstance(held, dict):
        return sum(held_bytes(v, seen) for v in held.values())
    if isinstance(held, (list, tuple)):
        return sum(held_bytes(v, seen) for v in held)
    if type(held).__module__.startswith("classp_hf") and not type(held).__name__.endswith("Trainer"):
        return sum(held_bytes(v, seen) for v in vars(held).values())
    return 0


# ---- Which runs, and where their results are --------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The finished runs; a last line that a killed process left unfinished is not one."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def job_of(line: dict[str, Any]) -> Job:
    return Job(**{f.name: line[f.name] for f in dataclasses.fields(Job)})


def frozen_setting(arm: str, lines: list[dict[str, Any]]) -> str:
    """The setting with the best validation ACC, mean over tuning sequences and seeds; the first of equals.

    Methods that do the same on two tasks, or that only add data, take over another one's (`tuned_as`).

    Raises:
        ValueError: settings that were not all tried on the same sequences and seeds.
    """
    arm = ARMS[arm].tuned_as or arm
    scores: dict[str, dict[tuple[str, int], float]] = {setting: {} for setting in ARMS[arm].settings}
    for line in lines:
        if line["stage"] == "tune" and line["arm"] == arm and line["setting"] in scores:
            scores[line["setting"]][line["sequence"], line["seed"]] = sum(line["R"][-1]) / len(line["R"][-1])
    tried = {frozenset(found) for found in scores.values()}
    if len(tried) != 1 or not next(iter(tried)):
        raise ValueError(
            f"The settings of {arm!r} were not all tuned alike. Run: compare_methods.py tune --arms {arm}"
        )
    return max(scores, key=lambda setting: sum(scores[setting].values()))


def jobs(options: argparse.Namespace, stage: str, lines: list[dict[str, Any]]) -> Iterator[Job]:
    if stage == "tune":
        for arm in dict.fromkeys(ARMS[arm].tuned_as or arm for arm in options.arms):
            for setting, sequence, seed in itertools.product(ARMS[arm].settings, TUNING, options.tuning_seeds):
                yield Job("tune", arm, setting, sequence, seed)
        return
    settings = {arm: frozen_setting(arm, lines) for arm in options.arms}
    for seed in options.seeds:
        for sequence, arm in itertools.product(options.sequences, options.arms):
            parts = [">".join(sequence.split(">")[:2]), sequence] if arm == "joint" else [sequence]
            for part in dict.fromkeys(">".join(sorted(p.split(">"))) if arm == "joint" else p for p in parts):
                yield Job("report", arm, settings[arm], part, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["tune", "report", "all"])
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=", ".join(ARMS)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="of `report`")
    parser.add_argument("--tuning_seeds", nargs="+", type=int, default=[0], help="of `tune`")
    parser.add_argument("--sequences", nargs="+", default=list(REPORTED), help="domains joined by '>'")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at the same time")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/compare_methods.jsonl"))
    parser.add_argument(
        "--first_tasks", type=Path, help="default: a folder of OUTPUT's name with .first_tasks at its end"
    )
    options = parser.parse_args()
    cache = options.first_tasks or options.output.with_suffix(".first_tasks")

    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    # glibc: keep freed memory instead of asking the system for it again at every step
    os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**35), MALLOC_TOP_PAD_=str(2**28))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.output.is_file() and not options.output.read_text().endswith("\n"):
        with options.output.open("a") as file:  # a killed process left a line unfinished: begin a new one
            file.write("\n")

    def keep(job: Job, line: dict[str, Any]) -> str:
        with options.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return f"{job.arm} {job.sequence} {[round(100 * v, 1) for v in line['R'][-1]]}"

    for stage in ["tune", "report"] if options.stage == "all" else [options.stage]:
        lines = read_lines(options.output)
        finished = {job_of(line).key() for line in lines}
        todo = [job for job in dict.fromkeys(jobs(options, stage, lines)) if job.key() not in finished]
        first = dict.fromkeys(filter(None, map(FirstTask.of, todo)))
        first_todo = [task for task in first if not task.folder(cache).is_dir()]
        print(
            f"{stage}: {len(first_todo)} first tasks and {len(todo)} runs to do, {len(finished)} there already",
            flush=True,
        )
        work(train_first_task, first_todo, cache, options.processes, lambda task, _: f"first {task.domain}")
        work(run, todo, cache, options.processes, keep)


def work(
    function: Callable[[Any, Path], Any], todo: list, cache: Path, processes: int, done: Callable[[Any, Any], str]
) -> None:
    """`done(item, function(item, cache))` for all items, in several processes, in the order they finish."""
    from tqdm.auto import tqdm

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool, tqdm(total=len(todo)) as bar:
        pending = {pool.submit(function, item, cache): item for item in todo}
        try:
            for future in as_completed(pending):
                bar.set_postfix_str(done(pending[future], future.result()))
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


if __name__ == "__main__":
    main()
