"""Methods that fold a task's PEFT adapter into the base weights: O-LoRA and OSF."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import weights
from peft import LoraConfig, OSFConfig, TaskType, get_peft_model
from test_methods import Kill
from transformers import AutoModelForSequenceClassification

import classp_hf  # ContinualTrainer is used by name: this file is about methods
from classp_hf.methods import METHODS, OSF, Context, OLoRA, make_methods
from classp_hf.methods.adapters import folded_state_dict

CONFIGS = {
    "olora": LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=8, target_modules="all-linear"),
    "osf": OSFConfig(task_type=TaskType.SEQ_CLS, effective_rank=0.5, target_modules="all-linear"),
}


@pytest.fixture
def adapted(make_model):
    def make(kind):
        model = make_model()
        torch.manual_seed(0)  # the adapters' first weights
        return get_peft_model(model, CONFIGS[kind])

    return make


@pytest.fixture
def make_trainer(adapted, make_args, collator):
    def make(method, callbacks=(), **changes):
        args = make_args(**{"optim": "adamw_torch", "learning_rate": 5e-3, "reset_optimizer": True, **changes})
        return classp_hf.ContinualTrainer(adapted(method), args, collator, method=method, callbacks=list(callbacks))

    return make


def learn(method, model, seen, rate=0.3, steps=8):
    """A task of its own, by plain gradient descent, which leaves OSF's subspace exactly where it is."""
    method.prepare_model(model, seen)
    method.before_task(Context(model, None, list(seen)))
    generator = torch.Generator().manual_seed(len(seen))
    ids, labels = torch.randint(2, 40, (8, 5), generator=generator), torch.randint(3, (8,), generator=generator)
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        method.before_step(model)
        for p in model.parameters():
            if p.grad is not None:
                p.data -= rate * p.grad
                p.grad = None


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(2, 22).view(4, 5)).logits


