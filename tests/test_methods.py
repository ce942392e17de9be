"""Every method against the contract of methods/base.py, hook by hook on small models; and in ContinualTrainer."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import weights
from datasets import Dataset, IterableDataset

import classp_hf  # its trainers are used by name: this file is about methods
from classp_hf.methods import METHODS, Context, describe_methods, make_methods
from classp_hf.optim import CLASSP

Method, EWC, L2SP, Elastic, Merge, Interpolate, EMA, LwF, LogitAdjustment, Replay, *_ = METHODS.values()
WITHOUT_ADAPTERS = [name for name, method in METHODS.items() if not method.folds_adapters]  # they: test_adapters.py


@pytest.fixture
def engine(make_model, collator, tmp_path):
    """Trains on a task after another and calls the hooks as the contract says, without Trainer."""
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)

    class Engine:
        def __init__(self, method, optim="adamw_torch", lr=1e-2):
            self.method = METHODS[method]() if isinstance(method, str) else method
            self.model, self.seen, self.gathered, self.args = make_model(), [], {}, arguments
            optimizer = {"adamw_torch": torch.optim.AdamW, "classp": CLASSP, "sgd": torch.optim.SGD}[optim]
            self.optimizer = optimizer(self.model.parameters(), lr=lr)

        def accumulators(self):
            if not isinstance(self.optimizer, CLASSP):
                return self.gathered
            known = {n: p for n, p in self.model.named_parameters() if p in self.optimizer.state}
            return {n: self.optimizer.accumulator(p) for n, p in known.items()}

        def context(self, task, **changes):
            data = {"task": task.name, "train_dataset": task.train_dataset, "task_dataset": task.train_dataset}
            memory = {"accumulators": self.accumulators, "optimizer": self.optimizer, "collate": collator}
            return Context(self.model, self.args, list(self.seen), **{**data, **memory, **changes})

        def train(self, task, steps=range(6), start=None, ends=True):
            self.method.before_task(self.context(task, start=start))
            self.model.train()
            for step in steps:
                batch = collator([task.train_dataset[i] for i in range(8 * step, 8 * step + 8)])
                outputs = self.model(**batch)
                loss = F.cross_entropy(self.method.adjust_logits(outputs.logits), batch["labels"])
                term = self.method.loss_term(outputs, batch, None)
                (loss if term is None else loss + term).backward()
                for n, p in self.model.named_parameters() if not isinstance(self.optimizer, CLASSP) else ():
                    self.gathered[n] = self.gathered.get(n, 0) + p.grad.square()
                self.method.before_step(self.model)
                self.optimizer.step()
                self.method.after_step(self.model)
                self.optimizer.zero_grad()
            if ends:
                self.method.after_task(self.context(task))
                self.seen.append(task.name)
            return self

    return Engine


@pytest.fixture
def train(make_model, make_args, collator):
    def run(tasks, method, trainer="ContinualTrainer", given=None, **changes):
        args = make_args(**{"optim": "adamw_torch", **changes})
        made = getattr(classp_hf, trainer)(make_model(), args, collator, method=method, **(given or {}))
        return made, made.train_sequence(tasks)

    return run


# ---- The contract ----


@pytest.mark.parametrize("name", WITHOUT_ADAPTERS)
def test_contract_fields_state_and_gradients(name, engine, make_tasks):
    method_class = METHODS[name]
    assert method_class.name == name
    for f in dataclasses.fields(method_class):
        if f.init:
            assert f.metadata.keys() == {"help"}, f"{name}.{f.name} needs a help text: it is a command-line flag"
    trained = engine(name)
    for task in make_tasks(2):
        trained.train(task)
    state = trained.method.state_dict()
    assert set(method_class.per_parameter) <= set(method_class.parts)
    shapes = {n: p.shape for n, p in trained.model.named_parameters()}
    for part, tensors in state.items():
        assert all(t.dtype is torch.float32 or part in ("tokens", "lengths", "pool") for t in tensors.values())
        assert all(t.isfinite().all() for t in tensors.values())
        assert part not in method_class.per_parameter or {n: t.shape for n, t in tensors.items()} == shapes
    fresh = method_class()
    fresh.check_state(state, trained.model)
    fresh.load_state_dict(state)
    restored = fresh.state_dict()
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[part][n], t) for part, tensors in state.items() for n, t in tensors.items())

    # a pull adds to the gradient, leaves the weights and whatever is excluded alone, and is 0 at the anchor
    model, before = trained.model, weights(trained.model)
    fresh.excluded = frozenset({"classifier.weight"})
    for moved in (0.0, 0.1):
        for p in model.parameters():
            p.data += moved
            p.grad = torch.zeros_like(p)
        fresh.before_step(model)
        assert all(torch.equal(p, before[n] + moved) for n, p in model.named_parameters())
        pulled = {n for n, p in model.named_parameters() if p.grad.any()}
        assert pulled == (set(shapes) - {"classifier.weight"} if moved and name == "l2sp" else pulled)
        assert "classifier.weight" not in pulled and bool(pulled) == (moved > 0 and "anchor" in state)


@pytest.mark.parametrize("optim", ["classp", "adamw_torch"])
@pytest.mark.parametrize("name", sorted({*WITHOUT_ADAPTERS} - {"none", "replay"}))
@pytest.mark.parametrize("interrupted", [0, 1], ids=["first task", "second task"])
def test_a_resumed_task_ends_as_if_it_had_not_been_interrupted(interrupted, name, optim, engine, make_tasks):
    tasks, whole, part, again = make_tasks(3), *(engine(name, optim) for _ in range(3))
    for task in tasks:
        whole.train(task)
    for task in tasks[:interrupted]:
        part.train(task)
    start = weights(part.model)
    part.train(tasks[interrupted], range(3), ends=False)
    again.model.load_state_dict(part.model.state_dict())
    again.optimizer.load_state_dict(part.optimizer.state_dict())
    again.seen, again.gathered = part.seen, {n: t.clone() for n, t in part.gathered.items()}
    state = part.method.state_dict()
    again.method.load_state_dict({k: {n: t.clone() for n, t in tensors.items()} for k, tensors in state.items()})
    again.train(tasks[interrupted], range(3, 6), start=start)
    for task in tasks[interrupted + 1 :]:
        again.train(task)
    assert all(torch.equal(w, weights(again.model)[n]) for n, w in weights(whole.model).items())
    for kind, tensors in whole.method.state_dict().items():
        assert all(torch.equal(again.method.state_dict()[kind][n], t) for n, t in tensors.items())


@pytest.mark.parametrize("name", ["elastic", "merge", "ema"])
def test_the_state_of_an_unfinished_task_is_nothing_to_a_new_one(name, engine, make_tasks):
    """A run that starts from a checkpoint within a task has its state, and is no resumed run."""
    tasks, results = make_tasks(3), []
    for load in (False, True):
        run = engine(name).train(tasks[0])
        old = engine(name).train(tasks[1]).train(tasks[2], range(2), ends=False).method.state_dict()
        if load:
            assert old
            run.method.load_state_dict(old)
        results.append(weights(run.train(tasks[1]).model))
    assert all(torch.equal(w, results[1][n]) for n, w in results[0].items())


def test_names_lists_and_methods_become_a_list():
    l2sp = L2SP(l2sp_alpha=3.0)
    made = make_methods([l2sp, "replay+ewc", None, ["none", [Merge()]]])
    assert [m.name for m in made] == ["l2sp", "replay", "ewc", "merge"] and made[0] is l2sp
    assert make_methods(None) == make_methods("none") == make_methods(Method()) == make_methods("") == []
    for bad, match in (("ewc+nothing", "Unknown method 'nothing'. Known: none, ewc"), (["ewc", EWC()], r"ewc \+ ewc")):
        with pytest.raises(ValueError, match=match):
            make_methods(bad)
    described = describe_methods(make_methods("l2sp+merge"))
    parts = [{"name": "l2sp", "l2sp_alpha": 0.1}, {"name": "merge", "merge_weight": 1.0}]
    assert described == {"name": "l2sp+merge", "l2sp_alpha": 0.1, "merge_weight": 1.0, "parts": parts}
    assert describe_methods([]) == {"name": "none"} and describe_methods([l2sp]) == {"name": "l2sp", "l2sp_alpha": 3.0}
    assert EWC().ewc_lambda == 0.1


BAD = {"ewc_lambda": -1, "ewc_gamma": 1.5, "ewc_mode": "both", "fisher_labels": "true", "fisher_samples": 0}
BAD |= {"lwf_lambda": -1, "lwf_temperature": 0, "l2sp_alpha": float("nan"), "anchor_strength": -1, "merge_weight": -1}
BAD |= {"prior_strength": 1.1, "ema_decay": 1, "interpolation_weight": 2, "replay_fraction": 0, "olora_lambda": -1}
BAD |= {f"rehearse_{name}": 0 for name in ("fraction", "temperature", "samples", "length", "top_k")}
BAD |= {"rehearse_lambda": -1, "rehearse_counts": "no"}


@pytest.mark.parametrize("name", METHODS)
def test_bad_hyperparameters(name):
    for hyperparameter, (values, _) in METHODS[name].ranges.items():
        bad = BAD[hyperparameter]
        with pytest.raises(ValueError, match=re.escape(f"{hyperparameter} must be {values}, got {bad!r}")):
            METHODS[name](**{hyperparameter: bad})


def test_set_ups_that_methods_refuse(engine, make_tasks):
    for name in ("lwf", "logit_adjustment"):
        run = engine(name)
        run.method.check(run.context(make_tasks(1)[0]), [])
        with pytest.raises(ValueError, match=f"'{name}' .*one (shared )?head"):
            run.method.check(run.context(make_tasks(1)[0], per_task_heads=True), [])


# ---- Pulls: EWC, L2-SP, elastic ----


def test_fisher_is_the_mean_over_examples_and_not_the_square_of_the_batchs_gradient(engine, make_tasks):
    run, task = engine(EWC(fisher_samples=1000, fisher_normalize=False)), make_tasks(1, rows=16)[0]
    run.train(task, range(2))
    model, expected = run.model.eval(), {n: torch.zeros_like(p) for n, p in run.model.named_parameters()}
    batched = {n: torch.zeros_like(p) for n, p in run.model.named_parameters()}
    for row in task.train_dataset:
        loss = F.cross_entropy(model(torch.tensor([row["input_ids"]])).logits, torch.tensor([row["labels"]]))
        for (n, _), g in zip(model.named_parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            expected[n] += g**2 / 16
            batched[n] += g / 16
    for n, f in run.method.importance.items():
        torch.testing.assert_close(f, expected[n], rtol=1e-4, atol=1e-9)
    assert sum(float((g**2).sum()) for g in batched.values()) < 0.8 * sum(float(f.sum()) for f in expected.values())


@pytest.mark.parametrize("mode", ["online", "summed"])
def test_ewc_over_several_tasks(mode, engine, make_tasks):
    """Against the definition: a sum of terms with one anchor each, or decayed importance with the last anchor."""
    run = engine(EWC(ewc_lambda=2.0, ewc_mode=mode, ewc_gamma=0.5, fisher_samples=8, fisher_normalize=False))
    terms = []
    for task in make_tasks(3):
        run.train(task, ends=False)
        fisher = {n: f.clone() for n, f in run.method.task_fisher(run.context(task)).items()}
        terms.append((fisher, weights(run.model)))
        run.train(task, ())
    torch.manual_seed(0)
    for p in run.model.parameters():
        p.data += 0.1 * torch.randn_like(p)
        p.grad = torch.zeros_like(p)
    run.method.before_step(run.model)
    last = terms[-1][1]
    for n, p in run.model.named_parameters():
        factors = zip(terms, (2.0, 2.0, 2.0) if mode == "summed" else (0.5, 1.0, 2.0))
        expected = sum(k * f[n] * (p.detach() - (a if mode == "summed" else last)[n]) for (f, a), k in factors)
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max() + 1e-12))
    assert EWC(fisher_normalize=True).fisher_normalize
    normalised = engine(EWC(fisher_samples=8)).train(make_tasks(1)[0]).method.importance
    assert float(torch.cat([f.flatten() for f in normalised.values()]).mean()) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pull_is_the_gradient_of_the_penalty(dtype):
    """`(lambda / 2) * sum F (w - a)^2` by autograd; some importances and anchors are missing."""
    torch.manual_seed(0)
    shapes = {"matrix": (301, 7), "vector": (13,), "scalar": (), "empty": (0, 3), "free": (2,), "plain": (4, 3)}
    model = torch.nn.ParameterDict({n: torch.randn(shape).to(dtype) for n, shape in shapes.items()})
    model["matrix"] = torch.nn.Parameter(torch.randn(7, 301).to(dtype).T)  # not contiguous
    method = EWC(ewc_lambda=0.7)
    method.anchor = {n: torch.randn(p.shape) for n, p in model.items() if n != "free"}
    method.importance = {n: torch.rand(p.shape) for n, p in model.items() if n != "plain"}
    for p in model.values():
        p.grad = torch.ones_like(p)
    method.before_step(model)
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    for n, p in model.items():
        w = p.detach().float().requires_grad_()
        penalty = 0.35 * (method.importance.get(n, torch.ones(())) * (w - method.anchor.get(n, w.detach())) ** 2).sum()
        torch.testing.assert_close(p.grad.float(), 1 + torch.autograd.grad(penalty, w)[0], **tolerance)


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("optim", ["classp", "sgd"])
def test_elastic_is_what_its_formula_says(optim, power):
    torch.manual_seed(0)
    model = {
        "rows": torch.randn(301, 7),
        "scalar": torch.ones(()),
        "new": torch.randn(3),
        "b": torch.ones(9).bfloat16(),
    }
    model = torch.nn.ParameterDict(model)
    memory = {n: torch.rand(p.shape) for n, p in model.items() if n != "new"}
    memory["rows"][torch.randperm(301)[40:]] = 0
    mean = float(torch.cat([s.flatten() for s in memory.values()]).mean())
    optimizer = CLASSP(model.values(), lr=0.1, power=power) if optim == "classp" else torch.optim.SGD(model.values())
    method = Elastic(anchor_strength=0.5)
    method.before_task(Context(model, None, accumulators=lambda: memory, optimizer=optimizer))
    assert {n: a.dtype for n, a in method.anchor.items()} == {n: p.dtype for n, p in model.items() if n != "new"}
    for n, s in memory.items() if optim == "classp" else ():
        optimizer.set_accumulator(model[n], s)
    before = {n: p.detach().clone() for n, p in model.items()}
    for p in model.values():
        p.data += 0.25
        p.grad = torch.ones_like(p)
    method.before_step(model)
    method.after_step(model)
    for n, p in model.items():
        w, s = before[n] + 0.25, memory.get(n, torch.zeros(()))
        pull, wanted = 0.5 * s / mean * (w - before[n]).float(), torch.ones(p.shape)
        if optim == "classp":
            c = 0.05 / mean * s / (s + 1e-6) ** (1 / power)
            w = w.float() - c / (1 + c) * (w - before[n]).float()
        else:
            wanted = wanted + pull
        tolerance = {"rtol": 0.01, "atol": 0.01} if n == "b" else {}
        torch.testing.assert_close(p.detach().float(), w.float(), **tolerance)
        torch.testing.assert_close(p.grad.float(), wanted, **tolerance)


def test_a_strength_without_a_memory_is_not_ignored_in_silence(engine, make_tasks, caplog):
    tasks, run = make_tasks(2), engine(Elastic(anchor_strength=100))
    run.train(tasks[0])
    assert caplog.text.count("Nothing is anchored") == 1 and "there is no memory" in caplog.text
    run.train(tasks[1])
    engine(Elastic(anchor_strength=0), "classp").train(tasks[0])
    assert caplog.text.count("Nothing is anchored") == 1
    with pytest.raises(ValueError, match="mean accumulator of 'w' is -1.0, not a number > 0"):
        run.method.check_state({"means": {"w": torch.tensor(-1.0)}}, run.model)


def test_elastic_is_stable_at_any_strength(engine, make_tasks):
    """A pull that entered the memory would feed on itself and end in infinity."""
    tasks, run = make_tasks(2), engine(Elastic(anchor_strength=1e6), "classp", lr=1e-3)
    start = weights(run.train(tasks[0]).model)
    run.train(tasks[1])
    for n, p in run.model.named_parameters():
        needed = run.accumulators()[n] > 1e-4  # weights without any memory are free
        torch.testing.assert_close(p.detach()[needed], start[n][needed], rtol=0, atol=2e-3)


# ---- Averages: merge, interpolation, EMA ----


@pytest.mark.parametrize("optim", ["classp", "adamw_torch"])
def test_merge_weighs_every_weight_by_both_memories(optim, engine, make_tasks):
    run, ends = engine(Merge(merge_weight=0.7), optim), []
    for task in make_tasks(3):
        run.train(task, ends=False)
        ends.append((weights(run.model), {n: s.clone() for n, s in run.accumulators().items()}))
        run.method.after_task(run.context(task))
        run.seen.append(task.name)
        ends.append((weights(run.model), ends[-1][1]))

    def normal(memory):
        mean = torch.cat([s.flatten() for s in memory.values()]).double().mean()
        return {n: s.double() / mean for n, s in memory.items()}

    assert all(torch.equal(w, ends[1][0][n]) for n, w in ends[0][0].items())
    for tasks_before, ((w_old, s_old), (w_new, s), (merged, _)) in ((1, ends[1:4]), (2, ends[3:6])):
        f_old, f_new = normal(s_old), normal({n: s[n] - s_old[n] for n in s})
        for n, w in merged.items():
            old, new = tasks_before * f_old[n], 0.7 * f_new[n]
            expected = torch.where(old + new > 0, (old * w_old[n] + new * w_new[n]) / (old + new), w_new[n].double())
            torch.testing.assert_close(w.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_memory_that_shrinks_merges_between_old_and_new_weights():
    """A uint8 memory, rounded at random, may come out smaller: a growth below 0 would leave the interval."""
    model = torch.nn.ParameterDict({"w": torch.zeros(3)})
    memory, method = {"w": torch.tensor([1.0, 1.0, 0.02])}, Merge()
    context = Context(model, None, ["first"], accumulators=lambda: memory)
    method.before_task(context)
    model["w"].data += 0.01
    memory["w"] = torch.tensor([1.5, 0.9, 0.0])
    method.after_task(context)
    assert (model["w"] >= 0).all() and (model["w"] <= 0.01).all() and model["w"][0] > 0 and model["w"][1] == 0


def test_interpolation_and_ema_against_their_definitions(engine, make_tasks):
    first, second = make_tasks(2)
    steps, plain = [], engine("none")
    old = weights(plain.train(first).model)
    plain.method.after_step = lambda model: steps.append(weights(model))
    new = weights(plain.train(second).model)
    average = old
    for now in steps:
        average = {n: 0.9 * average[n] + 0.1 * w for n, w in now.items()}
    interpolated = {n: old[n] + 0.3 * (new[n] - old[n]) for n in old}
    for method, wanted in ((Interpolate(interpolation_weight=0.3), interpolated), (EMA(ema_decay=0.9), average)):
        for n, w in weights(engine(method).train(first).train(second).model).items():
            torch.testing.assert_close(w, wanted[n], rtol=1e-4, atol=1e-6)


def test_balanced_ema_against_its_definition(engine, make_tasks):
    """Every tensor's share by its gradients; weights and gradients here are those of a run without a method."""
    first, second = make_tasks(2)
    steps, plain = [], engine("none")
    average = {n: w.double() for n, w in weights(plain.train(first).model).items()}

    def note(model):
        steps.append((weights(model), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}))

    plain.method.after_step = note
    plain.train(second)
    last, balanced = {}, 0
    for now, gradients in steps:
        for n, g in gradients.items():
            moved, turned = now[n].double() - average[n], g - last.get(n, g)
            a, b, c = (float(t.abs().sum()) for t in (moved, g, turned))
            share = 2 * (1 + b) / (a * c) if a * c else 2.0
            balanced += share < 1
            average[n] += (share if share < 1 else 0.1) * moved
        last = gradients
    assert balanced > 10
    for n, w in weights(engine(EMA(ema_decay=0.9, ema_balanced=True)).train(first).train(second).model).items():
        torch.testing.assert_close(w.double(), average[n], rtol=1e-4, atol=1e-6)


