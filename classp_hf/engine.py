"""The engine: one callback that does all that happens to a memory and a method while any Trainer trains."""

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .compat import refuse_missing_weights, refuse_sharding, scale_loss_once, watch_saving
from .live import BESIDE, CLASSP_LEARNING_RATE, CLASSP_NAME, NONE, LiveMemory, check_strength, first_rate
from .matching import match_rows
from .memory import MEMORY_NAME, ContinualMemory, shorten, warn_of_unused_memory
from .methods import Context, Elastic, Merge, Method, make_methods
from .names import bare_model, full_tensor, local, samples, trainable_parameters, uncompiled_passes
from .optim import CLASSP
from .optim_args import parse_optim_args
from .redaction import UNPRINTABLE
from .remember import PRETRAINED
from .resume import load_optimizer_state
from .zero import check_zero, link, zero_optimizer

logger = logging.get_logger(__name__)

TOO_SMALL = 1e-4
"""Learning rates up to here are those of AdamW; Transformers' default is 5e-5, TRL's 2e-5. CLASSP learns nothing by
them."""

# Where a model keeps the engine that trained it last in this process: a second Trainer goes on from its memory.
_ATTRIBUTE = "_continual_engine"


class ContinualCallback(LiveMemory, TrainerCallback):
    """Continual learning in any [`transformers.Trainer`]: each training goes on from the memory of the last.

    When training begins, the callback finds the memory and puts it into the optimizer; under other optimizers than
    CLASSP it accumulates the memory itself, if a method reads it. The methods add their gradients to every step that
    is not skipped. The callback writes the memory where the model is: into every checkpoint, into `output_dir` when
    training ends, and into every folder that `save_pretrained` is given afterwards. It does nothing under another
    optimizer without a method, unless `gather` is True.

    `classp_hf.register` gives one to every Trainer of the process; `ContinualTrainer` has its own.

    Args:
        method: a [`~classp_hf.methods.Method`], the name of one, or several (`"ewc+elastic"`, a list). Methods that
            change the data or the loss need [`ContinualTrainer`].
        memory: a file, the folder of a model saved with one, a Hub id, or `"none"` for an empty one; `"pretrained"`
            makes one of the loaded causal language model's own samples, if it has none (see `remember`). Default: the
            memory in the folder or Hub repository that the model was loaded from, if any.
        memory_strength: number of training steps, > 0, that a memory of `remember` counts as: its accumulators are
            multiplied by this over its number of batches. Default: that number.
        revision: branch, tag or commit of a Hub repository given as `memory`.
        gather: keep a memory under other optimizers than CLASSP too, even if no method reads it. Default: False.
        power: the p of the gathered `sum |g|^p`, > 0; CLASSP has its own. Default: 2.

    Raises:
        ValueError: an unknown method, `memory_strength` out of range; when training begins, a memory of another power
            or another model, and a method that cannot run in this set-up.
        FileNotFoundError: when training begins, there is no memory at `memory`.
    """

    launched: ClassVar[dict[str, Any]] = {}
    """Arguments of `register`, which Trainer cannot pass on."""
    script: ClassVar[str | None] = None
    """The script that the launcher runs with them."""
    applied: ClassVar[bool] = False
    """Whether any training of this process began with them."""
    reached: ClassVar[bool] = False
    """Whether any Trainer of this process was built."""

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
        self.options = {} if method or memory or gather else type(self).launched
        """Of the launcher, if nothing else was asked for."""
        methods = make_methods(copy.deepcopy(self.options.get("method", method)))
        super().__init__(methods, self.options.get("memory") or memory or BESIDE, revision, gather, power)
        self.memory_strength = check_strength(self.options.get("memory_strength", memory_strength))
        self.task: str | None = None
        """Name of the next training's task. Default: after its output folder."""
        self.task_dataset: Any = None
        self.accelerator: Any = None
        self.start: dict[str, Tensor] | None = None
        """Weights that a training began with, on the CPU, for the methods that need them when it is resumed."""
        self.optimizer_file: Path | None = None
        """State of the optimizer at a task boundary, for the next training."""
        self.brought: Any = None
        """The optimizer that Trainer was given."""
        self.saves_at_end = True
        self.searching = False
        """Whether this training is a trial of a hyperparameter search, which writes no memory."""
        self.seconds = 0.0
        """Spent on methods before and after tasks."""
        self.args: Any = None
        self._hooks: list[Any] = []
        self._not_models: set[Any] = set()
        self._density: float | None = None
        self._written: set[Path] = set()

    def __reduce__(self) -> Any:
        """A copied or pickled model has no engine."""
        return type(None), ()

    def follows(self, model: Any) -> bool:
        """Whether the memory is written wherever `model.save_pretrained` writes the model."""
        return engine_of(model) is self and not self.sharded() and hasattr(model, "save_pretrained")

    # ---- Events of Trainer ----

    def on_init_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.brought = optimizer
        given = {k: v for k, v in self.options.items() if k in ("optim", "learning_rate", "optim_args")}
        for name, value in given.items():
            setattr(args, name, value)
        if given and args.process_index == 0:
            logger.warning(f"From the command line of classp_hf: {', '.join(f'{k}={v}' for k, v in given.items())}.")
        ContinualCallback.reached = True
        if "optim_args" in given and args.optim in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError("--optim_args mean nothing to AdamW, this run's optimizer. Pass --optim classp.")
        if args.optim == CLASSP_NAME:
            self._read_old_keys(args)
        if model is not None and self._in_use(args):
            refuse_missing_weights(model)
        if model is not None:  # before a checkpoint is loaded into it
            self.keep_start(model)

    def on_train(self, trainer: Any) -> None:
        """Called by `Trainer.train`, once `register` was: take the place of other callbacks of this kind.

        Of models that average their loss over the micro-batch the memory would grow with ranks and accumulation steps
        (`averages_loss`).
        """
        for other in list(trainer.callback_handler.callbacks):
            if isinstance(other, ContinualCallback) and other is not self:
                if self.options != other.options and (other.methods or other.source != BESIDE):
                    raise ValueError(
                        "A method or a memory was given to classp_hf, and the script passes a ContinualCallback with "
                        "its own. Leave out one of them."
                    )
                ContinualCallback.applied |= bool(other.options)
                trainer.remove_callback(other)
        brought, described = self.brought, getattr(trainer, "optimizer_cls_and_kwargs", None)
        if brought is not None or described is not None:
            kind, rate = (type(brought), first_rate(brought)) if described is None else described
            wrong = {"learning_rate": rate.get("lr") != self.options.get("learning_rate")}
            if self.options.get("optim") not in (None, CLASSP_NAME):  # of that one see `_check_optimizer`
                wrong["optim"] = kind is not trainer.get_optimizer_cls_and_kwargs(trainer.args)[0]
            if unused := [f"--{name}" for name, is_wrong in wrong.items() if is_wrong and name in self.options]:
                raise ValueError(
                    f"{', '.join(unused)} given to classp_hf cannot be applied: this script brings an optimizer of "
                    f"its own ({kind.__name__}). Leave that out, or the script's `optimizers`."
                )
        if self._in_use(trainer.args):
            scale_loss_once(trainer)

    def keep_start(self, model: Any) -> None:
        """Keep the model's weights, with which a training begins, if a method needs them when it is resumed."""
        if any(m.needs_start for m in self.methods):
            self.start = {n: p.detach().to("cpu", copy=True) for n, p in trainable_parameters(model)}

    def _in_use(self, args: Any) -> bool:
        return args.optim == CLASSP_NAME or bool(self.methods) or self.gather

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
        zero = zero_optimizer(optimizer)
        optimizer = optimizer if zero is None else zero.optimizer
        previous, resumed = engine_of(model), state.global_step > 0
        if previous is not None and previous.context is not None:  # that training was interrupted
            if previous.zero is not None:
                raise ValueError(
                    "A training of this model was interrupted, and its memory is gone with DeepSpeed's buffers. Load "
                    "model and memory from its last checkpoint."
                )
            previous.stop()
        previous = None if previous is self else previous
        if self.args is not None and self.model is not model:  # `model_init` has made another one
            self.reset()
        elif isinstance(self.optimizer, CLASSP) and self.optimizer is not optimizer and self._pending is None:
            self._pending = dict(self.accumulators())  # this callback's last Trainer had an optimizer of its own
        elif isinstance(optimizer, CLASSP) and self.optimizer is optimizer and self._pending is None:
            if zero is None and _not_of(model, optimizer) - self._not_models:
                raise ValueError(
                    "The optimizer holds parameters that the model has no more: it was resized, or got another head "
                    "or adapter, and what took their place would not be trained. Build a new Trainer of it."
                )
            known = {n: p for n, p in trainable_parameters(model) if optimizer.state.get(p)}
            resized = {n: p for n, p in known.items() if optimizer.state[p]["accumulator"].shape != p.shape}
            own = {n: optimizer.accumulator(p) for n, p in resized.items()}
            self._pending = match_rows(own, model, zeros=True) if own else None
            if lost := sorted(own.keys() - (self._pending or {}).keys()):
                logger.warning(f"{len(lost)} parameters were resized and begin without a memory ({shorten(lost, 2)}).")
            for p in resized.values():
                del optimizer.state[p]
        self._not_models = _not_of(model, optimizer)
        self.optimizer, self.args, self.model, self.samples = optimizer, args, model, None
        self.searching = state.is_hyper_param_search
        if previous is not None and self.options and previous.options is self.options:
            self.source = BESIDE  # the launcher's `--memory` is what a model's first training goes on from
        if not resumed:
            self.keep_start(model)
        ContinualCallback.applied |= bool(self.options)
        self._check_optimizer(args, resumed)
        if not (isinstance(optimizer, CLASSP) or self.methods or self.gather or self.accelerator is not None):
            if self.source not in (BESIDE, NONE):
                raise ValueError(
                    f"memory={self.source!r} is given, and nothing here uses a memory: the optimizer is "
                    f"{type(optimizer).__name__}, and there is no method. Pass --optim classp or --method."
                )
            why = f"This run has no method, and its optimizer is {type(optimizer).__name__}"
            if args.process_index == 0:
                warn_of_unused_memory(model, f"{why}. Pass --optim classp or --method to go on from it.")
            return
        refuse_sharding(model)
        self.zero = zero
        if zero is not None:
            used = [f"the method {m.name}" for m in self.methods] + (["--gather_memory"] if self.gather else [])
            used += [f"memory={PRETRAINED!r}"] if self.source == PRETRAINED else []
            check_zero(args.deepspeed_plugin, optimizer.param_groups[0], next(iter(used), None))
            link(zero)
        self.stop()  # what an interrupted training of another model left
        self.find(previous, args, state, getattr(processing_class, "tokenizer", processing_class))
        self.put(args, resumed and isinstance(optimizer, CLASSP) and any(optimizer.state.values()))
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
            processing_class=getattr(processing_class, "tokenizer", processing_class),  # inside a processor
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
        if zero is None:
            self._hooks = [
                optimizer.register_step_pre_hook(lambda *_: self._before_step(args, state)),
                optimizer.register_step_post_hook(lambda *_: self._after_step()),
            ]

    def _check_optimizer(self, args: Any, resumed: bool) -> None:
        """Raise a ValueError if this run's optimizer is not the one it has to be; warn of AdamW's learning rates."""
        name, is_classp = type(self.optimizer).__name__, isinstance(self.optimizer, CLASSP)
        under_deepspeed = getattr(args, "deepspeed_plugin", None) is not None  # which may bring an optimizer, too
        if not is_classp and CLASSP_NAME in (self.options.get("optim"), args.optim if under_deepspeed else None):
            raise ValueError(
                f"--optim classp was given to classp_hf, but this script brings an optimizer of its own ({name}). "
                "Leave --optim out, or the script's `optimizers`."
            )
        states = [s for s in getattr(self.optimizer, "state", {}).values() if s] if resumed else []
        if states and any("accumulator" in s for s in states) != is_classp:
            raise ValueError(
                f"The checkpoint was written under {'another optimizer' if is_classp else 'CLASSP'}, and this run's "
                f"is {name}. Resume with the same --optim, or start a new run from the checkpoint's model."
            )
        if is_classp and (rate := first_rate(self.optimizer)["lr"]) <= TOO_SMALL:
            logger.warning(
                f"CLASSP trains with learning_rate={rate:g}, which is far too small for it (AdamW's "
                f"are). Pass --learning_rate; {CLASSP_LEARNING_RATE} is a good start."
            )

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
        if self.context is not None and not self.searching and folder not in self._written:
            self.write(folder, args)
        self._written.clear()

    def on_push_begin(self, args, state, control, **kwargs):
        if self.context is not None and not self.sharded():  # of a checkpoint, by the main process alone
            self.write(args.output_dir, args)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.context is None:
            return
        if self.searching:  # a trial is no task
            self.stop()
            return
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and (Path(best) / MEMORY_NAME).is_file():  # it comes back with the weights it belongs to
            self.load(ContinualMemory.load(best), model, args, same_run=True)
            self.put(args, False)
        started = time.monotonic()
        for method in sorted(self.methods, key=lambda m: m.end_order):
            method.after_task(self.context)
        self.seconds += time.monotonic() - started
        if self.context.task not in self.tasks:
            self.tasks.append(self.context.task)
        if self.zero is not None:  # the next training has buffers of its own, and parameters know those alone
            self._pending = dict(self.accumulators())
        self.stop()
        self.checkpoint = None
        self.samples = samples(self.model)
        if not isinstance(self.optimizer, CLASSP):  # which holds the memory; others only memory of the device
            self._description, self.optimizer = self._described(args), None
        if self.saves_at_end:
            self.write(self.folder(args), args)
            if args.process_index == 0:
                logger.warning(
                    f"The continual memory of {', '.join(self.tasks)} is written to {self.folder(args) / MEMORY_NAME}."
                )

    def stop(self) -> None:
        """Training has ended, or another engine takes over."""
        self._density = self.context = None
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
        is_classp = isinstance(self.optimizer, CLASSP)
        if not is_classp and self.adds_to(args) is not None:
            self.gather_step(found)
        with uncompiled_passes(self.model):
            for method in self.methods:
                method.before_step(self.model)
        if is_classp:
            step, every = state.global_step + 1, max(state.logging_steps, 1)
            logs = args.logging_strategy == "steps" and (step % every == 0 or (step == 1 and args.logging_first_step))
            self._density = self.optimizer.update_density() if logs else None

    def _after_step(self) -> None:
        for method in self.methods:
            method.after_step(self.model)

    def _starting_weights(self) -> dict[str, Tensor]:
        if not any(m.needs_start for m in self.methods):
            return {}
        kept = self.start or {}
        for n, p in trainable_parameters(self.model):  # as they are in the checkpoint
            then = kept.get(n, p)  # whole, or, of a later task under FSDP2, sharded
            now = p.detach() if isinstance(then, DTensor) else full_tensor(p)
            if not torch.equal(local(now).cpu(), local(then.detach()).cpu()):
                return kept
        raise ValueError(
            "A resumed run needs the weights it began with, which a callback added after Trainer was built has not "
            "seen, nor has one whose model was loaded from a checkpoint of the run. Build a new Trainer of the model "
            "as it was, and pass the callback in Trainer's `callbacks`."
        )

    def _unused_name(self, args: Any) -> str:
        """The output folder's name, with its parents' where earlier tasks have it."""
        parts = [UNPRINTABLE.sub("?", part) for part in Path(args.output_dir).resolve().parts[1:]] or ["root"]
        names = ("/".join(parts[-i:]) for i in range(1, len(parts) + 1))
        return next((name for name in names if name not in self.tasks), f"{parts[-1]}-{len(self.tasks) + 1}")


class TrainersEngine(ContinualCallback):
    """[`ContinualTrainer`]'s own: of two callbacks of one class, the other that of `register`, Trainer would warn."""

    def refuse_others(self, callbacks: Sequence[Any]) -> None:
        for other in callbacks:
            if issubclass(other if isinstance(other, type) else type(other), ContinualCallback) and other is not self:
                raise ValueError("ContinualTrainer has a ContinualCallback. Pass it method= and memory= instead.")


def _not_of(model: Any, optimizer: Any) -> set[Any]:
    """Parameters that the optimizer holds and the model has not, such as those of a loss."""
    return {p for group in optimizer.param_groups for p in group["params"]} - set(model.parameters())


def engine_of(model: Any) -> ContinualCallback | None:
    """The engine that trained `model` last in this process."""
    return vars(bare_model(model)).get(_ATTRIBUTE)


def write_beside(model: Any, folder: str | Path) -> None:
    """Called when `model` was saved into `folder`: its memory belongs there too."""
    engine = engine_of(model)
    if engine is None or engine.model is None or engine.searching or engine.sharded():
        return  # of a sharded model the engine's events write it, on every rank
    if engine.args.should_save:
        engine.write(folder, engine.args)
        engine._written.add(Path(folder))
