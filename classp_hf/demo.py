"""The main job: fine-tune one classifier over a sequence of text tasks, and show what it kept.

    python -m classp_hf demo
    accelerate launch recipes/sentiment_sequence.py
    accelerate launch recipes/sentiment_sequence.py --tasks fpb imdb --model_name_or_path google-bert/bert-base-uncased
    accelerate launch recipes/sentiment_sequence.py --trainer ewc --ewc_lambda 0.3 --compare naive classp
    accelerate launch recipes/sentiment_sequence.py --use_peft --lora_r 16 --compare none

Every arm (`--trainer` and those of `--compare`) gets its own defaults (`ARMS` below); a flag you give applies to all
arms. Every flag of transformers' TrainingArguments is accepted.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, set_seed
from transformers.utils.logging import disable_progress_bar

from . import embedded, report
from .launch import prepare_cpu_launch
from .live import CLASSP_NAME
from .memory import memory_beside
from .methods import METHODS, Method
from .methods.base import flag
from .named_trainers import ClasspTrainer
from .registration import register
from .sequence import STATE_NAME
from .tasks import BUILT_IN, GRAMMAR, Task, label_names, load_task
from .trainer import ContinualTrainer
from .training_args import ContinualTrainingArguments

# What each arm is: a method, and the flags it starts from. Learning rates: docs/log.md says how they were chosen.
ADAMW = ["--learning_rate", "1e-4", "--reset_optimizer"]
ARMS: dict[str, tuple[str, list[str]]] = {
    "classp": ("pseudo_rehearsal", ["--optim", "classp", "--rehearse_lambda", "0.25"]),
    "classp_paper": ("none", ["--optim", "classp"]),
    **{name: (name, ADAMW) for name in METHODS if name != "none"},
    "olora": ("olora", ["--learning_rate", "1e-3", "--reset_optimizer"]),
    "naive": ("none", ADAMW),
}
KNOWN = ", ".join(ARMS)
DEFAULTS = {
    "output_dir": "outputs/sentiment_sequence",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128,
    "max_length": 64,
    "logging_steps": 10,
    "save_strategy": "no",
    "dataloader_pin_memory": torch.cuda.is_available(),
    "disable_tqdm": not sys.stderr.isatty(),
}


@dataclass
class SequenceArguments:
    """Tasks and model, beside the options of the training and of the methods."""

    tasks: list[str] = flag(("icwsm14/nyt", "icwsm14/movie"), f"Tasks in order: {', '.join(BUILT_IN)}, or {GRAMMAR}.")
    model_name_or_path: str | None = flag(None, "Local folder or Hub id. Default: the embedded all-MiniLM-L6-v2.")
    model_revision: str = flag("main", "Branch, tag or commit of the model.")
    max_train_samples: int | None = flag(1600, "Training examples a task (0 or less: all of them).")
    max_eval_samples: int | None = flag(None, "Validation and test examples a task. Default: all.")
    dropout: float = flag(
        0.0,
        "Dropout while training; negative: as in the model's config. With 0, one process and several give the same "
        "result if the global batch divides the number of training examples.",
    )
    use_peft: bool = flag(False, "Train LoRA adapters and the head, not all weights; olora and osf always have them.")
    lora_r: int = flag(16, "Rank of the LoRA adapters.")
    lora_alpha: int = flag(32, "Scale of the LoRA adapters.")
    lora_dropout: float = flag(0.0, "Dropout in the LoRA adapters.")
    lora_target_modules: list[str] | None = flag(None, "Modules to adapt. Default: all linear layers.")
    osf_effective_rank: float = flag(0.5, "Arm osf: share of each weight's singular directions that no task changes.")
    verbose: bool = flag(False, "Show what datasets, accelerate and the loading and saving of models tell, too.")

    def __post_init__(self) -> None:
        if self.max_train_samples is not None and self.max_train_samples <= 0:
            self.max_train_samples = None

    def load_tasks(self, args: ContinualTrainingArguments) -> list[Task]:
        """The tasks, in order, their training subsets chosen by the seed of `args`; the main process reads first."""
        sizes = {"max_train_samples": self.max_train_samples, "max_eval_samples": self.max_eval_samples}
        with args.main_process_first(desc="loading the tasks"):
            return [load_task(spec, seed=args.seed, **sizes) for spec in self.tasks]


@dataclass
class RecipeArguments(SequenceArguments):
    """Options of the main job."""

    trainer: str = flag("classp", f"The arm to run: {KNOWN}.")
    compare: list[str] = flag(("naive",), "Arms to run beside it, of the same; `--compare none` for no other.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare == ["none"]:
            self.compare = []
        check_arms([self.trainer, *self.compare], "--trainer or --compare")


def check_arms(arms: list[str], flags: str) -> None:
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ValueError(f"Unknown arm {unknown[0]!r} in {flags}. Known: {KNOWN}.")


def build_model(recipe: SequenceArguments, labels: list[str], method: Method) -> tuple[Any, Any]:
    """Model and tokenizer, with a head over `labels` and the adapters that the flags or the method ask for."""
    name = recipe.model_name_or_path or embedded.model_path()
    config = AutoConfig.from_pretrained(name, revision=recipe.model_revision)
    if set(config.label2id) == set(labels):  # a classifier of these labels: its head's rows have their order
        labels = sorted(labels, key=config.label2id.get)
    changes: dict[str, Any] = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    if recipe.dropout >= 0:
        dropouts = (k for k, v in config.to_dict().items() if isinstance(v, float) and re.search("dropout|pdrop$", k))
        changes |= dict.fromkeys(dropouts, recipe.dropout)
    model = AutoModelForSequenceClassification.from_pretrained(
        name, revision=recipe.model_revision, ignore_mismatched_sizes=True, **changes
    )
    if recipe.model_name_or_path is None:
        model.config.name_or_path = model.name_or_path = embedded.MODEL_ID  # the same weights, by their digest
    tokenizer = AutoTokenizer.from_pretrained(name, revision=recipe.model_revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    if recipe.use_peft or method.folds_adapters:
        from peft import LoraConfig, OSFConfig, get_peft_model

        config_class: Any = LoraConfig
        own: Any = {"r": recipe.lora_r, "lora_alpha": recipe.lora_alpha, "lora_dropout": recipe.lora_dropout}
        if method.name == "osf":
            config_class, own = OSFConfig, {"effective_rank": recipe.osf_effective_rank}
        modules = recipe.lora_target_modules or "all-linear"
        model = get_peft_model(model, config_class(task_type="SEQ_CLS", target_modules=modules, **own))
    return model, tokenizer


def build_trainer(parser: Any, words: list[str], arm: str, tasks: list[Task], output_dir: Path) -> ContinualTrainer:
    """The arm's trainer, with the arm's own flags before `words`, the command line."""
    method_name, flags = ARMS[arm]
    recipe, args, *configured = parser.parse_args_into_dataclasses([*flags, *words])
    args.output_dir = str(output_dir)
    method = dict(zip(METHODS, configured))[method_name]
    set_seed(args.seed)
    model, tokenizer = build_model(recipe, label_names(tasks), method)
    if arm == "classp" and (args.heads != "shared" or model.config.is_encoder_decoder):
        method_name, method = "none", None  # no shared head, or no kind that can be rehearsed
    uses_memory = method_name != "none" or CLASSP_NAME in (args.optim, arm)
    if args.memory is None and recipe.model_name_or_path and uses_memory and memory_beside(model) is not None:
        args.memory, args.memory_revision = recipe.model_name_or_path, recipe.model_revision
    trainer_class = ClasspTrainer if arm == "classp" else ContinualTrainer
    return trainer_class(model=model, args=args, processing_class=tokenizer, method=method)


def quiet(recipe: SequenceArguments, main_process: bool) -> None:
    """Show what the package tells, and of the libraries, unless `--verbose`, only what is wrong."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("classp_hf").setLevel(logging.INFO if main_process else logging.WARNING)
    if not recipe.verbose:
        disable_progress_bars()
        disable_progress_bar()
        logging.getLogger("accelerate").setLevel(logging.ERROR)
        new_head = logging.getLogger("transformers.modeling_utils")
        new_head.addFilter(lambda record: "LOAD REPORT" not in record.getMessage())


