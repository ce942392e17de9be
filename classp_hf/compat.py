"""All that touches private or moved names of transformers, accelerate and torch: each with its versions and reason.

docs/compatibility.md says which versions were run.
"""

import ast
import dis
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_model
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from .files import sync_folder
from .names import bare_model, forward_class, reshard

logger = logging.get_logger(__name__)

_FSDP_1 = "FSDP version 1 flattens parameters, and the memory is kept by parameter. Set fsdp_version: 2."


class _OptimizerName(str):
    """A name of an optimizer that `OptimizerNames` lists and that is pickled as a plain string.

    A member of the enum could be read back only in processes that have registered it (`training_args.bin`).
    """

    @property
    def value(self) -> str:
        return str(self)

    def __reduce__(self) -> Any:
        return str, (str(self),)


def add_optimizer(name: str, factory: Callable[[Any], tuple[type, dict[str, Any]]], callback: type[TrainerCallback]):
    """Make `--optim name` known to transformers in this process, and give every Trainer a callback. Once a process.

    There is no public way to add an optimizer's name: `OptimizerNames` is a closed enum, the table of handlers private
    (transformers 4.57 to 5.24).

    Args:
        factory: training arguments -> optimizer class and its keyword arguments.

    Raises:
        ImportError: the private names of the installed transformers have moved.
    """
    from transformers.training_args import OptimizerNames

    if name in OptimizerNames._value2member_map_:
        return
    trainer: Any = Trainer
    try:
        from transformers.trainer import DEFAULT_CALLBACKS

        try:
            from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
        except ImportError:  # 4.57: a chain of comparisons in one static method
            of_transformers = Trainer.get_optimizer_cls_and_kwargs

            def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
                return factory(args) if args.optim == name else of_transformers(args, model)

            trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)
        else:
            _OPTIMIZER_HANDLERS[name] = lambda context: factory(context.args)  # type: ignore[index]
        member: Any = _OptimizerName(name)
        OptimizerNames._member_map_[name.upper()] = member
        OptimizerNames._member_names_.append(name.upper())
        OptimizerNames._value2member_map_[name] = member
        trainer._load_optimizer_and_scheduler = _explained(trainer._load_optimizer_and_scheduler)
        trainer.train = _announced(trainer.train)
        DEFAULT_CALLBACKS.append(callback)  # type: ignore[arg-type]
    except (ImportError, AttributeError, TypeError) as error:
        raise ImportError(
            f"transformers {transformers.__version__} keeps its optimizer names or default callbacks elsewhere than "
            f"classp_hf knows ({error}), so `--optim {name}` cannot be added. Install another version of transformers "
            "(docs/compatibility.md), or use classp_hf.ClasspTrainer, which does not need it."
        ) from error


def set_default_callback(callback: type[TrainerCallback], wanted: bool) -> None:
    """Give every Trainer of this process a callback, before those of its loggers, or no longer."""
    from transformers.trainer import DEFAULT_CALLBACKS

    others = [c for c in DEFAULT_CALLBACKS if c is not callback]
    DEFAULT_CALLBACKS[:] = [*others, callback] if wanted else others  # type: ignore[list-item]


def averages_loss(model: Any) -> bool:
    """Whether a model averages its loss over the micro-batch, whatever `num_items_in_batch` says.

    Trainer takes every model whose `forward` has `**kwargs` to sum it over the accumulated batch, and multiplies by
    ranks and accumulation steps (transformers 4.57 to 5.24): of encoders hardly any does, nor do sequence-to-sequence
    models that call `CrossEntropyLoss` themselves, nor several labels an example and regression by
    `ForSequenceClassificationLoss`. A `forward` outside of transformers that hands `**kwargs` on is believed to.
    """
    kind, bare = forward_class(model), bare_model(model)
    try:
        source = textwrap.dedent(inspect.getsource(kind.forward))
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except (OSError, TypeError, SyntaxError):  # no function, or typed in where no source is kept
        return False
    if "num_items_in_batch" in source or getattr(bare, "accepts_loss_kwargs", False):  # its author says so
        return False
    if kind.__module__.startswith("transformers."):
        calls = [call for call in calls if getattr(call.func, "attr", "") == "loss_function"]
    if not any(keyword.arg is None for call in calls for keyword in call.keywords):
        return True
    loss, config = getattr(bare, "loss_function", None), getattr(bare, "config", None)
    problem, labels = getattr(config, "problem_type", None), getattr(config, "num_labels", 0)
    several = problem in ("regression", "multi_label_classification") or (problem is None and labels == 1)
    return several and getattr(loss, "__name__", "") == "ForSequenceClassificationLoss"


