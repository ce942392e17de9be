"""Elastic Weight Consolidation (Kirkpatrick et al. 2017) with a true per-example diagonal Fisher."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.utils import reduce, tqdm
from torch import Tensor
from transformers.utils import logging

from ..names import bare_model, mean_over_weights, reshard
from .base import AnchoredMethod, Context, flag, placed
from .fisher import sum_squared_gradients

logger = logging.get_logger(__name__)


@dataclass
class EWC(AnchoredMethod):
    """Penalty `(lambda / 2) * sum_i F_i (w_i - a_i)^2` (arXiv 1612.00796, eq. 3), applied as a gradient term.

    F_i is the mean over examples of the squared *per-example* gradient of log p(y|x), not the square of a batch's mean
    gradient, as in many implementations; a_i is the weight at the end of the last task. Over several tasks:

    - `online` (Schwarz et al. 2018, arXiv 1805.06370): F <- gamma F + F_t, one anchor, the weights of the last task.
    - `summed`: one term and one anchor a task, as in the original. Their sum has the same gradient as one term with
      F = sum_t F_t and the F-weighted mean of the anchors. Only these two numbers a weight are kept.

    If a first fine-tuning begins with a memory of the pretrained model (`memory="pretrained"`, `remember`) of power 2,
    F is that memory, divided by its mean (`fisher_normalize`) or its number of batches, and a the weights as loaded.

    Raises:
        ValueError: a hyperparameter out of its range; when training begins, a dataset that is empty or has no length,
            and a model without log p(y|x) of classes (regression, several labels an example).
    """

    name = "ewc"
    ranges = {
        "ewc_lambda": (">= 0", lambda v: v >= 0),
        "ewc_mode": ("one of ('online', 'summed')", lambda v: v in ("online", "summed")),
        "ewc_gamma": ("in [0, 1]", lambda v: 0 <= v <= 1),
        "fisher_samples": ("at least 1", lambda v: v >= 1),
        "fisher_labels": ("one of ('empirical', 'sampled')", lambda v: v in ("empirical", "sampled")),
    }

    ewc_lambda: float = flag(0.1, "Strength of the EWC penalty. Its scale depends on `fisher_normalize`.")
    ewc_mode: Literal["online", "summed"] = flag("online", "Decay old importance with one anchor, or sum over tasks.")
    ewc_gamma: float = flag(1.0, "Online EWC: decay of old importance a task, in [0, 1].")
    fisher_samples: int = flag(256, "Examples of each task that its Fisher is estimated on (all, if fewer).")
    fisher_labels: Literal["empirical", "sampled"] = flag(
        "empirical", "Labels of log p(y|x): from the data (empirical Fisher) or drawn from the model (sampled)."
    )
    fisher_normalize: bool = flag(True, "Divide each task's Fisher by its mean, so that lambda is scale-free.")

    def strength(self) -> float:
        return self.ewc_lambda

    def before_task(self, context: Context) -> None:
        if not isinstance(context.task_dataset, Sized) or not len(context.task_dataset):
            raise ValueError(
                "EWC chooses examples of the training dataset at random: it needs one of known length, with examples, "
                f"got a {type(context.task_dataset).__name__}. Load it without streaming, or use --method l2sp."
            )
        with torch.random.fork_rng(devices=[]):  # collators that mask at random draw from it
            first = next(_examples(context, [0]))
        sum_squared_gradients(context.model, [first], {})  # refuses models without a likelihood before they train
        if context.fisher_steps and not self.importance:
            memory, named = context.accumulators(), dict(self.parameters(context.model))
            memory = {n: s for n, s in memory.items() if n in named}
            mean = mean_over_weights(memory.values())
            scale = mean if self.fisher_normalize and mean > 0 else context.fisher_steps
            self.importance = {n: s.float() / scale for n, s in memory.items()}
            self.anchor = {n: named[n].detach().float().clone() for n in memory}

    @torch.no_grad()
    def after_task(self, context: Context) -> None:
        fisher = self.task_fisher(context)
        mean = mean_over_weights(fisher.values())
        logger.info(f"EWC: mean diagonal Fisher of task {context.task}: {mean:.3e}")
        decay = self.ewc_gamma if self.ewc_mode == "online" else 1.0
        anchor = {n: p.detach().float().clone() for n, p in self.parameters(context.model)}
        named = dict(self.parameters(context.model))
        for n, f in fisher.items():
            f.div_(mean if self.fisher_normalize and mean > 0 else 1.0)
            if n in self.importance:
                for part in (self.importance, self.anchor):  # not there yet if no step was taken
                    placed(part, n, named[n])
                old, a = self.importance[n], self.anchor[n]
                total = f + decay * old
                if self.ewc_mode == "summed":
                    anchor[n] = torch.where(total > 0, (old * a + f * anchor[n]) / total, anchor[n])
                fisher[n] = total
        self.importance |= fisher  # what is frozen for this task keeps its own
        self.anchor |= anchor

    def task_fisher(self, context: Context) -> dict[str, Tensor]:
        """The diagonal Fisher, not scaled, of the task's own examples: equal on every rank, or sharded."""
        args, model = context.args, context.model
        # numbered before they are shared out, so that the result does not depend on the number of ranks
        generator = torch.Generator().manual_seed(args.seed)
        chosen = torch.randperm(len(context.task_dataset), generator=generator)[: self.fisher_samples].tolist()
        sharded = reshard(model)  # then no rank has a pass of its own
        mine = list(enumerate(chosen))
        mine = mine if sharded else mine[args.process_index :: args.world_size]
        seeds = [args.seed + number for number, _ in mine] if self.fisher_labels == "sampled" else ()
        shown = tqdm([i for _, i in mine], desc=f"Fisher of {context.task}", disable=args.disable_tqdm, leave=False)
        # a forward pass in evaluation mode does not checkpoint
        checkpoints = (getattr(args, f"{kind}_checkpointing", False) for kind in ("activation", "gradient"))
        size = 1 if any(checkpoints) else args.per_device_train_batch_size
        total = sum_squared_gradients(model, _examples(context, shown), dict(self.parameters(model)), size, seeds)
        return {n: (t if sharded else reduce(t, "sum")) / len(chosen) for n, t in total.items()}


def _examples(context: Context, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    """The inputs of single examples of the task, as Trainer gives them to the model."""
    collate: Any = context.collate  # there is one while training
    taken = {*inspect.signature(bare_model(context.model).forward).parameters, "label", "label_ids"}
    for i in numbers:
        row = context.task_dataset[i]
        if context.args.remove_unused_columns and isinstance(row, Mapping):
            row = {k: v for k, v in row.items() if k in taken}
        given = collate([row]).items()  # of packed rows lengths, too
        yield {k: t.to(context.args.device) if isinstance(t, Tensor) else t for k, t in given}
