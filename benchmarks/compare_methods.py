"""Compare continual-learning methods over sequences of real tasks: settings are chosen on other ones than reported.

    python benchmarks/compare_methods.py tune     # every arm x setting on the tuning sequences, validation data
    python benchmarks/compare_methods.py report --seeds 0 1 2 --processes 2 --arms classp ewc   # the best, test data

Every finished run is a line of `--output` and is never run again; stop and restart at will. `tune` and `report` share
no training example (the protocol of Cha & Cho 2024, arXiv 2403.09066). A method does nothing before the second task,
so those on one optimizer share the training of the first (`--first_tasks`, a folder that may be deleted). CPUs
compute in float32, GPUs that have bf16 under its autocast; `COMPARE_PRECISION=bf16` in the environment says otherwise.
`COMPARE_MODEL=smollm2` compares on SmolLM2-135M. Tables and figures: `benchmarks/report_methods.py`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from data_removal import DataRemovalTrainer
from datasets import concatenate_datasets
from peft import LoraConfig, OSFConfig, TaskType, get_peft_model
from report_performance import read_lines
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from classp_hf import METHODS, ContinualTrainer, ContinualTrainingArguments, MoFO, embedded, load_task, register
from classp_hf.tasks import SENTIMENT, prepare_tasks

LABELS = {name: i for i, name in enumerate(SENTIMENT)}
TUNING = ("nyt>amazon", "tweets>amazon")
REPORTED = ("nyt>movie", "movie>nyt")

BASE = "--max_steps 80 --per_device_train_batch_size 16 --per_device_eval_batch_size 64 --max_length 32 "
BASE += "--save_strategy no --logging_strategy no --report_to none --disable_tqdm True "
BASE += "--dataloader_pin_memory False --log_level error"
TRAIN_EXAMPLES, EVAL_EXAMPLES = 640, {"tune": 300, "report": 600}  # no domain has more in all of its splits
RESULTS = Path("benchmarks/results")
GPU = torch.cuda.is_available()
CLOCK = time.perf_counter if GPU else time.process_time  # of a step; what else a CPU does does not count
PRECISION = "bf16" if GPU and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
MODEL, PRECISION = os.getenv("COMPARE_MODEL", "minilm"), os.getenv("COMPARE_PRECISION", PRECISION)
OUTPUT = RESULTS / ("compare_methods_2.jsonl" if MODEL == "minilm" else f"compare_methods_{MODEL}.jsonl")
TUNED = [RESULTS / f"{name}.jsonl" for name in ("compare_methods", "pseudo_rehearsal")] if MODEL == "minilm" else []


@dataclass
class Arm:
    """What is run: flags that never change, and settings to choose from: three, a fourth where an edge was best."""

    flags: str
    settings: list[str]
    method: str = "none"
    tuned_as: str | None = None  # take over the setting chosen for this arm instead of tuning again
    kind: str = "replay-free"  # or "control", "stores data", "upper bound"
    peft: str | None = None  # or "lora", "osf"
    alone: bool = False  # differs from its plain optimizer in the first task already
    first: str | None = None  # the setting of the first task, if it is another
    memory: str = "old"  # of the first task; or "" for none, "new": only counts, of the second one; or a domain's name


def grid(flag: str, *values: Any) -> list[str]:
    return [f"--{flag} {value}" for value in values]


ADAMW, CLASSP = "--optim adamw_torch_fused --reset_optimizer", "--optim classp"
ADAMW_LR, CLASSP_LR = grid("learning_rate", 5e-5, 1e-4, 2e-4), grid("learning_rate", 5e-4, 1e-3, 2e-3)
AT = f"{ADAMW} --learning_rate 1e-4"  # of the methods on AdamW; `adamw` itself chooses its own
KEPT = f"{CLASSP} --learning_rate 1e-3"
TEXTS, OWN = "pseudo_rehearsal", f"{KEPT} --rehearse_counts off"  # drawn by the memory
LAMBDA, PRIOR, FEWER = (0.03, 0.1, 0.3), grid("prior_strength", 0.25, 0.5, 1), grid("max_steps", 70, 60, 50)
PSEUDO, EMA_DECAY = grid("rehearse_lambda", 0.25, 0.5, 1, 2, 4), grid("ema_decay", 0.9, 0.95, 0.98)
MORE = {"interpolate": grid("interpolation_weight", 0.3, 0.5, 0.7), "ema": EMA_DECAY}
MORE |= {"lwf": grid("lwf_lambda", 0.25, 0.5, 1, 2), "merge": grid("merge_weight", 0.3, 1, 3)}

ARMS: dict[str, Arm] = {
    "adamw": Arm(ADAMW, ADAMW_LR),
    "sgd": Arm("--optim sgd --optim_args momentum=0.9 --reset_optimizer", grid("learning_rate", 1e-2, 3e-2, 0.1)),
    "adagrad": Arm("--optim adagrad --reset_optimizer", grid("learning_rate", 2e-4, 5e-4, 1e-3)),
    "mofo": Arm("--reset_optimizer", grid("learning_rate 1e-4 --mofo_fraction", 0.05, 0.15, 0.4), alone=True),
    "lora": Arm(ADAMW, CLASSP_LR, peft="lora", alone=True),
    "olora": Arm(AT.replace("1e-4", "1e-3"), grid("olora_lambda", 0.05, 0.5, 5), "olora", peft="lora", alone=True),
    "osf": Arm(ADAMW, grid("learning_rate", 1e-4, 3e-4, 1e-3), "osf", peft="osf", alone=True),
    "ewc": Arm(AT, grid("ewc_lambda", 0.01, *LAMBDA), "ewc"),
    "ewc_summed": Arm(f"{AT} --ewc_mode summed", grid("ewc_lambda", *LAMBDA), "ewc", tuned_as="ewc"),
    "l2sp": Arm(AT, grid("l2sp_alpha", *LAMBDA), "l2sp"),
    **{name: Arm(AT, settings, name) for name, settings in MORE.items()},
    "ema_balanced": Arm(f"{AT} --ema_balanced True", EMA_DECAY, "ema"),
    "logit_adjustment": Arm(AT, PRIOR, "logit_adjustment"),
    "pseudo_rehearsal": Arm(AT, PSEUDO[1:], TEXTS),
    "classp": Arm(CLASSP, CLASSP_LR),
    "classp_pseudo_rehearsal": Arm(KEPT, PSEUDO[:-1], TEXTS),
    "classp_pseudo_rehearsal_full": Arm(f"{KEPT} --rehearse_fraction 1", PSEUDO[:3], TEXTS),
    "classp_pseudo_rehearsal_no_counts": Arm(OWN, PSEUDO[1:], TEXTS),
    "classp_pseudo_rehearsal_no_counts_ema": Arm(f"{OWN} --rehearse_lambda 2", EMA_DECAY, f"{TEXTS}+ema"),
    **{f"classp_{TEXTS}_{name}": Arm(KEPT, settings, f"{TEXTS}+{name}") for name, settings in MORE.items()},
    **{f"{on}data_removal": Arm(flags, FEWER) for on, flags in (("", AT), ("classp_", KEPT))},
    "classp_elastic": Arm(KEPT, grid("anchor_strength", *LAMBDA), "elastic"),
    "classp_logit_adjustment": Arm(KEPT, PRIOR, "logit_adjustment"),
    f"classp_logit_adjustment_{TEXTS}": Arm(f"{KEPT} {PRIOR[0]}", PSEUDO[1:4], f"{TEXTS}+logit_adjustment"),
    "classp_dropped": Arm(CLASSP, CLASSP_LR, "none", "classp", "control", memory=""),
    "classp_other_memory": Arm(CLASSP, CLASSP_LR, "none", "classp", "control", memory="amazon"),
    "pseudo_rehearsal_new_counts": Arm(AT, PSEUDO[1:], TEXTS, TEXTS, "control", memory="new"),
}
for steps in ("160", "110", "70", "60", "50"):  # what rehearsal costs; as few as data removal takes, of any examples
    ARMS[f"adamw_{steps}_steps"] = Arm(f"{ADAMW} --max_steps {steps}", ADAMW_LR, "none", "adamw", "control")
for rate in ("1e-5", "2e-5", "5e-5", "2e-4"):  # of the second task, after the same first one as `adamw`'s 1e-4
    ARMS[f"adamw_{rate}"] = Arm(ADAMW, [f"--learning_rate {rate}"], kind="control", first="--learning_rate 1e-4")
for dtype in ("bfloat16", "uint8"):  # its memory in two bytes and one byte a weight
    flags = f"{KEPT} --optim_args state_dtype={dtype}"
    ARMS[f"classp_{dtype}"] = Arm(flags, PRIOR, "logit_adjustment", tuned_as="classp_logit_adjustment")
for percent in (1, 5, 10):
    share, given = f"--replay_fraction {percent / 100}", (PRIOR, "replay+logit_adjustment", "classp_logit_adjustment")
    ARMS[f"replay_{percent}"] = Arm(f"{ADAMW} {share}", ADAMW_LR, "replay", "replay_5", "stores data")
    ARMS[f"classp_replay_{percent}"] = Arm(f"{KEPT} {share}", *given, "stores data")
flags = f"{ADAMW} --learning_rate 1e-3 --replay_fraction 0.05"  # arXiv 2402.18865 without its consistency term
ARMS["ilora"] = Arm(flags, EMA_DECAY, "replay+ema", kind="stores data", peft="lora", alone=True)
ARMS["joint"] = Arm(ADAMW, ADAMW_LR, kind="upper bound", tuned_as="adamw", alone=True)


@dataclass(frozen=True)
class Job:  # one run
    stage: str  # "tune" or "report"
    arm: str
    setting: str
    sequence: str
    seed: int


def first_task(job: Job, memory: str = "old") -> Job | None:
    """The training of a first task by the plain optimizer, which all methods on it share; `memory` says of which."""
    if ARMS[job.arm].alone or memory in ("", "new"):
        return None
    words = f"{ARMS[job.arm].flags} {ARMS[job.arm].first or job.setting}".split()
    kept = [w for i, w in enumerate(words) if {w, words[i - 1]} & {"--optim", "--optim_args", "--learning_rate"}]
    kept[kept.index("--learning_rate") + 1] = f"{float(kept[kept.index('--learning_rate') + 1]):g}"
    if "--reset_optimizer" in words:
        kept += ["--reset_optimizer", "--gather_memory"]  # for the methods that use the memory without CLASSP
    domain = job.sequence.split(">")[0] if memory == "old" else memory
    return Job(job.stage, "first task", " ".join(kept), domain, job.seed)


def folder_of(first: Job, cache: Path) -> Path:
    of = f"{BASE} {PRECISION} {first.setting} {TRAIN_EXAMPLES}" + (MODEL if MODEL != "minilm" else "")
    return cache / f"{first.stage}_{first.sequence}_{first.seed}_{hashlib.sha256(of.encode()).hexdigest()[:12]}"


start = embedded.model_path if MODEL == "minilm" else embedded.smollm2


@functools.cache
def prepared_task(domain: str, stage: str, seed: int):
    """The tokenised task; `tune` and `report` share no training example, nor do `movie` and `movie/1`."""
    name, _, part = domain.partition("/")
    task, first = load_task(f"icwsm14/{name}", max_eval_samples=EVAL_EXAMPLES[stage]), int(part or 0) * TRAIN_EXAMPLES
    rows = task.train_dataset.train_test_split(0.5, seed=0)["train" if stage == "tune" else "test"].shuffle(seed=seed)
    rows = rows.select(range(first, first + TRAIN_EXAMPLES))
    measured = task.eval_dataset if stage == "tune" else task.test_dataset
    task = replace(task, name=f"icwsm14/{domain}", train_dataset=rows, eval_dataset=measured, test_dataset=measured)
    tokenizer = transformers.AutoTokenizer.from_pretrained(start())
    task = prepare_tasks([task], tokenizer, LABELS, max_length=32)[0]
    lengths = [len(ids) for ids in task.test_dataset["input_ids"]]  # sorted by them, batches need less padding
    return replace(task, test_dataset=task.test_dataset.select(sorted(range(len(lengths)), key=lengths.__getitem__)))


def parse(flags: str, seed: int, folder: str) -> tuple[Any, ...]:
    """The training arguments, a method of each kind, and a namespace with `mofo_fraction`."""
    register()
    methods = [m for m in METHODS.values() if any(f.init for f in fields(m))]
    parser = transformers.HfArgumentParser((ContinualTrainingArguments, *methods))
    parser.add_argument("--mofo_fraction", type=float)
    words = f"{BASE} --bf16 {PRECISION == 'bf16'} --use_cpu {not GPU} {flags} --seed {seed}"
    return parser.parse_args_into_dataclasses([*words.split(), "--output_dir", folder])


def build_trainer(args: Any, peft: str | None = None, learned: Path | None = None, **kwargs: Any) -> ContinualTrainer:
    """A trainer of the model, bare or with adapters, or of that in the folder `learned`."""
    transformers.set_seed(args.seed)
    new: dict[str, Any] = {"num_labels": len(LABELS), "label2id": LABELS, "id2label": dict(enumerate(LABELS))}
    new |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if MODEL == "minilm" else {}
    source, changes = (start(), new) if learned is None else (learned, {})
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, **changes)
    if peft is not None:
        common = {"task_type": TaskType.SEQ_CLS, "target_modules": "all-linear"}
        lora, osf = LoraConfig(r=16, lora_alpha=32, **common), OSFConfig(effective_rank=0.5, **common)
        model = get_peft_model(model, {"lora": lora, "osf": osf}[peft])
    tokenizer = transformers.AutoTokenizer.from_pretrained(start())
    cls = kwargs.pop("cls", ContinualTrainer)
    trainer = cls(model=model, args=args, processing_class=tokenizer, **kwargs)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train_first_task(first: Job, cache: Path) -> None:
    """Train it and keep model and memory in its folder, which appears when it is complete."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        whole, task = Path(folder, "run"), prepared_task(first.sequence, first.stage, first.seed)
        trainer = build_trainer(parse(first.setting, first.seed, str(whole))[0], method=TEXTS)  # counts tokens
        trainer.train_sequence([replace(task, test_dataset=task.test_dataset.select([0]))])  # measured by `run`
        shutil.rmtree(next(whole.glob("00-*")))  # the same model once more
        with suppress(OSError):  # another process was faster
            whole.rename(folder_of(first, cache))