def sums_own_loss(kind: type) -> bool | None:
    """Whether a `compute_loss` of the user's own, which calls no other, is the sum over `num_items_in_batch`, as
    Transformers asks of it: whether it reads that. None: there is no such `compute_loss`."""
    between = kind.__mro__[: kind.__mro__.index(Trainer)]
    own = [vars(cls)["compute_loss"] for cls in between if "compute_loss" in vars(cls)]
    codes = [getattr(inspect.unwrap(f), "__code__", None) for f in own if not f.__module__.startswith("classp_hf.")]
    for code in codes:
        if code is not None and "compute_loss" not in code.co_names:
            return _reads_count(code)
    return None


def _reads_count(code: Any) -> bool:
    loads = (i for i in dis.get_instructions(code) if i.opname.startswith("LOAD"))
    return any("num_items_in_batch" in str(i.argval) for i in loads)


def scale_loss_once(trainer: Trainer) -> None:
    """Have Trainer divide such a loss by the accumulation steps, and multiply it by nothing."""
    if trainer.compute_loss_func is None and trainer.label_smoother is None and not sums_own_loss(type(trainer)):
        trainer.model_accepts_loss_kwargs &= not averages_loss(trainer.model)
    code = getattr(trainer.compute_loss_func, "__code__", None)
    times = trainer.args.gradient_accumulation_steps * trainer.args.world_size
    if code is not None and times > 1 and not _reads_count(code):
        logger.warning_once(
            f"compute_loss_func does not read num_items_in_batch, so gradients are {times} times what they should be, "
            f"and a memory of their squares {times**2} times. Return the sum over the items divided by it."
        )


