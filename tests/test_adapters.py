"""Methods that fold a task's PEFT adapter into the base weights: O-LoRA and OSF."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, OSFConfig, TaskType, get_peft_model
from test_trainer import Kill
from transformers import AutoModelForSequenceClassification

from classp_hf import OSF, ContinualTrainer, OLoRA
from classp_hf.memory import ContinualMemory

CONFIGS = {
    "olora": LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=8, target_modules="all-linear"),
    "osf": OSFConfig(task_type=TaskType.SEQ_CLS, effective_rank=0.5, target_modules="all-linear"),
}


@pytest.fixture
def make_trainer(make_model, make_args, collator):
    def make(method, callbacks=(), adapter=None, **changes):
        name = method if isinstance(method, str) else method.name
        model = make_model()
        torch.manual_seed(0)  # the adapters' first weights
        model = get_peft_model(model, CONFIGS[adapter or name])
        args = make_args(**{"optim": "adamw_torch", "learning_rate": 5e-3, "reset_optimizer": True, **changes})
        return ContinualTrainer(model, args, collator, method=method, callbacks=list(callbacks))

    return make


def logits(model, tasks, collator):
    batch = collator([tasks[0].test_dataset[i] for i in range(8)])
    batch.pop("labels")
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("method", ["olora", "osf"])
def test_what_is_saved_is_a_plain_model(method, make_trainer, make_tasks, collator, tmp_path):
    tasks = make_tasks(3)
    trainer = make_trainer(method, save_strategy="steps", save_steps=4)
    before = logits(trainer.model, tasks, collator)
    results = trainer.train_sequence(tasks)
    after = logits(trainer.model, tasks, collator)
    assert not torch.allclose(before, after, atol=0.1)
    for folder in (tmp_path / "run", tmp_path / "run/02-third"):
        assert not (folder / "adapter_config.json").exists()
        plain = AutoModelForSequenceClassification.from_pretrained(folder)
        torch.testing.assert_close(logits(plain, tasks, collator), after, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "run/02-third/checkpoint-4/adapter_config.json").exists()  # within a task: the adapter
    assert results["method"]["name"] == method


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
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), resumed.model.state_dict().items()):
        assert torch.equal(a, b), name


def test_olora_is_orthogonal_to_all_earlier_adapters(make_trainer, make_tasks, tmp_path):
    overlaps = {}
    for strength in (0.0, 100.0):
        args = {"learning_rate": 0.02, "num_train_epochs": 5}
        trainer = make_trainer(OLoRA(strength), output_dir=str(tmp_path / str(strength)), **args)
        trainer.train_sequence(make_tasks(3))
        kept = trainer.method.directions
        assert {tuple(A.shape) for A in kept.values()} == {(12, 32), (12, 48)}  # three adapters of rank 4
        overlaps[strength] = sum(float((A[:8] @ A[8:].T).square().sum()) for A in kept.values())
        stored = ContinualMemory.load(tmp_path / str(strength)).get("olora.directions")
        assert stored.keys() == kept.keys() and all(torch.equal(stored[n], kept[n]) for n in kept)
    assert overlaps[100.0] < 0.1 * overlaps[0.0]


def test_oloras_gradient_is_that_of_its_loss(make_trainer):
    trainer = make_trainer(OLoRA(0.3))
    layers = list(trainer.method.layers(trainer.model))
    method = trainer.method
    method.directions = {name: torch.randn(6, layer.in_features) for name, layer, _ in layers[:-1]}
    weights = [layer.lora_A[adapter].weight for _, layer, adapter in layers]
    loss = sum(0.3 * (method.directions[n] @ A.T).square().sum() for (n, *_), A in zip(layers, weights[:-1]))
    expected = torch.autograd.grad(loss, weights[:-1])
    for A in weights:
        A.grad = torch.ones_like(A)
    method.penalty_gradient(trainer.model)
    for A, gradient in zip(weights, expected):
        torch.testing.assert_close(A.grad, 1 + gradient)
    assert torch.equal(weights[-1].grad, torch.ones_like(weights[-1]))


def test_osf_keeps_the_large_singular_directions_of_every_boundary(make_trainer, make_tasks):
    # Adam's step, unlike its gradient, leaves the subspace a little
    trainer = make_trainer("osf", optim="sgd", learning_rate=0.3)
    starts = []

    class Watch(OSF):
        def before_task(self, trainer, task):
            super().before_task(trainer, task)
            starts.append({n: layer.get_base_layer().weight.clone() for n, layer, _ in self.layers(trainer.model)})

        def after_task(self, trainer, task):
            super().after_task(trainer, task)
            for name, layer, adapter in self.layers(trainer.model):
                start = starts[-1][name]
                change = layer.get_base_layer().weight - start
                U, _, Vt = torch.linalg.svd(start, full_matrices=False)
                rank = layer.effective_rank[adapter]
                assert rank == min(start.shape) // 2 and change.abs().max() > 1e-4
                for kept in (U[:, :rank].T @ change, change @ Vt[:rank].T):
                    assert kept.abs().max() < 1e-5

    trainer.method = Watch()
    trainer.train_sequence(make_tasks(3))
    assert len(starts) == 3


@pytest.mark.parametrize("method", ["olora", "osf"])
def test_resuming_a_finished_sequence_leaves_the_plain_model(method, make_trainer, make_tasks, collator, tmp_path):
    trainer = make_trainer(method)
    tasks = make_tasks(2)
    trainer.train_sequence(tasks)
    expected = logits(trainer.model, tasks, collator)
    (tmp_path / "run" / "adapter_config.json").write_text("{}")  # a pushed checkpoint's
    make_trainer(method, resume_from_checkpoint="True").train_sequence(tasks)
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(logits(plain, tasks, collator), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_was_loaded_is_kept(make_trainer, make_tasks, collator):
    trainer = make_trainer("olora")
    for _, layer, adapter in trainer.method.layers(trainer.model):
        torch.nn.init.normal_(layer.lora_B[adapter].weight, std=0.1)
    tasks = make_tasks(2)
    before = logits(trainer.model, tasks, collator)
    trainer.seen_tasks = ["an earlier one"]
    trainer.method.before_task(trainer, tasks[0])
    torch.testing.assert_close(logits(trainer.model, tasks, collator), before, rtol=1e-4, atol=1e-5)
    assert len(trainer.method.directions) == 13


def test_models_and_arguments_that_do_not_fit(
    make_trainer, make_model, make_args, make_tasks, collator, tmp_path, caplog
):
    plain = ContinualTrainer(make_model(), make_args(reset_optimizer=True, optim="sgd"), collator, method="olora")
    with pytest.raises(ValueError, match="'olora' needs a model with one LORA adapter, got none"):
        plain.train_sequence(make_tasks(2))
    with pytest.raises(ValueError, match="'osf' needs a model with one OSF adapter, got LORA"):
        make_trainer("osf", adapter="olora").train_sequence(make_tasks(2))
    with pytest.raises(ValueError, match="Pass --reset_optimizer"):
        make_trainer("olora", reset_optimizer=False).train_sequence(make_tasks(2))
    with pytest.raises(ValueError, match="cannot be combined with ewc, which hold on"):
        make_trainer("olora+ewc", adapter="olora").train_sequence(make_tasks(2))
    make_trainer("olora+replay", adapter="olora", output_dir=str(tmp_path / "replay")).train_sequence(make_tasks(2))
    trainer = make_trainer("olora")
    trainer.model.get_base_model().bfloat16()
    trainer.method.check_trainer(trainer)
    assert "rounds away much of what a task learned" in caplog.text
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["word_embeddings", "query"]))
    embedding = ContinualTrainer(model, make_args(reset_optimizer=True, optim="sgd"), collator, method="olora")
    with pytest.raises(ValueError, match="'bert.embeddings.word_embeddings' is an embedding or has one"):
        embedding.train_sequence(make_tasks(2))
    trainer = make_trainer("olora")
    memory = ContinualMemory({"olora.directions/bert.pooler.dense": torch.ones(4, 7)})
    with pytest.raises(
        ValueError, match=r"shape \(4, 7\) for 'bert.pooler.dense', where the model has inputs of width 32"
    ):
        trainer.load_memory(memory)
    with pytest.raises(ValueError, match="where the model has no adapter"):
        trainer.load_memory(ContinualMemory({"olora.directions/bert.x": torch.ones(4, 7)}))
