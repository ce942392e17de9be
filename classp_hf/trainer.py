"""`ContinualTrainer`: Trainer, an engine, and training over a sequence of tasks."""

import copy
import functools
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, ImageProcessingMixin, Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from .classification import accuracy, classification_loss, is_single_label_classifier
from .compat import PatchedTrainer, scale_loss_once, sums_own_loss
from .engine import ContinualCallback, TrainersEngine, engine_of
from .files import explaining_full_disks
from .guard import guards
from .heads import TaskHeads
from .launch import shard_on_cpus
from .live import CLASSP_NAME, NONE
from .memory import ContinualMemory, warn_of_unused_memory
from .methods import Context, Method, make_methods
from .methods.adapters import folded_state_dict
from .names import bare_model, is_language_model, model_source
from .optim import CLASSP
from .optim_args import parse_optim_args
from .preemption import PreemptionCallback
from .remember import PRETRAINED
from .report import write_model_card
from .resume import last_complete_checkpoint
from .sequence import SequenceRun
from .tasks import Task
from .training_args import greater_is_better, with_continual_defaults

logger = logging.get_logger(__name__)

# Not part of a pushed model: a folder for every task, what only resuming needs, the loggers' files, a pickle.
NOT_PUSHED = ["[0-9][0-9]-*/*", "[0-9][0-9][0-9]-*/*", "checkpoint-*", "runs/*", "_*", ".*"]
NOT_PUSHED += ["sequence_state.json", "training_args.bin"]


