"""Ordinary combinations that went wrong once: two features together, a second run, another head, another optimizer."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pickle
import shutil
import subprocess
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import VOCABULARY, weights
from fake_hub import FakeHub
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from warm_python import python

import classp_hf
from classp_hf import (
    EWC,
    ClasspTrainer,
    ContinualCallback,
    ContinualMemory,
    ContinualTrainer,
    EWCTrainer,
    LogitAdjustment,
    compat,
    embedded,
)
from classp_hf.compat import averages_loss, load_whole
from classp_hf.engine import write_beside
from classp_hf.memory import MEMORY_NAME, OLD_NAME
from classp_hf.sequence import SequenceRun


@pytest.fixture
def plain(make_tasks, collator, tmp_path):
    """Trains a model with a plain Trainer, as a script does."""
    classp_hf.register()
    data = make_tasks(2)

    def train(model, output, callbacks=(), dataset=None, optimizers=(None, None), **changes):
        keywords = {"learning_rate": 1e-2, "per_device_train_batch_size": 16, "num_train_epochs": 1, "use_cpu": True}
        keywords |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
        args = TrainingArguments(str(tmp_path / output), **{"optim": "classp", **keywords, **changes})
        dataset = data[0].train_dataset if dataset is None else dataset
        trainer = Trainer(model, args, collator, dataset, callbacks=list(callbacks), optimizers=optimizers)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        return trainer

    return train


def classifier(folder, **changes):
    return BertForSequenceClassification.from_pretrained(folder, ignore_mismatched_sizes=True, **changes)


# ---- The memory and its model ----


def test_a_memory_of_another_power_is_refused_on_every_path(plain, make_model, make_args, tmp_path):
    plain(make_model(), "a")
    message = r"sums \|g\|\^2, and this run \|g\|\^1. Pass optim_args='power=2'"
    with pytest.raises(ValueError, match=message):
        ClasspTrainer(make_model(), make_args(optim_args="power=1"), memory=tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        plain(classifier(tmp_path / "a"), "b", optim_args="power=1")
    with pytest.raises(ValueError, match="Pass memory_power=2"):
        args = make_args(optim="sgd", gather_memory=True, memory_power=1.0)
        ContinualTrainer(make_model(), args, memory=tmp_path / "a")


def test_a_changed_head_keeps_the_backbones_memory(plain, make_model, make_tasks, tmp_path, caplog):
    plain(make_model(), "three")
    two = make_tasks(1)[0].train_dataset.filter(lambda row: row["labels"] < 2)
    old = ContinualMemory.load(tmp_path / "three").get("accumulator")
    plain(classifier(tmp_path / "three", num_labels=2), "two", dataset=two, max_steps=1)
    assert (
        "used for 39 parameters; 2 parameters begin without a memory (classifier.bias, classifier.weight)"
        in caplog.text
    )
    new = ContinualMemory.load(tmp_path / "two").get("accumulator")
    assert new["classifier.weight"].shape == (2, 32)
    body = "bert.encoder.layer.0.output.dense.weight"
    assert (new[body] >= old[body] * 0.999999).all() and old[body].sum() > 0
    # a head of the same shape that was begun anew is told by its weights
    caplog.clear()
    model = classifier(tmp_path / "three")
    model.classifier.weight.data.normal_()
    plain(model, "reset", max_steps=1)
    assert "1 parameters begin without a memory (classifier.weight)" in caplog.text


def test_masked_language_model_then_classifier_then_a_larger_vocabulary(
    plain, make_model, make_tasks, tmp_path, caplog
):
    language_model = BertForMaskedLM(make_model().config)
    texts = make_tasks(1)[0].train_dataset.map(lambda row: {"labels": [-100, 5], "input_ids": [1, 5]})

    def pad(rows):
        return {k: torch.tensor([row[k] for row in rows]) for k in ("input_ids", "labels")}

    args = TrainingArguments(str(tmp_path / "mlm"), optim="classp", learning_rate=1e-2, max_steps=2, use_cpu=True,
                             report_to="none", save_strategy="no", disable_tqdm=True)  # fmt: skip
    trainer = Trainer(language_model, args, pad, texts)
    trainer.train()
    trainer.save_model()
    plain(classifier(tmp_path / "mlm", num_labels=3), "a")
    assert "tensors are kept for parameters that are frozen or not in this model" in caplog.text
    memory = ContinualMemory.load(tmp_path / "a").get("accumulator")
    assert "cls.predictions.transform.dense.weight" in memory and "classifier.weight" in memory
    model = classifier(tmp_path / "a")
    model.resize_token_embeddings(VOCABULARY + 2)
    plain(model, "b", max_steps=1)
    name = "bert.embeddings.word_embeddings.weight"
    assert f"{name} keeps {VOCABULARY} rows of {VOCABULARY} and has {VOCABULARY + 2}" in caplog.text
    grown = ContinualMemory.load(tmp_path / "b").get("accumulator")[name]
    assert grown.shape[0] == VOCABULARY + 2 and (grown[:VOCABULARY] >= memory[name] * 0.999999).all()


def test_a_memory_older_than_its_weights_says_so(plain, make_model, tmp_path, caplog):
    plain(make_model(), "a")
    plain(classifier(tmp_path / "a"), "a", optim="adamw_torch", max_steps=4)  # over it, and forgot --optim classp
    assert "lies beside this model" in caplog.text and "is not used" in caplog.text
    caplog.clear()
    plain(classifier(tmp_path / "a"), "b")
    assert "parameters were changed after it was written" in caplog.text


def test_the_memory_goes_where_the_model_is_saved(plain, make_model, tmp_path, caplog):
    trainer = plain(make_model(), "a")
    assert f"is written to {tmp_path / 'a' / MEMORY_NAME}" in caplog.text
    trainer.model.save_pretrained(tmp_path / "elsewhere" / "final")
    assert ContinualMemory.load(tmp_path / "elsewhere" / "final").tasks == ["a"]
    assert not list(tmp_path.rglob("continual_memory*.safetensors"))  # what loaders would take for weights
    plain(trainer.model, "second")  # a second Trainer on the same model in one process
    assert ContinualMemory.load(tmp_path / "second").tasks == ["a", "second"]
    plain(classifier(tmp_path / "second"), "other/second")
    assert ContinualMemory.load(tmp_path / "other" / "second").tasks == ["a", "second", "other/second"]


def test_training_twice_goes_on_from_the_live_memory(plain, make_model, tmp_path):
    plain(make_model(), "a")
    trainer = plain(classifier(tmp_path / "a"), "b")
    once = ContinualMemory.load(tmp_path / "b").get("accumulator")
    trainer.train()
    twice = ContinualMemory.load(tmp_path / "b").get("accumulator")
    assert all((twice[n] >= s * 0.999999).all() for n, s in once.items())
    assert any((twice[n] > s * 1.01).any() for n, s in once.items())


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_a_second_trainer_goes_on_from_the_live_memory(registered, shared, plain, make_model, monkeypatch, tmp_path):
    """With one callback for both Trainers or one for each, alone or beside those that `register` gives them."""
    if not registered:
        others = [c for c in transformers.trainer.DEFAULT_CALLBACKS if c is not ContinualCallback]
        monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", others)
    model, one = make_model(), ContinualCallback()
    for name, callbacks in (("a", [one]), ("b", [one if shared else ContinualCallback()])):
        plain(model, name, callbacks=callbacks)
    once, twice = (ContinualMemory.load(tmp_path / name).get("accumulator") for name in "ab")
    assert all((twice[n] >= s * 0.999999).all() for n, s in once.items())
    assert any((twice[n] > s * 1.01).any() for n, s in once.items())


def test_the_old_file_name_is_read(plain, make_model, tmp_path):
    plain(make_model(), "a")
    os.rename(tmp_path / "a" / MEMORY_NAME, tmp_path / "a" / OLD_NAME)
    plain(classifier(tmp_path / "a"), "b")
    assert ContinualMemory.load(tmp_path / "b").tasks == ["a", "b"]


def test_best_weights_come_back_with_their_memory(make_model, make_args, make_tasks, collator, tmp_path):
    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_score"] = -float(state.global_step)

    task = make_tasks(1)[0]
    args = make_args(eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2, max_steps=6,
                     load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True)  # fmt: skip
    trainer = ClasspTrainer(make_model(), args, collator, task.train_dataset, task.eval_dataset, callbacks=[Worse()])
    trainer.train()
    trainer.save_model()
    best = ContinualMemory.load(tmp_path / "run" / "checkpoint-2").get("accumulator")
    kept = ContinualMemory.load(tmp_path / "run").get("accumulator")
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    for n, s in best.items():
        torch.testing.assert_close(kept[n], s, rtol=1e-5, atol=1e-12)


# ---- Gradients that are not finite, and steps that are skipped ----


@pytest.mark.parametrize("poison", [float("inf"), float("nan"), 1e20])
def test_a_skipped_or_overflowing_step_never_reaches_a_gathered_memory(poison, make_args):
    model = nn.Linear(4, 3)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    engine, args = ContinualCallback(gather=True, memory="none"), make_args(optim="adamw_torch")
    engine.on_train_begin(args, TrainerState(), TrainerControl(), model=model, optimizer=optimizer)
    x, expected = torch.randn(5, 4), torch.zeros(3, 4)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()  # max_grad_norm=0: nobody unscales before the step
        if step == 1:
            model.weight.grad[0, 0] = poison * (scaler.get_scale() if poison == 1e20 else 1)
        else:
            expected += (model.weight.grad / scaler.get_scale()) ** 2
        scaler.step(optimizer)
        scaler.update()
    assert all(s.isfinite().all() for s in engine.accumulators().values())
    torch.testing.assert_close(engine.accumulators()["weight"], expected)


# ---- Losses, methods, named trainers ----


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_ragged_micro_batches_weigh_a_method_as_the_loss(smoothing, make_model, make_tasks, make_args, collator):
    finals = []
    for batch, accumulation in ((12, 1), (8, 2)):
        args = make_args(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, optim="sgd",
                         label_smoothing_factor=smoothing, max_steps=1, learning_rate=1.0)  # fmt: skip
        data = make_tasks(1)[0].train_dataset.select(range(12))
        adjustment = LogitAdjustment(prior_strength=1.0)
        adjustment.frequencies = {
            "negative": torch.tensor(0.8),
            "neutral": torch.tensor(0.1),
            "positive": torch.tensor(0.1),
        }
        trainer = ContinualTrainer(make_model(), args, collator, data, method=[adjustment, "lwf"])
        trainer.engine.tasks.append("earlier")
        trainer.train()
        finals.append(weights(trainer.model))
    for n, w in finals[0].items():
        torch.testing.assert_close(finals[1][n], w, rtol=1e-5, atol=2e-6)


def test_label_smoothing_applies_to_the_adjusted_logits(make_model, make_args):
    trainer = ContinualTrainer(make_model(), make_args(label_smoothing_factor=0.2), method="logit_adjustment")
    trainer.methods[0].correction = torch.tensor([0.0, -1.0, -2.0])
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    trainer.model.train()
    expected = F.cross_entropy(logits + trainer.methods[0].correction, labels, label_smoothing=0.2)
    torch.testing.assert_close(trainer.adjusted_loss({"logits": logits}, labels), expected)


def test_a_named_trainer_adds_its_method_or_says_that_it_cannot(make_model, make_args, make_tasks, collator):
    assert [m.name for m in EWCTrainer(make_model(), make_args(), method="replay").methods] == ["ewc", "replay"]
    assert EWC().ewc_lambda == 0.1
    nested = ContinualTrainer(make_model(), make_args(), method=[["l2sp"], "ewc"])
    assert [m.name for m in nested.methods] == ["l2sp", "ewc"]
    model = make_model()
    with pytest.raises(ValueError, match="ClasspTrainer trains with CLASSP, got AdamW. Use ContinualTrainer"):
        ClasspTrainer(model, make_args(), optimizers=(torch.optim.AdamW(model.parameters()), None))
    trainer = EWCTrainer(make_model(), make_args(max_steps=2), collator, make_tasks(1)[0].train_dataset)
    trainer.train()
    assert trainer.methods[0].importance


def test_order_and_being_shown_or_trained_do_not_matter(make_model, make_args, make_tasks, collator, tmp_path):
    tasks, states = make_tasks(3), []
    for name, method, learned in (("a", "replay+logit_adjustment", 0), ("b", "logit_adjustment+replay", 0),
                                  ("c", "replay+logit_adjustment", 2)):  # fmt: skip
        args = make_args(optim="sgd", output_dir=str(tmp_path / name), learned_tasks=learned)
        trainer = ContinualTrainer(make_model(), args, collator, method=method)
        trainer.train_sequence(tasks)
        adjustment = next(m for m in trainer.methods if m.name == "logit_adjustment")
        states.append({n: float(f) for n, f in adjustment.frequencies.items()})
    assert states[0] == pytest.approx(states[1])
    assert states[0] == pytest.approx(states[2])


# ---- Arguments, resuming, cards, the Hub ----


def test_arguments_of_other_classes(make_model, make_args, tmp_path, caplog, make_tasks, collator):
    assert (
        make_args().learning_rate == 1e-3 and classp_hf.ContinualTrainingArguments(str(tmp_path)).learning_rate == 5e-5
    )
    Trainer(make_model(), classp_hf.ContinualTrainingArguments(str(tmp_path), use_cpu=True)).create_optimizer()
    args = Seq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, generation_max_length=7, report_to="none", max_steps=1
    )
    trainer = ClasspTrainer(make_model(), args, collator, make_tasks(1)[0].train_dataset)
    assert trainer.args.generation_max_length == 7 and trainer.args.heads == "shared" and not hasattr(args, "heads")
    trainer.train()
    assert "CLASSP trains with learning_rate=5e-05, which is far too small" in caplog.text


def test_training_args_are_read_by_processes_that_know_nothing_of_classp(make_args, tmp_path):
    classp_hf.register()
    args = TrainingArguments(str(tmp_path), optim="classp", use_cpu=True)
    torch.save(args, tmp_path / "training_args.bin")
    code = (
        "import sys, torch; a = torch.load(sys.argv[1], weights_only=False); assert str(a.optim) == 'classp', a.optim"
    )
    subprocess.run([python(), "-c", code, str(tmp_path / "training_args.bin")], check=True)
    assert pickle.loads(pickle.dumps(args.optim)) == "classp"


def test_resuming_refuses_other_weights_another_optimizer_and_stale_checkpoints(
    plain, make_model, make_args, make_tasks, collator, tmp_path
):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    def trainer(seed=0, callbacks=()):
        model = make_model()
        model.classifier.bias.data += 0.01 * seed  # as accurate, and another model
        args = make_args(save_strategy="steps", save_steps=1)
        return ContinualTrainer(model, args, collator, callbacks=list(callbacks))

    with pytest.raises(KeyboardInterrupt):
        trainer(callbacks=[Stop()]).train_sequence(make_tasks(2))
    with pytest.raises(ValueError, match="began with other weights than this model's"):
        trainer(seed=1).train_sequence(make_tasks(2), resume_from_checkpoint=True)
    (tmp_path / "run" / "sequence_state.json").unlink()
    with pytest.raises(ValueError, match="checkpoint-1 is of another run, whose sequence_state.json is gone"):
        trainer().train_sequence(make_tasks(2), resume_from_checkpoint=True)
    plain(make_model(), "a", save_strategy="steps", save_steps=2)
    args = TrainingArguments(str(tmp_path / "a"), optim="adamw_torch", use_cpu=True, report_to="none")
    resumed = Trainer(make_model(), args, collator, make_tasks(1)[0].train_dataset)
    with pytest.raises(ValueError, match="is not one of AdamW: it has no 'step'. Resume with the same --optim"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_callbacks_read_plain_keys_in_a_sequence(make_model, make_args, make_tasks, collator, tmp_path):
    class Losses(TrainerCallback):
        seen = 0

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen += "loss" in logs

    watch = Losses()
    args = make_args(logging_strategy="steps", logging_steps=4)
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    (tmp_path / "run").mkdir()
    os.symlink(tmp_path / "nowhere", tmp_path / "run" / "dangling")  # nor does a dangling link lose the run
    (tmp_path / "run" / ".mine.tmp").write_text("not ours")
    trainer = ContinualTrainer(make_model(), args, collator, callbacks=[watch])
    trainer.train_sequence(make_tasks(2))
    assert (
        watch.seen == 4
        and (tmp_path / "run" / "results.json").is_file()
        and (tmp_path / "run" / ".mine.tmp").is_file()
    )
    trainer.create_model_card("en", "mit")
    assert "license: mit" in (tmp_path / "run" / "README.md").read_text()


def test_pushes_during_training_carry_the_memory_and_no_tasks_folder(make_model, make_tasks, tmp_path):
    make_model().save_pretrained(tmp_path / "start")
    for t, task in enumerate(make_tasks(2)):
        task.train_dataset.save_to_disk(str(tmp_path / f"data{t}"))
    code = """
        import sys, time, torch
        from datasets import Dataset
        from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
        import classp_hf
        classp_hf.register()
        kind, out = sys.argv[1:]
        data = [Dataset.load_from_disk(f"data{t}") for t in range(2)]
        def pad(rows):
            ids = [r["input_ids"] + [0] * (8 - len(r["input_ids"])) for r in rows]
            return {"input_ids": torch.tensor(ids), "labels": torch.tensor([r["labels"] for r in rows])}
        cls = classp_hf.ContinualTrainingArguments if kind == "sequence" else TrainingArguments
        args = cls(out, optim="classp", learning_rate=1e-2, max_steps=3, save_strategy="steps", save_steps=2,
                   use_cpu=True, push_to_hub=True, hub_model_id=f"me/{kind}", hub_token="hf_x", report_to="none")
        model = AutoModelForSequenceClassification.from_pretrained("start")
        if kind == "sequence":
            tasks = [classp_hf.Task(f"t{t}", d, d) for t, d in enumerate(data)]
            trainer = classp_hf.ContinualTrainer(model, args, pad)
            trainer.train_sequence(tasks)
            trainer.push_to_hub()
        else:
            class Wait(TrainerCallback):  # an upload that is under way while files change may fail, as upstream's own
                def on_step_begin(self, args, state, control, **kwargs):
                    while state.global_step == 2 and not trainer.push_in_progress.is_done():
                        time.sleep(0.1)
            trainer = Trainer(model, args, pad, data[0], callbacks=[Wait()])
            trainer.train()
    """
    with FakeHub({}) as hub:
        for kind in ("plain", "sequence"):
            command = [hub.python(), "-c", textwrap.dedent(code), kind, str(tmp_path / kind)]
            env = hub.env() | {"PYTHONPATH": str(Path(classp_hf.__file__).parents[1])}
            run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
            assert run.returncode == 0, run.stderr
    commits = hub.commits
    assert commits["me/plain"] and all(MEMORY_NAME in files for files in commits["me/plain"])
    assert len(commits["me/sequence"]) == 1 and {MEMORY_NAME, "results.json"} <= commits["me/sequence"][0]
    assert "training_args.bin" not in commits["me/sequence"][0]


# ---- Scripts nobody edits ----


def regression(rows):
    return [{"input_ids": row["input_ids"], "labels": float(row["labels"])} for row in rows]


def tokens(rows):
    return [{"input_ids": row["input_ids"], "labels": [i % 3 for i in row["input_ids"]]} for row in rows]


def padded(features):
    width = max(len(f["input_ids"]) for f in features)
    out = {"input_ids": torch.tensor([f["input_ids"] + [0] * (width - len(f["input_ids"])) for f in features])}
    if isinstance(features[0]["labels"], list):
        return out | {"labels": torch.tensor([f["labels"] + [0] * (width - len(f["labels"])) for f in features])}
    return out | {"labels": torch.tensor([f["labels"] for f in features])}


@pytest.mark.parametrize(
    ("method", "kind"), [(None, "classifier"), ("merge", "classifier"), (None, "regression"), (None, "tokens")]
)
def test_micro_batches_have_the_memory_of_the_whole_batch(method, kind, make_model, make_tasks, tmp_path):
    """BERT averages its loss over the micro-batch, and Trainer takes it for one that is divided by the whole batch."""
    classp_hf.register(**({} if method is None else {"method": method}))
    data = list(make_tasks()[0].train_dataset)
    width = max(len(row["input_ids"]) for row in data)  # as many tokens in every micro-batch
    data = [{**row, "input_ids": row["input_ids"] + [1] * (width - len(row["input_ids"]))} for row in data]
    data = {"regression": regression, "tokens": tokens}.get(kind, list)(data)
    found = []
    for size in (16, 4):
        args = TrainingArguments(
            str(tmp_path / str(size)), optim="adamw_torch" if method else "classp", learning_rate=1e-3, max_steps=2,
            per_device_train_batch_size=size, gradient_accumulation_steps=16 // size, max_grad_norm=0, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        model = make_model(num_labels=1 if kind == "regression" else 3)
        model = transformers.BertForTokenClassification(model.config) if kind == "tokens" else model
        for p in model.parameters():
            p.data = torch.linspace(-0.1, 0.1, p.numel()).view_as(p) if kind == "tokens" else p.data
        Trainer(model, args, padded, data).train()
        found.append(ContinualMemory.load(args.output_dir).get("accumulator"))
    assert all(torch.allclose(t, found[1][n], rtol=1e-2, atol=1e-8) for n, t in found[0].items())
    assert sum(float(t.sum()) for t in found[0].values()) > 1e-6


@pytest.mark.parametrize(
    ("model", "averages"),
    [
        ("BertForSequenceClassification", True),
        ("BertForMaskedLM", True),
        ("LlamaForSequenceClassification", True),
        ("T5ForConditionalGeneration", True),
        ("LlamaForCausalLM", False),
        ("GPT2LMHeadModel", False),
        ("ModernBertForMaskedLM", False),
    ],
)
def test_which_models_average_their_loss(model, averages):
    base = getattr(transformers, model)

    class Inherits(base):
        pass

    class Wraps(base):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Own(base):
        def forward(self, input_ids, labels=None, **kwargs):
            return {"loss": F.cross_entropy(self.logits(input_ids), labels)}

    class Sums(base):
        def forward(self, input_ids, labels=None, num_items_in_batch=None, **kwargs):
            return {"loss": F.cross_entropy(self.logits(input_ids), labels, reduction="sum") / num_items_in_batch}

    class HandsOn(base):
        def forward(self, input_ids, **kwargs):
            return self.inner(input_ids, **kwargs)

    for cls, expected in {base: averages, Inherits: averages, Wraps: averages, Own: True, Sums: False}.items():
        nn.Module.__init__(made := cls.__new__(cls))
        assert averages_loss(made) is expected

    class Says(Own):
        accepts_loss_kwargs = True

    class Typed(base):
        exec("def forward(self, input_ids, **kwargs): return input_ids")

    class Partial(base):
        forward = functools.partial(print)

    for cls in (HandsOn, Says, Typed, Partial):  # believed, for want of better knowledge
        nn.Module.__init__(made := cls.__new__(cls))
        assert not averages_loss(made)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression", "single_label_classification"])
def test_an_image_classifiers_memory_does_not_grow_with_the_accumulation_steps(kind, tmp_path):
    classp_hf.register()
    labels = {"regression": torch.randn(16), "single_label_classification": torch.arange(16) % 3}
    labels = labels.get(kind, torch.randint(2, (16, 3)).float())
    images = torch.randn(16, 3, 8, 8)
    data = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels)]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_labels=1 if kind == "regression" else 3, problem_type=kind, **sizes
    )
    found = []
    for size in (16, 4):
        transformers.set_seed(0)
        args = TrainingArguments(
            str(tmp_path / str(size)), optim="classp", learning_rate=1e-3, max_steps=1, max_grad_norm=0, use_cpu=True,
            per_device_train_batch_size=size, gradient_accumulation_steps=16 // size, report_to="none",
            save_strategy="no",
        )  # fmt: skip
        Trainer(transformers.ViTForImageClassification(config), args, train_dataset=data).train()
        accumulators = ContinualMemory.load(args.output_dir).get("accumulator")
        found.append(sum(float(t.sum()) for t in accumulators.values()))
    assert found[1] == pytest.approx(found[0], rel=0.05)


@pytest.mark.parametrize("method", ["elastic", "merge", "interpolate"])
def test_a_finished_training_goes_on_in_the_same_trainer(method, plain, make_model, tmp_path):
    """As in a notebook: more steps, and `resume_from_checkpoint`."""
    plain(make_model(), "a")
    constant = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 4, "num_train_epochs": 2}
    found = []
    for steps in (8, 4):
        start = classifier(tmp_path / "a")
        trainer = plain(start, f"b{steps}", [ContinualCallback(method)], max_steps=steps, **constant)
        if steps == 4:
            trainer.args.max_steps = 8
            trainer.train(resume_from_checkpoint=True)
        found.append(weights(trainer.model))
    assert all(torch.equal(w, found[1][n]) for n, w in found[0].items())


@pytest.mark.parametrize("memory", ["a", "none"])
def test_the_launchers_memory_is_where_a_model_begins(memory, plain, make_model, tmp_path):
    """Two Trainers of one model in a script: the second goes on from the first."""
    plain(make_model(), "a")
    classp_hf.register(memory=str(tmp_path / "a") if memory == "a" else memory)
    try:
        model = classifier(tmp_path / "a")
        for output in ("first", "second"):
            plain(model, output)
    finally:
        classp_hf.register()
    expected = ["a", "first", "second"] if memory == "a" else ["first", "second"]
    assert ContinualMemory.load(tmp_path / "second").tasks == expected


@pytest.mark.parametrize("method", ["ewc", "l2sp"])
def test_a_head_that_was_initialised_again_is_not_pulled_back(method, plain, make_model, tmp_path, caplog):
    model = plain(make_model(), "a", [ContinualCallback(method)], optim="adamw_torch", learning_rate=1e-3).model
    with torch.no_grad():
        model.classifier.weight.normal_()
    model.save_pretrained(tmp_path / "new")
    seen, callback = [], ContinualCallback(method, str(tmp_path / "a"))

    class See(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            seen.extend(callback.methods[0].anchor)

    with caplog.at_level(logging.WARNING, "classp_hf"):
        plain(classifier(tmp_path / "new"), "b", [callback, See()], optim="adamw_torch", learning_rate=1e-3)
    assert "1 parameters were initialised again (classifier.weight)" in caplog.text
    assert "classifier.weight" not in seen and "classifier.bias" in seen


@pytest.mark.parametrize("method", ["ewc", "elastic", "ema"])
def test_a_checkpoint_of_an_unfinished_training_says_what_it_lacks(method, plain, make_model, tmp_path, caplog):
    plain(make_model(), "a", [ContinualCallback(method)], optim="adamw_torch", save_strategy="steps", save_steps=2)
    with caplog.at_level(logging.WARNING, "classp_hf"):
        model = classifier(tmp_path / "a" / "checkpoint-2")
        plain(model, "b", [ContinualCallback(method)], optim="adamw_torch")
    assert ("it is used for nothing" in caplog.text) == (method != "elastic")
    lacks = "the training on a was not finished, and ewc learned nothing from it"
    assert (lacks in caplog.text) == (method == "ewc")  # elastic has the gradients of all steps so far


def test_a_model_without_a_config(plain, make_tasks, tmp_path):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.EmbeddingBag(VOCABULARY, 8), nn.Linear(8, 3)

        def forward(self, input_ids, attention_mask=None, labels=None):
            logits = self.head(self.embedding(input_ids))
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    plain(Bag(), "a", max_steps=2, save_strategy="steps", save_steps=1)
    assert ContinualMemory.load(tmp_path / "a").get("accumulator").keys() == dict(Bag().named_parameters()).keys()
    assert (tmp_path / "a" / "checkpoint-1" / MEMORY_NAME).is_file()


def test_a_search_for_hyperparameters_writes_no_memory(make_args, tmp_path):
    model = nn.Linear(4, 3)
    optimizer = classp_hf.CLASSP(model.parameters())
    engine, args = ContinualCallback(memory="none"), make_args(optim="classp")
    state = TrainerState(is_hyper_param_search=True)
    engine.on_train_begin(args, state, TrainerControl(), model=model, optimizer=optimizer)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    engine.on_save(args, state, TrainerControl())
    engine.on_train_end(args, state, TrainerControl(), model=model)
    write_beside(model, tmp_path / "run-0" / "checkpoint-1")
    assert not list(tmp_path.rglob("continual_memory*"))


SCRIPT = """
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

data = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 8, "labels": [0, 1] * 4})
args = TrainingArguments("out", max_steps=2, report_to="none", save_strategy="no", use_cpu=True)  # its own
trainer = Trainer(AutoModelForSequenceClassification.from_pretrained("my start = x"), args, train_dataset=data)
trainer.train()
print("INSIDE", type(trainer.optimizer.optimizer).__name__, args.learning_rate)
"""


def test_the_launcher_overrides_scripts_that_build_their_own_arguments(make_model, tmp_path):
    make_model(num_labels=2).save_pretrained(tmp_path / "my start = x")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "other.py").write_text("print('no Trainer here')")

    def run(*options, script="script.py"):
        command = [python(), "-m", "classp_hf", *options, script]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)

    first = run("--optim", "classp", "--learning_rate", "0.01")
    assert "INSIDE CLASSP 0.01" in first.stdout, first.stderr
    assert "From the command line of classp_hf: optim=classp, learning_rate=0.01" in first.stderr
    os.rename(tmp_path / "out" / MEMORY_NAME, tmp_path / "my start = x" / MEMORY_NAME)  # a blank and = in its path
    second = run("--method", "ewc", "--ewc_lambda", "0.3", "--memory", "my start = x")
    assert "INSIDE AdamW" in second.stdout and "Going on from the continual memory of out" in second.stderr, (
        second.stderr
    )
    memory = ContinualMemory.load(tmp_path / "out")
    assert "ewc.importance" in memory.kinds() and memory.metadata["method"]["ewc_lambda"] == 0.3
    nothing = run("--method", "ewc", script="other.py")
    assert (
        nothing.returncode != 0
        and "--method had no effect: 'other.py' trained no transformers.Trainer" in nothing.stderr
    )


def test_small_learning_rates_are_warned_about(make_args, caplog):
    for rate, warned in ((2e-5, True), (5e-5, True), (1e-3, False)):
        caplog.clear()
        model = nn.Linear(2, 2)
        args = SimpleNamespace(learning_rate=rate, process_index=0, optim="classp", optim_args=None, output_dir="x",
                               resume_from_checkpoint=None, logging_strategy="no", should_save=False)  # fmt: skip
        with caplog.at_level(logging.WARNING):
            ContinualCallback(memory="none").on_train_begin(
                args,
                TrainerState(),
                TrainerControl(),
                model=model,
                optimizer=classp_hf.CLASSP(model.parameters(), lr=rate),
            )
        assert ("far too small for it" in caplog.text) == warned


@pytest.mark.parametrize("method", ["ewc", "l2sp", "ema", "interpolate"])
def test_a_first_task_resumes_in_an_unedited_script(method, plain, make_model, make_tasks, collator, tmp_path):
    """Methods without a state yet; and the checkpoint is given to `train` alone, from another output folder."""
    ContinualCallback.launched = {"method": method}
    try:
        whole = plain(make_model(), "whole", optim="adamw_torch", save_strategy="steps", save_steps=2)
        args = TrainingArguments(str(tmp_path / "again"), optim="adamw_torch", learning_rate=1e-2, num_train_epochs=1,
                                 per_device_train_batch_size=16, use_cpu=True, report_to="none", save_strategy="no",
                                 disable_tqdm=True)  # fmt: skip
        resumed = Trainer(make_model(), args, collator, make_tasks(2)[0].train_dataset)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    finally:
        ContinualCallback.launched = {}
    expected = weights(whole.model)
    assert all(torch.equal(w, expected[n]) for n, w in weights(resumed.model).items())


def test_what_is_frozen_keeps_its_memory(plain, make_model, tmp_path):
    trainer = plain(make_model(), "a")
    for p in trainer.model.bert.parameters():
        p.requires_grad_(False)
    trainer.model.save_pretrained(tmp_path / "frozen")
    plain(trainer.model, "head")
    for folder in ("frozen", "head"):
        assert len(ContinualMemory.load(tmp_path / folder).get("accumulator")) == 41, folder


def test_a_memory_carried_along_keeps_its_power(plain, make_model, tmp_path):
    plain(make_model(), "a", optim_args="power=1")
    ContinualCallback.launched = {"method": "l2sp"}
    try:
        plain(classifier(tmp_path / "a"), "b", optim="adamw_torch")
    finally:
        ContinualCallback.launched = {}
    assert ContinualMemory.load(tmp_path / "b").metadata["optimizer"]["power"] == 1
    plain(classifier(tmp_path / "b"), "c", optim_args="power=1")


def test_a_trial_with_a_model_of_its_own_begins_with_the_memory_of_its_own(
    plain, make_model, make_tasks, collator, tmp_path
):
    plain(make_model(), "a")
    args = TrainingArguments(str(tmp_path / "b"), optim="classp", learning_rate=1e-2, max_steps=2, use_cpu=True,
                             report_to="none", save_strategy="no", disable_tqdm=True)  # fmt: skip
    trainer = Trainer(args=args, data_collator=collator, train_dataset=make_tasks(1)[0].train_dataset,
                      model_init=lambda: classifier(tmp_path / "a"))  # fmt: skip
    sums = []
    for _ in range(2):
        trainer.train()
        trainer.optimizer = None
        memory = ContinualMemory.load(tmp_path / "b")
        sums.append(sum(float(s.sum()) for s in memory.get("accumulator").values()))
    assert sums[0] == pytest.approx(sums[1]) and memory.tasks == ["a", "b"]


def test_methods_that_could_do_nothing_are_refused(make_model, make_args, collator):
    with pytest.raises(ValueError, match="'logit_adjustment' adjusts the logits of the trainer's own loss"):
        ContinualTrainer(
            make_model(), make_args(), collator, method="logit_adjustment", compute_loss_func=lambda *a: 0
        )


def test_classp_trainer_rehearses_where_it_can(make_model, make_tasks, make_args, collator, tmp_path, monkeypatch):
    """Texts of counted tokens; of a memory without counts those that CLASSP's memory of the embedding draws."""
    # special tokens beyond the model's vocabulary
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.model_path())
    tasks, given = make_tasks(2), {"data_collator": collator, "processing_class": tokenizer}

    def names(model=None, data=None, **changes):
        trainer = ClasspTrainer(model or make_model(), make_args(**changes), train_dataset=data, **given)
        return [m.name for m in trainer.methods]

    frozen, characters = make_model(), make_model()
    frozen.get_input_embeddings().weight.requires_grad_(False)
    monkeypatch.setattr(characters, "get_input_embeddings", _not_there)
    sizes = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8}
    sizes |= {"decoder_ffn_dim": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_labels": 3}
    bart = transformers.BartForSequenceClassification(transformers.BartConfig(**sizes))
    rows = [{"input_ids": [1, 2], "labels": 0}] * 8  # whose tokens are in no column
    stream = tasks[0].train_dataset.to_iterable_dataset()
    assert names() == names(data=tasks[0].train_dataset) == names(frozen) == ["pseudo_rehearsal"]
    for cannot in (characters, bart, make_model(num_labels=1)):
        assert names(cannot) == []
    assert names(data=rows) == names(data=stream, max_steps=2) == names(heads="per_task") == []
    trainer = ClasspTrainer(make_model(), make_args(), method="replay+ewc", **given)
    assert [m.name for m in trainer.methods] == ["replay", "ewc"]
    weights = []
    for rehearses in (True, None, False):
        args = make_args(max_steps=4, output_dir=str(tmp_path / str(rehearses)))
        trainer = ClasspTrainer(make_model(), args, pseudo_rehearsal=rehearses, **given)
        trainer.train_sequence(tasks)
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        counts = ["pseudo_rehearsal.lengths", "pseudo_rehearsal.tokens"] if rehearses is not False else []
        assert trainer.continual_memory().kinds() == ["accumulator", *counts, "samples"]
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[1], weights[2])
    for other, counted in (({"method": "pseudo_rehearsal"}, {"first", "second"}), ({"method": "none"}, {"second"})):
        folder = tmp_path / other["method"]
        args = make_args(max_steps=2, optim="classp", output_dir=str(folder))
        ContinualTrainer(make_model(), args, collator, **other).train_sequence(tasks[:1])
        args = make_args(max_steps=2, output_dir=str(tmp_path / f"{folder}-on"))
        trainer, drawn = ClasspTrainer(make_model(), args, memory=folder, **given), []
        method = trainer.methods[0]
        monkeypatch.setattr(method, "before_step", lambda model, m=method, d=drawn: d.append(m.answers is not None))
        trainer.train_sequence(tasks[1:])
        assert trainer.continual_memory().get("pseudo_rehearsal.tokens").keys() == counted and drawn == [True, True]


