"""The diagonal Fisher: squared per-example gradients, summed layer by layer from one backward pass a batch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from transformers.pytorch_utils import Conv1D

from ..memory import bare_model, is_language_model
from ..optim import kernels

# Per-example gradients are made in pieces of about so many numbers: what a CPU's cache holds, what keeps a GPU busy.
_PIECE, _PIECE_GPU = 2**18, 2**24


def batches_of_equal_shape(
    examples: Iterable[tuple[int, Mapping[str, Tensor]]], size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Join examples, `(number, inputs with a first dimension of 1)`, to batches of up to `size`.

    Only examples of equal shapes are joined: nothing is padded, so each stays what it is alone, whatever the model makes
    of padding.
    """
    waiting: dict[Any, list[tuple[int, Mapping[str, Tensor]]]] = defaultdict(list)
    for number, example in examples:
        group = waiting[tuple((k, t.shape) for k, t in example.items())]
        group.append((number, example))
        if len(group) == size:
            yield _joined(group)
            group.clear()
    yield from (_joined(group) for group in waiting.values() if group)


def _joined(group: list[tuple[int, Mapping[str, Tensor]]]) -> tuple[list[int], dict[str, Tensor]]:
    return [number for number, _ in group], {k: torch.cat([e[k] for _, e in group]) for k in group[0][1]}