@pytest.mark.parametrize("name", ["olora", "osf"])
def test_folding_changes_no_answer_and_leaves_a_plain_model(name, adapted, make_model):
    model, method = adapted(name), METHODS[name]()
    for seen in ([], ["first"], ["first", "second"]):
        before = logits(model)
        method.prepare_model(model, seen)
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
        learn(method, model, seen, rate=0.1)
        learned = logits(model)
        assert not torch.allclose(before, learned, atol=0.05)
        method.after_task(Context(model, None))
        plain = make_model()
        plain.load_state_dict(folded_state_dict(model))
        for folded in (model, plain):
            torch.testing.assert_close(logits(folded), learned, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_was_loaded_is_kept(adapted):
    model, method = adapted("olora"), OLoRA()
    for _, layer, adapter in method.layers(model):
        torch.nn.init.normal_(layer.lora_B[adapter].weight, std=0.1)
    before = logits(model)
    method.prepare_model(model, [])  # the first task goes on with it
    assert not method.directions
    method.prepare_model(model, ["an earlier one"])
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert len(method.directions) == 13


def test_olora_is_orthogonal_to_all_earlier_adapters(adapted):
    overlaps = {}
    for strength in (0.0, 5.0):
        model, method = adapted("olora"), OLoRA(strength)
        for seen in ([], ["first"], ["first", "second"]):
            learn(method, model, seen, rate=0.02, steps=40)
            method.after_task(Context(model, None))
        kept = method.directions
        assert {tuple(A.shape) for A in kept.values()} == {(12, 32), (12, 48)}  # three adapters of rank 4
        overlaps[strength] = sum(float((A[:8] @ A[8:].T).square().sum()) for A in kept.values())
        method.check_state(method.state_dict(), model)
    assert overlaps[5.0] < 0.1 * overlaps[0.0]
    for name, message in (("bert.pooler.dense", "has inputs of width 32"), ("bert.x", "has no adapter")):
        with pytest.raises(ValueError, match=rf"shape \(4, 7\) for '{name}', where the model {message}"):
            method.check_state({"directions": {name: torch.ones(4, 7)}}, model)


def test_oloras_gradient_is_that_of_its_loss(adapted):
    model, method = adapted("olora"), OLoRA(0.3)
    layers = list(method.layers(model))
    method.directions = {name: torch.randn(6, layer.in_features) for name, layer, _ in layers[:-1]}
    factors = [layer.lora_A[adapter].weight for _, layer, adapter in layers]
    loss = sum(0.3 * (method.directions[n] @ A.T).square().sum() for (n, *_), A in zip(layers, factors[:-1]))
    expected = torch.autograd.grad(loss, factors[:-1])
    for A in factors:
        A.grad = torch.ones_like(A)
    method.before_step(model)
    for A, gradient in zip(factors, expected):
        torch.testing.assert_close(A.grad, 1 + gradient)
    assert torch.equal(factors[-1].grad, torch.ones_like(factors[-1]))


def test_osf_keeps_the_large_singular_directions_of_every_boundary(adapted):
    model, method = adapted("osf"), OSF()
    for seen in ([], ["first"], ["first", "second"]):
        starts = {n: layer.get_base_layer().weight.clone() for n, layer, _ in method.layers(model)}
        learn(method, model, seen)
        method.after_task(Context(model, None))
        for name, layer, adapter in method.layers(model):
            change = layer.get_base_layer().weight - starts[name]
            U, _, Vt = torch.linalg.svd(starts[name], full_matrices=False)
            rank = layer.effective_rank[adapter]
            assert rank == min(change.shape) // 2 and change.abs().max() > 1e-4
            for kept in (U[:, :rank].T @ change, change @ Vt[:rank].T):
                assert kept.abs().max() < 1e-5


def test_models_and_arguments_that_do_not_fit(adapted, make_model, caplog, monkeypatch):
    def check(methods, model, **args):
        context = Context(model, SimpleNamespace(**{"reset_optimizer": True, "fsdp": None, **args}))
        first, *others = make_methods(methods)
        first.check(context, others)

    check("olora+replay+lwf", adapted("olora"))
    refused = {
        "'olora' needs a model with one LORA adapter, got none": ("olora", make_model(), {}),
        "'osf' needs a model with one OSF adapter, got LORA": ("osf", adapted("olora"), {}),
        "Pass --reset_optimizer": ("olora", adapted("olora"), {"reset_optimizer": False}),
        "'osf' changes the base weights, which does not run sharded": ("osf", adapted("osf"), {"fsdp": True}),
        "cannot be combined with ewc, which hold on": ("olora+ewc", adapted("olora"), {}),
    }
    config = LoraConfig(r=2, target_modules=["word_embeddings", "query"])
    refused["'bert.embeddings.word_embeddings' is an embedding or"] = (
        "olora",
        get_peft_model(make_model(), config),
        {},
    )
    for message, (methods, model, args) in refused.items():
        with pytest.raises(ValueError, match=message):
            check(methods, model, **args)
    assert "rounds away" not in caplog.text
    check("olora", adapted("olora").bfloat16())
    assert "rounds away much of what a task learned" in caplog.text
    monkeypatch.setattr("classp_hf.methods.osf.version", {"peft": "0.21.0rc1"}.get)
    check("osf", adapted("osf"))
    monkeypatch.setattr("classp_hf.methods.osf.version", {"peft": "0.19.1"}.get)
    with pytest.raises(ValueError, match=r"'osf' needs peft >= 0.21, got 0.19.1: pip install -U peft"):
        check("osf", adapted("osf"))


# ---- In ContinualTrainer ----


@pytest.mark.parametrize("method", ["olora", "osf"])
@pytest.mark.parametrize("where", [(1, 2), (2, 5), (3, 1)], ids=["task1", "task2", "task3"])
def test_an_interrupted_sequence_resumes_to_the_same_result(method, where, make_trainer, make_tasks, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(method, output_dir=str(tmp_path / "whole"), **changes)
    expected = whole.train_sequence(make_tasks(3))["accuracy_matrix"]
    with pytest.raises(KeyboardInterrupt):
        make_trainer(method, [Kill(*where)], **changes).train_sequence(make_tasks(3))
    resumed = make_trainer(method, resume_from_checkpoint="True", **changes)
    assert resumed.train_sequence(make_tasks(3))["accuracy_matrix"] == expected
    assert all(torch.equal(w, weights(resumed.model)[n]) for n, w in weights(whole.model).items())


@pytest.mark.parametrize("method", ["olora", "osf"])
def test_what_is_saved_is_a_plain_model(method, make_trainer, make_tasks, tmp_path):
    trainer = make_trainer(method, save_strategy="steps", save_steps=4)
    trainer.train_sequence(make_tasks(2))
    assert (tmp_path / "run/01-second/checkpoint-4/adapter_config.json").exists()  # within a task: the adapter
    (tmp_path / "run/adapter_config.json").write_text("{}")  # a pushed checkpoint's
    make_trainer(method, resume_from_checkpoint="True").train_sequence(make_tasks(2))
    for folder in (tmp_path / "run", tmp_path / "run/01-second"):
        assert not (folder / "adapter_config.json").exists()
        plain = AutoModelForSequenceClassification.from_pretrained(folder)
        torch.testing.assert_close(logits(plain), logits(trainer.model), rtol=1e-4, atol=1e-5)
