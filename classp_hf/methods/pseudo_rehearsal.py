"""Pseudo-rehearsal: the model keeps its own answers to texts that need no earlier data (Robins 1995)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers.utils import logging

from .. import rehearsal
from ..names import bare_model, canonical_name, full_tensor, reshard, trainable_parameters
from .base import Context, Method, flag

logger = logging.get_logger(__name__)

POOL = COUNTED = 2048
"""Pseudo-texts of a classifier at most; longer trainings see them again. Texts whose lengths are counted for them."""


@dataclass
class PseudoRehearsal(Method):
    """Gradient of `lambda * T^2 * KL(old || new)` on texts that are not the new task's, added at every step.

    When a task begins, the model answers a pool of texts; while it trains, it is held to those answers (T is 1 for
    language models). No copy of the weights is kept, and no text of earlier tasks. The texts are

    - for classifiers and masked language models: independent tokens with the frequencies that tokens had in earlier
      tasks (Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal"). The memory keeps only counts: how
      often tokens and lengths occurred. A first task has nothing to rehearse, unless `remember` made its memory;
    - for causal language models: samples of the model itself, at the first training too (LAMOL, arXiv 1909.03329;
      self-synthesized rehearsal, arXiv 2403.01244). Each later task adds new ones;
    - or `rehearse_texts`.

    A step costs a forward and a backward pass over `rehearse_fraction` times the batch's texts, at least one; each
    task begins with a forward pass over the pool. The gradient is clipped by `max_grad_norm`, apart from the task's.

    Raises:
        ValueError: a hyperparameter out of its range; before training, encoder-decoders, regression, several labels
            an example, `heads="per_task"`, a dataset without a length or `input_ids` whose tokens are to be counted, a
            masked language model without its tokenizer, and `rehearse_texts` that hold no texts.
    """

    name = "pseudo_rehearsal"
    ranges = {
        "rehearse_fraction": ("> 0", lambda v: v > 0),
        "rehearse_lambda": (">= 0", lambda v: v >= 0),
        "rehearse_temperature": ("> 0", lambda v: v > 0),
        "rehearse_samples": (">= 1", lambda v: v >= 1),
        "rehearse_length": (">= 8", lambda v: v >= 8),
        "rehearse_top_k": (">= 1", lambda v: v >= 1),
        "rehearse_counts": ("on or off", lambda v: v in ("on", "off")),
    }

    rehearse_fraction: float = flag(0.25, "Texts rehearsed in a step, as a share of the batch.")
    rehearse_lambda: float = flag(1.0, "Strength of the rehearsal; no more than max_grad_norm allows its gradient.")
    rehearse_temperature: float = flag(2.0, "Temperature T of a classifier's answers; language models answer at 1.")
    rehearse_samples: int = flag(256, "Samples a language model draws of itself before a task, beside older ones.")
    rehearse_length: int = flag(128, "Tokens of a sample or a given text at most.")
    rehearse_top_k: int = flag(32, "Outcomes kept of an answer; all others count as one.")
    rehearse_counts: Literal["on", "off"] = flag(
        "on", "Keep how often tokens occur in a task. off: draw them by the memory of the input embedding's rows."
    )
    rehearse_texts: str | None = flag(None, "Texts to rehearse instead: a file or a Hub id, with `:column`.")

    tokens: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    lengths: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    pool: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    steps: int = field(default=0, init=False, repr=False)

    answers: rehearsal.Answers | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.uses_accumulators = self.rehearse_counts == "off"  # type: ignore[misc]
        self.learns_at_end = not self.uses_accumulators  # type: ignore[misc]

    def check(self, context: Context, others: Sequence[Method]) -> None:
        if context.per_task_heads:
            raise ValueError("Method 'pseudo_rehearsal' compares answers of one head; heads='per_task' has several.")
        kind = rehearsal.kind_of_model(context.model)
        if self.rehearse_texts is None and kind != "causal" and context.task_dataset is not None:
            columns = getattr(context.task_dataset, "column_names", None) or ()
            if "input_ids" not in columns or not hasattr(context.task_dataset, "__len__"):
                raise ValueError(
                    "The method 'pseudo_rehearsal' counts the tokens of a task: its dataset needs a column "
                    "`input_ids`, and a length. Tokenise it, or give texts to rehearse (rehearse_texts)."
                )
            if kind == "masked" and getattr(context.processing_class, "mask_token_id", None) is None:
                raise ValueError("Rehearsing a masked language model needs its tokenizer as the processing_class.")

    def before_task(self, context: Context) -> None:
        self.args = args = context.args
        self.kind, self.seed = rehearsal.kind_of_model(context.model), args.seed + 7919 * len(context.seen_tasks)
        self.count = max(round(self.rehearse_fraction * args.train_batch_size * args.gradient_accumulation_steps), 1)
        self.ranks, self.rank = args.world_size, args.process_index
        self.temperature = 1.0 if self.kind in ("causal", "masked") else self.rehearse_temperature
        self.answers, resumed = None, context.resumed and "values" in self.pool
        if context.resumed and not resumed:  # the task began with nothing to rehearse
            return
        texts = self._texts(context) if self.rehearse_lambda and not (resumed and "ids" in self.pool) else []
        if resumed and texts:  # given ones, which are not stored
            ids, lengths = rehearsal.padded(texts)
            if not torch.equal(lengths, self.pool["lengths"]):
                raise ValueError(f"{self.rehearse_texts!r} holds other texts than the resumed run began with.")
            self.pool |= {"ids": ids, "lengths": lengths}
        elif not resumed:
            self.steps, self.pool = 0, {}
            if texts:
                k, quiet = self.rehearse_top_k, bool(args.disable_tqdm)
                self.pool = vars(rehearsal.answer(context.model, texts, k, self.temperature, quiet=quiet))
        if self.pool:
            self.answers = rehearsal.Answers(**self.pool)
            a_step, length = self.count * self.ranks, float(self.answers.lengths.double().mean())
            logger.info(f"Rehearsing {a_step} of {len(self.answers)} texts a step, {a_step * length:.0f} tokens.")

    def _texts(self, context: Context) -> list[list[int]]:
        tokenizer, needed = context.processing_class, self.count * self.ranks * max(context.max_steps, 1)
        count, most = self.rehearse_samples, rehearsal.readable(context.model, self.rehearse_length)
        if self.rehearse_texts is not None:
            return rehearsal.read_texts(self.rehearse_texts, tokenizer, count, most)
        if self.kind == "causal":
            ids, sizes = (self.pool[part].tolist() if "ids" in self.pool else [] for part in ("ids", "lengths"))
            texts = [row[:length] for row, length in zip(ids, sizes, strict=True)][-3 * count :]
            texts = [text for text in texts if max(text) < _vocabulary(context.model)]  # which may have shrunk
            if texts and context.fisher_steps and len(context.seen_tasks) == 1:  # of `remember`, of this very model
                return texts
            return texts + rehearsal.draw_samples(context.model, tokenizer, count, most, self.seed)
        if new := self._new_head(context):
            logger.warning(f"Nothing is rehearsed: {new} is new, and the model's answers mean nothing yet.")
            return []
        special, padding = self._special(context)
        ends = rehearsal.frame(context.task_dataset[0]["input_ids"], special, padding)
        room = rehearsal.readable(context.model, 2**31) - len(ends[0]) - len(ends[1])
        generator = torch.Generator().manual_seed(self.seed)
        vocabulary = _vocabulary(context.model)  # which may have shrunk
        known = [(counts[:vocabulary], self.lengths[n]) for n, counts in self.tokens.items()]
        known = [(counts, own) for counts, own in known if counts.any()]
        drawn = self.rehearse_counts == "off" or not known  # nobody counted: CLASSP's memory knows some of it, too
        if drawn and (rows := self._embedding_rows(context, special)) is not None:
            some = context.task_dataset[:COUNTED]
            known.append((rows, rehearsal.count_tokens(some, special, len(rows))[1]))
        known = [(counts, cut) for counts, own in known if (cut := _cut(own, room, bool(ends[0] or ends[1]))).any()]
        if not known:
            if context.seen_tasks:
                logger.warning("Nothing to rehearse yet: the memory says nothing of the tokens of earlier tasks.")
            return []
        tokens, lengths = zip(*known, strict=True)
        texts = rehearsal.pseudo_texts(min(needed, POOL), tokens, lengths, ends, generator)
        for text in texts if self.kind == "masked" else ():
            hidden, mask = (torch.rand(len(text), generator=generator) < 0.15).tolist(), tokenizer.mask_token_id
            text[:] = [mask if h and i not in special else i for i, h in zip(text, hidden, strict=True)]
        return texts

    def _special(self, context: Context) -> tuple[list[int], int | None]:
        tokenizer, config = context.processing_class, bare_model(context.model).config
        padding = getattr(tokenizer, "pad_token_id", getattr(config, "pad_token_id", None))
        if tokenizer is None:  # what else is special nobody says
            return [padding] if isinstance(padding, int) else [], padding
        return sorted(tokenizer.all_special_ids), padding

    def _counted(self, context: Context) -> tuple[Tensor, Tensor]:
        return rehearsal.count_tokens(context.task_dataset, self._special(context)[0], _vocabulary(context.model))

    def _new_head(self, context: Context) -> str | None:
        """A parameter behind the base model of which CLASSP has no memory, while it has one of others."""
        known, bare = context.accumulators(), bare_model(context.model)
        base = f"{getattr(bare, 'base_model_prefix', '')}."
        heads = (n for n, _ in trainable_parameters(context.model) if not n.startswith(base) and "lora_" not in n)
        return next((n for n in heads if known and n not in known), None) if base != "." else None

    def _embedding_rows(self, context: Context, special: list[int]) -> Tensor | None:
        if not context.seen_tasks or not context.accumulators():
            return None
        weight = bare_model(context.model).get_input_embeddings().weight
        names = (canonical_name(n) for n, p in context.model.named_parameters() if p is weight)
        if (accumulator := context.accumulators().get(next(names, ""))) is None:
            return None
        rows = full_tensor(accumulator).float().sum(-1).cpu()
        rows[[i for i in special if i < len(rows)]] = 0
        return rows if rows.sum() > 0 else None

    def before_step(self, model: nn.Module) -> None:
        if self.answers is None:
            return
        args, everyones = self.args, self.ranks * self.count
        rows = rehearsal.permuted(everyones, self.steps * everyones, len(self.answers), self.seed)
        own = rows[self.rank * self.count :][: self.count]
        self.steps += 1
        named = list(trainable_parameters(model))
        grads = [p.grad for _, p in named]
        model.zero_grad()
        scale = 1024.0 if args.fp16 else 1.0  # of float16's small gradients
        # the mean over the positions of all ranks, whose gradients are averaged
        weight = scale * self.rehearse_lambda * self.temperature**2 * self.ranks / self.answers.positions(rows)
        with torch.enable_grad():
            for part in own.split(args.train_batch_size):
                (rehearsal.divergence(model, self.answers, part, self.temperature) * weight).backward()
        named = list(trainable_parameters(model))  # once more: FSDP2 may hold others now
        added = [p for n, p in named if p.grad is not None and n not in self.excluded]
        if self.ranks > 1 and not reshard(model):  # FSDP2 has averaged them
            for p in added:
                p.grad = reduce(p.grad, "mean")
        for p in added if scale != 1 else ():
            p.grad.div_(scale)  # type: ignore[union-attr]
        norm = nn.utils.clip_grad_norm_(added, args.max_grad_norm or torch.inf)
        overflowed = args.fp16 and not torch.isfinite(norm)
        for (n, p), grad in zip(named, grads, strict=True):
            if overflowed or p.grad is None or n in self.excluded:
                p.grad = grad
            elif grad is not None:
                p.grad = grad.add_(p.grad)

    def after_task(self, context: Context) -> None:
        self.answers = None
        own = self.kind == "causal" and self.rehearse_texts is None  # given texts are nobody's to keep
        self.pool = {k: v for k, v in self.pool.items() if own and k in ("ids", "lengths")}
        if self.kind != "causal" and self.rehearse_counts == "on" and self.rehearse_texts is None:
            self.tokens[context.task], self.lengths[context.task] = self._counted(context)

    def check_state(self, state: Mapping[str, Mapping[str, Tensor]], model: nn.Module) -> None:
        vocabulary = _vocabulary(model)
        tokens, lengths, pool = (state.get(part, {}) for part in ("tokens", "lengths", "pool"))
        right = tokens.keys() == lengths.keys() and all(
            _integers(t, (None,)) for t in (*tokens.values(), *lengths.values())
        )
        if pool and right:
            ids, sizes, values, indices = (
                pool.get(part, torch.empty(0)) for part in ("ids", "lengths", "values", "indices")
            )
            right = _integers(sizes, (None,)) and int(sizes.min()) > 0 and _integers(pool.get("steps", sizes[0]), ())
            answered = not pool.keys() <= {"ids", "lengths", "steps"}
            if right and "ids" in pool:
                below = vocabulary if answered else 2**31
                right = _integers(ids, (len(sizes), None), below) and int(sizes.max()) <= ids.shape[1]
            if right and answered:
                outcomes = max(vocabulary, getattr(bare_model(model).config, "num_labels", 0))
                right = values.shape == indices.shape and _integers(indices, indices.shape, outcomes)
                right = right and values.shape[:-1] in ((len(sizes),), (len(sizes), int(sizes.max())))
        if not right:
            raise ValueError(
                "The continual memory's samples or counts of tokens are not of this model and its tokenizer. Use the "
                "memory that a run wrote, or start without a memory."
            )

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        kept = {k: v for k, v in self.pool.items() if k != "ids" or self.rehearse_texts is None}
        pool = {**kept, "steps": torch.tensor(self.steps)} if self.pool else {}
        return {k: v for k, v in (("tokens", self.tokens), ("lengths", self.lengths), ("pool", pool)) if v}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        counts = state if self.rehearse_counts == "on" else {}
        self.tokens, self.lengths = dict(counts.get("tokens", {})), dict(counts.get("lengths", {}))
        self.pool = dict(state.get("pool", {}))
        self.steps = int(self.pool.pop("steps", 0))


def _cut(lengths: Tensor, room: int, framed: bool) -> Tensor:
    """How often texts have each length: those that the model cannot read are as long as it can."""
    lengths = lengths.clone()
    if len(lengths) > max(room, 0) + 1:
        lengths[max(room, 0)] += lengths[max(room, 0) + 1 :].sum()
        lengths = lengths[: max(room, 0) + 1]
    if not framed:  # nothing would be left of a text without tokens
        lengths[0] = 0
    return lengths


def _vocabulary(model: nn.Module) -> int:
    return bare_model(model).get_input_embeddings().weight.shape[0]


def _integers(t: Tensor, shape: Sequence[int | None], below: int = 2**62) -> bool:
    """Whether `t` has that shape and holds integers from 0 to `below` - 1."""
    fits = t.ndim == len(shape) and all(n in (None, size) for n, size in zip(shape, t.shape, strict=True))
    return fits and not t.is_floating_point() and t.numel() > 0 and 0 <= int(t.min()) <= int(t.max()) < below
