"""What a model is rehearsed on when earlier data are gone: pseudo-texts, own samples, given texts; and its answers.

Token ids are lists of int. Answers are what a model said of the next token, or of the label, at every position.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import tqdm
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .files import READERS, read_table
from .names import bare_model, evaluating, is_language_model, reshard

logger = logging.get_logger(__name__)

TEXT_SUFFIXES = (".txt", ".md", *READERS)


def kind_of_model(model: Any) -> str:
    """`"causal"`, `"masked"`, `"sequence"` (a label a text) or `"token"` (a label a token). ValueError: others."""
    bare = bare_model(model)
    config, name = getattr(bare, "config", None), type(bare).__name__
    names = [cls.__name__ for cls in type(bare).__mro__]  # a user's own inherits from one of Transformers
    if config is not None and not getattr(config, "is_encoder_decoder", False):
        if is_language_model(bare):
            return "causal"
        for ending, kind in (("MaskedLM", "masked"), ("TokenClassification", "token")):
            if any(ending in n for n in names):
                return kind
        several, one = getattr(config, "num_labels", 0) > 1, (None, "single_label_classification")
        if several and any("SequenceClassification" in n for n in names) and config.problem_type in one:
            return "sequence"
    raise ValueError(
        f"{name} cannot be rehearsed: supported are causal and masked language models, and classifiers of texts or "
        "tokens with one of several labels; not encoder-decoders, regression or several labels at once."
    )


def count_tokens(examples: Any, special: Sequence[int], vocabulary: int) -> tuple[Tensor, Tensor]:
    """How often each token occurs in the `input_ids` of `examples`, int64, (vocabulary,), and how often each length,
    (longest text + 1,); without special tokens."""
    special_ids = np.fromiter(special, dtype=np.int64)
    tokens, lengths = np.zeros(vocabulary, dtype=np.int64), []
    for row in examples["input_ids"]:
        ids = np.asarray(row, dtype=np.int64)
        ids = ids[~np.isin(ids, special_ids)]
        np.add.at(tokens, ids, 1)
        lengths.append(len(ids))
    return torch.from_numpy(tokens), torch.from_numpy(np.bincount(lengths))


def frame(ids: Sequence[int], special: Sequence[int], padding: int | None) -> tuple[list[int], list[int]]:
    """The special tokens that a text of this tokenizer begins and ends with, taken from one."""
    ids = [i for i in map(int, ids) if i != padding]
    inner = [k for k, i in enumerate(ids) if i not in special]
    return (ids[: inner[0]], ids[inner[-1] + 1 :]) if inner else (ids, [])


def pseudo_texts(
    count: int,
    tokens: Sequence[Tensor],
    lengths: Sequence[Tensor],
    ends: tuple[list[int], list[int]],
    generator: torch.Generator,
) -> list[list[int]]:
    """`count` texts of independent tokens, between the special tokens `ends`. Each takes the weights of all `tokens`
    and `lengths` that one task has, chosen at random."""
    chosen = torch.randint(len(tokens), (count,), generator=generator)
    texts: list[list[int]] = [[] for _ in range(count)]
    for task, (frequencies, sizes) in enumerate(zip(tokens, lengths, strict=True)):
        rows = (chosen == task).nonzero().flatten().tolist()
        if not rows:
            continue
        drawn = torch.multinomial(sizes.double(), len(rows), replacement=True, generator=generator)
        ids = torch.multinomial(frequencies.double(), int(drawn.sum()) or 1, replacement=True, generator=generator)
        for row, text in zip(rows, ids[: int(drawn.sum())].split(drawn.tolist()), strict=True):
            texts[row] = [*ends[0], *text.tolist(), *ends[1]]
    return texts


def draw_samples(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, count: int, length: int, seed: int, batch_size: int = 32
) -> list[list[int]]:
    """`count` texts of at most `length` tokens that a causal language model writes at temperature 1.

    Half of a chat model's begin where its template has the user speak: the model writes the question and the answer
    (Xu et al. 2024, arXiv 2406.08464), in `length` tokens beside the template's.
    """
    begin, length = _first_token(model, tokenizer), readable(model, length)
    before, between = _chat_frame(tokenizer)
    fits = len(before) + len(between) + length <= readable(model, 2**62)
    answered = count // 2 if before and fits else 0
    bare, device = bare_model(model), next(model.parameters()).device
    forked = {"devices": [device], "device_type": device.type} if device.type in ("cuda", "xpu") else {"devices": []}
    own = bare.generation_config  # whatever is not asked for comes from there, a repetition penalty too
    ends = getattr(own, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    texts: list[list[int]] = []
    drawn = tqdm(total=count, desc="Drawing the model's own samples")
    try:
        bare.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0)
        with evaluating(model), torch.random.fork_rng(**forked), drawn:
            torch.manual_seed(seed)
            while len(texts) < count:
                chatting = len(texts) < answered
                size = min(batch_size, (answered if chatting else count) - len(texts))
                if chatting:
                    asked = _generate(model, [before] * size, max(length // 2, 1), ends)
                    asked = [[*(ids[:-1] if ids[-1] in ends else ids), *between] for ids in asked]
                    written = max(map(len, asked)) - len(before) - len(between)
                    texts += _generate(model, asked, max(length - written, 1), ends)
                else:
                    texts += _generate(model, [[begin]] * size, length - 1, ends)
                drawn.update(size)
    finally:
        bare.generation_config = own
    return texts


def readable(model: Any, length: int) -> int:
    """`length`, or as many tokens as the model can read at most."""
    limit = getattr(bare_model(model).config, "max_position_embeddings", None) or length
    adapters = getattr(model, "peft_config", None) or {}
    virtual = max((getattr(adapter, "num_virtual_tokens", 0) for adapter in adapters.values()), default=0)
    return min(length, limit - virtual) if limit > 0 else length  # XLNet's is -1


def _first_token(model: Any, tokenizer: Any) -> int:
    config = bare_model(model).config
    ends = (getattr(source, f"{end}_token_id", None) for end in ("bos", "eos") for source in (tokenizer, config))
    begin = next((end for end in ends if isinstance(end, int)), None)
    if begin is None:
        raise ValueError("Neither tokenizer nor config names a beginning-of-text token to draw samples from.")
    return begin


def _chat_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The template's tokens before what the user says, and between that and the answer; none without such a one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return [], []
    from jinja2 import TemplateError

    marker = "\u2603"
    turn = [{"role": "user", "content": marker}]
    try:
        whole = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError, LookupError) as error:  # it asks for more than a user's turn
        logger.warning(f"No chats are drawn: the tokenizer's chat template takes no user's turn alone ({error}).")
        return [], []
    before, found, between = whole.partition(marker)
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, between)]
    return (parts[0], parts[1]) if found and all(parts) else ([], [])


@torch.no_grad()
def _generate(model: Any, prompts: list[list[int]], new: int, ends: list[int]) -> list[list[int]]:
    """`prompts` with what the model writes after them, at most `new` tokens, up to one of `ends`."""
    width, device = max(map(len, prompts)), next(model.parameters()).device
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": new, "synced_gpus": reshard(model)}
    written = model.generate(input_ids=ids, attention_mask=mask, **how)[:, width:]
    rows = zip(prompts, written.tolist(), strict=True)
    return [[*p, *row[: next((k + 1 for k, i in enumerate(row) if i in ends), None)]] for p, row in rows]


def read_texts(source: str, tokenizer: Any, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Token ids of up to `count` texts, at most `length` tokens each, from `source`: a file (.txt: a text a paragraph;
    .json, .jsonl, .csv, .tsv, .parquet) or a dataset's Hub id; of columns the one after the colon (`wiki.jsonl:body`),
    default `text`. ValueError: no tokenizer, no such column or no texts; FileNotFoundError: no such file."""
    if tokenizer is None:
        raise ValueError(f"Texts ({source!r}) need the tokenizer: pass it to Trainer as processing_class.")
    name, column = source, "text"
    if ":" in source and not os.path.exists(source):
        name, _, column = source.rpartition(":")
    suffix = Path(name).suffix if Path(name).suffix in TEXT_SUFFIXES else ""
    if suffix and not os.path.isfile(name):
        raise FileNotFoundError(f"There is no file {name!r} with texts.")
    if suffix in (".txt", ".md"):
        texts = [part.strip() for part in Path(name).read_text(encoding="utf-8").split("\n\n")]
    else:
        from datasets import load_dataset

        # of the Hub no more than is used
        rows = read_table(name)["train"] if suffix else load_dataset(name, split="train", streaming=True)
        first: dict[str, Any] = next(iter(rows), {})
        if not isinstance(first.get(column), str):
            raise ValueError(f"{name!r} has no column {column!r} of texts, but {', '.join(first)}. Use {name}:COLUMN.")
        texts = [row[column] for row in itertools.islice(rows.shuffle(seed=seed), 4 * count)]
    encoded = [tokenizer(t, truncation=True, max_length=length)["input_ids"] for t in texts if t and t.strip()]
    order = np.random.default_rng(seed).permutation(len(encoded))
    found = [encoded[i] for i in order if len(encoded[i]) > 1][:count]
    if not found:
        raise ValueError(f"{source!r} holds no texts.")
    if len(found) == 1 and suffix in (".txt", ".md"):
        logger.warning(f"{name} holds one text: what stands between empty lines is one, of {length} tokens at most.")
    return found