class ContinualTrainer(PatchedTrainer):
    """A [`transformers.Trainer`] that also fine-tunes over a sequence of tasks.

    `train()` alone is Trainer's, with the memory and the method; `train_sequence(tasks)` trains on one task after
    another and fills the accuracy matrix R. The optimizer (`args.optim`) and the continual-learning method are
    independent choices.

    Args:
        model: as in Trainer.
        args: [`ContinualTrainingArguments`], or any other `TrainingArguments`; a copy is used.
        method: a [`~classp_hf.methods.Method`], the name of one (`"ewc"`), or several of either (`"replay+elastic"`,
            or a list). Default: none.
        memory: the continual memory to start from: a file, the folder of a model saved with one, a Hub id, `"none"`,
            or `"pretrained"` as in [`ContinualTrainingArguments`]. Default: `args.memory`.
        task_metric: fills R instead of a metric from `compute_metrics`, for generated texts, for instance.
            `task_metric(model, processing_class, dataset)` returns one finite number; `dataset` is the measured split
            of a task as it was given, with its own columns. Every rank calls it, with the whole split, in evaluation
            mode. Default: none.
        kwargs: every other argument of Trainer. For single-label classifiers `compute_metrics` defaults to the
            accuracy, and the loss to the cross-entropy averaged over the whole accumulated batch (see
            `docs/architecture.md`). For language models `data_collator` defaults to `DataCollatorForSeq2Seq`.

    Raises:
        ValueError: an unknown method, bad `optim_args`, a memory that does not fit the model, a `compute_loss_func`
            beside a method that adjusts logits, DeepSpeed, FSDP version 1, one process on several GPUs.
        FileNotFoundError: there is no memory at `memory`.
    """

    default_optim: ClassVar[str | None] = None
    """The optimizer of the class, whatever `args.optim` says."""

    args: Any
    called: frozenset[str] = frozenset()  # hooks of methods that the present step has come by

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
        if ContinualCallback.script is not None and ContinualCallback.launched:
            given = ", ".join(f"--{name}" for name in ContinualCallback.launched)
            raise ValueError(
                f"{given} before {ContinualCallback.script} are for scripts that know nothing of classp_hf, and this "
                f"one builds a {type(self).__name__}. Pass them in its arguments: method=, memory=, args."
            )
        args = with_continual_defaults(args, self.default_optim)
        args.memory = args.memory if memory is None else str(memory)
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise ValueError(
                "ContinualTrainer does not run under DeepSpeed. Use FSDP2 (`accelerate launch --config_file "
                "recipes/accelerate/fsdp2.yaml`) or DDP; or Trainer with `--optim classp`."
            )
        if getattr(args, "predict_with_generate", False) and not isinstance(self, Seq2SeqTrainer):
            raise ValueError("predict_with_generate is Seq2SeqTrainer's. Measure generated texts with task_metric=.")
        _check_processes(args)
        shard_on_cpus(args)
        if args.eval_strategy != "no" and eval_dataset is None:
            eval_dataset = {}  # the tasks bring their own; Trainer refuses None here
        pads = processing_class is not None and not isinstance(processing_class, ImageProcessingMixin)
        if data_collator is None and pads and model is not None and is_language_model(model):
            # pads labels too, of causal models as well
            data_collator = DataCollatorForSeq2Seq(processing_class, model)
        gathering = {"gather": args.gather_memory, "power": args.memory_power}
        gathering["memory_strength"] = args.memory_strength
        gathering["revision"] = args.memory_revision
        self.engine = TrainersEngine(make_methods(method), args.memory or NONE, **gathering)
        self.engine.folder = lambda args: Path(self._get_output_dir(None))
        self.run_folder: Path | None = None
        """Where the present task of a sequence writes. None: `args.output_dir`."""
        self.logged_task: str | None = None
        """The task whose name the loggers' keys begin with."""
        self.earlier_steps = 0
        """Steps of the sequence's earlier tasks, for the loggers."""
        self.sequence_results: dict[str, Any] | None = None
        self.given_optimizers = kwargs.get("optimizers", (None, None))
        self.task_metric = task_metric
        callbacks = kwargs.get("callbacks") or []
        self.engine.refuse_others(callbacks)
        kwargs["callbacks"] = [self.engine, *callbacks]
        saves_on_sigterm, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        args.enable_jit_checkpoint = saves_on_sigterm  # by our own callback
        for callback in list(self.callback_handler.callbacks):
            if isinstance(callback, ContinualCallback) and callback is not self.engine:
                self.remove_callback(callback)  # of `register`; the trainer has its own
            elif type(callback) in INTEGRATION_TO_CALLBACK.values():
                callback.on_log = functools.partial(self._log_to, callback.on_log)  # type: ignore[method-assign]
        if self.is_fsdp_enabled:
            self.check_fsdp(self.accelerator.state.fsdp_plugin)
        self.classifies, self.generates = is_single_label_classifier(self.model), is_language_model(self.model)
        if self.classifies and sums_own_loss(type(self)) is not False:
            self.compute_loss_func = self.compute_loss_func or self.adjusted_loss
        if self.classifies and not (args.batch_eval_metrics or args.prediction_loss_only):
            self.compute_metrics = self.compute_metrics or accuracy
        scale_loss_once(self)
        if args.sequence_metric is None and task_metric is not None:
            args.sequence_metric = getattr(task_metric, "__name__", "metric")
        elif args.sequence_metric is None:
            args.sequence_metric = "loss" if self.generates or self.compute_metrics is None else "accuracy"
        self.greater_is_better = greater_is_better(args)
        self.task_heads = TaskHeads(self.model) if args.heads == "per_task" else None
        if self.model_init is not None and (self.task_heads or any(m.folds_adapters for m in self.methods)):
            raise ValueError(
                "model_init makes another model for every train(), and heads='per_task' and methods on adapters hold "
                "on to one. Pass a model."
            )
        if self.task_heads is not None:
            mask, own = self.task_heads.mask_other_labels, self.preprocess_logits_for_metrics
            self.preprocess_logits_for_metrics = mask if own is None else lambda x, y: own(mask(x, y), y)
        self.engine.heads, self.engine.accelerator, self.engine.model = self.task_heads, self.accelerator, self.model
        self._complete_methods()
        for part in self.methods:
            part.excluded = self.engine.excluded
            adjusts = type(part).adjust_logits is not Method.adjust_logits
            if adjusts and self.compute_loss_func != self.adjusted_loss:
                raise ValueError(
                    f"The method {part.name!r} adjusts the logits of the trainer's own loss, which single-label "
                    "classifiers without a compute_loss_func have. Leave the method out."
                )
        if args.memory not in (None, NONE, PRETRAINED):
            self.load_memory(ContinualMemory.load(args.memory, args.memory_revision), repr(args.memory))
        elif args.memory is None and (args.optim == CLASSP_NAME or self.methods or args.gather_memory):
            if tasks := getattr(engine_of(self.model), "tasks", None):
                logger.warning(
                    f"This model was trained on {', '.join(tasks)} in this process; the memory of that is not used. "
                    "Save the model, and pass memory=FOLDER to go on from it."
                )
            if args.process_index == 0:
                warn_of_unused_memory(self.model, f"Pass memory={model_source(self.model)!r} to go on from it.")
        self.preemption = PreemptionCallback(self)
        self.add_callback(self.preemption)  # the last: it may end the process

    def _complete_methods(self) -> None:
        """Add to the methods what a trainer's class brings along."""

    # ---- Method and memory ----

    @property
    def methods(self) -> list[Method]:
        """The methods of this trainer, in the order in which their hooks run."""
        return self.engine.methods

    @property
    def seen_tasks(self) -> list[str]:
        """Names of the tasks trained on so far, the oldest first."""
        return self.engine.tasks

    @property
    def adapters_folded(self) -> bool:
        """Whether the model's adapters are part of its base weights: it is saved as a plain one."""
        folds = any(method.folds_adapters for method in self.methods)
        return folds and bool(self.seen_tasks) and self.engine.context is None

    def accumulators(self) -> dict[str, Tensor]:
        """Return canonical name -> `sum |g|^p` over all training so far, float32, sharded as the parameters are; empty
        if there is none. Do not write to the tensors."""
        return dict(self.engine.accumulators())

    def continual_memory(self) -> ContinualMemory:
        """Return the present continual memory. If the model is sharded, call it on every rank."""
        return self.engine.memory(self.args)

    def load_memory(self, memory: ContinualMemory, where: str = "", *, same_run: bool = False) -> None:
        """Go on from `memory`: methods take their state now, the optimizer its accumulators when training begins.

        `where` is its source, for messages; `same_run` says that it is of a checkpoint or task boundary of this run.
        Raises ValueError for a memory of another power or model, or with a state that cannot be a method's.
        """
        self.engine.load(memory, self.model, self.args, same_run=same_run, where=where)

    def context(self) -> Context:
        """What the methods see, before anything is trained."""
        return Context(
            model=self.model,
            args=self.args,
            seen_tasks=list(self.seen_tasks),
            accumulators=self.accumulators,
            processing_class=getattr(self.processing_class, "tokenizer", self.processing_class),
            accelerator=self.accelerator,
            per_task_heads=self.task_heads is not None,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As Trainer's; while training, plus the loss terms of the methods."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given, self.called = dict(inputs), self.called | {"loss_term"}
        for method in self.methods:
            method.before_forward(model, given)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        # by Trainer's own rule (transformers 5.23): such a loss is not divided by the accumulation steps again
        whole = num_items_in_batch is not None and bool(self.compute_loss_func or self.model_accepts_loss_kwargs)
        for method in self.methods:
            term = method.loss_term(outputs, given, num_items_in_batch if whole else None)
            if term is not None:
                ranks = self.accelerator.num_processes if whole and self.args.average_tokens_across_devices else 1
                loss = loss + term * ranks
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's; refuses methods that a subclass's `compute_loss` leaves out."""
        self.called = frozenset()
        loss = super().training_step(*args, **kwargs)
        for method in self.methods:
            for hook in ("loss_term", "adjust_logits"):
                if getattr(type(method), hook) is not getattr(Method, hook) and hook not in self.called:
                    raise ValueError(
                        f"The method {method.name!r} works by ContinualTrainer's loss, which {type(self).__name__}'s "
                        "compute_loss does not call. Call super().compute_loss, or leave the method out."
                    )
        return loss

    def adjusted_loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """The loss of a single-label classifier, from the logits as the methods adjust them."""
        smoothing = 0.0
        if self.model.training:
            self.called |= {"adjust_logits"}
            smoothing = self.args.label_smoothing_factor
            outputs = copy.copy(outputs)
            for method in self.methods:
                outputs["logits"] = method.adjust_logits(outputs["logits"])
        return classification_loss(outputs, labels, num_items_in_batch, label_smoothing=smoothing)

    # ---- Training ----

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """As Trainer's, which knows CLASSP by name only after `register()`."""
        if args.optim == CLASSP_NAME:
            return CLASSP, {"lr": args.learning_rate, **parse_optim_args(args.optim_args)[0]}
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As Trainer's; a checkpoint with a continual memory also restores the state of the methods. Raises ValueError
        for a method that cannot run in this set-up, and a checkpoint without its memory or of another optimizer."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(Path(self._get_output_dir(None))) or True
        if isinstance(resume_from_checkpoint, str) and self.run_folder is not None:
            self.engine.keep_start(self.model)
        if self.args.eval_strategy != "no" and self.eval_dataset == {}:
            raise ValueError("eval_strategy needs an eval_dataset, and the trainer was given none.")
        self.engine.refuse_others(self.callback_handler.callbacks)
        for guard in guards(self):
            guard.folder = self.engine.folder
        for method in self.methods:
            method.prepare_model(self.model, self.seen_tasks)
        with self.preemption.listening():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def train_sequence(self, tasks: list[Task], resume_from_checkpoint: str | bool | None = None) -> dict[str, Any]:
        """Train on `tasks`, one after another, and evaluate all of them before the first and after each.

        Texts are tokenised with `processing_class`, and labels are aligned by name with `model.config.label2id`;
        prepared datasets are used as they are. The run writes into `args.output_dir`: `sequence_state.json` (its
        progress), `00-<task>/` and so on (Trainer's checkpoints, the model and the memory after the task; deleted when
        the next task is done, unless `args.keep_task_models`), and at the end the final model with its memory, plots,
        a model card, `results.html` and, last, `results.json`. Nothing is pushed to the Hub before [`push_to_hub`].

        Args:
            tasks: at least one, with distinct names. The first `args.learned_tasks` are evaluated and shown to the
                method, not trained on; their rows of R repeat the row before.
            resume_from_checkpoint: True resumes the run in `args.output_dir`; a run killed at any point ends with the
                same R, weights and memory, bit for bit on CPUs. Default: `args.resume_from_checkpoint`.

        Returns:
            The content of `results.json`: `tasks` (names), `accuracy_matrix` (R, T+1 rows x T columns, row 0 = before
            any training here, in the unit of `metric`), `metrics` (of `classp_hf.metrics.summarize`), `seconds`,
            `boundary_seconds` (the methods' share, before and after tasks), `importance` (layer -> mean accumulator
            at every stage), and the run's settings, command, versions and hardware.

        Raises:
            ValueError: bad tasks (see `prepare_tasks`), a method that cannot run in this set-up, arguments that would
                go wrong over several trainings, or an output directory that holds another run.
            OSError: the disk is full, or the output directory cannot be written to.
            SystemExit: 143, after a SIGTERM with `args.enable_jit_checkpoint`, once the progress is saved.
        """
        if isinstance(tasks, Task):
            raise ValueError(f"train_sequence takes a list of tasks, got the task {tasks.name!r} alone. Pass [task].")
        folder = Path(str(self.args.output_dir))
        with self.preemption.listening(), explaining_full_disks(folder):
            self.sequence_results = SequenceRun(self, tasks, folder).run(resume_from_checkpoint)
        return self.sequence_results

    # ---- What Trainer writes, and where ----

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
        """What a logger gets: in a sequence keys begin with the task's name, and steps count on from task to task."""
        if (task := self.logged_task) is not None and logs is not None:
            state = copy.copy(state)
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
        adapted, token = self.model, self.args.hub_token
        if self.adapters_folded:
            for stale in Path(output_dir or str(self.args.output_dir)).glob("adapter_*"):  # of a checkpoint
                stale.unlink(missing_ok=True)
            self.model, state_dict = bare_model(adapted), folded_state_dict(adapted)
        self.args.hub_token = None  # Trainer pickles the arguments into folders that it pushes
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model, self.args.hub_token = adapted, token

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.run_folder is None:  # a sequence is pushed as a whole
            super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(  # type: ignore[override]
        self, language=None, license=None, tags=None, model_name=None, finetuned_from=None, **kwargs
    ):
        """After `train_sequence` the card that shows R; Trainer's own otherwise. `push_to_hub` calls this too."""
        if self.sequence_results is None:
            super().create_model_card(language, license, tags, model_name, finetuned_from, **kwargs)
        elif self.is_world_process_zero():
            write_model_card(
                Path(str(self.args.output_dir)) / "README.md",
                results=self.sequence_results,
                base_model=finetuned_from or model_source(self.model) or None,
                license=license or self.args.model_license,
                tags=[tags] if isinstance(tags, str) else tags or [],
            )

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """As Trainer's; after `train_sequence` it pushes the final model, its memory, R, figures and the card in one
        commit, without the tasks' folders. An error of the upload names the command that tries again."""
        if self.sequence_results is None:
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        token = token or self.args.hub_token
        self.save_model(_internal_call=True)
        self.create_model_card(**kwargs)
        folder, revision = str(self.args.output_dir), revision or self.args.hub_revision
        repo = str(self.hub_model_id or self.args.hub_model_id or Path(folder).resolve().name)
        try:
            if self.hub_model_id is None:
                self.init_hf_repo(token=token, private=private)
                repo = str(self.hub_model_id)
            if not self.is_world_process_zero():
                return None
            return HfApi().upload_folder(  # type: ignore[call-overload]
                repo_id=repo,
                folder_path=folder,
                commit_message=commit_message,
                token=token,
                revision=revision,
                ignore_patterns=NOT_PUSHED,
                delete_patterns="adapter_*",  # of another kind of model, pushed earlier: they would be loaded on top
                run_as_future=not blocking,
            )
        except Exception as error:
            command = ["hf", "upload", repo, folder, ".", "--delete", "adapter_*"]
            command += [word for pattern in NOT_PUSHED for word in ("--exclude", pattern)]
            command += ["--revision", revision] if revision else []
            error.add_note(f"Nothing local is lost. To try again: {shlex.join(command)}")
            raise


def _check_processes(args: Any) -> None:
    if args.world_size == 1 and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("Each of the processes that were started would train alone. On CPUs pass --use_cpu.")
    if args.n_gpu > 1:
        raise ValueError(
            f"One process on {args.n_gpu} GPUs (DataParallel) would count gradients once a GPU. Start the script with "
            "`accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES=0."
        )
