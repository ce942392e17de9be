"""The diagonal Fisher: squared per-example gradients, from one backward pass a batch where the layers allow it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..names import bare_model, evaluating, is_language_model, loss_gradients, reshard

Batch = Mapping[str, Any]
Totals = dict[nn.Parameter, Tensor]
Layers = dict[nn.Module, dict[str, nn.Parameter]]


def sum_squared_gradients(
    model: nn.Module,
    examples: Iterable[Batch],
    parameters: Mapping[str, nn.Parameter],
    size: int = 1,
    seeds: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Sum over examples of the squared gradient of log p(y|x), float32, by parameter name.

    Up to `size` examples of equal shapes share one forward and one backward pass if every parameter is that of one
    layer (a module without modules in it), called once, with one input that has the examples in the first dimension:
    each example's gradients then follow from the layer's input and its output's gradient. Otherwise (tied weights,
    functions of a weight) every example takes a pass of its own. Both are exact; which it has to be shows in every
    batch. Under FSDP2 every rank gives the same examples, each takes a pass, and the sums are sharded.

    Args:
        model: as `log_likelihood` needs it. It runs in evaluation mode; no example's logits may depend on the others'.
        examples: inputs of single examples, with a first dimension of 1, and their `labels`. Those with anything
            else (lengths in packed rows) take a pass each.
        parameters: what to differentiate.
        size: examples that may share a pass. Nothing is padded, so each example stays what it is alone.
        seeds: one an example: draw y from the model's p(y|x). Default: y is the example's labels.

    Raises:
        ValueError: the model has no such likelihood.
    """
    totals = {p: torch.zeros_like(p.detach(), dtype=torch.float32) for p in parameters.values()}
    sharded = reshard(model)
    layers, limit = {} if sharded else _layers(model, totals), 1
    waiting: dict[Any, list[tuple[Batch, list[int]]]] = defaultdict(list)

    def add(group: list[tuple[Batch, list[int]]]) -> None:
        batch = group[0][0] if len(group) == 1 else {k: torch.cat([x[k] for x, _ in group]) for k in group[0][0]}
        if layers and _add_together(model, batch, [i for _, seed in group for i in seed], totals, layers):
            return
        layers.clear()  # once and for all
        for example, seed in group:
            likelihood = log_likelihood(model, example, seed)
            if sharded:
                found = loss_gradients(model, likelihood) if totals else {}
                grads: Sequence[Tensor | None] = [found.get(n) for n in parameters]
            else:
                grads = _gradients(likelihood, list(totals))
            for p, g in zip(totals, grads):
                if g is not None:
                    totals[p].addcmul_(g.float(), g.float())

    with evaluating(model):
        for i, example in enumerate(examples):
            same = waiting[tuple((k, getattr(t, "shape", None)) for k, t in example.items())]
            same.append((example, list(seeds[i : i + 1])))
            if len(same) >= limit:
                add(same)
                same.clear()
                # in one example of several tokens, a first dimension of 1 can be the examples' only
                whole = [t for t in example.values() if isinstance(t, Tensor) and t.shape[:1] == (1,)]
                alone = len(whole) == len(example) and all(t.ndim == 1 or t[0].numel() > 1 for t in whole)
                limit = size if alone else limit
        for same in filter(None, waiting.values()):
            add(same)
    return {n: totals[p] for n, p in parameters.items()}