@dataclass
class Answers:
    """A model's answers to some texts.

    Attributes:
        ids: (texts, longest) int32, padded with 0 on the right; lengths: (texts,) int32.
        values: log-probabilities of the most probable outcomes, (texts[, longest], k) float16.
        indices: which outcomes these are, int32, in the same shape.
    """

    ids: Tensor
    lengths: Tensor
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    indices: Tensor = field(default_factory=lambda: torch.empty(0))

    def __len__(self) -> int:
        return len(self.ids)

    def whole(self) -> bool:
        """Whether the tensors fit each other in shape, kind and range, as in every file that a run wrote."""
        ids, lengths, values, indices = self.ids, self.lengths, self.values, self.indices
        shapes = ids.ndim == 2 and lengths.shape == ids.shape[:1] and values.shape == indices.shape
        if not (shapes and values.shape[:-1] in (ids.shape, ids.shape[:1]) and values.is_floating_point()):
            return False
        if any(t.is_floating_point() or not t.numel() for t in (ids, lengths, indices)):
            return False
        return min(int(ids.min()), int(indices.min())) >= 0 < int(lengths.min()) <= int(lengths.max()) <= ids.shape[1]

    def positions(self, rows: Tensor) -> int:
        """How many answers these rows have: one a token, or one a text."""
        return int(self.lengths[rows].sum()) if self.values.ndim == 3 else len(rows)

    def inputs(self, rows: Tensor, model: nn.Module) -> dict[str, Tensor]:
        """What the model is given of these rows."""
        device, width = next(model.parameters()).device, int(self.lengths[rows].max())
        mask = torch.arange(width) < self.lengths[rows, None]
        # decoders that classify find a text's end by this token
        ids = self.ids[rows, :width].long().masked_fill(~mask, bare_model(model).config.pad_token_id or 0)
        return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The logits at the given tokens; prompt tuning puts others before them."""
    logits = model(**inputs)["logits"]
    return logits[:, -inputs["input_ids"].shape[1] :] if logits.ndim == 3 else logits


def padded(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids (texts, longest) and lengths (texts,), int32."""
    lengths = torch.tensor([len(t) for t in texts], dtype=torch.int32)
    rows = [torch.tensor(t, dtype=torch.int32) for t in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


@torch.no_grad()
def answer(
    model: Any, texts: list[list[int]], k: int, temperature: float = 1.0, batch_size: int = 16, quiet: bool = False
) -> Answers:
    """What `model` answers in evaluation mode: the `k` best outcomes at each position, of `logits / temperature`."""
    result, found = Answers(*padded(texts)), []
    batches = torch.arange(len(result)).split(batch_size)
    with evaluating(model):
        for rows in tqdm(batches, desc="The model's answers", leave=False, disable=quiet):
            logits = logits_of(model, result.inputs(rows, model)).float() / temperature
            top = F.log_softmax(logits, -1).topk(min(k, logits.shape[-1]))
            extra = (0, 0, 0, result.ids.shape[1] - logits.shape[1]) if logits.ndim == 3 else (0, 0)
            found.append((F.pad(top.values, extra).half().cpu(), F.pad(top.indices, extra).int().cpu()))
    result.values, result.indices = map(torch.cat, zip(*found))
    return result


def divergence(
    model: nn.Module, answers: Answers, rows: Tensor, temperature: float = 1.0, logits: Tensor | None = None
) -> Tensor:
    """`KL(answers || model)` in nats, the sum over the positions of `rows`, with its graph; a 0-dim tensor. Outcomes
    beyond the stored ones count as one. `logits`: what the model says of these rows, where it is known already."""
    inputs = answers.inputs(rows, model)
    logits = (logits_of(model, inputs) if logits is None else logits).float() / temperature
    new = F.log_softmax(logits, -1)
    old, indices = (t[rows].to(new.device) for t in (answers.values.float(), answers.indices.long()))
    if logits.ndim == 3:
        kept = inputs["attention_mask"].bool()
        new, old, indices = new[kept], old[:, : kept.shape[1]][kept], indices[:, : kept.shape[1]][kept]
    found = new.gather(-1, indices)
    terms = (old.exp() * (old - found)).sum(-1)
    if indices.shape[-1] < new.shape[-1]:
        rest_old, rest_new = ((1 - p.exp().sum(-1)).clamp(min=1e-6) for p in (old, found))
        terms = terms + rest_old * (rest_old.log() - rest_new.log())
    return terms.sum()


@torch.no_grad()
def measure(model: nn.Module, answers: Answers, batch_size: int = 8) -> tuple[float, float]:
    """A causal model's loss on the texts of `answers`, nats a token, and `KL(answers || model)`, nats a position."""
    loss = kl = 0.0
    with evaluating(model):
        for rows in torch.arange(len(answers)).split(batch_size):
            inputs = answers.inputs(rows, model)
            logits = logits_of(model, inputs).float()
            kl += float(divergence(model, answers, rows, logits=logits))
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)[:, 1:]
            loss += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"))
    positions = int(answers.lengths.sum())
    return loss / max(positions - len(answers), 1), kl / positions


def permuted(count: int, start: int, total: int, seed: int) -> Tensor:
    """Numbers `start` to `start + count` of an endless stream that goes through `range(total)` in ever new orders."""
    rounds = range(start // total, (start + count - 1) // total + 1)
    stream = torch.cat([torch.randperm(total, generator=torch.Generator().manual_seed(seed + r)) for r in rounds])
    first = start % total
    return stream[first : first + count]
