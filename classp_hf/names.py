"""Parameters by canonical name, whole or sharded, and the model inside its wrappers."""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .optim.shards import local as local

# What wrappers put into parameter names: DDP, torch.compile, activation checkpointing, FSDP, PEFT.
_WRAPPERS = re.compile(
    r"^(?:module\.)+|\b_orig_mod\.|\b_checkpoint_wrapped_module\.|\b_fsdp_wrapped_module\.|^base_model\.(?:model\.)?"
    r"|\bbase_layer\.(?!lora_)|\bmodules_to_save\.[^.]+\."
)


def canonical_name(name: str) -> str:
    """The parameter's name in the bare model: without the prefixes of DDP, FSDP, torch.compile and PEFT.

    >>> canonical_name("module.base_model.model.bert.pooler.dense.base_layer.weight")
    'bert.pooler.dense.weight'
    """
    previous = None
    while name != previous:
        previous, name = name, _WRAPPERS.sub("", name)
    return name


def by_training(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The named parameters, frozen ones first: of several with one canonical name (PEFT's adapters, of which one is
    active) the last counts."""
    return sorted(model.named_parameters(), key=lambda named: named[1].requires_grad)


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`(canonical name, parameter)` of every parameter that requires a gradient; under FSDP2 the sharded ones."""
    reshard(model)
    for name, p in model.named_parameters():
        if p.requires_grad:
            yield canonical_name(name), p


def reshard(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model. If so, it holds its sharded parameters from here on.

    After a forward pass without a backward one some modules hold whole copies, which no optimizer and no memory knows.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.reshard()
    return bool(sharded)


def uncompiled_passes(model: Any) -> Any:
    """A context in which a compiled model runs as it is: for every new kind of pass it would be compiled again."""
    return nullcontext() if _uncompiled(model) is model else torch.compiler.set_stance("force_eager")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block, uncompiled; then the mode of before, and, under FSDP2, sharded parameters."""
    was_training = model.training
    model.eval()
    try:
        with uncompiled_passes(model):
            yield
    finally:
        model.train(was_training)
        reshard(model)


def loss_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Canonical name -> gradient of `loss`, of every trainable parameter that it depends on.

    FSDP2 shards the gradients and averages them over ranks: all must give the same loss, of the same inputs.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        loss.backward()  # FSDP2's hooks know no other way
        found = {n: p.grad for n, p in trainable_parameters(model) if p.grad is not None}
        model.zero_grad()
        return found
    named = dict(trainable_parameters(model))
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def bare_model(model: Any) -> Any:
    """The model inside a PEFT model and torch.compile's wrapper; any other model as it is."""
    model = _uncompiled(model)
    return _uncompiled(model.get_base_model()) if has_adapters(model) else model


def model_class(model: Any) -> Any:
    """The class of the bare model; FSDP2 puts one of its own before it."""
    return next(cls for cls in type(bare_model(model)).__mro__ if not issubclass(cls, FSDPModule))


def forward_class(model: Any) -> Any:
    """The class, of the bare model or a base of it, that says what `forward` does: not by calling `super()`."""
    owners = [cls for cls in model_class(model).__mro__ if "forward" in vars(cls)]
    codes = (getattr(inspect.unwrap(cls.forward), "__code__", None) for cls in owners)
    return next(cls for cls, code in zip(owners, codes) if "super" not in getattr(code, "co_names", ()))


def has_adapters(model: Any) -> bool:
    """Whether it is a PEFT model, compiled or not."""
    peft = sys.modules.get("peft")  # without it there is none
    return peft is not None and isinstance(_uncompiled(model), peft.PeftModel)


def _uncompiled(model: Any) -> Any:
    return dict(model.named_children()).get("_orig_mod", model) if isinstance(model, nn.Module) else model


def model_source(model: Any) -> str:
    """Folder or Hub id that the model was loaded from (`config.name_or_path`); "" if unknown."""
    return str(getattr(getattr(bare_model(model), "config", None), "name_or_path", None) or "")


def is_language_model(model: Any) -> bool:
    """Whether the model writes text: causal or sequence-to-sequence."""
    can_generate = getattr(bare_model(model), "can_generate", None)
    return can_generate is not None and bool(can_generate())


def full_tensor(t: Tensor) -> Tensor:
    """The whole tensor, detached, of a sharded one (a collective call on every rank); any other as it is, detached."""
    if hasattr(t, "ds_id"):  # a parameter under DeepSpeed's ZeRO-3
        with sys.modules["deepspeed"].zero.GatheredParameters([t]):
            return t.detach().clone()
    return t.full_tensor().detach() if isinstance(t, DTensor) else t.detach()


def full_shape(p: Tensor) -> torch.Size:
    """The shape of the whole parameter, which under ZeRO-3 is not its `shape`."""
    return getattr(p, "ds_shape", p.shape)


class Accumulators(Mapping[str, Tensor]):
    """Canonical name -> accumulator, float32, made anew whenever it is asked for: a dictionary of all of them would
    double the memory.

    Args:
        parameters: canonical name -> the parameter it belongs to.
        make: a parameter's accumulator; under ZeRO a collective call on every rank.
    """

    def __init__(self, parameters: Mapping[str, Tensor], make: Callable[[Tensor], Tensor]) -> None:
        self.parameters, self.make = parameters, make

    def __getitem__(self, name: str) -> Tensor:
        return self.make(self.parameters[name])

    def __contains__(self, name: object) -> bool:
        return name in self.parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)


def like_parameter(full: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of `full` on the device of `p`, in `dtype`, sharded as `p` is."""
    full = full.to(device=p.device, dtype=dtype, copy=True)
    if not isinstance(p, DTensor):
        return full
    # every rank has it all: nothing to send
    return distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)


def mean_over_weights(tensors: Iterable[Tensor]) -> float:
    """The mean over all elements of all tensors, whole or sharded, in float64 where the device has it; 0.0 for
    none."""
    total, count = 0.0, 0
    for t in tensors:
        total += float(full_tensor(t.sum(dtype=torch.float32 if t.device.type == "mps" else torch.float64)))
        count += t.numel()
    return total / count if count else 0.0


def layer_means(accumulators: Mapping[str, Tensor]) -> dict[str, float]:
    """Layer -> mean accumulator a weight, layers in the model's order.

    A layer is what shares its name up to the first number (`bert.encoder.layer.3`), else up to the second part
    (`bert.embeddings`).
    """
    layers: dict[str, list[Tensor]] = {}
    for name, t in accumulators.items():
        numbered = re.match(r"(.*?\.\d+)\.", name)
        parts = name.split(".")
        layer = numbered[1] if numbered else ".".join(parts[: min(2, len(parts) - 1)]) or name
        layers.setdefault(layer, []).append(t)
    return {layer: mean_over_weights(tensors) for layer, tensors in layers.items()}


def samples(model: nn.Module, count: int = 8) -> dict[str, Tensor]:
    """Canonical name -> up to `count` values of every parameter, evenly spread, float32 on the CPU.

    They tell whether two models have the same weights. A collective call on every rank if the model is sharded.
    """
    reshard(model)
    taken = {}
    for name, p in by_training(model):
        flat = full_tensor(p).reshape(-1)
        taken[canonical_name(name)] = flat[:: max(1, flat.numel() // count)][:count].to(
            "cpu", torch.float32, copy=True
        )
    return taken