def _not_there():
    raise NotImplementedError("`get_input_embeddings` not auto-handled")


def test_options_of_a_method_that_was_not_asked_for_are_refused():
    from classp_hf.__main__ import for_register, parser

    command = parser()
    with pytest.raises(ValueError, match="--rehearse_texts is for the method 'pseudo_rehearsal': pass --rehearse"):
        for_register(command.parse_args(["--rehearse_texts", "a.txt"]), command)
    given = for_register(command.parse_args(["--rehearse_texts", "a.txt", "--rehearse", "0.5"]), command)
    assert (given["method"][0].rehearse_fraction, given["method"][0].rehearse_texts) == (0.5, "a.txt")
    for words, message in (
        ("--anchor 0.1 --anchor_strength 0.3", "--anchor and --anchor_strength say the same"),
        ("--anchor inf", "anchor_strength must be >= 0, not infinite: got inf"),
        ("--memory none --memory_strength 3", "--memory none begins with an empty one"),
    ):
        with pytest.raises(ValueError, match=message):
            for_register(command.parse_args(words.split()), command)


def test_a_memory_that_nothing_uses_is_refused(plain, make_model):
    callback = ContinualCallback(memory="x.st")
    with pytest.raises(ValueError, match="memory='x.st' is given, and nothing here uses a memory"):
        plain(make_model(), "a", callbacks=[callback], optim="adamw_torch")