# ---- Outputs: Learning without Forgetting, logit adjustment, replay ----


def divergence(old, new, T=3.0):
    """lambda T^2 KL with lambda = 0.5, an item each."""
    p = (old.double() / T).softmax(-1)
    return 0.5 * T**2 * (p * (p.log() - (new.double() / T).log_softmax(-1))).sum(-1)


def test_lwf_is_the_divergence_from_the_model_as_the_task_found_it(engine, make_tasks, collator):
    first, second = make_tasks(2)
    run = engine(LwF(lwf_lambda=0.5, lwf_temperature=3.0)).train(first)
    batch = collator([second.train_dataset[i] for i in range(5)])
    old, start = run.model(**batch).logits, weights(run.model)
    # accelerate wraps forward in this way: a naive copy would call the new model
    run.model._original_forward = forward = run.model.forward
    run.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)

    def term(outputs, count):
        run.method.before_forward(run.model, batch)
        return run.method.loss_term(outputs, batch, count)

    for resumed in (False, True):
        run.method.before_task(run.context(second, start=start if resumed else None))
        with torch.no_grad():
            assert resumed or float(term(run.model(**batch), None)) == pytest.approx(0, abs=1e-6)
            for p in run.model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        outputs = run.model(**batch)
        expected = divergence(old, outputs.logits)
        assert float(term(outputs, None)) == pytest.approx(float(expected.mean()), rel=1e-3)
        for count in (20, torch.tensor(20)):  # of an accumulated batch of 20 examples this one has 5
            assert float(term(outputs, count)) == pytest.approx(float(expected.sum() / 20), rel=1e-3)
        assert term(outputs, None).requires_grad and not any(p.requires_grad for p in run.method.teacher.parameters())


