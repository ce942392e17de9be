"""The memory of a model that nobody trained here: of its own samples, or of texts, with labels that it draws itself.

python -m classp_hf remember MODEL --output_dir DIR [--texts FILE|hub_id[:column]] [--samples 512] [--power 2]
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from huggingface_hub import ModelCardData

from .embedded import cache_folder
from .memory import ContinualMemory, NoMemoryError
from .methods import PseudoRehearsal, describe_methods
from .names import bare_model, evaluating, has_adapters, loss_gradients, mean_over_weights, trainable_parameters
from .names import samples as weight_samples
from .rehearsal import Answers, count_tokens, draw_samples, kind_of_model, logits_of, padded, read_texts, readable

PRETRAINED = "pretrained"  # the task that such a memory is of; as `memory`, that of the model as it is loaded
_CARD = """---
{data}
---
# {name}

The weights of {base} with a continual memory of what they need (`continual_memory.st`): `sum |g|^{power:g}` over
{steps} batches of {batch_size} {what}, with labels drawn from the model.{kept}
`python -m classp_hf SCRIPT` goes on from it when it trains this model.
"""
_SCALE = 1024.0  # of the loss: float16 loses small gradients; a power of two changes nothing else


def remember(
    model: Any,
    tokenizer: Any,
    *,
    texts: str | None = None,
    samples: int = 512,
    max_length: int = 128,
    batch_size: int = 8,
    power: float = 2.0,
    seed: int = 0,
) -> ContinualMemory:
    """Compute the memory of what a model knows: `sum |g|^power` over batches, g the gradient of a batch's mean loss.

    Labels are drawn from the model: the label of a text or token, the next token at every position, or, of masked
    models, 15% of the tokens. With power 2 the sum estimates the diagonal Fisher up to a factor (not the "empirical"
    one: Kunstner et al. 2019, arXiv 1905.12558). Such labels are independent and their gradients have mean 0: the
    squared gradient of a batch may stand for the sum of squares. The model, in evaluation mode, is not changed.

    Args:
        model: a causal language model; with `texts` also a masked one, or a classifier of texts or tokens.
        tokenizer: None only for samples; the model's config then names their first token.
        texts: a file (.txt, .md: a text a paragraph; .json, .jsonl, .csv, .parquet) or a Hub id, with `:column`, by
            default `text`. Default: the model's own samples.
        samples: number of samples, or of texts at most, >= 1.
        max_length: tokens of a sample or a text at most, > 1.
        batch_size: samples in a batch, >= 1; the memory's scale depends on it.
        power: the p of the optimizer that will use the memory, > 0.
        seed: of the samples and the drawn labels.

    Returns:
        A memory of the task "pretrained" and of all parameters that require a gradient; `metadata["steps"]` is the
        number of batches. As the state of `pseudo_rehearsal` it holds the model's own samples or, for classifiers and
        masked models, how often each token occurred in the texts. Given texts are not kept.

    Raises:
        ValueError: another kind of model, no texts where they are needed, a number out of range, no parameter that
            requires a gradient, and gradients that are not finite.
        FileNotFoundError: there is no file `texts`.
    """
    given = {"samples": samples, "max_length": max_length, "batch_size": batch_size, "power": power, "seed": seed}
    if min(samples, batch_size, max_length - 1) < 1 or not 0 < power < float("inf"):
        raise ValueError(f"samples, batch_size and power must be > 0 and max_length > 1, got {given}")
    kind, bare, method = kind_of_model(model), bare_model(model), PseudoRehearsal()
    length = readable(model, min(max_length, getattr(tokenizer, "model_max_length", max_length)))
    if texts is None and kind != "causal":
        raise ValueError(f"{type(bare).__name__} writes no samples of itself: give texts to remember it by.")
    if texts is None:
        ids = draw_samples(model, tokenizer, samples, length, seed)
        method.pool = dict(zip(("ids", "lengths"), padded(ids)))
    else:
        ids = read_texts(texts, tokenizer, samples, length, seed)
    if kind != "causal":
        special, rows = tokenizer.all_special_ids, len(bare.get_input_embeddings().weight)
        method.tokens[PRETRAINED], method.lengths[PRETRAINED] = count_tokens({"input_ids": ids}, special, rows)
    sums = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in trainable_parameters(model)}
    for steps, gradient in enumerate(drawn_gradients(model, tokenizer, ids, batch_size, seed), 1):  # noqa: B007
        for n, g in gradient.items():
            sums[n].add_(g.square() if power == 2 else g.abs().pow_(power))
    if not mean_over_weights(sums.values()) < float("inf"):
        raise ValueError("The gradients of this model are not finite: load it in float32 or bfloat16 to remember it.")
    memory = ContinualMemory()
    memory.put("accumulator", sums)
    memory.put("samples", weight_samples(model))
    for part, tensors in method.state_dict().items():
        memory.put(f"{method.name}.{part}", tensors)
    memory.metadata = {"tasks": [PRETRAINED], "optimizer": {"name": "remember", "power": float(power)}, "steps": steps}
    memory.metadata |= {"method": describe_methods([method]), "remember": {**given, "own_samples": texts is None}}
    return memory


def drawn_gradients(model: Any, tokenizer: Any, texts: list[list[int]], batch_size: int, seed: int) -> Iterator[dict]:
    """For each batch, in random order: canonical name -> float32 gradient of the mean loss on labels it draws."""
    kind = kind_of_model(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("No parameter of this model requires a gradient: there is nothing to remember.")
    held = Answers(*padded(texts))
    device = next(model.parameters()).device
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator(device).manual_seed(seed)
    with evaluating(model):
        for rows in tqdm(order.split(batch_size), desc="The model's memory"):
            inputs = held.inputs(rows, model)
            asked = inputs["attention_mask"].bool()
            if kind == "masked":
                special = torch.isin(inputs["input_ids"], torch.tensor(tokenizer.all_special_ids, device=device))
                draws = torch.rand(asked.shape, generator=generator, device=device).masked_fill(special | ~asked, 2.0)
                asked = draws <= max(0.15, float(draws.min()))  # at least one
                inputs["input_ids"][asked] = tokenizer.mask_token_id
            with torch.enable_grad():
                logits = logits_of(model, inputs).float()
                if kind == "causal":  # of the next token
                    logits, asked = logits[:, :-1], asked[:, 1:]
                logits = logits[asked] if logits.ndim == 3 else logits
                p = logits.detach().softmax(-1).nan_to_num(1.0)  # a NaN shows in the sums
                labels = torch.multinomial(p, 1, generator=generator)[:, 0]
                loss = F.cross_entropy(logits, labels) * _SCALE
            yield {n: g.float() / _SCALE for n, g in loss_gradients(model, loss).items()}


def pretrained_memory(model: Any, tokenizer: Any, power: float, writes: bool = True) -> ContinualMemory:
    """`remember` at its defaults, equal on all ranks; computed once, then read from the cache.

    It lies below `CLASSP_HF_CACHE`, default `HF_HOME/classp_hf`, in a folder named by a digest of some values of every
    weight, of the tokenizer's template and of the settings. `writes`: this rank writes it, one on each machine. Raises
    `ValueError` for another kind of model and for adapters.
    """
    by_hand = "run `python -m classp_hf remember MODEL --output_dir DIR` and pass --memory DIR"
    if has_adapters(model):
        raise ValueError(
            "memory='pretrained' is of causal language models without adapters, which gain nothing by it: the weights "
            "it is of are frozen. Hold the model to its answers instead: --rehearse 0.25."
        )
    if kind_of_model(model) != "causal":
        raise ValueError(f"memory='pretrained' is of causal language models; else {by_hand}.")
    trained = {n: str(p.dtype) for n, p in trainable_parameters(model)}
    settings = ["2", remember.__kwdefaults__, power, str(getattr(tokenizer, "chat_template", "")), trained]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for n, t in weight_samples(model).items():
        digest.update(f"{n}\n".encode() + t.numpy().tobytes())
    folder, memory = cache_folder() / PRETRAINED / digest.hexdigest()[:32], ContinualMemory()
    with suppress(NoMemoryError, ValueError):  # a damaged one is computed anew
        memory = ContinualMemory.load(folder)
    cached = all(gather_object([bool(memory.tensors)]))
    if not cached:  # every rank computes: none waits, until its connection breaks
        memory = remember(model, tokenizer, power=power)
    for key in sorted(memory.tensors):  # sums on GPUs differ in their last bits
        memory.tensors[key] = broadcast_object_list([memory.tensors[key]])[0]
    if not cached and writes:
        memory.save(folder)
    return memory


def load_saved(source: str, **kwargs: Any) -> Any:
    """A model of the class that its config names, from a folder or the Hub. ValueError: none of Transformers."""
    architecture = (transformers.AutoConfig.from_pretrained(source).architectures or ["none"])[0]
    if not hasattr(transformers, architecture):
        raise ValueError(f"{source} is saved as {architecture}, which is no class of Transformers")
    return getattr(transformers, architecture).from_pretrained(source, **kwargs)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `remember`."""
    command = argparse.ArgumentParser("python -m classp_hf remember", description=__doc__, allow_abbrev=False)
    command.add_argument("model", metavar="MODEL", help="a folder or a Hub id")
    command.add_argument("--output_dir", required=True, help="folder for model, tokenizer, memory and card")
    for name, default in (remember.__kwdefaults__ or {}).items():
        kind = str if default is None else type(default)
        command.add_argument(f"--{name}", type=kind, default=default, help=f"default: {default}")
    own = vars(command.parse_args(arguments))
    source, output = own.pop("model"), Path(own.pop("output_dir"))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = load_saved(source)
        memory = remember(model.to(PartialState().device), tokenizer, **own)
    except (ValueError, OSError) as error:
        command.error(str(error))
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    memory.save(output)
    base, kinds, steps = None if Path(source).exists() else source, memory.kinds(), memory.metadata["steps"]
    data = ModelCardData(base_model=base, library_name="transformers", tags=["continual-learning"]).to_yaml()
    kept = " It holds the samples." if "pseudo_rehearsal.pool" in kinds else ""
    kept += " It tells how often each token occurred in the texts." if "pseudo_rehearsal.tokens" in kinds else ""
    what, base = "texts" if own["texts"] else "samples of the model", base or Path(source).name
    card = {"data": data, "name": output.resolve().name, "base": base, "kept": kept, "what": what, "steps": steps}
    if not (output / "README.md").exists():  # it may be the model's own
        (output / "README.md").write_text(_CARD.format(**card, **own), encoding="utf-8")
    print(f"The model and the memory of {steps} batches are in {output}.")