class Watch(transformers.TrainerCallback):
    """What a step costs, and what is held while the second task trains."""

    def __init__(self, trainer: ContinualTrainer) -> None:
        self.trainer, self.seconds, self.bytes_a_weight = trainer, [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = CLOCK()

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.seconds.append(CLOCK() - self.began)
        if len(self.seconds) == args.max_steps * (2 - args.learned_tasks):
            gathered = {} if args.optim == "classp" else self.trainer.accumulators()  # CLASSP's are its state
            held = tree_leaves([dict(optimizer.state), [vars(m) for m in self.trainer.methods], gathered])
            held = [t for x in held for t in (x.parameters() if isinstance(x, torch.nn.Module) else [x])]
            storages = [t.untyped_storage() for t in held if isinstance(t, torch.Tensor)]
            total = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
            self.bytes_a_weight = total / self.trainer.model.num_parameters()


def run(job: Job, cache: Path) -> dict[str, Any]:
    """Train one arm over one sequence; returns the line to keep."""
    arm, flags = ARMS[job.arm], f"{ARMS[job.arm].flags} {job.setting}"
    first, names = first_task(job), arm.method.split("+")
    learned, remembered = (task and folder_of(task, cache) for task in (first, first_task(job, ARMS[job.arm].memory)))
    tasks = sequence = [prepared_task(domain, job.stage, job.seed) for domain in job.sequence.split(">")]
    with tempfile.TemporaryDirectory(prefix="compare_methods_") as folder:
        args, *configured, mofo = parse(flags, job.seed, folder)
        args.learned_tasks = int(learned is not None)
        if learned and (args.optim == "classp" or any(METHODS[n].uses_accumulators or n == TEXTS for n in names)):
            args.memory = str(remembered or "none")
        if arm.memory == "new":  # the first task, not trained on again, shows the method the second one's texts
            tasks = [replace(sequence[0], train_dataset=sequence[1].train_dataset), *sequence[1:]]
        if job.arm == "joint":  # as many steps as the sequence has in all
            args.max_steps *= len(sequence)
            together = concatenate_datasets([task.train_dataset for task in sequence])
            tasks = [replace(sequence[0], name="joint", train_dataset=together)]
        methods: Any = [next((m for m in configured if m.name == name), name) for name in names]
        built = (MoFO, {"lr": args.learning_rate, "fraction": mofo.mofo_fraction}) if job.arm == "mofo" else None
        cls = DataRemovalTrainer if "data_removal" in job.arm else ContinualTrainer
        trainer = build_trainer(args, arm.peft, learned, cls=cls, method=methods, optimizer_cls_and_kwargs=built)
        watch, started = Watch(trainer), time.perf_counter()
        trainer.add_callback(watch)
        results = trainer.train_sequence(tasks)
        R = results["accuracy_matrix"]
        if job.arm == "joint":
            R = [[trainer.evaluate(task.test_dataset)["eval_accuracy"] for task in sequence]]
        return {
            **asdict(job),
            "R": [[round(v, 4) for v in row] for row in R],
            "seconds": round(time.perf_counter() - started, 1),
            "seconds_a_step": round(sum(watch.seconds) / len(watch.seconds), 4),
            "seconds_a_boundary": round(results["boundary_seconds"] / len(tasks), 2),
            "bytes_a_weight": round(watch.bytes_a_weight, 2),
            **{k: results[k] for k in ("optimizer", "method", "commit")},
            **{"flags": f"{BASE} {flags}", "model": MODEL, "precision": PRECISION},
            "hardware": {k: results["hardware"][k] for k in ("cpu", "cpu_capability", "torch_threads", "gpus")},
            "torch": results["versions"]["torch"],
        }


def job_of(line: dict[str, Any]) -> Job:
    return Job(**{f.name: line[f.name] for f in fields(Job)})


def frozen_setting(arm: str, lines: list[dict[str, Any]]) -> str:
    """The setting with the best validation ACC, mean over tuning sequences and seeds; the first of equals."""
    arm = ARMS[arm].tuned_as or arm
    scores: dict[str, dict[Any, float]] = {setting: {} for setting in ARMS[arm].settings}
    if ARMS[arm].first:  # nothing to choose
        return ARMS[arm].settings[0]
    for line in lines:
        if line["stage"] == "tune" and line["arm"] == arm and line["setting"] in scores:
            scores[line["setting"]][line["sequence"], line["seed"]] = sum(line["R"][-1]) / len(line["R"][-1])
    scores = {setting: found for setting, found in scores.items() if found}  # some may have been added since
    if len({frozenset(found) for found in scores.values()}) != 1 or len(scores) < min(3, len(ARMS[arm].settings)):
        raise ValueError(f"{arm!r}: not all settings were tuned alike. Run: compare_methods.py tune --arms {arm}")
    return max(scores, key=lambda setting: sum(scores[setting].values()))


def jobs(options: argparse.Namespace, stage: str, lines: list[dict[str, Any]]) -> Iterator[Job]:
    if stage == "tune":
        arms = [ARMS[arm].tuned_as or arm for arm in options.arms if not ARMS[arm].first]
        for arm, sequence, seed in itertools.product(arms, TUNING, options.tuning_seeds):
            yield from (Job(stage, arm, setting, sequence, seed) for setting in ARMS[arm].settings)
        return
    for seed, sequence, arm in itertools.product(options.seeds, options.sequences, options.arms):
        named = ">".join(sorted(sequence.split(">"))) if arm == "joint" else sequence  # whose order says nothing
        yield Job(stage, arm, frozen_setting(arm, lines), named, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stage", choices=["tune", "report", "all"])
    add("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="of `report`")
    add("--tuning_seeds", nargs="+", type=int, default=[0], help="of `tune`")
    add("--sequences", nargs="+", default=list(REPORTED), help="domains joined by '>'; one of them again as movie/1")
    add("--processes", type=int, default=os.cpu_count(), help="runs at the same time")
    add("--output", type=Path, default=OUTPUT)
    add("--tuned", type=Path, nargs="*", default=TUNED, help="files of finished `tune` runs; a later line counts")
    add("--first_tasks", type=Path, default=RESULTS / "compare_methods.first_tasks", help="may be deleted")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    # glibc: keep freed memory instead of asking the system for it again at every step
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**35), "MALLOC_TOP_PAD_": str(2**28)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for stage in ["tune", "report"] if options.stage == "all" else [options.stage]:
        lines = [line for path in options.tuned for line in read_lines(path) if line["stage"] == "tune"]
        lines += read_lines(options.output)
        finished = {job_of(line) for line in lines}
        todo = [job for job in dict.fromkeys(jobs(options, stage, lines)) if job not in finished]
        needed = [t for job in todo for t in (first_task(job), first_task(job, ARMS[job.arm].memory)) if t]
        first = [task for task in dict.fromkeys(needed) if not folder_of(task, options.first_tasks).is_dir()]
        print(f"{stage}: {len(first)} first tasks, {len(todo)} runs to do, {len(finished)} there already", flush=True)
        pool = ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"))
        try:
            for function, items in ((train_first_task, first), (run, todo)):
                futures = [pool.submit(function, item, options.first_tasks) for item in items]
                done = (future.result() for future in tqdm(as_completed(futures), total=len(items), disable=not items))
                for line in filter(None, done):  # a first task has none
                    with options.output.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    tqdm.write(f"{line['arm']} {line['sequence']} {[round(100 * v, 1) for v in line['R'][-1]]}")
        finally:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
