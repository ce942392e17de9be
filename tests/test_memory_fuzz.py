"""Broken and hostile files: each is refused by one clear error, and no name in one becomes a path."""

from __future__ import annotations

import json
import re
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from fuzz_memory import VALID, check, edited, files, forge, join, split, valid_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from classp_hf import ClasspTrainer, ContinualMemory, ContinualTrainer
from classp_hf.matching import match_accumulators
from classp_hf.memory import MEMORY_NAME
from classp_hf.resume import read_state
from classp_hf.sequence import STATE_NAME

FUZZ = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


@settings(FUZZ, max_examples=1000)
@given(files)
def test_any_file_loads_as_it_is_or_is_refused(blob):
    with tempfile.TemporaryDirectory() as folder:
        check(blob, Path(folder))


def test_the_fuzzer_reaches_every_check(tmp_path):
    assert check(VALID, tmp_path) == check(forge(), tmp_path) == "loaded"
    assert check(VALID[:-1], tmp_path) == "unreadable"
    assert check(VALID[:-1] + b"\1", tmp_path) == "another digest"
    assert check(forge(format="pt"), tmp_path) == "no memory"
    assert check(forge(format_version="3"), tmp_path) == "another version"
    assert check(forge(content="[]"), tmp_path) == "content that no run writes"


ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "Expecting value"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        ('["tasks"]', "the metadata must be a JSON object, got ['tasks']"),
        ('{"tasks": "abc"}', "tasks must be a list of names, got 'abc'"),
        ('{"tasks": {"a": 1}}', "tasks must be a list of names"),
        ('{"tasks": [1]}', "tasks must be a list of names, got [1]"),
        ('{"tasks": ["a\\nINFO: all is well"]}', "tasks must be a list of names"),
        ('{"tasks": ["a\\u001b[2J"]}', "tasks must be a list of names"),
        ('{"tasks": ["\\ud800"]}', "tasks must be a list of names"),
        ('{"optimizer": "CLASSP"}', "optimizer must be a JSON object, got 'CLASSP'"),
        ('{"optimizer": null}', "optimizer must be a JSON object, got None"),
        ('{"method": []}', "method must be a JSON object, got []"),
        ('{"optimizer": {"power": "2"}}', "power must be a finite number > 0, got '2'"),
        ('{"optimizer": {"power": NaN}}', "power must be a finite number > 0, got nan"),
        ('{"optimizer": {"power": true}}', "power must be a finite number > 0, got True"),
        ('{"optimizer": {"power": 1' + "0" * 400 + "}}", "power must be a finite number > 0, got 1000"),
        ('{"optimizer": {"power": 1' + "0" * 5000 + "}}", "Exceeds the limit"),
    ],
)
def test_metadata_that_no_run_writes(tmp_path, content, said):
    assert_refused(tmp_path, forge(content=content or " "), said)


@pytest.mark.parametrize(
    ("key", "tensor", "said"),
    [
        ("accumulator/w", torch.tensor([1.0, float("nan")]), "'accumulator/w' holds NaN or infinity"),
        ("accumulator/w", torch.tensor([1.0, float("inf")]), "'accumulator/w' holds NaN or infinity"),
        ("accumulator/w", torch.tensor([1e300], dtype=torch.float64), "'accumulator/w' holds NaN or infinity"),
        ("accumulator/w", torch.tensor([1.0, -1e-3]), "'accumulator/w' holds -0.001"),
        ("ewc.importance/w", torch.tensor([-2.0]), "'ewc.importance/w' holds -2"),
        ("ewc.anchor/w", torch.tensor([float("nan")]).half(), "'ewc.anchor/w' holds NaN"),
        ("head.a/w", torch.tensor([float("nan")]).bfloat16(), "'head.a/w' holds NaN"),
        ("accumulator/w", torch.ones(2, dtype=torch.int64), "has dtype torch.int64"),
        ("accumulator/w", torch.ones(2).to(torch.float8_e5m2), "has dtype torch.float8_e5m2"),
        ("ewc.anchor/w", torch.ones(2, dtype=torch.complex64), "has dtype torch.complex64"),
        ("accumulator/w", torch.ones([1] * 70), "has 70 dimensions"),
        *((key, ONE, "is no name of a tensor") for key in ("w", "accumulator/", "/w", "", "..")),
        *((key, ONE, "is no name of a tensor") for key in ("accumulator/a\0", "accumulator/a\nb", "x\ny/w")),
    ],
)
def test_tensors_that_no_run_writes(tmp_path, key, tensor, said):
    assert_refused(tmp_path, forge({key: tensor}), said)


