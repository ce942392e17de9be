"""One output head a task (task-incremental learning), swapped in and out of the model's own parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .names import bare_model, full_tensor, like_parameter, trainable_parameters


class TaskHeads:
    """Keeps one copy of the head's weights a task; the model's own parameters hold the active one.

    Values are copied into the same `Parameter` objects, as optimizers need it. Heads start as the model's own was.
    """

    def __init__(self, model: nn.Module) -> None:
        bare = bare_model(model)
        prefix = getattr(bare, "base_model_prefix", "")
        self.model = model
        self.names = frozenset(n for n, _ in trainable_parameters(model) if not n.startswith(f"{prefix}."))
        if not self.names or not prefix:
            raise ValueError(
                f"heads='per_task' needs trainable parameters outside of the base model {prefix!r}; "
                f"{type(bare).__name__} has none. Use heads='shared'."
            )
        self.initial = self._copy()
        self.saved: dict[str, dict[str, Tensor]] = {}
        self.active: str | None = None
        """The task whose head is in the model; None: nobody's."""
        self.label_ids: list[int] | None = None
        """The active task's classes; None: all."""

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The head's parameters that the model has now: FSDP2 replaces them."""
        return {n: p for n, p in trainable_parameters(self.model) if n in self.names}

    def _copy(self) -> dict[str, Tensor]:
        return {n: full_tensor(p).cpu().clone() for n, p in self._parameters().items()}

    @torch.no_grad()
    def activate(self, task: str, label_ids: list[int] | None = None) -> None:
        """Put the head of `task` into the model (the initial one if the task is new), keeping the one that is in."""
        head = self.state_dict().get(task, self.initial)
        for n, p in self._parameters().items():
            p.copy_(like_parameter(head[n], p.detach(), p.dtype))
        self.active, self.label_ids = task, label_ids

    def mask_other_labels(self, logits: Any, labels: Any) -> Any:
        """Logits for the metrics: the task is known, so labels of other tasks are no candidates."""
        if self.label_ids is None or not isinstance(logits, Tensor):
            return logits
        mask = torch.full_like(logits, float("-inf"))
        mask[..., self.label_ids] = 0
        return logits + mask

    def forget_optimizer_state(self, optimizer: Any) -> None:
        """A new head must not inherit what an optimizer remembers of another one."""
        for p in self._parameters().values():
            optimizer.state.pop(p, None)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        own = self._copy() if self.active is not None else {}
        if self.active and any(not torch.equal(t, self.initial[n]) for n, t in own.items()):  # trained
            self.saved[self.active] = own
        return dict(self.saved)

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `state_dict` gave; the active head stays. ValueError: names or shapes of another model."""
        shapes = {n: tuple(p.shape) for n, p in self._parameters().items()}
        for task, head in state.items():
            if (stored := {n: tuple(t.shape) for n, t in head.items()}) != shapes:
                raise ValueError(
                    f"The head of {task} in the continual memory has the shapes {stored}, the model's {shapes}. Load "
                    "the model it was saved with, or start without a memory."
                )
        self.saved = {task: dict(head) for task, head in state.items()}