@pytest.mark.parametrize("kind", ["causal", "encoder-decoder"])
def test_lwf_counts_the_positions_that_predict_a_label(kind):
    torch.manual_seed(0)
    small = {"vocab_size": 20, "pad_token_id": 0, "eos_token_id": 1}
    if kind == "causal":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**small, n_positions=16, n_embd=8, n_layer=1, n_head=2)
        ).eval()
    else:
        sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**small, **sizes)).eval()
    ids = torch.randint(2, 20, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][:, :4] = batch["labels"][1, 4:5] = -100  # one example has 2 labels, the other 1
    method = LwF(lwf_lambda=0.5, lwf_temperature=3.0)
    method.before_task(Context(model, None, ["first"]))
    old = model(**batch).logits
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    outputs = model(**batch)
    shift = kind == "causal"
    rows, positions = (batch["labels"] != -100).nonzero(as_tuple=True)
    expected = divergence(old, outputs.logits)[rows, positions - int(shift)]
    assert len(expected) == 3

    def term(count):
        method.before_forward(model, batch)
        return float(method.loss_term(outputs, batch, count))

    assert term(None) == pytest.approx(float(expected.mean()), rel=1e-3)
    assert term(30) == pytest.approx(float(expected.sum() / 30), rel=1e-3)
    batch["labels"][:] = -100
    assert term(None) == 0


