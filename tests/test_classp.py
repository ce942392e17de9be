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
from classp_hf.optim import classp, kernels
from classp_hf.optim.classp import _sample_stride, _selected_quantile, _sorted_quantile

# One table drives every path: (kwargs, desc).
TABLE = [
    ({}, "default"),
    ({"power": 1.0, "eps": 1e-8}, "p=1"),
    ({"power": 1.5, "eps": 1e-3}, "fractional power"),
    ({"power": 4.0, "eps": 1e-3}, "high power"),
    ({"threshold": 0.5}, "threshold"),
    ({"threshold": 0.5, "power": 2.0}, "threshold and p=2"),
    ({"threshold": 0.3, "apply_decay": False}, "accumulate, plain SGD"),
    ({"weight_decay": 0.1}, "decoupled weight decay"),
    ({"weight_decay": 0.1, "threshold": 0.5, "power": 2.0}, "weight decay below the threshold too"),
    ({"maximize": True}, "maximize"),
    ({"eps": 0.5}, "large eps"),
]
IDS = [desc for _, desc in TABLE]
SHAPES = [(7,), (5, 3), (1,), (2, 3, 4), (), (0, 3), (13, 41)]
LR = 0.05
PATHS = [{"fused": False}, {"foreach": True}, {"fused": True}]
every_path = pytest.mark.parametrize("path", PATHS, ids=["torch", "foreach", "compiled"])


def random_gradients(shape, steps, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        g = rng.normal(size=shape)
        yield np.where(rng.random(shape) < 0.2, 0.0, g).astype(np.float32)  # some exact zeros


def run_against_oracle(kwargs, path, dtype=torch.float32, lr=LR, steps=60, layout=lambda t: t):
    """60 steps of CLASSP on tensors of all SHAPES beside the oracle."""
    rng = np.random.default_rng(1)
    starts = [torch.tensor(rng.normal(size=s), dtype=torch.float32).to(dtype) for s in SHAPES]
    params = [nn.Parameter(layout(w.clone())) for w in starts]
    optimizer = CLASSP(params, lr=lr, **path, **kwargs)
    oracles = [ReferenceCLASSP(w.double().numpy(), float(lr), **kwargs) for w in starts]
    streams = [random_gradients(s, steps, seed=i) for i, s in enumerate(SHAPES)]
    for _ in range(steps):
        for p, oracle, stream in zip(params, oracles, streams):
            g = torch.tensor(next(stream)).to(dtype)
            p.grad = layout(g.clone())
            oracle.step(g.double().numpy())
        optimizer.step()
    return params, optimizer, oracles


@every_path
@pytest.mark.parametrize(("kwargs", "desc"), TABLE, ids=IDS)
def test_matches_the_pseudo_code(kwargs, desc, path):
    params, optimizer, oracles = run_against_oracle(kwargs, path)
    for p, oracle in zip(params, oracles):
        np.testing.assert_allclose(p.detach().numpy(), oracle.w, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(optimizer.state[p]["accumulator"].numpy(), oracle.s, rtol=1e-5)


def test_foreach_goes_over_the_model_in_batches(monkeypatch):
    """Its temporaries are of a batch's size, not the model's."""
    params, _, _ = run_against_oracle({"threshold": 0.5}, {"foreach": True}, steps=2)
    monkeypatch.setattr(classp, "_FOREACH_BATCH", 30)
    sizes = [[p.numel() for p in batch] for batch in classp._batches(params, True)]
    assert sizes == [[7, 15, 1], [24, 1, 0], [533]]
    in_batches, _, _ = run_against_oracle({"threshold": 0.5}, {"foreach": True}, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(params, in_batches))


@every_path
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-10), (torch.float64, 1e-6)]
)
def test_other_dtypes_compute_and_keep_state_in_float32(dtype, tolerance, path):
    params, optimizer, oracles = run_against_oracle({"power": 2.0}, path, dtype, steps=50)
    for p, oracle in zip(params, oracles):
        s = optimizer.state[p]["accumulator"]
        assert p.dtype is dtype
        assert s.dtype is torch.float32
        np.testing.assert_allclose(s.double().numpy(), oracle.s, rtol=1e-5)
        # each step rounds the weight once: 50 roundings of at most half an ulp
        np.testing.assert_allclose(p.detach().double().numpy(), oracle.w, atol=25 * tolerance * 2)


