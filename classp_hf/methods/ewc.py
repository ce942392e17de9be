"""Elastic Weight Consolidation (Kirkpatrick et al. 2017) with a true per-example diagonal Fisher."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from ..memory import bare_model
from .base import AnchoredMethod
from .fisher import batches_of_equal_shape, sum_squared_gradients

if TYPE_CHECKING:
    from ..tasks import Task
    from ..trainer import ContinualTrainer

logger = logging.get_logger(__name__)


@dataclass
class EWC(AnchoredMethod):
    """Penalty `(lambda / 2) * sum_i F_i (w_i - a_i)^2` (arXiv 1612.00796, eq. 3), applied as a gradient term.

    F_i is the mean over examples of the squared *per-example* gradient of log p(y|x); the square of a batch's mean
    gradient, found in many implementations, is something else. Over several tasks:

    - `online` (Schwarz et al. 2018, arXiv 1805.06370): F <- gamma F + F_t, one anchor, the weights of the last task.
    - `summed`: one term and one anchor a task, as in the original. Their sum has the same gradient as one term with
      F = sum_t F_t and the F-weighted mean of the anchors, which is what is kept: two tensors a weight, however many
      tasks.
    """

    name: ClassVar[str] = "ewc"

    ewc_lambda: float = field(
        default=1.0, metadata={"help": "Strength of the EWC penalty. Its scale depends on `fisher_normalize`."}
    )
    ewc_mode: Literal["online", "summed"] = field(
        default="online", metadata={"help": "Decay old importance and keep the last anchor, or sum over tasks."}
    )
    ewc_gamma: float = field(default=1.0, metadata={"help": "Online EWC: decay of old importance a task, in [0, 1]."})
    fisher_samples: int = field(
        default=256, metadata={"help": "Examples of each task that its Fisher is estimated on (all, if fewer)."}
    )
    fisher_labels: Literal["empirical", "sampled"] = field(
        default="empirical",
        metadata={"help": "Labels of log p(y|x): from the data (empirical Fisher) or drawn from the model (sampled)."},
    )
    fisher_normalize: bool = field(
        default=True,
        metadata={"help": "Divide each task's Fisher by its mean over all weights, so that lambda is scale-free."},
    )

    def __post_init__(self) -> None:
        if not self.ewc_lambda >= 0:
            raise ValueError(f"ewc_lambda must be >= 0, got {self.ewc_lambda}")
        if not 0 <= self.ewc_gamma <= 1:
            raise ValueError(f"ewc_gamma must be in [0, 1], got {self.ewc_gamma}")
        if self.fisher_samples < 1:
            raise ValueError(f"fisher_samples must be at least 1, got {self.fisher_samples}")
        for name, allowed in (("ewc_mode", ("online", "summed")), ("fisher_labels", ("empirical", "sampled"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")

    def strength(self) -> float:
        return self.ewc_lambda

    def check_trainer(self, trainer: ContinualTrainer) -> None:
        super().check_trainer(trainer)
        if trainer.is_fsdp_enabled:
            raise ValueError("EWC's per-example Fisher does not run under FSDP yet. Use DDP, or --method l2sp.")

    @torch.no_grad()
    def after_task(self, trainer: ContinualTrainer, task: Task) -> None:
        fisher = self.task_fisher(trainer, task)
        mean = sum(f.sum() for f in fisher.values()) / sum(f.numel() for f in fisher.values())
        logger.info(f"EWC: mean diagonal Fisher of task {task.name}: {float(mean):.3e}")
        if self.fisher_normalize and mean > 0:
            for f in fisher.values():
                f.div_(mean)
        weights = {n: p.detach().float().clone() for n, p in self.parameters(trainer.model)}
        old = {n: f.to(fisher[n].device) for n, f in self.importance.items() if n in fisher}
        if self.ewc_mode == "summed":
            for n in old:
                total = old[n] + fisher[n]
                mixed = (old[n] * self.anchor[n].to(total.device) + fisher[n] * weights[n]) / total
                weights[n] = torch.where(total > 0, mixed, weights[n])
        decay = self.ewc_gamma if self.ewc_mode == "online" else 1.0
        self.importance = {n: f + decay * old[n] if n in old else f for n, f in fisher.items()}
        self.anchor = weights

    def task_fisher(self, trainer: ContinualTrainer, task: Task) -> dict[str, Tensor]:
        """The raw diagonal Fisher of `task` on the trainer's model, equal on every rank."""
        generator = torch.Generator().manual_seed(trainer.args.seed)
        count = min(self.fisher_samples, len(task.train_dataset))
        # numbered before they are shared out, so that the result does not depend on the number of ranks
        chosen = list(enumerate(torch.randperm(len(task.train_dataset), generator=generator)[:count].tolist()))
        mine = chosen[trainer.args.process_index :: trainer.args.world_size]
        model = trainer.accelerator.unwrap_model(trainer.model)
        keep = [
            c for c in task.train_dataset.column_names if c in inspect.signature(bare_model(model).forward).parameters
        ]
        examples = DataLoader(
            task.train_dataset.select([i for _, i in mine]).select_columns(keep),
            batch_size=1,
            collate_fn=trainer.data_collator,
        )
        progress = tqdm(
            examples,
            desc=f"Fisher of {task.name}",
            disable=trainer.args.disable_tqdm or not trainer.is_local_process_zero(),
            leave=False,
        )
        # a forward pass in evaluation mode does not checkpoint
        size = 1 if trainer.args.activation_checkpointing else trainer.args.per_device_train_batch_size
        seeds: list[int] | None = [] if self.fisher_labels == "sampled" else None

        def batches():
            for numbers, batch in batches_of_equal_shape(zip((number for number, _ in mine), progress), size):
                if seeds is not None:
                    seeds.extend(trainer.args.seed + number for number in numbers)
                yield {k: t.to(trainer.args.device) for k, t in batch.items()}

        total = sum_squared_gradients(model, batches(), dict(self.parameters(model)), seeds)
        return {n: trainer.accelerator.reduce(t, reduction="sum") / count for n, t in total.items()}
