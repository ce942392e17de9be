"""The trainers: `ContinualTrainer` is Trainer with the engine; `ClasspTrainer` and `EWCTrainer` are named shells on
it."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from .classification import accuracy, classification_loss, is_single_label_classifier
from .compat import PatchedTrainer, refuse_sharding
from .engine import NONE, ContinualCallback
from .files import writing
from .guard import guards
from .heads import TaskHeads
from .hub import push_folder
from .launch import shard_on_cpus
from .live import CLASSP_LEARNING_RATE, CLASSP_NAME
from .memory import ContinualMemory, find_memory
from .methods import Context, Method, make_methods
from .methods.adapters import folded_state_dict
from .names import bare_model, is_language_model, model_source, trainable_parameters
from .optim import CLASSP
from .optim_args import parse_optim_args
from .preemption import PreemptionCallback
from .report import write_model_card
from .resume import last_complete_checkpoint
from .sequence import SequenceRun
from .tasks import Task
from .training_args import with_continual_defaults

logger = logging.get_logger(__name__)


class ContinualTrainer(PatchedTrainer):
    """A [`transformers.Trainer`] that also fine-tunes over a sequence of tasks.

    `train()` alone is Trainer's, with the memory and the method; `train_sequence(tasks)` trains on one task after
    another and fills the accuracy matrix R. The optimizer (`args.optim`) and the continual-learning method are
    independent choices.

    Args:
        model: as in Trainer.
        args: [`ContinualTrainingArguments`], or any other `TrainingArguments`.
        method: a [`~classp_hf.methods.Method`], the name of one (`"ewc"`), several of either (`"replay+elastic"`, or a
            list), or None.
        memory: go on from this continual memory: a file, the folder of a model saved with one, or a Hub id. The same
            as `args.memory`.
        task_metric: fills R instead of a metric from `compute_metrics`: `task_metric(model, processing_class,
            dataset)` gives one number for the measured split of a task as it was given, with its own columns: for what
            has to be generated, for instance. Called on every rank, with the whole split, in evaluation mode.
        kwargs: every other argument of Trainer. `compute_metrics` defaults to the accuracy, and the loss of
            single-label classifiers to the cross-entropy averaged over the whole accumulated batch (see
            `docs/architecture.md`).

    Raises:
        ValueError: an unknown method, bad `optim_args`, a memory that does not fit the model, DeepSpeed, FSDP
            version 1.
    """

    default_optim: ClassVar[str | None] = None

    args: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | Any = None,
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
        args = with_continual_defaults(args)
        refuse_sharding(args)
        if self.default_optim is not None:
            if args.default_learning_rate and args.optim != self.default_optim:
                args.learning_rate = CLASSP_LEARNING_RATE
            args.optim = self.default_optim
        args.memory = args.memory if memory is None else str(memory)
        _check_processes(args)
        given_optimizer = kwargs.get("optimizers", (None, None))[0] or kwargs.get("optimizer_cls_and_kwargs")
        if args.optim == CLASSP_NAME and not given_optimizer:
            hyperparameters = parse_optim_args(args.optim_args)[0]
            kwargs["optimizer_cls_and_kwargs"] = (CLASSP, {"lr": args.learning_rate, **hyperparameters})
        if args.eval_strategy != "no" and eval_dataset is None:
            eval_dataset = {}  # the tasks bring their own; Trainer refuses None here
        if data_collator is None and processing_class is not None and model is not None and is_language_model(model):
            # pads labels too, of causal models as well
            data_collator = DataCollatorForSeq2Seq(processing_class, model)
        if args.should_save:
            with writing("the output", str(args.output_dir)):
                os.makedirs(str(args.output_dir), exist_ok=True)
        saves_on_sigterm, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
        shard_on_cpus(args)
        self.engine = _Engine(
            make_methods(method),
            args.memory or NONE,
            revision=args.memory_revision,
            gather=args.gather_memory,
            power=args.memory_power,
        )
        self.engine.trainer = self
        self.run_folder: Path | None = None
        """Where the present task of a sequence writes. None: `args.output_dir`."""
        self.logged_task: str | None = None
        """The task whose name the loggers' keys begin with."""
        self.earlier_steps = 0
        """Steps of the sequence's earlier tasks, for the loggers."""
        self.active_label_ids: list[int] | None = None
        self.adapters_folded = False
        """Whether the model's adapters are part of its base weights: it is saved as a plain one."""
        self.sequence_results: dict[str, Any] | None = None
        kwargs["callbacks"] = [self.engine, *(kwargs.get("callbacks") or [])]
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        self.args.enable_jit_checkpoint = saves_on_sigterm  # by our own callback
        for guard in guards(self):
            guard.place = lambda: self.run_folder
        for callback in [c for c in self.callback_handler.callbacks if type(c) is ContinualCallback]:
            self.remove_callback(callback)  # of `register`; the trainer has its own
        if self.is_fsdp_enabled:
            self.check_fsdp(self.accelerator.state.fsdp_plugin)
        self.given_optimizers = kwargs.get("optimizers", (None, None))
        self.classifies, self.generates = is_single_label_classifier(self.model), is_language_model(self.model)
        if self.classifies:
            self.compute_loss_func = self.compute_loss_func or self.adjusted_loss
            self.compute_metrics = self.compute_metrics or accuracy
        self.task_metric = task_metric
        self._choose_metric()
        if self.preprocess_logits_for_metrics is None:
            self.preprocess_logits_for_metrics = self._mask_other_tasks_labels
        self.task_heads = TaskHeads(self.model) if args.heads == "per_task" else None
        self.engine.heads, self.engine.accelerator, self.engine.model = self.task_heads, self.accelerator, self.model
        for part in self.methods:
            part.excluded = self.engine.excluded
        self._complete_methods()
        for method in self.methods if self.compute_loss_func != self.adjusted_loss else ():
            if type(method).adjust_logits is not Method.adjust_logits:
                raise ValueError(
                    f"The method {method.name!r} adjusts the logits of the trainer's own loss, which is for "
                    "single-label classifiers: pass no compute_loss_func, or leave the method out."
                )
        if self.args.memory is not None:
            self.load_memory(ContinualMemory.load(self.args.memory, self.args.memory_revision), repr(self.args.memory))
        elif self.args.optim == CLASSP_NAME:
            self._note_memory_beside()
        for callback in self.callback_handler.callbacks:
            if type(callback) in INTEGRATION_TO_CALLBACK.values():
                callback.on_log = functools.partial(self._log_to, callback.on_log)  # type: ignore[method-assign]
        self.preemption = PreemptionCallback(self)
        self.add_callback(self.preemption)  # the last: it may end the process

    def _choose_metric(self) -> None:
        if self.args.sequence_metric is None:
            named = getattr(self.task_metric, "__name__", "metric") if self.task_metric is not None else None
            no_accuracy = self.generates or self.compute_metrics is None
            self.args.sequence_metric = named or ("loss" if no_accuracy else "accuracy")
        greater = self.args.sequence_metric_greater_is_better
        losses = ("loss", "perplexity")
        self.greater_is_better = self.args.sequence_metric not in losses if greater is None else greater

    def _complete_methods(self) -> None:
        """Add to the methods what a trainer's class brings along."""

    # ---- Method and memory ----

    @property
    def methods(self) -> list[Method]:
        return self.engine.methods

    @property
    def seen_tasks(self) -> list[str]:
        return self.engine.tasks

    def accumulators(self) -> dict[str, Tensor]:
        """Canonical name -> `sum |g|^p` over all training so far: [`ContinualCallback.accumulators`]."""
        return self.engine.accumulators()

    def continual_memory(self) -> ContinualMemory:
        """The memory as it stands. If the model is sharded, call it on every rank."""
        return self.engine.memory(self.args)

    def load_memory(self, memory: ContinualMemory, where: str = "", *, same_run: bool = False) -> None:
        """Go on from `memory`; [`ContinualCallback.load`] says how, and what it raises."""
        self.engine.load(memory, self.model, self.args, same_run=same_run, where=where)

    def _note_memory_beside(self) -> None:
        try:
            path = find_memory(Path(model_source(self.model) or "/nowhere").absolute())
        except FileNotFoundError:
            return
        logger.warning(f"{path}, beside the model, is not used. Pass memory={str(path.parent)!r} to go on from it.")

    def context(self) -> Context:
        """What the methods see, before anything is trained."""
        return Context(
            model=self.model,
            args=self.args,
            seen_tasks=list(self.seen_tasks),
            accumulators=self.accumulators,
            processing_class=self.processing_class,
            accelerator=self.accelerator,
            per_task_heads=self.task_heads is not None,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = dict(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        # by Trainer's own rule (transformers 5.23): such a loss is not divided by the accumulation steps again
        whole = num_items_in_batch is not None and bool(self.compute_loss_func or self.model_accepts_loss_kwargs)
        for method in self.methods:
            term = method.loss_term(outputs, given, num_items_in_batch if whole else None)
            if term is not None:
                ranks = self.accelerator.num_processes if whole and self.args.average_tokens_across_devices else 1
                loss = loss + term * ranks
        return (loss, outputs) if return_outputs else loss

    def adjusted_loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """The loss of a single-label classifier, from the logits as the methods adjust them."""
        smoothing = 0.0
        if self.model.training:
            smoothing = self.args.label_smoothing_factor
            outputs = copy.copy(outputs)
            for method in self.methods:
                outputs["logits"] = method.adjust_logits(outputs["logits"])
        return classification_loss(outputs, labels, num_items_in_batch, label_smoothing=smoothing)

    # ---- Training ----

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As Trainer's; a checkpoint that holds a continual memory gives back the methods' state too."""
        self.adapters_folded = False
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.last_checkpoint(self.engine.folder(self.args)) or True
        if isinstance(resume_from_checkpoint, str):
            self.engine.checkpoint = Path(resume_from_checkpoint)
            if any(m.needs_start for m in self.methods):
                named = trainable_parameters(self.model)
                self.engine.start = {n: p.detach().cpu().clone() for n, p in named}
        if self.args.eval_strategy != "no" and self.eval_dataset == {}:
            raise ValueError("eval_strategy needs an eval_dataset, and the trainer was given none.")
        for method in self.methods:
            method.prepare_model(self.model, self.seen_tasks)
        with self.preemption.listening():
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        self.adapters_folded = any(m.folds_adapters for m in self.methods)
        return result

    def last_checkpoint(self, folder: Path) -> str | None:
        """The last complete checkpoint in `folder`, the same on every rank."""
        return broadcast_object_list([last_complete_checkpoint(folder)])[0]

    def train_sequence(self, tasks: list[Task], resume_from_checkpoint: str | bool | None = None) -> dict[str, Any]:
        """Train on `tasks`, one after another, and evaluate all of them before the first and after each.

        Texts are tokenised with `processing_class` and labels aligned by name with `model.config.label2id`; prepared
        datasets are used as they are. Writes into `args.output_dir`: `sequence_state.json` (what is done),
        `00-<task>/` and so on (Trainer's checkpoints, the model and the memory after the task; deleted when the next
        task is done, unless `args.keep_task_models`), and at the end the final model with its memory, plots, a model
        card and, last of all, `results.json`. Nothing is pushed to the Hub before [`push_to_hub`].

        With `args.learned_tasks` the first tasks are those the given model has learned already, in an earlier run or
        anywhere else: they are evaluated and shown to the method, not trained on. Their rows of R repeat the row
        before.

        Args:
            tasks: at least one, with distinct names.
            resume_from_checkpoint: True goes on from what `args.output_dir` holds; a run killed at any point ends with
                the same R, weights and memory, bit for bit on CPUs. Default: `args.resume_from_checkpoint`.

        Returns:
            The content of `results.json`: `tasks`, `accuracy_matrix` (T+1 rows x T columns, row 0 = before any
            training here, values in the metric's own unit), `metrics`, `seconds`, `boundary_seconds` (the method's,
            before and after tasks), and what describes the run.

        Raises:
            ValueError: bad tasks (see `prepare_tasks`), or an output directory that holds another run.
            OSError: the disk is full, or the output directory cannot be written to.
            SystemExit: 143, after a SIGTERM with `args.enable_jit_checkpoint`, when what was done is saved.
        """
        if isinstance(tasks, Task):
            raise ValueError(f"train_sequence takes a list of tasks, got the task {tasks.name!r} alone. Pass [task].")
        with self.preemption.listening():
            self.sequence_results = SequenceRun(self, tasks, Path(str(self.args.output_dir))).run(
                resume_from_checkpoint
            )
        return self.sequence_results

    def activate_head(self, task: Task | None) -> None:
        """With a head a task put that of `task` into the model; None: whatever is in it is nobody's."""
        if self.task_heads is None:
            return
        if task is None:
            self.task_heads.active = None
        else:
            self.task_heads.activate(task.name)
            self.active_label_ids = task.label_ids

    def _mask_other_tasks_labels(self, logits: Any, labels: Tensor) -> Any:
        """With a head a task, the task is known: labels of other tasks are no candidates."""
        if self.task_heads is None or self.active_label_ids is None or not isinstance(logits, Tensor):
            return logits
        mask = torch.full_like(logits, float("-inf"))
        mask[..., self.active_label_ids] = 0
        return logits + mask

    # ---- Where Trainer writes ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run_folder) if self.run_folder is not None else super()._get_output_dir(trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with `update_density`, the share of coordinates that CLASSP updated, and a guard's values."""
        self.engine.on_log(self.args, self.state, self.control, logs)
        for guard in guards(self):
            guard.on_log(self.args, self.state, self.control, logs)
        super().log(logs, start_time)

    def _log_to(
        self, on_log: Callable[..., Any], args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
    ):
        """What a logger gets: in a sequence every key begins with the task's name, and steps count on from task to
        task."""
        if self.logged_task is not None and logs is not None:
            state, task = copy.copy(state), self.logged_task
            state.global_step += self.earlier_steps
            plain = ("epoch", "num_input_tokens_seen")
            logs = {
                k if k in plain else f"eval_{task}/{k[5:]}" if k.startswith("eval_") else f"{task}/{k}": v
                for k, v in logs.items()
            }
        return on_log(args, state, control, logs=logs, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and, beside it, the continual memory."""
        if not self.engine.follows(self.model):
            self.engine.write(output_dir or str(self.args.output_dir), self.args)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.adapters_folded:
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

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with writing(f"the checkpoint of step {self.state.global_step}", self._get_output_dir(None)):
            super()._save_checkpoint(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.run_folder is None:  # a sequence is pushed as a whole
            super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """After `train_sequence` the card that shows R; Trainer's own otherwise. `push_to_hub` calls this too."""
        names = ("language", "license", "tags", "model_name", "finetuned_from")  # Trainer's positional arguments
        given = {**dict(zip(names, args)), **kwargs}
        if self.sequence_results is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            tags = given.get("tags") or []
            write_model_card(
                Path(str(self.args.output_dir)) / "README.md",
                results=self.sequence_results,
                base_model=given.get("finetuned_from") or model_source(self.model) or None,
                license=given.get("license") or self.args.model_license,
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
        """As Trainer's; after `train_sequence` the final model, its memory, R and the card, and not the tasks'
        folders.

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


class _Engine(ContinualCallback):
    """The engine of a [`ContinualTrainer`]."""

    trainer: ContinualTrainer

    def folder(self, args: Any) -> Path:
        return Path(self.trainer._get_output_dir(None))


def _check_processes(args: Any) -> None:
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
