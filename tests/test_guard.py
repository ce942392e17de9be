"""The guard: what a training costs a language model, measured without changing the training."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import weights
from datasets import Dataset
from test_language import make_causal, tokenizer  # noqa: F401  (fixtures)
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments
from warm_python import python

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


def test_the_training_is_the_same_to_the_last_bit(train, make_causal):  # noqa: F811
    def dropped():
        model = make_causal()
        model.transformer.drop.p = 0.2  # a guard that draws from the training's random numbers would show
        return model

    plain, guarded = train(model=dropped()), train(tiny(every=2), model=dropped())
    assert all(torch.equal(w, weights(guarded.model)[n]) for n, w in weights(plain.model).items())


def test_the_numbers_are_those_of_a_slow_reference(train, make_causal):  # noqa: F811
    callback = tiny(every=5)
    trainer = train(callback)
    start = make_causal().eval()
    now = trainer.model.eval()
    for answers, key in ((callback.answers["general"], "guard_kl"), (callback.answers["new"], "guard_kl_new")):
        kl = []
        nll = []
        for ids, length in zip(answers.ids.long(), answers.lengths.tolist()):
            with torch.no_grad():
                old, new = (m(ids[None, :length]).logits[0].log_softmax(-1) for m in (start, now))
            kl += (old.exp() * (old - new)).sum(-1).tolist()
            nll += (-new[:-1].gather(-1, ids[1:length, None])).flatten().tolist()
        assert callback.known["history"][-1][key] == pytest.approx(np.mean(kl), rel=0.01)
        if key == "guard_kl":
            assert callback.known["history"][-1]["guard_loss"] == pytest.approx(np.mean(nll), rel=1e-4)
    assert callback.known["history"][0]["guard_kl"] == pytest.approx(0, abs=1e-3)
    assert callback.known["history"][-1]["guard_kl_new"] > 0.3  # it has learned the new data
    assert [h["step"] for h in callback.known["history"]] == [0, 5, 10, 12]
    assert callback.answers["new"].ids[0].tolist() == rows()[0]["input_ids"]


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
    assert callback.spacing is not None and [h["step"] for h in callback.known["history"]][-1] == 10
    clock = iter(range(1000))
    monkeypatch.setattr(guard, "_now", lambda model: next(clock) * 0.001)  # each reading 1 ms after the last
    monkeypatch.setattr(guard, "SHARE", 10.0)
    callback = tiny()
    train(callback, max_steps=10)
    assert callback.spacing == 1  # 10 x 1/3 ms of steps allow many evaluations of 1 ms


def test_stop_puts_the_last_good_weights_back(train):
    class Copies(TrainerCallback):
        def __init__(self):
            self.weights = {}

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.weights[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters()}

    copies, callback = Copies(), tiny(every=2, stop=0.05)
    trainer = train(callback, copies, max_steps=100, learning_rate=5e-3)
    limit = 1.05 * callback.known["history"][0]["guard_loss"]
    assert trainer.state.global_step < 100 and trainer.state.global_step == callback.stopped
    good = callback.good_step
    assert good == trainer.state.global_step - 2
    assert all(torch.equal(p, copies.weights[good][n]) for n, p in trainer.model.named_parameters())
    *passed, failed, final = [h["guard_loss"] for h in callback.known["history"]]
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
    assert resumed.known["history"][-1]["guard_kl_new"] == pytest.approx(whole.known["history"][-1]["guard_kl_new"])


def test_a_resumed_run_measures_at_the_same_steps_and_is_not_resumed_beyond_its_limit(train, tmp_path):
    train(tiny(every=4), save_strategy="steps", save_steps=6)
    checkpoint = str(tmp_path / "run" / "checkpoint-6")
    resumed = tiny(every=4)
    train(resumed, resume=checkpoint)
    assert [h["step"] for h in resumed.known["history"]] == [0, 4, 6, 8, 12]
    with pytest.raises(ValueError, match="of the resumed checkpoint is beyond stop=0.0001 already"):
        train(tiny(every=4, stop=1e-4), resume=checkpoint)


def test_a_damaged_file_is_refused(train, tmp_path):
    from safetensors.torch import load_file, save_file

    train(tiny(), save_strategy="steps", save_steps=6)
    path = tmp_path / "run" / "checkpoint-6" / GUARD_NAME
    tensors = load_file(path)
    for name, wrong in (
        ("general/lengths", tensors["general/lengths"] + 99),
        ("general/ids", tensors["general/ids"] - 9),
    ):
        save_file({**tensors, name: wrong}, path, metadata={"guard": json.dumps(
            {"history": [{"guard_loss": 1.0}], "training": 1, "what": ""})})  # fmt: skip
        with pytest.raises(ValueError, match="not what a guard wrote"):
            tiny().read(path.parent)


def test_other_models_and_bad_arguments_are_refused(make_model, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="BertForSequenceClassification is none"):
        Trainer(make_model(), args, callbacks=[GuardCallback()])
    t5 = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is none"):
        Trainer(T5ForConditionalGeneration(t5), args, callbacks=[GuardCallback()])
    for wrong in ({"stop": 0}, {"every": 0}, {"samples": 0}, {"length": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            GuardCallback(**wrong)
    with pytest.raises(ValueError, match="choose the weights"):
        best = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        best.load_best_model_at_end = True
        GuardCallback(stop=0.1).on_init_end(best, None, None)


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
    assert found["loss_before"] == whole["loss_before"]
    assert found["loss_after"] == pytest.approx(whole["loss_after"]) and found["kl"] == pytest.approx(whole["kl"])
    assert resumed[0] == history[0] and resumed[-1]["guard_kl_new"] == pytest.approx(history[-1]["guard_kl_new"])
    assert "nats from the start" in (folder / "README.md").read_text()
    logged = [e for e in trainer.state.log_history if "guard_loss" in e]
    assert [e["step"] for e in logged] == [2, 4]


SCRIPT = """
import sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
ids = [[1, 5, 6, 7, 8, 13]] * 64
args = TrainingArguments("out", max_steps=6, use_cpu=True, report_to="none", save_strategy="no", learning_rate=5e-2)
trainer = Trainer(AutoModelForCausalLM.from_pretrained(sys.argv[1]), args,
                  train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}))
