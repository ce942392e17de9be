from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import weights
from datasets import Dataset

from classp_hf import EWC, L2SP, METHODS, ContinualMemory, ContinualTrainer, Replay
from classp_hf.methods.ewc import sum_squared_gradients


def trained(make_model, make_args, collator, tasks, method, **kwargs):
    trainer = ContinualTrainer(
        model=make_model(), args=make_args(optim="adamw_torch", **kwargs), data_collator=collator, method=method
    )
    trainer.train_sequence(tasks)
    return trainer


# ---- The contract: every method of METHODS ----


@pytest.mark.parametrize("name", list(METHODS))
def test_contract_fields_and_state(name, make_model, make_tasks, make_args, collator, tmp_path):
    method_class = METHODS[name]
    assert method_class.name == name
    for f in dataclasses.fields(method_class):
        if f.init:
            assert f.metadata.get("help"), f"{name}.{f.name} needs a help text: it is a command-line flag"
    method = method_class()
    assert method.hyperparameters() == {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}

    trainer = trained(make_model, make_args, collator, make_tasks(2), method)
    state = method.state_dict()
    shapes = {n: p.shape for n, p in trainer.model.named_parameters()}
    for part, tensors in state.items():
        assert tensors.keys() == shapes.keys(), part
        assert all(
            t.shape == shapes[n] and t.dtype is torch.float32 and t.isfinite().all() for n, t in tensors.items()
        )

    # through the memory file, into a fresh method
    memory = ContinualMemory.load(tmp_path / "run") if state else ContinualMemory()
    fresh = method_class()
    fresh.load_state_dict({part: memory.get(f"{name}.{part}") for part in state})
    restored = fresh.state_dict()
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[part][n], t) for part, tensors in state.items() for n, t in tensors.items())
    with pytest.raises(ValueError, match="unknown_part"):
        fresh.load_state_dict({"unknown_part": {}})

    # a penalty adds to the gradient, leaves the weights and whatever is excluded alone, and is 0 at the anchor
    before = weights(trainer.model)
    for moved in (False, True):
        for p in trainer.model.parameters():
            p.grad = torch.zeros_like(p)
            if moved:
                p.data += 0.1
        fresh.excluded = frozenset({"classifier.weight"})
        fresh.penalty_gradient(trainer.model)
        pulled = {n: float(p.grad.abs().sum()) for n, p in trainer.model.named_parameters()}
        assert pulled["classifier.weight"] == 0
        if not moved:
            assert all(v == 0 for v in pulled.values())
        elif "anchor" in state:
            assert pulled["bert.pooler.dense.weight"] > 0
        for n, p in trainer.model.named_parameters():
            assert torch.equal(p, before[n] + 0.1) if moved else torch.equal(p, before[n])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EWC(ewc_lambda=-1), "ewc_lambda must be >= 0, got -1"),
        (lambda: EWC(ewc_gamma=1.5), r"ewc_gamma must be in \[0, 1\], got 1.5"),
        (lambda: EWC(fisher_samples=0), "fisher_samples must be at least 1, got 0"),
        (lambda: EWC(fisher_labels="true"), r"fisher_labels must be one of .*, got 'true'"),
        (lambda: EWC(ewc_mode="both"), r"ewc_mode must be one of .*, got 'both'"),
        (lambda: L2SP(l2sp_alpha=float("nan")), "l2sp_alpha must be >= 0, got nan"),
        (lambda: Replay(replay_fraction=0), r"replay_fraction must be in \(0, 1\], got 0"),
        (lambda: Replay(replay_fraction=5), r"replay_fraction must be in \(0, 1\], got 5"),
    ],
)
def test_bad_hyperparameters(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# ---- EWC ----


def batches(rows, dtype=torch.long):
    rng = np.random.default_rng(0)
    for _ in range(rows):
        n = int(rng.integers(3, 8))
        yield {
            "input_ids": torch.tensor([rng.integers(1, 40, n).tolist()]),
            "attention_mask": torch.ones(1, n, dtype=torch.long),
            "labels": torch.tensor([int(rng.integers(0, 3))], dtype=dtype),
        }


def brute_force_fisher(model, examples):
    """Mean of the squared per-example gradients, one plain backward pass an example."""
    model.eval()
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for example in examples:
        model.zero_grad()
        logits = model(input_ids=example["input_ids"], attention_mask=example["attention_mask"]).logits
        F.log_softmax(logits, -1)[0, example["labels"].item()].backward()
        for n, p in model.named_parameters():
            total[n] += p.grad**2 / len(examples)
    return total


def test_fisher_agrees_with_brute_force_per_example_gradients(make_model):
    model = make_model(dropout=0.5).double()
    expected = brute_force_fisher(model, list(batches(12)))
    model.train()
    total = sum_squared_gradients(model, batches(12), dict(model.named_parameters()))
    assert model.training  # as it was found
    for n, t in total.items():
        torch.testing.assert_close((t / 12).double(), expected[n], rtol=1e-6, atol=1e-30)


def test_fisher_is_not_the_squared_gradient_of_the_batch(make_model):
    model = make_model().eval()
    examples = list(batches(12))
    model.zero_grad()
    losses = [
        F.cross_entropy(model(input_ids=e["input_ids"], attention_mask=e["attention_mask"]).logits, e["labels"])
        for e in examples
    ]
    (sum(losses) / 12).backward()
    batched = sum(float((p.grad**2).sum()) for p in model.parameters())
    true = sum(float(f.sum()) for f in brute_force_fisher(model, examples).values())
    assert batched < 0.8 * true


def test_sampled_labels_estimate_the_fisher_of_the_models_own_distribution(make_model):
    model = make_model().eval()
    example = next(batches(1))
    logits = model(input_ids=example["input_ids"], attention_mask=example["attention_mask"]).logits
    exact = 0.0
    for label, probability in enumerate(logits.softmax(-1)[0].tolist()):
        fisher = brute_force_fisher(model, [{**example, "labels": torch.tensor([label])}])
        exact = exact + probability * fisher["classifier.weight"]
    parameters = {"classifier.weight": model.classifier.weight}
    draws = 600
    repeated = ({**example} for _ in range(draws))
    sampled = sum_squared_gradients(model, repeated, parameters, seeds=list(range(draws)))["classifier.weight"] / draws
    torch.testing.assert_close(sampled, exact.detach(), rtol=0.15, atol=0.05 * float(exact.max()))


def test_the_trainers_fisher_is_the_mean_over_the_chosen_examples(make_model, make_tasks, make_args, collator):
    task = make_tasks(1, rows=16)[0]
    method = EWC(fisher_samples=1000, fisher_normalize=False)
    trainer = trained(make_model, make_args, collator, [task], method)
    examples = [
        {"input_ids": torch.tensor([r["input_ids"]]), "attention_mask": None, "labels": torch.tensor([r["labels"]])}
        for r in task.train_dataset
    ]
    expected = brute_force_fisher(trainer.model, examples)
    for n, f in method.importance.items():
        torch.testing.assert_close(f, expected[n], rtol=1e-4, atol=1e-9)


def test_normalised_fisher_has_mean_one(make_model, make_tasks, make_args, collator):
    method = EWC(fisher_samples=8)
    trained(make_model, make_args, collator, make_tasks(1), method)
    values = torch.cat([f.reshape(-1) for f in method.importance.values()])
    assert float(values.mean()) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("mode", ["online", "summed"])
def test_ewc_over_several_tasks(mode, make_model, make_tasks, make_args, collator, monkeypatch):
    """Against the definition: a sum of terms with one anchor each, or decayed importance with the last anchor."""
    terms = []
    original = EWC.task_fisher

    def recording(self, trainer, task):
        fisher = original(self, trainer, task)
        terms.append(({n: f.clone() for n, f in fisher.items()}, weights(trainer.model)))
        return fisher

    monkeypatch.setattr(EWC, "task_fisher", recording)
    method = EWC(ewc_lambda=2.0, ewc_mode=mode, ewc_gamma=0.5, fisher_samples=8, fisher_normalize=False)
    trainer = trained(make_model, make_args, collator, make_tasks(3), method, learning_rate=1e-2)
    model = trainer.model
    torch.manual_seed(0)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
        p.grad = torch.zeros_like(p)
    method.penalty_gradient(model)
    (f1, a1), (f2, a2), (f3, a3) = terms
    for n, p in model.named_parameters():
        w = p.detach()
        if mode == "summed":
            expected = 2.0 * (f1[n] * (w - a1[n]) + f2[n] * (w - a2[n]) + f3[n] * (w - a3[n]))
        else:
            expected = 2.0 * (0.25 * f1[n] + 0.5 * f2[n] + f3[n]) * (w - a3[n])
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max() + 1e-12))


