"""However a step's gradients come about, CLASSP's update is the slow oracle's; through the real Trainer where it has a
flag."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference_classp import ReferenceCLASSP
from torch import nn
from transformers import TrainerCallback

from classp_hf import ContinualTrainer
from classp_hf.names import trainable_parameters
from classp_hf.optim import CLASSP

SMALL = ("classifier.weight", "classifier.bias", "bert.encoder.layer.0.output.LayerNorm.weight")
"""The oracle goes one coordinate at a time."""


class Follow(TrainerCallback):
    """Steps the oracle beside the optimizer, from the same weights and the gradients that the optimizer gets."""

    def __init__(self, tolerance):
        self.tolerance, self.oracles, self.gradients, self.norms = tolerance, {}, [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        parameters = dict(trainable_parameters(model))
        self.gradients.append({n: p.grad.double().numpy() for n, p in parameters.items()})
        self.norms.append(np.sqrt(sum((g**2).sum() for g in self.gradients[-1].values())))
        lr = optimizer.param_groups[0]["lr"]
        for n in SMALL:
            oracle = self.oracles.setdefault(n, ReferenceCLASSP(np.zeros(parameters[n].shape), lr))
            oracle.w, oracle.lr = parameters[n].detach().double().numpy().copy(), lr
            oracle.step(self.gradients[-1][n])

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        parameters = dict(trainable_parameters(model))
        for n, oracle in self.oracles.items():
            accumulator = optimizer.state[parameters[n]]["accumulator"]
            assert accumulator.dtype is torch.float32
            # the state holds eps beside the accumulator
            np.testing.assert_allclose(accumulator.numpy(), oracle.s + oracle.eps, rtol=1e-5)
            after = parameters[n].detach().double().numpy()
            np.testing.assert_allclose(after, oracle.w, rtol=self.tolerance, atol=1e-7, err_msg=n)


@pytest.fixture
def train(make_model, make_tasks, make_args, collator):
    def run(dtype=torch.float32, **changes):
        args = make_args(optim="classp", max_steps=4, **changes)
        trainer = ContinualTrainer(make_model().to(dtype), args, collator, train_dataset=make_tasks()[0].train_dataset)
        # of bfloat16 weights half a unit in the last place, of float32 ones a few
        follow = Follow(2**-8 if dtype is torch.bfloat16 else 1e-6)
        trainer.add_callback(follow)
        trainer.train()
        assert len(follow.gradients) == 4
        return follow

    return run


WAYS = {
    # arguments, and how far the first step's gradients may be from those of plain float32, relative to their norm
    "float32": ({}, 0.0),
    "bf16 autocast": ({"bf16": True}, 0.05),
    "bf16 weights": ({"dtype": torch.bfloat16}, 0.05),
    "compiled": ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-5),
    "activation checkpointing": ({"activation_checkpointing": True}, 1e-6),
    "accumulation": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 1e-5),
}


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1], ids=["", "clipped"])
@pytest.mark.parametrize("way", WAYS)
def test_the_update_is_the_oracles(way, max_grad_norm, train):
    changes, tolerance = WAYS[way]
    found = train(max_grad_norm=max_grad_norm, **changes)
    if max_grad_norm:
        np.testing.assert_allclose(found.norms, max_grad_norm, rtol=0.01)
        return
    plain = train(max_grad_norm=0.0)
    difference = sum(((g - plain.gradients[0][n]) ** 2).sum() for n, g in found.gradients[0].items())
    assert np.sqrt(difference) <= tolerance * plain.norms[0]


def test_a_grad_scaler_unscales_what_is_remembered_and_skips_what_overflows():
    """fp16 on the CPU, which accelerate refuses: a scaler by hand."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = CLASSP(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    oracle = ReferenceCLASSP(model.weight.detach().double().numpy(), lr=0.1)
    for step in range(4):
        x = torch.randn(7, 5) * (1e4 if step == 1 else 1)
        before = model.weight.detach().clone()
        with torch.autocast("cpu", torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        overflows = not model.weight.grad.isfinite().all()
        assert overflows == (step == 1)
        if not overflows:
            oracle.step(model.weight.grad.double().numpy())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, model.weight) == overflows
        np.testing.assert_allclose(optimizer.accumulator(model.weight).numpy(), oracle.s, rtol=1e-5, atol=1e-11)
        np.testing.assert_allclose(model.weight.detach().numpy(), oracle.w, rtol=1e-5, atol=1e-7)
    assert scaler.get_scale() == 2.0**15
