"""The trainers: `ContinualTrainer` and its sequence loop; `ClasspTrainer` and `EWCTrainer` are named shells on it."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from . import report
from .callback import ContinualMemoryCallback
from .classification import accuracy, classification_loss, is_single_label_classifier
from .files import remove_temporaries, replacing, sync_folder, writing
from .heads import TaskHeads
from .hub import push_folder
from .language import prepare_language_tasks
from .launch import shard_on_cpus
from .memory import (
    MEMORY_NAME,
    ContinualMemory,
    bare_model,
    full_tensor,
    gather_,
    is_language_model,
    layer_means,
    like_parameter,
    match_accumulators,
    reshard,
    trainable_parameters,
)
from .methods import METHODS, Combined, Elastic, LogitAdjustment, Merge, Method
from .methods.adapters import folded_state_dict
from .metrics import summarize
from .optim import CLASSP
from .optim_args import parse_optim_args
from .preemption import PreemptionCallback
from .redaction import known_secrets, public_arguments, public_command
from .registration import NAME, refuse_deepspeed
from .resume import (
    is_complete,
    last_complete_checkpoint,
    load_optimizer_state,
    load_weights,
    optimizer_state,
    read_state,
)
from .tasks import Task, prepare_tasks
from .training_args import ContinualTrainingArguments

logger = logging.get_logger(__name__)

STATE_NAME = "sequence_state.json"


class ContinualTrainer(Trainer):
    """A [`transformers.Trainer`] that also fine-tunes over a sequence of tasks.

    `train()` alone behaves as Trainer's. `train_sequence(tasks)` trains on one task after another and fills the
    accuracy matrix R. The optimizer (`args.optim`) and the continual-learning method are independent choices.

    Args:
        model: as in Trainer.
        args: [`ContinualTrainingArguments`], or plain `TrainingArguments`.
        method: a [`~classp_hf.methods.Method`], the name of one (`"ewc"`), several of either (`"replay+elastic"`, or a
            list), or None.
        memory: go on from this continual memory: a file, the folder of a model saved with one, or a Hub id. The same as
            `args.memory`.
        task_metric: fills R instead of a metric from `compute_metrics`: `task_metric(model, processing_class, dataset)` gives
            one number for the measured split of a task as it was given, with its own columns: for what has to be generated, for
            instance. Called on every rank, with the whole split, in evaluation mode.
        kwargs: every other argument of Trainer. `compute_metrics` defaults to the accuracy, and the loss of
            single-label classifiers to the cross-entropy averaged over the whole accumulated batch (see
            `docs/architecture.md`).

    Raises:
        ValueError: an unknown method, bad `optim_args`, a memory that does not fit the model, DeepSpeed, FSDP
            version 1.
    """

    default_optim: ClassVar[str | None] = None
    default_method: ClassVar[str | None] = None

    args: ContinualTrainingArguments
    model: Any
    optimizer: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        method: Method | str | Sequence[Method | str] | None = None,
        memory: str | Path | None = None,
        task_metric: Callable[[Any, Any, Any], float] | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = ContinualTrainingArguments(output_dir="tmp_trainer")
        elif not isinstance(args, ContinualTrainingArguments):
            args = ContinualTrainingArguments.from_training_arguments(args)
        refuse_deepspeed(args)
        args = copy.copy(args)  # the sequence loop changes output_dir, and the caller may share args between trainers
        if self.default_optim is not None:
            args.optim = self.default_optim
        if args.learning_rate is None:
            args.learning_rate = args.default_learning_rate
        if memory is not None:
            args.memory = str(memory)
        if args.world_size == 1 and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"{os.environ['WORLD_SIZE']} processes were started, but each of them would train alone. On CPUs pass "
                "--use_cpu, or start them with `accelerate launch --cpu`."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"One process on {args.n_gpu} GPUs (DataParallel) would count gradients once a GPU. Start the script with "
                "`accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES=0."
            )
        self.method = _make_method(method if method is not None else self.default_method)

        optimizer_given = kwargs.get("optimizers", (None, None))[0] or kwargs.get("optimizer_cls_and_kwargs")
        if args.optim == NAME and not optimizer_given:
            hyperparameters, uses = parse_optim_args(args.optim_args)
            kwargs["optimizer_cls_and_kwargs"] = (CLASSP, {"lr": args.learning_rate, **hyperparameters})
            if args.memory is None and uses.get("memory", "none") != "none":
                args.memory = uses["memory"]
            wanted = [
                cls(uses[flag])
                for cls, flag in ((Elastic, "anchor_strength"), (Merge, "merge_weight"))
                if uses.get(flag) and cls.name not in {m.name for m in self.method.parts()}
            ]
            if wanted:
                self.method = _make_method([*(m for m in self.method.parts() if m.name != Method.name), *wanted])
        if args.eval_strategy != "no" and eval_dataset is None:
            eval_dataset = {}  # the tasks bring their own; Trainer refuses None here
        writes = model is not None and is_language_model(model)
        if data_collator is None and processing_class is not None and writes:
            # pads labels too, of causal models as well
            data_collator = DataCollatorForSeq2Seq(processing_class, model)
        if args.should_save:
            with writing("the output", str(args.output_dir)):
                os.makedirs(str(args.output_dir), exist_ok=True)
        saves_on_sigterm, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
        shard_on_cpus(args)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        self.args.enable_jit_checkpoint = saves_on_sigterm  # by our own callback
        if self.is_fsdp_enabled:
            self._check_fsdp(self.accelerator.state.fsdp_plugin)

        self.optimizers_given = kwargs.get("optimizers", (None, None))
        if is_single_label_classifier(self.model):
            if self.compute_loss_func is None and not args.label_smoothing_factor:
                self.compute_loss_func = classification_loss
            if self.compute_metrics is None:
                self.compute_metrics = accuracy
        self.classifies = is_single_label_classifier(self.model)
        self.writes = is_language_model(self.model)
        self.task_metric = task_metric
        if self.args.sequence_metric is None:
            named = getattr(task_metric, "__name__", "metric") if task_metric is not None else None
            self.args.sequence_metric = named or (
                "loss" if self.writes or self.compute_metrics is None else "accuracy"
            )
        greater = self.args.sequence_metric_greater_is_better
        self.greater_is_better = (
            self.args.sequence_metric not in ("loss", "perplexity") if greater is None else greater
        )
        self.method = self._complete_method(self.method)
        self.active_label_ids: list[int] | None = None
        if self.preprocess_logits_for_metrics is None:
            self.preprocess_logits_for_metrics = self._mask_other_tasks_labels

        self.task_heads = TaskHeads(self.model) if args.heads == "per_task" else None
        if self.task_heads is not None:
            for part in self.method.parts():
                part.excluded = self.task_heads.names
        self.seen_tasks: list[str] = []
        self._between_tasks = False
        self._density: float | None = None
        self._sharded_groups: list[list[nn.Parameter]] | None = None
        self._logged_task: str | None = None
        self._earlier_steps = 0
        self.sequence_results: dict[str, Any] | None = None
        self._gathered: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._pending_memory: ContinualMemory | None = None
        self._pending_optimizer: Path | None = None
        if args.memory is not None:
            memory_given = ContinualMemory.load(args.memory, revision=args.memory_revision)
            try:
                self.load_memory(memory_given)
            except ValueError as error:
                raise ValueError(f"{error}\nThe memory was read from {args.memory!r}.") from None
        elif args.optim == NAME:
            beside = Path(str(getattr(bare_model(self.model).config, "name_or_path", ""))) / MEMORY_NAME
            if beside.is_file():
                logger.warning(
                    f"{beside}, beside the model, is not used. Pass memory={str(beside.parent)!r} to go on from it."
                )
        self.remove_callback(ContinualMemoryCallback)  # of `register`; the trainer keeps the memory itself
        self.add_callback(_MethodCallback(self))
        self._preemption = PreemptionCallback(self)
        self.add_callback(self._preemption)  # the last: it may end the process

    def _check_fsdp(self, plugin: Any) -> None:
        if plugin.fsdp_version != 2:
            raise ValueError(
                f"FSDP version {plugin.fsdp_version} flattens parameters, and the memory is kept by parameter. Set fsdp_version: 2."
            )
        if plugin.transformer_cls_names_to_wrap is None:
            # accelerate shards the input embedding by itself and fails if a layer that holds it is sharded already, as
            # Transformers' BertEmbeddings would be
            embedding = self.model.get_input_embeddings()
            layers = {
                type(m).__name__ for m in self.model.modules() if all(part is not embedding for part in m.modules())
            }
            plugin.transformer_cls_names_to_wrap = [n for n in self.model._no_split_modules or [] if n in layers]

    # ---- The method -------------------------------------------------------------------------------------------------

    def _complete_method(self, method: Method) -> Method:
        """The method, with what a trainer's class adds to it."""
        return method

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        given = dict(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            penalty = self.method.penalty(model, outputs, given)
            if penalty is not None:
                # A loss already averaged over the whole accumulated batch is not divided again by Trainer.
                scaled = self.compute_loss_func is not None or (
                    self.model_accepts_loss_kwargs and num_items_in_batch is not None
                )
                loss = loss + penalty / (self.current_gradient_accumulation_steps if scaled else 1)
        return (loss, outputs) if return_outputs else loss

    # ---- The memory -------------------------------------------------------------------------------------------------

    @property
    def bare_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapper; None before training."""
        return _unwrap(self.optimizer)

    def accumulators(self) -> dict[str, Tensor]:
        """Canonical name -> `sum |g|^p` over all training so far, float32; empty before any.

        CLASSP's own state, or, under another optimizer, what is gathered beside it if `args.gather_memory` or the method
        asks for it. While training these are the tensors that change, on their devices (copies of low-bit ones).
        """
        optimizer = _unwrap(self.optimizer)
        if self._pending_memory is not None:
            return self._pending_memory.get("accumulator")
        if not isinstance(optimizer, CLASSP):
            return dict(self._gathered)
        if not optimizer.state:
            return {}
        # a head a task: no task uses another one's
        return {n: optimizer.accumulator(p) for n, p in trainable_parameters(self.model) if n not in self._heads}

    @property
    def _heads(self) -> frozenset[str]:
        return self.task_heads.names if self.task_heads is not None else frozenset()

    @property
    def _gathers(self) -> bool:
        own = self.args.optim == NAME or isinstance(_unwrap(self.optimizer), CLASSP)
        return (self.args.gather_memory or self.method.uses_accumulators) and not own

    def before_step(self) -> None:
        """Remember the gradients, if the optimizer does not, and let the method add to them."""
        if self._gathers:
            gather_(self._gathered, self.model, self.args.memory_power)
            for n in self._heads:
                self._gathered.pop(n, None)
        self.method.penalty_gradient(self.model)
        optimizer, step = _unwrap(self.optimizer), self.state.global_step + 1
        logs = self.args.logging_strategy == "steps" and step % max(self.state.logging_steps, 1) == 0
        self._density = optimizer.update_density() if logs and isinstance(optimizer, CLASSP) else None

    def continual_memory(self) -> ContinualMemory:
        """The memory as it stands: accumulators, the method's state, per-task heads. Call it on every rank."""
        memory = ContinualMemory()
        memory.put("accumulator", self._kept)
        memory.put("accumulator", {n: full_tensor(t) for n, t in self.accumulators().items()})
        for method in self.method.parts():
            for part, tensors in method.state_dict().items():
                memory.put(f"{method.name}.{part}", {n: full_tensor(t) for n, t in tensors.items()})
        if self.task_heads is not None:
            for task, head in self.task_heads.state_dict().items():
                memory.put(f"head.{task.replace('/', '%2F')}", head)
            memory.put("initial_head", self.task_heads.initial)
        optimizer = _unwrap(self.optimizer)
        described = _describe_optimizer(optimizer, self.args)
        if self._gathers:
            described["power"] = self.args.memory_power
        if optimizer is None and self._pending_memory is not None:
            described = self._pending_memory.metadata.get("optimizer", described)
        memory.metadata = {
            "tasks": self.seen_tasks,
            "optimizer": described,
            "method": public_arguments(self.method.describe(), known_secrets(vars(self.args))),
        }
        return memory

    def load_memory(self, memory: ContinualMemory, resumed: bool = False) -> None:
        """Continue from `memory`: the method's state at once, accumulators when training begins.

        Args:
            memory: which of its accumulators are used, [`~classp_hf.memory.match_accumulators`] decides.
            resumed: it is that of a checkpoint of this very run.

        Raises:
            ValueError: names or shapes differ from the model's trainable parameters, or the accumulators hold another
                power of the gradients than this run's.
        """
        stored, self._kept = match_accumulators(memory.get("accumulator"), self.model, self._heads, resumed)
        self._check_power(memory)
        used = []
        for method in self.method.parts():
            prefix = f"{method.name}."
            used.append(prefix)
            parts = {kind.removeprefix(prefix): memory.get(kind) for kind in memory.kinds() if kind.startswith(prefix)}
            method.check_state(parts, self.model)
            if parts:
                method.load_state_dict(parts)
        if self.task_heads is not None:
            heads = {k.removeprefix("head."): memory.get(k) for k in memory.kinds() if k.startswith("head.")}
            self.task_heads.load_state_dict({task.replace("%2F", "/"): head for task, head in heads.items()})
            self.task_heads.initial = memory.get("initial_head") or self.task_heads.initial
            used += ["head.", "initial_head"]
        if self.args.optim == NAME or self._gathers:
            used.append("accumulator")
        others = [kind for kind in memory.kinds() if not kind.startswith(tuple(used))]
        if others:
            logger.warning(
                f"The continual memory also holds {', '.join(others)}, which optimizer {self.args.optim_name!r} with method "
                f"{self.method.name!r} and heads={self.args.heads!r} does not use."
            )
        self.seen_tasks = list(memory.metadata.get("tasks", []))
        rest = {k: t for k, t in memory.tensors.items() if not k.startswith("accumulator/")}
        self._pending_memory = ContinualMemory(rest, memory.metadata)
        self._pending_memory.put("accumulator", stored)

    def _check_power(self, memory: ContinualMemory) -> None:
        stored = memory.metadata.get("optimizer", {}).get("power")
        power = self.args.memory_power if self._gathers else None
        if stored is not None and power is not None and memory.get("accumulator") and stored != power:
            raise ValueError(
                f"The continual memory sums |g|^{stored:g}, and this run |g|^{power:g}. Pass memory_power={stored:g}."
            )

    def restore_pending(self) -> None:
        """Put what `load_memory` read into the optimizer, now that every wrapper (DDP, FSDP2, PEFT) is on."""
        optimizer = _unwrap(self.optimizer)
        if self._pending_memory is not None:
            stored = self._pending_memory.get("accumulator")
            parameters = {n: p for n, p in trainable_parameters(self.model) if n in stored}
            restored = {n: like_parameter(stored[n], p.detach(), torch.float32) for n, p in parameters.items()}
            if isinstance(optimizer, CLASSP):
                for n, p in parameters.items():
                    optimizer.set_accumulator(p, restored[n])
            else:
                self._gathered = restored
        if self._pending_optimizer is not None:
            state = torch.load(self._pending_optimizer, map_location="cpu", weights_only=True)
            load_optimizer_state(self.optimizer, self.model, state)
            if self.task_heads is not None:
                self.task_heads.forget_optimizer_state(self.optimizer)
        self._pending_memory = self._pending_optimizer = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and, beside it, the continual memory."""
        memory = self.continual_memory()
        if self.args.should_save and (memory.tensors or self.seen_tasks):
            memory.save(output_dir or str(self.args.output_dir))
        super().save_model(output_dir, _internal_call)
        if self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            self._save(output_dir, self.accelerator.get_state_dict(self.model))  # Trainer saves none

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not (self.method.folds_adapters and self._between_tasks):
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        for stale in folder.glob("adapter_*"):  # of a checkpoint that was pushed
            stale.unlink(missing_ok=True)
        adapted, self.model = self.model, bare_model(self.model)
        try:
            super()._save(output_dir, folded_state_dict(adapted))
        finally:
            self.model = adapted

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with writing(f"the checkpoint of step {self.state.global_step}", str(self.args.output_dir)):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        # The last file of every rank. `trainer_state.json`, which comes next and says that the checkpoint is complete (and
        # lets Trainer delete older ones), waits for all of them to be on the disk.
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sync_folder(Path(output_dir))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the share of coordinates that CLASSP updated; in a sequence keys begin with the task's name,
        and steps count on from task to task."""
        if "loss" in logs and self._density is not None:
            logs["update_density"] = self._density
        if self._logged_task is None:
            super().log(logs, start_time)
            return
        task, step = self._logged_task, self.state.global_step
        named = {
            f"eval_{task}/{k.removeprefix('eval_')}" if k.startswith("eval_") else f"{task}/{k}": v
            for k, v in logs.items()
        }
        self.state.global_step = step + self._earlier_steps
        try:
            super().log(named, start_time)
        finally:
            self.state.global_step = step

    # ---- Workarounds ----

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        # Evaluating a model that was never trained marks it as prepared without wrapping it (`prepare_model` with
        # evaluation_mode=True), so under DDP a later `train()` would not wrap it either and every rank would silently
        # train alone. Wrap it first; `train()` takes over what it finds in `model_wrapped`.
        distributed = self.accelerator.use_distributed and not self.is_fsdp_enabled
        if distributed and self.model_wrapped is self.model:
            self.model_wrapped = self.accelerator.prepare_model(self.model)
        self._shard()
        return super().evaluation_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from the checkpoint of its last step, a training whose `max_steps` end within an epoch would do one step
        # more: Trainer looks at `max_steps` after a step only.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _shard(self) -> None:
        """Under FSDP2 cut the model into shards now, which accelerate does only together with an optimizer."""
        if self.is_fsdp_enabled and not reshard(self.model):
            self.create_optimizer()
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        sharded = self.is_fsdp_enabled and reshard(self.model)
        self._sharded_groups = [list(group["params"]) for group in optimizer.param_groups] if sharded else None
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        # Preparing again what is sharded already, accelerate finds the optimizer's parameters by the addresses of their
        # shards. Empty shards share one address, so it would put one parameter in the place of others.
        if self._sharded_groups is not None:
            for group, parameters in zip(self.optimizer.param_groups, self._sharded_groups, strict=True):
                group["params"] = parameters
        return super().create_scheduler(*args, **kwargs)

    # ---- One task ---------------------------------------------------------------------------------------------------

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As Trainer's; a checkpoint that holds a continual memory gives back the method's state too."""
        self._between_tasks = False
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint(Path(str(self.args.output_dir))) or True
        if isinstance(resume_from_checkpoint, str) and (Path(resume_from_checkpoint) / MEMORY_NAME).is_file():
            self.load_memory(ContinualMemory.load(resume_from_checkpoint), resumed=True)
            self._pending_optimizer = None
        if self.args.eval_strategy != "no" and self.eval_dataset == {}:
            raise ValueError("eval_strategy needs an eval_dataset, and the trainer was given none.")
        with self._preemption.listening():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _last_checkpoint(self, folder: Path) -> str | None:
        """The last complete checkpoint in `folder`, the same on every rank."""
        found = [last_complete_checkpoint(folder)]
        return broadcast_object_list(found)[0]

    # ---- The sequence -----------------------------------------------------------------------------------------------

    def train_sequence(self, tasks: list[Task], resume_from_checkpoint: str | bool | None = None) -> dict[str, Any]:
        """Train on `tasks`, one after another, and evaluate all of them before the first and after each.

        Texts are tokenised with `processing_class` and labels aligned by name with `model.config.label2id`; datasets
        that already hold `input_ids` and `labels` are used as they are. Writes into `args.output_dir`:
        `sequence_state.json` (what is done), `00-<task>/` and so on (Trainer's checkpoints, the model and the memory
        after the task; deleted when the next task is done, unless `args.keep_task_models`), and at the end the final model
        with its memory, plots, a model card and, last of all, `results.json`.

        With `args.learned_tasks` the first tasks are those the given model has learned already, in an earlier run or
        anywhere else: they are evaluated and shown to the method, not trained on. Their rows of R repeat the row before.

        Args:
            tasks: at least one, with distinct names.
            resume_from_checkpoint: True goes on from what `args.output_dir` holds; a run killed at any point ends with
                the same R, weights and memory, bit for bit on CPUs. Default: `args.resume_from_checkpoint`.

        Returns:
            The content of `results.json`: `tasks`, `accuracy_matrix` (T+1 rows x T columns, row 0 = before any training here, values
            in the metric's own unit), `metrics`, `seconds`, `boundary_seconds` (the method's, before and after tasks), and what
            describes the run.

        Raises:
            ValueError: bad tasks (see `prepare_tasks`), or an output directory that holds another run.
            OSError: the disk is full, or the output directory cannot be written to.
            SystemExit: 143, after a SIGTERM with `args.enable_jit_checkpoint`, when what was done is saved.
        """
        if isinstance(tasks, Task):
            raise ValueError(f"train_sequence takes a list of tasks, got the task {tasks.name!r} alone. Pass [task].")
        with self._preemption.listening():
            return self._train_sequence(tasks, resume_from_checkpoint)

    def _train_sequence(self, tasks: list[Task], resume_from_checkpoint: str | bool | None) -> dict[str, Any]:
        self._check_sequence_arguments()
        config = self.model.config
        self._measured = {task.name: task.measured_dataset for task in tasks if isinstance(task, Task)}
        if self.writes:
            encoder_decoder = bool(config.is_encoder_decoder)
            tasks = prepare_language_tasks(tasks, self.processing_class, encoder_decoder, self.args.max_length)
        else:
            tasks = prepare_tasks(tasks, self.processing_class, dict(config.label2id), self.args.max_length)
        self._check_learned_tasks(tasks)
        self.method.check_trainer(self)
        base = Path(str(self.args.output_dir))
        state = self._open_state(base, tasks, resume_from_checkpoint)
        rows: list[list[float]] = state["accuracy_matrix"]
        folders = [base / f"{t:02d}-{task.slug}" for t, task in enumerate(tasks)]
        done = max(len(rows) - 1, 0)
        methods = [method.name for method in self.method.parts() if method.state_dict()]
        state.setdefault("informed", {"tasks": list(self.seen_tasks), "methods": methods})
        if done:
            self.seen_tasks = [task.name for task in tasks[:done]]
            self._restore_boundary(folders[done - 1], tasks[done - 1])
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(base / "runs")  # one for all tasks, and for a resumed run
        self._earlier_steps = sum(state.setdefault("steps", []))
        try:
            started = time.monotonic()
            self._boundary_seconds = state.setdefault("boundary_seconds", 0.0)
            if not rows:
                self._note_importance(state, 0)
                rows.append(self._evaluate_tasks(tasks))
            elif not done and any(
                abs(a - b) > 0.005 * max(1.0, abs(b)) for a, b in zip(self._evaluate_tasks(tasks), rows[0])
            ):
                raise ValueError(
                    f"The run in {base} began with other weights than this model's: row 0 of its R was {rows[0]}. "
                    "Build the model as then: call transformers.set_seed(...) before, so that new layers start alike."
                )
            for t in range(done, len(tasks)):
                state["seconds"] = state.get("seconds", 0.0) + time.monotonic() - started
                self._write_state(base, state, folders[: max(t - 1, 0)])
                started = time.monotonic()
                learned = t < self.args.learned_tasks
                logger.info(
                    f"***** Task {t + 1} of {len(tasks)}: {tasks[t].name}{' (learned)' if learned else ''} *****"
                )
                if learned:
                    self._show_learned_task(tasks[t], state["informed"])
                else:
                    self._train_task(t, tasks, folders[t], resume=bool(state.pop("resumed", False)))
                self._save_boundary(folders[t])
                self._note_importance(state, t + 1)
                state["boundary_seconds"] = self._boundary_seconds
                state["optimizer"] = _describe_optimizer(_unwrap(self.optimizer), self.args)
                rows.append(list(rows[-1]) if learned else self._evaluate_tasks(tasks))
                self._log_row(tasks[: t + 1], rows)
                state["steps"].append(0 if learned else self.state.global_step)
                self._earlier_steps = sum(state["steps"])
            state["seconds"] = state.get("seconds", 0.0) + time.monotonic() - started
            self._write_state(base, state, folders[:-1])
        finally:
            self.args.output_dir = str(base)
            self._logged_task = None
        return self._finish(base, tasks, state)

    def _check_sequence_arguments(self) -> None:
        """Refuse what works for one training run and silently goes wrong over several."""
        given_optimizer, given_scheduler = self.optimizers_given
        problems = {
            "model_init: Trainer would build a new model for every task. Pass model=model_init().": self.model_init,
            "a scheduler in `optimizers`: it would end with the first task. Use lr_scheduler_type.": given_scheduler,
            "reset_optimizer and an optimizer in `optimizers`, which cannot be built again. Use `optim` or "
            "optimizer_cls_and_kwargs.": self.args.reset_optimizer and given_optimizer,
            "dataloader_persistent_workers: Trainer would keep evaluating on the first task's data. Leave it out.": (
                self.args.dataloader_persistent_workers
            ),
            "bf16_full_eval or fp16_full_eval: evaluating would cast the weights that are trained. Leave it out.": (
                self.args.bf16_full_eval or self.args.fp16_full_eval
            ),
        }
        for problem, given in problems.items():
            if given:
                raise ValueError(f"train_sequence cannot be used with {problem}")

    def _note_importance(self, state: dict[str, Any], stage: int) -> None:
        for layer, mean in layer_means(self.accumulators()).items():
            means = state.setdefault("importance", {}).setdefault(layer, [])
            means += [0.0] * (stage - len(means)) + [mean]

    def _log_row(self, tasks: list[Task], rows: list[list[float]]) -> None:
        """Send what R says of the tasks so far to the loggers."""
        known = summarize([row[: len(tasks)] for row in rows], self.greater_is_better)
        self._logged_task = "sequence"
        values = {f"{self.args.sequence_metric}/{task.name}": value for task, value in zip(tasks, rows[-1])}
        values |= {k: known[k] for k in ("average_accuracy", "forgetting") if known[k] is not None}
        self.log(values)

    def _check_learned_tasks(self, tasks: list[Task]) -> None:
        learned = self.args.learned_tasks
        if learned >= len(tasks):
            raise ValueError(f"learned_tasks={learned} leaves none of the {len(tasks)} tasks to train on.")
        if self.task_heads is not None:
            known = self.task_heads.state_dict()
            if unknown := [task.name for task in tasks[:learned] if task.name not in known]:
                raise ValueError(
                    f"With heads='per_task' the heads of learned tasks come from the memory, which has none of {unknown}. "
                    "Pass the memory of the run that learned them."
                )
        names = [task.name for task in tasks]
        strange = [name for name in names[:learned] if name not in self.seen_tasks]
        again = [name for name in names[learned:] if name in self.seen_tasks]
        if learned and self.seen_tasks and (strange or again):
            parts = [f"has not seen {strange}"] * bool(strange) + [f"has seen {again} already"] * bool(again)
            logger.warning(
                f"learned_tasks={learned} says that {names[:learned]} are learned and the other tasks are not, but the memory, of "
                f"{self.seen_tasks}, {' and '.join(parts)}."
            )
        if learned and self.args.optim == NAME and not self.accumulators():
            logger.warning(
                "learned_tasks without a memory: CLASSP knows nothing of what these tasks needed. Pass memory=, or a method "
                "that is shown their data, such as 'ewc'."
            )

    def _open_state(self, base: Path, tasks: list[Task], resume: str | bool | None) -> dict[str, Any]:
        resume = self.args.resume_from_checkpoint if resume is None else resume
        if isinstance(resume, str):
            if resume.lower() not in ("true", "false") and Path(resume).resolve() != base.resolve():
                raise ValueError(
                    f"A sequence resumes from its own output_dir ({base}), not from {resume!r}. Pass "
                    "resume_from_checkpoint=True; to start from a model and its memory, pass them as model and memory."
                )
            resume = resume.lower() != "false"
        config = self._sequence_config(tasks)
        path = base / STATE_NAME
        state: dict[str, Any] = {"config": config, "accuracy_matrix": [], "seconds": 0.0}
        if path.is_file():
            state = read_state(path)
            differing = [k for k in config if state["config"].get(k) != config[k]]
            if differing:
                what = "; ".join(f"{k}: {state['config'].get(k)} there, {config[k]} here" for k in differing[:3])
                raise ValueError(f"{base} holds another sequence's run ({what}). Choose another output_dir.")
            if not resume:
                raise ValueError(
                    f"{base} already holds this sequence's run ({max(len(state['accuracy_matrix']) - 1, 0)} of "
                    f"{len(tasks)} tasks done). Pass --resume_from_checkpoint True to go on from it, or choose another "
                    "--output_dir."
                )
            state["resumed"] = True
        elif resume:
            logger.warning(f"Nothing to resume in {base}: the sequence starts at its first task.")
        self.accelerator.wait_for_everyone()  # nobody writes before everybody has read
        if self.is_world_process_zero():
            remove_temporaries(base)
            with writing("the sequence's state", base):
                base.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=base).close()  # all tasks are evaluated before the first write: know now
        return state

    def _sequence_config(self, tasks: list[Task]) -> dict[str, Any]:
        """What must be the same for two runs to be the same one."""
        keys = ["optim_args", "learning_rate", "weight_decay", "lr_scheduler_type", "num_train_epochs", "max_steps", "max_grad_norm", "heads", "reset_optimizer", "learned_tasks", "sequence_metric", "max_length", "memory", "gather_memory", "memory_power", "seed"]  # fmt: skip
        args = self.args.to_dict()
        config = {
            "tasks": [[t.name, len(t.train_dataset), len(t.measured_dataset)] for t in tasks],
            "model": self.model.config.name_or_path or None,
            "method": self.method.describe(),
            "optim": self.args.optim_name,
            "global_batch_size": self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size,
            **{k: args[k] for k in keys},
        }
        return json.loads(json.dumps(public_arguments(config, known_secrets(vars(self.args)))))

    def _write_state(self, base: Path, state: dict[str, Any], earlier: list[Path]) -> None:
        """Record what is done. From here on nobody needs the `earlier` tasks' folders."""
        if self.is_world_process_zero():
            with writing("the sequence's state", base / STATE_NAME):
                report.write_json(base / STATE_NAME, {k: v for k, v in state.items() if k != "resumed"})
        if self.args.should_save and not self.args.keep_task_models:
            for folder in earlier:
                shutil.rmtree(folder, ignore_errors=True)
        self._preemption.leave_if_asked()

    def _train_task(self, t: int, tasks: list[Task], folder: Path, resume: bool) -> None:
        task = tasks[t]
        # The same start whether or not the run was interrupted before, and whatever earlier tasks drew.
        set_seed(self.args.seed + t)
        if self.args.reset_optimizer:
            self.optimizer = None
            if self.args.optim == NAME and t > self.args.learned_tasks:
                self._pending_memory = None  # of a resumed run: the last task's
        elif self.optimizer is not None:
            for group in self.optimizer.param_groups:  # schedules other than LambdaLR would go on from the last value
                group["lr"] = group.get("initial_lr", self.args.learning_rate)
        if self.task_heads is not None:
            self.task_heads.activate(task.name)
            self.active_label_ids = task.label_ids
            if self.optimizer is not None:
                self.task_heads.forget_optimizer_state(self.optimizer)
        started = time.monotonic()
        self._logged_task = task.name
        self._shard()
        self.method.before_task(self, task)
        earlier = [previous.train_dataset for previous in tasks[:t]]
        self.train_dataset = self.method.extend_train_dataset(task.train_dataset, earlier)
        self.eval_dataset = task.eval_dataset
        self.args.output_dir = str(folder)
        checkpoint = self._begin_folder(folder) if resume else None
        boundary = time.monotonic() - started
        self.train(resume_from_checkpoint=checkpoint)
        started = time.monotonic()
        self.method.after_task(self, task)
        self._between_tasks = True
        self._boundary_seconds += boundary + time.monotonic() - started
        if task.name not in self.seen_tasks:
            self.seen_tasks.append(task.name)

    def _begin_folder(self, folder: Path) -> str | None:
        """The checkpoint to go on from in the folder of an interrupted task, if any. Others may be half-written: they go."""
        checkpoint = None if self.args.save_only_model else self._last_checkpoint(folder)
        if self.args.should_save:
            for other in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                if not is_complete(other):
                    shutil.rmtree(other, ignore_errors=True)
        return checkpoint

    def _show_learned_task(self, task: Task, informed: dict[str, list[str]]) -> None:
        """What happens around a task's training, without the training.

        Args:
            informed: `tasks` of the memory the run began with, and `methods` that had a state in it.
        """
        started = time.monotonic()
        if self.task_heads is not None:
            self.task_heads.activate(task.name)
            self.active_label_ids = task.label_ids
        for method in self.method.parts():
            if task.name in informed["tasks"] and method.name in informed["methods"]:
                continue  # the memory that was loaded holds what the method knows of this task
            method.before_task(self, task)
            method.extend_train_dataset(task.train_dataset, [])
            method.after_task(self, task)
        self._between_tasks = True
        if task.name not in self.seen_tasks:
            self.seen_tasks.append(task.name)
        self._boundary_seconds += time.monotonic() - started

    def _save_boundary(self, folder: Path) -> None:
        with writing("the model after the task", folder):
            self._write_boundary(folder)
        self.accelerator.wait_for_everyone()

    def _write_boundary(self, folder: Path) -> None:
        self.save_model(str(folder), _internal_call=True)  # True: not yet the model to push
        persists = not self.args.reset_optimizer and not isinstance(_unwrap(self.optimizer), CLASSP)
        if self.optimizer is not None and persists:
            state = optimizer_state(self.bare_optimizer, self.model)
            if self.args.should_save:
                with replacing(folder / "optimizer.pt") as temporary:
                    torch.save(state, temporary)
        if self.args.should_save:
            sync_folder(folder)  # the task before this one is deleted as soon as this one is recorded
        self.accelerator.wait_for_everyone()

    def _restore_boundary(self, folder: Path, task: Task) -> None:
        """Weights, memory and optimizer as the finished `task` left them."""
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}, the model after task {task.name!r}, is gone: the run cannot go on without it. Put it back, or start "
                "again in another output_dir."
            )
        self._between_tasks = True
        if self.task_heads is not None:
            self.task_heads.active = None
        load_weights(self.model, folder)
        if (folder / MEMORY_NAME).is_file():
            self.load_memory(ContinualMemory.load(folder), resumed=True)
        if self.task_heads is not None:
            self.task_heads.active = task.name
        if (folder / "optimizer.pt").is_file():
            self._pending_optimizer = folder / "optimizer.pt"

    def _evaluate_tasks(self, tasks: list[Task]) -> list[float]:
        """One row of R: the metric of every task on its test split."""
        key = f"eval_{self.args.sequence_metric}"
        active = self.task_heads.active if self.task_heads is not None else None
        row = []
        for task in tasks:
            if self.task_heads is not None:
                self.task_heads.activate(task.name)
                self.active_label_ids = task.label_ids
            self._logged_task = task.name
            if self.task_metric is not None:
                row.append(self._task_metric(task))
                continue
            metrics = self.evaluate(task.measured_dataset)
            if key not in metrics:
                raise ValueError(
                    f"sequence_metric={self.args.sequence_metric!r} is not among what compute_metrics returned: "
                    f"{sorted(k.removeprefix('eval_') for k in metrics)}"
                )
            row.append(float(metrics[key]))
        if self.task_heads is not None and active is not None:
            self.task_heads.activate(active)
        logger.info("Evaluation: " + ", ".join(f"{task.name} {value:.4f}" for task, value in zip(tasks, row)))
        return row

    def _task_metric(self, task: Task) -> float:
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            value = float(self.task_metric(self.model, self.processing_class, self._measured[task.name]))  # type: ignore[misc]
        self.model.train(was_training)
        if not math.isfinite(value):
            raise ValueError(f"task_metric returned {value} for task {task.name!r}; R holds finite numbers.")
        self.log({f"eval_{self.args.sequence_metric}": value})
        return value

    def _finish(self, base: Path, tasks: list[Task], state: dict[str, Any]) -> dict[str, Any]:
        with writing("the final model", base):
            if self.args.should_save:
                (base / "results.json").unlink(missing_ok=True)  # of a finished run: it says that all else is there
            self.save_model(str(base), _internal_call=True)
        names = [task.name for task in tasks]
        id2label = self.model.config.id2label if not self.writes else {}
        secrets = known_secrets(vars(self.args))
        results = {
            "tasks": names,
            "datasets": sorted({task.hub_id for task in tasks if task.hub_id}),
            "accuracy_matrix": state["accuracy_matrix"],
            "metrics": summarize(state["accuracy_matrix"], self.greater_is_better),
            "metric": self.args.sequence_metric,
            "greater_is_better": self.greater_is_better,
            "auto_class": _auto_class(self.model),
            "folds_adapters": self.method.folds_adapters,
            "peft": bare_model(self.model) is not self.model and not self.method.folds_adapters,
            "label_names": [id2label[i] for i in sorted(id2label)],
            "method": state["config"]["method"],
            "optimizer": state["optimizer"],
            "arguments": public_arguments(json.loads(self.args.to_json_string()), secrets),
            "command": public_command([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]], secrets),
            **report.environment(num_processes=self.args.world_size),
            "seconds": state["seconds"],
            "boundary_seconds": state["boundary_seconds"],
            "importance": state.get("importance", {}),
        }
        self.sequence_results = results
        with writing("the results", base):
            if self.is_world_process_zero():
                report.write_figures(base, results)
            self.create_model_card()
            if self.is_world_process_zero():
                sync_folder(base)
                report.write_json(base / "results.json", results)
        self.accelerator.wait_for_everyone()
        return results

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """After `train_sequence` the card that shows R; Trainer's own otherwise. `push_to_hub` calls this too."""
        if self.sequence_results is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            path = Path(str(self.args.output_dir)) / "README.md"
            base_model = self.model.config.name_or_path or None
            tags = kwargs.get("tags") or []
            report.write_model_card(
                path,
                results=self.sequence_results,
                base_model=base_model,
                license=kwargs.get("license") or self.args.model_license,
                tags=[tags] if isinstance(tags, str) else tags,
            )

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Trainer's; after `train_sequence` the final model, its memory, R and the card, and not the tasks' folders.

        Raises:
            RuntimeError: the upload failed; says what to do. Nothing local is lost.
        """
        if self.sequence_results is None:
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        return push_folder(
            str(self.args.output_dir),
            str(self.hub_model_id),
            commit_message=commit_message,
            token=token,
            revision=revision or self.args.hub_revision,
            run_as_future=not blocking,
        )

    def _mask_other_tasks_labels(self, logits: Any, labels: Tensor) -> Any:
        """With a head a task, the task is known: labels of other tasks are no candidates."""
        if self.task_heads is None or self.active_label_ids is None or not isinstance(logits, Tensor):
            return logits
        mask = torch.full_like(logits, float("-inf"))
        mask[..., self.active_label_ids] = 0
        return logits + mask


class ClasspTrainer(ContinualTrainer):
    """[`ContinualTrainer`] with the CLASSP optimizer (arXiv 2405.09637), whatever `args.optim` says.

    Args:
        consolidation: what else the memory is used for: `"anchor"` pulls weights back to the last boundary while training
            ([`~classp_hf.Elastic`]), `"merge"` averages old and new weights when a task ends ([`~classp_hf.Merge`]),
            `"both"`, or `"none"`, the paper's method.
        anchor_strength: strength of the anchor. Default: Elastic's.
        merge_weight: weight of the new task in the merge. Default: Merge's.
        logit_adjustment: keep label frequencies off the model ([`~classp_hf.LogitAdjustment`]). Default: where it can be
            used, which is single-label classification with one shared head.
        method: further methods, run before these.
        kwargs: as in [`ContinualTrainer`].
    """

    default_optim = NAME

    def __init__(
        self,
        *args: Any,
        consolidation: Literal["none", "anchor", "merge", "both"] = "none",
        anchor_strength: float | None = None,
        merge_weight: float | None = None,
        logit_adjustment: bool | None = None,
        method: Method | str | Sequence[Method | str] | None = None,
        **kwargs: Any,
    ) -> None:
        if consolidation not in ("none", "anchor", "merge", "both"):
            raise ValueError(f"consolidation must be 'none', 'anchor', 'merge' or 'both', got {consolidation!r}")
        uses = {"anchor": (Elastic, anchor_strength), "merge": (Merge, merge_weight)}
        methods = list(_make_method(method).parts()) if method is not None else []
        for use, (cls, value) in uses.items():
            if consolidation in (use, "both"):
                methods.append(cls() if value is None else cls(value))
            elif value is not None:
                raise ValueError(
                    f"{cls.name} is not used with consolidation={consolidation!r}, but its strength was given."
                )
        self._logit_adjustment = logit_adjustment
        super().__init__(*args, method=methods or None, **kwargs)

    def _complete_method(self, method: Method) -> Method:
        wanted = self._logit_adjustment
        if wanted is None:
            wanted = self.classifies and self.args.heads == "shared"
        parts = [m for m in method.parts() if m.name != Method.name]
        if not wanted or any(m.name == LogitAdjustment.name for m in parts):
            return method
        return _make_method([*parts, LogitAdjustment()])


class EWCTrainer(ContinualTrainer):
    """[`ContinualTrainer`] with Elastic Weight Consolidation (arXiv 1612.00796) and the optimizer of `args.optim`.

    Args:
        ewc_lambda: strength of the penalty. Default: EWC's. Its other hyperparameters: `method=EWC(ewc_lambda=3.0, ...)`.
        kwargs: as in [`ContinualTrainer`].
    """

    default_method = "ewc"

    def __init__(self, *args: Any, ewc_lambda: float | None = None, **kwargs: Any) -> None:
        if ewc_lambda is not None:
            if kwargs.get("method") is not None:
                raise ValueError("Pass ewc_lambda or method, not both: method=EWC(ewc_lambda=...).")
            kwargs["method"] = METHODS["ewc"](ewc_lambda=ewc_lambda)  # type: ignore[call-arg]
        super().__init__(*args, **kwargs)


class _MethodCallback(TrainerCallback):
    """Runs the trainer's method at the points Trainer has events for."""

    def __init__(self, trainer: ContinualTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.restore_pending()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.before_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.method.after_step(self.trainer.model)


def _make_method(method: Method | str | Sequence[Method | str] | None) -> Method:
    if isinstance(method, Method):
        return method
    parts: Sequence[Method | str] = (
        [Method.name] if not method else method.split("+") if isinstance(method, str) else method
    )
    methods = []
    for part in parts:
        if isinstance(part, str) and part not in METHODS:
            raise ValueError(f"Unknown method {part!r}. Known: {', '.join(METHODS)}, and several joined by '+'.")
        methods.append(METHODS[part]() if isinstance(part, str) else part)
    return methods[0] if len(methods) == 1 else Combined(methods)


def _unwrap(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _describe_optimizer(optimizer: Any, args: ContinualTrainingArguments) -> dict[str, Any]:
    if optimizer is None:
        return {"name": args.optim_name, "lr": args.learning_rate}
    values = {k: v for k, v in optimizer.defaults.items() if isinstance(v, (int, float, str, bool, tuple, type(None)))}
    return {"name": type(optimizer).__name__, **values, "lr": args.learning_rate}


def _auto_class(model: nn.Module) -> str:
    """The class of Transformers to load the model with."""
    if not is_language_model(model):
        return "AutoModelForSequenceClassification"
    return "AutoModelForSeq2SeqLM" if bare_model(model).config.is_encoder_decoder else "AutoModelForCausalLM"
