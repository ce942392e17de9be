"""Pushing what a sequence left in its folder to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .redaction import redact

# What an earlier push of another kind of model may have left; a file that is pushed now stays.
DELETED = ["adapter_*", "training_args.bin"]
# A folder for every task, Trainer's checkpoints, the loggers' files, and a pickle that may hold the user's token.
NOT_PUSHED = [
    "[0-9][0-9]-*/*",
    "[0-9][0-9][0-9]-*/*",
    f"{PREFIX_CHECKPOINT_DIR}-*",
    "runs/*",
    "_*",
    ".*",
    "training_args.bin",
    "sequence_state.json",
]


def push_folder(folder: str | Path, repo_id: str, **kwargs: Any) -> Any:
    """Upload model, memory, card, R and figures from `folder` to `repo_id` in one commit.

    Args:
        kwargs: of `huggingface_hub.HfApi.upload_folder`, such as `token`, `revision`, `commit_message`.

    Raises:
        RuntimeError: it failed; says why, that nothing local is lost, and the command that tries again.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi().upload_folder(
            folder_path=str(folder), repo_id=repo_id, ignore_patterns=NOT_PUSHED, delete_patterns=DELETED, **kwargs
        )
    except Exception as error:  # of the Hub, its HTTP client, the file system
        exclude = " ".join(f"--exclude '{pattern}'" for pattern in NOT_PUSHED)
        heard = " ".join(str(error).split()) or "no message"
        token = kwargs.get("token")
        said = redact(heard, [token] if isinstance(token, str) else [])
        raise RuntimeError(
            f"Pushing {folder} to {repo_id!r} failed ({type(error).__name__}: {said}). Nothing local is "
            f"lost. {_remedy(error)} and try again: hf upload {repo_id} {folder} . {exclude}"
        ) from (error if said == heard else None)  # a traceback would show the secret again


def _remedy(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return "Log in with a token that may write there (`hf auth login`)"
    if status == 409:
        return "The repository changed meanwhile, or has another type: look at it"
    response = getattr(error, "response", None)
    if isinstance(error, ValueError) or (response is not None and (status or 500) < 500):
        return "Correct what the message names"
    return "Check the network"
