"""Replay: a share of every earlier task's training examples is mixed into the new task (Robins 1995)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset

from .base import Context, Method, flag


class _RowByRow(ConcatDataset):
    """Datasets whose types, columns or transforms differ, one after another."""

    datasets: list[Any]

    @property
    def column_names(self) -> list[str]:
        return [c for c in self.datasets[0].column_names if all(c in d.column_names for d in self.datasets)]

    def __getitem__(self, key: Any) -> Any:
        return [v for d in self.datasets for v in d[key][:]] if isinstance(key, str) else super().__getitem__(key)


@dataclass
class Replay(Method):
    """Experience replay with a fixed random buffer (Robins 1995): `replay_fraction` of each earlier task's examples.

    `replay_seed` and the task's position determine which examples, at least one a task, so a resumed run has the same
    buffer. It holds users' texts and is never written into the continual memory: a run that starts from a memory has
    to be given the earlier tasks' examples again. The epochs are longer, which is part of the method's cost.

    Raises:
        ValueError: a hyperparameter out of its range; before training, `heads="per_task"`.
    """

    name = "replay"
    ranges = {"replay_fraction": ("in (0, 1]", lambda v: 0 < v <= 1)}

    replay_fraction: float = flag(0.05, "Share of each earlier task's training examples to keep, in (0, 1].")
    replay_seed: int = flag(0, "Seed of the choice of examples to keep.")

    def check(self, context: Context, others: Sequence[Method]) -> None:
        if context.per_task_heads:
            raise ValueError("'replay' mixes earlier tasks' examples into the new task's: leave heads='per_task' out.")

    def extend_train_dataset(self, dataset: Any, earlier: Sequence[Any]) -> Any:
        from datasets import concatenate_datasets

        parts = [dataset]
        for position, old in enumerate(earlier):
            keep = max(1, round(self.replay_fraction * len(old)))
            chosen = np.random.default_rng([self.replay_seed, position]).permutation(len(old))[:keep]
            parts.append(old.select(sorted(chosen.tolist())))
        if all(part.features == dataset.features and part.format == dataset.format for part in parts):
            return concatenate_datasets(parts)
        return _RowByRow(parts)
