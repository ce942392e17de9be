from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from classp_hf import (
    CLASSP,
    EWC,
    L2SP,
    ClasspTrainer,
    ContinualTrainer,
    ContinualTrainingArguments,
    EWCTrainer,
)


def assert_same_weights(a, b, **tolerance):
    """Bitwise, or within a tolerance."""
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        if tolerance:
            if name.endswith("key.bias"):
                continue  # softmax cancels it: its gradient is rounding noise, which AdamW and CLASSP scale up
            torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
        else:
            assert torch.equal(p, q), name


def test_train_alone_is_trainers(make_model, make_tasks, make_args, collator):
    task = make_tasks(1)[0]
    models = [make_model(dropout=0.1), make_model(dropout=0.1)]
    for cls, model in zip((Trainer, ContinualTrainer), models):
        args = make_args(optim="adamw_torch", weight_decay=0.01)
        cls(model=model, args=args, train_dataset=task.train_dataset, data_collator=collator).train()
    assert_same_weights(*models)


def test_other_losses_than_cross_entropy_stay_the_models_own(make_model, make_args, collator):
    from transformers import BertForSequenceClassification

    class Own(BertForSequenceClassification):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    assert ContinualTrainer(model=make_model(), args=make_args()).compute_loss_func is not None
    regression = make_model(num_labels=1)
    own = Own(make_model().config)
    for model in (regression, own):
        trainer = ContinualTrainer(model=model, args=make_args())
        assert trainer.compute_loss_func is None
        assert trainer.compute_metrics is None
    several = [{"input_ids": [1, 2, 9], "labels": [1.0, 0.0, 1.0]}] * 8
    undecided = ContinualTrainer(model=make_model(), args=make_args(), data_collator=collator, train_dataset=several)
    with pytest.raises(ValueError, match=r"labels are torch.float32, not class ids.*multi_label_classification"):
        undecided.train()


def test_classp_trainer_trains_with_classp_and_its_optim_args(make_model, make_tasks, make_args, collator):
    args = make_args(optim_args="power=2,eps=1e-6", weight_decay=0.01)
    trainer = ClasspTrainer(
        model=make_model(), args=args, train_dataset=make_tasks(1)[0].train_dataset, data_collator=collator
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is CLASSP
    assert [(g["power"], g["eps"]) for g in optimizer.param_groups] == [(2.0, 1e-6)] * 2
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]


def test_the_learning_rate_is_the_one_when_training_begins(make_model, make_tasks, make_args, collator):
    task = make_tasks(1)[0]
    trainer = ClasspTrainer(make_model(), make_args(), collator, train_dataset=task.train_dataset)
    trainer.args.learning_rate = 5e-3
    trainer.train()
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [5e-3] * 2


def test_plain_training_arguments_and_default_learning_rates(make_model, tmp_path):
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=3e-4)
    assert ClasspTrainer(model=make_model(), args=plain).args.learning_rate == 3e-4
    unset = ContinualTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert ClasspTrainer(model=make_model(), args=unset).args.learning_rate == 1e-3
    assert EWCTrainer(model=make_model(), args=unset).args.learning_rate == 5e-5
    assert unset.learning_rate == 5e-5 and unset.optim != "classp"  # the caller's arguments are left alone


def test_sequence_fills_the_accuracy_matrix(figures, make_model, make_tasks, make_args, collator, tmp_path):
    tasks = make_tasks(3)
    args = make_args(num_train_epochs=6, learning_rate=1e-2, optim_args="power=2")
    trainer = ClasspTrainer(model=make_model(), args=args, data_collator=collator, pseudo_rehearsal=False)
    results = trainer.train_sequence(tasks)
    R = results["accuracy_matrix"]
    assert [len(R), {len(row) for row in R}] == [4, {3}]
    for j in range(3):
        assert R[j + 1][j] > 0.9 > R[0][j]  # learned when trained, not before
    # R is measured on the test split, with the final weights in the last row
    for j, task in enumerate(tasks):
        assert trainer.evaluate(task.test_dataset)["eval_accuracy"] == pytest.approx(R[3][j])
    run = tmp_path / "run"
    assert json.loads((run / "results.json").read_text())["accuracy_matrix"] == R
    for produced in ("model.safetensors", "continual_memory.st", "README.md", "accuracy_matrix.png"):
        assert (run / produced).is_file(), produced
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == ["02-third"]


