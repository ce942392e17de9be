"""Pushing what a sequence left in its folder to the Hub."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

# What an earlier push of another kind of model may have left; a file that is pushed now stays.
DELETED = ["adapter_*", "training_args.bin"]
# A folder for every task, Trainer's checkpoints, the loggers' files, and a pickle that may hold the user's token.
NOT_PUSHED = ["[0-9][0-9]-*/*", "[0-9][0-9][0-9]-*/*", "checkpoint-*", "runs/*", "_*", ".*", "training_args.bin"]
NOT_PUSHED += ["sequence_state.json"]
_LOG_IN = "Log in with a token that may write there (`hf auth login`)"
_REMEDIES = {401: _LOG_IN, 403: _LOG_IN, 409: "The repository changed meanwhile, or has another type: look at it"}


def push_folder(folder: str | Path, repo_id: str, **kwargs: Any) -> Any:
    """Upload model, memory, card, accuracy matrix and figures from `folder` to `repo_id` in one commit.

    Args:
        kwargs: of `huggingface_hub.HfApi.upload_folder`, such as `token`, `revision`, `commit_message`.

    Raises:
        RuntimeError: the upload failed; says why, that nothing local is lost, and the command that tries again.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi().upload_folder(
            folder_path=str(folder), repo_id=repo_id, ignore_patterns=NOT_PUSHED, delete_patterns=DELETED, **kwargs
        )
    except Exception as error:  # of the Hub, its HTTP client, the file system
        words = ["hf", "upload", repo_id, str(folder), "."]
        for option, values in (("exclude", NOT_PUSHED), ("delete", DELETED), ("revision", [kwargs.get("revision")])):
            words += [word for value in values if value for word in (f"--{option}", value)]
        status = getattr(getattr(error, "response", None), "status_code", None) or 500
        known = isinstance(error, ValueError) or status < 500
        remedy = _REMEDIES.get(status, "Correct what the message names" if known else "Check the network")
        message = " ".join(str(error).split()) or "no message"
        raise RuntimeError(
            f"Pushing {folder} to {repo_id!r} failed ({type(error).__name__}: {message}). "
            f"Nothing local is lost. {remedy} and try again: {shlex.join(words)}"
        ) from error
