"""The checks that PyTorch runs over each of its own optimizers (`test/test_optim.py`), by their names there, for CLASSP.

Left out are those of what CLASSP does not claim: `differentiable`, `fused`, `capturable`, sparse gradients, complex parameters,
a step of its own that may be no tensor, and what needs a GPU.
"""

from __future__ import annotations

import io
import itertools
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from classp_hf import CLASSP

CONFIGURATIONS = {
    "default": {},
    "non-default lr": {"lr": 1e-2},
    "zero lr": {"lr": 0.0},
    "Tensor lr": {"lr": torch.tensor(0.001)},
    "weight_decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "threshold": {"threshold": 1e-3},
    "density": {"density": 0.5},
    "p=1": {"power": 1.0, "eps": 1e-8},
    "p=1.5": {"power": 1.5},
    "accumulate, plain SGD": {"apply_decay": False},
}
SCHEDULERS = [lambda o: StepLR(o, gamma=0.9, step_size=10), ReduceLROnPlateau]
NEWER_FLAGS = ("foreach", "maximize")  # as of other optimizers: a state saved without them loads

configurations = pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({**given, **flag}, id=f"{desc}{' foreach' if flag else ''}")
        for (desc, given), flag in itertools.product(CONFIGURATIONS.items(), ({}, {"foreach": True}))
    ],
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def problem(named=False, contiguous=True):
    """Weight, bias and a function that returns the loss with its gradients set."""
    weight, bias = torch.randn(10, 5, 2)[..., 0], torch.randn(10, 2)[..., 0]
    weight, bias = (nn.Parameter(t.contiguous() if contiguous else t) for t in (weight, bias))
    x = torch.randn(5)

    def backward():
        weight.grad = bias.grad = None
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    return weight, bias, backward


def with_copy(weight, bias, backward):
    """The same problem on equal weights of their own."""
    twins = [nn.Parameter(p.detach().clone()) for p in (weight, bias)]

    def copied():
        backward()
        for p, twin in zip((weight, bias), twins):
            twin.grad = p.grad.clone()

    return twins, copied


@configurations
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("scheduled", [False, True])
def test_forloop_goes_right_direction(kwargs, contiguous, scheduled):
    weight, bias, backward = problem(contiguous=contiguous)
    optimizer = CLASSP([weight, bias], **kwargs)
    schedulers = [make(optimizer) for make in SCHEDULERS] if scheduled else []
    initial = backward().item()
    for _ in range(20):
        loss = optimizer.step(backward)
        for scheduler in schedulers:
            scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    final = backward().item()
    if kwargs.get("lr") == 0.0:
        assert final == initial
    elif kwargs.get("maximize"):
        assert final > initial
    else:
        assert final < initial


@configurations
def test_param_group_with_lrscheduler_goes_right_direction(kwargs):
    weight, bias, backward = problem()
    optimizer = CLASSP([{"params": [weight]}, {"params": [bias], "lr": 0.01}], **kwargs)
    scheduler = StepLR(optimizer, gamma=0.9, step_size=10)
    initial = backward().item()
    for _ in range(20):
        optimizer.step(backward)
        scheduler.step()
    final = backward().item()
    assert final > initial if kwargs.get("maximize") else final < initial
    assert float(optimizer.param_groups[1]["lr"]) == pytest.approx(0.01 * 0.9**2)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr(foreach, shape):
    for desc, given in CONFIGURATIONS.items():
        kwargs = {**given, "lr": 1e-3, "foreach": foreach}
        weight, bias, backward = problem()
        twins, copied = with_copy(weight, bias, backward)
        plain = CLASSP([weight, bias], **kwargs)
        lr = torch.full(shape, 1e-3)
        tensor = CLASSP(twins, **{**kwargs, "lr": lr})
        schedulers = [StepLR(o, gamma=0.5, step_size=2) for o in (plain, tensor)]
        for _ in range(6):
            copied()
            plain.step()
            tensor.step()
            for scheduler in schedulers:
                scheduler.step()
        for p, twin in zip((weight, bias), twins):
            torch.testing.assert_close(p, twin, msg=desc)
        assert isinstance(tensor.param_groups[0]["lr"], torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_foreach_matches_forloop(dtype):
    for desc, given in CONFIGURATIONS.items():
        models = []
        for foreach in (False, True):
            torch.manual_seed(1)
            model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(dtype)
            empty = nn.Parameter(torch.empty(0, dtype=dtype))  # pytorch#100701
            empty.grad = torch.empty_like(empty)
            optimizer = CLASSP([*model.parameters(), empty], foreach=foreach, **given)
            x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=dtype).reshape(3, 2)
            for step in range(7):
                optimizer.zero_grad()
                empty.grad = torch.empty_like(empty)
                model(x).sum().backward()
                if step == 3:  # a step in which one has no gradient
                    model[2].bias.grad = None
                optimizer.step()
            models.append((list(model.parameters()), optimizer.state_dict()["state"]))
        (params, state), (others, other_state) = models
        for p, q in zip(params, others):
            torch.testing.assert_close(p, q, msg=desc)
        assert state.keys() == other_state.keys()
        for i in state:
            torch.testing.assert_close(state[i]["accumulator"], other_state[i]["accumulator"])