def test_accumulators_persist_over_the_boundary_unless_reset(make_model, make_tasks, make_args, collator, tmp_path):
    class Watch(TrainerCallback):
        def __init__(self):
            self.at_start = []

        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            self.at_start.append(sum(float(s["accumulator"].sum()) for s in optimizer.state.values()))

    seen = {}
    for reset in (False, True):
        watch = Watch()
        args = make_args(reset_optimizer=reset, output_dir=str(tmp_path / str(reset)))
        ClasspTrainer(model=make_model(), args=args, data_collator=collator, callbacks=[watch]).train_sequence(
            make_tasks()
        )
        seen[reset] = watch.at_start
    assert seen[True] == [0, 0]
    assert seen[False][0] == 0
    assert seen[False][1] > 0


@pytest.mark.parametrize("method", ["none", "ewc", "l2sp"])
@pytest.mark.parametrize("optim", ["classp", "adamw_torch"])
def test_batch_8_equals_batch_1_accumulated_8_times(
    make_model, make_tasks, make_args, collator, tmp_path, optim, method
):
    """The loss, the clipping and the penalty count every example once, whatever the accumulation.

    Transformers alone fails this for BERT: see `classification_loss`.
    """
    models = []
    for batch, accumulation in ((8, 1), (1, 8)):
        model = make_model()
        args = make_args(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim=optim,
            optim_args="power=2" if optim == "classp" else None,
            max_grad_norm=0.5,
            output_dir=str(tmp_path / f"{batch}"),
        )
        method_object = {"none": None, "ewc": EWC(ewc_lambda=3.0, fisher_samples=20), "l2sp": L2SP(l2sp_alpha=3.0)}[
            method
        ]
        trainer = ContinualTrainer(model=model, args=args, data_collator=collator, method=method_object)
        trainer.train_sequence(make_tasks(rows=60))  # 60: the last batch is not a full one
        models.append(model)
    assert_same_weights(*models, rtol=1e-4, atol=2e-5)


def test_a_penalty_with_a_graph_counts_once_too(make_model, make_tasks, make_args, collator, tmp_path):
    from classp_hf import Method

    class Decay(Method):
        def before_task(self, context):
            self.model = context.model

        def loss_term(self, outputs, inputs, count):
            share = len(inputs["labels"]) / count
            return 50.0 * share * sum((p**2).sum() for _, p in self.parameters(self.model))

    finals = []
    for batch, accumulation in ((8, 1), (2, 4)):
        args = make_args(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1e-3,
            max_grad_norm=0.0,
        )
        model = make_model()
        ContinualTrainer(
            model=model,
            args=args,
            method=Decay(),
            data_collator=collator,
            train_dataset=make_tasks(1)[0].train_dataset,
        ).train()
        finals.append(model)
    assert_same_weights(*finals, rtol=1e-4, atol=1e-6)
    assert weights(finals[0])["classifier.weight"].norm() < 0.8 * make_model().classifier.weight.norm()


def test_per_task_heads_answer_for_their_own_task(make_model, make_tasks, make_args, collator):
    """The rules of the two tasks contradict each other; with a frozen encoder only separate heads can hold both."""
    outcomes = {}
    for heads in ("shared", "per_task"):
        model = make_model()
        for p in model.bert.parameters():
            p.requires_grad_(False)
        args = make_args(heads=heads, num_train_epochs=20, learning_rate=0.1, optim="adamw_torch")
        args.output_dir += heads
        trainer = ContinualTrainer(model=model, args=args, data_collator=collator)
        outcomes[heads] = trainer.train_sequence(make_tasks())["accuracy_matrix"]
        if heads == "per_task":
            kinds = {k.split("/")[0] for k in trainer.continual_memory().tensors}
            assert {"head.first", "head.second"} <= kinds
    assert outcomes["per_task"][2][0] == outcomes["per_task"][1][0] > 0.6  # kept exactly
    assert outcomes["shared"][2][0] < 0.5


