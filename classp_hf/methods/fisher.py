"""The diagonal Fisher: squared per-example gradients, from one backward pass a batch where the layers allow it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from transformers.pytorch_utils import Conv1D

from ..names import bare_model, is_language_model

# Per-example gradients are made in pieces of about so many numbers: what a CPU's cache holds, what keeps a GPU busy.
_PIECE, _PIECE_GPU = 2**18, 2**24

Batch = Mapping[str, Tensor]


def batches_of_equal_shape(
    examples: Iterable[tuple[int, Batch]], size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Join examples, `(number, inputs with a first dimension of 1)`, to batches of up to `size`.

    Only examples of equal shapes are joined: nothing is padded, so each stays what it is alone, whatever the model makes
    of padding.
    """
    waiting: dict[Any, list[tuple[int, Batch]]] = defaultdict(list)
    for number, example in examples:
        group = waiting[tuple((k, t.shape) for k, t in example.items())]
        group.append((number, example))
        if len(group) == size:
            yield _joined(group)
            group.clear()
    yield from (_joined(group) for group in waiting.values() if group)


def _joined(group: list[tuple[int, Batch]]) -> tuple[list[int], dict[str, Tensor]]:
    return [number for number, _ in group], {k: torch.cat([e[k] for _, e in group]) for k in group[0][1]}