def test_mixed_device_dtype():
    for given, foreach in itertools.product(CONFIGURATIONS.values(), (False, True)):
        params = [nn.Parameter(torch.ones(2, 3, dtype=d)) for d in (torch.float32, torch.float64, torch.bfloat16)]
        for p in params:
            p.grad = torch.ones_like(p)
        CLASSP(params, foreach=foreach, **given).step()
        for p in params:
            torch.testing.assert_close(p.float(), params[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_set_default_dtype_works_with_foreach(default):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        for given, foreach in itertools.product(CONFIGURATIONS.values(), (False, True)):
            p = nn.Parameter(torch.ones(4, dtype=torch.float32))
            p.grad = torch.full_like(p, 0.5)
            optimizer = CLASSP([p], foreach=foreach, **given)
            optimizer.step()
            optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
            optimizer.step()
            assert p.dtype is torch.float32 and optimizer.state[p]["accumulator"].dtype is torch.float32
    finally:
        torch.set_default_dtype(before)


@configurations
def test_param_groups_weight_decay(kwargs):
    weight, bias, _ = problem()
    optimizer = CLASSP([{"params": [weight], **kwargs}, {"params": [bias], **kwargs, "weight_decay": 0.0}])
    zero = [torch.zeros_like(p) for p in (weight, bias)]
    before = weight.detach().clone(), bias.detach().clone()
    weight.grad, bias.grad = zero
    optimizer.step()
    factor = 1 - float(optimizer.param_groups[0]["lr"]) * kwargs.get("weight_decay", 0.0)
    torch.testing.assert_close(weight.detach(), factor * before[0])
    assert torch.equal(bias.detach(), before[1])


@configurations
def test_param_groups_lr(kwargs):
    weight, bias, backward = problem()
    irrelevant = nn.Parameter(torch.randn(2))
    before = irrelevant.detach().clone()
    group = {**kwargs, "lr": kwargs.get("lr") or 1e-3}
    optimizer = CLASSP([{"params": [weight, bias], **group}, {"params": [irrelevant]}], lr=1e-28)
    initial = backward().item()
    for _ in range(20):
        irrelevant.grad = torch.rand_like(irrelevant)
        backward()
        optimizer.step()
    assert torch.equal(irrelevant.detach(), before)
    final = backward().item()
    assert final > initial if kwargs.get("maximize") else final < initial


@configurations
def test_step_is_noop_when_params_have_no_grad(kwargs):
    params = [torch.randn(2, 3) for _ in range(2)]
    before = deepcopy(params)
    optimizer = CLASSP(params, **kwargs)
    assert optimizer.step(lambda: 7) == 7
    assert all(map(torch.equal, params, before)) and not optimizer.state


@configurations
def test_step_is_noop_for_zero_grads(kwargs):
    p = nn.Parameter(torch.randn(5, 1))
    before = p.detach().clone()
    optimizer = CLASSP([p], **{**kwargs, "weight_decay": 0.0})
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p.detach(), before)


@configurations
def test_step_is_noop_for_empty_params(kwargs):
    p = nn.Parameter(torch.empty(0, 3))
    p.grad = torch.empty_like(p)
    optimizer = CLASSP([p], **kwargs)
    optimizer.step()
    assert optimizer.state[p]["accumulator"].shape == (0, 3)


@configurations
def test_optimizer_can_be_printed(kwargs):
    assert repr(CLASSP([nn.Parameter(torch.ones(2))], **kwargs)).startswith("CLASSP (\nParameter Group 0")


@configurations
@pytest.mark.parametrize(("named", "named_after"), itertools.product((False, True), repeat=2))
def test_state_dict_deterministic(kwargs, named, named_after):
    def given(params, named):
        return [(f"name{i}", p) for i, p in enumerate(params)] if named else params

    weight, bias, backward = problem()
    optimizer = CLASSP(given([weight, bias], named), **kwargs)
    for _ in range(5):
        optimizer.step(backward)
    twins, copied = with_copy(weight, bias, backward)
    other = CLASSP(given(twins, named_after), **kwargs)
    state = optimizer.state_dict()
    kept = deepcopy(state)
    other.load_state_dict(state)
    assert_same_state(state, kept)  # not changed by loading
    for _ in range(5):
        copied()
        optimizer.step()
        other.step()
        assert torch.equal(weight, twins[0]) and torch.equal(bias, twins[1])
    assert_same_state(optimizer.state_dict(), other.state_dict())
    # repeated parameters have one representation (pytorch#36831)
    other.param_groups.extend(other.param_groups)
    assert_same_state(
        {**optimizer.state_dict(), "state": {}}, {**other.state_dict(), "state": {}}, groups=slice(-1, None)
    )


def assert_same_state(a, b, groups=slice(None)):
    def without_names(state):
        return [{k: v for k, v in group.items() if k != "param_names"} for group in state["param_groups"][groups]]

    assert without_names(a) == without_names(b)
    assert a["state"].keys() == b["state"].keys()
    for i in a["state"]:
        assert torch.equal(a["state"][i]["accumulator"], b["state"][i]["accumulator"])


@pytest.mark.parametrize("flag", NEWER_FLAGS)
def test_can_load_older_state_dict(flag):
    for desc, given in CONFIGURATIONS.items():
        weight, bias, backward = problem()
        optimizer = CLASSP([weight, bias], **given)
        optimizer.step(backward)
        older = deepcopy(optimizer.state_dict())
        for group in older["param_groups"]:
            del group[flag]
        optimizer.load_state_dict(older)
        optimizer.step(backward)
        assert flag in optimizer.param_groups[0], desc


@configurations
@pytest.mark.parametrize(("named", "named_after"), itertools.product((False, True), repeat=2))
def test_can_load_from_to_named_state_dict(kwargs, named, named_after):
    model = nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2))
    x = torch.rand(1, 4, 8, 8)

    def step(optimizer):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    optimizer = CLASSP(model.named_parameters() if named else model.parameters(), **kwargs)
    step(optimizer)
    other = CLASSP(model.named_parameters() if named_after else model.parameters(), **kwargs)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    step(other)
    if named or named_after:
        assert other.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]