def test_per_task_heads_do_not_inherit_accumulators_and_methods_leave_them_alone(
    make_model, make_tasks, make_args, collator
):
    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.head_is_new = model.classifier.weight not in optimizer.state
            self.body_is_old = model.bert.pooler.dense.weight in optimizer.state

    watch = Watch()
    trainer = ClasspTrainer(
        model=make_model(),
        args=make_args(heads="per_task"),
        data_collator=collator,
        callbacks=[watch],
        method=EWC(fisher_samples=8),
    )
    trainer.train_sequence(make_tasks())
    assert watch.head_is_new
    assert watch.body_is_old
    assert not [n for n in trainer.methods[0].anchor if n.startswith("classifier")]


class Kill(TrainerCallback):
    """Stops the process's training where a kill would: in the middle of a task."""

    def __init__(self, train_number, step):
        self.left, self.step = train_number, step

    def on_train_begin(self, args, state, control, **kwargs):
        self.left -= 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.left == 0 and state.global_step == self.step:
            raise KeyboardInterrupt


EVERY_3 = {"save_strategy": "steps", "save_steps": 3}


@pytest.mark.parametrize(
    ("optim", "method", "changes", "where"),
    [
        ("classp", "ewc", EVERY_3, (1, 2)),
        ("classp", "ewc", EVERY_3, (2, 5)),
        ("classp", "ewc", EVERY_3, (3, 1)),
        ("classp", "none", {}, (2, 5)),
        ("adamw_torch", "replay", {}, (2, 5)),
        ("adamw_torch", "l2sp", EVERY_3, (1, 5)),
        ("adamw_torch", "l2sp", EVERY_3, (2, 5)),
        ("classp", "l2sp", {"heads": "per_task"}, (2, 5)),
        ("classp", "none", {"reset_optimizer": True, **EVERY_3}, (1, 5)),
        ("classp", "none", {"reset_optimizer": True, **EVERY_3}, (2, 5)),
        ("classp", "none", {"reset_optimizer": True, **EVERY_3}, (3, 1)),
        ("classp", "none", {"heads": "per_task", **EVERY_3}, (1, 5)),
        ("classp", "none", {"heads": "per_task", **EVERY_3}, (2, 5)),
        ("adamw_torch", "none", {"heads": "per_task"}, (3, 1)),
        ("adamw_torch", "none", {**EVERY_3, "save_only_model": True}, (2, 5)),
        ("sgd", "none", {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}, (3, 1)),
        ("classp", "elastic", {"optim_args": "state_dtype=uint8", **EVERY_3}, (2, 5)),
    ],
)
def test_an_interrupted_sequence_resumes_to_the_same_result(
    make_model, make_tasks, make_args, collator, tmp_path, optim, method, changes, where
):
    def trainer(name, callbacks=()):
        args = make_args(optim=optim, output_dir=str(tmp_path / name), **changes)
        return ContinualTrainer(
            model=make_model(dropout=0.1), args=args, data_collator=collator, method=method, callbacks=list(callbacks)
        )

    undisturbed = trainer("whole")
    expected = undisturbed.train_sequence(make_tasks(3))
    with pytest.raises(KeyboardInterrupt):
        trainer("killed", [Kill(*where)]).train_sequence(make_tasks(3))
    resumed = trainer("killed")
    results = resumed.train_sequence(make_tasks(3), resume_from_checkpoint=True)
    assert results["accuracy_matrix"] == expected["accuracy_matrix"]
    assert results["optimizer"] == expected["optimizer"]
    assert_same_weights(undisturbed.model, resumed.model)
    memories = [t.continual_memory().tensors for t in (undisturbed, resumed)]
    assert memories[0].keys() == memories[1].keys()
    assert all(torch.equal(memories[0][k], memories[1][k]) for k in memories[0])


