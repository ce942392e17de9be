"""The engine: one callback that does all that happens to a memory and a method while any Trainer trains."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import reduce
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .compat import watch_saving
from .heads import TaskHeads
from .memory import (
    MEMORY_NAME,
    ContinualMemory,
    NoMemoryError,
    find_memory,
    match_accumulators,
    match_rows,
    shorten,
)
from .methods import Context, Elastic, Merge, Method, describe_methods, make_methods
from .names import (
    bare_model,
    canonical_name,
    full_tensor,
    like_parameter,
    local,
    model_source,
    reshard,
    samples,
    trainable_parameters,
)
from .optim import CLASSP
from .optim_args import parse_optim_args
from .redaction import UNPRINTABLE, public_arguments
from .resume import load_optimizer_state

logger = logging.get_logger(__name__)

CLASSP_NAME = "classp"
CLASSP_LEARNING_RATE: float = inspect.signature(CLASSP).parameters["lr"].default
BESIDE, NONE = "beside the model", "none"
TOO_SMALL = 1e-4
"""Learning rates up to here are those of AdamW; Transformers' default is 5e-5, TRL's 2e-5. CLASSP learns nothing by them."""

# Where a model keeps the engine that trained it last in this process: a second Trainer goes on from its memory.
_ATTRIBUTE = "_continual_engine"


class ContinualCallback(TrainerCallback):
    """Makes the trainings of any [`transformers.Trainer`] continual learning: each goes on from the memory of the last.

    When training begins, the memory is found and put into the optimizer; under other optimizers than CLASSP it is
    gathered beside them, if a method reads it. The method adds its gradients to every step that is really taken. The
    memory is written where the model is: into every checkpoint, into `output_dir` when training ends, and into every
    folder that `save_pretrained` is given afterwards. Under another optimizer and without a method nothing happens.

    `classp_hf.register` gives one to every Trainer of the process; `ContinualTrainer` has its own.

    Args:
        method: a [`~classp_hf.methods.Method`], the name of one, or several (`"ewc+elastic"`, a list). Methods that change
            the data or the loss need [`ContinualTrainer`].
        memory: a file, the folder of a model saved with one, a Hub id, `"none"` for an empty one. Default: the memory beside
            the model, wherever it was loaded from.
        revision: branch, tag or commit of a Hub repository given as `memory`.
        gather: keep a memory under other optimizers than CLASSP too, even if no method reads it.
        power: the p of the gathered `sum |g|^p`; CLASSP has its own.

    Raises:
        ValueError: an unknown method; when training begins, a memory of another power or another model, and a method that
            cannot run in this set-up.
    """

    launched: ClassVar[dict[str, Any]] = {}
    """Arguments of `register`, which Trainer cannot pass on."""
    applied: ClassVar[bool] = False
    """Whether any training of this process began with them."""

    def __init__(
        self,
        method: Method | str | Sequence[Method | str] | None = None,
        memory: str | None = None,
        *,
        revision: str | None = None,
        gather: bool = False,
        power: float = 2.0,
    ) -> None:
        options = {} if method or memory or gather else type(self).launched
        self.from_launcher = bool(options)
        self.methods = make_methods(copy.deepcopy(options.get("method", method)))
        self.source = options.get("memory") or memory or BESIDE
        self.options = options
        self.revision, self.gather, self.power = revision, gather, power
        self.tasks: list[str] = []
        """Names of the tasks seen so far."""
        self.task: str | None = None
        """Name of the next training's task. Default: after its output folder."""
        self.task_dataset: Any = None
        self.accelerator: Any = None
        self.heads: TaskHeads | None = None
        self.start: dict[str, Tensor] | None = None
        """Weights that a resumed training began with. Default: read again from where the model came from."""
        self.checkpoint: Path | None = None
        """What training is resumed from. Default: the checkpoint of the present step."""
        self.optimizer_file: Path | None = None
        """State of the optimizer at a task boundary, for the next training."""
        self.writes_at_end = True
        self.seconds = 0.0
        """Spent on methods before and after tasks."""
        self.optimizer: Any = None
        self.args: Any = None
        self.context: Context | None = None
        """While training."""
        self.training = False
        self._loaded = False
        self._pending: dict[str, Tensor] | None = None
        self._gathered: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._description: dict[str, Any] = {}
        self._hooks: list[Any] = []
        self._density: float | None = None
        self._written: set[tuple[str, int]] = set()

        self.model: Any = None

    def __deepcopy__(self, memo: Any) -> None:
        """A copied or pickled model has no engine."""

    def __reduce__(self) -> Any:
        return type(None), ()

    # ---- The memory ----

    @property
    def excluded(self) -> frozenset[str]:
        return self.heads.names if self.heads is not None else frozenset()

    def gathers(self, args: Any) -> bool:
        """Whether a memory is gathered beside the optimizer."""
        own = isinstance(self.optimizer, CLASSP) or (self.optimizer is None and args.optim == CLASSP_NAME)
        return not own and (self.gather or any(m.uses_accumulators for m in self.methods))

    def accumulators(self) -> dict[str, Tensor]:
        """Canonical name -> `sum |g|^p` over all training so far, float32, sharded as the parameters are; empty before any.

        Of other optimizers than CLASSP these are the tensors that change while training.
        """
        if self._pending is not None:
            return dict(self._pending)
        if not isinstance(self.optimizer, CLASSP):
            return dict(self._gathered)
        state = self.optimizer.state
        named = [(n, p) for n, p in trainable_parameters(self.model) if n not in self.excluded and state.get(p)]
        return {n: self.optimizer.accumulator(p) for n, p in named}

    def load(self, memory: ContinualMemory, model: Any, args: Any, *, same_run: bool = False, where: str = "") -> None:
        """Go on from `memory`: the methods' state at once, accumulators when training begins.

        Args:
            same_run: it is that of a checkpoint or a task boundary of this very run.
            where: it comes from, for messages.

        Raises:
            ValueError: another power, another model, or a state that cannot be a method's.
        """
        at = f"\nThe memory was read from {where}; memory=none begins with an empty one." if where else ""
        try:
            self._check_power(memory, args)
            match = match_accumulators(memory, model, self.excluded, same_run)
            for method in self.methods:
                prefix = f"{method.name}."
                parts = {k.removeprefix(prefix): memory.get(k) for k in memory.kinds() if k.startswith(prefix)}
                for part in method.per_parameter:
                    parts |= {part: match_rows(parts[part], model, part == "importance")} if part in parts else {}
                method.check_state(parts, model)
                if parts or same_run:
                    method.load_state_dict(parts)
            if self.heads is not None:
                heads = {k.removeprefix("head."): memory.get(k) for k in memory.kinds() if k.startswith("head.")}
                self.heads.load_state_dict({task.replace("%2F", "/"): head for task, head in heads.items()})
                self.heads.initial = memory.get("initial_head") or self.heads.initial
        except ValueError as error:
            raise ValueError(f"{error}{at}") from None
        self._pending, self._kept = match.accumulators, match.kept
        self._description = memory.metadata.get("optimizer", {})
        unfinished = [] if same_run or memory.metadata.get("task") is None else [memory.metadata["task"]]
        self.tasks = [*memory.tasks, *unfinished]
        self._loaded = True
        if where:
            known = f"{len(match.accumulators)} parameters" if match.accumulators else "the method"
            notes = "".join(f"; {note}" for note in match.notes)
            logger.warning(
                f"Going on from the continual memory of {', '.join(self.tasks) or 'an earlier run'} in {where}: it is used "
                f"for {known}{notes}."
            )
            used = ("accumulator", "samples", "head.", "initial_head", *(f"{m.name}." for m in self.methods))
            if others := [k for k in memory.kinds() if not k.startswith(used)]:
                logger.warning(f"It also holds {shorten(others)}, which this run does not use.")

    def forget_accumulators(self) -> None:
        """Drop what was loaded and is not in an optimizer yet."""
        self._pending = None

    def _check_power(self, memory: ContinualMemory, args: Any) -> None:
        stored = memory.metadata.get("optimizer", {}).get("power")
        power: float | None = self.power if self.gathers(args) else None
        if isinstance(self.optimizer, CLASSP):
            power = self.optimizer.param_groups[0]["power"]
        elif self.optimizer is None and args.optim == CLASSP_NAME:
            power = parse_optim_args(args.optim_args)[0].get("power", 2.0)
        if memory.get("accumulator") and None not in (stored, power) and stored != power:
            remedy = f"memory_power={stored:g}" if self.gathers(args) else f"optim_args='power={stored:g}'"
            raise ValueError(f"The continual memory sums |g|^{stored:g}, and this run |g|^{power:g}. Pass {remedy}.")

    def memory(self, args: Any = None) -> ContinualMemory:
        """The memory as it stands. If the model is sharded, call it on every rank."""
        memory = ContinualMemory()
        memory.put("accumulator", self._kept)
        memory.put("accumulator", {n: full_tensor(t) for n, t in self.accumulators().items()})
        for method in self.methods:
            for part, tensors in method.state_dict().items():
                memory.put(f"{method.name}.{part}", {n: full_tensor(t) for n, t in tensors.items()})
        if self.heads is not None:
            for task, head in self.heads.state_dict().items():
                memory.put(f"head.{task.replace('/', '%2F')}", head)
            memory.put("initial_head", self.heads.initial)
        if memory.tensors and self.model is not None:
            memory.put("samples", samples(self.model))
        described = describe_optimizer(self.optimizer, args) or self._description
        if self._gathered:
            described["power"] = self.power
        memory.metadata = {
            "tasks": list(self.tasks),
            "optimizer": described,
            "method": public_arguments(describe_methods(self.methods)),
        }
        if self.training and self.context is not None:
            memory.metadata["task"] = self.context.task
        return memory

    def follows(self, model: Any) -> bool:
        """Whether the memory is written wherever `model.save_pretrained` writes the model."""
        return engine_of(model) is self and not reshard(model) and hasattr(model, "save_pretrained")

    def write(self, folder: str | Path, args: Any = None) -> None:
        """Write the memory into `folder`, from the main process. If the model is sharded, call it on every rank."""
        memory = self.memory(args)
        if (memory.tensors or self.tasks) and (args is None or args.should_save):
            memory.save(folder)

    # ---- Events of Trainer ----

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if self.options.get("optim"):
            args.optim = self.options["optim"]
        if self.options.get("learning_rate"):
            args.learning_rate = self.options["learning_rate"]
        applied = {k: v for k, v in self.options.items() if k in ("optim", "learning_rate", "optim_args") and v}
        if self.options.get("optim_args"):
            args.optim_args = self.options["optim_args"]
        if applied and args.process_index == 0:
            logger.warning(f"From the command line of classp_hf: {', '.join(f'{k}={v}' for k, v in applied.items())}.")
        if args.optim == CLASSP_NAME:
            uses = parse_optim_args(args.optim_args)[1]  # checks all of them, before any training time is lost
            if uses:
                logger.warning(
                    f"{', '.join(uses)} in --optim_args are read for the last time in this version. Pass --memory, --anchor "
                    "and --merge to `python -m classp_hf`, or memory= and method= to a trainer."
                )
            if self.source == BESIDE and "memory" in uses:
                self.source = uses["memory"]
            own = {m.name for m in self.methods}
            for cls, key in ((Elastic, "anchor_strength"), (Merge, "merge_weight")):
                if uses.get(key) and cls.name not in own:
                    self.methods.append(cls(uses[key]))

    def on_train_begin(
        self, args, state, control, model=None, optimizer=None, processing_class=None, train_dataloader=None, **kwargs
    ):
        optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        previous = engine_of(model)
        if previous is not None and previous is not self and previous.training:
            if not previous.from_launcher and type(previous) is ContinualCallback and previous.methods:
                return  # two on one Trainer: that with a method works
            previous.stop()
        ContinualCallback.applied |= self.from_launcher
        is_classp, resumed = isinstance(optimizer, CLASSP), state.global_step > 0
        if self.options.get("optim") == CLASSP_NAME and not is_classp:
            raise ValueError(
                f"--optim classp was given to classp_hf, but this script brings an optimizer of its own "
                f"({type(optimizer).__name__}). Leave --optim out, or the script's `optimizers`."
            )
        _check_resumed_state(optimizer, resumed)
        same = optimizer is self.optimizer and self._loaded  # a second training of one Trainer
        self.optimizer, self.args = optimizer, args
        self.model = model
        if not (is_classp or self.methods or self.gather or self.accelerator is not None):
            self._note_unused_memory(model)
            return
        if is_classp and optimizer.param_groups[0]["lr"] is not None and args.learning_rate <= TOO_SMALL:
            logger.warning(
                f"CLASSP trains with learning_rate={args.learning_rate:g}, which is far too small for it (AdamW's are). Pass "
                f"--learning_rate; {CLASSP_LEARNING_RATE} is a good start."
            )
        self._find(model, args, state, same, previous, resumed)
        self._put(resumed and is_classp)
        if self.optimizer_file is not None and not resumed:
            load_optimizer_state(optimizer, model, torch.load(self.optimizer_file, "cpu", weights_only=True))
            if self.heads is not None:
                self.heads.forget_optimizer_state(optimizer)
        self.optimizer_file = None
        vars(bare_model(model))[_ATTRIBUTE] = self
        for saved in {id(m): m for m in (model, bare_model(model))}.values():
            watch_saving(saved, write_beside)
        dataset = getattr(train_dataloader, "dataset", None)
        self.context = Context(
            model=model,
            args=args,
            seen_tasks=list(self.tasks),
            accumulators=self.accumulators,
            optimizer=optimizer,
            task=self.task or self._unused_name(args),
            train_dataset=dataset,
            task_dataset=dataset if self.task_dataset is None else self.task_dataset,
            collate=getattr(train_dataloader, "collate_fn", None),
            processing_class=processing_class,
            accelerator=self.accelerator,
            per_task_heads=self.heads is not None,
            start=self._starting_weights(model) if resumed else None,
        )
        self.check(self.context)
        started = time.monotonic()
        for method in self.methods:
            method.before_task(self.context)
        self.seconds += time.monotonic() - started
        self.training = True
        if not hasattr(optimizer, "register_step_pre_hook"):
            raise ValueError(f"{type(optimizer).__name__} is no torch.optim.Optimizer; use one, or --optim classp.")
        self.stop_hooks()
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step(args, state)),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    def check(self, context: Context) -> None:
        """Raise a ValueError if a method cannot run in this set-up."""
        for method in self.methods:
            method.check(context, [m for m in self.methods if m is not method])
            missing = [h for h in ("extend_train_dataset", "prepare_model", "adjust_logits", "loss_term")]
            if context.accelerator is None and any(method.overrides(h) for h in missing):
                raise ValueError(
                    f"The method {method.name!r} changes the data, the model or the loss, which a callback cannot. Use it with "
                    "classp_hf.ContinualTrainer."
                )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and self._density is not None and "loss" in logs:
            logs.setdefault("update_density", self._density)

    def on_save(self, args, state, control, **kwargs):
        folder = self.folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.training and not state.is_hyper_param_search and (str(folder), state.global_step) not in self._written:
            self.write(folder, args)

    def on_push_begin(self, args, state, control, **kwargs):
        if self.training and not reshard(self.model):  # of a checkpoint, by the main process alone
            self.write(args.output_dir, args)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if not self.training or self.context is None:
            return
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and (Path(best) / MEMORY_NAME).is_file():  # what belongs to the weights comes back with them
            self.load(ContinualMemory.load(best), model, args, same_run=True)
            self._put(False)
        started = time.monotonic()
        for method in self.methods:
            method.after_task(self.context)
        self.seconds += time.monotonic() - started
        if self.context.task not in self.tasks:
            self.tasks.append(self.context.task)
        self.stop()
        if self.writes_at_end and not state.is_hyper_param_search:
            self.write(self.folder(args), args)
            if args.process_index == 0:
                logger.warning(
                    f"The continual memory of {', '.join(self.tasks)} is written to {self.folder(args) / MEMORY_NAME}."
                )

    def folder(self, args: Any) -> Path:
        """The folder of the present training."""
        return Path(args.output_dir)

    def stop(self) -> None:
        """Training has ended, or another engine takes over."""
        self.training, self._density, self.start, self.checkpoint, self.context = False, None, None, None, None
        self.stop_hooks()

    def stop_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # ---- Steps ----

    @torch.no_grad()
    def _before_step(self, args: Any, state: Any) -> None:
        """Before a step that is really taken: gradients are clipped, averaged over ranks and, from here on, unscaled."""
        scale, found = (getattr(self.optimizer, name, None) for name in ("grad_scale", "found_inf"))
        if scale is not None:  # torch's fused optimizers unscale by themselves
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.div_(scale)
            self.optimizer.grad_scale = None
        if self.gathers(args):
            self._gather(found)
        for method in self.methods:
            method.before_step(self.model)
        if isinstance(self.optimizer, CLASSP):
            step, every = state.global_step + 1, max(state.logging_steps, 1)
            logs = args.logging_strategy == "steps" and (step % every == 0 or (step == 1 and args.logging_first_step))
            self._density = self.optimizer.update_density() if logs else None

    def _after_step(self) -> None:
        for method in self.methods:
            method.after_step(self.model)

    def _gather(self, found_inf: Tensor | None) -> None:
        """`s <- s + |g|^p`, unless a gradient of this step is not finite or its power would not be."""
        named = [(n, p) for n, p in trainable_parameters(self.model) if p.grad is not None and n not in self.excluded]
        if not named:
            return
        limit = (torch.finfo(torch.float32).max * 2**-24) ** (1 / self.power)
        flags = [(torch.linalg.vector_norm(local(p.grad).float(), torch.inf) <= limit) for _, p in named if local(p.grad).numel()]
        bad = torch.stack([~f.to(named[0][1].device) for f in flags]).any().float() if flags else torch.zeros(())
        if reshard(self.model):  # of all ranks
            bad = reduce(bad.to(named[0][1].device), "sum")
        bad = bad > 0 if found_inf is None else (bad > 0) | (found_inf.to(bad.device).sum() > 0)
        for n, p in named:
            s = self._gathered.get(n)
            if s is None:
                s = torch.zeros_like(p, dtype=torch.float32)
            elif s.device != p.device or type(s) is not type(p.detach()):
                s = like_parameter(s, p.detach(), torch.float32)
            g = torch.where(bad.to(p.device), 0.0, local(p.grad).float())
            local(s).add_(g.square() if self.power == 2 else g.abs().pow_(self.power))
            self._gathered[n] = s

    # ---- Where the memory comes from, and where it goes ----

    def _find(self, model: Any, args: Any, state: Any, same: bool, previous: Any, resumed: bool) -> None:
        """Read the memory that this training goes on from."""
        if resumed:
            given = args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else None
            step = self.folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            for folder in (self.checkpoint, Path(given) if given else None, step):
                if folder is not None and (folder / MEMORY_NAME).is_file():
                    self.load(ContinualMemory.load(folder), model, args, same_run=True)
                    return
            if self.methods:
                raise ValueError(
                    f"The resumed checkpoint's {MEMORY_NAME} is not in {step}, so the state of "
                    f"{', '.join(m.name for m in self.methods)} is not known. Pass the checkpoint as --resume_from_checkpoint."
                )
        if same or self._loaded:
            return
        self._loaded = True
        if previous is not None and previous is not self and self.source == BESIDE:
            self.load(previous.memory(), model, args, where="this process (another Trainer trained the model)")
            return
        start = model_source(model)
        memory = None
        if self.source not in (BESIDE, NONE):
            memory = ContinualMemory.load(self.source, self.revision)
        elif self.source == BESIDE and start:
            memory = _beside(start, getattr(getattr(bare_model(model), "config", None), "_commit_hash", None))
        if memory is not None:
            self.load(memory, model, args, where=repr(start if self.source == BESIDE else self.source))
        elif args.process_index == 0 and self.source == BESIDE:
            logger.warning(f"There is no continual memory beside {start or 'this model'!r}: this run begins one.")

    def _put(self, in_optimizer: bool) -> None:
        """Put what was loaded into the optimizer, or beside it, now that every wrapper (DDP, FSDP2, PEFT) is on.

        Args:
            in_optimizer: Trainer has loaded the optimizer's state already.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        restored = {
            n: like_parameter(pending[n], p.detach(), torch.float32)
            for n, p in trainable_parameters(self.model)
            if n in pending
        }
        if not isinstance(self.optimizer, CLASSP):
            self._gathered = restored
        elif not in_optimizer:
            for n, p in trainable_parameters(self.model):
                if n in restored:
                    self.optimizer.set_accumulator(p, restored[n])

    def _starting_weights(self, model: Any) -> dict[str, Tensor]:
        if self.start is not None or not any(m.needs_start for m in self.methods):
            return self.start or {}
        bare, source = bare_model(model), model_source(model)
        if not source:
            raise ValueError(
                "A resumed run needs the weights it began with, and the model does not say where it was loaded from."
            )
        fresh = type(bare).from_pretrained(source, config=bare.config, dtype=bare.dtype)
        return {canonical_name(n): p.detach() for n, p in fresh.named_parameters()}

    def _unused_name(self, args: Any) -> str:
        """The output folder's name, with its parents' where earlier tasks have it."""
        parts = [UNPRINTABLE.sub("?", part) for part in Path(args.output_dir).resolve().parts[1:]] or ["root"]
        names = ("/".join(parts[-i:]) for i in range(1, len(parts) + 1))
        return next((name for name in names if name not in self.tasks), f"{parts[-1]}-{len(self.tasks) + 1}")

    def _note_unused_memory(self, model: Any) -> None:
        try:
            path = find_memory(Path(model_source(model) or "/nowhere").absolute())
        except FileNotFoundError:
            return
        logger.warning(
            f"A continual memory lies beside this model ({path}) and is not used: this run's optimizer is "
            f"{type(self.optimizer).__name__} and it has no method. Pass --optim classp or --method to go on from it."
        )



def engine_of(model: Any) -> ContinualCallback | None:
    """The engine that trained `model` last in this process."""
    return vars(bare_model(model)).get(_ATTRIBUTE)


def describe_optimizer(optimizer: Any, args: Any) -> dict[str, Any]:
    """Name and hyperparameters of an optimizer, for JSON; empty for None."""
    if optimizer is None:
        return {}
    kinds = (int, float, str, bool, tuple, type(None))
    values = {k: v for k, v in optimizer.defaults.items() if isinstance(v, kinds)}
    return {"name": type(optimizer).__name__, **values, **({"lr": args.learning_rate} if args is not None else {})}


def _check_resumed_state(optimizer: Any, resumed: bool) -> None:
    states = [state for state in getattr(optimizer, "state", {}).values() if state] if resumed else []
    written_by_classp = any("accumulator" in state for state in states)
    if states and written_by_classp != isinstance(optimizer, CLASSP):
        raise ValueError(
            f"The checkpoint was written under {'CLASSP' if written_by_classp else 'another optimizer'}, and this run's is "
            f"{type(optimizer).__name__}. Resume with the same --optim, or start a new run from the checkpoint's model."
        )


def _beside(start: str, revision: str | None) -> ContinualMemory | None:
    """The memory beside the model that came from `start`, a folder or a Hub repository."""
    found = None
    try:
        found = ContinualMemory.load(start, revision=None if Path(start).is_dir() else revision)
    except NoMemoryError:  # most models have none
        pass
    except FileNotFoundError as error:
        logger.warning(
            f"Whether a continual memory belongs to {start!r} could not be found out, so none is used. {error}"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = [found is not None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, found is not None)
        if any(ranks) and not all(ranks):  # ranks that begin differently would train different models
            raise RuntimeError(f"Only some processes could read the continual memory of {start!r}. Start again.")
    return found


def write_beside(model: Any, folder: str | Path) -> None:
    """Called when `model` was saved into `folder`: its memory belongs there too."""
    engine = engine_of(model)
    if engine is None or engine.model is None or reshard(engine.model):
        return  # of a sharded model the engine's events write it, on every rank
    if engine.args.should_save:
        engine.write(folder, engine.args)
        step = Path(folder).name.rpartition("-")[2]
        if step.isdigit():
            engine._written.add((str(folder), int(step)))
