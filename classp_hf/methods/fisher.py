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
Totals = dict[nn.Parameter, Tensor]


def batches_of_equal_shape(
    examples: Iterable[tuple[int, Batch]], size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Join examples, `(number, inputs with a first dimension of 1)`, to `(numbers, batch)` of up to `size`.

    Only examples of equal shapes are joined: nothing is padded, so each stays what it is alone.
    """
    waiting: dict[Any, list[tuple[int, Batch]]] = defaultdict(list)

    def joined(key: Any) -> tuple[list[int], dict[str, Tensor]]:
        numbers, group = zip(*waiting.pop(key))
        return list(numbers), {k: torch.cat([example[k] for example in group]) for k in group[0]}

    for number, example in examples:
        key = tuple((k, t.shape) for k, t in example.items())
        waiting[key].append((number, example))
        if len(waiting[key]) == size:
            yield joined(key)
    yield from map(joined, list(waiting))


def sum_squared_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    parameters: Mapping[str, nn.Parameter],
    seeds: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Sum over examples of the squared gradient of log p(y|x), float32, by parameter name.

    If every parameter is that of one linear, embedding or layer norm layer, called once and with the examples in the
    first dimension, a batch takes one forward and one backward pass, in which no weight's gradient is computed:
    squares are made in small pieces from the layers' inputs and their outputs' gradients. Otherwise (any other layer,
    tied weights, functions of a weight) examples are taken one at a time. Both are exact; which it has to be shows in
    every batch.

    Args:
        model: with `logits` of shape (examples, classes), or a language model's (examples, tokens, words): then log
            p(y|x) is summed over tokens. It runs in evaluation mode; no example's logits may depend on the others'.
        batches: dicts of inputs, examples first, with integer `labels`, one an example or a token, -100: none.
        parameters: what to differentiate.
        seeds: one an example: draw y from the model's p(y|x), of a language model every token given the example's
            tokens before it, instead of taking the example's label.

    Raises:
        ValueError: the model is no such model.
    """
    totals = {p: torch.zeros(p.shape, device=p.device) for p in parameters.values()}
    layers = _layers(model, totals)
    sure, done, was_training = False, 0, model.training
    model.eval()
    try:
        for batch in batches:
            start, count = 0, len(next(iter(batch.values())))
            while start < count:
                end = count if sure and layers is not None else start + 1
                some = {k: t[start:end] for k, t in batch.items()}
                drawn = None if seeds is None else seeds[done + start : done + end]
                if layers is not None and not _add_together(model, some, drawn, totals, layers):
                    layers = None  # once and for all
                    continue
                if layers is None:
                    for p, g in zip(totals, _gradients(_log_likelihood(model, some, drawn), list(totals))):
                        if g is not None:
                            totals[p].addcmul_(g.float(), g.float())
                # in one example of several tokens, a first dimension of 1 can be the examples' only
                sure |= all(t[0].numel() > 1 for t in some.values() if t.ndim > 1)
                start = end
            done += count
    finally:
        model.train(was_training)
    return {n: totals[p] for n, p in parameters.items()}


@torch.enable_grad()
def _log_likelihood(model: nn.Module, batch: Batch, seeds: Sequence[int] | None) -> Tensor:
    """The sum over the examples of `batch` of log p(y|x)."""
    inputs = dict(batch)
    labels = inputs.pop("labels", torch.empty(0))
    generates = is_language_model(model)
    encoder_decoder = generates and bare_model(model).config.is_encoder_decoder
    given = {"labels": labels} if encoder_decoder else {}  # the decoder's inputs are made from them
    logits = _wide(model(**inputs, **given)["logits"])
    tokens = generates and logits.ndim == 3
    if tokens and not encoder_decoder:  # a causal model's logits are the next token's
        logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.ndim != 2 + tokens or logits.shape[-1] < 2 or labels.is_floating_point():
        raise ValueError(
            f"EWC's Fisher needs a single-label classifier or a language model, got logits of shape "
            f"{tuple(logits.shape)} and labels of dtype {labels.dtype}. Use --method l2sp or replay for other models."
        )
    if seeds is not None:  # one generator an example: the others change nothing
        p = [torch.atleast_2d(example.softmax(-1).cpu()) for example in logits.detach()]
        drawn = [torch.multinomial(q, 1, generator=torch.Generator().manual_seed(seed)) for q, seed in zip(p, seeds)]
        labels = torch.where(labels.cpu() == -100, labels.cpu(), torch.stack(drawn).view(labels.shape))
    return -F.cross_entropy(logits.flatten(0, -2), labels.to(logits.device).flatten(), reduction="sum")


def _gradients(likelihood: Tensor, inputs: Sequence[Any]) -> Sequence[Tensor | None]:
    reached = likelihood.requires_grad and len(inputs) > 0
    return torch.autograd.grad(likelihood, inputs, allow_unused=True) if reached else [None] * len(inputs)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _layers(model: nn.Module, totals: Totals) -> dict[nn.Module, dict[str, nn.Parameter]] | None:
    """Layer -> its parameters by name; None if some parameter is not that of one layer with a rule."""
    owned = {m: {n: p for n, p in m.named_parameters(recurse=False) if p in totals} for m in model.modules()}
    owned = {m: own for m, own in owned.items() if own}
    owners = Counter(p for own in owned.values() for p in own.values())
    known = all(
        type(m).forward in _RULES
        and own.keys() <= {"weight", "bias"}
        and "forward" not in vars(m)  # nobody replaced it
        for m, own in owned.items()
    )
    counted = any(getattr(m, "scale_grad_by_freq", False) for m in owned)
    return owned if known and not counted and all(owners[p] == 1 for p in totals) else None


def _add_together(model: nn.Module, batch: Batch, seeds: Sequence[int] | None, totals: Totals, layers: Any) -> bool:
    """Add the squares of all examples of `batch`, or nothing if they cannot be told apart (False)."""
    examples = len(next(iter(batch.values())))
    calls: list[tuple[Any, Tensor, Any]] = []
    zero = torch.zeros((), requires_grad=True)  # so that every output has a gradient

    def forward(module: Any, *args: Any, **kwargs: Any) -> Tensor:
        for p in layers[module].values():  # a gradient that reaches it all the same is of another use
            p.requires_grad_(False)
        output = type(module).forward(module, *args, **kwargs)
        for p in layers[module].values():
            p.requires_grad_(True)
        if not torch.is_grad_enabled():
            return output
        given = next(iter((*args, *kwargs.values()))).detach()
        if isinstance(module, nn.Embedding) and given.shape[:1] == (1,):  # positions, for all alike
            given, output = (t.expand(examples, *t.shape[1:]) for t in (given, output))
        output = output + zero.to(output.device)
        calls.append((module, given, get_gradient_edge(output)))
        return output

    try:
        for m in layers:
            m.forward = partial(forward, m)
        likelihood = _log_likelihood(model, batch, seeds)
    finally:
        for m in layers:
            del m.forward
        for p in totals:
            p.requires_grad_(True)
    if len({m for m, *_ in calls}) < len(calls) or any(given.shape[:1] != (examples,) for _, given, _ in calls):
        return False
    gradients = _gradients(likelihood, [*(edge for *_, edge in calls), *totals])
    if any(g is not None for g in gradients[len(calls) :]):
        return False
    for (m, given, _), g in zip(calls, gradients):
        if g is not None:
            given = _wide(given) if given.is_floating_point() else given
            _RULES[type(m).forward](m, given, _wide(g), {n: totals[p] for n, p in layers[m].items()})
    return True


# What a layer's input and its output's gradient `g`, both examples first, add to the totals of its weights


def _linear(module: Any, given: Tensor, g: Tensor, totals: dict[str, Tensor]) -> None:
    a, g = (t.reshape(len(t), -1, t.shape[-1]) for t in (given, g))
    used = torch.linalg.vector_norm(g, dim=-1).any(0).nonzero()[:, 0]  # behind a pooled token there is but one
    a, g = a[:, used], g[:, used]
    if "bias" in totals:
        totals["bias"].add_(g.sum(1).square().sum(0))
    if "weight" in totals:
        _add_squared_products(totals["weight"], *((a, g) if isinstance(module, Conv1D) else (g, a)))


def _add_squared_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the sum over examples of `(left[example].T @ right[example])^2`; (examples, tokens, rows or columns)."""
    if left.shape[1] == 1:
        total.add_(left[:, 0].square().T @ right[:, 0].square())
        return
    rows = max(1, (_PIECE if total.device.type == "cpu" else _PIECE_GPU) // total.shape[1])
    for some, part in zip(total.split(rows), left.split(rows, -1)):
        examples = max(1, rows // len(some))
        for a, b in zip(part.split(examples), right.split(examples)):
            for product in torch.bmm(a.mT, b).float():
                some.addcmul_(product, product)


def _embedding(module: Any, given: Tensor, g: Tensor, totals: dict[str, Tensor]) -> None:
    g = g.masked_fill((given == (-1 if module.padding_idx is None else module.padding_idx))[..., None], 0)
    for ids, rows in zip(given.reshape(len(g), -1), g.reshape(len(g), -1, g.shape[-1])):
        found, of = ids.unique(return_inverse=True)
        sums = rows.new_zeros(len(found), rows.shape[-1]).index_add_(0, of, rows)  # of a word that comes twice
        totals["weight"].index_add_(0, found, sums.float().square_())


def _layer_norm(module: Any, given: Tensor, g: Tensor, totals: dict[str, Tensor]) -> None:
    shape = module.normalized_shape
    for name, factor in (("weight", F.layer_norm(given, shape, eps=module.eps)), ("bias", 1.0)):
        if name in totals:
            totals[name].add_((g * factor).reshape(len(g), -1, *shape).sum(1).square().sum(0))


_RULES: dict[Any, Callable[[Any, Tensor, Tensor, dict[str, Tensor]], None]] = {
    nn.Linear.forward: _linear,
    Conv1D.forward: _linear,
    nn.Embedding.forward: _embedding,
    nn.LayerNorm.forward: _layer_norm,
}
