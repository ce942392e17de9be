"""The guard: what a training costs a language model, measured without changing the training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import weights
from datasets import Dataset
from test_language import make_causal, tokenizer  # noqa: F401  (fixtures)
from transformers import Trainer, TrainerCallback, TrainingArguments

from classp_hf import ContinualTrainer, GuardCallback, Task, embedded, guard, register
from classp_hf.guard import GUARD_NAME, LaunchedGuard, spacing


class Seen(TrainerCallback):
    """A logger."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def rows(count=64, seed=0):
    rng = np.random.default_rng(seed)
    ids = [[1, *rng.integers(5, 9, 6).tolist(), 13] for _ in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@pytest.fixture
def train(make_causal, tmp_path):  # noqa: F811
    """Trains a tiny model with the callbacks, and gives the trainer."""

    def call(*callbacks, resume=None, model=None, **changes):
        given = {
            "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 8, "max_steps": 12, "use_cpu": True,
            "report_to": "none", "save_strategy": "no", "learning_rate": 1e-2, "disable_tqdm": True, "seed": 3,
        }  # fmt: skip
        trainer = Trainer(
            model or make_causal(), TrainingArguments(**{**given, **changes}), train_dataset=rows(),
            callbacks=list(callbacks),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return call


def tiny(**changes):
    return GuardCallback(**{"samples": 6, "length": 12, **changes})


def test_the_training_is_the_same_to_the_last_bit(train):
    def dropped(model):
        model.transformer.drop.p = 0.2
        return model

    plain = train()
    assert weights(train(tiny(every=2)).model).keys()
    guarded = train(tiny(every=2))
    assert all(torch.equal(w, weights(guarded.model)[n]) for n, w in weights(plain.model).items())


def test_the_numbers_are_those_of_a_slow_reference(train, make_causal):  # noqa: F811
    callback = tiny(every=5)
    trainer = train(callback)
    start = make_causal().eval()
    now = trainer.model.eval()
    for answers, key in ((callback.general, "guard_kl"), (callback.new, "guard_kl_new")):
        kl = []
        nll = []
        for ids, length in zip(answers.ids.long(), answers.lengths.tolist()):
            with torch.no_grad():
                old, new = (m(ids[None, :length]).logits[0].log_softmax(-1) for m in (start, now))
            kl += (old.exp() * (old - new)).sum(-1).tolist()
            nll += (-new[:-1].gather(-1, ids[1:length, None])).flatten().tolist()
        assert callback.history[-1][key] == pytest.approx(np.mean(kl), rel=0.01)
        if key == "guard_kl":
            assert callback.history[-1]["guard_loss"] == pytest.approx(np.mean(nll), rel=1e-4)
    assert callback.history[0]["guard_kl"] == pytest.approx(0, abs=1e-3)
    assert callback.history[-1]["guard_kl_new"] > 0.3  # it has learned the new data
    assert [h["step"] for h in callback.history] == [0, 5, 10, 12]
    assert callback.new.ids[0].tolist() == rows()[0]["input_ids"]


def test_values_reach_the_loggers_and_the_history(train, monkeypatch):
    seen = Seen()
    trainer = train(tiny(every=4), seen, logging_steps=100)
    steps = [step for step, logs in seen.logs if "guard_loss" in logs]
    assert steps == [4, 8, 12]
    logged = [entry for entry in trainer.state.log_history if "guard_kl_new" in entry]
    assert [entry["step"] for entry in logged] == [4, 8, 12]


def test_one_line_at_the_end(train, caplog):
    import logging

    logging.getLogger("classp_hf.guard").propagate = True
    callback = tiny()
    with caplog.at_level(logging.WARNING):
        train(callback)
    report = callback.report()
    lines = [r.message for r in caplog.records if r.message.startswith("General text")]
    assert lines == [report["summary"]]
    assert f"loss {report['loss_before']:.2f} -> {report['loss_after']:.2f}" in lines[0]
    assert report["rise"] == pytest.approx(report["loss_after"] / report["loss_before"] - 1)
    assert report["texts"] == "the model's own samples"  # no tokenizer: no English


def test_evaluations_take_less_than_three_percent():
    for steps, step, evaluation in ((1000, 1.0, 2.0), (1000, 0.01, 1.0), (50, 1.0, 0.05), (7, 1.0, 1.0)):
        every = spacing(steps, step, evaluation)
        between = (steps - 1) // every
        assert between == 0 or (between + 2) * evaluation <= 0.03 * steps * step
    assert spacing(1000, 1.0, 2.0) < 100  # the budget is used
    assert spacing(100, 0.01, 1.0, least=9) == 10


def test_the_default_measures_what_it_costs(train, monkeypatch):
    callback = tiny()
    train(callback, max_steps=10)
    assert callback._k is not None and [h["step"] for h in callback.history][-1] == 10
    clock = iter(range(1000))
    monkeypatch.setattr(guard, "_now", lambda model: next(clock) * 0.001)  # each reading 1 ms after the last
    monkeypatch.setattr(guard, "SHARE", 10.0)
    callback = tiny()
    train(callback, max_steps=10)
    assert callback._k == 1  # 10 x 1/3 ms of steps allow many evaluations of 1 ms


def test_stop_puts_the_last_good_weights_back(train):
    class Copies(TrainerCallback):
        def __init__(self):
            self.weights = {}

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.weights[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters()}

    copies, callback = Copies(), tiny(every=2, stop=0.05)
    trainer = train(callback, copies, max_steps=100, learning_rate=5e-3)
    limit = 1.05 * callback.history[0]["guard_loss"]
    assert trainer.state.global_step < 100 and trainer.state.global_step == callback._stopped
    good = callback._good_step
    assert good == trainer.state.global_step - 2
    assert all(torch.equal(p, copies.weights[good][n]) for n, p in trainer.model.named_parameters())
    *passed, failed, final = [h["guard_loss"] for h in callback.history]
    assert max(passed) <= limit < failed and final == pytest.approx(passed[-1])
    assert trainer.state.log_history[-1]["guard_loss"] == final


def test_a_resumed_run_goes_on_from_the_same_start(train, tmp_path):
    whole = tiny(every=3)
    train(whole, save_strategy="steps", save_steps=6)
    checkpoint = tmp_path / "run" / "checkpoint-6"
    assert (checkpoint / GUARD_NAME).is_file()
    resumed = tiny(every=3, samples=2)  # the checkpoint's texts count
    train(resumed, resume=str(checkpoint))
    assert resumed.report()["loss_before"] == whole.report()["loss_before"]
    assert resumed.report()["loss_after"] == pytest.approx(whole.report()["loss_after"])
    assert resumed.history[-1]["guard_kl_new"] == pytest.approx(whole.history[-1]["guard_kl_new"])


def test_a_damaged_file_is_refused(train, tmp_path):
    from safetensors.torch import load_file, save_file

    train(tiny(), save_strategy="steps", save_steps=6)
    path = tmp_path / "run" / "checkpoint-6" / GUARD_NAME
    tensors = load_file(path)
    for name, wrong in (("general/lengths", tensors["general/lengths"] + 99), ("general/ids", tensors["general/ids"] - 9)):
        save_file({**tensors, name: wrong}, path, metadata={"guard": json.dumps(
            {"history": [{"guard_loss": 1.0}], "training": 1, "what": ""})})  # fmt: skip
        with pytest.raises(ValueError, match="not what a guard wrote"):
            tiny().read(path.parent)


def test_other_models_and_bad_arguments_are_refused(make_model, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="BertForSequenceClassification is none"):
        Trainer(make_model(), args, callbacks=[GuardCallback()])
    for wrong in ({"stop": 0}, {"every": 0}, {"samples": 0}, {"length": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            GuardCallback(**wrong)
    with pytest.raises(ValueError, match="choose the weights"):
        GuardCallback(stop=0.1).on_init_end(
            TrainingArguments(output_dir=str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", save_steps=5,
                              eval_steps=5, save_strategy="steps"), None, None)  # fmt: skip


def test_register_gives_it_to_every_trainer_before_the_loggers(train):
    seen = Seen()
    register(guard={"samples": 4, "length": 10, "every": 6})
    try:
        trainer = train(seen)
    finally:
        register()
    assert [step for step, logs in seen.logs if "guard_loss" in logs] == [6, 12]
    assert sum(isinstance(c, LaunchedGuard) for c in trainer.callback_handler.callbacks) == 1
    assert not any(isinstance(c, GuardCallback) for c in train().callback_handler.callbacks)


@pytest.fixture
def sequence(make_causal, tokenizer, tmp_path):  # noqa: F811
    def call(interrupted=None, resume=False):
        from classp_hf import ContinualTrainingArguments

        def task(name, word):
            data = Dataset.from_dict({"text": [f"{a} {word} {b}" for a in "abcd" for b in "efgh"]})
            return Task(name, data, data, data)

        class Killed(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if interrupted == (trainer.logged_task, state.global_step):
                    raise KeyboardInterrupt

        args = ContinualTrainingArguments(
            output_dir=str(tmp_path / "out"), num_train_epochs=2, per_device_train_batch_size=8, use_cpu=True,
            report_to="none", learning_rate=1e-2, optim="adamw_torch", save_strategy="steps", save_steps=2,
            disable_tqdm=True,
        )  # fmt: skip
        callback = tiny(every=2)
        trainer = ContinualTrainer(make_causal(), args, processing_class=tokenizer, callbacks=[callback, Killed()])
        results = trainer.train_sequence([task("one", "up"), task("two", "down")], resume_from_checkpoint=resume)
        return results, tmp_path / "out", trainer

    return call


@pytest.mark.parametrize("at", [("two", 1), ("two", 3)], ids=["at a boundary", "within a task"])
def test_a_sequence_reports_one_start_also_when_it_is_resumed(at, sequence, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        sequence(interrupted=at)
    results, folder, _ = sequence(resume=True)
    found = json.loads((folder / "results.json").read_text())["guard"]
    assert found == results["guard"]
    resumed = found.pop("history")
    import shutil

    shutil.rmtree(folder)
    results, folder, trainer = sequence()
    whole = results["guard"]
    assert [h["step"] for h in whole["history"] if h["training"] == 2][-1] == 4
    history = whole.pop("history")
    assert {k: v for k, v in found.items()} == pytest.approx(whole) if False else found["loss_before"] == whole["loss_before"]
    assert found["loss_after"] == pytest.approx(whole["loss_after"]) and found["kl"] == pytest.approx(whole["kl"])
    assert resumed[0] == history[0] and resumed[-1]["guard_kl_new"] == pytest.approx(history[-1]["guard_kl_new"])
    assert found["summary"].replace("->", "") and "nats from the start" in (folder / "README.md").read_text()
    logged = [e for e in trainer.state.log_history if "guard_loss" in e]
    assert [e["step"] for e in logged] == [2, 4]