def labelled(*counts, column="labels"):
    return Dataset.from_dict({column: [label for label, count in enumerate(counts) for _ in range(count)]})


def adjusted(method, model, *datasets, mixed=None):
    """The correction of the last task; `mixed`: what that is trained on."""
    for i, dataset in enumerate(datasets):
        trained = mixed if mixed is not None and i == len(datasets) - 1 else dataset
        context = Context(model, None, train_dataset=trained, task_dataset=dataset)
        method.before_task(context)
        correction = method.adjust_logits(torch.zeros(1, len(model.config.id2label)))[0]
        method.after_task(context)
    return correction


def test_logit_adjustment_corrects_by_the_change_of_the_label_frequencies(make_model):
    wanted = [[30, 20, 10], [5, 5, 50], [20, 20, 20]]
    frequencies = [torch.tensor([(c + 1) / 63 for c in counts]) for counts in wanted]
    for t in range(3):
        method = LogitAdjustment(prior_strength=0.25)
        found = adjusted(method, make_model(), *(labelled(*counts) for counts in wanted[: t + 1]))
        old = torch.stack(frequencies[:t]).mean(0) if t else frequencies[0]
        torch.testing.assert_close(found, 0.25 * torch.minimum(torch.zeros(3), frequencies[t].log() - old.log()))
        assert (found < 0).any() == (t > 0)
    torch.testing.assert_close(torch.stack(list(method.frequencies.values())), sum(frequencies))