@every_path
def test_non_contiguous_parameters(path):
    def transposed(t):
        return t.T.contiguous().T if t.ndim == 2 else t

    params, _, oracles = run_against_oracle({"threshold": 0.5}, path, layout=transposed)
    assert not params[1].is_contiguous()
    for p, oracle in zip(params, oracles):
        np.testing.assert_allclose(p.detach().numpy(), oracle.w, rtol=2e-5, atol=2e-6)


@every_path
def test_tensor_lr_and_float_lr_agree_and_schedulers_drive_both(path):
    a, b = nn.Parameter(torch.ones(50)), nn.Parameter(torch.ones(50))
    optimizers = [CLASSP([a], lr=0.1, **path), CLASSP([b], lr=torch.tensor(0.1), **path)]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in optimizers]
    for g in random_gradients((50,), 10):
        for p, o, scheduler in zip((a, b), optimizers, schedulers):
            p.grad = torch.tensor(g)
            o.step()
            scheduler.step()
    assert float(optimizers[1].param_groups[0]["lr"]) == pytest.approx(0.1 / 11)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rows_with_gradient", ["all", "few", "none"])
@pytest.mark.parametrize("kwargs", [{}, {"power": 1.0}, {"power": 3.0, "threshold": 1e-6}, {"density": 0.2}, {"weight_decay": 0.1}, {"lr": torch.tensor(LR)}, {"apply_decay": False}])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_step_gives_what_pytorchs_operations_give(kwargs, rows_with_gradient, dtype):
    """To the bit with p=1; otherwise to the last place, as the two square roots are not of one library."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3001, 51, generator=generator).to(dtype)
    gradients = [1e-2 * torch.randn(3001, 51, generator=generator) for _ in range(3)]
    for g in gradients:
        if rows_with_gradient != "all":
            g[torch.randperm(3001, generator=generator)[: 2900 if rows_with_gradient == "few" else 3001]] = 0

    compiled, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    for p, fused in ((compiled, True), (plain, False)):
        optimizer = CLASSP([p], fused=fused, **{"lr": LR, **kwargs})
        for g in gradients:
            p.grad = torch.empty_like(p).copy_(g)
            optimizer.step()
        p.memory = optimizer.state[p]["accumulator"]
    if kwargs.get("power") == 1:
        assert torch.equal(compiled, plain) and torch.equal(compiled.memory, plain.memory)
    else:
        torch.testing.assert_close(compiled, plain, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
        torch.testing.assert_close(compiled.memory, plain.memory, rtol=1e-6, atol=0)
    assert torch.equal(compiled, start) == (rows_with_gradient == "none" and not kwargs.get("weight_decay"))


def ulps(actual, expected, scale):
    """Largest difference in units in the last place at magnitude `scale`."""
    one = torch.nextafter(torch.tensor(scale), torch.tensor(torch.inf)) - scale
    return float(((actual - expected).abs() / one).max())


def test_power_2_without_threshold_is_adagrad():
    eps, torch_adagrad = 1e-10, torch.optim.Adagrad
    w = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    a, b = nn.Parameter(w.clone()), nn.Parameter(w.clone())
    ours = CLASSP([a], lr=1e-2, power=2, eps=eps)
    theirs = torch_adagrad([b], lr=1e-2, initial_accumulator_value=eps, eps=0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        a.grad = torch.randn(10_000, generator=generator)
        b.grad = a.grad.clone()
        ours.step()
        theirs.step()
        # one step, from the same weights and (up to where eps is added) the same accumulator
        # with two libraries' square roots
        assert ulps(a.detach(), b.detach(), 1.0) <= 2
        with torch.no_grad():
            a.copy_(b)
    torch.testing.assert_close(ours.state[a]["accumulator"] + eps, theirs.state[b]["sum"], rtol=1e-6, atol=0)


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


def test_groups_keep_their_own_hyperparameters():
    first, second = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
    settings = [
        {"lr": 0.1, "power": 1.0, "threshold": 0.2},
        {"lr": 0.3, "power": 2.0, "weight_decay": 0.1, "eps": 0.1},
    ]
    optimizer = CLASSP([{"params": [first], **settings[0]}, {"params": [second], **settings[1]}])
    oracles = [ReferenceCLASSP(np.ones(6), **s) for s in settings]
    for g in random_gradients((6,), 50):
        for p, oracle in zip((first, second), oracles):
            p.grad = torch.tensor(g)
            oracle.step(g)
        optimizer.step()
    for p, oracle in zip((first, second), oracles):
        np.testing.assert_allclose(p.detach().numpy(), oracle.w, rtol=1e-5, atol=2e-6)


@every_path
def test_density_is_the_share_of_nonzero_gradients_that_update(path):
    torch.manual_seed(0)
    # the second one is like an embedding of which a batch touched few rows
    dense, rows = nn.Parameter(torch.zeros(300, 384)), nn.Parameter(torch.zeros(30_000, 32))
    dense.grad = torch.randn_like(dense)
    rows.grad = torch.zeros_like(rows)
    rows.grad[::7] = torch.randn_like(rows.grad[::7])
    CLASSP([dense, rows], lr=1.0, density=0.1, **path).step()
    for p in (dense, rows):
        nonzero = p.grad != 0
        share = float((p.detach() != 0).sum() / nonzero.sum())
        assert share == pytest.approx(0.1, abs=0.02)
        moved = p.grad[p.detach() != 0].abs().min()
        assert moved >= p.grad[nonzero & (p.detach() == 0)].abs().max()  # the largest ones, and only those


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 1e-3])
@pytest.mark.parametrize("zeros", [0, 300, 1000])
def test_both_ways_to_the_quantile_agree(density, zeros):
    squares = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    squares[:zeros] = 0
    expected = (
        0.0
        if density == 1 or zeros == 1000
        else float(squares.sort().values[zeros:][math.ceil((1 - density) * (1000 - zeros)) - 1])
    )
    assert float(_selected_quantile(squares, density)) == float(_sorted_quantile(squares, density)) == expected


@pytest.mark.skipif(not kernels.BUILT, reason="no C compiler")
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_quantile_is_the_same_to_the_bit(density, dtype):
    generator = torch.Generator().manual_seed(0)
    grads = [10 ** torch.linspace(-25, 0, math.prod(s)).view(s) for s in [(1,), (8191,), (4096, 2), (3, 100_003)]]
    grads = [(g * torch.randn(g.shape, generator=generator)).to(dtype) for g in grads]
    grads += [torch.zeros(50, dtype=dtype), torch.zeros(0, 4, dtype=dtype), grads[2].T]
    grads[1][:7] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, 3e38])
    strides = [_sample_stride(g) for g in grads]
    expected = [
        float(_selected_quantile(g.reshape(-1)[::n].float().square(), density)) for g, n in zip(grads, strides)
    ]
    assert kernels.density_thresholds(grads, strides, density) == expected


def test_density_one_updates_everything_and_small_tensors_are_exact():
    p = nn.Parameter(torch.zeros(10))
    p.grad = torch.arange(10.0)
    CLASSP([p], lr=1.0, density=1.0).step()
    assert (p.detach() != 0).sum() == 9
    p = nn.Parameter(torch.zeros(10))
    p.grad = torch.arange(10.0)
    CLASSP([p], lr=1.0, density=1 / 3).step()
    assert (p.detach() != 0).tolist() == [False] * 7 + [True] * 3


def test_zero_gradient_changes_nothing_but_allocates_state():
    p = nn.Parameter(torch.randn(5))
    before = p.detach().clone()
    p.grad = torch.zeros(5)
    optimizer = CLASSP([p], lr=1.0, power=2.0)
    optimizer.step()
    assert torch.equal(p.detach(), before)
    assert torch.equal(optimizer.state[p]["accumulator"], torch.zeros(5))


def test_missing_gradient_and_empty_parameter():
    used, unused, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0, 4))
    used.grad, empty.grad = torch.ones(3), torch.ones(0, 4)
    for kwargs in ({}, {"density": 0.5}, {"foreach": True}):
        optimizer = CLASSP([used, unused, empty], lr=0.1, **kwargs)
        optimizer.step()
        assert unused not in optimizer.state
    assert torch.equal(unused.detach(), torch.ones(3))


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
def test_save_and_load_continue_to_the_same_weights(dtype):
    model, optimizer = trained(dtype)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    restored = CLASSP(twin.parameters(), lr=0.5)
    restored.load_state_dict(torch.load(file, weights_only=True))  # as Trainer loads it
    for p, q in zip(model.parameters(), twin.parameters()):
        assert restored.state[q]["accumulator"].dtype is torch.float32
        assert torch.equal(restored.state[q]["accumulator"], optimizer.state[p]["accumulator"])
    step_once(model, optimizer, 9)
    step_once(twin, restored, 9)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p, q)


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
    model, optimizer = trained(power=2.0)
    twin, twin_optimizer = copier((model, optimizer))
    step_once(model, optimizer, 9)
    step_once(twin, twin_optimizer, 9)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p, q)


def test_state_allocated_for_distributed_checkpoints():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = nn.Linear(4, 2)
    before = copy.deepcopy(model.state_dict())
    optimizer = CLASSP(model.parameters(), lr=0.1, threshold=1.0, weight_decay=0.1)
    state = get_optimizer_state_dict(model, optimizer)  # initialises the state with a zero-gradient step
    assert set(state["state"]) == {"weight", "bias"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


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
        ({"weight_decay": -0.1}, r"weight_decay must be finite and >= 0, got -0.1"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"foreach": True, "fused": True}, r"foreach=True and fused=True exclude each other"),
        ({"state_dtype": "int4"}, r"state_dtype must be one of float32, bfloat16, uint8, got 'int4'"),
        ({"density": 0.1, "threshold": 1e-6}, r"threshold=1e-06 and density=0.1 exclude each other"),
    ],
)
def test_bad_hyperparameters(kwargs, match):
    with pytest.raises(ValueError, match=match):
        CLASSP([nn.Parameter(torch.ones(1))], **kwargs)
    name = next(k for k in kwargs)
    good = CLASSP([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=name):
        good.add_param_group({"params": [nn.Parameter(torch.ones(1))], **kwargs})
    assert len(good.param_groups) == 1


@every_path
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_gradients_reach_neither_weights_nor_memory(value, path):
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    optimizer = CLASSP([good, bad], lr=0.1, **path)
    good.grad, bad.grad = torch.ones(3), torch.tensor([[1.0, value], [1.0, 1.0]])
    where = (
        "1 coordinate\\. Nothing there"
        if path.get("fused")
        else r"1 of 2 tensors \(first shape: \(2, 2\)\). Nothing was updated"
    )
    with pytest.raises(RuntimeError, match=f"NaN or infinite gradients in {where}"):
        optimizer.step()
    assert bad[0, 1] == 1 and optimizer.accumulator(bad)[0, 1] == 0
    assert bad.isfinite().all() and optimizer.accumulator(bad).isfinite().all()
    assert torch.equal(good.detach(), torch.ones(3)) or path.get("fused")


def test_large_finite_gradients_are_no_infinite_ones():
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.full((3,), 1e25)  # its 2-norm overflows
    CLASSP([p], power=1.0, lr=1e-3).step()
    assert torch.allclose(p, torch.full((3,), -1e-3))


def test_sparse_gradients_and_complex_parameters():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients.*sparse=False"):
        CLASSP(embedding.parameters()).step()
    with pytest.raises(ValueError, match="complex parameters, got one of dtype torch.complex64"):
        CLASSP([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def test_importing_the_optimizer_loads_neither_transformers_nor_triton():
    code = (
        "import sys, classp_hf.optim; "
        "loaded = {'transformers', 'triton', 'datasets', 'accelerate', 'peft'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