def test_resuming_the_first_task_with_another_untrained_model(make_model, make_tasks, make_args, collator):
    """Its row 0 and the rest of R would belong to two models."""
    with pytest.raises(KeyboardInterrupt):
        args = {"args": make_args(), "data_collator": collator, "callbacks": [Kill(1, 2)]}
        ClasspTrainer(model=make_model(seed=0), **args).train_sequence(make_tasks())
    other = ClasspTrainer(model=make_model(seed=1), args=make_args(), data_collator=collator)
    with pytest.raises(ValueError, match=r"began with other weights than this model's.*set_seed"):
        other.train_sequence(make_tasks(), resume_from_checkpoint=True)


def test_a_second_run_goes_on_from_the_first_ones_memory(make_model, make_tasks, make_args, collator, tmp_path):
    """Two processes with one task each do what one process with both does."""
    tasks = make_tasks(2)
    whole = ClasspTrainer(
        make_model(), make_args(output_dir=str(tmp_path / "whole")), collator, pseudo_rehearsal=False
    )
    whole.train_sequence(tasks)

    first = make_args(output_dir=str(tmp_path / "a"))
    ClasspTrainer(model=make_model(), args=first, data_collator=collator).train_sequence(tasks[:1])
    model = type(make_model()).from_pretrained(tmp_path / "a")
    second = make_args(output_dir=str(tmp_path / "b"), seed=43)  # the seed of the whole run's second task
    continued = ClasspTrainer(model, second, collator, memory=tmp_path / "a", pseudo_rehearsal=False)
    continued.train_sequence(tasks[1:])
    assert_same_weights(whole.model, model, rtol=1e-4, atol=1e-6)  # eps is added to a memory from a file again
    assert continued.continual_memory().metadata["tasks"] == ["first", "second"]


@pytest.mark.parametrize(
    "optim, method, known",
    [
        ("classp", "none", "none"),
        ("classp", "logit_adjustment+elastic", "none"),  # the first run knew nothing of the methods
        ("classp", "logit_adjustment+merge", "logit_adjustment"),  # counted once, although shown twice
        ("adamw_torch", "ewc", "none"),
        ("adamw_torch", "ewc", "ewc"),
        ("adamw_torch", "replay+lwf", "none"),
        ("adamw_torch", "interpolate", "none"),
    ],
)
def test_learned_tasks_are_protected_without_being_trained_on(
    make_model, make_tasks, make_args, collator, tmp_path, optim, method, known
):
    """A run that starts from a model that learned the first task ends where one that trains on both does."""
    tasks = make_tasks(3)
    common = {"optim": optim, "reset_optimizer": optim != "classp"}
    whole = ContinualTrainer(
        make_model(), make_args(output_dir=str(tmp_path / "whole"), **common), collator, method=method
    )
    R = whole.train_sequence(tasks)["accuracy_matrix"]

    ContinualTrainer(
        make_model(), make_args(output_dir=str(tmp_path / "a"), **common), collator, method=known
    ).train_sequence(tasks[:1])
    model = type(make_model()).from_pretrained(tmp_path / "a")
    args = make_args(output_dir=str(tmp_path / "b"), learned_tasks=1, **common)
    memory = tmp_path / "a" if (tmp_path / "a/continual_memory.st").exists() else None
    continued = ContinualTrainer(model, args, collator, method=method, memory=memory)
    results = continued.train_sequence(tasks)
    assert results["accuracy_matrix"] == [R[1], *R[1:]]
    assert_same_weights(whole.model, model, rtol=1e-4, atol=1e-6)
    assert continued.continual_memory().metadata["tasks"] == ["first", "second", "third"]
    # and resumes
    again = make_args(output_dir=str(tmp_path / "b"), learned_tasks=1, resume_from_checkpoint="True", **common)
    model = type(make_model()).from_pretrained(tmp_path / "a")
    resumed = ContinualTrainer(model, again, collator, method=method, memory=memory).train_sequence(tasks)
    assert resumed["accuracy_matrix"] == results["accuracy_matrix"]