def sum_squared_gradients(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    parameters: dict[str, nn.Parameter],
    seeds: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Sum over examples of the squared gradient of log p(y|x), float32, by parameter name.

    One forward and one backward pass a batch, in which no weight's gradient is computed: as the gradient of a layer's
    output arrives, the squares of what each example gives its weights are added up in small pieces. A weight that several
    layers share takes one buffer of its size. What else is done with a weight (a function called on it) is found in the
    autograd graph; then, and where a layer's first dimension is not the examples', examples are taken one at a time.

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
    total = {n: torch.zeros(p.shape, device=p.device) for n, p in parameters.items()}
    calls = _Calls({p: total[n] for n, p in parameters.items()})
    was_training = model.training
    model.eval()
    # prepend: another hook may change the output
    hooks = [m.register_forward_hook(calls.record, prepend=True) for m in model.modules() if calls.owned(m)]
    alone: bool | None = None  # whether examples have to be taken one at a time; None: not known yet
    first = 0
    try:
        for batch in batches:
            start, count = 0, len(batch["labels"])
            while start < count:
                end = count if alone is False else start + 1
                some = {k: t[start:end] for k, t in batch.items()}
                with torch.enable_grad():
                    calls.clear(end - start)
                    drawn = None if seeds is None else seeds[first + start : first + end]
                    calls.trace(_log_likelihood(model, some, drawn))
                if end - start > 1 and calls.mixed:
                    alone = True
                    continue
                calls.add()
                if alone is None and all(t[0].numel() > 1 for t in some.values() if t.ndim > 1):
                    alone = calls.mixed  # a first dimension of 1 can be the examples' only
                start = end
            first += count
    finally:
        calls.clear(0)
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return total


def _log_likelihood(model: nn.Module, batch: dict[str, Tensor], seeds: Sequence[int] | None) -> Tensor:
    """The sum over the examples of `batch` of log p(y|x)."""
    labels = batch.pop("labels")
    writes = is_language_model(model)
    encoder_decoder = writes and bare_model(model).config.is_encoder_decoder
    given = {"labels": labels} if encoder_decoder else {}  # the decoder's inputs are made from them
    logits = model(**batch, **given).logits
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


class _Calls:
    """The calls, in one forward pass, of the modules that own weights with a `total` to add to."""

    def __init__(self, totals: dict[nn.Parameter, Tensor]) -> None:
        self.totals = totals
        self.clear(0)

    def clear(self, examples: int) -> None:
        self.examples = examples
        self.mixed = False
        """Whether one pass over several examples could not tell them apart."""
        self.uses: Counter[nn.Parameter] = Counter()
        # node of an output -> its module's own weights, node of its input
        self.inside: dict[Any, tuple[set, Any]] = {}
        self.pending: dict[nn.Parameter, list[_Gradients]] = defaultdict(list)
        self.foreign: set[Any] = set()
        self.anchors: dict[torch.device, Tensor] = {}
        self.log_likelihood: Tensor | None = None

    def owned(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in module.named_parameters(recurse=False) if p in self.totals}

    def record(self, module: nn.Module, args: tuple, output: Any) -> Tensor | None:
        """A forward hook."""
        known = _rule(module) and len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        if not (known and torch.is_grad_enabled() and self.log_likelihood is None):
            return None
        given = args[0]
        positions = isinstance(module, nn.Embedding) and given.shape[:1] == (1,)
        if self.examples > 1 and positions:  # for all alike
            given, output = (t.expand(self.examples, *t.shape[1:]) for t in (given, output))
        self.mixed |= not given.shape[:1] == output.shape[:1] == (self.examples,)
        owned = self.owned(module)
        self.uses.update(owned.values())
        # Everything leads to the anchor: its gradient is what backward is asked for, so that it passes through all outputs
        # and computes no weight's gradient.
        anchor = self.anchors.setdefault(output.device, torch.zeros((), device=output.device, requires_grad=True))
        output = output + anchor
        output.register_hook(partial(self.arrive, module, given.detach()))
        stop = get_gradient_edge(given).node if given.requires_grad else None
        self.inside[output.grad_fn] = ({*owned.values(), anchor}, stop)
        return output

    def trace(self, log_likelihood: Tensor) -> None:
        """Find the weights that are used by anything but the calls recorded."""
        self.log_likelihood = log_likelihood
        if not log_likelihood.requires_grad:
            return
        found = _leaves([get_gradient_edge(log_likelihood).node], {n: stop for n, (_, stop) in self.inside.items()})
        for node, (own, stop) in self.inside.items():
            found |= _leaves([n for n, _ in node.next_functions], {stop: None}) - own
        self.foreign = found & self.totals.keys()
        self.mixed |= bool(self.foreign)

    def add(self) -> None:
        """Add the squares of every example's gradients to the totals."""
        foreign = list(self.foreign)
        wanted = [*self.anchors.values(), *foreign]
        if self.log_likelihood is None or not wanted:
            return
        gradients = torch.autograd.grad(self.log_likelihood, wanted, allow_unused=True)
        for p, g in zip(foreign, gradients[len(self.anchors) :]):  # there is one example only
            if g is not None:
                _Whole(_wide(g)[None]).square_into(self.totals[p])
        for p, uses in self.pending.items():
            total = self.totals[p]
            buffer = torch.empty(p.shape, dtype=_wide(p).dtype, device=p.device)
            for example in range(self.examples):
                buffer.zero_()
                for use in uses:
                    use.add_to(buffer, example)
                total.addcmul_(buffer.float(), buffer.float())

    def arrive(self, module: nn.Module, given: Tensor, g: Tensor) -> None:
        owned, rule = self.owned(module), _rule(module)
        assert rule is not None
        for name, gradients in rule(module, given, g, self.examples).items():
            p = owned.get(name)
            if p is None or p in self.foreign:
                continue
            if self.uses[p] == 1:
                gradients.square_into(self.totals[p])
            else:  # summed over its uses before it is squared
                self.pending[p].append(gradients)


def _leaves(nodes: list[Any], cuts: dict[Any, Any]) -> set[Tensor]:
    """The leaf tensors behind `nodes` of an autograd graph. From a node in `cuts` the way goes on at the node it maps to."""
    found, seen, waiting = set(), set(), list(nodes)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in cuts:
            waiting.append(cuts[node])
        elif node.next_functions:
            waiting.extend(n for n, _ in node.next_functions)
        elif (leaf := getattr(node, "variable", None)) is not None:
            found.add(leaf)
    return found


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


# ---- The gradients of one weight, an example each ----


class _Gradients(Protocol):
    def square_into(self, total: Tensor) -> None:
        """Add the sum over examples of the square."""

    def add_to(self, buffer: Tensor, example: int) -> None:
        """Add the gradient of one example."""


@dataclass
class _Products:
    """`left[example].T @ right[example]`, of shapes (examples, tokens, rows) and (examples, tokens, columns)."""

    left: Tensor
    right: Tensor

    def square_into(self, total: Tensor) -> None:
        examples, tokens, rows = self.left.shape
        if tokens == 1:
            left, right = (t[:, 0].square().float() for t in (self.left, self.right))
            total.addmm_(left.T, right)
            return
        if kernels.square_products_(total, self.left, self.right):
            return
        piece = _PIECE if total.device.type == "cpu" else _PIECE_GPU
        step = max(1, min(rows, piece // total.shape[1]))
        some = max(1, piece // (step * total.shape[1]))
        for row in range(0, rows, step):
            for first in range(0, examples, some):
                left = self.left[first : first + some, :, row : row + step]
                for gradient in torch.bmm(left.mT, self.right[first : first + some]).float():
                    total[row : row + step].addcmul_(gradient, gradient)

    def add_to(self, buffer: Tensor, example: int) -> None:
        buffer.addmm_(self.left[example].T, self.right[example])


@dataclass
class _Rows:
    """Row `ids[example, i]` is given `g[example, i]`; shapes (examples, tokens) and (examples, tokens, columns)."""

    ids: Tensor
    g: Tensor

    def square_into(self, total: Tensor) -> None:
        examples = torch.arange(len(self.ids), device=self.ids.device)[:, None]
        pairs, of = (self.ids + len(total) * examples).unique(return_inverse=True)
        sums = self.g.new_zeros(len(pairs), total.shape[1]).index_add_(0, of.flatten(), self.g.flatten(0, 1))
        total.index_add_(0, pairs % len(total), sums.float().square_())

    def add_to(self, buffer: Tensor, example: int) -> None:
        buffer.index_add_(0, self.ids[example], self.g[example])


@dataclass
class _Whole:
    """(examples, *shape of the weight)."""

    g: Tensor

    def square_into(self, total: Tensor) -> None:
        total.add_(self.g.float().square().sum(0))

    def add_to(self, buffer: Tensor, example: int) -> None:
        buffer.add_(self.g[example])


# ---- What a layer gives its weights: (module, its input, its output's gradient, number of examples) -> by name ----

_Rule = Callable[[Any, Tensor, Tensor, int], dict[str, _Gradients]]


def _rule(module: nn.Module) -> _Rule | None:
    if "forward" in vars(module):  # replaced by somebody
        return None
    known: dict[Any, _Rule] = {
        nn.Linear.forward: _linear,
        Conv1D.forward: _linear,
        nn.Embedding.forward: _embedding,
        nn.LayerNorm.forward: _layer_norm,
    }
    return known.get(type(module).forward, None if next(module.children(), None) else _any_layer)


def _linear(module: nn.Linear | Conv1D, given: Tensor, g: Tensor, examples: int) -> dict[str, _Gradients]:
    a, g = (_wide(t).reshape(examples, -1, t.shape[-1]) for t in (given, g))
    used = torch.linalg.vector_norm(g, dim=-1).any(0).nonzero()[:, 0]  # behind a pooled token there is but one
    if len(used) < g.shape[1]:
        a, g = a[:, used], g[:, used]
    left, right = (a, g) if isinstance(module, Conv1D) else (g, a)
    return {"weight": _Products(left, right), "bias": _Whole(g.sum(1))}


def _embedding(module: nn.Embedding, given: Tensor, g: Tensor, examples: int) -> dict[str, _Gradients]:
    ids, g = given.reshape(examples, -1), _wide(g).reshape(examples, -1, g.shape[-1])
    if module.padding_idx is not None:
        g = g.masked_fill((ids == module.padding_idx)[..., None], 0)
    return {"weight": _Rows(ids, g)}


def _layer_norm(module: nn.LayerNorm, given: Tensor, g: Tensor, examples: int) -> dict[str, _Gradients]:
    shape = module.normalized_shape
    normalised = F.layer_norm(_wide(given), shape, eps=module.eps)
    weight, bias = (t.reshape(examples, -1, *shape).sum(1) for t in (_wide(g) * normalised, _wide(g)))
    return {"weight": _Whole(weight), "bias": _Whole(bias)}


def _any_layer(module: nn.Module, given: Tensor, g: Tensor, examples: int) -> dict[str, _Gradients]:
    """By the layer's own backward pass, one example after the other."""
    owned = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
    mixed = any(p.dtype != g.dtype for p in owned.values())
    made = []
    with torch.enable_grad(), torch.autocast(g.device.type, g.dtype, enabled=mixed and g.element_size() == 2):
        for x, gradient in zip(given.chunk(examples), g.chunk(examples)):
            made.append(torch.autograd.grad(module(x), list(owned.values()), gradient, allow_unused=True))
    per_weight = zip(*made)
    return {
        n: _Whole(torch.stack([_wide(t) for t in gradients]))
        for n, gradients in zip(owned, per_weight)
        if gradients[0] is not None
    }
