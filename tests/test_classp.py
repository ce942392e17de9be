"""CLASSP against the slow oracle, on every path that a step can take; its state, its errors, its sample for
`density`."""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from reference_classp import ReferenceCLASSP, ReleasedCLASSP
from torch import nn

from classp_hf import CLASSP
from classp_hf.optim import density as density_module
from classp_hf.optim import step as step_module
from classp_hf.optim.density import cuts_for_density

# One table drives every path: (kwargs, desc).
TABLE = [
    ({}, "default"),
    ({"power": 1.0, "eps": 1e-8}, "p=1"),
    ({"power": 1.5, "eps": 1e-3}, "fractional power"),
    ({"power": 4.0, "eps": 1e-3}, "high power"),
    ({"power": 0.5, "eps": 1e-3}, "power below 1"),
    ({"threshold": 0.5}, "threshold"),
    ({"threshold": 0.5, "power": 1.0}, "threshold and p=1"),
    ({"threshold": 0.3, "apply_decay": False}, "accumulate, plain SGD"),
    ({"weight_decay": 0.1}, "decoupled weight decay"),
    ({"weight_decay": 0.1, "threshold": 0.5, "power": 1.0}, "weight decay below the threshold too"),
    ({"maximize": True}, "maximize"),
    ({"eps": 0.5}, "large eps"),
]
IDS = [desc for _, desc in TABLE]
SHAPES = [(7,), (5, 3), (1,), (2, 3, 4), (), (0, 3), (9, 31)]
LR = 0.05
PATHS = ["default", "unfused", "foreach", "one by one", "unread", "unread unfused"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Keywords of one way to take a step; blocks are small, so that tensors are split and share calls.

    `unread`: as on a GPU, where the host does not look at gradients.
    """
    monkeypatch.setattr(step_module, "CPU_CALL", 256)
    monkeypatch.setattr(step_module, "CALL", 512)
    return take(request.param, monkeypatch)


def take(path, monkeypatch):
    if path.startswith("unread"):
        monkeypatch.setattr(step_module, "reads_back", lambda device: False)
    if path.endswith("unfused"):
        return {"fused": False}
    return {"foreach": {"foreach": True}, "one by one": {"foreach": False}}.get(path, {})


def random_gradients(shape, steps, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        g = rng.normal(size=shape)
        yield np.where(rng.random(shape) < 0.2, 0.0, g).astype(np.float32)  # some exact zeros


def run_against_oracle(kwargs, path, dtype=torch.float32, steps=30, layout=lambda t: t):
    """Steps of CLASSP on tensors of all SHAPES beside the oracle."""
    rng = np.random.default_rng(1)
    starts = [torch.tensor(rng.normal(size=s), dtype=torch.float32).to(dtype) for s in SHAPES]
    params = [nn.Parameter(layout(w.clone())) for w in starts]
    optimizer = CLASSP(params, lr=LR, **path, **kwargs)
    oracles = [ReferenceCLASSP(w.double().numpy(), LR, **kwargs) for w in starts]
    streams = [random_gradients(s, steps, seed=i) for i, s in enumerate(SHAPES)]
    for _ in range(steps):
        for p, oracle, stream in zip(params, oracles, streams):
            g = torch.tensor(next(stream)).to(dtype)
            p.grad = layout(g.clone())
            oracle.step(g.double().numpy())
        optimizer.step()
    return params, optimizer, oracles


def assert_follows(params, optimizer, oracles, rtol=2e-5, atol=2e-6):
    for p, oracle in zip(params, oracles, strict=True):
        np.testing.assert_allclose(p.detach().double().numpy(), oracle.w, rtol=rtol, atol=atol)
        s = optimizer.accumulator(p)
        assert s.dtype is torch.float32 and s.shape == p.shape
        # the state holds eps beside s
        np.testing.assert_allclose(s.numpy(), oracle.s, rtol=1e-5, atol=1e-5 * oracle.eps)


@pytest.mark.parametrize(("kwargs", "desc"), TABLE, ids=IDS)
def test_matches_the_pseudo_code(kwargs, desc, path):
    assert_follows(*run_against_oracle(kwargs, path))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float64, 1e-7)]
)
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_other_dtypes_compute_and_keep_state_in_float32(dtype, tolerance, power, path):
    params, optimizer, oracles = run_against_oracle({"power": power}, path, dtype, steps=20)
    assert all(p.dtype is dtype and optimizer.state[p]["accumulator"].dtype is torch.float32 for p in params)
    # each step rounds a weight of magnitude below 4 once
    assert_follows(params, optimizer, oracles, rtol=0, atol=20 * 2 * tolerance)


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim > 1 else t


def with_gaps(t):
    wide = torch.full((*t.shape, 2), 7.0, dtype=t.dtype)
    wide[..., 0] = t
    return wide[..., 0]


@pytest.mark.parametrize("layout", [transposed, with_gaps])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "uint8"])
def test_non_contiguous_parameters(layout, state_dtype, path):
    kwargs = {"threshold": 0.5}
    params, optimizer, oracles = run_against_oracle(kwargs, {**path, "state_dtype": state_dtype}, layout=layout)
    assert not params[1].is_contiguous()
    if state_dtype == "float32":
        assert_follows(params, optimizer, oracles)
    plain, other, _ = run_against_oracle(kwargs, {**path, "state_dtype": state_dtype})
    for p, q in zip(params, plain):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert torch.equal(optimizer.accumulator(p), other.accumulator(q))


def test_a_gradient_of_another_layout(path):
    p, q = nn.Parameter(torch.ones(5, 40)), nn.Parameter(torch.ones(5, 40))
    optimizer = CLASSP([p, q], lr=LR, **path)
    p.grad = torch.randn(40, 5).T
    q.grad = p.grad.contiguous()
    optimizer.step()
    assert torch.equal(p, q) and torch.equal(optimizer.accumulator(p), optimizer.accumulator(q))


def test_tensor_lr_and_float_lr_agree_and_schedulers_drive_both(path):
    for shape in ((), (1,)):
        a, b = nn.Parameter(torch.ones(50)), nn.Parameter(torch.ones(50))
        optimizers = [CLASSP([a], lr=0.1, **path), CLASSP([b], lr=torch.full(shape, 0.1), **path)]
        schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in optimizers]
        for g in random_gradients((50,), 10):
            for p, o, scheduler in zip((a, b), optimizers, schedulers):
                p.grad = torch.tensor(g)
                o.step()
                scheduler.step()
        assert float(optimizers[1].param_groups[0]["lr"]) == pytest.approx(0.1 / 11)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert not torch.equal(a, torch.ones(50))


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"power": 1.0}, {"threshold": 0.5}, {"density": 0.3}, {"lr": torch.tensor(LR)}, {"weight_decay": 0.1}],
)
def test_a_compiled_step_follows_too_and_skips_bad_gradients(kwargs):
    torch._dynamo.reset()
    p, q = nn.Parameter(torch.ones(9, 31)), nn.Parameter(torch.ones(9, 31))
    optimizer, plain = CLASSP([p], **{"lr": LR, **kwargs}), CLASSP([q], **{"lr": LR, **kwargs})
    step = torch.compile(optimizer.step, backend="eager")
    for i, g in enumerate(random_gradients((9, 31), 6)):
        p.grad, before = torch.tensor(g), p.detach().clone()
        if i == 3:
            p.grad[2, 2] = torch.nan
        step()
        if i == 3:
            assert torch.equal(p, before)
        else:
            q.grad = p.grad.clone()
            plain.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert optimizer.skipped_steps() == 1 and plain.skipped_steps() == 0


def test_power_2_without_threshold_is_adagrad_to_the_bit():
    eps = 1e-10
    a = nn.Parameter(torch.randn(10_000, generator=torch.Generator().manual_seed(0)))
    b = nn.Parameter(a.detach().clone())
    ours = CLASSP([a], lr=1e-2, power=2, eps=eps)
    theirs = torch.optim.Adagrad([b], lr=1e-2, initial_accumulator_value=eps, eps=0, fused=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        a.grad = torch.randn(10_000, generator=generator)
        b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(a, b) and torch.equal(ours.state[a]["accumulator"], theirs.state[b]["sum"])


def test_where_the_released_code_parts_from_algorithm_1():
    w, g = np.ones(4), np.array([0.01, 0.1, 1.0, 2.0])
    paper, released = ReferenceCLASSP(w, 0.1, 0.5, 2.0), ReleasedCLASSP(w, 0.1, 0.5, 2.0)
    paper.step(g)
    released.step(g)
    assert (paper.w != w).tolist() == [False, False, True, True]  # coordinates pass the threshold one by one
    assert (released.w != w).all()  # one Boolean for the tensor: a threshold below 1 does nothing
    np.testing.assert_allclose(paper.s, [0, 0, 1, 4])
    np.testing.assert_allclose(released.s, np.abs(g))  # the power is lost
    p = nn.Parameter(torch.tensor(w, dtype=torch.float32))
    p.grad = torch.tensor(g, dtype=torch.float32)
    CLASSP([p], lr=0.1, threshold=0.5, power=2.0).step()
    np.testing.assert_allclose(p.detach().numpy(), paper.w, rtol=1e-6)


def test_groups_keep_their_own_hyperparameters(path):
    first, second = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
    settings = [
        {"lr": 0.1, "power": 1.0, "threshold": 0.2},
        {"lr": 0.3, "power": 2.0, "weight_decay": 0.1, "eps": 0.1},
    ]
    optimizer = CLASSP([{"params": [first], **settings[0]}, {"params": [second], **settings[1]}], **path)
    assert [group["offset"] for group in optimizer.param_groups] == [0.0, 0.1]
    oracles = [ReferenceCLASSP(np.ones(6), **s) for s in settings]
    for g in random_gradients((6,), 30):
        for p, oracle in zip((first, second), oracles):
            p.grad = torch.tensor(g)
            oracle.step(g)
        optimizer.step()
    assert_follows((first, second), optimizer, oracles)


# ---------------------------------------------------------------------------------------------- threshold and density


def test_the_threshold_is_strict():
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([0.5, 0.50001, -0.50001])
    CLASSP([p], lr=1.0, threshold=0.25).step()
    assert (p != 0).tolist() == [False, True, True]


def passing(g, density):
    """Share of the nonzero coordinates of `g` that the cut lets through."""
    (cut,) = cuts_for_density([g], density)
    nonzero = int(g.count_nonzero())
    return int((g.abs() > cut).sum()) / nonzero if nonzero else 0.0


def embedding_gradient(touched, seed, shape=(30_522, 384)):
    generator = torch.Generator().manual_seed(seed)
    g = torch.zeros(shape)
    rows = torch.randperm(shape[0], generator=generator)[:touched]
    scale = torch.exp(torch.randn(touched, 1, generator=generator))  # frequent tokens have larger gradients
    g[rows] = scale * torch.randn(touched, shape[1], generator=generator)
    return g


@pytest.mark.parametrize("touched", [3, 60, 500, 30_522])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.5])
def test_density_holds_where_few_rows_are_touched(touched, density):
    error = 5 * math.sqrt(density * (1 - density) / density_module.SAMPLE) + 1 / density_module.SAMPLE
    for seed in range(3 if touched < 1000 else 1):
        assert passing(embedding_gradient(touched, seed), density) == pytest.approx(density, abs=error)


@pytest.mark.parametrize("shape", [(30_000, 33), (500, 768), (70_001,), (64, 3, 3, 100), (40_000, 2), (256, 64, 3, 3)])
@pytest.mark.parametrize("filled", [1.0, 0.3, 0.01])
def test_density_holds_for_dense_and_elementwise_sparse_gradients(shape, filled):
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < filled)
    for layout in (lambda t: t, transposed):
        for density in (0.01, 0.1):
            # nonzero ones in the sample: of a row that was found nonzero by one coordinate, `filled` of the others
            found = max(1, filled * min(density_module.SAMPLE, g.numel() * filled))
            error = 5 * math.sqrt(density * (1 - density) / found) + 2 / found
            assert passing(layout(g), density) <= density + error
            if density * found > 20:
                assert passing(layout(g), density) >= density - error


def test_density_fails_closed_where_the_sample_finds_nothing():
    g = torch.zeros(1000, 384)
    g[5, 7] = 1.0  # not where anything is looked at
    assert cuts_for_density([g], 0.5).tolist() == [math.inf]
    p = nn.Parameter(torch.zeros(1000, 384))
    p.grad = g
    optimizer = CLASSP([p], lr=1.0, density=0.5)
    assert optimizer.update_density() == 0
    optimizer.step()
    assert not p.any() and not optimizer.accumulator(p).any()
    CLASSP([p], lr=1.0, density=1.0).step()  # asks for no sample
    assert p[5, 7] != 0


def test_dead_columns_do_not_hide_rows():
    """The gradient of a layer after a ReLU: whole columns are zero."""
    g = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    g[:, :60] = 0
    assert passing(g, 0.1) == pytest.approx(0.1, abs=0.1)
    assert passing(g, 0.1) > 0


def test_density_of_small_tensors_is_exact():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 9, 10, 300, 4096):
        for density in (1 / 3, 0.1, 0.7):
            g = torch.randn(n, generator=generator)
            g[: n // 2] = 0
            expected = int(density * (n - n // 2) + 1e-6)
            assert round(passing(g, density) * (n - n // 2)) == expected


def test_the_shortcut_for_dense_gradients_takes_a_like_sample(monkeypatch):
    """It is not taken when compiled; both samples are spread over all rows and columns."""
    g = torch.arange(1.0, 700 * 33 + 1).view(700, 33)
    short = density_module._sample(g)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for sample in (short, density_module._sample(g)):
        assert density_module.SAMPLE <= len(sample) == len(sample.unique())
        assert len((sample // 33).unique()) > 650 and len((sample % 33).unique()) == 33
        assert torch.quantile(sample, 0.9) == pytest.approx(0.9 * g.numel(), rel=0.01)


def test_density_is_the_share_of_nonzero_gradients_that_update(path):
    torch.manual_seed(0)
    # the second one is like an embedding of which a batch touched few rows
    dense, rows, empty = (nn.Parameter(torch.zeros(s)) for s in ((300, 60), (3000, 32), (0, 4)))
    for p in (dense, rows, empty):
        p.grad = torch.randn_like(p)
    rows.grad[torch.arange(3000) % 7 > 0] = 0
    optimizer = CLASSP([dense, rows, empty], lr=1.0, density=0.1, **path)
    reported = optimizer.update_density()
    optimizer.step()
    moved = [p.detach() != 0 for p in (dense, rows)]
    assert reported == pytest.approx(sum(int(m.sum()) for m in moved) / (300 * 60 + 3000 * 32))
    for p, m in zip((dense, rows), moved):
        nonzero = p.grad != 0
        assert float(m.sum() / nonzero.sum()) == pytest.approx(0.1, abs=0.04)
        assert p.grad[m].abs().min() > p.grad[nonzero & ~m].abs().max()  # the largest ones, and only those


# ----------------------------------------------------------------------------------------------- what changes nothing


def test_zero_gradient_changes_nothing_but_allocates_state(path):
    for kwargs in ({}, {"power": 1.0}, {"power": 0.5, "eps": 1e-15}, {"density": 0.5}, {"state_dtype": "uint8"}):
        p = nn.Parameter(torch.randn(5, 20))
        before = p.detach().clone()
        p.grad = torch.zeros(5, 20)
        optimizer = CLASSP([p], lr=1.0, **path, **kwargs)
        optimizer.step()
        assert torch.equal(p, before) and "accumulator" in optimizer.state[p]
        p.grad = torch.randn(5, 20)
        optimizer.step()
        before, s = p.detach().clone(), optimizer.accumulator(p).clone()
        assert s.any()
        p.grad = torch.zeros(5, 20)
        optimizer.step()
        assert torch.equal(p, before) and torch.equal(optimizer.accumulator(p), s)


def test_missing_gradient_and_empty_parameter(path):
    used, unused, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0, 4))
    used.grad, empty.grad = torch.ones(3), torch.ones(0, 4)
    for kwargs in ({}, {"density": 0.5}):
        optimizer = CLASSP([used, unused, empty], lr=0.1, **kwargs, **path)
        optimizer.step()
        assert unused not in optimizer.state and not optimizer.accumulator(unused).any()
        assert optimizer.accumulator(empty).shape == (0, 4)
    assert torch.equal(unused.detach(), torch.ones(3))


# ------------------------------------------------------------------------------------------------------- bad gradients

BAD = [math.nan, math.inf, -math.inf, 1e20, -1e25]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"weight_decay": 0.1}, {"threshold": 1e-3}, {"density": 0.9}, {"power": 4.0}, {"state_dtype": "uint8"}],
)
def test_bad_gradients_reach_neither_weights_nor_memory(value, kwargs, path):
    """Not finite, or so large that |g|^p overflows float32."""
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(30, 30))
    optimizer = CLASSP([good, bad], lr=0.1, **path, **kwargs)
    good.grad, bad.grad = torch.tensor([1.0, 2.0, 3.0]), torch.rand(30, 30) + 0.5
    optimizer.step()
    before = [p.detach().clone() for p in (good, bad)] + [optimizer.accumulator(p).clone() for p in (good, bad)]
    bad.grad[1, 1] = value
    if step_module.reads_back(good.device):
        with pytest.raises(RuntimeError, match="NaN, infinite or overflowing gradients. Nothing was updated"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped_steps() == 1
    after = [good, bad, *map(optimizer.accumulator, (good, bad))]
    assert all(map(torch.equal, after, before))
    assert bad.isfinite().all() and optimizer.accumulator(bad).isfinite().all()
    good.grad, bad.grad = torch.ones(3), torch.ones(30, 30)
    optimizer.step()
    assert optimizer.skipped_steps() == (0 if step_module.reads_back(good.device) else 1)


def test_large_gradients_that_do_not_overflow_are_good(path):
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = CLASSP([{"params": [p], "power": 1.0}, {"params": [q], "power": 2.0}], lr=1e-3, **path)
    p.grad, q.grad = torch.full((3,), 1e18 / 2), torch.full((3,), 1e15)  # of p the root is not taken
    optimizer.step()
    for w in (p, q):
        torch.testing.assert_close(w.detach(), torch.full((3,), -1e-3))


def test_symmetric_large_gradients_do_not_cancel():
    p = nn.Parameter(torch.zeros(2, 300))
    p.grad = torch.full((2, 300), 1e20)
    p.grad[1] *= -1
    with pytest.raises(RuntimeError, match="overflowing"):
        CLASSP([p]).step()
    assert not p.any()


def test_sparse_gradients_and_complex_parameters():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients.*sparse=False"):
        CLASSP(embedding.parameters()).step()
    with pytest.raises(ValueError, match="complex parameters, got one of dtype torch.complex64"):
        CLASSP([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def test_a_grad_scaler_sees_that_the_optimizer_does_not_skip_by_itself():
    """torch's GradScaler then unscales and skips, and accelerate hears of it."""
    assert not hasattr(CLASSP, "_step_supports_amp_scaling")


# --------------------------------------------------------------------------------------------------------------- state


def trained(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    model = nn.Linear(8, 4).to(dtype)
    optimizer = CLASSP(model.parameters(), lr=0.01, **kwargs)
    for seed in range(3):
        step_once(model, optimizer, seed)
    return model, optimizer


def step_once(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_save_and_load_continue_to_the_same_weights(dtype, power):
    model, optimizer = trained(dtype, power=power)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    restored = CLASSP(twin.parameters(), lr=0.5, eps=0.1)  # the state brings the hyperparameters
    restored.load_state_dict(torch.load(file, weights_only=True))  # as Trainer loads it
    for p, q in zip(model.parameters(), twin.parameters()):
        assert restored.state[q]["accumulator"].dtype is torch.float32
        assert torch.equal(restored.accumulator(q), optimizer.accumulator(p)) and optimizer.accumulator(p).any()
    step_once(model, optimizer, 9)
    step_once(twin, restored, 9)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p, q)


def test_a_state_of_an_older_version_goes_on():
    """It holds s without eps, and its groups have no offset."""
    model, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["offset"], group["foreach"]
    for i, p in enumerate(model.parameters()):
        state["state"][i]["accumulator"] = optimizer.accumulator(p).clone()
    twin = copy.deepcopy(model)
    restored = CLASSP(twin.parameters(), lr=0.01)
    restored.load_state_dict(state)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(optimizer.accumulator(p), restored.accumulator(q))
    step_once(model, optimizer, 9)
    step_once(twin, restored, 9)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "uint8"])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_set_accumulator_is_what_accumulator_gives(state_dtype, power):
    p, values = nn.Parameter(torch.ones(4, 100)), torch.arange(400.0).view(4, 100)
    optimizer = CLASSP([p], lr=0.1, power=power, state_dtype=state_dtype, eps=0.5)
    assert not optimizer.accumulator(p).any()
    given = values.clone()
    optimizer.set_accumulator(p, given)
    gap = {"float32": 0, "bfloat16": 2**-7, "uint8": 2**-4}[state_dtype]
    torch.testing.assert_close(optimizer.accumulator(p), values, rtol=gap, atol=1e-4)
    held = optimizer.accumulator(p).clone()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(given, values)  # is not the state
    torch.testing.assert_close(p.detach(), 1 - 0.1 / (held + 1 + 0.5) ** (1 / power))