def test_a_method_is_shown_every_learned_task_it_does_not_know(make_model, make_tasks, make_args, collator, tmp_path):
    """The memory names two tasks, and knows nothing of the methods; the run is resumed between the two."""
    tasks = make_tasks(3)
    first = make_args(output_dir=str(tmp_path / "a"), optim="classp")
    ContinualTrainer(make_model(), first, collator).train_sequence(tasks[:2])

    def second(callbacks=(), **changes):
        args = make_args(
            output_dir=str(tmp_path / "b"), optim="classp", learned_tasks=2, keep_task_models=True, **changes
        )
        model = type(make_model()).from_pretrained(tmp_path / "a")
        return ContinualTrainer(
            model, args, collator, method="logit_adjustment", memory=tmp_path / "a", callbacks=list(callbacks)
        )

    with pytest.raises(KeyboardInterrupt):
        second([Kill(1, 2)]).train_sequence(tasks)
    state = tmp_path / "b" / "sequence_state.json"
    kept = json.loads(state.read_text())
    kept["accuracy_matrix"], kept["steps"] = (
        kept["accuracy_matrix"][:2],
        kept["steps"][:1],
    )  # as if killed after the first
    state.write_text(json.dumps(kept))
    trainer = second(resume_from_checkpoint="True")
    trainer.train_sequence(tasks)
    assert sum(float(f) for f in trainer.methods[0].frequencies.values()) == pytest.approx(3)


def test_the_metric_of_a_users_own_model_is_the_accuracy_it_computes(make_model, make_args, collator):
    class Own(type(make_model())):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = make_model()
    model.__class__ = Own
    given = ContinualTrainer(model, make_args(), collator, compute_metrics=lambda p: {"accuracy": 0.5})
    assert given.args.sequence_metric == "accuracy" and given.greater_is_better
    alone = ContinualTrainer(model, make_args(), collator)
    assert alone.args.sequence_metric == "loss" and not alone.greater_is_better


def test_learned_tasks_that_cannot_be(make_model, make_tasks, make_args, collator, tmp_path, caplog):
    with pytest.raises(ValueError, match="learned_tasks must be >= 0, got -1"):
        make_args(learned_tasks=-1)
    trainer = ContinualTrainer(make_model(), make_args(learned_tasks=2), collator)
    with pytest.raises(ValueError, match="learned_tasks=2 leaves none of the 2 tasks to train on"):
        trainer.train_sequence(make_tasks(2))
    trainer = ContinualTrainer(make_model(), make_args(learned_tasks=1, heads="per_task"), collator)
    with pytest.raises(ValueError, match=r"come from the memory, which has none of \['first'\]"):
        trainer.train_sequence(make_tasks(2))
    trainer = ClasspTrainer(make_model(), make_args(learned_tasks=1, output_dir=str(tmp_path / "a")), collator)
    trainer.train_sequence(make_tasks(2))
    assert "CLASSP knows nothing of what these tasks needed" in caplog.text
    card = (tmp_path / "a/README.md").read_text()
    assert "learned before: first" in card and "after second" in card

    model = type(make_model()).from_pretrained(tmp_path / "a")
    caplog.clear()
    ClasspTrainer(model, make_args(), collator)
    assert f"Pass memory={str(tmp_path / 'a')!r} to go on from it" in caplog.text
    trainer = ClasspTrainer(model, make_args(learned_tasks=1), collator, memory=tmp_path / "a")
    trainer.train_sequence([make_tasks(3)[2], make_tasks(2)[1]])
    assert (
        "learned_tasks=1 takes ['third'] for learned and ['second'] for new; the memory is of ['first', 'second']"
        in caplog.text
    )
    caplog.clear()
    ClasspTrainer(make_model(num_labels=2), make_args(), collator, memory=tmp_path / "a")  # another head
    assert "used for 39 parameters; 2 parameters begin without a memory (classifier.bias" in caplog.text
    with pytest.raises(ValueError, match=r"got the task 'first' alone. Pass \[task\]"):
        trainer.train_sequence(make_tasks(1)[0])


