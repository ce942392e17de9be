"""Arguments that are never written or shown, and characters that text from outside must not hold."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

# Control characters, line separators, bidirectional overrides and lone surrogates: they forge lines of a log.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Names that end so, and --hub_token as argparse lets users shorten it.
_SECRET = re.compile(r".*(token|password|secret|api[_-]?key|hub[_-]t\w*)", re.IGNORECASE)


def public_arguments(arguments: Any) -> Any:
    """A copy of `arguments` without the fields that hold a secret, in mappings at any depth."""
    if isinstance(arguments, Mapping):
        return {k: public_arguments(v) for k, v in arguments.items() if not _SECRET.fullmatch(str(k))}
    return [public_arguments(v) for v in arguments] if isinstance(arguments, (list, tuple)) else arguments


def public_command(argv: Sequence[str]) -> str:
    """The command line as one would type it, with REDACTED for the value of every flag that holds a secret."""
    words, hidden = [], False
    for word in argv:
        flag, equals, _ = word.partition("=")
        secret = _SECRET.fullmatch(flag.lstrip("-")) is not None
        words.append(f"{flag}=REDACTED" if secret and equals else "REDACTED" if hidden and word[:2] != "--" else word)
        hidden = secret and word.startswith("-") and not equals
    return shlex.join(words)
