"""The CLASSP optimizer: Algorithm 1 of arXiv 2405.09637 as one pure function on tensors, and its foreach form.

The compiled CPU form is in kernels.py, that for GPUs in triton_kernels.py, low-bit accumulators in state.py.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import kernels
from .state import STATE_DTYPES, compress, expand, random_bits

__all__ = ["CLASSP"]

# Sample size of the quantile that `density` needs: the standard error of an estimated density d is about
# sqrt(d (1 - d) / 4096), at most 0.008.
_DENSITY_SAMPLE = 4096


# Weights in one call of the multi-tensor operations, which need temporaries of that size, unless one tensor has more.
_FOREACH_BATCH = 2**24


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
    followed here). With `power=2, threshold=0` this is `torch.optim.Adagrad(initial_accumulator_value=eps, eps=0)`.

    The math runs in float32 and is cast to the parameter's dtype once, at the end. State: one tensor of the parameter's
    shape and `state_dtype`, `state[p]["accumulator"]`; of that dtype after `load_state_dict` too.

    Args:
        params: parameters, named parameters or parameter groups. Every hyperparameter may differ from group to group.
        lr: learning rate, a float or a 1-element tensor, >= 0.
        threshold: gradients whose square does not exceed it are ignored. In squared-gradient units, so it depends on
            loss scale, batch size, clipping and accumulation; `density` does not.
        power: the p of Algorithm 1, > 0. The paper's experiments use 1 and 2; with an empty memory 1 underfits.
        eps: added to the accumulator inside the root, > 0. In units of |g|^p: near the accumulator's mean it erases the
            memory, far below it the first steps are sign steps on every weight.
        apply_decay: if False, gradients are accumulated but the step is plain SGD ("learn and remember", before
            "suppress").
        weight_decay: decoupled (Loshchilov & Hutter 2019): `w <- w * (1 - lr * weight_decay)` for every coordinate of
            a parameter that has a gradient.
        density: the fraction, in (0, 1], of a tensor's nonzero gradients that may update: the threshold becomes the
            (1 - density) quantile of g^2 over them, estimated per tensor and step from a fixed strided sample of up
            to 4,096 coordinates, without host synchronisation. Excludes `threshold`.
        maximize: ascend instead of descend.
        foreach: use PyTorch's multi-tensor operations. Default: on for GPU tensors, off on CPU, where whole-model
            temporaries make them slower.
        fused: update in one pass, tensors of the dtypes it takes (float32, bfloat16; on a GPU float16 too): on CPU with the
            compiled step, the default where it was built; on a GPU, if True, with Triton's. That has run on no GPU yet,
            and is compared with PyTorch's operations before its first step on one. It heeds `torch.amp.GradScaler` by
            itself, without waiting for it.
        state_dtype: `"float32"`; `"bfloat16"` or `"uint8"` keep the memory in two bytes or one a weight, rounded at
            random so that small increments count on average (error bounds: `classp_hf/optim/state.py`).

    Raises:
        ValueError: a hyperparameter out of its range, both `threshold` and `density`, or both `foreach` and `fused`; a
            complex parameter.
        RuntimeError: `fused=True` where the compiled step was not built and there is no Triton. From `step`: a sparse
            gradient; a NaN or infinite gradient. Those never reach a weight or the memory, where they would stay for
            ever; the fused step has updated the other coordinates when it finds them, and on a GPU, which it does not wait
            for, a later `step` raises.
    """

    _stepper: Any = None  # of tensors on GPUs

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
        defaults = {
            "lr": lr,
            "threshold": threshold,
            "power": power,
            "eps": eps,
            "apply_decay": apply_decay,
            "weight_decay": weight_decay,
            "density": density,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "state_dtype": state_dtype,
        }
        _check_hyperparameters(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_hyperparameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                self.param_groups.pop()
                raise ValueError(f"CLASSP does not support complex parameters, got one of dtype {p.dtype}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of an older version
            for name, value in {**self.defaults, "state_dtype": "float32"}.items():
                if name != "differentiable":  # PyTorch's own
                    group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, keeping the accumulators in their own dtype.

        `torch.optim.Optimizer` casts state to the parameter's dtype, which would truncate the memory of a bf16 model at
        every round trip (accelerate makes one when it wraps the optimizer).
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
        """The memory of parameter `p`, float32, of its shape and sharding; zeros before its first step.

        With `state_dtype="float32"` this is the state itself, which the next step changes; otherwise a copy.
        """
        state = self.state.get(p)
        if not state:
            return torch.zeros_like(p, dtype=torch.float32, memory_format=torch.preserve_format)
        return expand(state["accumulator"], state.get("base"))

    @torch.no_grad()
    def set_accumulator(self, p: Tensor, values: Tensor) -> None:
        """Make `values` (float32, >= 0, of the shape, device and sharding of `p`) its memory."""
        group = next(g for g in self.param_groups if any(q is p for q in g["params"]))
        self._init_state(p, group["state_dtype"])
        local = _local(values).float()
        self._store(p, local, local if group["state_dtype"] == "float32" else random_bits(local, local))

    def _init_state(self, p: Tensor, state_dtype: str) -> None:
        state, dtype = self.state[p], STATE_DTYPES[state_dtype]
        if state_dtype == "uint8" and type(p.detach()) is not Tensor:
            raise ValueError("state_dtype='uint8' is not supported on sharded (DTensor) parameters. Use 'bfloat16'.")
        state["accumulator"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        if dtype == torch.uint8:
            state["base"] = torch.zeros(-(-p.numel() // 256), dtype=torch.int16, device=p.device)

    def _store(self, p: Tensor, values: Tensor, random: Tensor) -> None:
        state = self.state[p]
        compressed, base = compress(values, state["accumulator"].dtype, random)
        _local(state["accumulator"]).copy_(compressed)
        if base is not None:
            state["base"].copy_(base)

    @torch.no_grad()
    def update_density(self) -> float:
        """Share of all coordinates, in [0, 1], that a step with the present gradients would update.

        Call it after the backward pass and before `zero_grad`; it reads every gradient once, and one number back.
        """
        total, grads, updated = 0, [], []
        for group in self.param_groups:
            for p in group["params"]:
                total += p.numel()
                if p.grad is not None and p.numel() > 0:
                    grads.append(p.grad)
                    updated.append((_shrink(_local(p.grad), _threshold(p.grad, group)) != 0).sum())
        updated = _over_shards(updated, grads, "sum")
        return float(torch.stack([n.to(updated[0].device) for n in updated]).sum()) / total if updated else 0.0

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

        if self._stepper and not torch.compiler.is_compiling():
            self._raise_if_found(self._stepper.found())
        work: list[tuple[dict[str, Any], dict[str, list[Tensor]]]] = []
        for group in self.param_groups:
            by_form: dict[str, list[Tensor]] = {"compiled": [], "triton": [], "torch": []}
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
                    self._init_state(p, group["state_dtype"])
                by_form[self._form(p, group)].append(p)
            work.append((group, by_form))
        _check_gradients([p.grad for _, by_form in work for p in by_form["torch"]])  # type: ignore[misc]

        bad = 0
        for number, (group, by_form) in enumerate(work):
            # in one order on every rank: of sharded gradients it takes a collective call
            thresholds = _thresholds([p for p in group["params"] if p.grad is not None], by_form["compiled"], group)
            names = ("lr", "power", "eps", "apply_decay", "weight_decay", "maximize")
            hyperparameters = {name: group[name] for name in names}
            if compiled := by_form["compiled"]:
                bad += kernels.classp_step_(
                    *self._tensors(compiled),
                    [float(thresholds[p]) for p in compiled],
                    **{**hyperparameters, "lr": float(group["lr"])},
                )
            if on_gpu := by_form["triton"]:
                if self._stepper is None:
                    self._stepper = _triton_kernels().Stepper()
                scaled = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
                self._stepper(
                    number, *self._tensors(on_gpu), [thresholds[p] for p in on_gpu], **hyperparameters, **scaled
                )
            for params in _batches(by_form["torch"], group["foreach"]):
                self._step_with_torch(params, [thresholds[p] for p in params], hyperparameters)
        # every rank must come to the same verdict
        if sharded := [p for _, by_form in work for p in by_form["compiled"] if _is_sharded(p)][:1]:
            bad = int(_over_shards([torch.tensor(bad)], sharded, "sum")[0])
        if on_gpu := [p for _, by_form in work for p in by_form["triton"]]:
            sharded = [p for p in on_gpu if _is_sharded(p)][:1]
            over_ranks = (lambda number: _over_shards([number], sharded, "sum")[0]) if sharded else None
            self._stepper.send({p.device for p in on_gpu}, over_ranks)
        self._raise_if_found(bad)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `step` itself heeds `torch.amp.GradScaler`'s `grad_scale` and `found_inf`, without waiting for them.

        Under `fused=True`, as of torch's own optimizers: accelerate then takes a skipped step for a step.
        """
        pairs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(pairs) and all(self._form(p, group) == "triton" for p, group in pairs)

    def _form(self, p: Tensor, group: dict[str, Any]) -> str:
        """Which form of the step updates `p`: "compiled" (kernels.py), "triton" or "torch"."""
        if group["fused"] is False or group["foreach"] or torch.compiler.is_compiling():
            return "torch"
        accumulator = self.state.get(p, {}).get("accumulator")
        accumulator = None if accumulator is None else _local(accumulator)
        if accumulator is not None and not accumulator.is_contiguous():
            return "torch"
        tensors = _local(p.detach()), _local(p.grad), accumulator  # type: ignore[arg-type]
        if kernels.takes(*tensors):
            return "compiled"
        if not (p.is_cuda and group["fused"]):
            return "torch"
        return "triton" if _triton_kernels() and _triton_kernels().takes(*tensors) else "torch"

    def _tensors(self, params: list[Tensor]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        states = [self.state[p] for p in params]
        return (
            [_local(p.detach()) for p in params],
            [_local(p.grad) for p in params],  # type: ignore[arg-type]
            [_local(state["accumulator"]) for state in states],
            [state.get("base") for state in states],
        )

    def _raise_if_found(self, bad: int) -> None:
        if bad:
            coordinates = f"{bad} coordinate{'s' * (bad > 1)}"
            raise _non_finite(coordinates, "Nothing there was updated, nor entered the memory.")

    def _step_with_torch(self, params: list[Tensor], thresholds: list[Any], hyperparameters: dict[str, Any]) -> None:
        weights = [_local(p.detach()) for p in params]
        grads = [_local(p.grad) for p in params]  # type: ignore[arg-type]
        low_bit = self.state[params[0]]["accumulator"].dtype != torch.float32
        random = [random_bits(g, w) for g, w in zip(grads, weights)] if low_bit else []
        accumulators = [_local(self.accumulator(p)) for p in params]
        shrunk = [_shrink(g, threshold) for g, threshold in zip(grads, thresholds)]
        if len(params) > 1:
            _foreach_classp_(weights, shrunk, accumulators, **hyperparameters)
        else:
            classp_(weights[0], shrunk[0], accumulators[0], **hyperparameters)
        for p, values, bits in zip(params, accumulators, random):
            self._store(p, values, bits)


@functools.cache
def _triton_kernels() -> Any:
    """The module, or None where there is no Triton, which PyTorch brings where it supports GPUs with it."""
    try:
        from . import triton_kernels
    except Exception:  # a broken one, too
        return None
    return triton_kernels


def _check_hyperparameters(group: dict[str, Any]) -> None:
    for name in ("lr", "threshold", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor) and (name != "lr" or value.numel() != 1):
            raise ValueError(f"{name} must be a float{' or a 1-element tensor' if name == 'lr' else ''}, got {value}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and >= 0, got {value}")
    if not (math.isfinite(group["power"]) and group["power"] > 0):
        raise ValueError(f"power must be finite and > 0, got {group['power']}")
    tiny = torch.finfo(torch.float32).tiny
    if not (math.isfinite(group["eps"]) and group["eps"] >= tiny):
        raise ValueError(f"eps must be finite and > 0 in float32 (at least {tiny:.2e}), got {group['eps']}")
    if group["state_dtype"] not in STATE_DTYPES:
        raise ValueError(f"state_dtype must be one of {', '.join(STATE_DTYPES)}, got {group['state_dtype']!r}")
    if group["fused"] and group["foreach"]:
        raise ValueError("foreach=True and fused=True exclude each other. Pass one of them.")
    if group["fused"] and not (kernels.BUILT or _triton_kernels()):
        raise RuntimeError(
            "fused=True, but CLASSP's compiled step was not built: there was no C compiler when classp_hf was installed. "
            "Install one (gcc or clang) and then classp_hf again, or leave fused out."
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


def _check_gradients(grads: list[Tensor]) -> None:
    """Refuse what would corrupt the memory, before any weight or accumulator changes."""
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return  # reading a value back to the host is not possible there
    grads = [g for g in grads if g.numel() > 0]
    if not grads:
        return
    on_cpu = all(type(g) is Tensor and g.device.type == "cpu" for g in grads)
    if on_cpu and all(torch.linalg.vector_norm(g).isfinite() for g in grads):
        return  # a 2-norm is many times faster there than the maximum; it may overflow for finite gradients: look again
    shards = [_local(g) for g in grads]
    largest = [torch.linalg.vector_norm(g, math.inf) if g.numel() else g.new_zeros(()) for g in shards]
    if any(_is_sharded(g) for g in grads):
        # all ranks must come to one verdict, and a maximum over ranks may lose a NaN
        largest = _over_shards([x.nan_to_num(math.inf, math.inf) for x in largest], grads, "max")
    if not all(torch.stack([x.to(largest[0].device, torch.float32) for x in largest]).isfinite().tolist()):
        bad = [tuple(g.shape) for g, x in zip(grads, largest) if not x.isfinite()]
        raise _non_finite(f"{len(bad)} of {len(grads)} tensors (first shape: {bad[0]})", "Nothing was updated.")


def _non_finite(where: str, what_happened: str) -> RuntimeError:
    return RuntimeError(
        f"CLASSP got NaN or infinite gradients in {where}. {what_happened} Lower the learning rate, clip the gradients, or "
        "check the data and the loss."
    )


def _is_sharded(x: Any) -> bool:
    """Whether `x` is a DTensor, which holds one rank's part of a tensor."""
    if type(x) in (Tensor, torch.nn.Parameter):
        return False  # without the import, which takes long
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _local(x: Tensor) -> Tensor:
    """This rank's part of a sharded (DTensor) tensor, maybe empty, sharing its memory; any other tensor as it is."""
    return x.to_local() if _is_sharded(x) else x  # type: ignore[attr-defined]


def _over_shards(values: list[Tensor], tensors: list[Tensor], operation: str) -> list[Tensor]:
    """Combine what every rank computed from its part of a tensor, by `operation` ("sum" or "max").

    Collective: every rank must call it with the same tensors in the same order, whatever is empty on it. One all-reduce
    for all tensors that are sharded alike.

    Args:
        values: of any shapes, which are the same on every rank.
        tensors: which tensor each value belongs to. Values of tensors that are not sharded are returned as they are.
    """
    alike: dict[Any, list[int]] = {}
    for i, t in enumerate(tensors):
        if _is_sharded(t):
            key = t.device_mesh, t.placements, values[i].dtype  # type: ignore[attr-defined]
            alike.setdefault(key, []).append(i)
    values = list(values)
    for (mesh, placements, _), indices in alike.items():
        from torch.distributed.tensor import DTensor, Partial, Replicate

        parts = [Replicate() if placement.is_replicate() else Partial(operation) for placement in placements]
        joined = torch.cat([values[i].reshape(-1) for i in indices])
        joined = DTensor.from_local(joined, mesh, parts, run_check=False).full_tensor()
        for i, value in zip(indices, joined.split([values[i].numel() for i in indices])):
            values[i] = value.view_as(values[i])
    return values


def _batches(params: list[Tensor], foreach: bool | None) -> list[list[Tensor]]:
    """What goes into one call: tensors of one device and dtype with foreach, of `_FOREACH_BATCH` weights in all; else one tensor."""
    if not (all(_local(p.detach()).is_cuda for p in params) if foreach is None else foreach):
        return [[p] for p in params]
    batches: list[list[Tensor]] = []
    filling: dict[Any, tuple[list[Tensor], float]] = {}
    for p in params:
        kind = p.device, p.dtype, p.grad.dtype  # type: ignore[union-attr]
        batch, filled = filling.get(kind, ([], math.inf))
        if filled + p.numel() > _FOREACH_BATCH:
            batch, filled = [], 0
            batches.append(batch)
        batch.append(p)
        filling[kind] = batch, filled + p.numel()
    return batches


def classp_(
    param: Tensor,
    g: Tensor,
    accumulator: Tensor,
    *,
    lr: float | Tensor,
    power: float,
    eps: float,
    apply_decay: bool,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Algorithm 1 on one tensor; changes `param` and `accumulator` (float32) in place. `g`: from `_shrink`, float32."""
    if power == 2:
        accumulator.addcmul_(g, g)
    else:
        accumulator.add_(g.abs() if power == 1 else g.abs().pow_(power))
    root = accumulator + eps
    if power == 2:
        root.sqrt_()
    elif power != 1:
        root.pow_(1 / power)

    w = param if param.dtype in (torch.float32, torch.float64) else param.float()
    if weight_decay:
        w.mul_(1 - lr * weight_decay)
    sign = 1 if maximize else -1
    if isinstance(lr, Tensor):  # never read back: a Python float would synchronise, and recompile
        w.add_((g / root if apply_decay else g) * lr.to(w.device), alpha=sign)
    elif apply_decay:
        w.addcdiv_(g.to(w.dtype), root.to(w.dtype), value=sign * lr)
    else:
        w.add_(g, alpha=sign * lr)
    if w is not param:
        param.copy_(w)


def _foreach_classp_(
    params: list[Tensor],
    gs: list[Tensor],
    accumulators: list[Tensor],
    *,
    lr: float | Tensor,
    power: float,
    eps: float,
    apply_decay: bool,
    weight_decay: float,
    maximize: bool,
) -> None:
    """`classp_` over lists of tensors of one device and dtype."""
    if power == 1:
        torch._foreach_add_(accumulators, torch._foreach_abs(gs))
        roots = torch._foreach_add(accumulators, eps)
    elif power == 2:
        torch._foreach_addcmul_(accumulators, gs, gs)
        roots = torch._foreach_add(accumulators, eps)
        torch._foreach_sqrt_(roots)
    else:
        powers = torch._foreach_abs(gs)
        torch._foreach_pow_(powers, power)
        torch._foreach_add_(accumulators, powers)
        roots = torch._foreach_add(accumulators, eps)
        torch._foreach_pow_(roots, 1 / power)

    if isinstance(lr, Tensor):
        lr = lr.reshape(()).to(params[0].device)
    ws = params if params[0].dtype in (torch.float32, torch.float64) else [p.float() for p in params]
    if weight_decay:
        torch._foreach_mul_(ws, 1 - lr * weight_decay)
    sign = 1 if maximize else -1
    if isinstance(lr, Tensor):
        steps = torch._foreach_div(gs, roots) if apply_decay else gs
        steps = torch._foreach_mul(steps, lr.float())
        torch._foreach_add_(ws, steps, alpha=sign)
    elif apply_decay:
        dtype = ws[0].dtype
        torch._foreach_addcdiv_(ws, [g.to(dtype) for g in gs], [r.to(dtype) for r in roots], value=sign * lr)
    else:
        torch._foreach_add_(ws, gs, alpha=sign * lr)
    if ws is not params:
        torch._foreach_copy_(params, ws)


def _threshold(grad: Tensor, group: dict[str, Any]) -> float | Tensor:
    """What g^2 has to exceed."""
    return group["threshold"] if group["density"] is None else _density_threshold(grad, group["density"])


def _thresholds(params: list[Tensor], compiled: list[Tensor], group: dict[str, Any]) -> dict[Tensor, float | Tensor]:
    """`_threshold` of every parameter's gradient; of those that the compiled step takes in one call."""
    if (density := group["density"]) is None:
        return dict.fromkeys(params, group["threshold"])
    whole = [p for p in compiled if not _is_sharded(p.grad)]
    grads: list[Tensor] = [p.grad for p in whole]  # type: ignore[misc]
    strides = [_sample_stride(g) for g in grads]
    found: dict[Tensor, Any] = dict(zip(whole, kernels.density_thresholds(grads, strides, density))) if whole else {}
    return {p: found[p] if p in found else _threshold(p.grad, group) for p in params}  # type: ignore[arg-type]


def _shrink(grad: Tensor, threshold: float | Tensor) -> Tensor:
    """The gradient in float32 with the coordinates that may not update set to zero."""
    g = grad.float()
    if isinstance(threshold, Tensor) or threshold > 0:
        return torch.where(g.square() > threshold, g, 0.0)
    return g  # a zero gradient neither accumulates nor moves, so there is nothing to mask


def _density_threshold(g: Tensor, density: float) -> Tensor:
    """The (1 - density) quantile of g^2 over the nonzero coordinates of a strided sample, as a 0-dim tensor.

    Of a sharded (DTensor) gradient it is that of the whole tensor, to the bit and on every rank; a collective call.
    """
    if g.numel() == 0:
        return _local(g).new_zeros((), dtype=torch.float32)
    stride = _sample_stride(g)
    if _is_sharded(g):
        begin = _first_index(g.shape, g.device_mesh, g.placements)  # type: ignore[attr-defined]
        sample = _sample_of_shard(_local(g), begin, g.numel(), stride)
        sample = _over_shards([sample], [g], "sum")[0]
    else:
        sample = g.reshape(-1)[::stride]
    squares = sample.float().square()
    if squares.device.type == "cpu" and not torch.compiler.is_compiling():
        return _selected_quantile(squares, density)
    return _sorted_quantile(squares, density)


def _sample_stride(g: Tensor) -> int:
    stride = max(1, g.numel() // _DENSITY_SAMPLE)
    while stride > 1 and math.gcd(stride, g.shape[-1]) != 1:  # else whole columns would never be sampled
        stride += 1
    return stride


def _selected_quantile(squares: Tensor, density: float) -> Tensor:
    """The (1 - density) quantile of the positive `squares`, 0 if there are none. Many times faster than sorting on a CPU."""
    positive = squares[squares > 0]
    rank = math.ceil((1 - density) * len(positive) - 1e-6)  # (1 - 1/3) * 9 is more than 6
    return positive.kthvalue(rank).values if rank else squares.new_zeros(())


def _sorted_quantile(squares: Tensor, density: float) -> Tensor:
    """The same without reading anything back to the host."""
    squares = squares.sort().values
    # Zeros sort first; index 0 of the padded list is "no threshold".
    padded = torch.cat([squares.new_zeros(1), squares])
    zeros = (squares == 0).sum()
    rank = zeros + ((1 - density) * (squares.numel() - zeros)).ceil().long()
    return padded.index_select(0, rank.reshape(1)).squeeze(0)


def _sample_of_shard(shard: Tensor, begin: int, total: int, stride: int) -> Tensor:
    """`full.reshape(-1)[::stride]` with zeros for the coordinates that `shard` lacks, so that the shards' sum is the sample.

    Args:
        shard: consecutive coordinates of `full.reshape(-1)`, from index `begin` on; any shape, maybe empty.
        total: how many coordinates `full` has.
    """
    sample = shard.new_zeros(-(-total // stride))
    first = -(-begin // stride)  # index in the sample of the first coordinate of the shard that is in it
    mine = shard.reshape(-1)[first * stride - begin :: stride]
    sample[first : first + mine.numel()] = mine
    return sample


def _first_index(shape: torch.Size, mesh: Any, placements: Any) -> int:
    """Where this rank's part begins in the flattened tensor of `shape`."""
    from torch.distributed.tensor import Shard

    sharded = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if len(sharded) > 1 or any(type(placements[i]) is not Shard or placements[i].dim != 0 for i in sharded):
        raise ValueError(
            f"density needs parameters that are whole or sharded by rows once, as FSDP2 does it, got placements {tuple(placements)}. "
            "Use threshold."
        )
    if not sharded:
        return 0
    rows = -(-shape[0] // mesh.size(sharded[0]))  # a rank, of which the last ranks may lack some or all
    return min(rows * mesh.get_local_rank(sharded[0]), shape[0]) * math.prod(shape[1:])
