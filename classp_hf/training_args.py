"""`ContinualTrainingArguments`: every TrainingArguments field, and the few that a sequence of tasks needs."""

import copy
import os
from dataclasses import dataclass, fields
from typing import Any, Literal

from accelerate.utils import str_to_bool
from transformers import TrainingArguments

from .live import CLASSP_LEARNING_RATE, CLASSP_NAME
from .methods.base import flag
from .registration import register_optimizer

ADAMW_LEARNING_RATE = 5e-5
ERRORS = ("perplexity", "mse", "rmse", "mae", "wer", "cer", "ter")


@dataclass(repr=False)  # whose own would show tokens
class ContinualTrainingArguments(TrainingArguments):
    """Arguments of a [`ContinualTrainer`]. Of the defaults of `TrainingArguments` only `learning_rate` differs.

    Raises:
        ValueError: `memory_power`, `learned_tasks` or `heads` out of range, and what `TrainingArguments` refuses.
    """

    learning_rate: float | None = flag(  # type: ignore[assignment]
        None, f"The initial learning rate. Default: {CLASSP_LEARNING_RATE} for CLASSP, else 5e-5."
    )

    # Over the sequence
    heads: Literal["shared", "per_task"] = flag(
        "shared",
        "One output head for all tasks (domain-incremental), or one a task, chosen by the task's name when it is "
        "evaluated (task-incremental).",
    )
    reset_optimizer: bool = flag(
        False, "Start every task with a fresh optimizer, as running one script after another does."
    )
    sequence_metric: str | None = flag(
        None,
        "Name of the metric, from `compute_metrics`, that fills the matrix R. Default: accuracy; of language "
        "models, and of others than single-label classifiers without `compute_metrics`, the loss; of a trainer with "
        "a `task_metric` that function's name.",
    )
    sequence_metric_greater_is_better: bool | None = flag(
        None, f"Default: False for losses (names that end so) and for {', '.join(ERRORS)}, else True."
    )
    learned_tasks: int = flag(
        0,
        "So many tasks, the first of the sequence, are what the model has learned already: they are evaluated and "
        "shown to the method (Fisher, anchor, label frequencies, examples to replay), not trained on.",
    )
    max_length: int | None = flag(None, "Texts are cut to this many tokens. Default: what the tokenizer allows.")
    keep_task_models: bool = flag(
        False,
        "Keep the model, memory and checkpoints of every task in `output_dir`/00-<task>/ and so on. Default: only the "
        "last task's, which is what a resumed run needs.",
    )
    enable_jit_checkpoint: bool = flag(
        False,
        "On SIGTERM finish the present step, save a checkpoint and exit with 143; --resume_from_checkpoint True goes "
        "on from it. Between two tasks: exit when the evaluation is done. Give the process the time of one step, one "
        "evaluation and one checkpoint.",
    )
    model_license: str | None = flag(None, "The Hub's name of the license of the model, for its card: apache-2.0.")

    # The memory
    memory: str | None = flag(
        None,
        "Go on from this continual memory: a file, the folder of a model, or a Hub id. `pretrained`: of a language "
        "model that has none, one made of its own samples before the first training.",
    )
    memory_revision: str | None = flag(None, "Branch, tag or commit of the Hub repository given as `memory`.")
    memory_strength: float | None = flag(
        None, "Steps' worth that a memory of `remember` or `pretrained` counts. Default: those it is of."
    )
    gather_memory: bool = flag(
        False,
        "Gather the memory of gradients under other optimizers than CLASSP too, which keeps it anyway. Methods that "
        "use it ask for it themselves.",
    )
    memory_power: float = flag(2.0, "The p of the gathered sum |g|^p; CLASSP's own is in `optim_args`.")

    def __post_init__(self) -> None:
        if not self.memory_power > 0:
            raise ValueError(f"memory_power must be > 0, got {self.memory_power}")
        if self.learned_tasks < 0:
            raise ValueError(f"learned_tasks must be >= 0, got {self.learned_tasks}")
        if self.heads not in ("shared", "per_task"):
            raise ValueError(f"heads must be 'shared' or 'per_task', got {self.heads!r}")
        if self.optim == CLASSP_NAME:
            register_optimizer()
        self.default_learning_rate = self.learning_rate is None
        if self.learning_rate is None:
            self.learning_rate = CLASSP_LEARNING_RATE if self.optim == CLASSP_NAME else ADAMW_LEARNING_RATE
        if str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")):
            self.use_cpu = True  # `accelerate launch --cpu`; several processes would not find each other without it
        super().__post_init__()


def greater_is_better(args: Any) -> bool:
    """Whether of two values of `args.sequence_metric` the higher is the better one."""
    given, metric = args.sequence_metric_greater_is_better, args.sequence_metric or ""
    return not (metric.endswith("loss") or metric in ERRORS) if given is None else given


def with_continual_defaults(args: TrainingArguments | None, optim: str | None = None) -> Any:
    """A copy of `args` that has every field of [`ContinualTrainingArguments`], at its default where it was not there.

    Subclasses (`Seq2SeqTrainingArguments`, TRL's) keep their class and fields. The caller may share `args` between
    trainers.

    Args:
        optim: replaces `args.optim`, and with it a learning rate that was left at its default.
    """
    args = ContinualTrainingArguments(output_dir="tmp_trainer") if args is None else copy.copy(args)
    for f in fields(ContinualTrainingArguments):
        if not hasattr(args, f.name):
            setattr(args, f.name, f.default)
    if optim is not None:
        untouched = getattr(args, "default_learning_rate", False) and args.learning_rate == ADAMW_LEARNING_RATE
        if untouched and args.optim != optim:
            args.learning_rate = CLASSP_LEARNING_RATE
        args.optim = optim
    return args