@pytest.mark.parametrize("optim", ["classp", "adamw_torch"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_users_callback_beside_the_registered_one_keeps_its_methods_state(
    optim, shared, plain, make_model, tmp_path, caplog
):
    class See(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            seen.append(len(callback.methods[0].importance))

    model, seen = make_model(), []
    for output in ("a", "b"):
        callback = ContinualCallback("ewc")
        plain(model, output, [callback, See()], optim=optim, learning_rate=1e-3)
        model = model if shared else classifier(tmp_path / output)
    steps = len(seen) // 2
    assert set(seen[:steps]) == {0} and set(seen[steps:]) == {len(weights(model))}
    assert ContinualMemory.load(tmp_path / "b").tasks == ["a", "b"]
    assert "is not used" not in caplog.text  # as the registered one would say under AdamW


def test_the_launchers_method_beside_the_scripts_own_callback_is_refused(plain, make_model):
    classp_hf.register(method="l2sp")
    try:
        for own in (ContinualCallback("ewc"), ContinualCallback(memory="none")):
            with pytest.raises(ValueError, match="given to classp_hf, and the script passes a ContinualCallback with"):
                plain(make_model(), "a", [own])
        classp_hf.register(optim="adamw_torch")  # goes with it
        trainer = plain(make_model(), "b", [ContinualCallback("ewc")], optim="classp", learning_rate=1e-3)
        assert trainer.args.optim == "adamw_torch"
    finally:
        classp_hf.register()


@pytest.mark.parametrize("memory", [None, "none"])
def test_a_users_callback_beside_the_registered_one_resumes(memory, plain, make_model, tmp_path):
    def run(output, resume=None):
        changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": resume}
        return weights(plain(make_model(), output, [ContinualCallback("elastic", memory)], **changes).model)

    whole = run("a")
    again = run("a", str(tmp_path / "a" / "checkpoint-2"))
    assert all(torch.equal(w, again[n]) for n, w in whole.items())


def test_a_checkpoint_without_the_optimizer_still_has_the_memory(
    make_model, make_args, make_tasks, collator, tmp_path
):
    class See(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                seen.append(sum(float(s.sum()) for s in trainer.accumulators().values()))

    seen, data = [], make_tasks(1)[0].train_dataset
    for resume in (None, str(tmp_path / "a" / "checkpoint-2")):
        args = make_args(output_dir=str(tmp_path / "a"), max_steps=4, save_steps=2, save_strategy="steps")
        args.save_only_model = True
        trainer = ClasspTrainer(make_model(), args, collator, data, callbacks=[See()])
        trainer.train(resume_from_checkpoint=resume)
    assert seen[0] == pytest.approx(seen[1]) and seen[0] > 0


def test_a_second_continual_trainer_says_that_the_live_memory_is_not_used(
    make_model, make_args, make_tasks, collator, tmp_path, caplog
):
    model, data = make_model(), make_tasks(1)[0].train_dataset
    ClasspTrainer(model, make_args(output_dir=str(tmp_path / "first")), collator, data).train()
    with caplog.at_level(logging.WARNING, "classp_hf"):
        ClasspTrainer(model, make_args(output_dir=str(tmp_path / "second")), collator, data)
    assert "trained on first in this process; the memory of that is not used" in caplog.text


def test_logits_are_masked_before_the_users_own_preprocessing(make_model, make_args, make_tasks, collator, tmp_path):
    tasks = [replace(task, label_ids=[i, 2]) for i, task in enumerate(make_tasks(2))]

    def classes(logits, labels):
        return logits.argmax(-1)

    def run(**kwargs):
        args = make_args(heads="per_task", output_dir=str(tmp_path / str(len(runs))))
        trainer = ContinualTrainer(make_model(), args, collator, **kwargs)
        runs.append(trainer.train_sequence(tasks)["accuracy_matrix"])

    runs = []
    for kwargs in ({}, {"preprocess_logits_for_metrics": classes}, {"preprocess_logits_for_metrics": lambda x, y: x}):
        run(**kwargs)
    assert runs[0] == runs[1] == runs[2]


def test_replay_refuses_a_head_a_task(make_model, make_args, make_tasks, collator):
    trainer = ContinualTrainer(make_model(), make_args(heads="per_task"), collator, method="replay")
    with pytest.raises(ValueError, match="'replay' mixes earlier tasks' examples into the new task's"):
        trainer.train_sequence(make_tasks(2))


class Mine(BertForSequenceClassification):
    """As in many projects: with a method more, and the loss of its base."""


def test_a_users_own_classifier_is_one(make_model, make_args, make_tasks, collator):
    transformers.set_seed(0)
    model = Mine(make_model().config)
    tokenizer = SimpleNamespace(all_special_ids=[0, 1, 9], pad_token_id=0, save_pretrained=lambda folder: None)
    trainer = ClasspTrainer(model, make_args(), collator, processing_class=tokenizer)
    assert [m.name for m in trainer.methods] == ["pseudo_rehearsal"] and trainer.args.sequence_metric == "accuracy"
    results = trainer.train_sequence(make_tasks(2))
    assert results["metric"] == "accuracy" and results["metrics"]["average_accuracy"] > 0


def test_counts_of_tokens_that_the_vocabulary_has_no_more(make_model, make_args, make_tasks, collator, tmp_path):
    trainer = ContinualTrainer(make_model(), make_args(), collator, method="pseudo_rehearsal")
    trainer.train_sequence(make_tasks(2)[:1])
    model = classifier(tmp_path / "run")
    model.resize_token_embeddings(VOCABULARY - 3)
    task = make_tasks(2)[1]
    splits = {
        split: data.filter(lambda row: max(row["input_ids"]) < VOCABULARY - 3) for split, data in task.splits.items()
    }
    args = make_args(output_dir=str(tmp_path / "b"))
    trainer = ContinualTrainer(model, args, collator, method="pseudo_rehearsal", memory=tmp_path / "run")
    trainer.train_sequence([replace(task, **splits)])
    assert int(trainer.methods[0].pool == {}) and trainer.seen_tasks == ["first", "second"]


@pytest.mark.parametrize("chosen", [False, True])
def test_the_default_accuracy_takes_logits_or_classes(chosen, make_model, make_args, make_tasks, collator):
    task = make_tasks(1)[0]
    own = {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)} if chosen else {}
    trainer = ClasspTrainer(make_model(), make_args(), collator, **own)
    found = trainer.evaluate(task.test_dataset)["eval_accuracy"]
    with torch.no_grad():
        logits = trainer.model(**collator(list(task.test_dataset)))["logits"]
    assert found == pytest.approx(float((logits.argmax(-1).numpy() == task.test_dataset["labels"][:]).mean()))


class OwnLoss(ContinualTrainer):
    """As in many scripts: the loss with class weights."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = F.cross_entropy(outputs.logits, inputs["labels"], weight=torch.tensor([1.0, 2.0, 1.0]))
        return (loss, outputs) if return_outputs else loss


class Scaled(ContinualTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


class SummedLoss(ContinualTrainer):
    """As Transformers asks of a loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = F.cross_entropy(outputs.logits, inputs["labels"], reduction="sum") / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class MeanLoss:
    """Of a mixin that comes after the trainer."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = F.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class Mixed(ContinualTrainer, type("MeanTrainer", (MeanLoss, Trainer), {})):
    pass


@pytest.mark.parametrize("own", [SummedLoss, Mixed])
def test_a_loss_of_its_own_gives_the_memory_of_the_trainers_own(own, make_model, make_tasks, make_args, collator):
    sums = []
    for cls in (own, ContinualTrainer, type("Plain", (Trainer,), {"compute_loss": own.compute_loss})):
        steps = {"gradient_accumulation_steps": 4, "max_steps": 1, "max_grad_norm": 0}
        args = make_args(optim="classp", learning_rate=1e-2, per_device_train_batch_size=4, **steps)
        if own is Mixed and not issubclass(cls, ContinualTrainer):
            continue
        trainer = cls(make_model(), args, collator, make_tasks(1)[0].train_dataset)
        trainer.train()
        engine = classp_hf.engine.engine_of(trainer.model)
        sums.append(sum(float(s.sum()) for s in engine.accumulators().values()))
    assert sums == pytest.approx([sums[0]] * len(sums), rel=1e-5)


def test_a_loss_of_its_own_gives_the_memory_that_it_gives_in_a_plain_trainer(
    plain, make_model, make_tasks, make_args, collator
):
    """Once it was the number of accumulation steps, squared, too large."""
    steps = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 1, "max_grad_norm": 0}

    class Plain(Trainer):
        compute_loss = OwnLoss.compute_loss

    sums = []
    for cls in (OwnLoss, Plain):
        args = make_args(optim="classp", learning_rate=1e-2, **steps)
        trainer = cls(make_model(), args, collator, make_tasks(1)[0].train_dataset)
        trainer.train()
        engine = classp_hf.engine.engine_of(trainer.model)
        sums.append(sum(float(s.sum()) for s in engine.accumulators().values()))
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


@pytest.mark.parametrize(("reads", "steps"), [(False, 2), (False, 1), (True, 2)])
def test_a_loss_function_that_is_not_the_sum_is_warned_of(reads, steps, plain, make_model, caplog):
    def mean(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs["logits"], labels)

    def summed(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    compat.logger.warning_once.cache_clear()
    trainer = plain(make_model(), "a")
    trainer.compute_loss_func, trainer.args.gradient_accumulation_steps = summed if reads else mean, steps
    trainer.train()
    assert ("a memory of their squares 4 times" in caplog.text) is (not reads and steps == 2)


@pytest.mark.parametrize("cls", [OwnLoss, SummedLoss, Mixed])
@pytest.mark.parametrize("method", ["lwf", "logit_adjustment"])
def test_a_loss_of_its_own_refuses_methods_that_it_would_switch_off(
    method, cls, make_model, make_args, make_tasks, collator
):
    data = make_tasks(1)[0].train_dataset
    with (
        pytest.raises(ValueError, match="Call super|adjusts the logits")
        if (method, cls) != ("lwf", Mixed)
        else (contextlib.nullcontext())
    ):
        cls(make_model(), make_args(max_steps=1), collator, data, method=method).train()
    Scaled(make_model(), make_args(max_steps=1), collator, data, method=method).train()
    cls(make_model(), make_args(max_steps=1), collator, data, method="ewc").train()


def test_a_rate_of_the_launcher_in_a_scripts_own_groups(make_model, collator, make_tasks, tmp_path, monkeypatch):
    """An optimizer that a script builds of the training arguments, once they hold the launcher's rate."""
    classp_hf.register()
    monkeypatch.setattr(ContinualCallback, "launched", {"optim": "sgd", "learning_rate": 1e-3})
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to="none", save_strategy="no")
    trainer = Trainer(make_model(), args, collator, make_tasks(1)[0].train_dataset)
    groups = [{"params": [p], "lr": args.learning_rate * 0.9**i} for i, p in enumerate(trainer.model.parameters(), 1)]
    trainer.optimizer = torch.optim.SGD(groups)
    trainer.train()
    assert args.learning_rate == 1e-3


def test_options_of_the_launcher_do_not_reach_a_continual_trainer(make_model, make_args, collator, monkeypatch):
    classp_hf.register(optim="adamw_torch")
    try:
        ClasspTrainer(make_model(), make_args(optim="classp"), collator)  # of one's own call to `register`
        monkeypatch.setattr(ContinualCallback, "script", "train.py")
        with pytest.raises(ValueError, match=r"--optim before train.py .* builds a ClasspTrainer"):
            ClasspTrainer(make_model(), make_args(optim="classp"), collator)
    finally:
        classp_hf.register()


def test_a_rate_that_was_set_later_is_kept(make_model, make_args, collator):
    args = make_args()
    assert ClasspTrainer(make_model(), args, collator).args.learning_rate == 1e-3
    args.set_training(learning_rate=5e-3)
    assert ClasspTrainer(make_model(), args, collator).args.learning_rate == 5e-3


def test_a_copied_checkpoint_is_none_of_the_trainers(make_model, make_args, make_tasks, collator, tmp_path):
    args = make_args(save_strategy="steps", save_steps=2, max_steps=4)
    trainer = ContinualTrainer(make_model(), args, collator, make_tasks(1)[0].train_dataset)
    trainer.train()
    for name in ("checkpoint-best", "checkpoint-4-1"):
        shutil.copytree(Path(args.output_dir, "checkpoint-2"), Path(args.output_dir, name))
    trainer.args.max_steps = 6
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6

    for name in ("checkpoint-best", "checkpoint-2"):  # unfinished ones
        Path(args.output_dir, name, "trainer_state.json").unlink()
    run = SimpleNamespace(args=SimpleNamespace(save_only_model=False, should_save=True))
    assert SequenceRun._checkpoint(run, Path(args.output_dir)).endswith("checkpoint-6")
    assert Path(args.output_dir, "checkpoint-best").is_dir() and not Path(args.output_dir, "checkpoint-2").exists()


def test_an_image_processor_pads_no_texts(make_args):
    """A model that writes texts on images."""
    model = make_captioner()
    trainer = ContinualTrainer(model, make_args(max_steps=1), processing_class=transformers.ViTImageProcessor())
    assert not isinstance(trainer.data_collator, transformers.DataCollatorForSeq2Seq)


def make_captioner():
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    encoder = transformers.ViTConfig(image_size=8, patch_size=4, **small)
    decoder = transformers.BertConfig(vocab_size=VOCABULARY, is_decoder=True, add_cross_attention=True, **small)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.VisionEncoderDecoderModel(config)


def test_lwf_refuses_a_model_without_logits_before_its_first_task(make_args):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = transformers.BertForQuestionAnswering(transformers.BertConfig(vocab_size=VOCABULARY, **small))
    rows = [{"input_ids": [1, 2, 3], "start_positions": 0, "end_positions": 1}] * 8
    trainer = ContinualTrainer(model, make_args(), train_dataset=rows, method="lwf")
    with pytest.raises(ValueError, match="answers without any"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("changes", [{"batch_eval_metrics": True}, {"prediction_loss_only": True}])
def test_without_whole_predictions_there_is_no_default_accuracy(changes, make_model, make_args, make_tasks, collator):
    trainer = ContinualTrainer(make_model(), make_args(**changes), collator)
    results = trainer.train_sequence(make_tasks(2))
    assert results["metric"] == "loss"


# ---- Runs that are resumed ----


class FromCausal(torch.utils.data.Dataset):
    def __init__(self, rows):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 20, (rows, 6), generator=generator).tolist()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


@pytest.mark.parametrize("size", ["50GB", "2KB"])  # one file, and several
def test_a_mixture_of_experts_resumes_and_takes_back_its_best_weights(
    size, make_args, collator, tmp_path, monkeypatch
):
    """Trainer reads a checkpoint's file as it is, and those of mixtures of experts have other names than the model."""
    saved = transformers.MixtralForCausalLM.save_pretrained
    monkeypatch.setattr(
        transformers.MixtralForCausalLM, "save_pretrained", lambda *a, **k: saved(*a, **{**k, "max_shard_size": size})
    )

    def train(output, resume=None, **changes):
        transformers.set_seed(0)
        config = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**config))
        given = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, **changes}
        args = make_args(output_dir=str(tmp_path / output), max_steps=4, **given)
        pad = transformers.default_data_collator
        trainer = ClasspTrainer(model, args, pad, FromCausal(32), eval_dataset=FromCausal(8))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = weights(train("whole").model)
    resumed = weights(train("resumed", str(tmp_path / "whole/checkpoint-2")).model)
    assert [n for n in whole if not torch.equal(whole[n], resumed[n])] == []
    worse = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "greater_is_better": True}
    best = train("best", metric_for_best_model="loss", **worse)  # the highest loss: that of the first checkpoint
    assert best.state.best_model_checkpoint.endswith("checkpoint-2")
    again = weights(transformers.MixtralForCausalLM.from_pretrained(best.state.best_model_checkpoint))
    assert [n for n, w in weights(best.model).items() if not torch.equal(w, again[n])] == []