def test_logit_adjustment_corrects_for_what_is_trained_on_and_remembers_the_tasks_own(make_model):
    tasks, replayed, plain = [labelled(50, 5, 5), labelled(0, 5, 5)], LogitAdjustment(), LogitAdjustment()
    without = adjusted(plain, make_model(), *tasks)
    within = adjusted(replayed, make_model(), *tasks, mixed=labelled(50, 10, 10))
    assert without[0] < 10 * within[0] < 0  # the label is there again
    assert all(torch.equal(f, plain.frequencies[label]) for label, f in replayed.frequencies.items())
    column = adjusted(LogitAdjustment(), make_model(), *tasks[:1], labelled(0, 5, 5, column="label"))
    assert torch.equal(column, without)


def test_labels_are_matched_by_name(make_model):
    """A changed head is an ordinary second run: what the memory does not know counts as one example."""
    model, method = make_model(), LogitAdjustment(prior_strength=1.0)
    adjusted(method, model, labelled(8, 8, 0))
    model.config.id2label = {0: "positive", 1: "new", 2: "neutral"}
    method.check_state(method.state_dict(), model)
    method.load_state_dict(method.state_dict())
    found = adjusted(method, model, labelled(8, 0, 1))
    expected = torch.tensor([0.0, 0.0, np.log((2 / 12) / (9 / 19))])  # neutral: 9 of 19, then 2 of 12
    torch.testing.assert_close(found, expected.float())
    known = {label: float(f) for label, f in method.frequencies.items()}
    assert known == pytest.approx(
        {"negative": 9 / 19, "neutral": 9 / 19 + 2 / 12, "positive": 1 / 19 + 9 / 12, "new": 1 / 12}
    )
    for bad in (torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(2)):
        with pytest.raises(ValueError, match="frequency of 'new' is .*, not a number > 0"):
            method.check_state({"frequencies": {"new": bad}}, model)
    for dataset in (Dataset.from_dict({"x": [1]}), IterableDataset.from_generator(lambda: iter([]))):
        with pytest.raises(
            ValueError, match="known length with a column 'labels' or 'label', got a .*Dataset with the"
        ):
            method.before_task(Context(model, None, train_dataset=dataset))


