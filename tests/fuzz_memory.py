"""Broken and hostile files for `ContinualMemory.load`; `python tests/fuzz_memory.py --minutes 10` searches longer.

A file either loads, with the content that it says it has, or is refused by one ValueError that names it: no other
exception, no hang, no memory beyond what its size explains.
"""

from __future__ import annotations

import argparse
import collections
import json
import resource
import struct
import tempfile
import time
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load as load_safetensors

from classp_hf import ContinualMemory
from classp_hf.memory import FORMAT, MEMORY_NAME, _digest
from classp_hf.redaction import UNPRINTABLE

DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "I64", "I8", "U16", "BOOL", "C64", "X"]
NAMES = ["a.weight", "../../x", "/etc/passwd", "..", "", "a\0b", "a\nb", "\u202etxt", "x" * 500, "a//b", "é", "a|b"]
KINDS = ["accumulator", "head.a%2Fb", "head...", "head.", "initial_head", "ewc.importance", "..", "", "method.part"]
FIELDS = ["format", "format_version", "content", "sha256", "other"]
SPECIAL = [float("nan"), float("inf"), -float("inf"), -1.0, 3e38, 1e-45, 0.0]


def valid_memory():
    memory = ContinualMemory(
        metadata={
            "tasks": ["a/b", "c"],
            "optimizer": {"name": "CLASSP", "lr": 0.1, "power": 2.0, "density": None},
            "method": {"name": "ewc", "ewc_lambda": 1.0},
        }
    )
    generator = torch.Generator().manual_seed(0)
    for kind in ("accumulator", "ewc.importance", "head.a%2Fb"):
        memory.put(
            kind, {"a.weight": torch.rand(4, 3, generator=generator), "a.bias": torch.rand((), generator=generator)}
        )
    memory.put("ewc.anchor", {"a.weight": torch.randn(4, 3, generator=generator).bfloat16()})
    memory.put("accumulator", {"none": torch.zeros(0, 3)})
    return memory


def valid_bytes():
    with tempfile.TemporaryDirectory() as folder:
        return valid_memory().save(folder).read_bytes()


def split(blob):
    """Header as a dict, and the tensors' bytes."""
    length = struct.unpack("<Q", blob[:8])[0]
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def join(header, data):
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def with_digest(blob):
    """The file with the digest that belongs to its content, as who alters it on purpose would write it."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(blob)
        file.flush()
        try:
            with safe_open(file.name, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
        except Exception:  # no safetensors file: there is nothing to make a digest of
            return blob
    metadata.pop("sha256", None)
    header, data = split(blob)
    header["__metadata__"] = {**metadata, "sha256": _digest(sorted(tensors.items()), metadata)}
    return join(header, data)


def forge(tensors=None, content=None, **fields):
    """A memory's bytes with another content than `save` would write, and the right digest.

    Args:
        tensors: key -> tensor. Default: those of `valid_memory`.
        content: the text of the metadata's JSON. Default: that of `valid_memory`.
        fields: other entries of safetensors' own metadata.
    """
    from safetensors.torch import save

    memory = valid_memory()
    metadata = {"format": FORMAT, "format_version": "1", "content": content or json.dumps(memory.metadata), **fields}
    return with_digest(save(memory.tensors if tensors is None else tensors, metadata))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def edited(draw, value):
    """A JSON value with one part of it replaced, dropped or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        value = dict(value)
        match draw(st.integers(0, 4)):
            case 0:
                del value[key]
            case 1:
                value[draw(st.text(max_size=4) | st.sampled_from(["tasks", "power"]))] = draw(json_values)
            case _:
                value[key] = draw(edited(value[key]))
        return value
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        i = draw(st.integers(0, len(value) - 1))
        return [*value[:i], draw(edited(value[i])), *value[i + 1 :]]
    return draw(json_values)


