"""The interface of a continual-learning method: hooks into the sequence loop, every one a no-op."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..memory import ContinualMemory, like_parameter, trainable_parameters
from ..optim import kernels

if TYPE_CHECKING:
    from datasets import Dataset

    from ..tasks import Task
    from ..trainer import ContinualTrainer


@dataclass
class Method:
    """One continual-learning method. Init fields are its hyperparameters, `field(init=False)` its state.

    Order of the hooks, for each task: `before_task`, `extend_train_dataset`, then `penalty` in every forward pass,
    `penalty_gradient` before and `after_step` after every optimizer step, and `after_task`. The trainer saves
    `state_dict()` in the continual memory and gives it back through `load_state_dict` when a run goes on from it.
    """

    name: ClassVar[str] = "none"

    uses_accumulators: ClassVar[bool] = False
    """Whether the method reads the memory of gradients, `trainer.accumulators()`. CLASSP has it anyway; under any other
    optimizer the trainer then gathers it."""

    folds_adapters: ClassVar[bool] = False
    """Whether a task's PEFT adapter becomes part of the base weights when the task ends: saved then is a plain model."""

    excluded: frozenset[str] = field(default=frozenset(), init=False, repr=False)
    """Canonical names the method must leave alone: the parameters of per-task heads."""

    def parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """`(canonical name, parameter)` of the trainable parameters that the tasks share."""
        return ((n, p) for n, p in trainable_parameters(model) if n not in self.excluded)

    def check_trainer(self, trainer: ContinualTrainer) -> None:
        """Called before anything is trained: raise a ValueError if the method cannot run in this set-up."""

    def before_task(self, trainer: ContinualTrainer, task: Task) -> None:
        """Called before training on `task`, with the weights the previous task left and `trainer.seen_tasks` before it."""

    def extend_train_dataset(self, dataset: Dataset, earlier: Sequence[Dataset]) -> Dataset:
        """The dataset to train on, from the task's own and the earlier tasks' training datasets."""
        return dataset

    def penalty(self, model: nn.Module, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """A 0-dim term for the loss of one micro-batch (mean over its examples), with its autograd graph."""
        return None

    def penalty_gradient(self, model: nn.Module) -> None:
        """Add the gradient of a penalty on the weights to `.grad`, without an autograd graph.

        Called once an optimizer step, whatever the accumulation, on every rank, after the gradients were averaged over
        ranks, unscaled and clipped.
        """

    def after_step(self, model: nn.Module) -> None:
        """Called after every optimizer step."""

    def after_task(self, trainer: ContinualTrainer, task: Task) -> None:
        """Called on every rank when training on `task` has ended."""

    def parts(self) -> Sequence[Method]:
        """The methods this one consists of: itself."""
        return [self]

    def check_state(self, state: Mapping[str, Mapping[str, Tensor]], model: nn.Module) -> None:
        """Raise a ValueError unless `state`, of `state_dict`'s form, belongs to `model`."""
        shapes = {n: tuple(p.shape) for n, p in self.parameters(model)}
        for part, tensors in state.items():
            ContinualMemory({f"{self.name}.{part}/{n}": t for n, t in tensors.items()}).check_fits(shapes)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Part of the state -> canonical parameter name -> tensor of the parameter's shape."""
        return {}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `state_dict` gave; tensors are on the CPU."""
        if state:
            raise ValueError(f"The method {self.name!r} has no state, got {sorted(state)}")

    def hyperparameters(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def describe(self) -> dict[str, Any]:
        """Name and hyperparameters, for JSON; of several methods also `parts`, each described alike."""
        return {"name": self.name, **self.hyperparameters()}


@dataclass
class Combined(Method):
    """Several methods at once, each with its own hyperparameters and state; hooks run in the order given."""

    methods: list[Method] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [m.name for m in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(f"A combination holds every method once, got {' + '.join(names)}.")
        self.name = "+".join(names)  # type: ignore[misc]
        self.uses_accumulators = any(m.uses_accumulators for m in self.methods)  # type: ignore[misc]
        self.folds_adapters = any(m.folds_adapters for m in self.methods)  # type: ignore[misc]

    def parts(self) -> Sequence[Method]:
        return self.methods

    def check_trainer(self, trainer: ContinualTrainer) -> None:
        for method in self.methods:
            method.check_trainer(trainer)

    def before_task(self, trainer: ContinualTrainer, task: Task) -> None:
        for method in self.methods:
            method.before_task(trainer, task)

    def extend_train_dataset(self, dataset: Dataset, earlier: Sequence[Dataset]) -> Dataset:
        for method in self.methods:
            dataset = method.extend_train_dataset(dataset, earlier)
        return dataset

    def penalty(self, model: nn.Module, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
        given = (method.penalty(model, outputs, inputs) for method in self.methods)
        terms = [term for term in given if term is not None]
        return torch.stack(terms).sum() if terms else None

    def penalty_gradient(self, model: nn.Module) -> None:
        for method in self.methods:
            method.penalty_gradient(model)

    def after_step(self, model: nn.Module) -> None:
        for method in self.methods:
            method.after_step(model)

    def after_task(self, trainer: ContinualTrainer, task: Task) -> None:
        for method in self.methods:
            method.after_task(trainer, task)

    def hyperparameters(self) -> dict[str, Any]:
        return {k: v for method in self.methods for k, v in method.hyperparameters().items()}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "parts": [method.describe() for method in self.methods]}


# Weights that PyTorch's operations take at a time: 64 MB of temporaries.
_GROUP = 2**24


@dataclass
class AnchoredMethod(Method):
    """A method that pulls every weight towards an anchor: gradient `strength * importance * (w - anchor)`.

    State: float32 tensors by canonical name, on the parameter's device once training has begun. `importance` may lack a
    name (then it counts as 1 there).
    """

    anchor: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    importance: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def strength(self) -> float:
        raise NotImplementedError

    @torch.no_grad()
    def penalty_gradient(self, model: nn.Module) -> None:
        if not self.anchor or not self.strength():
            return
        compiled: list[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]] = []
        groups: dict[Any, list[tuple[Tensor, Tensor, Tensor, Tensor | None]]] = {}
        for name, p in self.parameters(model):
            if p.grad is None or name not in self.anchor:
                continue
            w = p.detach()
            if self.anchor[name].device != p.device or type(self.anchor[name]) is not type(w):
                self.anchor[name] = like_parameter(self.anchor[name], w, torch.float32)
                if name in self.importance:
                    self.importance[name] = like_parameter(self.importance[name], w, torch.float32)
            tensors = (p.grad, w, self.anchor[name], self.importance.get(name))
            if kernels.pulls(*tensors):
                compiled.append((*tensors[:3], None, tensors[3]))
            elif isinstance(w, DTensor):  # foreach kernels refuse lists with DTensors (pytorch#183207)
                _pull(*tensors, self.strength())
            else:
                kind = (w.device, w.dtype, p.grad.dtype, tensors[-1] is None)
                groups.setdefault(kind, []).append(tensors)
        if compiled:
            kernels.pull_(compiled, self.strength())
        for group in groups.values():
            for part in _bounded(group):
                _foreach_pull(part, self.strength())

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        parts = {"anchor": self.anchor, "importance": self.importance}
        return {part: tensors for part, tensors in parts.items() if tensors}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        if unknown := state.keys() - {"anchor", "importance"}:
            raise ValueError(f"The method {self.name!r} keeps an anchor and an importance, got {sorted(unknown)}")
        self.anchor = {n: t.float() for n, t in state.get("anchor", {}).items()}
        self.importance = {n: t.float() for n, t in state.get("importance", {}).items()}


def _pull(g: Tensor, w: Tensor, a: Tensor, f: Tensor | None, strength: float) -> None:
    pull = w.float() - a
    if f is not None:
        pull.mul_(f)
    g.add_(pull.to(g.dtype), alpha=strength)


def _foreach_pull(tensors: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]], strength: float) -> None:
    """`_pull` of several weights of one kind."""
    gs, ws, anchors, importances = (list(column) for column in zip(*tensors))
    pulls = torch._foreach_sub([w.float() for w in ws], anchors)
    if importances[0] is not None:
        torch._foreach_mul_(pulls, importances)
    torch._foreach_add_(gs, [pull.to(g.dtype) for pull, g in zip(pulls, gs)], alpha=strength)


def _bounded(tensors: list[Any]) -> Iterator[list[Any]]:
    """Neighbours together, up to `_GROUP` weights a group."""
    group: list[Any] = []
    for given in tensors:
        if group and sum(t[0].numel() for t in group) + given[0].numel() > _GROUP:
            yield group
            group = []
        group.append(given)
    if group:
        yield group
