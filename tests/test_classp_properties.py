"""What holds for CLASSP whatever the shapes, dtypes, gradients and hyperparameters; only public behaviour is used."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from classp_hf import CLASSP

MODERATE = settings(
    max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
SHAPES = [(), (0,), (3, 0), (1,), (7,), (5, 3), (2, 3, 4), (129,), (1, 1, 5), (70_001,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# The results of a run on p, where the kernel for p may round the last place otherwise on other shapes.
EXACT_POWERS = (1.0, 2.0)

hyperparameters = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-3, 0.05, 0.5]),
        "power": st.sampled_from([1.0, 2.0, 0.5, 1.5, 3.0]),
        "eps": st.sampled_from([1e-8, 1e-3, 1.0]),
        "threshold": st.sampled_from([0.0, 0.3, 2.0]),
        "apply_decay": st.booleans(),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
        "foreach": st.sampled_from([None, False, True]),
        "fused": st.sampled_from([None, False]),
    }
)
seeds = st.integers(0, 2**16)


def draw_tensor(shape, dtype, seed, layout="contiguous"):
    """Normal values with some exact zeros; "strided" and "transposed" are views with gaps and in another order."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.8)
    values = values.to(dtype)
    if layout == "strided":
        wide = torch.zeros(*shape, 2, dtype=dtype)
        wide[..., 0] = values
        return wide[..., 0]
    if layout == "transposed" and len(shape) > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    return values


layouts = st.sampled_from(["contiguous", "strided", "transposed"])


def run(weights, gradients, **kwargs):
    """Weights and accumulators after a step for every list in `gradients`."""
    parameters = [nn.Parameter(w.clone(memory_format=torch.preserve_format)) for w in weights]
    optimizer = CLASSP(parameters, **kwargs)
    for grads in gradients:
        for p, g in zip(parameters, grads):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in parameters], [optimizer.accumulator(p) for p in parameters]


def assert_same(a, b, power, dtype=torch.float32):
    """To the bit for p = 1 and 2; else to the last places, in the parameter's own dtype."""
    for x, y in zip(a, b, strict=True):
        assert x.dtype is y.dtype and x.shape == y.shape
        if power in EXACT_POWERS:
            assert torch.equal(x, y)
        else:
            tolerance = 4 * torch.finfo(torch.float32 if dtype is torch.float64 else x.dtype).eps
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@MODERATE
@given(st.sampled_from(SHAPES), st.sampled_from(DTYPES), layouts, seeds, hyperparameters)
def test_permuting_coordinates_permutes_the_results(shape, dtype, layout, seed, kwargs):
    w, *gradients = (draw_tensor(shape, dtype, seed + i, layout) for i in range(4))
    order = torch.randperm(w.numel(), generator=torch.Generator().manual_seed(seed))
    weights, accumulators = run([w], [[g] for g in gradients], **kwargs)
    flat = run([w.reshape(-1)[order]], [[g.reshape(-1)[order]] for g in gradients], **kwargs)
    for got, expected in zip((weights, accumulators), flat):
        assert_same([got[0].reshape(-1)[order]], expected, kwargs["power"], dtype)


@MODERATE
@given(
    st.lists(st.tuples(st.sampled_from(SHAPES[:-1]), st.sampled_from(DTYPES)), min_size=2, max_size=5),
    seeds,
    hyperparameters,
)
def test_neither_order_nor_grouping_of_parameters_matters(tensors, seed, kwargs):
    weights = [draw_tensor(shape, dtype, seed + i) for i, (shape, dtype) in enumerate(tensors)]
    gradients = [[draw_tensor(s, d, seed + 50 * t + i) for i, (s, d) in enumerate(tensors)] for t in range(1, 4)]
    together = run(weights, gradients, **kwargs)
    backwards = run(weights[::-1], [grads[::-1] for grads in gradients], **kwargs)
    alone = [run([w], [[grads[i]] for grads in gradients], **kwargs) for i, w in enumerate(weights)]
    parameters = [nn.Parameter(w.clone()) for w in weights]
    grouped = CLASSP([{"params": [p], "lr": kwargs["lr"]} for p in parameters], **{**kwargs, "lr": 123.0})
    for grads in gradients:
        for p, g in zip(parameters, grads):
            p.grad = g
        grouped.step()
    by_group = [p.detach() for p in parameters], [grouped.accumulator(p) for p in parameters]
    for which in (0, 1):
        for i, (_, dtype) in enumerate(tensors):
            for other in (backwards[which][::-1][i], alone[i][which][0], by_group[which][i]):
                assert_same([together[which][i]], [other], kwargs["power"], dtype)


@MODERATE
@given(st.sampled_from(SHAPES), st.sampled_from(DTYPES), layouts, seeds, hyperparameters)
def test_accumulators_only_grow_and_only_above_the_threshold(shape, dtype, layout, seed, kwargs):
    w, *gradients = (draw_tensor(shape, dtype, seed + i, layout) for i in range(4))
    p = nn.Parameter(w)
    optimizer, before = CLASSP([p], **kwargs), torch.zeros(shape)
    for g in gradients:
        p.grad = g
        optimizer.step()
        s = optimizer.accumulator(p)
        assert s.dtype is torch.float32 and s.shape == p.shape
        passes = g.float().square() > kwargs["threshold"]
        assert bool((s >= before).all()) and torch.equal(s[~passes], before[~passes])
        grown = before.double() + g.double().abs() ** kwargs["power"]
        torch.testing.assert_close(s.double()[passes], grown[passes], rtol=1e-5, atol=1e-6)
        before = s.clone()