def sum_squared_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    parameters: Mapping[str, nn.Parameter],
    seeds: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Sum over examples of the squared gradient of log p(y|x), float32, by parameter name.

    If all parameters belong to linear, embedding and layer norm layers, each used by one call of its layer and nothing
    else, a batch takes one forward and one backward pass, in which no weight's gradient is computed: squares are made
    from the layers' inputs and their outputs' gradients, in small pieces. Otherwise (other layers, tied weights, layers
    called twice, functions of a weight, a first dimension that is not the examples') examples are taken one at a time.
    Both are exact; which it is shows in the first examples.

    Args:
        model: a classifier whose output has `logits` of shape (examples, classes), or a language model with `logits` of
            shape (examples, tokens, words), whose log p(y|x) is summed over the tokens with a label. It runs in evaluation
            mode; no example's logits may depend on the others'.
        batches: dicts of inputs, examples first, with integer `labels` of shape (examples,) or (examples, tokens), -100: no
            label.
        parameters: what to differentiate.
        seeds: one seed an example: draw y from the model's p(y|x) instead of taking the example's label; of a language
            model every token given the example's tokens before it.

    Raises:
        ValueError: the model is neither.
    """
    totals = {p: torch.zeros(p.shape, device=p.device) for p in parameters.values()}
    layers = _layers(model, totals)
    single, sure, done = layers is None, False, 0
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            start, count = 0, len(next(iter(batch.values())))
            while start < count:
                end = count if sure and not single else start + 1
                some = {k: t[start:end] for k, t in batch.items()}
                drawn = None if seeds is None else seeds[done + start : done + end]
                if not single and not _add_together(model, some, drawn, totals, layers or {}):
                    single = True
                    continue
                if single:
                    _add_one(model, some, drawn, totals)
                # of one example with several tokens, a first dimension of 1 can be the examples' only
                sure |= all(t[0].numel() > 1 for t in some.values() if t.ndim > 1)
                start = end
            done += count
    finally:
        model.train(was_training)
    return {n: totals[p] for n, p in parameters.items()}


def _log_likelihood(model: nn.Module, batch: Batch, seeds: Sequence[int] | None) -> Tensor:
    """The sum over the examples of `batch` of log p(y|x)."""
    inputs = dict(batch)
    labels = inputs.pop("labels", torch.empty(0))
    writes = is_language_model(model)
    encoder_decoder = writes and bare_model(model).config.is_encoder_decoder
    given = {"labels": labels} if encoder_decoder else {}  # the decoder's inputs are made from them
    logits = model(**inputs, **given)["logits"]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = writes and logits.ndim == 3
    if tokens and not encoder_decoder:  # a causal model's logits are the next token's
        logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.ndim != 2 + tokens or logits.shape[-1] < 2 or labels.is_floating_point():
        raise ValueError(
            f"EWC's Fisher needs a single-label classifier or a language model, got logits of shape {tuple(logits.shape)} and "
            f"labels of dtype {labels.dtype}. Use --method l2sp or replay for other models."
        )
    if seeds is not None:
        drawn = torch.stack([_draw(example, seed) for example, seed in zip(logits.detach(), seeds)])
        labels = torch.where(labels.cpu() == -100, labels.cpu(), drawn.view(labels.shape))
    words = logits.shape[-1]
    return -F.cross_entropy(logits.reshape(-1, words), labels.to(logits.device).reshape(-1), reduction="sum")


def _draw(logits: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.atleast_2d(logits.softmax(-1).cpu()), 1, generator=generator)


def _add_one(model: nn.Module, batch: Batch, seeds: Sequence[int] | None, totals: dict[nn.Parameter, Tensor]) -> None:
    """Add the squared gradients of the only example of `batch`, each as it arrives: not all are there at once."""

    def square(total: Tensor, g: Tensor) -> Tensor:
        total.addcmul_(g.float(), g.float())
        return g.new_zeros(()).expand_as(g)

    hooks = [p.register_hook(partial(square, total)) for p, total in totals.items()]
    try:
        with torch.enable_grad():
            likelihood = _log_likelihood(model, batch, seeds)
        if likelihood.requires_grad:
            torch.autograd.grad(likelihood, list(totals), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()


def _layers(
    model: nn.Module, totals: Mapping[nn.Parameter, Tensor]
) -> dict[nn.Module, dict[str, nn.Parameter]] | None:
    """Layer -> its parameters by name; None if some parameter has no such layer, or several."""
    owned = {m: {n: p for n, p in m.named_parameters(recurse=False) if p in totals} for m in model.modules()}
    owned = {m: own for m, own in owned.items() if own}
    uses = Counter(p for own in owned.values() for p in own.values())
    known = all(type(m).forward in _RULES and "forward" not in vars(m) for m in owned)
    plain = all(
        own.keys() <= {"weight", "bias"} and not getattr(m, "scale_grad_by_freq", False) for m, own in owned.items()
    )
    return owned if known and plain and all(uses[p] == 1 for p in totals) else None


def _add_together(
    model: nn.Module,
    batch: Batch,
    seeds: Sequence[int] | None,
    totals: dict[nn.Parameter, Tensor],
    layers: dict[nn.Module, dict[str, nn.Parameter]],
) -> bool:
    """Add the squared gradients of all examples of `batch`, or nothing if they cannot be told apart (False)."""
    examples = len(batch["labels"])
    calls: list[tuple[nn.Module, Tensor, Any]] = []
    zero: dict[torch.device, Tensor] = {}

    def before(module: nn.Module, args: Any) -> None:
        for p in layers[module].values():  # a gradient that reaches it all the same is of another use
            p.requires_grad_(False)

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        for p in layers[module].values():
            p.requires_grad_(True)
        if not torch.is_grad_enabled():
            return None
        given = args[0].detach() if len(args) == 1 else output.new_empty(0)
        if isinstance(module, nn.Embedding) and given.shape[:1] == (1,):  # positions, for all alike
            given, output = (t.expand(examples, *t.shape[1:]) for t in (given, output))
        output = output + zero.setdefault(output.device, torch.zeros((), device=output.device, requires_grad=True))
        calls.append((module, given, get_gradient_edge(output)))
        return output

    hooks = [m.register_forward_pre_hook(before) for m in layers]
    hooks += [m.register_forward_hook(after, prepend=True) for m in layers]  # prepend: another may change the output
    try:
        with torch.enable_grad():
            likelihood = _log_likelihood(model, batch, seeds)
    finally:
        for hook in hooks:
            hook.remove()
        for p in totals:
            p.requires_grad_(True)
    apart = all(given.shape[:1] == (examples,) for _, given, _ in calls) and len({m for m, _, _ in calls}) == len(
        calls
    )
    if not apart or not likelihood.requires_grad or not totals:
        return apart
    gradients = torch.autograd.grad(likelihood, [*(edge for _, _, edge in calls), *totals], allow_unused=True)
    if any(g is not None for g in gradients[len(calls) :]):
        return False
    for (module, given, _), g in zip(calls, gradients):
        if g is not None:
            _RULES[type(module).forward](module, given, g, {n: totals[p] for n, p in layers[module].items()})
    return True


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


# ---- What a layer's input and its output's gradient, both examples first, add to the totals of its weights ----


def _linear(module: nn.Linear | Conv1D, given: Tensor, g: Tensor, totals: dict[str, Tensor]) -> None:
    a, g = (_wide(t).reshape(len(t), -1, t.shape[-1]) for t in (given, g))
    used = torch.linalg.vector_norm(g, dim=-1).any(0).nonzero()[:, 0]  # behind a pooled token there is but one
    a, g = (a[:, used], g[:, used]) if len(used) < g.shape[1] else (a, g)
    if "bias" in totals:
        totals["bias"].add_(g.sum(1).square().sum(0))
    if "weight" in totals:
        _add_squared_products(totals["weight"], *((a, g) if isinstance(module, Conv1D) else (g, a)))


def _add_squared_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the sum over examples of `(left[example].T @ right[example])^2`: (examples, tokens, rows), (…, columns)."""
    examples, tokens, rows = left.shape
    if tokens == 1:
        total.add_(left[:, 0].square().T @ right[:, 0].square())
        return
    piece = _PIECE if total.device.type == "cpu" else _PIECE_GPU
    step = max(1, min(rows, piece // total.shape[1]))
    some = max(1, piece // (step * total.shape[1]))
    for row in range(0, rows, step):
        for first in range(0, examples, some):
            part = slice(first, first + some)
            for product in torch.bmm(left[part, :, row : row + step].mT, right[part]).float():
                total[row : row + step].addcmul_(product, product)


def _embedding(module: nn.Embedding, given: Tensor, g: Tensor, totals: dict[str, Tensor]) -> None:
    """Row `ids[example, i]` gets `g[example, i]`; a row that occurs several times gets their sum, which is squared."""
    ids, g, total = given.reshape(len(g), -1), _wide(g).reshape(len(g), -1, g.shape[-1]), totals["weight"]
    if module.padding_idx is not None:
        g = g.masked_fill((ids == module.padding_idx)[..., None], 0)
    examples = torch.arange(len(ids), device=ids.device)[:, None]
    pairs, of = (ids + len(total) * examples).unique(return_inverse=True)
    sums = g.new_zeros(len(pairs), total.shape[1]).index_add_(0, of.flatten(), g.flatten(0, 1))
    total.index_add_(0, pairs % len(total), sums.float().square_())


def _layer_norm(module: nn.LayerNorm, given: Tensor, g: Tensor, totals: dict[str, Tensor]) -> None:
    shape, g = module.normalized_shape, _wide(g)
    normalised = F.layer_norm(_wide(given), shape, eps=module.eps)
    for name, gradient in (("weight", g * normalised), ("bias", g)):
        if name in totals:
            totals[name].add_(gradient.reshape(len(g), -1, *shape).sum(1).square().sum(0))


_RULES: dict[Any, Callable[[Any, Tensor, Tensor, dict[str, Tensor]], None]] = {
    nn.Linear.forward: _linear,
    Conv1D.forward: _linear,
    nn.Embedding.forward: _embedding,
    nn.LayerNorm.forward: _layer_norm,
}