@torch.enable_grad()
def log_likelihood(model: nn.Module, batch: Batch, seeds: Sequence[int] = ()) -> Tensor:
    """The sum over the examples of `batch` of log p(y|x), as the model's own cross-entropy has it.

    Its `logits` have the classes in the last dimension and one row a label: an example's (sequence classifiers), a
    token's (token classifiers, masked language models), or the next token's (causal ones). log p(y|x) is the sum over
    an example's rows; the label -100 marks one that does not count. `seeds`, one an example: draw the labels from the
    model's p(y|x), of language models every token given those before. ValueError: regression, several labels an
    example, or other outputs that are no rows of classes.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels", torch.empty(0))
    generates = is_language_model(model)
    encoder_decoder = generates and bare_model(model).config.is_encoder_decoder
    given = {"labels": labels} if encoder_decoder else {}  # the decoder's inputs are made from them
    outputs = model(**inputs, **given)
    logits = outputs["logits"].float() if "logits" in outputs else torch.empty(0)
    if generates and not encoder_decoder:  # a causal model's logits are the next token's
        logits, labels = logits[:, :-1], labels[:, 1:]
    classes = logits.shape[-1]
    if classes < 2 or labels.is_floating_point() or labels.numel() * classes != logits.numel():
        raise ValueError(
            "EWC's Fisher needs log p(y|x) of classes, which regression and several labels an example do not give: "
            f"got logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}, {labels.dtype}. "
            "Use --method l2sp, elastic or replay."
        )
    if len(seeds):  # one generator an example: the others change nothing
        p = [torch.atleast_2d(example.softmax(-1).cpu()) for example in logits.detach()]
        drawn = [torch.multinomial(q, 1, generator=torch.Generator().manual_seed(seed)) for q, seed in zip(p, seeds)]
        labels = torch.where(labels.cpu() == -100, labels.cpu(), torch.stack(drawn).view(labels.shape))
    return -F.cross_entropy(logits.flatten(0, -2), labels.to(logits.device).flatten(), reduction="sum")


def _gradients(likelihood: Tensor, inputs: Sequence[Any]) -> Sequence[Tensor | None]:
    reached = likelihood.requires_grad and len(inputs) > 0
    return torch.autograd.grad(likelihood, inputs, allow_unused=True) if reached else [None] * len(inputs)


def _layers(model: nn.Module, totals: Totals) -> Layers:
    """Layer -> its parameters by name; empty unless every parameter is that of one module without modules in it."""
    owned = {m: {n: p for n, p in m.named_parameters(recurse=False) if p in totals} for m in model.modules()}
    layers = {m: own for m, own in owned.items() if own}
    plain = not any([*m.children()] or "forward" in vars(m) or getattr(m, "scale_grad_by_freq", False) for m in layers)
    prompts = any("prompt_encoder" in n.split(".") for n, _ in model.named_modules())  # PEFT repeats them an example
    return layers if plain and not prompts and sum(map(len, layers.values())) == len(totals) else {}


def _add_together(model: nn.Module, batch: Batch, seeds: Sequence[int], totals: Totals, layers: Layers) -> bool:
    """Add the squares of all examples of `batch`, or nothing if they cannot be told apart (False)."""
    examples = len(next(iter(batch.values())))
    calls: list[tuple[nn.Module, Tensor, Any]] = []
    strange: list[nn.Module] = []
    zero = torch.zeros((), requires_grad=True)  # so that every output has a gradient

    def before(module: nn.Module, args: Any) -> None:
        for p in layers[module].values():  # a gradient that reaches it all the same is of another use
            p.requires_grad_(False)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        for p in layers[module].values():
            p.requires_grad_(True)
        if not torch.is_grad_enabled():
            return output
        tensors = [*args, *kwargs.values(), output]
        simple = len(tensors) == 2 and all(isinstance(t, Tensor) for t in tensors)
        if simple and isinstance(module, nn.Embedding) and tensors[0].shape[:1] == (1,):  # positions, for all alike
            tensors = [t.expand(examples, *t.shape[1:]) for t in tensors]
        if not simple or any(t.shape[:1] != (examples,) for t in tensors):
            strange.append(module)
            return output
        output = tensors[1] + zero.to(output.device)
        calls.append((module, tensors[0].detach(), get_gradient_edge(output)))
        return output

    hooks = [m.register_forward_pre_hook(before) for m in layers]
    hooks += [m.register_forward_hook(after, with_kwargs=True, prepend=True) for m in layers]
    try:
        likelihood = log_likelihood(model, batch, seeds)
    finally:
        for hook in hooks:
            hook.remove()
        for p in totals:
            p.requires_grad_(True)
    if strange or len({m for m, *_ in calls}) < len(calls):
        return False
    gradients = _gradients(likelihood, [*(edge for *_, edge in calls), *totals])
    if any(g is not None for g in gradients[len(calls) :]):
        return False
    for (m, given, _), g in zip(calls, gradients):
        for example, g_of_it in zip(given, g) if g is not None else ():
            _add_squares(m, layers[m], example, g_of_it.float(), totals)
    return True


def _add_squares(layer: Any, own: Mapping[str, nn.Parameter], given: Tensor, g: Tensor, totals: Totals) -> None:
    """Add the squares of one example's gradients, from the layer's input and its output's gradient `g`."""
    if type(layer).forward is nn.Embedding.forward:
        ids, rows = given.flatten(), g.flatten(0, -2)
        rows = rows if layer.padding_idx is None else rows.masked_fill((ids == layer.padding_idx)[:, None], 0)
        found, of = ids.unique(return_inverse=True)  # few of all words, and some of them twice
        sums = rows.new_zeros(len(found), rows.shape[-1]).index_add_(0, of, rows)
        totals[layer.weight].index_add_(0, found, sums.square_())
        return
    if type(layer).forward is nn.Linear.forward:
        a, g = (t.float().reshape(-1, t.shape[-1]) for t in (given, g))
        gradients = [g.T @ a if name == "weight" else g.sum(0) for name in own]
    else:
        with torch.enable_grad():
            given = given.to(next(iter(own.values())).dtype) if given.is_floating_point() else given
            output = layer.forward(given[None])[0]  # without the hooks of others
        gradients = list(torch.autograd.grad(output, list(own.values()), g.to(output.dtype)))
    for p, gradient in zip(own.values(), gradients):
        totals[p].addcmul_(gradient.float(), gradient.float())
