"""The CLASSP optimizer: Algorithm 1 of arXiv 2405.09637 as one pure function on tensors, and its foreach form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["CLASSP"]

# Sample size of the quantile that `density` needs: the standard error of an estimated density d is about
# sqrt(d (1 - d) / 16384), at most 0.004.
_DENSITY_SAMPLE = 16_384

# On the CPU a tensor is updated in blocks of so many weights, whose temporaries stay in the cache.
_BLOCK = 65_536


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

    The math runs in float32 and is cast to the parameter's dtype once, at the end. State: one float32 tensor of the
    parameter's shape, `state[p]["accumulator"]`, float32 after `load_state_dict` too.

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
            to 16,384 coordinates, without host synchronisation. Excludes `threshold`.
        maximize: ascend instead of descend.
        foreach: use the multi-tensor kernels. Default: on for GPU tensors, off on CPU, where whole-model temporaries
            make them slower.

    Raises:
        ValueError: a hyperparameter out of its range, or both `threshold` and `density`; a complex parameter.
        RuntimeError: from `step`, before anything is changed: a sparse gradient; a gradient with NaN or infinity,
            which would stay in the memory for ever.
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, keeping the accumulators in float32.

        `torch.optim.Optimizer` casts floating-point state to the parameter's dtype, which would truncate the memory of
        a bf16 model at every round trip (accelerate makes one when it wraps the optimizer).
        """
        super().load_state_dict(state_dict)
        saved_ids = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = itertools.chain.from_iterable(g["params"] for g in self.param_groups)
        for saved_id, p in zip(saved_ids, params):
            if saved_id in state_dict["state"]:
                accumulator = state_dict["state"][saved_id]["accumulator"]
                self.state[p]["accumulator"] = accumulator.to(device=p.device, dtype=torch.float32, copy=True)

    @torch.no_grad()
    def update_density(self) -> float:
        """Share of all coordinates, in [0, 1], that a step with the present gradients would update.

        Call it after the backward pass and before `zero_grad`; it reads every gradient once, and one number back.
        """
        total, updated = 0, []
        for group in self.param_groups:
            for p in group["params"]:
                total += p.numel()
                if p.grad is not None and p.numel() > 0:
                    updated.append(_local((_shrink(p.grad, group["threshold"], group["density"]) != 0).sum()))
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

        with_gradient = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        _check_gradients([p for params in with_gradient for p in params])
        for group, params in zip(self.param_groups, with_gradient):
            for p in params:
                if not self.state[p]:
                    # Also when nothing passes the threshold: distributed checkpoints initialise the state with a
                    # zero-gradient step and expect to find it.
                    self.state[p]["accumulator"] = torch.zeros_like(
                        p, dtype=torch.float32, memory_format=torch.preserve_format
                    )
            _update(group, params, [p.grad for p in params], [self.state[p]["accumulator"] for p in params])
        return loss


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
    density = group["density"]
    if density is not None:
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], got {density}")
        if group["threshold"] > 0:
            raise ValueError(
                f"threshold={group['threshold']} and density={density} exclude each other: density sets the threshold "
                "from the gradients. Pass one of them."
            )


def _check_gradients(params: list[Tensor]) -> None:
    """Refuse what would corrupt the memory, before any weight or accumulator changes."""
    for p in params:
        if p.grad.is_sparse:  # type: ignore[union-attr]
            raise RuntimeError(
                f"CLASSP does not support sparse gradients (parameter of shape {tuple(p.shape)}). "
                "Build the embedding with sparse=False."
            )
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return  # reading a value back to the host is not possible there
    grads = [p.grad for p in params if p.numel() > 0]
    if not grads:
        return
    on_cpu = all(type(g) is Tensor and g.device.type == "cpu" for g in grads)
    if on_cpu and all(torch.linalg.vector_norm(g).isfinite() for g in grads):  # type: ignore[arg-type]
        return  # a 2-norm is many times faster there than the maximum; it may overflow for finite gradients: look again
    largest = [_local(torch.linalg.vector_norm(g, math.inf)) for g in grads]  # type: ignore[arg-type]
    if not all(torch.stack([x.to(largest[0].device, torch.float32) for x in largest]).isfinite().tolist()):
        bad = [tuple(g.shape) for g, x in zip(grads, largest) if not x.isfinite()]  # type: ignore[union-attr]
        raise RuntimeError(
            f"CLASSP got NaN or infinite gradients in {len(bad)} of {len(grads)} tensors (first shape: {bad[0]}). "
            "They would stay in the accumulators for ever, so nothing was updated. Lower the learning rate, clip the "
            "gradients, or check the data and the loss."
        )


def _local(x: Tensor) -> Tensor:
    """A full tensor from a sharded (DTensor) reduction."""
    return x if type(x) is Tensor else x.full_tensor()  # type: ignore[attr-defined]


def _update(group: dict[str, Any], params: list[Tensor], grads: list[Any], accumulators: list[Tensor]) -> None:
    hyperparameters = {
        k: group[k] for k in ("lr", "threshold", "density", "power", "eps", "apply_decay", "weight_decay", "maximize")
    }
    foreach = group["foreach"]
    # foreach kernels refuse lists that mix tensors and DTensors (pytorch#183207)
    native = all(type(p) in (Tensor, torch.nn.Parameter) for p in params)
    if foreach is None:
        foreach = native and all(p.is_cuda for p in params)
    if not (foreach and native):
        update = _blockwise_classp_ if native and not torch.compiler.is_compiling() else classp_
        for p, g, s in zip(params, grads, accumulators):
            update(p, g, s, **hyperparameters)
        return
    by_kind: dict[Any, list[int]] = {}
    for i, (p, g) in enumerate(zip(params, grads)):
        by_kind.setdefault((p.device, p.dtype, g.dtype), []).append(i)
    for indices in by_kind.values():
        columns = ([column[i] for i in indices] for column in (params, grads, accumulators))
        _foreach_classp_(*columns, **hyperparameters)


