"""The CLASSP optimizer: Algorithm 1 of arXiv 2405.09637. With p = 2 the step is PyTorch's fused Adagrad."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .shards import is_sharded, local, over_shards, sharding
from .state import BLOCK, STATE_DTYPES, expand, random_bits, store
from .step import batches, cuts, find_bad, hardshrink, may_fuse, update


class CLASSP(Optimizer):
    r"""Continual Learning through Adjustment Suppression and Sparsity Promotion (Ludwig 2024, arXiv 2405.09637).

    An AdaGrad-like optimizer whose per-weight accumulator `s`, kept from task to task, is the memory of what earlier
    tasks needed: a weight that many large gradients went through takes small steps afterwards.

    Algorithm 1, for every coordinate i with gradient g and accumulator s (0 at the very start)::

        mask_i = g_i^2 > threshold                         (strictly greater)
        s_i   <- s_i + |g_i|^p                             where mask_i
        w_i   <- w_i - lr * g_i / (eps + s_i)^(1/p)        where mask_i and apply_decay
        w_i   <- w_i - lr * g_i                            where mask_i and not apply_decay

    The current gradient enters s before it scales the step (not so in the paper's equation 1). With power 2
    and threshold 0 this is `torch.optim.Adagrad(initial_accumulator_value=eps, eps=0)` and its fused step.

    The math runs in float32, or float64 for such parameters, and is cast to the parameter's dtype once, at the end.
    `state[p]["accumulator"]`, of the parameter's shape and of `state_dtype`, after `load_state_dict` too, holds
    s + offset, where the group's `offset` is eps with `power=2` in float32 and 0 otherwise; `accumulator(p)` returns
    s. With `uint8` there is also `state[p]["base"]`, an int16 for each 256 weights.

    Args:
        params: parameters, named parameters or parameter groups. Every hyperparameter may differ from group to group.
        lr: learning rate, a float or a 1-element tensor, >= 0.
        threshold: gradients whose square does not exceed it are ignored, >= 0. In squared-gradient units, so it
            depends on loss scale, batch size, clipping and accumulation; `density` does not.
        power: the p of Algorithm 1, > 0. The paper's experiments use 1 and 2; with an empty memory 1 underfits.
        eps: added to the accumulator inside the root, > 0. In units of |g|^p: near the accumulator's mean it erases
            the memory, far below it the first steps are sign steps on every weight.
        apply_decay: if False, gradients are accumulated, but the step is plain SGD ("learn and remember").
        weight_decay: decoupled (arXiv 1711.05101), >= 0: `w <- w * (1 - lr * weight_decay)` where there is a gradient.
        density: the fraction, in (0, 1], of a tensor's nonzero gradients that may update: the threshold becomes the
            (1 - density) quantile of g^2 over them, estimated per tensor and step from up to 4,096 of them
            (`cuts_for_density` gives the error). Excludes `threshold`. Sharded gradients are gathered, one at a time.
        maximize: ascend instead of descend.
        foreach: True: PyTorch's multi-tensor operations, never the fused step. False: one tensor a call. Default:
            multi-tensor operations where the fused step is not possible.
        fused: whether PyTorch's fused Adagrad takes the step. Default: where it can, with `power=2`, `apply_decay` and
            a float32 state on CPUs and CUDA devices (torch >= 2.13), unless the step is compiled.
        state_dtype: `"float32"`; `"bfloat16"` or `"uint8"` keep the memory in two bytes or one a weight, rounded at
            random so that small increments count on average (error bounds: `classp_hf/optim/state.py`).

    A gradient that is not finite, or so large that it could overflow the memory (a tensor's norm above 9e18, or its
    p-th power above 2e31), reaches neither weights nor memory, where it would stay for ever. On CPUs `step` raises
    before it updates anything. On other devices, and when compiled, it does not wait for the gradients: the whole
    step, weight decay included, is skipped, and counted in `skipped_steps()`.

    Raises:
        ValueError: a hyperparameter out of its range, both `threshold` and `density`, `fused=True` where that step is
            not CLASSP's or does not exist; a complex parameter; from `step`, a uint8 state of a sharded parameter.
        RuntimeError: from `step`: a sparse gradient; on CPUs a gradient that is NaN, infinite or too large.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        threshold: float = 0.0,
        power: float = 2.0,
        eps: float = 1e-6,
        apply_decay: bool = True,
        weight_decay: float = 0.0,
        *,
        density: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        state_dtype: str = "float32",
    ) -> None:
        ours = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, ours)
        self._skipped = torch.zeros((), dtype=torch.int64)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with hyperparameters of its own; a ValueError leaves the optimizer as it was."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # What the state holds beside s: what fused Adagrad needs.
        group["offset"] = group["eps"] if group["power"] == 2 and group["state_dtype"] == "float32" else 0.0
        try:
            _check(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_skipped", torch.zeros((), dtype=torch.int64))  # of a copy
        for group in self.param_groups:  # of an older version
            for name, value in {**self.defaults, "state_dtype": "float32", "offset": 0.0}.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, keeping the accumulators in their own dtype.

        `torch.optim.Optimizer` casts state to the parameter's dtype, which would truncate the memory of a bf16 model
        at every round trip (accelerate makes one when it wraps the optimizer).
        """
        given: dict[str, Any] = {}  # after all hooks
        handle = self.register_load_state_dict_pre_hook(lambda _, final: given.update(final))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        saved_ids = itertools.chain.from_iterable(g["params"] for g in given["param_groups"])
        params = itertools.chain.from_iterable(g["params"] for g in self.param_groups)
        for saved_id, p in zip(saved_ids, params):
            for key, value in given["state"].get(saved_id, {}).items():
                self.state[p][key] = value.to(device=p.device, copy=True) if isinstance(value, Tensor) else value

    @torch.no_grad()
    def accumulator(self, p: Tensor) -> Tensor:
        """Return the accumulator s of parameter `p`, float32, of its shape and sharding; zeros before its first step.
        Do not write to it: it may be the state itself."""
        state = self.state.get(p)
        if not state:
            return torch.zeros_like(p, dtype=torch.float32, memory_format=torch.preserve_format)
        values, offset = expand(state["accumulator"], state.get("base")), self._group_of(p)["offset"]
        return (values - offset).clamp_(min=0) if offset else values

    @torch.no_grad()
    def set_accumulator(self, p: Tensor, values: Tensor) -> None:
        """Set the accumulator s of parameter `p` to `values`, which are >= 0 and of its shape, device and sharding."""
        group = self._group_of(p)
        state = self.state[p] = _new_state(p, group)
        accumulator, values = local(state["accumulator"]), local(values).float()
        if accumulator.dtype == torch.float32:
            accumulator.copy_(values).add_(group["offset"])
        else:
            store(accumulator, state.get("base"), values, random_bits(values, values))

    @torch.no_grad()
    def update_density(self) -> float:
        """Return the share of all coordinates, in [0, 1], that a step with the present gradients would update.

        Call it after the backward pass and before `zero_grad`. It reads every gradient once, and waits for the device.
        """
        updated = []
        for group, params in self._alike():
            grads = (local(p.grad).float() for p in params)  # type: ignore[arg-type]
            passing = [(hardshrink(g, cut).abs() > 0).sum() for g, cut in zip(grads, cuts(params, group))]
            updated.append(over_shards(torch.stack(passing).sum(), params[0], "sum"))
        total = sum(p.numel() for group in self.param_groups for p in group["params"])
        return sum(map(int, updated)) / total if updated else 0.0

    def skipped_steps(self) -> int:
        """Return how many steps, on a GPU or compiled, were skipped for bad gradients. Waits for the device."""
        return int(self._skipped)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one optimization step.

        Args:
            closure: re-evaluates the model and returns the loss, which `step` then returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                # Also of an empty parameter, or when nothing passes the threshold: distributed checkpoints initialise
                # the state with a zero-gradient step and expect to find it.
                if p.grad is not None and not self.state[p]:
                    self.state[p] = _new_state(p, group)
        work = self._alike()
        found_inf = find_bad(work)
        if found_inf is not None:
            self._skipped = self._skipped.to(found_inf.device)
            self._skipped.add_(found_inf.long())  # in place, for compiled and captured steps
        for group, params in work:
            for batch in batches(params, group, self.state):
                update(batch, group, found_inf)
        return loss

    def _alike(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """The parameters that have a gradient, with their group, by group, device, dtypes and sharding."""
        alike: dict[Any, list[Tensor]] = {}
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is None or p.numel() == 0:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(
                        f"CLASSP does not support sparse gradients (parameter of shape {tuple(p.shape)}). "
                        "Build the embedding with sparse=False."
                    )
                key = number, p.device, p.dtype, p.grad.dtype, sharding(p.grad)
                alike.setdefault(key, []).append(p)
        return [(self.param_groups[number], params) for (number, *_), params in alike.items()]

    def _group_of(self, p: Tensor) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(q is p for q in group["params"]))


def _new_state(p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    dtype = STATE_DTYPES[group["state_dtype"]]
    if dtype == torch.uint8 and is_sharded(p.detach()):
        raise ValueError("state_dtype='uint8' is not supported on sharded (DTensor) parameters. Use 'bfloat16'.")
    state = {"accumulator": torch.full_like(p, group["offset"], dtype=dtype, memory_format=torch.preserve_format)}
    if dtype == torch.uint8:
        state["base"] = torch.zeros(-(-p.numel() // BLOCK), dtype=torch.int16, device=p.device)
    return state


def _check(group: dict[str, Any]) -> None:
    """Raise ValueError for a hyperparameter out of its range and for a parameter that cannot be trained."""
    lr, power, density, threshold = (group[name] for name in ("lr", "power", "density", "threshold"))
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a float or a 1-element tensor, got {lr}")
    tiny = torch.finfo(torch.float32).tiny ** min(1.0, power)  # its root, too, is > 0
    number = "finite and >= 0"
    for name, good, domain in (
        ("lr", 0 <= lr < math.inf, number),
        ("threshold", 0 <= threshold < math.inf, number),
        ("weight_decay", 0 <= group["weight_decay"] < math.inf, number),
        ("power", 0 < power < math.inf, "finite and > 0"),
        ("eps", tiny <= group["eps"] < math.inf, f"finite and > 0 in float32 (at least {tiny:.2e})"),
        ("state_dtype", group["state_dtype"] in STATE_DTYPES, f"one of {', '.join(STATE_DTYPES)}"),
        ("density", density is None or 0 < density <= 1, "in (0, 1]"),
    ):
        if not good:
            raise ValueError(f"{name} must be {domain}, got {group[name]!r}")
    if density is not None and threshold > 0:
        raise ValueError(f"threshold={threshold} and density={density} exclude each other. Pass one of them.")
    for p in group["params"]:
        if p.is_complex():
            raise ValueError(f"CLASSP does not support complex parameters, got one of dtype {p.dtype}")
        if group["fused"] and not may_fuse(group, p.device):
            names = ("power", "apply_decay", "state_dtype", "foreach")
            got = ", ".join(f"{name}={group[name]!r}" for name in names)
            raise ValueError(
                "fused=True is PyTorch's Adagrad (torch >= 2.13, CPU or CUDA), which needs power=2, apply_decay=True, "
                f"state_dtype='float32' and no foreach, got {got} on {p.device}. Leave fused out."
            )