def test_ewc_trainer_takes_its_strength(make_model, make_args, collator):
    assert EWCTrainer(make_model(), make_args(), collator, ewc_lambda=3.0).methods[0].ewc_lambda == 3.0
    with pytest.raises(ValueError, match="Pass ewc_lambda or an EWC in method, not both"):
        EWCTrainer(make_model(), make_args(), collator, ewc_lambda=3.0, method="ewc")


def test_a_memory_covers_parameters_that_never_had_a_gradient(make_model, make_tasks, make_args, collator, tmp_path):
    """An unused layer must not make a run refuse its own memory."""

    def model():
        m = make_model()
        m.unused = torch.nn.Linear(2, 2)
        return m

    ClasspTrainer(model=model(), args=make_args(), data_collator=collator).train_sequence(make_tasks(1))
    ClasspTrainer(model=model(), args=make_args(), memory=tmp_path / "run")


def test_a_memory_that_is_not_used_is_said_so(make_model, make_tasks, make_args, collator, tmp_path, caplog):
    trainer = ClasspTrainer(model=make_model(), args=make_args(), data_collator=collator, method="l2sp")
    trainer.train_sequence(make_tasks(1))
    ContinualTrainer(model=make_model(), args=make_args(optim="sgd"), memory=tmp_path / "run")
    assert "It also holds l2sp.anchor, which this run does not use" in caplog.text
    saved = make_model().from_pretrained(tmp_path / "run")
    for method, said in ((None, False), ("ewc", True)):
        caplog.clear()
        ContinualTrainer(saved, make_args(optim="sgd"), method=method)
        assert ("A continual memory lies beside this model" in caplog.text) == said


def test_results_name_the_rate_of_a_given_optimizer(make_model, make_tasks, make_args, collator):
    given = torch.optim.SGD, {"lr": 0.25}
    trainer = ContinualTrainer(make_model(), make_args(optim="sgd"), collator, optimizer_cls_and_kwargs=given)
    optimizer = trainer.train_sequence(make_tasks(1))["optimizer"]
    assert optimizer["name"] == "SGD" and optimizer["lr"] == 0.25


def test_a_second_run_with_per_task_heads_starts_a_new_head_where_the_first_run_did(
    make_model, make_tasks, make_args, collator, tmp_path
):
    tasks = make_tasks(2)
    args = {"heads": "per_task", "learning_rate": 1e-2}
    whole = ClasspTrainer(
        model=make_model(), args=make_args(output_dir=str(tmp_path / "whole"), **args), data_collator=collator
    )
    expected = whole.train_sequence(tasks)["accuracy_matrix"]
    first = make_args(output_dir=str(tmp_path / "a"), **args)
    ClasspTrainer(model=make_model(), args=first, data_collator=collator).train_sequence(tasks[:1])
    model = type(make_model()).from_pretrained(tmp_path / "a")
    second = make_args(output_dir=str(tmp_path / "b"), seed=43, **args)
    continued = ClasspTrainer(model=model, args=second, data_collator=collator, memory=tmp_path / "a")
    R = continued.train_sequence(tasks[1:])["accuracy_matrix"]
    assert_same_weights(whole.model, model, rtol=1e-4, atol=1e-6)
    assert R[1][0] == expected[2][1]
    # the first run's head is still there
    continued.task_heads.activate("first")
    assert continued.evaluate(tasks[0].test_dataset)["eval_accuracy"] == expected[2][0]