@configurations
def test_save_load_equality_with_weights_only(kwargs):
    weight, bias, backward = problem()
    optimizer = CLASSP([weight, bias], **kwargs)
    for _ in range(3):
        optimizer.step(backward)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert_same_state(torch.load(file, weights_only=True), optimizer.state_dict())


def test_state_dict_hooks():
    """test_state_dict_pre_hook, _post_hook and _pre_post_hook; test_load_state_dict_pre_hook_and_prepend and _post_hook."""
    p = nn.Parameter(torch.ones(2))
    optimizer = CLASSP([p])
    calls = []

    def named(name, result=None):
        return lambda *arguments: calls.append((name, len(arguments))) or result

    handles = [
        optimizer.register_state_dict_pre_hook(named("pre")),
        optimizer.register_state_dict_post_hook(named("post", {"replaced": True})),
    ]
    assert optimizer.state_dict() == {"replaced": True}
    for handle in handles:
        handle.remove()
    state = optimizer.state_dict()
    assert "param_groups" in state and calls == [("pre", 1), ("post", 2)]

    def set_lr(lr):
        def hook(optimizer, state_dict):
            state_dict = deepcopy(state_dict)
            state_dict["param_groups"][0]["lr"] = lr
            return state_dict

        return hook

    optimizer.register_load_state_dict_pre_hook(set_lr(0.002))
    optimizer.register_load_state_dict_pre_hook(set_lr(0.003), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(o.param_groups[0]["lr"]))
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.002 and calls[-1] == 0.002