def test_classp_does_not_resume_adafactor(plain, make_model, tmp_path):
    """Whose state holds numbers that are no tensors."""
    plain(make_model(), "a", optim="adafactor", save_strategy="epoch")
    checkpoint = str(next(tmp_path.glob("a/checkpoint-*")))
    with pytest.raises(ValueError, match="written under another optimizer"):
        plain(make_model(), "b", num_train_epochs=2, resume_from_checkpoint=checkpoint)


def test_a_run_is_not_resumed_with_a_model_of_the_checkpoint(plain, make_model, tmp_path):
    """The old weights of a merge would be those of the middle of the task."""
    given = {"callbacks": [ContinualCallback(method="merge")], "optim": "adamw_torch"}
    plain(make_model(), "a", save_strategy="epoch", **given)
    checkpoint = next(tmp_path.glob("a/checkpoint-*"))
    given["callbacks"] = [ContinualCallback(method="merge")]
    with pytest.raises(ValueError, match="loaded from a checkpoint of the run"):
        plain(classifier(checkpoint), "a", num_train_epochs=2, resume_from_checkpoint=str(checkpoint), **given)
    plain(make_model(), "a", num_train_epochs=2, resume_from_checkpoint=str(checkpoint), **given)


def test_a_run_is_resumed_with_a_base_model_that_lies_beside_the_checkpoints(plain, make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "a/base")
    given = {"optim": "adamw_torch", "num_train_epochs": 2, "save_strategy": "epoch"}
    whole = plain(classifier(tmp_path / "a/base"), "a", callbacks=[ContinualCallback(method="interpolate")], **given)
    checkpoint = str(min(tmp_path.glob("a/checkpoint-*"), key=lambda path: int(path.name[11:])))
    again = plain(
        classifier(tmp_path / "a/base"),
        "a",
        callbacks=[ContinualCallback(method="interpolate")],
        resume_from_checkpoint=checkpoint,
        **given,
    )
    assert all(torch.equal(w, weights(again.model)[n]) for n, w in weights(whole.model).items())


