"""The memory while training: read into the optimizer or gathered beside it, and written as it stands."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .heads import TaskHeads
from .matching import match_accumulators, match_rows, named_as_in
from .memory import MEMORY_NAME, ContinualMemory, memory_beside, shorten, write_memory
from .methods import Context, Method, describe_methods
from .names import (
    Accumulators,
    canonical_name,
    like_parameter,
    local,
    model_source,
    reshard,
    samples,
    trainable_parameters,
)
from .optim import CLASSP
from .optim_args import parse_optim_args
from .redaction import public_arguments
from .remember import PRETRAINED, pretrained_memory
from .zero import get_accumulators, set_accumulators

logger = logging.get_logger(__name__)

BESIDE, NONE = "beside the model", "none"
CLASSP_NAME = "classp"
CLASSP_LEARNING_RATE: float = inspect.signature(CLASSP).parameters["lr"].default


class LiveMemory:
    """The accumulators of a model in training, with the state of its methods.

    CLASSP keeps the accumulators itself; under other optimizers they are gathered beside it, if a method reads them.
    `source` is `BESIDE`, `NONE`, `PRETRAINED` or what [`ContinualMemory.load`] takes; other arguments are those of
    [`ContinualCallback`].
    """

    def __init__(self, methods: list[Method], source: str, revision: str | None, gather: bool, power: float) -> None:
        self.methods, self.source, self.revision, self.gather, self.power = methods, source, revision, gather, power
        self.memory_strength: float | None = None
        """Steps' worth that a memory counts which says of how many steps it is. None: as many."""
        self.fisher_steps: float | None = None
        self.tasks: list[str] = []
        """Names of the tasks seen so far."""
        self.heads: TaskHeads | None = None
        self.optimizer: Any = None
        self.zero: Any = None
        """DeepSpeed's optimizer around `optimizer`, if there is one."""
        self.model: Any = None
        self.context: Context | None = None
        """While training."""
        self.loaded = False
        """Whether it is known what there is to go on from."""
        self.samples: dict[str, Tensor] | None = None
        """Of the weights at the end of training, which the memory belongs to. While training they are taken anew."""
        self.folder: Callable[[Any], Path] = lambda args: Path(args.output_dir)
        """The folder of the present training."""
        self.checkpoint: Path | None = None
        """What training is resumed from. Default: the checkpoint of the present step."""
        self._pending: dict[str, Tensor] | None = None
        self._gathered: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._kept_samples: dict[str, Tensor] = {}
        self._description: dict[str, Any] = {}

    @property
    def excluded(self) -> frozenset[str]:
        return self.heads.names if self.heads is not None else frozenset()

    def adds_to(self, args: Any) -> float | None:
        """The p of the `sum |g|^p` that this training adds to, in the optimizer or beside it; None if to none."""
        if isinstance(self.optimizer, CLASSP):
            return self.optimizer.param_groups[0]["power"]
        if self.optimizer is None and args is not None and args.optim == CLASSP_NAME:  # it is not built yet
            return parse_optim_args(args.optim_args)[0].get("power", 2.0)
        return self.power if self.gather or any(m.uses_accumulators for m in self.methods) else None

    def accumulators(self) -> Mapping[str, Tensor]:
        """Canonical name -> `sum |g|^p` over all training so far, float32, sharded as the parameters are; empty before
        any.

        Of other optimizers than CLASSP these are the tensors that change while training.
        """
        if self._pending is not None:
            return dict(self._pending)
        if not isinstance(self.optimizer, CLASSP):
            return dict(self._gathered)
        if self.zero is not None:
            return get_accumulators(self.zero, self.model)
        reshard(self.model)
        named = ((canonical_name(n), p) for n, p in self.model.named_parameters())  # frozen ones, too, keep theirs
        state, excluded = self.optimizer.state, self.excluded
        known = {n: p for n, p in named if n not in excluded and state.get(p)}
        return Accumulators(known, self.optimizer.accumulator)

    def sharded(self) -> bool:
        """Whether the memory is spread over ranks, so that reading it is a collective call."""
        return self.zero is not None or reshard(self.model)

    def find(self, previous: "LiveMemory | None", args: Any, state: Any, tokenizer: Any) -> None:
        """Read the memory that this training goes on from; `previous` trained the model before, in this process."""
        if state.global_step:
            step = self.folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            given = args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else step
            for folder in map(Path, (self.checkpoint or step, given, step)):
                if (folder / MEMORY_NAME).is_file():
                    self.load(ContinualMemory.load(folder), self.model, args, same_run=True)
                    return
            if self.methods:
                raise ValueError(
                    f"The resumed checkpoint's {MEMORY_NAME} is not in {step}, so the state of "
                    f"{', '.join(m.name for m in self.methods)} is not known. Pass the checkpoint as "
                    "--resume_from_checkpoint."
                )
        if self.loaded or self.source == NONE:
            return
        self.loaded = True
        makes = self.source == PRETRAINED
        known = " (memory='pretrained' is for models that have none)" if makes else ""
        if self.source not in (BESIDE, PRETRAINED):
            memory: ContinualMemory | None = ContinualMemory.load(self.source, self.revision)
            where = repr(self.source)
        elif previous is not None and (previous.tasks or not makes):
            memory, where = previous.memory(), f"this process (the model was trained in it){known}"
        else:
            source = model_source(self.model)
            start = repr(source) if source else "this model"
            memory, where = memory_beside(self.model), f"{start}{known}"
            if makes and memory is None:
                power = self.adds_to(args) or self.power
                memory = pretrained_memory(self.model, tokenizer, power, args.local_process_index == 0)
                where = f"{start} as it was loaded (memory='pretrained')"
        if memory is not None:
            self.load(memory, self.model, args, where=where)
        elif args.process_index == 0:
            peft = getattr(self.model, "peft_config", None)  # no path of an adapter that was loaded
            hint = " To go on with an adapter, pass its folder as --memory or memory=." if peft else ""
            logger.warning(f"There is no continual memory beside {where}: this run begins one.{hint}")

    def load(self, memory: ContinualMemory, model: Any, args: Any, *, same_run: bool = False, where: str = "") -> None:
        """As [`ContinualTrainer.load_memory`], for the given model and training arguments."""
        known = False
        try:
            self._check_power(memory, args)
            memory = named_as_in(model, memory)
            match = match_accumulators(memory, model, self.excluded, same_run)
            for method in self.methods:
                parts = memory.parts_of(method.name)
                for part in parts.keys() & method.per_parameter:
                    kept = {n: t for n, t in parts[part].items() if n not in match.replaced}
                    parts[part] = match_rows(kept, model, part == "importance")
                method.check_state(parts, model)
                known |= bool(parts)
                if parts or same_run:
                    method.load_state_dict(parts)
            if self.heads is not None:
                heads = memory.parts_of("head")
                self.heads.load_state_dict({task.replace("%2F", "/"): head for task, head in heads.items()})
                self.heads.initial = memory.get("initial_head") or self.heads.initial
        except ValueError as error:
            at = f"\nThe memory was read from {where}; memory=none begins with an empty one." if where else ""
            raise ValueError(f"{error}{at}") from None
        steps = None if same_run else memory.metadata.get("steps")  # that `remember` wrote
        scale = self.memory_strength / steps if self.memory_strength and steps else 1.0
        # as they are, pages of the file; those kept are copied, for another file may take its place
        self._pending = {n: t if scale == 1 else t * scale for n, t in match.accumulators.items()}
        self._kept = {n: t * scale for n, t in match.kept.items()}
        self._kept_samples = {n: t for n, t in memory.get("samples").items() if n in match.kept}
        if self.memory_strength and not (steps or same_run):
            logger.warning("memory_strength is not used: this memory is not one of `remember`, which has a strength.")
        is_fisher = memory.metadata.get("optimizer", {}).get("power") == 2
        self.fisher_steps = steps * scale if steps and is_fisher else None
        self._description = memory.metadata.get("optimizer", {})
        unfinished = [] if same_run or memory.metadata.get("task") is None else [memory.metadata["task"]]
        self.tasks = [*memory.tasks, *unfinished]
        self.loaded = True
        if where and args.process_index == 0:
            used = f"{len(match.accumulators)} parameters"
            if not match.accumulators or (self.adds_to(args) is None and not self.fisher_steps):
                used = "the method" if known else "nothing"
            # what they know of a task is set when it ends
            learn = [m.name for m in self.methods if m.learns_at_end and type(m).after_task is not Method.after_task]
            if unfinished and learn:
                match.notes.append(
                    f"the training on {unfinished[0]} was not finished, and {', '.join(learn)} learned nothing from it"
                )
            notes = "".join(f"; {note}" for note in match.notes)
            logger.warning(
                f"Going on from the continual memory of {', '.join(self.tasks) or 'an earlier run'} in {where}: it is "
                f"used for {used}{notes}."
            )
            own = ("accumulator", "samples", "head.", "initial_head", *(f"{m.name}." for m in self.methods))
            if others := [k for k in memory.kinds() if not k.startswith(own)]:
                logger.warning(f"It also holds {shorten(others)}, which this run does not use.")

    def _check_power(self, memory: ContinualMemory, args: Any) -> None:
        stored, power = memory.metadata.get("optimizer", {}).get("power"), self.adds_to(args)
        if memory.get("accumulator") and None not in (stored, power) and stored != power:
            classp = isinstance(self.optimizer, CLASSP) or (self.optimizer is None and args.optim == CLASSP_NAME)
            remedy = f"optim_args='power={stored:g}'" if classp else f"memory_power={stored:g}"
            raise ValueError(f"The continual memory sums |g|^{stored:g}, and this run |g|^{power:g}. Pass {remedy}.")

    def reset(self) -> None:
        """Forget all that is known of a model: another one is going to be trained."""
        self.loaded, self.tasks, self._pending, self._gathered = False, [], None, {}
        self._kept, self._kept_samples = {}, {}
        for method in self.methods:
            method.load_state_dict({})

    def forget_accumulators(self) -> None:
        """Drop what was loaded and is not in an optimizer yet, and what is in the last one."""
        self._pending = self.optimizer = None

    def memory(self, args: Any = None) -> ContinualMemory:
        """The memory as it stands. If it is sharded, call it on every rank, each of which then has all of it."""
        memory = ContinualMemory(metadata=self._metadata(args))
        for kind, tensors in self._parts():
            memory.put(kind, tensors)
        return memory

    def _parts(self) -> list[tuple[str, Mapping[str, Tensor]]]:
        """Kinds of tensors with their tensors by name, whole or sharded."""
        parts: list[tuple[str, Mapping[str, Tensor]]] = [
            ("accumulator", self._kept),
            ("accumulator", self.accumulators()),
        ]
        for method in self.methods:
            parts += [(f"{method.name}.{part}", tensors) for part, tensors in method.state_dict().items()]
        if self.heads is not None:
            parts += [(f"head.{task.replace('/', '%2F')}", head) for task, head in self.heads.state_dict().items()]
            parts.append(("initial_head", self.heads.initial))
        if any(tensors for _, tensors in parts) and self.model is not None:
            parts.append(("samples", self._kept_samples))
            parts.append(("samples", samples(self.model) if self.samples is None else self.samples))
        return parts

    def _metadata(self, args: Any) -> dict[str, Any]:
        unfinished = {} if self.context is None else {"task": self.context.task}
        return unfinished | {
            "tasks": list(self.tasks),
            "optimizer": self._described(args),
            "method": public_arguments(describe_methods(self.methods)),
        }

    def _described(self, args: Any) -> dict[str, Any]:
        """The optimizer's hyperparameters, with the power of the accumulators; without one those of the last."""
        if self.optimizer is None:
            return self._description
        power = self.adds_to(args)
        read = {k: v for k, v in self._description.items() if k in ("power", "state_dtype")}  # carried along
        return describe_optimizer(self.optimizer) | (read if power is None else {"power": power})

    def write(self, folder: str | Path, args: Any = None) -> None:
        """Write the memory into `folder`, from the main process, tensor by tensor: nothing makes a whole one of it. If
        the model is sharded, call it on every rank."""
        parts = [(kind, tensors) for kind, tensors in self._parts() if tensors]
        if parts or self.tasks or self.context is not None:
            write_memory(folder, parts, self._metadata(args), args is None or args.should_save)

    def put(self, args: Any, in_optimizer: bool) -> None:
        """Put what was loaded into the optimizer, or beside it, now that every wrapper (DDP, FSDP2, PEFT) is on.

        Args:
            in_optimizer: Trainer has loaded the optimizer's state already.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if self.zero is not None:
            if not in_optimizer:
                set_accumulators(self.zero, self.model, pending)
            return
        is_classp = isinstance(self.optimizer, CLASSP)
        self._gathered = {}
        carried = not is_classp and self.adds_to(args) is None  # nothing is added to it: the device keeps none
        for n, p in trainable_parameters(self.model) if not (is_classp and in_optimizer) else ():
            if carried and n in pending:
                self._gathered[n] = pending.pop(n).clone()
            elif n in pending:
                s = like_parameter(pending.pop(n), p.detach(), torch.float32)
                if is_classp:
                    self.optimizer.set_accumulator(p, s)
                else:
                    self._gathered[n] = s

    def gather_step(self, found_inf: Tensor | None) -> None:
        """`s <- s + |g|^p`, unless a gradient of this step is not finite or its power would not be."""
        named = [
            (n, p, local(p.grad).float())
            for n, p in trainable_parameters(self.model)
            if p.grad is not None and n not in self.excluded
        ]
        if not named:
            return
        device = named[0][1].device
        limit = (torch.finfo(torch.float32).max * 2**-24) ** (1 / self.power)
        sizes = [torch.linalg.vector_norm(g, torch.inf).to(device) for *_, g in named if g.numel()]
        bad = (~(torch.stack(sizes) <= limit)).any().float() if sizes else torch.zeros((), device=device)
        if found_inf is not None:
            bad = bad + found_inf.to(device).sum()
        if reshard(self.model):  # one verdict on all ranks
            bad = reduce(bad, "sum")
        for n, p, g in named:
            s = self._gathered.get(n)
            if s is None:
                s = torch.zeros_like(p, dtype=torch.float32)
            elif s.device != p.device or type(s) is not type(p.detach()):
                s = like_parameter(s, p.detach(), torch.float32)
            g = torch.where(bad.to(p.device) > 0, 0.0, g)
            local(s).add_(g.square() if self.power == 2 else g.abs().pow_(self.power))
            self._gathered[n] = s


def check_strength(strength: float | None) -> float | None:
    """`memory_strength` as it was given, or a ValueError."""
    if strength is not None and not 0 < strength < float("inf"):
        raise ValueError(f"memory_strength is in steps' worth and must be > 0, got {strength}")
    return strength


def describe_optimizer(optimizer: Any) -> dict[str, Any]:
    """Name and hyperparameters of an optimizer, for JSON; `lr` as it was before any schedule."""
    kinds = (int, float, str, bool, tuple, type(None))
    values = {k: v for k, v in optimizer.defaults.items() if isinstance(v, kinds)}
    return {"name": type(optimizer).__name__, **values, **first_rate(optimizer)}


def first_rate(optimizer: Any) -> dict[str, float]:
    """`{"lr": ...}` of the first group, before any schedule; empty for an optimizer without one."""
    group = optimizer.param_groups[0]
    return {"lr": float(group.get("initial_lr", group["lr"]))} if "lr" in group else {}