def test_ewc_refuses_models_it_cannot_measure(make_model):
    with pytest.raises(ValueError, match=r"single-label classifier, got .* labels of dtype torch.float32"):
        sum_squared_gradients(make_model(), batches(1, torch.float32), {})


# ---- L2-SP and replay ----


def test_l2sp_pulls_towards_the_last_boundary(make_model, make_tasks, make_args, collator):
    method = L2SP(l2sp_alpha=0.5)
    model = trained(make_model, make_args, collator, make_tasks(1), method).model
    end = weights(model)
    for p in model.parameters():
        p.data += 0.2
        p.grad = torch.ones_like(p)
    method.penalty_gradient(model)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 1 + 0.5 * (p.detach() - end[n]))


@pytest.mark.parametrize(("cls", "strength"), [(EWC, "ewc_lambda"), (L2SP, "l2sp_alpha")])
def test_stronger_penalties_keep_weights_closer(cls, strength, make_model, make_tasks, make_args, collator, tmp_path):
    distances = []
    for value in (0.0, 0.1, 3.0):
        method = cls(**{strength: value})
        trainer = trained(
            make_model,
            make_args,
            collator,
            make_tasks(2),
            method,
            output_dir=str(tmp_path / str(value)),
            learning_rate=5e-3,
        )
        anchor = ContinualMemory.load(tmp_path / str(value) / "00-first").get(f"{cls.name}.anchor")
        distances.append(
            sum(float(((p.detach() - anchor[n]) ** 2).sum()) for n, p in trainer.model.named_parameters())
        )
    assert distances[0] > distances[1] > distances[2] > 0