@MODERATE
@given(st.sampled_from(SHAPES), st.sampled_from(DTYPES), layouts, seeds, hyperparameters, st.sampled_from([None, 0.3]))
def test_a_zero_gradient_changes_nothing(shape, dtype, layout, seed, kwargs, density):
    kwargs = {**kwargs, "weight_decay": 0.0} | ({"density": density, "threshold": 0.0} if density else {})
    p = nn.Parameter(draw_tensor(shape, dtype, seed, layout))
    p.grad = draw_tensor(shape, dtype, seed + 1, layout)
    optimizer = CLASSP([p], **kwargs)
    optimizer.step()
    weight, s = p.detach().clone(), optimizer.accumulator(p).clone()
    p.grad = torch.zeros_like(p)
    assert optimizer.update_density() == 0
    optimizer.step()
    assert torch.equal(p, weight) and torch.equal(optimizer.accumulator(p), s)


@MODERATE
@given(st.sampled_from(SHAPES), st.sampled_from(DTYPES), layouts, seeds, hyperparameters, st.booleans())
def test_saving_and_loading_in_between_changes_nothing(shape, dtype, layout, seed, kwargs, through_file):
    w, *gradients = (draw_tensor(shape, dtype, seed + i, layout) for i in range(5))
    straight = run([w], [[g] for g in gradients], **kwargs)
    p = nn.Parameter(w.clone(memory_format=torch.preserve_format))
    optimizer = CLASSP([p], **kwargs)
    for g in gradients:
        p.grad = g
        optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        if through_file:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        optimizer = CLASSP([p], lr=123.0)  # the state brings the hyperparameters
        optimizer.load_state_dict(state)
    assert_same([p.detach()], straight[0], kwargs["power"], dtype)
    assert_same([optimizer.accumulator(p)], straight[1], kwargs["power"], dtype)


@MODERATE
@given(st.sampled_from(SHAPES), layouts, seeds, hyperparameters, st.sampled_from([0.0, 0.125, 0.5, 2.0, 8.0]))
def test_a_step_is_proportional_to_the_learning_rate(shape, layout, seed, kwargs, factor):
    """From zero weights the update is not rounded by what it is added to; powers of two scale it to the bit."""
    g = draw_tensor(shape, torch.float32, seed, layout)
    (once,), (s,) = run([torch.zeros(shape)], [[g]], **kwargs)
    (scaled,), (t,) = run([torch.zeros(shape)], [[g]], **{**kwargs, "lr": factor * kwargs["lr"]})
    assert torch.equal(s, t)
    torch.testing.assert_close(scaled, factor * once, rtol=1e-6, atol=1e-38)
    sign = 1 if kwargs["maximize"] else -1
    assert bool((sign * once * g >= 0).all())


@MODERATE
@given(
    st.sampled_from(SHAPES),
    layouts,
    seeds,
    hyperparameters,
    st.sampled_from([2.0**-4, 2.0**3]),
    st.sampled_from(DTYPES),
)
def test_scaling_the_loss_scales_the_memory_and_leaves_the_path(shape, layout, seed, kwargs, c, dtype):
    """c g, c^p eps and c^2 threshold give c^p s and, with the decay, the same weights: AdaGrad's scale freedom."""
    kwargs = {**kwargs, "apply_decay": True}
    w, *gradients = (draw_tensor(shape, dtype, seed + i, layout) for i in range(4))
    (plain,), (s,) = run([w], [[g] for g in gradients], **kwargs)
    p = kwargs["power"]
    scaled = {**kwargs, "eps": c**p * kwargs["eps"], "threshold": c**2 * kwargs["threshold"]}
    (other,), (t,) = run([w], [[c * g] for g in gradients], **scaled)
    torch.testing.assert_close(t, c**p * s, rtol=1e-5, atol=0)
    tolerance = 1e-5 if dtype is not torch.bfloat16 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(plain, other, rtol=tolerance, atol=tolerance)


@MODERATE
@given(
    st.sampled_from([(), (0,), (7,), (5, 3), (129,), (300, 400), (100_003,)]),
    st.sampled_from(DTYPES),
    st.floats(0.01, 1.0),
    st.sampled_from([1.0, 0.3]),
    seeds,
    st.sampled_from([False, True]),
)
def test_density_bounds_the_share_that_is_updated(shape, dtype, density, filled, seed, foreach):
    """Small tensors are their own sample: at most d of the nonzero coordinates. Of large ones 1,024 nonzero
    coordinates are read, or those of the rows that were found; five standard errors of their quantile are allowed."""
    generator = torch.Generator().manual_seed(seed)
    g = (torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < filled)).to(dtype)
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    p.grad = g
    optimizer = CLASSP([p], lr=1.0, density=density, foreach=foreach)
    reported = optimizer.update_density()
    optimizer.step()
    moved, nonzero = optimizer.accumulator(p) > 0, g != 0
    count, total = int(moved.sum()), int(nonzero.sum())
    error = 0 if g.numel() <= 4096 else 5 * math.sqrt(density * (1 - density) / (1024 * filled**2)) + 2 / 1024
    # equal values, of which bfloat16 has many, pass together
    assert count <= total * (density + error) + 1e-6 * total
    assert reported == pytest.approx(count / g.numel() if g.numel() else 0.0)
    if dtype is torch.float32 and 0 < count < total:
        assert g[moved].abs().min() > g[nonzero & ~moved].abs().max()
    if density == 1:
        assert count == total
