"""The interface of a continual-learning method: hooks into a training, every one a no-op; and what the hooks see."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainingArguments

from ..names import like_parameter, local, reshard, trainable_parameters


@dataclass
class Context:
    """What a method sees of the training it takes part in.

    Args:
        model: the model, with PEFT's and FSDP2's wrappers and without DDP's.
        args: the arguments of the training.
        seen_tasks: names of the tasks trained on before this one.
        accumulators: returns canonical name -> `sum |g|^p` so far, float32, sharded as the parameters are; empty where
            none is kept. Do not write to them: they may be the optimizer's state.
        optimizer: without accelerate's wrapper; None before training.
        task: name of the task that is trained on.
        train_dataset: what is trained on, with the earlier tasks' examples that a method mixed in.
        task_dataset: the task's own examples.
        collate: makes a batch of examples.
        processing_class: tokenizer, image processor or None.
        accelerator: None in scripts that build a Trainer of their own.
        per_task_heads: whether each task has a head of its own.
        max_steps: optimizer steps of this training in all; 0 before it.
        fisher_steps: if this run began with a memory of `remember` with power 2: how many steps' squared gradients
            that memory counts as. Otherwise, and in a resumed run, None.
        start: of a resumed task, canonical name -> weights at its start, on the CPU; {} if not needed. Otherwise None.
    """

    model: Any
    args: TrainingArguments
    seen_tasks: list[str] = field(default_factory=list)
    accumulators: Callable[[], Mapping[str, Tensor]] = dict
    optimizer: Any = None
    task: str = ""
    train_dataset: Any = None
    task_dataset: Any = None
    collate: Callable[[list[Any]], Any] | None = None
    processing_class: Any = None
    accelerator: Accelerator | None = None
    per_task_heads: bool = False
    max_steps: int = 0
    fisher_steps: float | None = None
    start: dict[str, Tensor] | None = None

    @property
    def resumed(self) -> bool:
        """Whether the task is resumed: `load_state_dict` was then given the state of an interrupted task."""
        return self.start is not None

    @property
    def sharded(self) -> bool:
        """Whether FSDP shards the model, or will when training begins."""
        plugin = None if self.accelerator is None else getattr(self.accelerator.state, "fsdp_plugin", None)
        return plugin is not None or bool(self.args.fsdp) or reshard(self.model)

    def starting_weights(self) -> dict[str, Tensor]:
        """Canonical name -> copy of every trainable parameter as it was when the task began, sharded as it is."""
        now = {n: p.detach() for n, p in trainable_parameters(self.model)}
        given = self.start or {}
        return {n: like_parameter(given[n], w, w.dtype) if n in given else w.clone() for n, w in now.items()}

    def frozen_copy(self) -> Any:
        """A copy of the model as it was when the task began, in evaluation mode and without gradients."""
        model = copy.deepcopy(self.model)
        for wrapped in ("forward", "_original_forward"):  # accelerate's autocast wrapper would call the model itself
            model.__dict__.pop(wrapped, None)
        with torch.no_grad():
            for (_, p), w in zip(trainable_parameters(model), self.starting_weights().values(), strict=True):
                p.copy_(w)
        return model.eval().requires_grad_(False)


def flag(default: Any, help: str) -> Any:
    """A hyperparameter, which is a command-line flag in the recipes; a tuple is the default of a list."""
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Method:
    """One continual-learning method. Init fields are its hyperparameters.

    Order of the hooks, for each task: `extend_train_dataset`, `prepare_model`, `before_task`; in every forward pass
    `before_forward`, `adjust_logits` and `loss_term`; around every optimizer step that is taken `before_step` and
    `after_step`; and `after_task`. `state_dict()` goes into the continual memory and comes back through
    `load_state_dict`, before `before_task`, when a run goes on from it. The first two hooks and those of the forward
    pass need [`ContinualTrainer`]; a method that overrides none of them works in any script.

    Raises:
        ValueError: a hyperparameter out of its range; from `check`, before any training, a set-up that cannot work.
    """

    name: ClassVar[str] = "none"
    """Name of the method in `method=`, on the command line and in the memory."""

    ranges: ClassVar[Mapping[str, tuple[str, Callable[[Any], bool]]]] = {}
    """Hyperparameter -> the values it takes, in words and as a test."""

    uses_accumulators: ClassVar[bool] = False
    """Whether the method reads `context.accumulators()`, which are then gathered under any optimizer but CLASSP."""

    needs_start: ClassVar[bool] = False
    """Whether a resumed run needs the weights that its task began with."""

    folds_adapters: ClassVar[bool] = False
    """Whether a task's PEFT adapter is merged into the base weights when the task ends: a plain model is saved."""

    end_order: ClassVar[int] = 2
    """Where its `after_task` stands among those of others, lowest first: 0 replaces the weights, 1 averages them with
    earlier ones, 2 looks at what they are then."""

    learns_at_end: ClassVar[bool] = True
    """Whether what it knows of a task is complete only after `after_task`."""

    parts: ClassVar[tuple[str, ...]] = ()
    """Attributes that are the state: canonical name -> float32 tensor each."""

    per_parameter: ClassVar[tuple[str, ...]] = ()
    """Parts of the state that hold one number a weight. A run that goes on from a memory takes those that fit its
    model; rows that an embedding gained get 0 in `importance`, the weight itself in other parts."""

    positive: ClassVar[Mapping[str, str]] = {}
    """Parts of the state that hold one number > 0 a name -> what the number is, for messages."""

    excluded: frozenset[str] = field(default=frozenset(), init=False, repr=False)
    """Canonical names the method must leave alone: the parameters of per-task heads."""

    def __post_init__(self) -> None:
        for hyperparameter, (values, allowed) in self.ranges.items():
            if not allowed(value := getattr(self, hyperparameter)) or value == float("inf"):
                finite = ", not infinite:" if value == float("inf") else ","
                raise ValueError(f"{hyperparameter} must be {values}{finite} got {value!r}")

    def parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """`(canonical name, parameter)` of the trainable parameters that the tasks share."""
        return ((n, p) for n, p in trainable_parameters(model) if n not in self.excluded)

    def check(self, context: Context, others: Sequence["Method"]) -> None:
        """Raise a ValueError if the method cannot run in this set-up, combined with `others`: called before anything
        is trained, when the context's `train_dataset`, `task_dataset` and `optimizer` may still be None."""

    def extend_train_dataset(self, dataset: Any, earlier: Sequence[Any]) -> Any:
        """Return the dataset to train on, given the task's training dataset and those of the earlier tasks."""
        return dataset

    def prepare_model(self, model: nn.Module, seen_tasks: Sequence[str]) -> None:
        """Change the model for the new task, before Trainer wraps it and loads a checkpoint into it."""

    def before_task(self, context: Context) -> None:
        """Called on every rank when training on a task begins or is resumed, with all wrappers on the model."""

    def before_forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        """Called before every forward pass of the training loss, with the model's inputs and their `labels`."""

    def adjust_logits(self, logits: Tensor) -> Tensor:
        """Return the logits that the training loss is computed from; `logits` and result are (examples, classes)."""
        return logits

    def loss_term(self, outputs: Any, inputs: Mapping[str, Tensor], count: Tensor | int | None) -> Tensor | None:
        """Return a 0-dim term, with its graph, that is added to the training loss of one micro-batch; None adds none.

        Args:
            outputs: of the model.
            inputs: of the model, with `labels`.
            count: number of items (examples; for language models, tokens with a label) in the whole accumulated batch:
                return the sum over the micro-batch's items divided by it. None: return the mean over these items.
        """
        return None

    def before_step(self, model: nn.Module) -> None:
        """Add to `.grad`, without a graph, before an optimizer step that will be taken.

        Called once a step, on every rank, with gradients that were accumulated, averaged, unscaled and clipped.
        """

    def after_step(self, model: nn.Module) -> None:
        """Called after every optimizer step."""

    def after_task(self, context: Context) -> None:
        """Called on every rank when training on a task has ended."""

    def check_state(self, state: Mapping[str, Mapping[str, Tensor]], model: nn.Module) -> None:
        """Raise a ValueError if `state`, of `state_dict`'s form, cannot be this method's on `model`."""
        for part, what in self.positive.items():
            for name, t in state.get(part, {}).items():
                if t.ndim or not 0 < float(t) < float("inf"):
                    raise ValueError(
                        f"The continual memory's {what} of {name!r} is {t.tolist()!r:.80}, not a number > 0. Use the "
                        "memory that a run wrote, or start without a memory."
                    )

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Part of the state -> canonical name -> tensor; of one number a weight where the part is `per_parameter`."""
        return {part: tensors for part in self.parts if (tensors := getattr(self, part))}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what `state_dict` returned; tensors are on the CPU."""
        for part in self.parts:
            setattr(self, part, {n: t.float() for n, t in state.get(part, {}).items()})

    def hyperparameters(self) -> dict[str, Any]:
        """Name -> value of every hyperparameter."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def describe(self) -> dict[str, Any]:
        """Name and hyperparameters, for JSON."""
        return {"name": self.name, **self.hyperparameters()}

    @classmethod
    def needs_trainer(cls) -> bool:
        """Whether the method changes the data, the model or the loss, and so needs a [`ContinualTrainer`]."""
        hooks = ("extend_train_dataset", "prepare_model", "before_forward", "adjust_logits", "loss_term")
        return any(getattr(cls, hook) is not getattr(Method, hook) for hook in hooks)


def describe_methods(methods: Sequence[Method]) -> dict[str, Any]:
    """Names and hyperparameters of all methods, for JSON; of several also `parts`, each described alone."""
    parts = [m.describe() for m in methods]
    described = {k: v for part in parts for k, v in part.items()}
    described["name"] = "+".join(m.name for m in methods) or Method.name
    return {**described, "parts": parts} if len(parts) > 1 else described


def placed(tensors: dict[str, Tensor], name: str, p: Tensor) -> Tensor:
    """This rank's part of `tensors[name]`, which is moved to where parameter `p` is, and sharded as it is, once."""
    stored, w = tensors[name], p.detach()
    if stored.device != w.device or type(stored) is not type(w):
        tensors[name] = like_parameter(stored, w, stored.dtype)
    return local(tensors[name])


@dataclass
class AnchoredMethod(Method):
    """A method that pulls every weight towards an anchor: gradient `strength * importance * (w - anchor)`.

    State: float32 tensors by canonical name, on the parameter's device once training has begun. `importance` may lack
    a name (then it counts as 1 there), `anchor` too (then there is no pull).
    """

    parts = per_parameter = ("anchor", "importance")

    anchor: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    importance: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def strength(self) -> float:
        """Return the factor of the pull, >= 0."""
        raise NotImplementedError

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        if not self.anchor or not self.strength():
            return
        for name, p in self.parameters(model):
            if p.grad is not None and name in self.anchor:
                pull = local(p.detach()).float() - placed(self.anchor, name, p)
                if name in self.importance:
                    pull.mul_(placed(self.importance, name, p))
                g = local(p.grad)
                g.add_(pull.to(g.dtype), alpha=self.strength())
