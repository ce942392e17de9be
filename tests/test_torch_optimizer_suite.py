"""What PyTorch tests of each of its own optimizers (`test/test_optim.py`) and no other file here tests of CLASSP:
hooks, named parameters, parameter groups, schedulers, states of older versions."""

from __future__ import annotations

import itertools
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from classp_hf import CLASSP

KWARGS = [{}, {"power": 1.0, "eps": 1e-8}, {"density": 0.5, "foreach": True}, {"maximize": True, "weight_decay": 0.1}]
either_named = pytest.mark.parametrize(("named", "named_after"), itertools.product((False, True), repeat=2))


def problem():
    torch.manual_seed(0)
    weight, bias, x = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(10)), torch.randn(5)

    def backward():
        weight.grad = bias.grad = None
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    return weight, bias, backward


def given(params, named):
    return [(f"name{i}", p) for i, p in enumerate(params)] if named else params


@pytest.mark.parametrize("kwargs", KWARGS)
def test_groups_and_schedulers_go_the_right_direction(kwargs):
    weight, bias, backward = problem()
    optimizer = CLASSP([{"params": [weight]}, {"params": [bias], "lr": 0.01}], **kwargs)
    schedulers = [StepLR(optimizer, gamma=0.9, step_size=10), ReduceLROnPlateau(optimizer)]
    initial = backward().item()
    for _ in range(20):
        loss = optimizer.step(backward)
        schedulers[0].step()
        schedulers[1].step(loss)
    final = backward().item()
    assert final > initial if kwargs.get("maximize") else final < initial
    assert float(optimizer.param_groups[1]["lr"]) <= 0.01 * 0.9**2 + 1e-9


@pytest.mark.parametrize("kwargs", KWARGS)
@either_named
def test_named_parameters_change_nothing_and_their_names_are_kept(kwargs, named, named_after):
    weight, bias, backward = problem()
    optimizer = CLASSP(given([weight, bias], named), **kwargs)
    for _ in range(3):
        optimizer.step(backward)
    twins = [nn.Parameter(p.detach().clone()) for p in (weight, bias)]
    other = CLASSP(given(twins, named_after), **kwargs)
    state = optimizer.state_dict()
    kept = deepcopy(state)
    other.load_state_dict(state)
    assert state["param_groups"] == kept["param_groups"]  # not changed by loading
    for _ in range(3):
        backward()
        for p, twin in zip((weight, bias), twins):
            twin.grad = p.grad.clone()
        optimizer.step()
        other.step()
        assert torch.equal(weight, twins[0]) and torch.equal(bias, twins[1])
    if named_after:
        assert other.state_dict()["param_groups"][0]["param_names"] == ["name0", "name1"]


@pytest.mark.parametrize("flag", ["foreach", "fused", "maximize", "density", "state_dtype"])
def test_can_load_older_state_dict(flag):
    weight, bias, backward = problem()
    optimizer = CLASSP([weight, bias])
    optimizer.step(backward)
    older = deepcopy(optimizer.state_dict())
    for group in older["param_groups"]:
        del group[flag]
    optimizer.load_state_dict(older)
    optimizer.step(backward)
    assert flag in optimizer.param_groups[0]


def test_hooks_of_states():
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer, calls = CLASSP([p]), []
    optimizer.step()
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("before"))
    optimizer.register_state_dict_post_hook(lambda o, state: calls.append("after"))
    state = optimizer.state_dict()
    assert calls == ["before", "after"]
    precise = torch.tensor([1.0001, 2.0002])  # more than bfloat16 holds

    def replace(optimizer, state_dict):
        state_dict = deepcopy(state_dict)
        state_dict["state"][0]["accumulator"] = precise
        return state_dict

    optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[p]["accumulator"], precise) and calls[-1] == "loaded"


def test_hooks_of_steps():
    params = [torch.tensor([1.0, 1.0])]
    optimizer, other, data = CLASSP(params), SGD(params), []
    handles = [
        register_optimizer_step_pre_hook(lambda *a: data.append(0)),
        register_optimizer_step_post_hook(lambda *a: data.append(5)),
        optimizer.register_step_pre_hook(lambda *a: data.append(1)),
        optimizer.register_step_post_hook(lambda *a: data.append(2)),
    ]
    optimizer.step()
    other.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert data == [0, 1, 2, 5, 0, 5]


def test_deepcopy_has_all_public_attributes():
    optimizer = CLASSP([nn.Parameter(torch.ones(2))])
    public = [{k for k in vars(o) if not k.startswith("_")} for o in (optimizer, deepcopy(optimizer))]
    assert public[0] == public[1]
