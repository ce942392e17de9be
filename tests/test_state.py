"""Accumulators of two bytes and one byte a weight: error bounds, rounding, layouts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from classp_hf import CLASSP
from classp_hf.optim import step
from classp_hf.optim.state import STATE_DTYPES, compress, expand, random_bits

LOW_BIT = ["bfloat16", "uint8"]
GAP = {"bfloat16": 2**-7, "uint8": 2**-4}


def spread(count, seed=0, octaves=12):
    """Accumulators over 12 octaves, a tenth of them zero."""
    generator = torch.Generator().manual_seed(seed)
    s = torch.exp2(-octaves * torch.rand(count, generator=generator))
    s[torch.rand(count, generator=generator) < 0.1] = 0
    return s


def random(count, seed):
    return torch.randint(0, 2**32, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", LOW_BIT)
@pytest.mark.parametrize("shape", [(1000,), (31, 77), (), (0, 5), (256,), (257,)])
def test_one_rounding(name, shape):
    values = spread(math.prod(shape)).view(shape)
    stored, base = compress(values, STATE_DTYPES[name], random(values.numel(), 1))
    assert stored.dtype == STATE_DTYPES[name] and stored.shape == values.shape
    assert (base is not None) == (name == "uint8") and (base is None or base.shape == (-(-values.numel() // 256),))
    back = expand(stored, base)
    assert back.dtype == torch.float32
    assert ((back - values).abs() <= GAP[name] * values).all()
    again, base_again = compress(back, STATE_DTYPES[name], random(values.numel(), 2))
    assert torch.equal(again, stored) and (base is None or torch.equal(base, base_again))


@pytest.mark.parametrize("name", LOW_BIT)
def test_rounding_is_right_on_average_also_far_below_the_blocks_largest(name):
    values = (
        torch.tensor([1.0, 0.3, 1e-3, 3e-5, 2e-6, 1e-7, 0.0]).repeat(256, 1).T.contiguous()
    )  # a block has one value
    values[1:, 0] = 1.0  # and one that is much larger
    mean = torch.stack(
        [expand(*compress(values, STATE_DTYPES[name], random(values.numel(), i))) for i in range(200)]
    ).mean((0, 2))
    noise = values.mean(1) * GAP[name] + 2**-16  # of one rounding; 51,000 roundings a row
    assert ((mean - values.mean(1)).abs() <= 4 * noise / math.sqrt(200 * 255)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", LOW_BIT)
def test_ten_thousand_small_increments_are_not_lost(name):
    """Each is far below the gap between codes; nearest rounding would stop the growth at about 16 (128) increments."""
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.randn(600)) for _ in range(2))
    low, full = CLASSP([p], state_dtype=name), CLASSP([q])
    for _ in range(10_000):
        p.grad = 1e-2 * torch.randn(600)
        q.grad = p.grad
        low.step()
        full.step()
    ratio = low.accumulator(p) / full.accumulator(q)
    bound = {"uint8": math.sqrt(1 / 32), "bfloat16": math.sqrt(1 / 256)}[name]
    assert 0.2 * bound < ratio.std() <= 1.1 * bound
    assert abs(ratio.mean() - 1) <= 4 * bound / math.sqrt(ratio.numel())


@pytest.mark.parametrize("name", LOW_BIT)
@pytest.mark.parametrize("shape", [(2000,), (31, 77), (3, 256)])
def test_a_tensor_in_blocks_rounds_as_the_whole_one(name, shape, monkeypatch):
    results = []
    for block in (2**19, 512):
        monkeypatch.setattr(step, "CPU_CALL", block)
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(shape, generator=generator))
        optimizer = CLASSP([p], lr=0.1, state_dtype=name)
        for _ in range(5):
            p.grad = torch.randn(shape, generator=generator)
            optimizer.step()
        results.append((p.detach(), optimizer.accumulator(p)))
    assert all(map(torch.equal, *results))


def test_uint8_values_are_bfloat16_values():
    """So a file may keep either as bfloat16."""
    values = expand(*compress(spread(10_000), torch.uint8, random(10_000, 1)))
    assert torch.equal(values.bfloat16().float(), values)


@pytest.mark.parametrize("name", LOW_BIT)
def test_state_dict_goes_on_to_the_same_bits(name):
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    optimizer = CLASSP(model.parameters(), state_dtype=name)

    def steps(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(5):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    steps(model, optimizer, 0)
    twin = copy.deepcopy(model)
    restored = CLASSP(twin.parameters())  # as lr, the dtype comes from what is loaded
    restored.load_state_dict(optimizer.state_dict())
    steps(model, optimizer, 1)
    steps(twin, restored, 1)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert restored.state[q]["accumulator"].dtype == STATE_DTYPES[name]
        assert torch.equal(p, q) and torch.equal(optimizer.accumulator(p), restored.accumulator(q))


@pytest.mark.parametrize("name", ["float32", *LOW_BIT])
def test_a_memory_of_another_layout_belongs_to_the_same_weights(name):
    """The fused step goes through weight and accumulator as they lie in memory."""
    values = torch.arange(12.0).view(4, 3)
    results = []
    for given in (values, values.T.contiguous().T):
        p = nn.Parameter(torch.ones(4, 3))
        optimizer = CLASSP([p], lr=0.1, state_dtype=name)
        optimizer.set_accumulator(p, given)
        assert torch.equal(optimizer.accumulator(p), values) or name == "float32"
        torch.testing.assert_close(optimizer.accumulator(p), values, rtol=0, atol=1e-6)
        state = optimizer.state_dict()
        state["state"][0]["accumulator"] = state["state"][0]["accumulator"].T.contiguous().T
        optimizer.load_state_dict(state)
        p.grad = torch.ones(4, 3)
        optimizer.step()
        results.append(p.detach())
        assert torch.equal(values, torch.arange(12.0).view(4, 3))  # what was given is not the state
    torch.testing.assert_close(*results)
    torch.testing.assert_close(results[0], 1 - 0.1 / (values + 1 + 1e-6).sqrt())


def test_bits_differ_from_weight_to_weight_and_step_to_step():
    g, w = torch.full((4096,), 1e-3), torch.full((4096,), 0.5)
    a, b = random_bits(g, w), random_bits(g, w - 1e-6)
    for bits in (a, b, a - b):
        assert bits.dtype is torch.int32 and len(bits.unique()) > 4000
        assert abs(bits.double().mean() / 2**32) < 4 * math.sqrt(1 / 12 / 4096)
    assert torch.equal(random_bits(g[100:], w[100:], 100), a[100:])
