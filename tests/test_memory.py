from __future__ import annotations

import json
import subprocess
import textwrap

import pytest
import torch
from fake_hub import FakeHub
from safetensors.torch import load_file, save_file
from torch import nn
from warm_python import python

from classp_hf import ContinualMemory
from classp_hf.memory import FORMAT, MEMORY_NAME, write_memory
from classp_hf.names import Accumulators, bare_model, canonical_name, evaluating, has_adapters, trainable_parameters


@pytest.fixture
def saved(tmp_path):
    memory = ContinualMemory(metadata={"tasks": ["a", "b"], "optimizer": {"lr": 0.1}})
    memory.put("accumulator", {"layer.weight": torch.rand(4, 3), "layer.bias": torch.rand(4)})
    memory.put("ewc.importance", {"layer.weight": torch.rand(4, 3, dtype=torch.bfloat16)})
    return memory, memory.save(tmp_path / "model")


def test_round_trip_by_file_and_by_folder(saved):
    memory, path = saved
    assert path.name == MEMORY_NAME
    for source in (path, path.parent, str(path.parent)):
        loaded = ContinualMemory.load(source)
        assert loaded.metadata == memory.metadata
        assert loaded.kinds() == ["accumulator", "ewc.importance"]
        assert loaded.tensors.keys() == memory.tensors.keys()
        assert all(
            torch.equal(loaded.tensors[k], t) and loaded.tensors[k].dtype is t.dtype for k, t in memory.tensors.items()
        )