trainer.train()
print("logged", [e["step"] for e in trainer.state.log_history if "guard_loss" in e])
"""


@pytest.mark.parametrize("given", [["--guard"], ["--guard=texts.txt"], ["--guard_stop", "0.01"]], ids=lambda v: v[0])
def test_a_script_nobody_edited(given, make_causal, tmp_path):  # noqa: F811
    make_causal().save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "texts.txt").write_text("say a then b\n\nsay c then d")
    command = [python(), "-m", "classp_hf", *given, "--guard_every", "2", "script.py", "model"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    if "texts" in given[0]:  # the script has no tokenizer
        assert "need the tokenizer" in run.stderr
        return
    assert run.returncode == 0, run.stderr[-3000:]
    assert "General text: loss" in run.stderr
    assert "logged [2, 4, 6]" in run.stdout if given == ["--guard"] else "The guard stopped" in run.stderr


def test_texts_in_the_scripts_place_are_told(tmp_path):
    (tmp_path / "texts.txt").write_text("Hello.")
    command = [python(), "-m", "classp_hf", "--guard", "texts.txt", "script.py"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert run.returncode == 2 and "write --guard=texts.txt" in run.stderr


WORKER = """
import sys, json
sys.path.insert(0, sys.argv[1])
import torch
from transformers import Trainer, TrainingArguments
import test_guard, test_language
model = test_language.make_causal.__wrapped__()()
callback = test_guard.tiny(every=2, stop=0.02)
args = TrainingArguments(sys.argv[2], max_steps=40, use_cpu=True, report_to="none", save_strategy="no",
                         learning_rate=5e-3, per_device_train_batch_size=4)
trainer = Trainer(model, args, train_dataset=test_guard.rows(), callbacks=[callback])
trainer.train()
sums = [float(p.detach().double().sum()) for p in trainer.model.parameters()]
found = {"sums": sums, "stopped": callback.stopped, "good": callback.good_step, "history": callback.known["history"]}
open(f"{sys.argv[2]}-{args.process_index}.json", "w").write(json.dumps(found))
"""


def test_two_ranks_stop_at_one_step_with_the_same_weights(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [python(), "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(tmp_path / "worker.py"), str(Path(__file__).parent), str(tmp_path / "out")]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stderr[-4000:]
    one, two = (json.loads(Path(f"{tmp_path}/out-{rank}.json").read_text()) for rank in (0, 1))
    assert one == two and one["stopped"] is not None and one["good"] == one["stopped"] - 2
    assert one["history"][-1]["guard_loss"] == pytest.approx(one["history"][-3]["guard_loss"], rel=1e-6)


def test_stopping_under_deepspeed_is_refused():
    args = TrainingArguments(use_cpu=True, report_to="none")
    args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match="which DeepSpeed keeps in buffers of its own"):
        GuardCallback(stop=0.1).on_init_end(args, None, None)


@pytest.mark.slow  # 45 s; test_remember.py has the same model
def test_a_real_language_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded.smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)  # noqa: F811
    texts = [tokenizer(f"Word number {i} is banana banana banana.")["input_ids"] for i in range(8)]
    data = Dataset.from_dict({"input_ids": texts, "labels": texts})
    args = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", learning_rate=5e-4,
        per_device_train_batch_size=1, disable_tqdm=True,
    )  # fmt: skip
    callback = GuardCallback(samples=4, length=24)
    Trainer(model, args, train_dataset=data, processing_class=tokenizer, callbacks=[callback]).train()
    report = callback.report()
    assert report["texts"] == "the model's own samples and plain English"
    assert 2 < report["loss_before"] < 5 and report["kl"] > 0.01 and report["kl_new"] > report["kl"]
