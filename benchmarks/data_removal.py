"""SparCL's dynamic data removal (Wang et al. 2022, arXiv 2209.09476, section 3.2), an arm of `compare_methods.py`.

Examples that were answered rightly while they were trained on are left out of the epochs that follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from classp_hf import ContinualTrainer


class RemovalSampler(Sampler[int]):
    """The order of accelerate's `SeedableRandomSampler`; a later epoch has only the `kept` examples that were wrong
    most often in the epochs before it, those of equal count in random order."""

    def __init__(self, length: int, kept: int) -> None:
        self.mistakes, self.kept, self.epoch = torch.zeros(length), kept, 0
        self.seed, self.order = torch.random.initial_seed(), torch.zeros(0, dtype=torch.long)

    def __len__(self) -> int:
        return self.kept if self.epoch else len(self.mistakes)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.mistakes), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        if self.epoch:
            most = self.mistakes[order].argsort(descending=True, stable=True)[: self.kept]
            order = order[most.sort().values]
        self.order, self.epoch = order, self.epoch + 1
        return iter(order.tolist())

    def count(self, wrong: Tensor) -> None:
        """`wrong`: bool, of the next batch in order."""
        self.mistakes[self.order[: len(wrong)]] += wrong.float().cpu()
        self.order = self.order[len(wrong) :]


class DataRemovalTrainer(ContinualTrainer):
    """Two epochs in one process; the second one has as many steps as `max_steps` leaves it."""

    def _get_train_sampler(self, train_dataset: Any = None) -> RemovalSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self.sampler = RemovalSampler(len(dataset), self.args.max_steps * self.args.train_batch_size - len(dataset))
        return self.sampler

    def adjusted_loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.model.training:
            self.sampler.count(outputs["logits"].argmax(-1) != labels)
        return super().adjusted_loss(outputs, labels, num_items_in_batch)
