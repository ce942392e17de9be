"""Several ranks on CPUs, as users start them: `accelerate launch` with the files of recipes/accelerate, real
processes.

One launch of four ranks (FSDP2, then DDP) and one of two (DDP, then FSDP2) run `distributed_worker.py`; the tests
compare what they wrote with what one process writes.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import distributed_worker as worker
import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from warm_python import python

from classp_hf import ContinualMemory

ACCELERATE = Path(__file__).parents[1] / "recipes" / "accelerate"
FILES = ("model.safetensors", "continual_memory.st", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process writes."""
    folder = tmp_path_factory.mktemp("one")
    for run in worker.RUNS:
        worker.sequence(folder / run, run)
    worker.script(folder / "script")
    (folder / "language.json").write_text(json.dumps(worker.language(folder / "language")))
    return folder


def launch(configuration, ranks, *arguments):
    command = [python(), "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE / configuration)]
    command += ["--mixed_precision", "no", "--num_processes", str(ranks), "--main_process_port", "0"]
    command += [str(Path(worker.__file__)), *map(str, arguments)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=550, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stderr[-6000:]


@pytest.fixture(scope="module")
def four(one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    launch("fsdp2.yaml", 4, "four_sharded", one, folder)
    return folder


@pytest.fixture(scope="module")
def two(four, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch("ddp.yaml", 2, "two_copies", four, folder)
    return folder


def found(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def header(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8 : 8 + length])
    metadata = tensors.pop("__metadata__")
    metadata.pop("sha256", None)
    return list(tensors.items()), metadata


def assert_alike(run, reference):
    """Files of the same layout to the byte and values that rounding alone tells apart: 1e-5 of their sum."""
    for file in FILES:
        if not (reference / file).exists():
            continue
        assert header(run / file) == header(reference / file)
        a, b = load_file(run / file), load_file(reference / file)
        for kind in {k.split("/")[0] for k in b} if file == FILES[1] else {""}:
            names = [k for k in b if k.startswith(kind)]
            difference = sum(float((a[k].float() - b[k].float()).abs().sum()) for k in names)
            share = 1e-4 if kind == "samples" else 1e-5  # a few weights, instead of all of them
            assert difference <= share * sum(float(b[k].float().abs().sum()) for k in names), (file, kind)


def matrix(folder, run):
    return json.loads((folder / run / "results.json").read_text())["accuracy_matrix"]


@pytest.mark.parametrize("run", worker.SHARDED)
def test_four_shards_train_as_one_process(one, four, run):
    ranks = found(four, run)
    assert all(rank["sharded"] for rank in ranks)
    assert ranks[3]["empty"] >= 3  # the classifier and the token types have fewer rows than there are ranks
    assert all(rank["R"] == matrix(one, run) for rank in ranks)
    assert_alike(four / run, one / run)
    assert (one / run / (FILES[2] if run == "lora" else FILES[0])).is_file()


def test_four_copies_count_every_example_of_the_fisher_once_and_rehearse_as_one_process(one, four):
    assert all(rank["R"] == matrix(one, "fisher") for rank in found(four, "copies"))
    assert_alike(four / "copies", one / "fisher")
    kinds = ContinualMemory.load(four / "copies").kinds()
    assert {"ewc.anchor", "ewc.importance", "samples"} < set(kinds) and any("pseudo_rehearsal" in k for k in kinds)


def test_four_shards_of_a_language_model_remember_and_rehearse(one, four):
    for rank in found(four, "language"):
        assert rank == pytest.approx(found(one, "language"), rel=1e-4)
        assert rank["kl"] > 1e-3  # it was trained
    assert_alike(four / "language", one / "language")


@pytest.mark.parametrize(("run", "where"), [("classp", "of one process"), ("fisher", "after the last checkpoint")])
def test_four_shards_go_on(run, where, one, four):
    assert all(rank["R"] == matrix(one, run) for rank in found(four, f"{run}_goes_on"))
    assert_alike(four / f"{run}_goes_on", one / run)


@pytest.mark.parametrize("run", ["classp", "adamw"])
def test_two_copies_go_on_from_four_shards(one, two, run):
    ranks = found(two, run)
    assert not any(rank["sharded"] for rank in ranks)
    assert all(rank["R"] == matrix(one, run) for rank in ranks)
    assert_alike(two / run, one / run)


@pytest.mark.parametrize(("run", "as_run"), [("sharded", "classp"), ("compiled", "compiled")])
def test_two_shards_go_on_from_a_checkpoint_of_four_and_train_compiled(run, as_run, one, two):
    ranks = found(two, run)
    assert all(rank["sharded"] for rank in ranks)
    assert all(rank["R"] == matrix(one, as_run) for rank in ranks)
    assert_alike(two / run, one / as_run)


def test_one_process_goes_on_from_four_shards(one, four, tmp_path):
    worker.cut_after_first_task(four / "classp", tmp_path / "run")
    result = worker.sequence(tmp_path / "run", "classp", resume_from_checkpoint="True")
    assert result["accuracy_matrix"] == matrix(one, "classp")
    assert_alike(tmp_path / "run", one / "classp")


def test_the_final_model_is_a_plain_one(four):
    model = AutoModelForSequenceClassification.from_pretrained(four / "classp")
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {
        k: tuple(v.shape) for k, v in load_file(four / "classp" / FILES[0]).items()
    }
    # also where checkpoints are written in shards, of which Trainer makes no model
    assert (four / "sharded_files" / FILES[0]).read_bytes() == (four / "classp" / FILES[0]).read_bytes()
    # and what was read back into a sharded model
    assert (four / "read_back" / FILES[0]).read_bytes() == (four / "classp" / FILES[0]).read_bytes()


def test_a_script_that_evaluates_before_it_saves_writes_the_same_memory(one, four):
    assert_alike(four / "script" / "checkpoint-2", one / "script" / "checkpoint-2")
    assert_alike(four / "script", one / "script")


def test_sharded_tensors_are_treated_as_whole_ones(four):
    ranks = found(four, "tensors")
    assert ranks[0] == ranks[1] == ranks[2] == ranks[3]
    tensors = {k: v for k, v in ranks[0].items() if isinstance(v, dict)}
    assert len(tensors) == 30  # shapes x ways to shard them
    assert {k: v for k, v in tensors.items() if not all(v.values())} == {}


@pytest.mark.slow  # a file of 320 MiB
def test_no_rank_holds_the_memory_whole(tmp_path):
    launch("ddp.yaml", 2, "room", tmp_path, tmp_path)
    for rank in found(tmp_path, "room"):
        assert rank["same"] and 2 * rank["local"] == rank["whole"]


def test_a_nan_in_one_shard_stops_every_rank(four):
    for rank in found(four, "tensors"):
        assert (
            "CLASSP got NaN, infinite or overflowing gradients" in rank["nan"] and "Nothing was updated" in rank["nan"]
        )
        assert rank["nan_untouched"]


def test_tensor_parallelism_is_refused(four):
    assert all("cut by tensor parallelism (tp_plan)" in rank["tensor parallelism"] for rank in found(four, "tensors"))


def test_what_is_made_of_an_fsdp_configuration(tmp_path):
    made = worker.trainer(tmp_path, "classp")
    with pytest.raises(ValueError, match=r"FSDP version 1 flattens parameters.* Set fsdp_version: 2"):
        made.check_fsdp(SimpleNamespace(fsdp_version=1))
    for given, layers in ((None, ["BertLayer"]), (["BertEncoder"], ["BertEncoder"])):
        plugin = SimpleNamespace(fsdp_version=2, transformer_cls_names_to_wrap=given)
        made.check_fsdp(plugin)
        assert plugin.transformer_cls_names_to_wrap == layers


def test_the_configurations_are_for_gpus_and_name_their_processes():
    for file in ACCELERATE.iterdir():
        configuration = yaml.safe_load(file.read_text())
        assert configuration["use_cpu"] is False
        assert configuration["num_processes"] > 1
        assert f"--config_file recipes/accelerate/{file.name}" in file.read_text()
