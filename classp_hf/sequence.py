"""The loop over a sequence of tasks: the matrix R, folders, the state file, and resuming."""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .files import remove_temporaries, replacing, sync_folder, writing
from .guard import guards
from .language import prepare_language_tasks
from .live import CLASSP_NAME, describe_optimizer
from .memory import MEMORY_NAME, ContinualMemory
from .methods import describe_methods
from .metrics import summarize
from .names import bare_model, is_language_model, layer_means, model_source, samples
from .redaction import public_arguments, public_command
from .report import environment, write_figures, write_json
from .resume import is_complete, load_weights, optimizer_state, read_state
from .tasks import Task, prepare_tasks

logger = logging.get_logger(__name__)

STATE_NAME = "sequence_state.json"
# What must be the same for two runs to be the same one, besides tasks, model, method, optimizer and batch size.
_CONFIG = (
    *("optim_args", "learning_rate", "weight_decay", "lr_scheduler_type", "num_train_epochs", "max_steps"),
    *("max_grad_norm", "heads", "reset_optimizer", "learned_tasks", "sequence_metric", "max_length", "memory"),
    *("gather_memory", "memory_power", "seed"),
)


class SequenceRun:
    """One call of [`ContinualTrainer.train_sequence`].

    Args:
        trainer: a [`ContinualTrainer`], which trains, evaluates and saves.
        tasks: as the user gave them.
        folder: where everything is written.

    Raises:
        ValueError: bad tasks, arguments that go wrong over several trainings, methods that cannot run in this set-up.
    """

    def __init__(self, trainer: Any, tasks: list[Task], folder: Path) -> None:
        self.trainer, self.args, self.engine, self.folder = trainer, trainer.args, trainer.engine, folder
        self._check_arguments()
        self.given = {task.name: task.measured_dataset for task in tasks if isinstance(task, Task)}
        self.tasks = self._prepare(tasks)
        self.names = [task.name for task in self.tasks]
        self.folders = [folder / f"{t:02d}-{task.slug}" for t, task in enumerate(self.tasks)]
        self._check_learned_tasks()
        self.engine.check(trainer.context())
        self.state: dict[str, Any] = {}
        self.resumed = False

    def run(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, Any]:
        """Train and evaluate what is not done yet; returns the content of `results.json`."""
        trainer, state = self.trainer, self._open_state(resume_from_checkpoint)
        self.state = state
        rows: list[list[float]] = state["accuracy_matrix"]
        done = max(len(rows) - 1, 0)
        self._check_starting_weights(done)
        methods = [method.name for method in self.engine.methods if method.state_dict()]
        state.setdefault("informed", {"tasks": list(self.engine.tasks), "methods": methods})
        if done:
            self._restore_boundary(done - 1)
        state.setdefault("steps", [])
        state.setdefault("boundary_seconds", 0.0)
        self.engine.saves_at_end = False  # `_save_boundary` writes it
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(self.folder / "runs")  # one for all tasks, and for a resumed run
        try:
            started = time.monotonic()
            if not rows:
                self._note_importance(0)
                rows.append(self._measure())
            for t in range(done, len(self.tasks)):
                state["seconds"] += time.monotonic() - started
                self._write_state(self.folders[: max(t - 1, 0)])
                started = time.monotonic()
                learned = t < self.args.learned_tasks
                note = " (learned)" if learned else ""
                logger.info(f"***** Task {t + 1} of {len(self.tasks)}: {self.names[t]}{note} *****")
                trainer.earlier_steps = sum(state["steps"])
                if learned:
                    self._show(self.tasks[t])
                else:
                    self._train(t)
                self._save_boundary(self.folders[t])
                self._note_importance(t + 1)
                state["optimizer"] = self._describe_optimizer()
                rows.append(list(rows[-1]) if learned else self._measure())
                self._log_row(t + 1)
                state["steps"].append(0 if learned else trainer.state.global_step)
                self.resumed = False
            state["seconds"] += time.monotonic() - started
            self._write_state(self.folders[:-1])
        finally:
            trainer.run_folder = trainer.logged_task = None
            self.engine.task = self.engine.task_dataset = None
            self.engine.saves_at_end = True
        return self._finish()

    # ---- What cannot work ----

    def _check_arguments(self) -> None:
        """Refuse what works for one training and silently goes wrong over several."""
        given_optimizer, given_scheduler = self.trainer.given_optimizers
        problems = {
            "model_init: Trainer would build a new model for every task. Pass model=model_init().": (
                self.trainer.model_init
            ),
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

    def _prepare(self, tasks: list[Task]) -> list[Task]:
        config: Any = getattr(self.trainer.model, "config", None)
        processing_class = self.trainer.processing_class
        if self.trainer.generates:
            encoder_decoder = bool(config.is_encoder_decoder)
            return prepare_language_tasks(tasks, processing_class, encoder_decoder, self.args.max_length)
        label2id = dict(getattr(config, "label2id", None) or {})
        return prepare_tasks(tasks, processing_class, label2id, self.args.max_length)

    def _check_learned_tasks(self) -> None:
        learned, heads = self.args.learned_tasks, self.trainer.task_heads
        if learned >= len(self.tasks):
            raise ValueError(f"learned_tasks={learned} leaves none of the {len(self.tasks)} tasks to train on.")
        if heads is not None and (unknown := [n for n in self.names[:learned] if n not in heads.state_dict()]):
            raise ValueError(
                f"With heads='per_task' the heads of learned tasks come from the memory, which has none of {unknown}. "
                "Pass the memory of the run that learned them."
            )
        seen = self.engine.tasks
        unseen = [name for name in self.names[:learned] if name not in seen]
        again = [name for name in self.names[learned:] if name in seen]
        if learned and seen and (unseen or again):
            parts = [f"has not seen {unseen}"] * bool(unseen) + [f"has seen {again} already"] * bool(again)
            logger.warning(
                f"learned_tasks={learned} says that {self.names[:learned]} are learned and the other tasks are not, "
                f"but the memory, of {seen}, {' and '.join(parts)}."
            )
        if learned and self.args.optim == CLASSP_NAME and not self.engine.accumulators():
            logger.warning(
                "learned_tasks without a memory: CLASSP knows nothing of what these tasks needed. Pass memory=, or a "
                "method that is shown their data, such as 'ewc'."
            )

    # ---- The state file ----

    def _open_state(self, resume: str | bool | None) -> dict[str, Any]:
        resume = self.args.resume_from_checkpoint if resume is None else resume
        if isinstance(resume, str):
            if resume.lower() not in ("true", "false") and Path(resume).resolve() != self.folder.resolve():
                raise ValueError(
                    f"A sequence resumes from its own output_dir ({self.folder}), not from {resume!r}. Pass "
                    "resume_from_checkpoint=True; to start from a model and its memory, pass them as model and memory."
                )
            resume = resume.lower() != "false"
        config = self._config()
        path = self.folder / STATE_NAME
        state: dict[str, Any] = {"config": config, "accuracy_matrix": [], "seconds": 0.0}
        if path.is_file():
            state = {"seconds": 0.0, **read_state(path)}
            differing = [k for k in config if state["config"].get(k) != config[k]]
            if differing:
                what = "; ".join(f"{k}: {state['config'].get(k)} there, {config[k]} here" for k in differing[:3])
                raise ValueError(f"{self.folder} holds another sequence's run ({what}). Choose another output_dir.")
            if not resume:
                raise ValueError(
                    f"{self.folder} already holds this sequence's run ({max(len(state['accuracy_matrix']) - 1, 0)} of "
                    f"{len(self.tasks)} tasks done). Pass --resume_from_checkpoint True to go on from it, or choose "
                    "another --output_dir."
                )
            self.resumed = True
        else:
            stale = [c for folder in self.folders for c in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))]
            if stale:
                raise ValueError(
                    f"{stale[0]} is of another run, whose {STATE_NAME} is gone from {self.folder}: a later resume "
                    "would take it for this run's. Delete it, or choose another output_dir."
                )
            if resume:
                logger.warning(f"Nothing to resume in {self.folder}: the sequence starts at its first task.")
        self.trainer.accelerator.wait_for_everyone()  # nobody writes before everybody has read
        if self.trainer.is_world_process_zero():
            for folder in (self.folder, *self.folders):
                remove_temporaries(folder)
            with writing("the sequence's state", self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.folder).close()  # all tasks are evaluated before the first write
        return state

    def _config(self) -> dict[str, Any]:
        args = {**vars(self.args), **self.args.to_dict()}
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        config = {
            "tasks": [[t.name, len(t.train_dataset), len(t.measured_dataset)] for t in self.tasks],
            "model": model_source(self.trainer.model) or None,
            "method": describe_methods(self.engine.methods),
            "optim": str(getattr(self.args.optim, "value", self.args.optim)),
            "global_batch_size": batch_size,
            **{k: args[k] for k in _CONFIG},
        }
        return json.loads(json.dumps(public_arguments(config), default=str))

    def _check_starting_weights(self, done: int) -> None:
        """Before the first boundary nothing but the given model holds the weights that the run began with."""
        weights = [float(t.sum()) for t in samples(self.trainer.model).values()]
        began_with = self.state.setdefault("weights", weights)
        given, then = torch.tensor(weights), torch.tensor(began_with)
        if not done and (given.shape != then.shape or not torch.allclose(given, then, rtol=1e-3, atol=1e-5)):
            raise ValueError(
                f"The run in {self.folder} began with other weights than this model's. Build the model as then: call "
                "transformers.set_seed(...) before, so that new layers start alike."
            )

    def _write_state(self, earlier: list[Path]) -> None:
        """Record what is done. From here on nobody needs the `earlier` tasks' folders."""
        if self.trainer.is_world_process_zero():
            with writing("the sequence's state", self.folder / STATE_NAME):
                write_json(self.folder / STATE_NAME, self.state)
        if self.args.should_save and not self.args.keep_task_models:
            for folder in earlier:
                shutil.rmtree(folder, ignore_errors=True)
        self.trainer.preemption.leave_if_asked()

    # ---- One task ----

    def _train(self, t: int) -> None:
        trainer, engine, task = self.trainer, self.engine, self.tasks[t]
        # The same start whether or not the run was interrupted before, and whatever earlier tasks drew.
        set_seed(self.args.seed + t)
        if self.args.reset_optimizer:
            trainer.optimizer = None
            engine.optimizer_file = None
            if self.args.optim == CLASSP_NAME and t > self.args.learned_tasks:
                engine.forget_accumulators()  # of a resumed run: the last task's
        elif trainer.optimizer is not None:
            for (
                group
            ) in trainer.optimizer.param_groups:  # schedules other than LambdaLR would go on from the last value
                group["lr"] = group.get("initial_lr", self.args.learning_rate)
        trainer.activate_head(task)
        if trainer.task_heads is not None and trainer.optimizer is not None:
            trainer.task_heads.forget_optimizer_state(trainer.optimizer)
        started, training = time.monotonic(), engine.seconds
        trainer.logged_task, trainer.run_folder = task.name, self.folders[t]
        trainer.shard()
        trainer.train_dataset = task.train_dataset
        for method in engine.methods:
            earlier = [previous.train_dataset for previous in self.tasks[:t]]
            trainer.train_dataset = method.extend_train_dataset(trainer.train_dataset, earlier)
        trainer.eval_dataset = task.eval_dataset
        engine.task, engine.task_dataset = task.name, task.train_dataset
        checkpoint = self._checkpoint(self.folders[t]) if self.resumed else None
        self.state["boundary_seconds"] += time.monotonic() - started
        trainer.train(resume_from_checkpoint=checkpoint)
        self.state["boundary_seconds"] += engine.seconds - training

    def _checkpoint(self, folder: Path) -> str | None:
        """The checkpoint of an interrupted task to go on from, if any. Others may be half-written: they go."""
        checkpoint = None if self.args.save_only_model else self.trainer.last_checkpoint(folder)
        if self.args.should_save:
            for other in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                if not is_complete(other):
                    shutil.rmtree(other, ignore_errors=True)
        return checkpoint

    def _show(self, task: Task) -> None:
        """What happens around a task's training, without the training."""
        started, informed = time.monotonic(), self.state["informed"]
        self.trainer.activate_head(task)
        context = self.trainer.context()
        context.task, context.collate = task.name, self.trainer.data_collator
        context.train_dataset = context.task_dataset = task.train_dataset
        for method in self.engine.methods:
            if task.name in informed["tasks"] and method.name in informed["methods"]:
                continue  # the memory that was loaded holds what the method knows of this task
            method.prepare_model(self.trainer.model, self.engine.tasks)
            method.before_task(context)
            method.after_task(context)
        self.trainer.adapters_folded = any(m.folds_adapters for m in self.engine.methods)
        if task.name not in self.engine.tasks:
            self.engine.tasks.append(task.name)
        self.state["boundary_seconds"] += time.monotonic() - started

    # ---- Boundaries ----

    def _save_boundary(self, folder: Path) -> None:
        trainer = self.trainer
        with writing("the model after the task", folder):
            trainer.save_model(str(folder), _internal_call=True)  # True: not yet the model to push
            if trainer.optimizer is not None and not self.args.reset_optimizer:
                state = optimizer_state(getattr(trainer.optimizer, "optimizer", trainer.optimizer), trainer.model)
                if self.args.should_save:
                    with replacing(folder / "optimizer.pt") as temporary:
                        torch.save(state, temporary)
            if self.args.should_save:
                sync_folder(folder)  # the task before this one is deleted as soon as this one is recorded
        trainer.accelerator.wait_for_everyone()

    def _restore_boundary(self, t: int) -> None:
        """Weights, memory and optimizer as the finished task `t` left them."""
        folder, task = self.folders[t], self.tasks[t]
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}, the model after task {task.name!r}, is gone: the run cannot go on without it. Put it "
                "back, or start again in another output_dir."
            )
        self.trainer.adapters_folded = any(m.folds_adapters for m in self.engine.methods)
        self.trainer.activate_head(None)
        load_weights(self.trainer.model, folder)
        if (folder / MEMORY_NAME).is_file():
            self.trainer.load_memory(ContinualMemory.load(folder), same_run=True)
        for guard in guards(self.trainer):
            guard.read(folder)
        self.engine.tasks = list(dict.fromkeys([*self.engine.tasks, *self.names[: t + 1]]))
        if self.trainer.task_heads is not None:
            self.trainer.task_heads.active = task.name
        if (folder / "optimizer.pt").is_file():
            self.engine.optimizer_file = folder / "optimizer.pt"

    # ---- R, and what else is known of the run ----

    def _measure(self) -> list[float]:
        """One row of R: the metric of every task on its test split."""
        trainer, key = self.trainer, f"eval_{self.args.sequence_metric}"
        active = trainer.task_heads.active if trainer.task_heads is not None else None
        row = []
        for task in self.tasks:
            trainer.activate_head(task)
            trainer.logged_task = task.name
            if trainer.task_metric is not None:
                row.append(self._task_metric(task))
                continue
            metrics = trainer.evaluate(task.measured_dataset)
            if key not in metrics:
                raise ValueError(
                    f"sequence_metric={self.args.sequence_metric!r} is not among what compute_metrics returned: "
                    f"{sorted(k.removeprefix('eval_') for k in metrics)}"
                )
            row.append(float(metrics[key]))
        if active is not None:
            trainer.activate_head(next(task for task in self.tasks if task.name == active))
        logger.info("Evaluation: " + ", ".join(f"{name} {value:.4f}" for name, value in zip(self.names, row)))
        return row

    def _task_metric(self, task: Task) -> float:
        trainer, model = self.trainer, self.trainer.model
        was_training = model.training
        model.eval()
        with torch.no_grad(), trainer.accelerator.autocast():
            value = float(trainer.task_metric(model, trainer.processing_class, self.given[task.name]))  # type: ignore[misc]
        model.train(was_training)
        if not math.isfinite(value):
            raise ValueError(f"task_metric returned {value} for task {task.name!r}; R holds finite numbers.")
        trainer.log({f"eval_{self.args.sequence_metric}": value})
        return value

    def _note_importance(self, stage: int) -> None:
        for layer, mean in layer_means(self.engine.accumulators()).items():
            means = self.state.setdefault("importance", {}).setdefault(layer, [])
            means += [0.0] * (stage - len(means)) + [mean]

    def _log_row(self, count: int) -> None:
        """Send what R says of the first `count` tasks to the loggers."""
        rows = self.state["accuracy_matrix"]
        known = summarize([row[:count] for row in rows], self.trainer.greater_is_better)
        self.trainer.logged_task = "sequence"
        values = {f"{self.args.sequence_metric}/{name}": value for name, value in zip(self.names[:count], rows[-1])}
        values |= {k: known[k] for k in ("average_accuracy", "forgetting") if known[k] is not None}
        self.trainer.log(values)

    def _describe_optimizer(self) -> dict[str, Any]:
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        name = str(getattr(self.args.optim, "value", self.args.optim))
        return describe_optimizer(optimizer, self.args) or {"name": name, "lr": self.args.learning_rate}

    def _finish(self) -> dict[str, Any]:
        trainer, folder, state = self.trainer, self.folder, self.state
        with writing("the final model", folder):
            if self.args.should_save:
                (folder / "results.json").unlink(missing_ok=True)  # of a finished run: it says that all else is there
            trainer.save_model(str(folder), _internal_call=True)
        id2label = {} if trainer.generates else getattr(getattr(trainer.model, "config", None), "id2label", None) or {}
        folds = any(m.folds_adapters for m in self.engine.methods)
        results = {
            "tasks": self.names,
            "datasets": sorted({task.hub_id for task in self.tasks if task.hub_id}),
            "accuracy_matrix": state["accuracy_matrix"],
            "metrics": summarize(state["accuracy_matrix"], trainer.greater_is_better),
            "metric": self.args.sequence_metric,
            "greater_is_better": trainer.greater_is_better,
            "auto_class": _auto_class(trainer.model),
            "folds_adapters": folds,
            "peft": bare_model(trainer.model) is not trainer.model and not folds,
            "label_names": [id2label[i] for i in sorted(id2label)],
            "method": state["config"]["method"],
            "optimizer": state["optimizer"],
            "arguments": public_arguments(json.loads(self.args.to_json_string())),
            "command": public_command([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
            **environment(num_processes=self.args.world_size),
            "seconds": state["seconds"],
            "boundary_seconds": state["boundary_seconds"],
            "importance": state.get("importance", {}),
        }
        for guard in guards(trainer):
            results["guard"] = guard.report()
        trainer.sequence_results = results
        with writing("the results", folder):
            if trainer.is_world_process_zero():
                write_figures(folder, results)
            trainer.create_model_card()
            if trainer.is_world_process_zero():
                sync_folder(folder)
                write_json(folder / "results.json", results)
        trainer.accelerator.wait_for_everyone()
        return results


def _auto_class(model: Any) -> str:
    """The class of Transformers to load the model with."""
    if not is_language_model(model):
        return "AutoModelForSequenceClassification"
    return "AutoModelForSeq2SeqLM" if bare_model(model).config.is_encoder_decoder else "AutoModelForCausalLM"
