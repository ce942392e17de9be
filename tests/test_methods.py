from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import weights
from datasets import Dataset

from classp_hf import (
    CLASSP,
    EMA,
    EWC,
    L2SP,
    METHODS,
    ClasspTrainer,
    ContinualMemory,
    ContinualTrainer,
    Elastic,
    Interpolate,
    LogitAdjustment,
    LwF,
    Merge,
    Replay,
)
from classp_hf.memory import CompactCopy
from classp_hf.methods.fisher import sum_squared_gradients


def trained(make_model, make_args, collator, tasks, method, **kwargs):
    trainer = ContinualTrainer(
        model=make_model(), args=make_args(optim="adamw_torch", **kwargs), data_collator=collator, method=method
    )
    trainer.train_sequence(tasks)
    return trainer


# ---- The contract: every method of METHODS; those on adapters are in test_adapters.py ----

WITHOUT_ADAPTERS = [name for name, method in METHODS.items() if not method.folds_adapters]


@pytest.mark.parametrize("name", WITHOUT_ADAPTERS)
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
    method.check_state(state, trainer.model)
    for tensors in state.values():
        assert all(t.dtype is torch.float32 and t.isfinite().all() for t in tensors.values())
    for part, tensors in state.items():  # a tensor of another model
        foreign = {part: {**tensors, "elsewhere.weight": torch.zeros(1)}}
        with pytest.raises(ValueError, match="elsewhere.weight"):
            method.check_state(foreign, trainer.model)

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
        (lambda: Elastic(anchor_strength=-1), "anchor_strength must be >= 0, got -1"),
        (lambda: Merge(merge_weight=-1), "merge_weight must be >= 0, got -1"),
        (lambda: Interpolate(interpolation_weight=2), r"interpolation_weight must be in \[0, 1\], got 2"),
        (lambda: EMA(ema_decay=1), r"ema_decay must be in \[0, 1\), got 1"),
        (lambda: LwF(lwf_lambda=-1), "lwf_lambda must be >= 0, got -1"),
        (lambda: LwF(lwf_temperature=0), "lwf_temperature must be > 0, got 0"),
        (lambda: LogitAdjustment(prior_strength=1.1), r"prior_strength must be in \[0, 1\], got 1.1"),
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
    with pytest.raises(
        ValueError, match=r"single-label classifier or a language model, got .* labels of dtype torch.float32"
    ):
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


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "not contiguous", "grouped"])
@pytest.mark.parametrize("importance", ["none", "everywhere", "few rows"])
def test_a_pull_is_the_gradient_of_the_penalty(kind, importance, monkeypatch):
    """`(lambda / 2) * sum F (w - a)^2` by autograd: compiled, and in the groups that GPUs take."""
    if kind == "grouped":
        monkeypatch.setattr("classp_hf.optim.kernels.BUILT", False)
        monkeypatch.setattr("classp_hf.methods.base._GROUP", 3000)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    shapes = {
        "matrix": (301, 7),
        "vector": (13,),
        "scalar": (),
        "cube": (5, 60, 3),
        "empty": (0, 3),
        "wide": (2, 1200),
    }
    model = torch.nn.ParameterDict({n: torch.randn(shape).to(dtype) for n, shape in shapes.items()})
    if kind == "not contiguous":
        model["matrix"] = torch.nn.Parameter(torch.randn(7, 301).T)
    method = EWC(ewc_lambda=0.7)
    method.anchor = {n: torch.randn(p.shape) for n, p in model.items()}
    if importance != "none":
        method.importance = {n: torch.rand(p.shape) for n, p in model.items() if n != "wide"}
    if importance == "few rows":
        method.importance["matrix"][torch.randperm(301)[40:]] = 0
    for _ in range(2):
        penalty = sum(
            0.35 * (method.importance.get(n, torch.ones(())) * (p - method.anchor[n]) ** 2).sum()
            for n, p in model.items()
        )
        expected = torch.autograd.grad(penalty, list(model.values()))
        for p in model.values():
            p.grad = torch.ones_like(p)
        method.penalty_gradient(model)
        for p, pull in zip(model.values(), expected):
            torch.testing.assert_close(p.grad.float(), 1 + pull.float(), **({"rtol": 0.02, "atol": 0.02} if kind == "bfloat16" else {}))  # fmt: skip
        method.importance = {n: f.flip(0) if f.ndim else f for n, f in method.importance.items()}  # the next task's


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("optim", ["classp", "adamw"])
def test_elastic_is_what_its_formula_says_compiled_or_not(optim, power, monkeypatch):
    results = []
    for built in (True, False):
        monkeypatch.setattr("classp_hf.optim.kernels.BUILT", built)
        torch.manual_seed(0)
        model = torch.nn.ParameterDict(
            {"rows": torch.randn(301, 7), "vector": torch.randn(400), "scalar": torch.ones(())}
        )
        memory = {n: torch.rand(p.shape) for n, p in model.items()}
        memory["rows"][torch.randperm(301)[40:]] = 0
        optimizer = CLASSP(model.values(), lr=0.1, power=power) if optim == "classp" else None
        method = Elastic(anchor_strength=0.5)
        method.start(model, memory)
        method._trainer = SimpleNamespace(bare_optimizer=optimizer, accumulators=lambda memory=memory: memory)
        moved = {}
        for n, p in model.items():
            p.data += (step := 0.1 * torch.randn(p.shape))
            p.grad = torch.ones_like(p)
            moved[n] = (p.detach().clone(), step)
            if optimizer is not None:
                optimizer.state[p]["accumulator"] = memory[n]
        method.penalty_gradient(model)
        method.after_step(model)
        for n, p in model.items():
            w, step = moved[n]
            if optim == "classp":
                c = 0.1 * method.scale * memory[n] / (memory[n] + 1e-6) ** (1 / power)
                torch.testing.assert_close(p.detach(), w - c / (1 + c) * step, rtol=0, atol=1e-4)
            else:
                torch.testing.assert_close(p.grad, 1 + method.scale * memory[n] * step, rtol=0, atol=2e-4)
        results.append([*(p.detach() for p in model.values()), *(p.grad for p in model.values())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


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
            keep_task_models=True,
        )
        anchor = ContinualMemory.load(tmp_path / str(value) / "00-first").get(f"{cls.name}.anchor")
        distances.append(
            sum(float(((p.detach() - anchor[n]) ** 2).sum()) for n, p in trainer.model.named_parameters())
        )
    assert distances[0] > distances[1] > distances[2] > 0


def test_the_first_task_trains_freely(make_model, make_tasks, make_args, collator, tmp_path):
    finals = []
    strong = [EWC(ewc_lambda=100), L2SP(l2sp_alpha=100), Elastic(anchor_strength=100), Merge(merge_weight=0)]
    strong += [
        Interpolate(interpolation_weight=0),
        EMA(ema_decay=0.99),
        LwF(lwf_lambda=100),
        LogitAdjustment(),
        Replay(),
    ]
    assert len(strong) == len(WITHOUT_ADAPTERS) - 1
    for i, method in enumerate((None, *strong)):
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


# ---- Uses of the memory of gradients: elastic and merge ----


def recorded_gradients(trainer):
    """Canonical name -> list of the task gradients that the optimizer was given, before any penalty."""
    seen = {}
    original = trainer.before_step

    def record():
        for n, p in trainer.model.named_parameters():
            seen.setdefault(n, []).append(p.grad.detach().clone())
        original()

    trainer.before_step = record
    return seen


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_memory_is_gathered_under_any_optimizer(power, make_model, make_tasks, make_args, collator, tmp_path):
    args = make_args(optim="adamw_torch", gather_memory=True, memory_power=power)
    trainer = ContinualTrainer(model=make_model(), args=args, data_collator=collator)
    seen = recorded_gradients(trainer)
    trainer.train_sequence(make_tasks(2))
    stored = ContinualMemory.load(tmp_path / "run")
    assert stored.metadata["optimizer"]["power"] == power
    for n, s in stored.get("accumulator").items():
        torch.testing.assert_close(s, sum(g.abs() ** power for g in seen[n]), rtol=1e-4, atol=1e-12)

    # CLASSP goes on from it, and gathering with another power refuses
    follower = ClasspTrainer(model=make_model(), args=make_args(optim="classp"), memory=tmp_path / "run")
    assert follower.accumulators().keys() == stored.get("accumulator").keys()
    other = make_args(gather_memory=True, memory_power=3.0, optim="adamw_torch")
    with pytest.raises(ValueError, match=r"Pass memory_power="):
        ContinualTrainer(model=make_model(), args=other, memory=tmp_path / "run")


def test_gathering_costs_the_training_nothing(make_model, make_tasks, make_args, collator, tmp_path):
    finals = []
    for gather in (False, True):
        args = make_args(optim="adamw_torch", gather_memory=gather, output_dir=str(tmp_path / str(gather)))
        trainer = ContinualTrainer(model=make_model(), args=args, data_collator=collator)
        trainer.train_sequence(make_tasks(2))
        finals.append(weights(trainer.model))
    assert all(torch.equal(finals[0][n], w) for n, w in finals[1].items())


@pytest.mark.parametrize("optim", ["classp", "adamw_torch"])
def test_elastic_pulls_by_the_memory_towards_the_boundary(optim, make_model, make_tasks, make_args, collator):
    method = Elastic(anchor_strength=0.5)
    trainer = ContinualTrainer(model=make_model(), args=make_args(optim=optim), data_collator=collator, method=method)
    tasks = make_tasks(2)
    trainer.train_sequence(tasks[:1])
    end, memory = weights(trainer.model), {n: s.clone() for n, s in trainer.accumulators().items()}
    mean = float(torch.cat([s.reshape(-1) for s in memory.values()]).double().mean())
    method.before_task(trainer, tasks[1])
    for p in trainer.model.parameters():
        p.data += 0.2
        p.grad = torch.ones_like(p)
    for group in trainer.bare_optimizer.param_groups:
        group["lr"] = 0.01
    method.penalty_gradient(trainer.model)
    method.after_step(trainer.model)
    for n, p in trainer.model.named_parameters():
        strength = 0.5 * memory[n] / mean
        moved = end[n] + 0.2
        if optim == "classp":
            c = 0.01 * strength / (memory[n] + 1e-6).sqrt()
            torch.testing.assert_close(p.detach(), moved - c / (1 + c) * 0.2, rtol=1e-3, atol=1e-4)
            assert torch.equal(p.grad, torch.ones_like(p)) and torch.equal(trainer.accumulators()[n], memory[n])
        else:
            torch.testing.assert_close(p.grad, 1 + strength * 0.2, rtol=1e-3, atol=1e-4)
            assert torch.equal(p.detach(), moved)


def test_elastic_is_stable_at_any_strength(make_model, make_tasks, make_args, collator, tmp_path):
    """A pull that entered the memory would feed on itself and end in infinity."""
    trainer = ContinualTrainer(
        model=make_model(), args=make_args(optim="classp"), data_collator=collator, method=Elastic(anchor_strength=1e6)
    )
    trainer.train_sequence(make_tasks(2))
    anchor = ContinualTrainer(model=make_model(), args=make_args(optim="classp", output_dir=str(tmp_path / "one")), data_collator=collator)  # fmt: skip
    anchor.train_sequence(make_tasks(1))
    start = weights(anchor.model)
    for n, w in weights(trainer.model).items():
        if n != "classifier.bias":  # weights without any memory are free
            needed = trainer.accumulators()[n] > 1e-4
            torch.testing.assert_close(w[needed], start[n][needed], rtol=0, atol=2e-3)


@pytest.mark.parametrize("optim", ["classp", "adamw_torch"])
def test_merge_weighs_every_weight_by_both_memories(optim, make_model, make_tasks, make_args, collator, tmp_path):
    boundaries = {}
    original = Merge.after_task

    class Recording(Merge):
        def after_task(self, trainer, task):
            before = weights(trainer.model)
            memory = {n: s.clone() for n, s in trainer.accumulators().items()}
            original(self, trainer, task)
            boundaries[task.name] = before, memory, weights(trainer.model)

    method = Recording(merge_weight=0.7)
    args = make_args(optim=optim)
    ContinualTrainer(model=make_model(), args=args, data_collator=collator, method=method).train_sequence(
        make_tasks(3)
    )

    def normal(memory):
        mean = torch.cat([s.reshape(-1) for s in memory.values()]).double().mean()
        return {n: s.double() / mean for n, s in memory.items()}

    assert all(torch.equal(boundaries["first"][0][n], w) for n, w in boundaries["first"][2].items())
    for tasks_before, (earlier, later) in enumerate((("first", "second"), ("second", "third")), start=1):
        (_, s_old, w_old), (w_new, s, merged) = boundaries[earlier], boundaries[later]
        f_old, f_new = normal(s_old), normal({n: s[n] - s_old[n] for n in s})
        for n, w in merged.items():
            old, new = tasks_before * f_old[n], 0.7 * f_new[n]
            expected = (old * w_old[n] + new * w_new[n]) / (old + new)
            expected = torch.where(old + new > 0, expected, w_new[n].double())
            torch.testing.assert_close(w.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_anchor_takes_two_bytes_a_weight(dtype):
    torch.manual_seed(0)
    weight = torch.randn(64, 384).to(dtype)
    copy = CompactCopy(weight)
    held = copy.values.nbytes + (copy.scale.nbytes if copy.scale is not None else 0)
    assert held <= 2.02 * weight.numel()
    assert float(copy.difference(weight).abs().max()) <= float(weight.float().abs().max()) / 65534 * 1.01
    moved = weight.float() + 1e-3
    torch.testing.assert_close(copy.difference(moved), torch.full_like(moved, 1e-3), rtol=0, atol=8e-5)
    for odd in (torch.zeros(0, 3), torch.tensor(2.5), torch.zeros(5), torch.randn(2, 3, 4)):
        assert torch.allclose(CompactCopy(odd).difference(odd), torch.zeros(()), atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "names", "values"),
    [
        ({"consolidation": "anchor", "anchor_strength": 0.3}, ["elastic"], {"anchor_strength": 0.3}),
        ({"consolidation": "merge", "merge_weight": 2.0}, ["merge"], {"merge_weight": 2.0}),
        ({"consolidation": "both"}, ["elastic", "merge"], {}),
        ({"consolidation": "none"}, [], {}),
        ({"consolidation": "anchor", "method": "replay"}, ["replay", "elastic"], {}),
    ],
)
def test_consolidation_chooses_the_uses_of_the_memory(kwargs, names, values, make_model, make_args):
    trainer = ClasspTrainer(model=make_model(), args=make_args(), **kwargs)
    assert [m.name for m in trainer.method.parts()] == [*names, "logit_adjustment"]
    assert values.items() <= trainer.method.hyperparameters().items()


def test_bad_consolidation(make_model, make_args):
    with pytest.raises(ValueError, match="consolidation must be .*, got 'all'"):
        ClasspTrainer(model=make_model(), args=make_args(), consolidation="all")
    with pytest.raises(ValueError, match="merge is not used with consolidation='anchor'"):
        ClasspTrainer(model=make_model(), args=make_args(), consolidation="anchor", merge_weight=1.0)


# ---- Several methods at once ----


def test_a_combination_is_its_parts(make_model, make_tasks, make_args, collator, tmp_path):
    both = ContinualTrainer(
        model=make_model(), args=make_args(optim="adamw_torch"), data_collator=collator, method="l2sp+replay"
    )
    both.train_sequence(make_tasks(2))
    assert len(both.train_dataset) == 64 + 3
    stored = ContinualMemory.load(tmp_path / "run")
    assert stored.kinds() == ["l2sp.anchor"] and stored.metadata["method"]["name"] == "l2sp+replay"
    alone = ContinualTrainer(model=make_model(), args=make_args(), method="l2sp", memory=tmp_path / "run")
    assert alone.method.anchor.keys() == stored.get("l2sp.anchor").keys()
    for bad, match in (("ewc+nothing", "Unknown method 'nothing'"), ("ewc+ewc", r"every method once, got ewc \+ ewc")):
        with pytest.raises(ValueError, match=match):
            ContinualTrainer(model=make_model(), args=make_args(), method=bad)


# ---- Interpolation and averages ----


def test_interpolation_and_ema_against_their_definitions(make_model, make_tasks, make_args, collator, tmp_path):
    plain = ContinualTrainer(model=make_model(), args=make_args(optim="adamw_torch"), data_collator=collator)
    steps, ends = [], []
    original = plain.method.after_step
    plain.method.after_step = lambda model: (steps.append(weights(model)), original(model))
    plain.method.after_task = lambda trainer, task: ends.append(weights(trainer.model))
    plain.train_sequence(make_tasks(2))
    old, new = ends
    average = old
    for now in steps[len(steps) // 2 :]:
        average = {n: 0.9 * average[n] + 0.1 * w for n, w in now.items()}
    for method, wanted in (
        (Interpolate(interpolation_weight=0.3), {n: old[n] + 0.3 * (new[n] - old[n]) for n in old}),
        (EMA(ema_decay=0.9), average),
    ):
        trainer = trained(
            make_model, make_args, collator, make_tasks(2), method, output_dir=str(tmp_path / method.name)
        )
        for n, w in weights(trainer.model).items():
            torch.testing.assert_close(w, wanted[n], rtol=1e-4, atol=1e-6)


# ---- Learning without Forgetting, logit adjustment ----


def test_lwf_is_the_divergence_from_the_model_as_the_task_found_it(make_model, make_tasks, make_args, collator):
    method = LwF(lwf_lambda=0.5, lwf_temperature=3.0)
    args = make_args(optim="adamw_torch", bf16=True)  # accelerate wraps forward: a naive copy would call the new model
    trainer = ContinualTrainer(model=make_model(), args=args, data_collator=collator, method=method)
    tasks = make_tasks(2)
    trainer.train_sequence(tasks[:1])
    batch = collator(list(tasks[1].train_dataset.select(range(5))))
    old = trainer.model(**batch)["logits"].detach().double()
    method.before_task(trainer, tasks[1])
    assert float(method.penalty(trainer.model, trainer.model(**batch), batch)) == pytest.approx(0, abs=1e-5)
    for p in trainer.model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    outputs = trainer.model(**batch)
    p_old, new = (old / 3).softmax(-1), (outputs["logits"].double() / 3).log_softmax(-1)
    expected = 0.5 * 9 * (p_old * (p_old.log() - new)).sum(-1).mean()
    assert float(method.penalty(trainer.model, outputs, batch)) == pytest.approx(float(expected), rel=2e-2)
    assert not any(p.requires_grad for p in method.teacher.parameters())


def test_lwf_and_logit_adjustment_refuse_what_they_cannot_do(make_model, make_tasks, make_args):
    for name in ("lwf", "logit_adjustment"):
        trainer = ContinualTrainer(model=make_model(), args=make_args(heads="per_task"), method=name)
        with pytest.raises(ValueError, match=f"'{name}' .*one (shared )?head"):
            trainer.train_sequence(make_tasks(2))


def test_logit_adjustment_corrects_by_the_change_of_the_label_frequencies(make_model, make_tasks, make_args, collator):
    method = LogitAdjustment(prior_strength=0.25)
    tasks = make_tasks(3, rows=60)
    wanted = [[30, 20, 10], [5, 5, 50], [20, 20, 20]]
    for task, counts in zip(tasks, wanted):
        labels = [label for label, count in enumerate(counts) for _ in range(count)]
        task.train_dataset = task.train_dataset.remove_columns("labels").add_column("labels", labels)
    corrections = []
    original = method.after_task
    method.after_task = lambda trainer, task: (corrections.append(method.correction), original(trainer, task))
    trainer = trained(make_model, make_args, collator, tasks, method)
    frequencies = [torch.tensor([(c + 1) / 63 for c in counts]) for counts in wanted]
    assert corrections[0] is None
    for t, found in enumerate(corrections[1:], start=1):
        old = torch.stack(frequencies[:t]).mean(0)
        expected = 0.25 * torch.minimum(torch.zeros(3), frequencies[t].log() - old.log())
        torch.testing.assert_close(found, expected)
        assert (found < 0).any()
    torch.testing.assert_close(torch.stack(list(method.frequencies.values())), sum(frequencies))

    # as a loss: the cross-entropy of the corrected logits
    method.correction = torch.tensor([0.0, -2.0, -0.5])
    batch = collator(list(tasks[0].train_dataset.select(range(6))))
    outputs = trainer.model(**batch)
    total = F.cross_entropy(outputs["logits"], batch["labels"]) + method.penalty(trainer.model, outputs, batch)
    torch.testing.assert_close(total, F.cross_entropy(outputs["logits"] + method.correction, batch["labels"]))


@pytest.mark.parametrize(
    "method", ["elastic", "merge", "lwf", "logit_adjustment", "ema", "interpolate", "elastic+merge"]
)
@pytest.mark.parametrize("optim", ["classp", "adamw_torch"])
def test_a_resumed_run_is_the_undisturbed_one(method, optim, make_model, make_tasks, make_args, collator, tmp_path):
    """Stopped in the middle of the second task, after a checkpoint, and begun again in a new trainer."""
    results, finals = [], []
    for stop in (False, True):
        args = {"optim": optim, "save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path / str(stop))}

        def build(arguments=args):
            return ContinualTrainer(
                model=make_model(), args=make_args(**arguments), data_collator=collator, method=method
            )

        trainer = build()
        if stop:
            steps = 0
            original = trainer.before_step

            def interrupt(call=original):
                nonlocal steps
                steps += 1
                if steps == 8 + 5:
                    raise KeyboardInterrupt
                call()

            trainer.before_step = interrupt
            with pytest.raises(KeyboardInterrupt):
                trainer.train_sequence(make_tasks(3))
            trainer = build()
        results.append(trainer.train_sequence(make_tasks(3), resume_from_checkpoint=stop)["accuracy_matrix"])
        finals.append((weights(trainer.model), trainer.continual_memory().tensors))
    assert results[0] == results[1]
    for undisturbed, resumed in zip(*finals):
        assert undisturbed.keys() == resumed.keys()
        assert all(torch.equal(undisturbed[n], t) for n, t in resumed.items())


def test_classp_trainer_adjusts_logits_where_it_can(make_model, make_args, make_tasks, collator, tmp_path):
    trainer = ClasspTrainer(model=make_model(), args=make_args(), data_collator=collator)
    assert trainer.method.describe() == {"name": "logit_adjustment", "prior_strength": 0.25}
    trainer.train_sequence(make_tasks(2))
    stored = ContinualMemory.load(tmp_path / "run")
    assert stored.get("logit_adjustment.frequencies").keys() == {"negative", "neutral", "positive"}

    def names(**kwargs):
        changes = {"heads": kwargs.pop("heads", "shared")}
        return [m.name for m in ClasspTrainer(model=make_model(), args=make_args(**changes), **kwargs).method.parts()]

    assert names(logit_adjustment=False) == names(heads="per_task") == ["none"]
    assert names(method="replay", consolidation="merge") == ["replay", "merge", "logit_adjustment"]
    assert names(method=[LogitAdjustment(prior_strength=1.0)]) == ["logit_adjustment"]
    with pytest.raises(ValueError, match=r"labels \['negative', 'neutral', 'positive'\], the model has"):
        other = make_model()
        other.config.id2label = {0: "bad", 1: "fair", 2: "good"}
        ClasspTrainer(model=other, args=make_args(), memory=tmp_path / "run")
