"""The CLASSP optimizer: Algorithm 1 of arXiv 2405.09637. With p = 2 the step is PyTorch's fused Adagrad."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._torch import FUSED_DEVICES, is_sharded, local, over_shards
from .state import STATE_DTYPES, expand, random_bits
from .step import bad_flags, batches, cuts, pieces, reads_back, refuse_bad, store, update

__all__ = ["CLASSP"]


class CLASSP(Optimizer):
    r"""Continual Learning through Adjustment Suppression and Sparsity Promotion (Ludwig 2024, arXiv 2405.09637).

    An AdaGrad-like optimizer whose per-weight accumulator `s`, kept from task to task, is the memory of what earlier
    tasks needed: a weight that many large gradients went through takes small steps afterwards.

    Algorithm 1, for every coordinate i with gradient g and accumulator s (0 at the very start)::

        mask_i = g_i^2 > threshold                         (strictly greater)
        s_i   <- s_i + |g_i|^p                             where mask_i
        w_i   <- w_i - lr * g_i / (eps + s_i)^(1/p)        where mask_i and apply_decay
        w_i   <- w_i - lr * g_i                            where mask_i and not apply_decay

    The current gradient enters s before it scales the step (the paper's equation 1 sums to t-1; its Algorithm 1 is
    followed here). With `power=2, threshold=0` this is `torch.optim.Adagrad(initial_accumulator_value=eps, eps=0)`,
    and PyTorch's fused Adagrad takes the step.

    The math runs in float32 and is cast to the parameter's dtype once, at the end. State: one tensor of the
    parameter's shape and `state_dtype`, `state[p]["accumulator"]`, of that dtype after `load_state_dict` too. It holds
    s + offset, where the group's `offset` is eps with `power=2` in float32 and 0 otherwise; `accumulator(p)` is s.

    Args:
        params: parameters, named parameters or parameter groups. Every hyperparameter may differ from group to group.
        lr: learning rate, a float or a 1-element tensor, >= 0.
        threshold: gradients whose square does not exceed it are ignored. In squared-gradient units, so it depends on
            loss scale, batch size, clipping and accumulation; `density` does not.
        power: the p of Algorithm 1, > 0. The paper's experiments use 1 and 2; with an empty memory 1 underfits.
        eps: added to the accumulator inside the root, > 0. In units of |g|^p: near the accumulator's mean it erases
            the memory, far below it the first steps are sign steps on every weight.
        apply_decay: if False, gradients are accumulated but the step is plain SGD ("learn and remember", before
            "suppress").
        weight_decay: decoupled (Loshchilov & Hutter 2019): `w <- w * (1 - lr * weight_decay)` for every coordinate of
            a parameter that has a gradient.
        density: the fraction, in (0, 1], of a tensor's nonzero gradients that may update: the threshold becomes the
            (1 - density) quantile of g^2 over them, estimated per tensor and step from up to 4,096 of them
            (`cuts_for_density` gives the error). Excludes `threshold`. Sharded gradients are gathered, one at a time.
        maximize: ascend instead of descend.
        foreach: True: PyTorch's multi-tensor operations, never the fused step, on groups of at most 2**24 weights; the
            default on GPUs where the fused step is not possible. False: one tensor at a time.
        fused: whether PyTorch's fused Adagrad takes the step. Default: where it can, with `power=2`, `apply_decay` and
            a float32 state on CPUs and CUDA devices, unless the step is compiled.
        state_dtype: `"float32"`; `"bfloat16"` or `"uint8"` keep the memory in two bytes or one a weight, rounded at
            random so that small increments count on average (error bounds: `classp_hf/optim/state.py`).

    A gradient that is not finite, or so large that |g|^p could overflow the memory (|g|^p > 2e31), reaches neither
    weights nor memory, where it would stay for ever. On CPUs `step` raises before it updates anything. On other
    devices, and when compiled, it does not wait for the gradients: the whole step, weight decay included, is skipped,
    and counted in `skipped_steps()`.

    Raises:
        ValueError: a hyperparameter out of its range, both `threshold` and `density`, both `foreach` and `fused`,
            `fused=True` where that step is not CLASSP's or does not exist; a complex parameter.
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
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        _check_hyperparameters(defaults)
        super().__init__(params, defaults)
        self._skipped = _counter(self.param_groups[0]["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_hyperparameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["offset"] = _offset(group)
        try:
            for p in group["params"]:
                if p.is_complex():
                    raise ValueError(f"CLASSP does not support complex parameters, got one of dtype {p.dtype}")
                if group["fused"] and (p.device.type not in FUSED_DEVICES or p.dtype == torch.float64):
                    raise ValueError(
                        f"fused=True is not possible for a {p.dtype} parameter on {p.device}. Leave it out."
                    )
        except ValueError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_skipped" not in vars(self):  # a copy
            self._skipped = _counter(self.param_groups[0]["params"])
        for group in self.param_groups:  # of an older version
            for name, value in {**self.defaults, "state_dtype": "float32", "offset": 0.0}.items():
                if name != "differentiable":  # PyTorch's own
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
            for key, tensor in given["state"].get(saved_id, {}).items():
                self.state[p][key] = tensor.to(device=p.device, copy=True)

    @torch.no_grad()
    def accumulator(self, p: Tensor) -> Tensor:
        """The memory of parameter `p`, float32, of its shape and sharding; zeros before its first step. Not to be
        written to: it may be the state itself."""
        state = self.state.get(p)
        if not state:
            return torch.zeros_like(p, dtype=torch.float32, memory_format=torch.preserve_format)
        values, offset = expand(state["accumulator"], state.get("base")), self._group_of(p)["offset"]
        return (values - offset).clamp_(min=0) if offset else values

    @torch.no_grad()
    def set_accumulator(self, p: Tensor, values: Tensor) -> None:
        """Make `values` (float32, >= 0, of the shape, device and sharding of `p`) its memory."""
        group = self._group_of(p)
        _align_offset(group, self.state)
        state, mine = self._new_state(p, group), local(values).float()
        self.state[p] = state
        if state["accumulator"].dtype == torch.float32:
            local(state["accumulator"]).copy_(mine).add_(group["offset"])
        else:
            store(local(state["accumulator"]), state.get("base"), mine, random_bits(mine, mine))

    def _group_of(self, p: Tensor) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(q is p for q in group["params"]))

    def _new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        dtype = STATE_DTYPES[group["state_dtype"]]
        if dtype == torch.uint8 and is_sharded(p.detach()):
            raise ValueError("state_dtype='uint8' is not supported on sharded (DTensor) parameters. Use 'bfloat16'.")
        empty = torch.full_like(p, group["offset"], dtype=dtype, memory_format=torch.preserve_format)
        state = {"accumulator": empty}
        if dtype == torch.uint8:
            state["base"] = torch.zeros(-(-p.numel() // 256), dtype=torch.int16, device=p.device)
        return state

    @torch.no_grad()
    def update_density(self) -> float:
        """Share of all coordinates, in [0, 1], that a step with the present gradients would update.

        Call it after the backward pass and before `zero_grad`; it reads every gradient once, and one number back.
        """
        total, grads, updated = 0, [], []
        for group in self.param_groups:
            total += sum(p.numel() for p in group["params"])
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            for device in dict.fromkeys(p.device for p in params):
                here = [p for p in params if p.device == device]
                for p, cut in zip(here, cuts(here, group)):
                    grads.append(p.grad)
                    updated.append((local(p.grad).float().abs() > (0.0 if cut is None else cut)).sum())
        updated = over_shards(updated, grads, "sum")
        return float(torch.stack([n.to(updated[0].device) for n in updated]).sum()) / total if updated else 0.0

    def skipped_steps(self) -> int:
        """How many steps were skipped, on a GPU or compiled, for bad gradients. Waits for the device."""
        return 0 if self._skipped.is_meta else int(self._skipped)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one optimization step.

        Args:
            closure: re-evaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        work: dict[tuple[int, torch.device], list[Tensor]] = {}
        for number, group in enumerate(self.param_groups):
            _align_offset(group, self.state)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(
                        f"CLASSP does not support sparse gradients (parameter of shape {tuple(p.shape)}). "
                        "Build the embedding with sparse=False."
                    )
                if not self.state[p]:
                    # Also when nothing passes the threshold: distributed checkpoints initialise the state with a
                    # zero-gradient step and expect to find it.
                    self.state[p] = self._new_state(p, group)
                work.setdefault((number, p.device), []).append(p)
        grads = {device: [] for _, device in work}  # type: ignore[var-annotated]
        for (number, device), params in work.items():
            grads[device] += [(p.grad, self.param_groups[number]["power"]) for p in params]
        refuse_bad([pair for device, pairs in grads.items() if reads_back(device) for pair in pairs])
        found = self._found_inf([pair for device, pairs in grads.items() if not reads_back(device) for pair in pairs])
        for (number, device), params in work.items():
            group = self.param_groups[number]
            for batch in batches(pieces(params, self.state, group), group):
                update(batch, group, found.get(device))
        return loss

    def _found_inf(self, grads: list[tuple[Tensor, float]]) -> dict[torch.device, Tensor]:
        """For every device: 1.0 if a gradient, given with its power, is bad on any rank; else 0.0."""
        if not grads:
            return {}
        flags = bad_flags(grads)
        found = torch.stack([flag.to(flags[0].device) for flag in flags]).amax()
        if self._skipped.device != found.device:  # the model was moved
            self._skipped = torch.zeros_like(self._skipped, device=found.device)
        self._skipped.add_(found.long())  # in place, for compiled and captured steps
        return {device: found.to(device) for device in dict.fromkeys(flag.device for flag in flags)}


def _counter(params: list[Tensor]) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=params[0].device if params else None)


def _offset(group: dict[str, Any]) -> float:
    """What the state of `group` holds beside the accumulator: what fused Adagrad needs."""
    return group["eps"] if group["power"] == 2 and group["state_dtype"] == "float32" else 0.0


def _align_offset(group: dict[str, Any], state: dict[Tensor, Any]) -> None:
    """Adapt the state to a changed eps or power, or if an older version saved it."""
    if (offset := _offset(group)) == group["offset"]:
        return
    for p in group["params"]:
        if p in state:
            state[p]["accumulator"].add_(offset - group["offset"]).clamp_(min=offset)
    group["offset"] = offset


def _check_hyperparameters(group: dict[str, Any]) -> None:
    for name in ("lr", "threshold", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor) and (name != "lr" or value.numel() != 1):
            raise ValueError(f"{name} must be a float{' or a 1-element tensor' if name == 'lr' else ''}, got {value}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and >= 0, got {value}")
    if not (math.isfinite(group["power"]) and group["power"] > 0):
        raise ValueError(f"power must be finite and > 0, got {group['power']}")
    tiny = torch.finfo(torch.float32).tiny ** min(1.0, group["power"])  # its root, too, is > 0
    if not (math.isfinite(group["eps"]) and group["eps"] >= tiny):
        raise ValueError(f"eps must be finite and > 0 in float32 (at least {tiny:.2e}), got {group['eps']}")
    if group["state_dtype"] not in STATE_DTYPES:
        raise ValueError(f"state_dtype must be one of {', '.join(STATE_DTYPES)}, got {group['state_dtype']!r}")
    if group["fused"] and group["foreach"]:
        raise ValueError("foreach=True and fused=True exclude each other. Pass one of them.")
    needed = {"power": 2, "apply_decay": True, "state_dtype": "float32"}
    if group["fused"] and (other := [name for name, value in needed.items() if group[name] != value]):
        got = ", ".join(f"{name}={group[name]!r}" for name in other)
        raise ValueError(
            "fused=True is PyTorch's Adagrad, which needs power=2, apply_decay=True and state_dtype='float32', "
            f"got {got}. Leave fused out."
        )
    density = group["density"]
    if density is not None:
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], got {density}")
        if group["threshold"] > 0:
            raise ValueError(
                f"threshold={group['threshold']} and density={density} exclude each other: density sets the threshold "
                "from the gradients. Pass one of them."
            )