def test_a_load_hook_may_replace_the_accumulators():
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = CLASSP([p])
    optimizer.step()
    precise = torch.tensor([1.0001, 2.0002])  # more than bfloat16 holds

    def hook(optimizer, state_dict):
        state_dict = deepcopy(state_dict)
        state_dict["state"][0]["accumulator"] = precise
        return state_dict

    optimizer.register_load_state_dict_pre_hook(hook)
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(optimizer.state[p]["accumulator"], precise)


@configurations
def test_step_all_hooks(kwargs):
    """test_step_pre_hook, test_step_post_hook and test_step_all_hooks."""
    params = [torch.tensor([1.0, 1.0])]
    optimizer, other, data = CLASSP(params, **kwargs), SGD(params), []
    handles = [
        register_optimizer_step_pre_hook(lambda *a: data.append(0)),
        register_optimizer_step_post_hook(lambda *a: data.append(5)),
        optimizer.register_step_pre_hook(lambda *a: data.append(1)),
        optimizer.register_step_post_hook(lambda *a: data.append(2)),
    ]
    try:
        optimizer.step()
        assert data == [0, 1, 2, 5]
        other.step()
        assert data == [0, 1, 2, 5, 0, 5]
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert len(data) == 6


@configurations
def test_deepcopy_copies_all_public_attrs(kwargs):
    weight, bias, backward = problem()
    optimizer = CLASSP([weight, bias], **kwargs)
    optimizer.step(backward)
    twin = deepcopy(optimizer)
    public = [{k for k in vars(o) if not k.startswith("_")} for o in (optimizer, twin)]
    assert public[0] == public[1]
    assert_same_state(optimizer.state_dict(), twin.state_dict())


@configurations
def test_non_empty_state(kwargs):
    model = nn.Linear(5, 5)
    optimizer = CLASSP(model.parameters(), **kwargs)
    model(torch.rand(2, 5)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 2 and all(len(state) > 0 for state in optimizer.state.values())


@configurations
def test_repeated_runs_are_deterministic(kwargs):
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        weight, bias, backward = problem()
        optimizer = CLASSP([weight, bias], **kwargs)
        for _ in range(5):
            optimizer.step(backward)
        results.append((weight.detach(), bias.detach()))
    assert all(map(torch.equal, *results))


P, Q = nn.Parameter(torch.ones(1, 1)), nn.Parameter(torch.ones(1, 1))


@pytest.mark.parametrize(
    ("params", "kwargs", "error", "said"),
    [
        (P, {}, TypeError, "should be an iterable of Tensors or dicts"),
        ([P, P], {}, UserWarning, "a parameter group with duplicate parameters"),
        ([{"params": P}, {"params": P}], {}, ValueError, "appear in more than one parameter group"),
        ([P], {"lr": torch.tensor([0.001, 0.001])}, ValueError, "lr must be a float or a 1-element tensor"),
        ([("weight", P), Q], {}, ValueError, "all optimizer params should be with/without names"),
        ([{"params": [P], "lr": 1e-2}, {"params": [("w", Q)]}], {}, ValueError, "groups should be with/without names"),
        ([], {}, ValueError, "empty parameter list"),
        ([P * 2], {}, ValueError, "can't optimize a non-leaf Tensor"),
        ([P], {"lr": -1e-2}, ValueError, "lr must be finite and >= 0, got -0.01"),
        ([P], {"eps": 0.0}, ValueError, "eps must be finite and > 0 in float32"),
        ([P], {"weight_decay": -1.0}, ValueError, "weight_decay must be finite and >= 0, got -1.0"),
        ([P], {"density": 0.5, "threshold": 0.1}, ValueError, "exclude each other"),
    ],
)
def test_errors(params, kwargs, error, said):
    with (pytest.warns if error is UserWarning else pytest.raises)(error, match=said):
        CLASSP(params, **kwargs)