def test_a_run_is_not_resumed_with_the_checkpoints_adapter(plain, make_model, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    given = {"optim": "adamw_torch", "num_train_epochs": 2, "save_strategy": "epoch"}
    model = get_peft_model(make_model(), LoraConfig(task_type="SEQ_CLS", r=2))
    plain(model, "a", callbacks=[ContinualCallback(method="merge")], **given)
    checkpoint = str(min(tmp_path.glob("a/checkpoint-*"), key=lambda path: int(path.name[11:])))
    late = PeftModel.from_pretrained(make_model(), checkpoint, is_trainable=True)
    with pytest.raises(ValueError, match="loaded from a checkpoint of the run"):
        plain(late, "a", callbacks=[ContinualCallback(method="merge")], resume_from_checkpoint=checkpoint, **given)


class WithExtra(BertForSequenceClassification):
    def __init__(self, config, extra):
        super().__init__(config)


def test_a_checkpoint_with_weights_too_many_is_read(make_model, make_args, collator, make_tasks, tmp_path):
    data = make_tasks(1)[0].train_dataset
    model = WithExtra(make_model().config, None)
    model.probe = nn.Linear(2, 2).requires_grad_(False)
    trainer = ContinualTrainer(model, make_args(save_strategy="steps", save_steps=1, max_steps=2), collator, data)
    trainer.train()
    again = ContinualTrainer(WithExtra(model.config, None), make_args(max_steps=2), collator, data)
    again.train(resume_from_checkpoint=str(next(tmp_path.glob("run/checkpoint-2"))))
    assert all(torch.equal(w, weights(model)[n]) for n, w in weights(again.model).items())


def test_weights_are_read_in_the_dtypes_that_they_have(tmp_path):
    config = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**config)).to(torch.bfloat16)
    model.lm_head.float()
    nn.init.normal_(model.lm_head.weight)
    head = model.lm_head.weight.detach().clone()
    model.save_pretrained(tmp_path)
    nn.init.zeros_(model.lm_head.weight)
    load_whole(model, tmp_path)
    assert torch.equal(model.lm_head.weight, head)