def test_a_changed_eps_or_power_does_not_change_the_memory():
    p = nn.Parameter(torch.ones(5))
    optimizer = CLASSP([p], lr=0.1, eps=0.5)
    p.grad = torch.arange(5.0)
    optimizer.step()
    optimizer.param_groups[0]["eps"] = 0.25
    torch.testing.assert_close(optimizer.accumulator(p), p.grad**2)
    optimizer.step()
    torch.testing.assert_close(optimizer.accumulator(p), 2 * p.grad**2)
    optimizer.param_groups[0]["power"] = 1.0
    optimizer.step()
    torch.testing.assert_close(optimizer.accumulator(p), 2 * p.grad**2 + p.grad)


def test_loading_does_not_share_memory_with_the_state_dict():
    model, optimizer = trained()
    restored = CLASSP(copy.deepcopy(model).parameters(), lr=0.01)
    restored.load_state_dict(optimizer.state_dict())
    before = [s["accumulator"].clone() for s in optimizer.state.values()]
    for s in restored.state.values():
        s["accumulator"].add_(1)
    assert all(torch.equal(a, s["accumulator"]) for a, s in zip(before, optimizer.state.values()))


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_continue_alike(copier):
    model, optimizer = trained()
    twin, twin_optimizer = copier((model, optimizer))
    step_once(model, optimizer, 9)
    step_once(twin, twin_optimizer, 9)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p, q)
    assert twin_optimizer.skipped_steps() == 0