def assert_refused(folder, blob, said):
    path = folder / MEMORY_NAME
    path.write_bytes(blob)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        ContinualMemory.load(folder)
    message = str(caught.value)
    assert str(path) in message and message.endswith("or start without a memory.")
    assert message.isprintable() and len(message) < 600


def test_headers_that_are_too_large_or_promise_too_much(tmp_path):
    header, data = split(VALID)
    path = tmp_path / MEMORY_NAME
    far = struct.pack("<Q", 2**63) + VALID[8:]
    vast = join(header | {"accumulator/x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, data)
    wide = join(header | {"accumulator/x": {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}}, data)
    for blob, said in ((far, "header too large"), (vast, "Error"), (wide, "")):
        path.write_bytes(blob)
        with pytest.raises(ValueError, match=f"is not a readable safetensors file .*{said}.*truncated or damaged"):
            ContinualMemory.load(path)


def test_pickles_are_not_read(tmp_path):
    path = tmp_path / MEMORY_NAME

    class Payload:
        def __reduce__(self):
            return (path.with_suffix(".ran").touch, ())

    torch.save({"accumulator/w": Payload()}, path)
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        ContinualMemory.load(path)
    assert [p.name for p in tmp_path.iterdir()] == [MEMORY_NAME]


@pytest.mark.parametrize("source", ["a\0b", "../a/b", "me/mo\ndel", "x" * 300 + "/y", "hf://me/model"])
def test_odd_sources_are_no_memory(source):
    with pytest.raises(FileNotFoundError, match="no continual memory|nor a Hub repository"):
        ContinualMemory.load(source)


def test_names_in_a_memory_never_become_paths(make_model, make_tasks, make_args, collator, tmp_path):
    folder = tmp_path / "deep" / "er" / "run"
    trainer = ClasspTrainer(
        model=make_model(), args=make_args(output_dir=str(folder), max_steps=1), data_collator=collator
    )
    trainer.train_sequence(make_tasks(1))
    memory = ContinualMemory.load(folder)
    memory.metadata["tasks"] = ["../../escaped", "/tmp/escaped", "a/../..", "~"]
    for kind in ("accumulator", "../../escaped.state", "..", "head.../../escaped", "head.%2Ftmp%2Fescaped"):
        memory.put(kind, {"../../escaped": torch.ones(1), "/tmp/escaped": torch.ones(1)})
    source = memory.save(tmp_path / "deep" / "memory").parent
    before = {p for p in tmp_path.rglob("*") if "next" not in p.parts}
    args = make_args(output_dir=str(folder.parent / "next"), max_steps=1, memory=str(source))
    trainer = ClasspTrainer(model=make_model(), args=args, data_collator=collator)
    trainer.train_sequence(make_tasks(1))
    assert trainer.seen_tasks == ["../../escaped", "/tmp/escaped", "a/../..", "~", "first"]
    assert {p for p in tmp_path.rglob("*") if "next" not in p.parts} == before


def test_heads_and_frequencies_that_do_not_fit_are_refused(make_model, make_args, make_tasks, collator, tmp_path):
    names = [n for n, _ in make_model().named_parameters()]
    memory = ContinualMemory(metadata={"tasks": ["first"]})
    memory.put("accumulator", {n: torch.ones_like(p) for n, p in make_model().bert.named_parameters(prefix="bert")})
    memory.put("head.first", {"classifier.weight": torch.ones(1), "classifier.bias": torch.ones(3)})  # would broadcast
    assert {"classifier.weight", "classifier.bias"} < set(names)
    memory.save(tmp_path / "memory")
    args = make_args(heads="per_task", memory=str(tmp_path / "memory"))
    with pytest.raises(
        ValueError, match=r"The head of first in the continual memory has the shapes .*'classifier.weight': \(1,\)"
    ):
        ContinualTrainer(model=make_model(), args=args, data_collator=collator)
    labels = ("negative", "neutral", "positive")
    for value, shown in ((0.0, "0.0"), (-1.0, "-1.0"), ([1.0, 2.0], r"\[1.0, 2.0\]")):
        memory = ContinualMemory({f"logit_adjustment.frequencies/{label}": torch.tensor(value) for label in labels})
        with pytest.raises(ValueError, match=f"frequency of 'negative' is {shown}, not a number > 0"):
            ClasspTrainer(make_model(), make_args(), logit_adjustment=True).load_memory(memory)


def test_odd_names_do_not_break_the_lines_of_an_error(make_model):
    memory = ContinualMemory({"accumulator/a\nINFO all is well": ONE, "accumulator/" + "y" * 5000: ONE})
    with pytest.raises(ValueError, match="does not fit this model") as caught:
        match_accumulators(memory, make_model())
    assert "\nINFO" not in str(caught.value) and len(str(caught.value)) < 1000


# ---- What a sequence resumes from
# ----------------------------------------------------------------------------------------

STATE = {
    "config": {"tasks": [["first", 64, 30], ["second", 64, 30]], "optim": "classp"},
    "accuracy_matrix": [[0.1, 0.2], [0.5, 0.2]],
    "seconds": 1.5,
    "boundary_seconds": 0,
    "informed": {"tasks": [], "methods": []},
    "steps": [8],
    "importance": {"bert.embeddings": [0.0, 1.0]},
    "optimizer": {"name": "CLASSP"},
}


@settings(FUZZ, max_examples=200)
@given(edited(STATE).map(json.dumps) | st.text(max_size=20) | st.integers(0, 300).map(json.dumps(STATE).__getitem__))
def test_any_sequence_state_is_read_or_refused(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / STATE_NAME
        path.write_text(text, encoding="utf-8")
        try:
            state = read_state(path)
        except ValueError as error:
            assert f"{path} is not what an interrupted sequence leaves" in str(error)
        else:
            rows, T = state["accuracy_matrix"], len(state["config"]["tasks"])
            assert len(rows) <= T + 1 and all(len(row) == T for row in rows)


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy_matrix": [[0.1, 0.2]] * 4},
        {"accuracy_matrix": [[0.1], [0.2]]},
        {"accuracy_matrix": [[0.1, float("nan")], [0.5, 0.2]]},
        {"accuracy_matrix": {"0": 1}},
        {"steps": [8, 8]},
        {"steps": ["8"]},
        {"seconds": "1"},
        {"informed": []},
        {"config": None},
        {"optimizer": None},
        {"importance": {"a": [None]}},
    ],
)
def test_a_damaged_sequence_state_is_refused(make_model, make_tasks, make_args, collator, tmp_path, change):
    path = tmp_path / STATE_NAME
    path.write_text(json.dumps(STATE))
    assert read_state(path) == STATE
    path.write_text(json.dumps(STATE | change))
    trainer = ContinualTrainer(model=make_model(), args=make_args(output_dir=str(tmp_path)), data_collator=collator)
    with pytest.raises(
        ValueError, match=r"sequence_state.json is not what .* Restore it, or choose another output_dir"
    ):
        trainer.train_sequence(make_tasks(), resume_from_checkpoint=True)


def test_a_valid_memory_is_what_a_run_writes():
    assert valid_memory().kinds() == ["accumulator", "ewc.anchor", "ewc.importance", "head.a%2Fb"]