@st.composite
def damaged(draw, blob):
    """Bytes as a bad disk or a broken copy leaves them."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(blob) - 1, 0)))
        match draw(st.integers(0, 4)):
            case 0:
                blob = blob[:at]
            case 1:
                length = draw(st.integers(1, 64))
                to = draw(st.integers(0, len(blob)))
                blob = blob[:to] + blob[at : at + length] + blob[to:]
            case 2:
                blob = blob[:at] + draw(st.binary(max_size=16)) + blob[at:]
            case 3:
                blob = struct.pack("<Q", draw(st.integers(0, 2**64 - 1) | st.integers(0, len(blob)))) + blob[8:]
            case _:
                blob = (
                    blob[:at] + bytes([blob[at] ^ (1 << draw(st.integers(0, 7)))]) + blob[at + 1 :] if blob else blob
                )
    return blob


@st.composite
def altered(draw, blob):
    """A file that someone wrote on purpose: the header edited, the digest right."""
    header, data = split(blob)
    metadata = header["__metadata__"]
    for _ in range(draw(st.integers(1, 3))):
        tensors = sorted(header.keys() - {"__metadata__"})
        assume(tensors)
        key = draw(st.sampled_from(tensors))
        match draw(st.sampled_from([0, 1, 2, *(3, 4, 6, 7) * 3, 5])):
            case 0:
                header[key] |= {"dtype": draw(st.sampled_from(DTYPES))}
            case 1:
                sizes = st.integers(0, 4) | st.sampled_from([2**31, 2**62, 2**63, 2**64 - 1])
                header[key] |= {"shape": draw(st.lists(sizes, max_size=4) | st.just([1] * 70))}
            case 2:
                header[key] |= {"data_offsets": draw(st.lists(st.integers(0, 2**65), min_size=2, max_size=2))}
            case 3 | 4:
                kind, name = draw(st.sampled_from(KINDS)), draw(st.sampled_from(NAMES) | st.text(max_size=6))
                header[draw(st.sampled_from([f"{kind}/{name}", name]))] = header.pop(key)
            case 5:
                metadata[draw(st.sampled_from(FIELDS))] = draw(st.text(max_size=20))
            case 6:
                start, end = header[key].get("data_offsets", [0, 0])
                if end - start >= 4 and end <= len(data):
                    value = struct.pack("<f", draw(st.sampled_from(SPECIAL)))
                    data = data[: end - 4] + value + data[end:]
            case _:
                content = json.loads(metadata["content"]) if metadata.get("content", "")[:1] == "{" else {}
                metadata["content"] = json.dumps(draw(edited(content)))
    return with_digest(join(header, data))


VALID = valid_bytes()
files = damaged(VALID) | altered(VALID) | altered(VALID).flatmap(damaged)


# What the message says to do -> why the file was refused.
REMEDIES = {
    "is truncated or damaged. Copy it again": "unreadable",
    "was altered or damaged after it was written. Copy it again": "another digest",
    "Pass the": "no memory",
    "Install the": "another version",
    "start without a memory": "content that no run writes",
}


def check(blob, folder):
    """Load `blob` as a memory; "loaded", or why it was refused; or the loader's own other exception."""
    path = folder / MEMORY_NAME
    path.write_bytes(blob)
    try:
        memory = ContinualMemory.load(path)
    except ValueError as error:
        assert str(path) in str(error) and not UNPRINTABLE.search(str(error)) and len(str(error)) < 1000, error
        (reason,) = [reason for remedy, reason in REMEDIES.items() if remedy in str(error)]
        return reason
    stored = load_safetensors(blob)
    low_bit = [k for k, t in stored.items() if k.startswith("accumulator/") and t.dtype is torch.bfloat16]
    stored |= {k: stored[k].float() for k in low_bit}  # in a file alone
    again = ContinualMemory.load(memory.save(folder / "again"))
    assert memory.metadata == again.metadata == json.loads(split(blob)[0]["__metadata__"]["content"])
    for tensors in (memory.tensors, again.tensors):
        assert tensors.keys() == stored.keys()
        for key, t in tensors.items():
            assert t.dtype is stored[key].dtype and t.shape == stored[key].shape and torch.equal(t, stored[key]), key
    assert all(bool((t >= 0).all()) for t in memory.get("accumulator").values())
    return "loaded"


def fuzz(minutes):
    """Search until the time is over, and print what was seen; what the loader fails on, Hypothesis makes small and
    shows."""
    seen, slowest = collections.Counter(), 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end = time.monotonic() + 60 * minutes
    batch = 0
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            batch += 1

            @seed(batch)
            @settings(
                max_examples=200,
                database=None,
                deadline=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            @given(files)
            def search(blob):
                nonlocal slowest
                started = time.monotonic()
                seen[check(blob, Path(folder))] += 1
                slowest = max(slowest, time.monotonic() - started)

            search()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{seen.total():,} files, 0 crashes: {', '.join(f'{n:,} {reason}' for reason, n in seen.most_common())}; "
        f"slowest {slowest:.2f} s; peak RSS {peak // 1024} MiB, {(peak - before) // 1024} above the start."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    fuzz(parser.parse_args().minutes)
