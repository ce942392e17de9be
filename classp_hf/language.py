"""Tasks of causal and sequence-to-sequence language models: tokenised, with the loss on what the model is to write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from .tasks import Task, is_tokenised, validate_splits

logger = logging.get_logger(__name__)

IGNORED = -100  # label of tokens without a loss
COLUMNS = "'messages' (a chat), 'prompt' and 'completion', or 'text'"


def prepare_language_tasks(
    tasks: list[Task], tokenizer: Any, encoder_decoder: bool, max_length: int | None = None
) -> list[Task]:
    """Tokenise every split; other columns go.

    Args:
        tasks: of rows with `messages` (a list of `{"role": ..., "content": ...}`: the loss is on what the assistant says,
            all turns), `prompt` and `completion` (texts, or lists of messages: the loss is on the completion), or `text`
            (the loss is on all of it). Splits that hold `input_ids` and `labels` pass untouched.
        tokenizer: with a pad token; for messages with a chat template.
        encoder_decoder: the prompt goes into the encoder, the completion is what the decoder writes.
        max_length: longer examples lose their end; those that lose all of what the model is to write are left out. Default:
            what the tokenizer allows.

    Raises:
        ValueError: other columns, or a tokenizer without what they need.
    """
    validate_splits(tasks)
    if all(map(is_tokenised, tasks)):
        return list(tasks)
    if tokenizer is None:
        raise ValueError("The tasks are texts, and the trainer has no processing_class to tokenise them with.")
    if tokenizer.pad_token is None:
        raise ValueError("The tokenizer has no pad token. Set tokenizer.pad_token = tokenizer.eos_token.")
    if max_length is None and tokenizer.model_max_length < 1_000_000:  # "no limit" is int(1e30)
        max_length = tokenizer.model_max_length
    return [task if is_tokenised(task) else _prepare(task, tokenizer, encoder_decoder, max_length) for task in tasks]


def _prepare(task: Task, tokenizer: Any, encoder_decoder: bool, max_length: int | None) -> Task:
    splits = {}
    for field, dataset in task.splits.items():
        encode = _encoder(task.name, field, dataset, tokenizer, encoder_decoder)

        def tokenise(row: dict[str, Any], encode=encode) -> dict[str, list[int]]:
            return {k: ids[:max_length] for k, ids in encode(row).items()}

        own = dataset.column_names
        tokenised = dataset.map(
            tokenise, remove_columns=own, load_from_cache_file=False, desc=f"Tokenising {task.name}"
        )
        splits[field] = tokenised.filter(_has_loss, input_columns="labels", load_from_cache_file=False)
        if lost := len(tokenised) - len(splits[field]):
            if lost == len(tokenised):
                raise ValueError(
                    f"Task {task.name!r}: no example of {field} has anything left to learn within max_length={max_length} tokens."
                )
            logger.warning(
                f"Task {task.name}: {lost} examples of {field} have nothing to learn within {max_length} tokens."
            )
    return dataclasses.replace(task, **splits)


def _has_loss(labels: list[int]) -> bool:
    return any(label != IGNORED for label in labels)


def _encoder(
    name: str, field: str, dataset: Dataset, tokenizer: Any, encoder_decoder: bool
) -> Callable[[dict[str, Any]], dict[str, list[int]]]:
    """The function from a row to `input_ids`, `attention_mask` and `labels`."""
    columns = set(dataset.column_names)
    pair = {"prompt", "completion"} <= columns
    if not (pair or "messages" in columns or "text" in columns) or (encoder_decoder and not pair):
        wanted = "'prompt' and 'completion'" if encoder_decoder else COLUMNS
        raise ValueError(
            f"Task {name!r}: {field} needs the columns {wanted}, or input_ids and labels; got {sorted(columns)}."
        )
    chat = "messages" in columns or (pair and not isinstance(dataset[0]["prompt"], str))
    if chat and (encoder_decoder or tokenizer.chat_template is None):
        why = "an encoder-decoder is given texts" if encoder_decoder else "the tokenizer has no chat template"
        raise ValueError(f"Task {name!r}: {field} holds messages, but {why}.")

    def plain(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"] if pair else []
        if encoder_decoder:
            written = tokenizer(text_target=row["completion"])["input_ids"]
            return {"input_ids": prompt, "attention_mask": [1] * len(prompt), "labels": written}
        written = tokenizer(row["completion" if pair else "text"], add_special_tokens=not pair)["input_ids"]
        if tokenizer.eos_token_id is not None and written[-1:] != [tokenizer.eos_token_id]:
            written = [*written, tokenizer.eos_token_id]
        ids = [*prompt, *written]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(prompt) + written}

    def conversation(row: dict[str, Any]) -> dict[str, list[int]]:
        messages = [*row["prompt"], *row["completion"]] if pair else row["messages"]
        first = len(row["prompt"]) if pair else 0

        def template(end: int, **kwargs: Any) -> list[int]:
            return tokenizer.apply_chat_template(messages[:end], tokenize=True, return_dict=True, **kwargs)[
                "input_ids"
            ]

        ids = template(len(messages))
        labels = [IGNORED] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and i >= first:
                before, after = template(i, add_generation_prompt=True), template(i + 1)
                if ids[: len(before)] != before or ids[: len(after)] != after:
                    raise ValueError(
                        f"Task {name!r}: the tokenizer's chat template writes a message differently when others follow, so what the "
                        "assistant says cannot be told apart. Tokenise the task yourself: input_ids and labels."
                    )
                labels[len(before) : len(after)] = ids[len(before) : len(after)]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    return conversation if chat else plain