def test_every_task_starts_at_the_full_learning_rate(make_model, make_tasks, make_args, collator, tmp_path):
    class Watch(TrainerCallback):
        def __init__(self):
            self.rates = []

        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 0:
                self.rates.append(optimizer.param_groups[0]["lr"])

    for kind in ("linear", "constant", "reduce_lr_on_plateau"):
        watch = Watch()
        changes = {"eval_strategy": "steps", "eval_steps": 1} if kind == "reduce_lr_on_plateau" else {}
        if changes:
            changes["lr_scheduler_kwargs"] = {"patience": 0, "threshold": 1e9}
            changes["metric_for_best_model"] = "loss"
        args = make_args(lr_scheduler_type=kind, output_dir=str(tmp_path / kind), **changes)
        ClasspTrainer(model=make_model(), args=args, data_collator=collator, callbacks=[watch]).train_sequence(
            make_tasks(2)
        )
        assert watch.rates == [1e-3, 1e-3], kind


def test_checkpoints_of_train_alone_carry_the_methods_state(make_model, make_tasks, make_args, collator, tmp_path):
    tasks = make_tasks(2)
    first = ContinualTrainer(
        model=make_model(), args=make_args(output_dir=str(tmp_path / "a")), data_collator=collator, method="l2sp"
    )
    first.train_sequence(tasks[:1])

    def second(**kwargs):
        args = make_args(output_dir=str(tmp_path / "b"), save_strategy="steps", save_steps=4, max_steps=8)
        return ContinualTrainer(
            model=copy.deepcopy(first.model),
            args=args,
            data_collator=collator,
            train_dataset=tasks[1].train_dataset,
            method="l2sp",
            **kwargs,
        )

    whole = second(memory=tmp_path / "a")
    whole.train()
    again = second()
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert again.methods[0].anchor.keys() == whole.methods[0].anchor.keys()
    assert_same_weights(whole.model, again.model)


# ---- Bad input: one clear error before training starts ----


def test_output_dir_of_another_run(make_model, make_tasks, make_args, collator):
    def trainer(**changes):
        return ClasspTrainer(model=make_model(), args=make_args(**changes), data_collator=collator)

    trainer().train_sequence(make_tasks(1))
    with pytest.raises(
        ValueError, match=r"already holds this sequence's run \(1 of 1 tasks done\).*--resume_from_checkpoint True"
    ):
        trainer().train_sequence(make_tasks(1))
    with pytest.raises(
        ValueError,
        match=r"holds another sequence's run \(tasks: .*'second'.*To add tasks, .* pass learned_tasks=1",
    ):
        trainer().train_sequence(make_tasks(2), resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"holds another sequence's run \(learning_rate: 0.001 there, 0.5 here"):
        trainer(learning_rate=0.5).train_sequence(make_tasks(1), resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"another sequence's run \(label_smoothing_factor: 0.0 there, 0.1 here"):
        trainer(label_smoothing_factor=0.1).train_sequence(make_tasks(1), resume_from_checkpoint=True)
    others = replace(make_tasks(1)[0], train_dataset=make_tasks(1)[0].eval_dataset.select([*range(30)] * 2 + [0] * 4))
    with pytest.raises(ValueError, match=r"holds another sequence's run \(data: "):
        trainer().train_sequence([others], resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"resumes from its own output_dir .*, not from '/elsewhere'"):
        trainer().train_sequence(make_tasks(1), resume_from_checkpoint="/elsewhere")
    # the same run, finished: nothing is trained again
    assert trainer().train_sequence(make_tasks(1), resume_from_checkpoint=True)["tasks"] == ["first"]


@pytest.mark.parametrize(("metric", "higher"), [("accuracy", True), ("eval_loss", False), ("mse", False)])
def test_errors_are_better_when_they_are_lower(metric, higher, make_model, make_args, collator):
    assert ContinualTrainer(make_model(), make_args(sequence_metric=metric), collator).greater_is_better is higher
    args = make_args(sequence_metric=metric, sequence_metric_greater_is_better=not higher)
    assert ContinualTrainer(make_model(), args, collator).greater_is_better is not higher