def main(run: Callable[[list[ContinualTrainer]], None] | None = None) -> None:
    """The command, or another that puts the trainers it makes into a list. What was asked wrongly ends in one line and
    exit code 2; what a training raises, in a traceback."""
    trainers: list[ContinualTrainer] = []
    try:
        (run or _run)(trainers)
    except (ValueError, OSError, ImportError) as error:
        if any(trainer.state.max_steps for trainer in trainers):
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def command_parser(own: type[SequenceArguments], description: str | None, **defaults: Any) -> Any:
    """The command line of a process that begins: `own` options, those of the training and of all methods."""
    prepare_cpu_launch()
    register()  # a name of --optim
    shown: Any = (own, ContinualTrainingArguments, *METHODS.values())
    parser: Any = HfArgumentParser(shown, description=description, usage="%(prog)s [options] (--help lists them)")
    parser.set_defaults(**{**DEFAULTS, **defaults})
    return parser


def _run(trainers: list[ContinualTrainer]) -> None:
    parser = command_parser(RecipeArguments, __doc__)
    recipe, args, *_ = parser.parse_args_into_dataclasses()
    base, main_process = Path(args.output_dir), args.process_index == 0
    quiet(recipe, main_process)
    tasks = recipe.load_tasks(args)

    arms = list(dict.fromkeys([recipe.trainer, *recipe.compare]))
    existing = [arm for arm in arms if (base / arm / STATE_NAME).exists()]
    if existing and not args.resume_from_checkpoint:  # before any arm is trained
        raise ValueError(
            f"{base} already holds runs of {', '.join(existing)}. Pass --resume_from_checkpoint True to go on from "
            "them, or choose another --output_dir."
        )
    results = {}
    for arm in arms:
        if main_process:
            print(f"\n=== {arm}: {' -> '.join(recipe.tasks)}; labels: {', '.join(label_names(tasks))} ===", flush=True)
        trainer = build_trainer(parser, sys.argv[1:], arm, tasks, base / arm)
        trainers.append(trainer)
        results[arm] = trainer.train_sequence(tasks)
        if args.push_to_hub and arm == recipe.trainer:
            trainer.push_to_hub()

    if main_process:
        for arm, result in results.items():
            print("\n" + "\n\n".join([arm, *report.sequence_tables(result)]))
        print("\n" + report.format_comparison(results))
        with suppress(ImportError):  # of matplotlib: every arm has said so
            report.plot_retention(results, base / "retention.png")
        print(f"\nResults, figures, models and cards: {base}")


if __name__ == "__main__":
    main()