def test_a_memory_has_heads_of_trained_tasks_alone(make_model, make_args, make_tasks, collator, tmp_path):
    args = make_args(heads="per_task", keep_task_models=True)
    ContinualTrainer(make_model(), args, collator).train_sequence(make_tasks(3))
    kinds = [ContinualMemory.load(next(tmp_path.glob(f"run/0{t}-*"))).kinds() for t in range(3)]
    heads = [{kind.removeprefix("head.") for kind in found if kind.startswith("head.")} for found in kinds]
    assert heads == [{"first"}, {"first", "second"}, {"first", "second", "third"}]


def test_a_trainer_has_one_engine(make_model, make_args, make_tasks, collator):
    with pytest.raises(ValueError, match="Pass it method= and memory= instead"):
        ContinualTrainer(make_model(), make_args(), collator, callbacks=[ContinualCallback(method="ewc")])
    with pytest.raises(ValueError, match="Pass it method= and memory= instead"):
        ContinualTrainer(make_model(), make_args(), collator, callbacks=[type("Own", (ContinualCallback,), {})()])
    trainer = ContinualTrainer(make_model(), make_args(), collator, make_tasks(1)[0].train_dataset)
    trainer.add_callback(ContinualCallback(method="ewc"))
    with pytest.raises(ValueError, match="Pass it method= and memory= instead"):
        trainer.train()


def test_a_trainer_does_not_warn_of_its_own_engine(make_model, make_args, collator, caplog):
    classp_hf.register()
    ContinualTrainer(make_model(), make_args(), collator)
    assert "there is already one" not in caplog.text


def test_methods_see_the_tokenizer_of_a_processor(make_model, make_args, make_tasks, collator):
    trainer = ContinualTrainer(make_model(), make_args(), collator)
    trainer.processing_class = SimpleNamespace(tokenizer="inside")
    assert trainer.context().processing_class == "inside"


# ---- Several methods, and what a memory is not used for ----


@pytest.mark.parametrize("first", ["merge", "interpolate", "ema"])
def test_what_looks_at_the_end_of_a_task_sees_its_last_weights(first, make_model, make_tasks, make_args, collator):
    """In either order: a method that replaces the weights, or averages them, comes before one that looks at them."""
    found = []
    for method in (f"ewc+{first}", f"{first}+ewc"):
        trainer = ContinualTrainer(make_model(), make_args(), collator, method=method)
        trainer.train_sequence(make_tasks(2))
        shutil.rmtree(trainer.args.output_dir)
        anchor = next(m for m in trainer.methods if m.name == "ewc").anchor
        assert all(torch.equal(anchor[n], p) for n, p in trainer.model.named_parameters())
        found.append(weights(trainer.model))
    assert all(torch.equal(w, found[1][n]) for n, w in found[0].items())


def test_a_merge_is_not_undone_by_an_average(make_model, make_tasks, make_args, collator):
    found = []
    for method in ("ema", "ema+interpolate", "interpolate+ema"):
        trainer = ContinualTrainer(make_model(), make_args(), collator, method=method)
        trainer.train_sequence(make_tasks(2))
        shutil.rmtree(trainer.args.output_dir)
        found.append(weights(trainer.model)["classifier.weight"])
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])


def test_a_memory_that_is_carried_along_is_not_used(plain, make_model, tmp_path, caplog):
    plain(make_model(), "a")
    callback = ContinualCallback(method="l2sp", memory_strength=3)
    plain(classifier(tmp_path / "a"), "b", callbacks=[callback], optim="adamw_torch")
    assert "it is used for nothing" in caplog.text and "memory_strength is not used" in caplog.text
    before, after = (ContinualMemory.load(tmp_path / run).get("accumulator") for run in "ab")
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())


def test_a_head_that_was_away_for_a_while_is_not_taken_for_the_old_one(plain, make_model, tmp_path, caplog):
    """Its samples stay in the file with its accumulators."""
    plain(make_model(), "a")
    labelled = [{"input_ids": [1, 5, 6, 9], "labels": [-100, 5, 6, -100]}] * 16
    pad = {"data_collator": transformers.default_data_collator}
    masked = BertForMaskedLM.from_pretrained(tmp_path / "a")
    args = TrainingArguments(str(tmp_path / "b"), optim="classp", learning_rate=1e-2, use_cpu=True, max_steps=1)
    args.report_to = []
    Trainer(masked, args, train_dataset=labelled, **pad).train()
    masked.save_pretrained(tmp_path / "b")
    caplog.clear()
    torch.manual_seed(7)
    plain(classifier(tmp_path / "b"), "c")
    assert "used for 37 parameters; 4 parameters begin without a memory (bert.pooler" in caplog.text