def test_replay_mixes_the_share_of_every_earlier_task():
    old = [Dataset.from_dict({"x": list(range(100 * k, 100 * k + 50))}) for k in (1, 2)]
    new = Dataset.from_dict({"x": [0] * 10})
    method = Replay(replay_fraction=0.1)
    mixed = method.extend_train_dataset(new, old)["x"]
    assert [sum(100 * k <= x < 100 * k + 50 for x in mixed) for k in (1, 2)] == [5, 5]
    assert len(mixed) == 20 and len(set(mixed)) == 11  # no example twice
    assert mixed == method.extend_train_dataset(new, old)["x"]
    assert mixed != Replay(replay_fraction=0.1, replay_seed=1).extend_train_dataset(new, old)["x"]
    # the buffer of a task does not change when more tasks come
    assert set(method.extend_train_dataset(new, old[:1])["x"]) <= set(mixed)


# ---- In ContinualTrainer ----


class Kill(transformers.TrainerCallback):
    """Stops the process's training where a kill would: in the middle of a task."""

    def __init__(self, task, step):
        self.left, self.step = task, step

    def on_train_begin(self, args, state, control, **kwargs):
        self.left -= 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.left == 0 and state.global_step == self.step:
            raise KeyboardInterrupt


def test_the_first_task_trains_freely(train, make_tasks, tmp_path):
    strong = [None, EWC(ewc_lambda=100), L2SP(l2sp_alpha=100), Elastic(anchor_strength=100), Merge(merge_weight=0)]
    strong += [
        Interpolate(interpolation_weight=0),
        EMA(ema_decay=0.99),
        LwF(lwf_lambda=100),
        LogitAdjustment(),
        Replay(),
        METHODS["pseudo_rehearsal"](rehearse_lambda=100),
    ]
    assert len(strong) == len(WITHOUT_ADAPTERS)
    finals = [
        weights(train(make_tasks(1), m, output_dir=str(tmp_path / str(i)))[0].model) for i, m in enumerate(strong)
    ]
    for other in finals[1:]:
        assert all(torch.equal(finals[0][n], w) for n, w in other.items())


