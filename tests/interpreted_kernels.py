"""The Triton step in Triton's interpreter, on CPU tensors: `TRITON_INTERPRET=1 pytest tests/interpreted_kernels.py`.

A file of its own because Triton reads that variable when it is imported; `test_triton.py` runs it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_classp import IDS, TABLE, run_against_oracle
from torch import nn

from classp_hf import CLASSP
from classp_hf.optim import kernels, triton_kernels

SHAPES = [(3000,), (37, 100), (1,), (0, 4), (2048,), ()]
STATES = ("float32", "bfloat16", "uint8")


@pytest.fixture
def on_gpu(monkeypatch):
    """Steps of CLASSP take the forms that GPU tensors get."""
    monkeypatch.setattr(CLASSP, "_form", lambda self, p, group: "triton" if group["fused"] else "torch")


def tensors(dtype, state_dtype):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    accumulators = [torch.zeros(shape, dtype=getattr(torch, state_dtype)) for shape in SHAPES]
    bases = [torch.zeros(-(-p.numel() // 256), dtype=torch.int16) if state_dtype == "uint8" else None for p in params]
    return params, accumulators, bases


@pytest.mark.parametrize("power", [2.0, 1.0, 1.5])
@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gives_what_the_compiled_step_gives(dtype, state_dtype, power):
    """To the bit where p is 1 or 2; a general power is of another library."""
    found, expected = (tensors(dtype, state_dtype) for _ in range(2))
    stepper, generator = triton_kernels.Stepper(), torch.Generator().manual_seed(1)
    hyperparameters = {"lr": 0.01, "power": power, "eps": 1e-6, "apply_decay": True, "weight_decay": 0.1, "maximize": False}  # fmt: skip
    # of the second step what is rounded at random differs where the first one's weights did
    for threshold in (0.0, 1e-6, 1e-6) if dtype == torch.float32 and power != 1.5 else (1e-6,):
        grads = [(1e-3 * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]
        grads[4][:1024] = 0  # a whole block
        grads[0][5], grads[1][2, 7] = float("nan"), float("-inf")
        limits = [threshold] * len(SHAPES)
        stepper(0, found[0], grads, *found[1:], limits, **hyperparameters)
        bad = kernels.classp_step_(expected[0], grads, *expected[1:], limits, **hyperparameters)
        stepper.send({torch.device("cpu")})
        assert stepper.found() == bad == 2
    for w, s, base, w_expected, s_expected, base_expected in zip(*found, *expected):
        if power != 1.5:
            assert torch.equal(s, s_expected) and (base is None or torch.equal(base, base_expected))
        elif state_dtype == "float32":
            torch.testing.assert_close(s, s_expected, rtol=1e-5, atol=0)
        if dtype == torch.bfloat16:  # which the interpreter truncates and hardware rounds to the nearest
            assert ((w.view(torch.int16).int() - w_expected.view(torch.int16).int()).abs() <= 1).all()
        elif power != 1.5:
            assert torch.equal(w, w_expected)
        else:
            torch.testing.assert_close(w, w_expected, rtol=1e-5, atol=1e-3 if state_dtype == "uint8" else 1e-6)


@pytest.mark.parametrize(("kwargs", "desc"), TABLE, ids=IDS)
def test_matches_the_pseudo_code(kwargs, desc, on_gpu):
    params, optimizer, oracles = run_against_oracle(kwargs, {"fused": True}, steps=10)
    for p, oracle in zip(params, oracles):
        np.testing.assert_allclose(p.detach().numpy(), oracle.w, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(optimizer.state[p]["accumulator"].numpy(), oracle.s, rtol=1e-5)


def test_a_table_follows_tensors_that_move_and_serves_every_group(on_gpu):
    """Gradients are somewhere else after every `zero_grad`, and groups of one kind have one table each."""

    def run():
        torch.manual_seed(0)
        a, b = nn.Parameter(torch.randn(1500)), nn.Parameter(torch.randn(70, 3))
        optimizer = CLASSP([{"params": [a]}, {"params": [b], "weight_decay": 0.1}], lr=0.1, density=0.3, fused=True)
        for _ in range(4):
            a.grad, b.grad = torch.randn(1500), torch.randn(70, 3)
            optimizer.step()
        return a, b, optimizer._stepper

    *found, stepper = run()
    assert len(stepper._tables) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLASSP, "_form", lambda self, p, group: "compiled")
        *expected, _ = run()
    assert all(torch.equal(x, y) for x, y in zip(found, expected))


@pytest.mark.parametrize("kwargs", [{"threshold": 1e-3}, {"density": 0.3}], ids=str)
def test_a_grad_scaler_is_heeded_without_waiting_for_it(on_gpu, kwargs):
    p, plain = nn.Parameter(torch.ones(2000)), nn.Parameter(torch.ones(2000))
    optimizer, reference = CLASSP([p], lr=0.1, fused=True, **kwargs), CLASSP([plain], lr=0.1, **kwargs)
    p.grad = torch.ones(2000)
    assert optimizer._step_supports_amp_scaling and not reference._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        p.grad = plain.grad = None
        x = torch.randn(2000, generator=torch.Generator().manual_seed(step))
        before = p.detach().clone()
        scaler.scale((p * x).sum() * (torch.inf if step == 1 else 1)).backward()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "item", None)  # what reads a value back to the host
            patch.setattr(torch.Tensor, "__bool__", None)
            scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, p) == (step == 1)
        if step != 1:
            plain.grad = x
            reference.step()
    torch.testing.assert_close(p, plain, rtol=1e-6, atol=0)
    assert scaler.get_scale() == 2.0**9


def test_a_gradient_that_is_not_finite_is_reported_by_the_next_step_and_never_remembered(on_gpu):
    p = nn.Parameter(torch.ones(2000))
    optimizer = CLASSP([p], lr=0.1, fused=True)
    p.grad = torch.ones(2000)
    p.grad[3] = float("nan")
    optimizer.step()
    assert p[3] == 1 and p.isfinite().all() and optimizer.accumulator(p)[3] == 0
    with pytest.raises(RuntimeError, match="NaN or infinite gradients in 1 coordinate"):
        optimizer.step()
    p.grad = torch.ones(2000)
    optimizer.step()  # goes on if it is let
    assert optimizer.accumulator(p)[3] == 1


def test_a_gpu_on_which_the_step_does_not_work_gets_pytorchs_operations(monkeypatch):
    """Asked with a small step, once a device."""
    monkeypatch.setattr(triton_kernels, "_WORKS", {})
    assert triton_kernels.works(torch.device("cpu"))
    for broken, problem in (
        (
            lambda *_, **__: (_ for _ in ()).throw(RuntimeError("Failed to find C compiler")),
            "RuntimeError: Failed to find C compiler",
        ),
        (lambda *_, **__: None, "it gives other weights"),
    ):
        triton_kernels._WORKS.clear()
        monkeypatch.setattr(triton_kernels.Stepper, "__call__", broken)
        with pytest.warns(UserWarning, match=problem):
            assert not triton_kernels.works(torch.device("cpu"))
        assert not triton_kernels.works(torch.device("cpu"))