def test_bad_choices(make_model, make_tasks, make_args, collator, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"Unknown method 'ewcc'. Known: none, ewc, l2sp, .*pseudo_rehearsal, and several joined by",
    ):
        ContinualTrainer(model=make_model(), args=make_args(), method="ewcc")
    with pytest.raises(ValueError, match="heads must be 'shared' or 'per_task', got 'many'"):
        make_args(heads="many")
    with pytest.raises(ValueError, match="Unknown key 'treshold' in --optim_args. CLASSP knows: threshold"):
        ClasspTrainer(model=make_model(), args=make_args(optim_args="treshold=1"))
    trainer = ClasspTrainer(model=make_model(), args=make_args(sequence_metric="f1"), data_collator=collator)
    with pytest.raises(ValueError, match=r"sequence_metric='f1' is not among .*'accuracy'"):
        trainer.train_sequence(make_tasks(1))
    broken = make_args(sequence_metric="mcc", output_dir=str(tmp_path / "nan"))
    broken = ClasspTrainer(make_model(), broken, collator, compute_metrics=lambda _: {"mcc": math.nan})
    with pytest.raises(ValueError, match="mcc is nan for task 'first', and R holds finite numbers"):
        broken.train_sequence(make_tasks(1))
    several = make_model()
    several.config.problem_type = "multi_label_classification"
    several = ContinualTrainer(several, make_args(), collator, method="lwf")
    with pytest.raises(ValueError, match="'lwf' compares probabilities of labels that exclude each other"):
        several.engine.check(several.context())
    with pytest.raises(ValueError, match="give at least one Task"):
        trainer.train_sequence([])
    given = torch.optim.SGD(make_model().parameters(), lr=0.1), None
    scheduled = given[0], torch.optim.lr_scheduler.ConstantLR(given[0])
    for changes, arguments, match in (
        ({}, {"optimizers": scheduled}, "a scheduler in `optimizers`: it would end with the first task"),
        ({"reset_optimizer": True}, {"optimizers": given}, "reset_optimizer and a given optimizer"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, {}, "dataloader_persistent_workers"),
        ({"bf16_full_eval": True}, {}, "bf16_full_eval: evaluating would cast the weights"),
    ):
        refused = ContinualTrainer(model=make_model(), args=make_args(**changes), data_collator=collator, **arguments)
        with pytest.raises(ValueError, match=match):
            refused.train_sequence(make_tasks(1))
    two_gpus = make_args()
    two_gpus._n_gpu = 2  # what TrainingArguments finds on a machine with two GPUs
    with pytest.raises(ValueError, match="One process on 2 GPUs .*accelerate launch"):
        ContinualTrainer(model=make_model(), args=two_gpus)
    alone = ContinualTrainer(model=make_model(), args=make_args(eval_strategy="epoch"), data_collator=collator)
    with pytest.raises(ValueError, match="eval_strategy needs an eval_dataset"):
        alone.train()
    fresh_model_a_task = ClasspTrainer(model_init=lambda: make_model(), args=make_args(), data_collator=collator)
    with pytest.raises(ValueError, match="cannot be used with model_init: every task would get a new model"):
        fresh_model_a_task.train_sequence(make_tasks(1))


def test_eval_strategy_uses_the_tasks_validation_split(make_model, make_tasks, make_args, collator):
    seen = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(state.global_step)

    args = make_args(eval_strategy="steps", eval_steps=4)
    trainer = ClasspTrainer(model=make_model(), args=args, data_collator=collator, callbacks=[Watch()])
    trainer.train_sequence(make_tasks(2))
    assert seen.count(4) == 2  # in the middle of each task
    assert trainer.eval_dataset is not None


def test_memory_none_begins_an_empty_one(make_model, make_args, make_tasks, collator):
    trainer = ContinualTrainer(make_model(), make_args(optim="classp", memory="none"), collator)
    trainer.train_sequence(make_tasks(1))
    assert trainer.seen_tasks == ["first"]
