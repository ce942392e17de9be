"""What must never be written or shown: tokens, passwords, API keys; and what text from outside must not hold."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

REDACTED = "REDACTED"

# Control characters, line separators, bidirectional overrides and lone surrogates: they forge lines of a log.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# Flags, arguments and environment variables with a secret: `token` but not `tokenizer`.
_SECRET_NAME = re.compile(
    r"token(?!i[sz])|passw(?:or)?d|passphrase|secret|credential|(?:api|access|private)[_-]?key", re.IGNORECASE
)
# How many tokens of text there are or may be.
_COUNT_NAME = re.compile(r"(?:num|max|min|total)_(?:\w+_)?tokens", re.IGNORECASE)
# Hub tokens wherever they stand, and the user:password of a URL.
_SECRET_VALUE = re.compile(r"hf_(?:oauth_[\w.-]+|[A-Za-z0-9]{20,})|(?<=://)[^/\s]+(?=@)")


def _names_a_secret(name: str) -> bool:
    return _SECRET_NAME.search(_COUNT_NAME.sub("", name)) is not None


def known_secrets(arguments: Mapping[str, Any]) -> list[str]:
    """Values of `arguments` and of the environment that are named as secrets are, longest first."""
    named = [v for k, v in arguments.items() if isinstance(v, str) and _names_a_secret(k)]
    # a short one is a number or a switch (`MAX_TOKENS=4096`), a file's or folder's name says where secrets are
    places = ("FILE", "PATH", "DIR")
    environment = {k: v for k, v in os.environ.items() if len(v) >= 8 and not k.upper().endswith(places)}
    named += [v for k, v in environment.items() if _names_a_secret(k)]
    return sorted({v for v in named if v}, key=len, reverse=True)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without Hub tokens, credentials in URLs and the given `secrets`."""
    for secret in secrets:  # a short one may be part of any word
        if len(secret) >= 8 or secret == text:
            text = text.replace(secret, REDACTED)
    return _SECRET_VALUE.sub(REDACTED, text)


def public_arguments(arguments: Mapping[str, Any], secrets: Sequence[str] = ()) -> dict[str, Any]:
    """`arguments` without those named token, password, secret, api_key and alike, at any depth, and redacted."""
    return {redact(k, secrets): public_value(v, secrets) for k, v in arguments.items() if not _names_a_secret(k)}


def public_value(value: Any, secrets: Sequence[str] = ()) -> Any:
    """Any JSON value, redacted, in mappings without the entries that `public_arguments` leaves out."""
    if isinstance(value, Mapping):
        return public_arguments(value, secrets)
    if isinstance(value, (list, tuple)):
        return [public_value(v, secrets) for v in value]
    return redact(value, secrets) if isinstance(value, str) else value


def public_command(argv: Sequence[str], secrets: Sequence[str] = ()) -> str:
    """The command line as one would type it, with secrets replaced.

    `secrets`: their values, for flags that a parser accepts under a shorter name (`--hub_tok`).

    >>> public_command(["train.py", "--hub_token", "abc", "--api-key=def", "--text", "two words"])
    "train.py --hub_token REDACTED --api-key=REDACTED --text 'two words'"
    """
    words = []
    secret_follows = False
    for word in argv:
        name, equals, value = word.partition("=")
        named_secret = re.fullmatch(r"-{0,2}[\w.-]+", name) is not None and _names_a_secret(name)
        if secret_follows and not re.fullmatch(r"--.+|-[A-Za-z]", word):
            word = REDACTED
        elif (named_secret and equals) or value in secrets:
            word = f"{name}={REDACTED}"
        secret_follows = named_secret and not equals and word.startswith("-")
        words.append(redact(word, secrets))
    return shlex.join(words)