def test_state_allocated_for_distributed_checkpoints():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = nn.Linear(4, 2)
    before = copy.deepcopy(model.state_dict())
    optimizer = CLASSP(model.parameters(), lr=0.1, threshold=1.0, weight_decay=0.1)
    state = get_optimizer_state_dict(model, optimizer)  # initialises the state with a zero-gradient step
    assert set(state["state"]) == {"weight", "bias"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.fixture
def mesh():
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


@pytest.mark.parametrize("kwargs", [{}, {"power": 1.0}, {"density": 0.2}, {"state_dtype": "bfloat16"}])
def test_sharded_parameters_take_the_step_of_whole_ones(kwargs, path, mesh):
    """One rank of one; tests/test_distributed.py has several, and empty shards."""
    from torch.distributed.tensor import DTensor, Shard

    def sharded(t):
        return DTensor.from_local(t.clone(), mesh, [Shard(0)])

    starts = [torch.randn(100, 70), torch.randn(5), torch.zeros(0, 3)]
    params, plain = [nn.Parameter(sharded(w)) for w in starts], [nn.Parameter(w.clone()) for w in starts]
    optimizer, other = CLASSP(params, lr=LR, **path, **kwargs), CLASSP(plain, lr=LR, **path, **kwargs)
    for _ in range(3):
        for p, q in zip(params, plain):
            q.grad = torch.randn_like(q)
            p.grad = sharded(q.grad)
        assert optimizer.update_density() == other.update_density()
        optimizer.step()
        other.step()
        for p, q in zip(params, plain):
            assert torch.equal(p.full_tensor(), q)
            assert torch.equal(optimizer.accumulator(p).full_tensor(), other.accumulator(q))
    before = params[0].full_tensor().clone()
    params[0].grad = sharded(torch.full((100, 70), math.nan))
    if step_module.reads_back(torch.device("cpu")):
        with pytest.raises(RuntimeError, match="NaN, infinite"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped_steps() == 1
    assert torch.equal(params[0].full_tensor(), before)
    with pytest.raises(ValueError, match="uint8' is not supported on sharded"):
        CLASSP(params, state_dtype="uint8").step()


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"lr": -1.0}, r"lr must be finite and >= 0, got -1.0"),
        ({"lr": float("nan")}, r"lr must be finite and >= 0, got nan"),
        ({"lr": torch.ones(2)}, r"lr must be a float or a 1-element tensor"),
        ({"threshold": -1e-3}, r"threshold must be finite and >= 0, got -0.001"),
        ({"threshold": float("inf")}, r"threshold must be finite"),
        ({"power": 0.0}, r"power must be finite and > 0, got 0.0"),
        ({"power": float("inf")}, r"power must be finite"),
        ({"eps": 0.0}, r"eps must be finite and > 0"),
        ({"eps": 1e-46}, r"eps must be finite and > 0 in float32"),
        ({"eps": 1e-30, "power": 0.5}, r"eps must be finite and > 0 in float32 \(at least 1.08e-19\), got 1e-30"),
        ({"weight_decay": -0.1}, r"weight_decay must be finite and >= 0, got -0.1"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"foreach": True, "fused": True}, r"fused=True is PyTorch's Adagrad.* no foreach, got .* foreach=True"),
        ({"fused": True, "power": 1.0}, r"fused=True is PyTorch's Adagrad.* needs power=2.*got power=1.0"),
        ({"fused": True, "apply_decay": False}, r"fused=True .* apply_decay=False"),
        ({"fused": True, "state_dtype": "uint8"}, r"fused=True .* state_dtype='uint8'"),
        ({"state_dtype": "int4"}, r"state_dtype must be one of float32, bfloat16, uint8, got 'int4'"),
        ({"density": 0.1, "threshold": 1e-6}, r"threshold=1e-06 and density=0.1 exclude each other"),
    ],
)
def test_bad_hyperparameters(kwargs, match):
    with pytest.raises(ValueError, match=match):
        CLASSP([nn.Parameter(torch.ones(1))], **kwargs)
    good = CLASSP([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=match):
        good.add_param_group({"params": [nn.Parameter(torch.ones(1))], **kwargs})
    assert len(good.param_groups) == 1


def test_fused_where_there_is_none():
    with pytest.raises(ValueError, match="fused=True is PyTorch's Adagrad .* on meta. Leave fused out"):
        CLASSP([nn.Parameter(torch.ones(1, device="meta"))], fused=True)


def test_closure_runs_with_gradients():
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = CLASSP([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert p.item() == pytest.approx(1.9)


def test_importing_the_optimizer_loads_neither_transformers_nor_triton():
    code = (
        "import sys, classp_hf.optim; "
        "loaded = {'transformers', 'triton', 'datasets', 'accelerate', 'peft'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