def test_saving_is_atomic(saved, monkeypatch):
    memory, path = saved
    before = path.read_bytes()
    monkeypatch.setattr("classp_hf.memory.os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    memory.tensors["accumulator/layer.bias"] += 1
    with pytest.raises(OSError, match="disk full"):
        memory.save(path.parent)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [MEMORY_NAME]


def test_a_rank_that_cannot_write_takes_part_in_every_collective_call(saved, tmp_path, monkeypatch):
    """Others wait in that of the next tensor: they would never return."""
    memory, path = saved
    before, taken = path.read_bytes(), {True: [], False: []}

    def full(disk_is_full):
        parameters = {n: torch.ones(2) for n in ("c", "a", "b")}
        names = {id(p): n for n, p in parameters.items()}
        return Accumulators(parameters, lambda p: taken[disk_is_full].append(names[id(p)]) or p)

    write_memory(tmp_path / "other", [("accumulator", full(False))], memory.metadata, writes=False)
    assert not (tmp_path / "other").exists()
    calls = iter(range(10))
    monkeypatch.setattr("classp_hf.memory._bytes", lambda t: b"" if next(calls) < 2 else (_ for _ in ()).throw(
        OSError(28, "No space left on device")))  # fmt: skip
    with pytest.raises(OSError, match="No space"):
        write_memory(path.parent, [("accumulator", full(True))], memory.metadata)
    assert taken == {True: ["a", "b", "c"], False: ["a", "b", "c"]}
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [MEMORY_NAME]


def test_saved_file_is_readable_by_others_as_any_new_file(saved, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    assert saved[1].stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("keep", [0, 7, 60, -5])
def test_truncated(saved, keep):
    _, path = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=r"continual_memory.st is not a readable safetensors file .* truncated or damaged"
    ):
        ContinualMemory.load(path)


def test_one_flipped_bit_in_the_tensors_or_the_metadata(saved):
    _, path = saved
    good = path.read_bytes()
    for position in (len(good) - 3, good.index(b'\\"lr\\": 0.1') + 9):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(ValueError, match="does not match its own digest"):
            ContinualMemory.load(path)


def test_other_files_and_versions(saved, tmp_path):
    _, path = saved
    save_file({"x": torch.ones(1)}, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is not a continual memory \(its `format` is 'pt'"):
        ContinualMemory.load(tmp_path / "weights.safetensors")
    save_file(load_file(path), path, metadata={"format": FORMAT, "format_version": "99"})
    with pytest.raises(ValueError, match="has format version '99'; this version of classp_hf reads 1"):
        ContinualMemory.load(path)


def test_no_memory_there(tmp_path):
    for missing in (tmp_path, tmp_path / "nowhere", "./nowhere"):
        with pytest.raises(FileNotFoundError, match="no continual memory at"):
            ContinualMemory.load(missing)
    with pytest.raises(
        FileNotFoundError, match=r"'someone/nothing' is neither a local folder .* nor a Hub repository"
    ):
        ContinualMemory.load("someone/nothing")  # the Hub is out of reach here


def test_from_a_hub_repository_and_revision(saved, tmp_path):
    """Over the wire: huggingface_hub's real client against a loopback server, in a process of its own."""
    memory, path = saved
    code = """
        from classp_hf import ContinualMemory
        print("TASKS", ContinualMemory.load("me/model", revision="v2").metadata["tasks"])
        for repo in ("me/model", "me/other"):
            try:
                ContinualMemory.load(repo)
            except FileNotFoundError as error:
                print("MISSING", str(error).split(" is neither")[0])
    """
    with FakeHub({("me/model", "v2"): {MEMORY_NAME: path.read_bytes()}, ("me/model", "main"): {"a": b""}}) as hub:
        run = subprocess.run(
            [hub.python(), "-c", textwrap.dedent(code)], env=hub.env(), capture_output=True, text=True
        )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"TASKS {memory.metadata['tasks']}", "MISSING 'me/model'", "MISSING 'me/other'"]


def test_names_survive_every_wrapper(make_model):
    from peft import LoraConfig, get_peft_model

    def memory_shapes(model):
        return {n: tuple(p.shape) for n, p in trainable_parameters(model)}

    bare = make_model()
    names = set(memory_shapes(bare))
    assert "bert.encoder.layer.0.attention.self.query.weight" in names
    assert set(memory_shapes(torch.compile(bare))) == names
    assert {canonical_name(f"module.{n}") for n in names} == names
    adapted = get_peft_model(make_model(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    shapes = memory_shapes(adapted)
    assert "classifier.weight" in shapes  # modules_to_save.default
    assert "bert.encoder.layer.0.attention.self.query.lora_A.default.weight" in shapes
    assert len(shapes) == len([p for p in adapted.parameters() if p.requires_grad])  # no two share a name
    frozen = {canonical_name(n) for n, _ in adapted.named_parameters()}
    assert "bert.encoder.layer.0.attention.self.query.weight" in frozen  # base_layer

    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    compiled, inner = torch.compile(adapted), get_peft_model(torch.compile(bare), lora)
    assert bare_model(bare) is bare_model(torch.compile(bare)) is bare_model(inner) is bare
    assert bare_model(compiled) is bare_model(adapted) is adapted.get_base_model()
    assert [has_adapters(m) for m in (bare, torch.compile(bare), adapted, compiled, inner)] == [False, False] + [
        True
    ] * 3


def test_passes_of_methods_are_not_compiled():
    compiled: list[object] = []
    model = torch.compile(nn.Linear(2, 1), backend=lambda graph, inputs: compiled.append(graph) or graph)
    with evaluating(model):
        model(torch.ones(3, 2))
    assert not compiled
    model(torch.ones(3, 2))
    assert len(compiled) == 1


def test_metadata_is_json_and_tied_weights_do_not_stop_saving(tmp_path):
    shared = torch.rand(3)
    memory = ContinualMemory({"accumulator/a": shared, "accumulator/b": shared}, {"x": [1, None, "é"]})
    assert ContinualMemory.load(memory.save(tmp_path)).metadata == json.loads(json.dumps(memory.metadata))


def test_empty_parameters(tmp_path):
    memory = ContinualMemory({"accumulator/none": nn.Parameter(torch.ones(0, 4)).detach()})
    assert ContinualMemory.load(memory.save(tmp_path)).tensors["accumulator/none"].shape == (0, 4)


def test_neither_a_checkpoint_nor_a_start_holds_the_memory_a_second_time(tmp_path):
    """8 weights of 40 MiB; with 100 MiB of room a memory of 320 MiB is written, then read and put in place. The file's
    pages count, too, for they could be written to."""
    code = """
        import re, resource, sys, torch
        from pathlib import Path
        from torch import nn
        from transformers import Trainer, TrainingArguments
        from classp_hf import ContinualCallback, register

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.ModuleList(nn.Linear(1024, 10240, bias=False) for _ in range(8))

            def forward(self, x):
                return {"loss": sum(layer(x).square().mean() for layer in self.layers)}

        register()
        folder, model, engine = sys.argv[1], Model(), ContinualCallback(memory="none")
        args = TrainingArguments(folder, optim="classp", learning_rate=1e-3, max_steps=1, use_cpu=True,
                                 save_strategy="no", report_to="none", disable_tqdm=True)
        Trainer(model, args, train_dataset=[{"x": torch.ones(1024)}] * 8, callbacks=[engine]).train()
        Path(folder, "continual_memory.st").unlink()
        model.zero_grad()
        now = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        room = now + 100 * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (room, -1))
        before = engine.accumulators()["layers.7.weight"].sum()
        engine.write(folder, args)
        from classp_hf import ContinualMemory
        resource.setrlimit(resource.RLIMIT_DATA, (room + 321 * 2**20, -1))
        engine.load(ContinualMemory.load(folder), model, args)
        engine.put(engine.args, False)
        assert before > 0 and engine.accumulators()["layers.7.weight"].sum() == before
        print("done")
    """
    found = subprocess.run(
        [python(), "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert found.stdout.splitlines()[-1:] == ["done"], found.stderr[-2000:]
