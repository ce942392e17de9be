"""The engine: one callback that does all that happens to a memory and a method while any Trainer trains."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .compat import refuse_sharding, watch_saving
from .live import CLASSP_LEARNING_RATE, CLASSP_NAME, LiveMemory, check_strength, describe_optimizer
from .memory import MEMORY_NAME, ContinualMemory, NoMemoryError, find_memory
from .methods import Context, Elastic, Merge, Method, make_methods
from .names import bare_model, model_source, reshard, samples, trainable_parameters
from .optim import CLASSP
from .optim_args import parse_optim_args
from .redaction import UNPRINTABLE
from .remember import PRETRAINED, pretrained_memory
from .resume import load_optimizer_state

logger = logging.get_logger(__name__)

BESIDE, NONE = "beside the model", "none"
TOO_SMALL = 1e-4
"""Learning rates up to here are those of AdamW; Transformers' default is 5e-5, TRL's 2e-5. CLASSP learns nothing by
them."""

# Where a model keeps the engine that trained it last in this process: a second Trainer goes on from its memory.
_ATTRIBUTE = "_continual_engine"


class ContinualCallback(LiveMemory, TrainerCallback):
    """Makes the trainings of any [`transformers.Trainer`] continual learning: each goes on from the memory of the
    last.

    When training begins, the memory is found and put into the optimizer; under other optimizers than CLASSP it is
    gathered beside them, if a method reads it. The method adds its gradients to every step that is really taken. The
    memory is written where the model is: into every checkpoint, into `output_dir` when training ends, and into every
    folder that `save_pretrained` is given afterwards. Under another optimizer and without a method nothing happens.

    `classp_hf.register` gives one to every Trainer of the process; `ContinualTrainer` has its own.

    Args:
        method: a [`~classp_hf.methods.Method`], the name of one, or several (`"ewc+elastic"`, a list). Methods that
            change the data or the loss need [`ContinualTrainer`].
        memory: a file, the folder of a model saved with one, a Hub id, `"none"` for an empty one; `"pretrained"` for
            that of the model as it is loaded, if it has none ([`remember.pretrained_memory`]). Default: the memory
            beside the model, wherever it was loaded from.
        memory_strength: steps' worth that a memory of `remember` counts: its accumulators are scaled so that their
            mean is that of so many steps. Default: as many as it is of.
        revision: branch, tag or commit of a Hub repository given as `memory`.
        gather: keep a memory under other optimizers than CLASSP too, even if no method reads it.
        power: the p of the gathered `sum |g|^p`; CLASSP has its own.

    Raises:
        ValueError: an unknown method; when training begins, a memory of another power or another model, and a method
            that cannot run in this set-up.
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
        memory_strength: float | None = None,
    ) -> None:
        options = {} if method or memory or gather else type(self).launched
        self.from_launcher = bool(options)
        super().__init__(make_methods(copy.deepcopy(options.get("method", method))), gather, power)
        self.source = options.get("memory") or memory or BESIDE
        self.memory_strength = check_strength(options.get("memory_strength", memory_strength))
        self.options = options
        self.revision = revision
        self.task: str | None = None
        """Name of the next training's task. Default: after its output folder."""
        self.task_dataset: Any = None
        self.accelerator: Any = None
        self.start: dict[str, Tensor] | None = None
        """Weights that a training began with, on the CPU, for the methods that need them when it is resumed."""
        self.checkpoint: Path | None = None
        """What training is resumed from. Default: the checkpoint of the present step."""
        self.optimizer_file: Path | None = None
        """State of the optimizer at a task boundary, for the next training."""
        self.saves_at_end = True
        self.seconds = 0.0
        """Spent on methods before and after tasks."""
        self.args: Any = None
        self.control: Any = None
        self._hooks: list[Any] = []
        self._density: float | None = None
        self._written: set[Path] = set()

    @property
    def training(self) -> bool:
        return self.context is not None

    def __deepcopy__(self, memo: Any) -> None:
        """A copied or pickled model has no engine."""

    def __reduce__(self) -> Any:
        return type(None), ()

    # ---- The memory ----

    def follows(self, model: Any) -> bool:
        """Whether the memory is written wherever `model.save_pretrained` writes the model."""
        return engine_of(model) is self and not reshard(model) and hasattr(model, "save_pretrained")

    # ---- Events of Trainer ----

    def on_init_end(self, args, state, control, model=None, **kwargs):
        given = {
            k: self.options[k] for k in ("optim", "learning_rate", "optim_args") if self.options.get(k) is not None
        }
        for name, value in given.items():
            setattr(args, name, value)
        if given and args.process_index == 0:
            logger.warning(f"From the command line of classp_hf: {', '.join(f'{k}={v}' for k, v in given.items())}.")
        if args.optim == CLASSP_NAME:
            self._read_old_keys(args)
        if model is not None and any(m.needs_start for m in self.methods):  # before a checkpoint is loaded into it
            self.start = {n: p.detach().to("cpu", copy=True) for n, p in trainable_parameters(model)}

    def _read_old_keys(self, args: Any) -> None:
        old_keys = parse_optim_args(args.optim_args)[1]  # checks all of them, before any training time is lost
        if old_keys:
            logger.warning(
                f"{', '.join(old_keys)} in --optim_args are read for the last time in this version. Pass --memory, "
                "--anchor and --merge to `python -m classp_hf`, or memory= and method= to a trainer."
            )
        if self.source == BESIDE:
            self.source = old_keys.get("memory", BESIDE)
        own = {m.name for m in self.methods}
        for cls, key in ((Elastic, "anchor_strength"), (Merge, "merge_weight")):
            if old_keys.get(key) and cls.name not in own:
                self.methods.append(cls(old_keys[key]))

    def on_train_begin(
        self, args, state, control, model=None, optimizer=None, processing_class=None, train_dataloader=None, **kwargs
    ):
        optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        previous = engine_of(model)
        if previous is not None and previous is not self and previous.training:
            if previous.control is control and previous.methods and not previous.from_launcher:
                return  # two on one Trainer: that with a method works
            previous.stop()  # also one whose training was interrupted
            if (
                previous.control is control
                and self.source not in (BESIDE, PRETRAINED)
                and isinstance(optimizer, CLASSP)
            ):
                optimizer.state.clear()  # that engine has put another memory into it
        self.control = control
        ContinualCallback.applied |= self.from_launcher
        is_classp, resumed = isinstance(optimizer, CLASSP), state.global_step > 0
        if self.options.get("optim") == CLASSP_NAME and not is_classp:
            raise ValueError(
                f"--optim classp was given to classp_hf, but this script brings an optimizer of its own "
                f"({type(optimizer).__name__}). Leave --optim out, or the script's `optimizers`."
            )
        _check_resumed_state(optimizer, resumed)
        if self.args is not None and self.model is not model:  # `model_init` has made another one
            self.reset()
        self.optimizer, self.args, self.model, self.samples = optimizer, args, model, None
        if not (is_classp or self.methods or self.gather or self.accelerator is not None):
            self._note_unused_memory(model)
            return
        refuse_sharding(args, model)
        if not hasattr(optimizer, "register_step_pre_hook"):
            raise ValueError(f"{type(optimizer).__name__} is no torch.optim.Optimizer, and so has no step to follow.")
        if is_classp and args.learning_rate <= TOO_SMALL:
            logger.warning(
                f"CLASSP trains with learning_rate={args.learning_rate:g}, which is far too small for it (AdamW's "
                f"are). Pass --learning_rate; {CLASSP_LEARNING_RATE} is a good start."
            )
        self._find(model, args, state, previous, resumed, processing_class)
        self.put(resumed and is_classp)
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
            max_steps=state.max_steps,
            fisher_steps=self.fisher_steps,
            start=self._starting_weights() if resumed else None,
        )
        self.check(self.context)
        started = time.monotonic()
        for method in self.methods:
            method.before_task(self.context)
        self.seconds += time.monotonic() - started
        self.stop_hooks()
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step(args, state)),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    def check(self, context: Context) -> None:
        """Raise a ValueError if a method cannot run in this set-up."""
        for method in self.methods:
            method.check(context, [m for m in self.methods if m is not method])
            if context.accelerator is None and method.needs_trainer():
                raise ValueError(
                    f"The method {method.name!r} changes the data, the model or the loss, which a callback cannot. "
                    "Use it with classp_hf.ContinualTrainer."
                )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and self._density is not None and "loss" in logs:
            logs.setdefault("update_density", self._density)

    def on_save(self, args, state, control, **kwargs):
        folder = self.folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.training and not state.is_hyper_param_search and folder not in self._written:
            self.write(folder, args)
        self._written.clear()

    def on_push_begin(self, args, state, control, **kwargs):
        if self.training and not reshard(self.model):  # of a checkpoint, by the main process alone
            self.write(args.output_dir, args)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.context is None:
            return
        if state.is_hyper_param_search:  # a trial is no task
            self.stop()
            return
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if (
            best is not None and (Path(best) / MEMORY_NAME).is_file()
        ):  # what belongs to the weights comes back with them
            self.load(ContinualMemory.load(best), model, args, same_run=True)
            self.put(False)
        started = time.monotonic()
        for method in self.methods:
            method.after_task(self.context)
        self.seconds += time.monotonic() - started
        if self.context.task not in self.tasks:
            self.tasks.append(self.context.task)
        self.stop()
        self.samples = samples(self.model)
        if not isinstance(self.optimizer, CLASSP):  # which holds the memory; others only memory of the device
            self._description, self.optimizer = describe_optimizer(self.optimizer, args) | self._power(args), None
        if self.saves_at_end:
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
        self._density = self.start = self.checkpoint = self.context = None
        self.stop_hooks()

    def stop_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # ---- Steps ----

    @torch.no_grad()
    def _before_step(self, args: Any, state: Any) -> None:
        """Before a step that is really taken: gradients are clipped, averaged over ranks and, from here on,
        unscaled."""
        scale, found = (getattr(self.optimizer, name, None) for name in ("grad_scale", "found_inf"))
        if scale is not None:  # torch's fused optimizers unscale by themselves
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.div_(scale)
            self.optimizer.grad_scale = None
        if self.gathers(args):
            self.gather_step(found)
        for method in self.methods:
            method.before_step(self.model)
        if isinstance(self.optimizer, CLASSP):
            step, every = state.global_step + 1, max(state.logging_steps, 1)
            logs = args.logging_strategy == "steps" and (step % every == 0 or (step == 1 and args.logging_first_step))
            self._density = self.optimizer.update_density() if logs else None

    def _after_step(self) -> None:
        for method in self.methods:
            method.after_step(self.model)

    # ---- Where the memory comes from, and where it goes ----

    def _find(self, model: Any, args: Any, state: Any, previous: Any, resumed: bool, tokenizer: Any) -> None:
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
                    f"{', '.join(m.name for m in self.methods)} is not known. Pass the checkpoint as "
                    "--resume_from_checkpoint."
                )
        if self.loaded:
            return
        self.loaded = True
        known = " (memory='pretrained' is for models that have none)" if self.source == PRETRAINED else ""
        follows = self.source == BESIDE or (self.source == PRETRAINED and previous is not None and previous.tasks)
        if previous is not None and previous is not self and follows:
            self.load(previous.memory(), model, args, where=f"this process (the model was trained in it){known}")
            return
        start = model_source(model)
        memory, where = None, repr(self.source)
        if self.source not in (BESIDE, NONE, PRETRAINED):
            memory = ContinualMemory.load(self.source, self.revision)
        elif self.source != NONE and start:
            memory = _beside(start, getattr(getattr(bare_model(model), "config", None), "_commit_hash", None))
            where = f"{start!r}{known}"
        if self.source == PRETRAINED and memory is None:
            power = self.optimizer.param_groups[0]["power"] if isinstance(self.optimizer, CLASSP) else self.power
            memory = pretrained_memory(model, tokenizer, power, args.local_process_index == 0)
            where = f"{start or 'this model'!r} as it was loaded (memory='pretrained')"
        if memory is not None:
            self.load(memory, model, args, where=where)
        elif args.process_index == 0 and self.source == BESIDE:
            logger.warning(f"There is no continual memory beside {start or 'this model'!r}: this run begins one.")

    def _starting_weights(self) -> dict[str, Tensor]:
        if self.start is not None or not any(m.needs_start for m in self.methods):
            return self.start or {}
        raise ValueError(
            "A resumed run needs the weights it began with, which a callback added after Trainer was built has not "
            "seen. Pass it in Trainer's `callbacks`."
        )

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


def _check_resumed_state(optimizer: Any, resumed: bool) -> None:
    states = [state for state in getattr(optimizer, "state", {}).values() if state] if resumed else []
    written_by_classp = any("accumulator" in state for state in states)
    if states and written_by_classp != isinstance(optimizer, CLASSP):
        raise ValueError(
            f"The checkpoint was written under {'CLASSP' if written_by_classp else 'another optimizer'}, and this "
            f"run's is {type(optimizer).__name__}. Resume with the same --optim, or start a new run from the "
            "checkpoint's model."
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
        engine._written.add(Path(folder))