def _blockwise_classp_(param: Tensor, grad: Tensor, accumulator: Tensor, **hyperparameters: Any) -> None:
    """`classp_`, the same to the bit (p other than 1 and 2: to the last), in blocks that stay in the CPU's cache, and
    without rows that have no gradient.

    Most rows of an embedding have none. A row whose every g^2 underflows (|g| < 1e-22) counts as one of them.
    """
    tensors = (param, grad, accumulator)
    if param.device.type != "cpu" or param.numel() <= _BLOCK or not all(t.is_contiguous() for t in tensors):
        classp_(*tensors, **hyperparameters)
        return
    if hyperparameters["density"] is not None:
        threshold = _density_threshold(grad.float(), hyperparameters["density"])
        hyperparameters.update(density=None, threshold=threshold)
    rows = [t.view(len(param), -1) for t in tensors]
    sample = torch.linalg.vector_norm(rows[1][:: max(1, len(param) // 64)], dim=1)
    if not hyperparameters["weight_decay"] and 2 * sample.count_nonzero() < len(sample):
        active = torch.linalg.vector_norm(rows[1], dim=1).nonzero().squeeze(1)
        if 2 * len(active) < len(param):
            for index in active.split(max(1, _BLOCK // rows[0].shape[1])):
                w, g, s = (t[index] for t in rows)
                classp_(w, g, s, **hyperparameters)
                rows[0][index], rows[2][index] = w, s
            return
    # allocating anew for every block costs more than the arithmetic
    scratch = torch.empty(_BLOCK, dtype=torch.float32, device="cpu")
    for w, g, s in zip(*(t.view(-1).split(_BLOCK) for t in tensors)):
        classp_(w, g, s, **hyperparameters, scratch=scratch[: len(w)])


def classp_(
    param: Tensor,
    grad: Tensor,
    accumulator: Tensor,
    *,
    lr: float | Tensor,
    threshold: float | Tensor,
    density: float | None,
    power: float,
    eps: float,
    apply_decay: bool,
    weight_decay: float,
    maximize: bool,
    scratch: Tensor | None = None,
) -> None:
    """Algorithm 1 on one tensor; changes `param` and `accumulator` (float32) in place. `scratch`: memory of their shape."""
    g = _shrink(grad, threshold, density)
    if power == 2:
        accumulator.addcmul_(g, g)
    else:
        powers = torch.abs(g, out=scratch)
        accumulator.add_(powers if power == 1 else powers.pow_(power))
    root = torch.add(accumulator, eps, out=scratch)
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
    grads: list[Tensor],
    accumulators: list[Tensor],
    *,
    lr: float | Tensor,
    threshold: float,
    density: float | None,
    power: float,
    eps: float,
    apply_decay: bool,
    weight_decay: float,
    maximize: bool,
) -> None:
    """`classp_` over lists of tensors of one device and dtype."""
    gs = [_shrink(grad, threshold, density) for grad in grads]
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

    ws = params if params[0].dtype in (torch.float32, torch.float64) else [p.float() for p in params]
    if weight_decay:
        torch._foreach_mul_(ws, 1 - lr * weight_decay)
    sign = 1 if maximize else -1
    if isinstance(lr, Tensor):
        steps = torch._foreach_div(gs, roots) if apply_decay else gs
        steps = torch._foreach_mul(steps, lr.to(ws[0].device, torch.float32))
        torch._foreach_add_(ws, steps, alpha=sign)
    elif apply_decay:
        dtype = ws[0].dtype
        torch._foreach_addcdiv_(ws, [g.to(dtype) for g in gs], [r.to(dtype) for r in roots], value=sign * lr)
    else:
        torch._foreach_add_(ws, gs, alpha=sign * lr)
    if ws is not params:
        torch._foreach_copy_(params, ws)


def _shrink(grad: Tensor, threshold: float | Tensor, density: float | None) -> Tensor:
    """The gradient in float32 with the coordinates that may not update set to zero."""
    g = grad.float()
    if density is not None:
        return torch.where(g.square() > _density_threshold(g, density), g, 0.0)
    if isinstance(threshold, Tensor) or threshold > 0:
        return torch.where(g.square() > threshold, g, 0.0)
    return g  # a zero gradient neither accumulates nor moves, so there is nothing to mask


def _density_threshold(g: Tensor, density: float) -> Tensor:
    """The (1 - density) quantile of g^2 over the nonzero coordinates of a strided sample, as a 0-dim tensor."""
    if type(g) is not Tensor:
        raise ValueError("density is not supported on sharded (DTensor) parameters. Use threshold.")
    if g.numel() == 0:
        return g.new_zeros(())
    flat = g.reshape(-1)
    stride = max(1, flat.numel() // _DENSITY_SAMPLE)
    while stride > 1 and math.gcd(stride, g.shape[-1]) != 1:  # else whole columns would never be sampled
        stride += 1
    squares = flat[::stride].square().sort().values
    # Zeros sort first; index 0 of the padded list is "no threshold". Everything stays on the device.
    padded = torch.cat([squares.new_zeros(1), squares])
    zeros = (squares == 0).sum()
    rank = zeros + ((1 - density) * (squares.numel() - zeros)).ceil().long()
    return padded.index_select(0, rank.reshape(1)).squeeze(0)
