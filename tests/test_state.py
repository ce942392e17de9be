"""Accumulators of two bytes and one byte a weight: error bounds, both paths alike, files."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from classp_hf import CLASSP
from classp_hf.memory import ContinualMemory
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


@pytest.mark.parametrize("name", LOW_BIT)
@pytest.mark.parametrize("fused", [True, False])
def test_ten_thousand_small_increments_are_not_lost(name, fused):
    """Each is far below the gap between codes; nearest rounding would stop the growth at about 16 (128) increments."""
    torch.manual_seed(0)
    rows = 2 if fused else 1
    p, q = (nn.Parameter(torch.randn(rows, 600)) for _ in range(2))
    low, full = CLASSP([p], state_dtype=name, fused=fused), CLASSP([q], fused=fused)
    steps = 10_000 if fused else 1000
    for _ in range(steps):
        p.grad = 1e-2 * torch.randn(rows, 600)
        q.grad = p.grad.clone()
        low.step()
        full.step()
    ratio = low.accumulator(p) / full.accumulator(q)
    bound = {"uint8": math.sqrt(1 / 32), "bfloat16": math.sqrt(1 / 256)}[name]
    assert 0.2 * bound < ratio.std() <= 1.1 * bound
    assert abs(ratio.mean() - 1) <= 4 * bound / math.sqrt(ratio.numel())


@pytest.mark.parametrize("name", LOW_BIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kwargs", [{}, {"threshold": 1e-6}, {"weight_decay": 0.1}])
def test_the_compiled_step_rounds_as_pytorchs_operations_do(name, dtype, kwargs):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(211, 13, generator=generator).to(dtype)
    p, q = (nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        CLASSP([w], power=1, fused=fused, state_dtype=name, **kwargs) for w, fused in ((p, True), (q, False))
    ]
    for _ in range(20):
        g = 1e-3 * torch.randn(211, 13, generator=generator) * torch.exp2(8 * torch.rand(211, 13, generator=generator))
        g[torch.rand(211, generator=generator) < 0.3] = 0
        for w, optimizer in zip((p, q), optimizers):
            w.grad = g.to(dtype)
            optimizer.step()
        assert torch.equal(p, q)
        assert torch.equal(optimizers[0].state[p]["accumulator"], optimizers[1].state[q]["accumulator"])
    assert torch.equal(optimizers[0].state[p].get("base", p), optimizers[1].state[q].get("base", q))


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


@pytest.mark.parametrize("name", LOW_BIT)
def test_files_shrink_and_convert_both_ways(name, tmp_path):
    values = spread(100_000).view(1000, 100)
    sizes = {}
    for dtype in ("float32", name):
        memory = ContinualMemory(metadata={"optimizer": {"state_dtype": dtype}})
        memory.put("accumulator", {"a.weight": values})
        sizes[dtype] = memory.save(tmp_path / dtype).stat().st_size
    assert sizes[name] < sizes["float32"] * {"uint8": 0.26, "bfloat16": 0.51}[name]

    full, low = (ContinualMemory.load(tmp_path / dtype).get("accumulator")["a.weight"] for dtype in ("float32", name))
    assert torch.equal(full, values) and low.dtype == torch.float32
    assert ((low - values).abs() <= GAP[name] * values).all()
    p = nn.Parameter(torch.zeros(1000, 100))
    for given, dtype in ((full, name), (low, "float32")):
        optimizer = CLASSP([p], state_dtype=dtype)
        optimizer.set_accumulator(p, given.clone())
        assert optimizer.state[p]["accumulator"].dtype == STATE_DTYPES[dtype]
        assert torch.equal(optimizer.accumulator(p), low)

    memory.save(tmp_path / "again")
    again = ContinualMemory.load(tmp_path / "again")
    again.save(tmp_path / "twice")
    files = [load_file(tmp_path / f / "continual_memory.st") for f in ("again", "twice")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(t, files[1][k]) for k, t in files[0].items())


@pytest.mark.parametrize("name", ["float32", *LOW_BIT])
def test_a_memory_of_another_layout_belongs_to_the_same_weights(name):
    """The compiled step goes through weight and accumulator as they lie in memory."""
    values = torch.arange(12.0).view(4, 3)
    results = []
    for given in (values, values.T.contiguous().T):
        p = nn.Parameter(torch.ones(4, 3))
        optimizer = CLASSP([p], lr=0.1, state_dtype=name)
        optimizer.set_accumulator(p, given)
        assert torch.equal(optimizer.accumulator(p), values)
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
    for bits in (a, b, (a - b) & 0xFFFFFFFF):
        assert len(bits.unique()) > 4000
        assert abs(bits.double().mean() / 2**32 - 0.5) < 4 * math.sqrt(1 / 12 / 4096)