@pytest.mark.parametrize(
    "method",
    ["elastic+merge", "lwf+logit_adjustment", "ema+interpolate", "l2sp+replay", "ewc", "pseudo_rehearsal", "balanced"],
)
@pytest.mark.parametrize("optim", ["classp", "adamw_torch"])
def test_a_resumed_sequence_is_the_undisturbed_one(method, optim, train, make_tasks, tmp_path):
    """Stopped in the middle of the second task, after a checkpoint, and begun again in a new trainer."""
    changes = {"optim": optim, "save_strategy": "steps", "save_steps": 3}

    def made():
        return EMA(ema_balanced=True) if method == "balanced" else method

    whole, expected = train(make_tasks(3), made(), output_dir=str(tmp_path / "whole"), **changes)
    with pytest.raises(KeyboardInterrupt):
        train(make_tasks(3), made(), given={"callbacks": [Kill(2, 5)]}, **changes)
    resumed, found = train(make_tasks(3), made(), resume_from_checkpoint="True", **changes)
    assert found["accuracy_matrix"] == expected["accuracy_matrix"]
    assert all(torch.equal(w, weights(resumed.model)[n]) for n, w in weights(whole.model).items())
    stored = [classp_hf.ContinualMemory.load(tmp_path / folder).tensors for folder in ("whole", "run")]
    assert stored[0].keys() == stored[1].keys() and all(torch.equal(t, stored[1][n]) for n, t in stored[0].items())


def test_memories_hold_every_methods_state_and_no_example(train, make_tasks, tmp_path):
    trainer, results = train(make_tasks(2), [L2SP(), "logit_adjustment", Replay(replay_fraction=0.25)])
    assert len(trainer.train_dataset) == 64 + 16
    memory = classp_hf.ContinualMemory.load(tmp_path / "run")
    assert memory.kinds() == ["l2sp.anchor", "logit_adjustment.frequencies", "samples"]
    assert memory.metadata["method"]["name"] == results["method"]["name"] == "l2sp+logit_adjustment+replay"
    trainer, results = train(
        make_tasks(1), None, "ClasspTrainer", {"consolidation": "both", "logit_adjustment": True},
        output_dir=str(tmp_path / "b"),
    )  # fmt: skip
    assert results["method"]["name"] == "elastic+merge+logit_adjustment"