def _announced(train: Callable[..., Any]) -> Callable[..., Any]:
    """No event hands callbacks the Trainer (transformers 5.23)."""

    @functools.wraps(train)
    def announced(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        engines = [c for c in reversed(self.callback_handler.callbacks) if hasattr(c, "on_train")]
        if engines:  # that of `register` comes before one of the script
            next((engine for engine in engines if engine.methods), engines[0]).on_train(self)
        return train(self, *args, **kwargs)

    return announced


def _explained(load: Callable[..., None]) -> Callable[..., None]:
    """Torch's optimizers end in a KeyError when they are given another optimizer's state (torch 2.13); and no event
    tells callbacks which checkpoint a training is resumed from (transformers 5.23)."""

    @functools.wraps(load)
    def _load_optimizer_and_scheduler(self: Trainer, checkpoint: str | None) -> None:
        for callback in self.callback_handler.callbacks if checkpoint is not None else ():
            if hasattr(callback, "checkpoint"):
                callback.checkpoint = Path(str(checkpoint))
        try:
            load(self, checkpoint)
        except KeyError as error:
            optimizer = type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__
            raise ValueError(
                f"The optimizer's state in {checkpoint} is not one of {optimizer}: it has no {error}. Resume with the "
                "same --optim, or start a new run from the checkpoint's model."
            ) from error

    return _load_optimizer_and_scheduler


def refuse_sharding(model: Any) -> None:
    """Raise if FSDP version 1 has flattened the model, or tensor parallelism has cut it."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(_FSDP_1)
    if not reshard(model) and any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError(
            "The model is cut by tensor parallelism (tp_plan), of which the memory knows nothing. Load it without "
            "tp_plan and use FSDP2 (recipes/accelerate/fsdp2.yaml)."
        )


def refuse_missing_weights(model: Any) -> None:
    """Raise if weights that the checkpoint lacked are on no device: with FSDP's cpu_ram_efficient_loading ranks other
    than 0 have none, and the optimizer loses them (accelerate 1.15 tells parameters apart by their address)."""
    if missing := [n for n, p in model.named_parameters() if p.is_meta]:
        raise ValueError(
            f"{len(missing)} parameters are on no device ({missing[0]}, ...): the checkpoint lacks them, and FSDP's "
            "cpu_ram_efficient_loading leaves them out. Set fsdp_cpu_ram_efficient_loading: false."
        )


@contextmanager
def linked_states(zero: Any) -> Iterator[None]:
    """Give ZeRO's optimizer its flat buffers for the block, then tell parameters where in them their state is.
    DeepSpeed 0.19 does both at its first step; a memory is put there before."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2
        yield
        zero._lazy_init_hp_params_optimizer_state()
    else:  # stage 3, whose optimizer has them while it steps
        zero._set_fp32_optimizer_param_groups()
        try:
            yield
        finally:
            zero._clear_fp32_optimizer_param_groups()


class PatchedTrainer(Trainer):
    """Trainer with the mends that trainings one after another need. Each names what it is for."""

    model: Any
    optimizer: Any
    _sharded_groups: list[list[torch.nn.Parameter]] | None = None

    def check_fsdp(self, plugin: Any) -> None:
        """accelerate 1.15 shards the input embedding by itself and fails if a layer that holds it is sharded
        already."""
        if plugin.fsdp_version != 2:
            raise ValueError(_FSDP_1)
        if plugin.transformer_cls_names_to_wrap is None:
            embedding = self.model.get_input_embeddings()
            layers = {
                type(m).__name__ for m in self.model.modules() if all(part is not embedding for part in m.modules())
            }
            plugin.transformer_cls_names_to_wrap = [n for n in self.model._no_split_modules or [] if n in layers]

    def shard(self) -> None:
        """Under FSDP2 cut the model into shards now, which accelerate does only together with an optimizer."""
        if self.is_fsdp_enabled and not reshard(self.model):
            self.create_optimizer()
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        # transformers 5.23: evaluating a model that was never trained marks it as prepared without wrapping it
        # (`prepare_model` with evaluation_mode=True), so under DDP a later `train()` would not wrap it either and
        # every rank would silently train alone. Wrap it first; `train()` takes over what it finds in `model_wrapped`.
        distributed = self.accelerator.use_distributed and not self.is_fsdp_enabled
        if distributed and self.model_wrapped is self.model:
            self.model_wrapped = self.accelerator.prepare_model(self.model)
        self.shard()
        return super().evaluation_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers 5.23: resumed from the checkpoint of its last step, a training whose `max_steps` end within an
        # epoch would do one step more, for Trainer looks at `max_steps` after a step only.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        sharded = self.is_fsdp_enabled and reshard(self.model)
        self._sharded_groups = [list(group["params"]) for group in optimizer.param_groups] if sharded else None
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        # accelerate 1.15: preparing again what is sharded already, it finds the optimizer's parameters by the
        # addresses of their shards. Empty shards share one address, so it would put one parameter in the place of
        # others.
        if self._sharded_groups is not None:
            for group, parameters in zip(self.optimizer.param_groups, self._sharded_groups, strict=True):
                group["params"] = parameters
        return super().create_scheduler(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            self._save(output_dir, self.accelerator.get_state_dict(self.model))  # transformers 5.23 saves none

    _load_optimizer_and_scheduler = _explained(Trainer._load_optimizer_and_scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._loaded_from = Path(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._loaded_from = Path(str(self.state.best_model_checkpoint))
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # transformers 5.23: Trainer reads a checkpoint without the conversion of names that save_pretrained and
        # from_pretrained make (mixtures of experts); the weights under other names would stay as they are.
        if load_result.unexpected_keys and load_result.missing_keys and isinstance(self.model, PreTrainedModel):
            load_whole(self.model, self._loaded_from)
        else:
            super()._issue_warnings_after_load(load_result)

    def _save_rng_state(self, output_dir: str) -> None:
        # The last file of every rank. `trainer_state.json`, which comes next and says that the checkpoint is complete
        # (and lets Trainer delete older ones), waits for all of them to be on the disk.
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sync_folder(Path(output_dir))


def load_whole(model: Any, folder: Path) -> None:
    """Read a model's weights as `save_pretrained` wrote them: from one file or several, also under names that
    transformers 5 converts."""
    try:
        load_model(model, folder / SAFE_WEIGHTS_NAME)
    except (FileNotFoundError, RuntimeError):
        model.load_state_dict(saved_weights(model, folder))


def saved_weights(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a model of this class has in `folder`, on the CPU, in a dtype that loses nothing of them."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    kind, dtype = type(bare_model(model)), dtypes.pop() if len(dtypes) == 1 else torch.float32
    return kind.from_pretrained(folder, dtype=dtype).state_dict()


def watch_saving(model: Any, then: Callable[[Any, str], None]) -> None:
    """Call `then(model, folder)` after every `save_pretrained` of models of this class."""
    owner: Any = next((cls for cls in type(model).__mro__ if "save_pretrained" in vars(cls)), None)
    if owner is None or hasattr(owner.save_pretrained, "watched"):
        return
    original = owner.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        folder = args[0] if args else kwargs.get("save_directory", kwargs.get("path"))
        if folder is not None:
            then(self, str(folder))
        return result

    save_pretrained.watched = True  # type: ignore[attr-defined]
    owner.save_pretrained = save_pretrained
