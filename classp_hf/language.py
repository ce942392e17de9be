"""Tasks of causal and sequence-to-sequence language models: tokenised, with the loss on what the model is to write."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from .tasks import PREPARE, Task, is_prepared, token_limit, validate_tasks

logger = logging.get_logger(__name__)

IGNORED = -100  # label of tokens without a loss


def prepare_language_tasks(
    tasks: list[Task], tokenizer: Any, encoder_decoder: bool, max_length: int | None = None
) -> list[Task]:
    """Return new tasks whose datasets hold `input_ids`, `attention_mask` and `labels` (-100: no loss) only.

    Args:
        tasks: their rows have `messages` (a list of `{"role": ..., "content": ...}`: the loss is on the assistant's
            turns), `prompt` and `completion` (texts, or lists of messages: the loss is on the completion), or `text`
            (the loss is on all of it). Prepared tasks are returned as they are.
        tokenizer: with a chat template if there are messages, and a pad token. Unused if all tasks are prepared.
        encoder_decoder: whether the prompt goes into an encoder, and a decoder writes the completion; both are texts.
        max_length: in tokens. Longer examples are cut; without a label left, dropped. Default: the tokenizer's limit.

    Raises:
        ValueError: other columns, no tokenizer, a chat template that rewrites earlier messages, a split with no label.
    """
    validate_tasks(tasks)
    return [t if is_prepared(t) else _prepare(t, tokenizer, encoder_decoder, max_length) for t in tasks]


def _prepare(task: Task, tokenizer: Any, encoder_decoder: bool, max_length: int | None) -> Task:
    max_length = token_limit(tokenizer, max_length)
    splits: dict[str, Any] = {}
    for field, dataset in task.splits.items():
        where = f"Task {task.name!r}: {field}"
        encode = _encoder(where, dataset, tokenizer, encoder_decoder)

        def tokenise(row: dict[str, Any], encode=encode) -> dict[str, list[int]]:
            ids, labels = (part[:max_length] for part in encode(row))
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

        tokenised = dataset.map(tokenise, remove_columns=dataset.column_names, load_from_cache_file=False, desc=where)
        batches = tokenised.select_columns("labels").iter(1000)  # a column is read a row at a time
        rows = (labels for batch in batches for labels in batch["labels"])
        kept = [i for i, labels in enumerate(rows) if any(label != IGNORED for label in labels)]
        if not kept:
            raise ValueError(f"{where}: no example has anything left to learn within max_length={max_length} tokens.")
        if lost := len(tokenised) - len(kept):
            logger.warning(f"{where}: {lost} examples, of nothing to learn in {max_length} tokens, are left out.")
        splits[field] = tokenised.select(kept)
    return replace(task, **splits)


def _encoder(where: str, dataset: Dataset, tokenizer: Any, encoder_decoder: bool) -> Callable[[dict], tuple]:
    """The function from a row to `input_ids` and `labels`."""
    columns = set(dataset.column_names)
    pair = {"prompt", "completion"} <= columns
    if not pair and (encoder_decoder or not columns & {"messages", "text"}):
        needed = "'prompt' and 'completion'" + ("" if encoder_decoder else ", 'messages' (a chat), or 'text'")
        raise ValueError(f"{where} needs the columns {needed}; it has {sorted(columns)}. {PREPARE}")
    chat = not isinstance(dataset[0]["prompt"], str) if pair else "messages" in columns
    if chat and encoder_decoder:
        raise ValueError(f"{where} holds messages, but an encoder-decoder is given texts.")

    def plain(row: dict[str, Any]) -> tuple[list[int], list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"] if pair else []
        if encoder_decoder:
            return prompt, tokenizer(text_target=row["completion"])["input_ids"]
        written = tokenizer(row["completion" if pair else "text"], add_special_tokens=not pair)["input_ids"]
        if tokenizer.eos_token_id is not None and written[-1:] != [tokenizer.eos_token_id]:
            written = [*written, tokenizer.eos_token_id]
        return [*prompt, *written], [IGNORED] * len(prompt) + written

    def conversation(row: dict[str, Any]) -> tuple[list[int], list[int]]:
        messages = [*row["prompt"], *row["completion"]] if pair else row["messages"]

        def template(end: int, **kwargs: Any) -> list[int]:
            return tokenizer.apply_chat_template(messages[:end], return_dict=True, **kwargs)["input_ids"]

        ids = template(len(messages))
        labels = [IGNORED] * len(ids)
        for i in range(len(row["prompt"]) if pair else 0, len(messages)):
            if messages[i]["role"] == "assistant":
                before, after = template(i, add_generation_prompt=True), template(i + 1)
                if ids[: len(before)] != before or ids[: len(after)] != after:
                    raise ValueError(
                        f"{where}: the tokenizer's chat template writes a message differently when others follow: "
                        "what the assistant says cannot be told apart. Prepare the task: input_ids and labels."
                    )
                labels[len(before) : len(after)] = ids[len(before) : len(after)]
        return ids, labels

    return conversation if chat else plain