def test_adapters_of_experts_keep_their_memory(plain, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**config))
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    data = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 16
    plain(model, "a", dataset=data)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(ContinualMemory.load(tmp_path / "a").get("accumulator")) == len(trained)
    plain(model, "b", dataset=data)


def test_register_in_a_script_keeps_the_launchers_options(monkeypatch):
    monkeypatch.setattr(ContinualCallback, "script", "script.py")
    monkeypatch.setattr(ContinualCallback, "launched", {"optim": "sgd"})
    classp_hf.register()
    assert ContinualCallback.launched == {"optim": "sgd"}
    with pytest.raises(ValueError, match="register.memory. stands in a script that `python -m classp_hf` runs"):
        classp_hf.register(memory="none")


# ---- Models that change between trainings ----


@pytest.mark.parametrize("state_dtype", ["float32", "uint8"])
def test_a_trainer_goes_on_after_its_model_was_resized(state_dtype, plain, make_model, tmp_path):
    model = make_model()
    trainer = plain(model, "a", optim_args=f"state_dtype={state_dtype}")
    name = "bert.embeddings.word_embeddings.weight"
    before = ContinualMemory.load(tmp_path / "a").get("accumulator")[name]
    model.resize_token_embeddings(VOCABULARY + 3)
    trainer.train()
    trainer.save_model()
    after = ContinualMemory.load(tmp_path / "a").get("accumulator")[name]
    assert after.shape == (VOCABULARY + 3, 32) and not any(w.isnan().any() for w in weights(model).values())
    assert after[:VOCABULARY].sum() > 1.1 * before.sum()  # a byte a weight is rounded anew


def test_a_trainer_does_not_go_on_with_an_optimizer_of_other_parameters(plain, make_model, tmp_path):
    """An output layer that is not tied to the embedding is a new parameter, when the vocabulary has grown."""
    config = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    data = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 16
    trainer = plain(model, "a", dataset=data)
    model.resize_token_embeddings(43)
    with pytest.raises(ValueError, match="holds parameters that the model has no more"):
        trainer.train()
    again = plain(model, "b", dataset=data)
    assert ContinualMemory.load(tmp_path / "b").get("accumulator")["lm_head.weight"].shape == (43, 8)
    assert again.model is model


def test_a_trainer_goes_on_with_an_optimizer_that_also_has_a_losss_parameters(plain, make_model, tmp_path):
    """As that of sentence-transformers, whose losses may have layers."""
    model, layer = make_model(), nn.Linear(2, 2)
    layer.weight.grad = torch.zeros(2, 2)
    optimizer = classp_hf.CLASSP([*model.parameters(), *layer.parameters()], lr=1e-2)
    trainer = plain(model, "a", optimizers=(optimizer, None))
    trainer.train()
    assert float(optimizer.accumulator(model.classifier.bias).sum()) > 0


def test_what_a_resized_parameter_loses_is_said(plain, make_model, caplog):
    model = make_model()
    trainer = plain(model, "a")
    model.classifier.bias.data = torch.zeros(4)
    model.classifier.weight.data = torch.zeros(4, 32)
    model.num_labels = model.config.num_labels = 4
    trainer.train()
    assert "2 parameters were resized and begin without a memory (classifier.bias, classifier.weight)" in caplog.text


def test_the_optimizer_refuses_a_parameter_that_was_resized():
    p = nn.Parameter(torch.randn(40, 32))
    optimizer = classp_hf.CLASSP([p], lr=1e-3)
    p.grad = torch.randn(40, 32)
    optimizer.step()
    p.grad = None
    p.data = torch.randn(43, 32)
    p.grad = torch.randn(43, 32)
    with pytest.raises(ValueError, match=r"shape \(43, 32\) had the shape \(40, 32\)"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
def test_prompt_tuning_after_a_full_fine_tuning(kind, plain, make_model, tmp_path, caplog):
    """The head's memory is used, and EWC's Fisher knows that PEFT repeats the prompt for every example."""
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

    plain(make_model(), "a")
    configs = {
        "PROMPT_TUNING": PromptTuningConfig,
        "P_TUNING": PromptEncoderConfig,
        "PREFIX_TUNING": PrefixTuningConfig,
    }
    model = get_peft_model(classifier(tmp_path / "a"), configs[kind](task_type="SEQ_CLS", num_virtual_tokens=3))
    plain(model, "b", callbacks=[ContinualCallback(method="ewc", memory=str(tmp_path / "a"))])
    assert "it is used for 2 parameters" in caplog.text
    fisher = ContinualMemory.load(tmp_path / "b").get("ewc.importance")
    assert any(n.startswith("prompt_encoder.") for n in fisher) and all(f.isfinite().all() for f in fisher.values())


def test_an_adapter_that_is_not_active_has_no_say(plain, make_model, tmp_path, caplog):
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(task_type="SEQ_CLS", r=2)
    for name in ("first", "second"):
        plain(get_peft_model(make_model(), config, adapter_name=name), name)
    model = PeftModel.from_pretrained(make_model(), tmp_path / "first/first", "first", is_trainable=True)
    model.load_adapter(str(tmp_path / "second/second"), "second")
    caplog.clear()
    plain(model, "third", callbacks=[ContinualCallback(memory=str(tmp_path / "first"))])
    assert "it is used for 10 parameters" in caplog.text


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3", "VeRA"])
def test_a_new_adapter_of_a_merged_model_has_no_memory_of_the_old_one(kind, plain, make_model, tmp_path, caplog):
    from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model

    common = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    config = {
        "LoRA": lambda: LoraConfig(r=2, **common),
        "DoRA": lambda: LoraConfig(r=2, use_dora=True, **common),
        "IA3": lambda: IA3Config(feedforward_modules=[], **common),
        "VeRA": lambda: VeraConfig(r=2, **common),
    }[kind]
    model = get_peft_model(make_model(), config())
    plain(model, "a")
    plain(
        get_peft_model(model.merge_and_unload(), config()),
        "b",
        callbacks=[ContinualCallback(memory=str(tmp_path / "a"))],
    )
    assert "it is used for 2 parameters" in caplog.text and "for that adapter is merged or new" in caplog.text


def test_replay_of_tasks_with_other_columns_types_and_transforms(
    make_model, make_args, make_tasks, collator, tmp_path
):
    from datasets import ClassLabel

    def recast(task, names):
        return replace(task, train_dataset=task.train_dataset.cast_column("labels", ClassLabel(names=names)))

    def transformed(task):
        return replace(task, train_dataset=task.train_dataset.with_transform(lambda rows: dict(rows)))

    first, second = make_tasks(2)
    named = [recast(first, ["a", "b", "c"]), recast(second, ["x", "y", "z"])]
    columns = [
        replace(t, train_dataset=t.train_dataset.add_column("idx", c * 64)) for t, c in ((first, ["u"]), (second, [1]))
    ]
    runs = []
    for i, tasks in enumerate(([first, second], named, columns, [transformed(first), transformed(second)])):
        args = make_args(output_dir=str(tmp_path / str(i)))
        trainer = ContinualTrainer(make_model(), args, collator, method="replay+logit_adjustment+ewc")
        runs.append(trainer.train_sequence(tasks)["accuracy_matrix"])
    assert runs[0] == runs[1] == runs[2] == runs[3]


def test_predict_with_generate_is_refused(make_model, tmp_path):
    args = Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, use_cpu=True)
    with pytest.raises(ValueError, match="predict_with_generate is Seq2SeqTrainer's"):
        ContinualTrainer(make_model(), args)


# ---- The launcher ----


@pytest.mark.parametrize(
    ("options", "own", "code", "message"),
    [
        (["--learning_rate", "1e-3"], True, 1, "--learning_rate given to classp_hf cannot be applied"),
        (["--optim", "sgd"], True, 1, "--optim given to classp_hf cannot be applied"),
        (["--optim_args", "density=0.1"], False, 1, "--optim_args mean nothing to AdamW"),
        (["--optim", "classp", "--learning_rate", "1e-2"], None, 0, "had no effect: 'script.py' trained no Trainer"),
        (["--optim", "sgd", "--learning_rate", "1e-2"], False, 0, "script.py True"),
    ],
)
def test_options_that_cannot_be_applied(options, own, code, message, make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    script = f"""
        import os
        import torch
        from transformers import BertForSequenceClassification, Trainer, TrainingArguments
        os.mkdir("elsewhere"), os.chdir("elsewhere")
        model, own = BertForSequenceClassification.from_pretrained("../model"), {own}
        data = [{{"input_ids": [1, 2 + i % 3, 9], "labels": i % 3}} for i in range(8)]
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4) if own else None
        args = TrainingArguments("out", use_cpu=True, max_steps=1, report_to="none", optim="adamw_torch")
        trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
        trainer.evaluate(data) if own is None else trainer.train()
        print(os.path.basename(__file__), os.path.exists(__file__))
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    run = subprocess.run(
        [python(), "-m", "classp_hf", *options, "script.py"], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert run.returncode == code and message in run.stdout + run.stderr, run.stderr
