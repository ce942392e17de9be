"""The loop over a sequence of tasks: the matrix R, folders, the state file, and resuming."""

import hashlib
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import set_seed
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from .files import replacing, sync_folder
from .guard import guards
from .language import prepare_language_tasks
from .live import CLASSP_NAME, describe_optimizer
from .memory import MEMORY_NAME, ContinualMemory
from .methods import describe_methods
from .metrics import summarize
from .names import bare_model, has_adapters, is_language_model, layer_means, model_class, model_source, samples
from .redaction import public_arguments, public_command
from .report import environment, peak_memory, showing_progress, write_figures, write_json, write_page
from .resume import checkpoints, is_complete, last_complete_checkpoint, load_weights, optimizer_state, read_state
from .tasks import Task, prepare_tasks

logger = logging.get_logger(__name__)

STATE_NAME = "sequence_state.json"
# Arguments that must be the same for two runs to be the same one, besides tasks, model, method and batch size.
_CONFIG = (
    *("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "num_train_epochs", "max_steps"),
    *("max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16", "seed", "data_seed"),
    *("load_best_model_at_end", "metric_for_best_model", "sequence_metric", "max_length", "heads", "reset_optimizer"),
    *("learned_tasks", "memory", "gather_memory", "memory_power", "memory_strength"),
)


class SequenceRun:
    """One call of [`ContinualTrainer.train_sequence`], which writes everything into `folder`."""

    def __init__(self, trainer: Any, tasks: list[Task], folder: Path) -> None:
        self.trainer, self.args, self.engine, self.folder = trainer, trainer.args, trainer.engine, folder
        self.heads = trainer.task_heads
        self._check_arguments()
        self.tasks = self._prepare(tasks)
        self.given = [task.measured_dataset for task in tasks]
        self.names = [task.name for task in self.tasks]
        self.folders = [folder / f"{t:02d}-{task.slug}" for t, task in enumerate(self.tasks)]
        self._check_learned_tasks()
        self.engine.check(trainer.context())
        self.state: dict[str, Any] = {}
        self.clock = 0.0

    def run(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, Any]:
        """Train and evaluate what is not done yet; returns the content of `results.json`."""
        resumed = self._open_state(resume_from_checkpoint)
        disable = self.args.disable_tqdm or not self.trainer.is_world_process_zero()
        shown = (self.names, self.args.sequence_metric, self.trainer.greater_is_better, disable)
        with showing_progress(self.trainer, *shown) as self.progress:
            self._run(resumed)
        return self._finish()

    def _run(self, resumed: bool) -> None:
        trainer = self.trainer
        rows: list[list[float]] = self.state["accuracy_matrix"]
        done = max(len(rows) - 1, 0)
        if done:
            self._restore_boundary(done - 1)
        else:
            self._check_starting_weights()
        self.engine.saves_at_end = False  # `_save_boundary` writes the memory
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(self.folder / "runs")  # one for all tasks, and for a resumed run
        try:
            self.clock = time.monotonic()
            if not rows:
                self._note_importance()
                rows.append(self._measure())
            self._write_state()
            for t in range(done, len(self.tasks)):
                learned = t < self.args.learned_tasks
                note = " (learned)" if learned else ""
                self.progress.begin(t, rows)
                logger.info(f"***** Task {t + 1} of {len(self.tasks)}: {self.names[t]}{note} *****")
                trainer.earlier_steps = sum(self.state["steps"])
                if learned:
                    self._show(self.tasks[t])
                else:
                    self._train(t, resumed and t == done)
                self._save_boundary(self.folders[t])
                self._note_importance()
                rows.append(list(rows[-1]) if learned else self._measure())
                self._log_row(t + 1)
                self.state["steps"].append(0 if learned else trainer.state.global_step)
                self._write_state()
            self.progress.begin(len(self.tasks), rows)
        finally:
            trainer.run_folder = trainer.logged_task = None
            self.engine.task = self.engine.task_dataset = None
            self.engine.saves_at_end = True

    # ---- What cannot work ----

    def _check_arguments(self) -> None:
        """Refuse what works for one training and silently goes wrong over several."""
        args = self.args
        optimizer, scheduler = self.trainer.given_optimizers
        problems = {
            "model_init: every task would get a new model": self.trainer.model_init,
            "a scheduler in `optimizers`: it would end with the first task": scheduler,
            "reset_optimizer and a given optimizer, which cannot be built again": args.reset_optimizer and optimizer,
            "dataloader_persistent_workers: the first task's data would stay": args.dataloader_persistent_workers,
            "bf16_full_eval: evaluating would cast the weights": args.bf16_full_eval,
            "fp16_full_eval: evaluating would cast the weights": args.fp16_full_eval,
        }
        for problem, given in problems.items():
            if given:
                raise ValueError(f"train_sequence cannot be used with {problem}.")

    def _prepare(self, tasks: list[Task]) -> list[Task]:
        config: Any = getattr(self.trainer.model, "config", None)
        processing_class = self.trainer.processing_class
        if self.trainer.generates:
            encoder_decoder = bool(config.is_encoder_decoder)
            return prepare_language_tasks(tasks, processing_class, encoder_decoder, self.args.max_length)
        label2id = dict(getattr(config, "label2id", None) or {})
        return prepare_tasks(tasks, processing_class, label2id, self.args.max_length)

    def _check_learned_tasks(self) -> None:
        count, seen = self.args.learned_tasks, self.engine.tasks
        learned, new = self.names[:count], self.names[count:]
        if not new:
            raise ValueError(f"learned_tasks={count} leaves none of the {len(self.tasks)} tasks to train on.")
        if self.heads is not None and (unknown := [n for n in learned if n not in self.heads.state_dict()]):
            raise ValueError(
                f"With heads='per_task' the heads of learned tasks come from the memory, which has none of {unknown}. "
                "Pass the memory of the run that learned them."
            )
        if learned and seen and not (set(learned) <= set(seen) and set(new).isdisjoint(seen)):
            logger.warning(
                f"learned_tasks={count} takes {learned} for learned and {new} for new; the memory is of {seen}."
            )
        if learned and self.args.optim == CLASSP_NAME and not self.engine.accumulators():
            logger.warning(
                "learned_tasks without a memory: CLASSP knows nothing of what these tasks needed. Pass memory=, or a "
                "method that is shown their data, such as 'ewc'."
            )

    # ---- The state file ----

    def _open_state(self, resume: str | bool | None) -> bool:
        """Read or begin the state; returns whether a run is resumed."""
        resume = self.args.resume_from_checkpoint if resume is None else resume
        if str(resume).lower() in ("true", "false", "none"):
            resume = str(resume).lower() == "true"
        elif Path(str(resume)).resolve() != self.folder.resolve():
            raise ValueError(
                f"A sequence resumes from its own output_dir ({self.folder}), not from {resume!r}. Pass "
                "resume_from_checkpoint=True; to start from a model and its memory, pass them as model and memory."
            )
        config, path = self._config(), self.folder / STATE_NAME
        exists = path.is_file()
        if exists:
            self.state = read_state(path)
            then, done = self.state["config"], max(len(self.state["accuracy_matrix"]) - 1, 0)
            # of an older version some are not known
            if differing := [f"{k}: {then[k]} there, {v} here" for k, v in config.items() if then.get(k, v) != v]:
                remedy, earlier = "Choose another output_dir.", [name for name, *_ in then["tasks"]]
                if len(earlier) < len(self.names) and earlier == self.names[: len(earlier)]:
                    added = f"model and memory from {self.folder}, and pass learned_tasks={len(earlier)}"
                    remedy += f" To add tasks, take {added}."
                what = "; ".join(differing[:3])
                raise ValueError(f"{self.folder} holds another sequence's run ({what}). {remedy}")
            if not resume:
                raise ValueError(
                    f"{self.folder} already holds this sequence's run ({done} of {len(self.tasks)} tasks done). Pass "
                    "--resume_from_checkpoint True to go on from it, or choose another --output_dir."
                )
        else:
            if stale := [c for f in self.folders for c in checkpoints(f)]:
                raise ValueError(
                    f"{stale[0]} is of another run, whose {STATE_NAME} is gone from {self.folder}: a later resume "
                    "would take it for this run's. Delete it, or choose another output_dir."
                )
            if resume:
                logger.warning(f"Nothing to resume in {self.folder}: the sequence starts at its first task.")
            self.state = {
                "config": config,
                "accuracy_matrix": [],
                "steps": [],
                "seconds": 0.0,
                "boundary_seconds": 0.0,
                "importance": {},
                # what the memory that the run began with says of the tasks and methods
                "informed": {
                    "tasks": list(self.engine.tasks),
                    "methods": [method.name for method in self.engine.methods if method.state_dict()],
                },
            }
        self.trainer.accelerator.wait_for_everyone()  # nobody writes before everybody has read
        return exists

    def _config(self) -> dict[str, Any]:
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        config = {
            "tasks": [[t.name, len(t.train_dataset), len(t.measured_dataset)] for t in self.tasks],
            "data": [[_digest(t.train_dataset), _digest(t.measured_dataset)] for t in self.tasks],
            "model": model_source(self.trainer.model) or None,
            "method": describe_methods(self.engine.methods),
            "global_batch_size": batch_size,
            **{k: getattr(self.args, k, None) for k in _CONFIG},
        }
        return json.loads(json.dumps(config, default=str))

    def _check_starting_weights(self) -> None:
        """Before the first boundary nothing but the given model holds the weights that the run began with."""
        weights = [float(t.sum()) for t in samples(self.trainer.model).values()]
        began_with = self.state.setdefault("weights", weights)
        alike = (math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-5) for a, b in zip(weights, began_with))
        if len(weights) != len(began_with) or not all(alike):
            raise ValueError(
                f"The run in {self.folder} began with other weights than this model's. Build the model as then: call "
                "transformers.set_seed(...) before, so that new layers start alike."
            )

    def _write_state(self) -> None:
        """Record what is done. From here on nobody needs the folders of the tasks before the last one."""
        state, now = self.state, time.monotonic()
        state["seconds"] += now - self.clock
        state["boundary_seconds"] += self.engine.seconds
        self.clock, self.engine.seconds = now, 0.0
        if self.trainer.is_world_process_zero():
            write_json(self.folder / STATE_NAME, state)
        if self.args.should_save and not self.args.keep_task_models:
            for folder in self.folders[: max(len(state["accuracy_matrix"]) - 2, 0)]:
                shutil.rmtree(folder, ignore_errors=True)
        self.trainer.preemption.leave_if_asked()

    # ---- One task ----

    def _activate_head(self, task: Task) -> None:
        if self.heads is not None:
            self.heads.activate(task.name, task.label_ids)

    def _train(self, t: int, resumed: bool) -> None:
        trainer, engine, task = self.trainer, self.engine, self.tasks[t]
        # The same start whether or not the run was interrupted before, and whatever earlier tasks drew.
        set_seed(self.args.seed + t)
        if self.args.reset_optimizer:
            trainer.optimizer = None
            if self.args.optim == CLASSP_NAME and t > self.args.learned_tasks:
                engine.forget_accumulators()  # of a resumed run: the last task's
        elif trainer.optimizer is not None:
            for group in trainer.optimizer.param_groups:  # schedules other than LambdaLR go on from the last value
                group["lr"] = group.get("initial_lr", self.args.learning_rate)
        self._activate_head(task)
        if self.heads is not None and trainer.optimizer is not None:
            self.heads.forget_optimizer_state(trainer.optimizer)
        trainer.logged_task, trainer.run_folder = task.name, self.folders[t]
        trainer.shard()
        started = time.monotonic()
        trainer.train_dataset, trainer.eval_dataset = task.train_dataset, task.eval_dataset
        for method in engine.methods:
            earlier = [previous.train_dataset for previous in self.tasks[:t]]
            trainer.train_dataset = method.extend_train_dataset(trainer.train_dataset, earlier)
        engine.seconds += time.monotonic() - started
        engine.task, engine.task_dataset = task.name, task.train_dataset
        trainer.train(resume_from_checkpoint=self._checkpoint(self.folders[t]) if resumed else None)
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        self.state["optimizer"] = describe_optimizer(optimizer)

    def _checkpoint(self, folder: Path) -> str | None:
        """The checkpoint of an interrupted task to go on from, if any. Others may be half-written: they go."""
        checkpoint = None if self.args.save_only_model else last_complete_checkpoint(folder)
        if self.args.should_save:
            for other in checkpoints(folder):
                if not is_complete(other):
                    shutil.rmtree(other, ignore_errors=True)
        return checkpoint

    def _show(self, task: Task) -> None:
        """What happens around a task's training, without the training."""
        engine, informed, started = self.engine, self.state["informed"], time.monotonic()
        self._activate_head(task)
        context = self.trainer.context()
        context.task, context.collate = task.name, self.trainer.data_collator
        context.train_dataset = context.task_dataset = task.train_dataset
        for method in engine.methods:
            if task.name in informed["tasks"] and method.name in informed["methods"]:
                continue  # the memory that was loaded holds what the method knows of this task
            method.prepare_model(self.trainer.model, engine.tasks)
            method.before_task(context)
            method.after_task(context)
        if task.name not in engine.tasks:
            engine.tasks.append(task.name)
        engine.seconds += time.monotonic() - started

    # ---- Boundaries ----

    def _save_boundary(self, folder: Path) -> None:
        trainer = self.trainer
        trainer.save_model(str(folder), _internal_call=True)  # True: not yet the model to push
        if trainer.optimizer is not None and not self.args.reset_optimizer:
            optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
            state = optimizer_state(optimizer, trainer.model, self.args.should_save)
            if self.args.should_save:
                with replacing(folder / "optimizer.pt") as temporary:
                    torch.save(state, temporary)
        if self.args.should_save:
            for guard in guards(trainer):
                guard.write(folder)
            sync_folder(folder)  # the task before this one is deleted as soon as this one is recorded
        trainer.accelerator.wait_for_everyone()

    def _restore_boundary(self, t: int) -> None:
        """Weights, memory and optimizer as the finished task `t` left them."""
        folder, task, engine = self.folders[t], self.tasks[t], self.engine
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}, the model after task {task.name!r}, is gone: the run cannot go on without it. Put it "
                "back, or start again in another output_dir."
            )
        load_weights(self.trainer.model, folder)
        if (folder / MEMORY_NAME).is_file():
            self.trainer.load_memory(ContinualMemory.load(folder), same_run=True)
        for guard in guards(self.trainer):
            guard.read(folder)
        engine.tasks = list(dict.fromkeys([*engine.tasks, *self.names[: t + 1]]))
        if self.heads is not None:
            self.heads.active = task.name
        if (folder / "optimizer.pt").is_file():
            engine.optimizer_file = folder / "optimizer.pt"

    # ---- R, and what else is known of the run ----

    def _measure(self) -> list[float]:
        """One row of R: the metric of every task on its test split."""
        trainer, name, row = self.trainer, self.args.sequence_metric, []
        for task, given in zip(self.tasks, self.given):
            self._activate_head(task)
            trainer.logged_task = task.name
            if trainer.task_metric is None:
                metrics = trainer.evaluate(task.measured_dataset)
                if f"eval_{name}" not in metrics:
                    raise ValueError(
                        f"sequence_metric={name!r} is not among what compute_metrics returned: "
                        f"{sorted(k.removeprefix('eval_') for k in metrics)}"
                    )
                value = float(metrics[f"eval_{name}"])
            else:
                trainer.model.eval()
                with torch.no_grad(), trainer.accelerator.autocast():
                    value = float(trainer.task_metric(trainer.model, trainer.processing_class, given))
                trainer.log({f"eval_{name}": value})
            if not math.isfinite(value):
                raise ValueError(
                    f"{name} is {value} for task {task.name!r}, and R holds finite numbers. If the training diverged, "
                    "lower the learning rate; else return a number for such predictions, too."
                )
            row.append(value)
        logger.info("Evaluation: " + ", ".join(f"{name} {value:.4f}" for name, value in zip(self.names, row)))
        return row

    def _note_importance(self) -> None:
        stage = len(self.state["accuracy_matrix"])
        for layer, mean in layer_means(self.engine.accumulators()).items():
            means = self.state["importance"].setdefault(layer, [])
            means += [0.0] * (stage - len(means)) + [mean]

    def _log_row(self, count: int) -> None:
        """Send what R says of the first `count` tasks to the loggers."""
        rows = self.state["accuracy_matrix"]
        known = summarize([row[:count] for row in rows], self.trainer.greater_is_better)
        self.trainer.logged_task = "sequence"
        values = {f"{self.args.sequence_metric}/{name}": value for name, value in zip(self.names[:count], rows[-1])}
        values |= {k: known[k] for k in ("average_accuracy", "forgetting") if known[k] is not None}
        self.trainer.log(values)

    def _finish(self) -> dict[str, Any]:
        trainer, folder, state = self.trainer, self.folder, self.state
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
            "peft": has_adapters(trainer.model) and not folds,
            "label_names": [id2label[i] for i in sorted(id2label)],
            "method": state["config"]["method"],
            "optimizer": state["optimizer"],
            "arguments": public_arguments(json.loads(self.args.to_json_string())),
            "command": public_command([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
            **environment(num_processes=self.args.world_size),
            "seconds": state["seconds"],
            "boundary_seconds": state["boundary_seconds"],
            "peak_memory": peak_memory(),
            "importance": state["importance"],
        }
        for guard in guards(trainer):
            results["guard"] = guard.report()
        trainer.sequence_results = results
        if trainer.is_world_process_zero():
            write_figures(folder, results)
            trainer.create_model_card()
            write_page(folder / "results.html", results)
            sync_folder(folder)
            write_json(folder / "results.json", results)
        trainer.accelerator.wait_for_everyone()
        return results


def _auto_class(model: Any) -> str:
    """The class of Transformers to load the model with; its own where there is none for all such models."""
    if is_language_model(model):
        return "AutoModelForSeq2SeqLM" if bare_model(model).config.is_encoder_decoder else "AutoModelForCausalLM"
    name = model_class(model).__name__
    auto_class = f"AutoModelFor{name.rpartition('For')[2]}"
    return auto_class if hasattr(transformers, auto_class) else name


def _digest(dataset: Any) -> str:
    """Of some 16 rows, as they are stored; images and the like do not count."""
    rows = dataset.with_format(None)[:: max(len(dataset) // 16, 1)]
    return hashlib.sha256(json.dumps(rows, default=lambda value: type(value).__name__).encode()).hexdigest()[:16]