def test_the_first_task_trains_freely(make_model, make_tasks, make_args, collator, tmp_path):
    finals = []
    for i, method in enumerate((None, EWC(ewc_lambda=100), L2SP(l2sp_alpha=100), Replay())):
        args = {"output_dir": str(tmp_path / str(i))}
        finals.append(weights(trained(make_model, make_args, collator, make_tasks(1), method, **args).model))
    for other in finals[1:]:
        assert all(torch.equal(finals[0][n], w) for n, w in other.items())


def test_replay_mixes_the_share_of_every_earlier_task():
    old = [Dataset.from_dict({"x": list(range(100 * k, 100 * k + 50))}) for k in (1, 2)]
    new = Dataset.from_dict({"x": [0] * 10})
    method = Replay(replay_fraction=0.1)
    mixed = method.extend_train_dataset(new, old)["x"]
    assert len(mixed) == 20
    assert [sum(100 * k <= x < 100 * k + 50 for x in mixed) for k in (1, 2)] == [5, 5]
    assert len(set(mixed)) == 11  # no example twice
    assert mixed == method.extend_train_dataset(new, old)["x"]
    assert mixed != Replay(replay_fraction=0.1, replay_seed=1).extend_train_dataset(new, old)["x"]
    assert len(method.extend_train_dataset(new, [])) == 10
    # the buffer of a task does not change when more tasks come
    assert set(method.extend_train_dataset(new, old[:1])["x"]) <= set(mixed)


def test_replay_examples_are_trained_on_but_never_saved(make_model, make_tasks, make_args, collator, tmp_path):
    tasks = make_tasks(2)
    trainer = trained(make_model, make_args, collator, tasks, Replay(replay_fraction=0.25))
    assert len(trainer.train_dataset) == 64 + 16
    assert not [k for k in trainer.continual_memory().tensors if k.startswith("replay")]
