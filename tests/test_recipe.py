"""The recipe as users run it: real processes, the real model, real data (small subsets)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from warm_python import python

from classp_hf import demo, embedded
from classp_hf.methods import Method

RECIPE = Path(__file__).parents[1] / "recipes" / "sentiment_sequence.py"
SMALL = ["--max_train_samples", "32", "--max_eval_samples", "20", "--num_train_epochs", "1"]
FEW = ["--max_train_samples", "16", "--max_eval_samples", "8"]
SMALL += ["--max_length", "32", "--report_to", "none"]


def command(output_dir, processes, *flags, interpreter=None):
    """The interpreter has to be the real one where the process asks who started it, or its group is killed."""
    launch = [interpreter or python(), "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    batch = ["--per_device_train_batch_size", str(16 // processes)]
    return [*launch, str(RECIPE), *SMALL, *batch, "--output_dir", str(output_dir), *flags]


def run(*args, **interpreter):
    environment = os.environ | {"PYTHON_EXEC": python()}  # torch's launcher starts its ranks by it
    started = command(*args, **interpreter)
    finished = subprocess.run(started, capture_output=True, text=True, timeout=500, env=environment)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-5000:]
    return finished.stdout


ARMS = ["--trainer", "classp", "--compare", "ewc", "--fisher_samples", "7"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, run(folder, 1, *ARMS)


def results(folder, arm):
    return json.loads((folder / arm / "results.json").read_text())


def test_one_process_shows_and_writes_everything(one_process):
    folder, stdout = one_process
    assert "| classp |" in stdout
    assert "| ewc    |" in stdout
    for arm, method in (("classp", "pseudo_rehearsal"), ("ewc", "ewc")):
        r = results(folder, arm)
        assert r["tasks"] == ["icwsm14/nyt", "icwsm14/movie"]
        assert r["label_names"] == ["negative", "neutral", "positive"]
        assert [len(row) for row in r["accuracy_matrix"]] == [2, 2, 2]
        names = "average_accuracy learning_accuracy backward_transfer forward_transfer forgetting retained_accuracy"
        names += " performance_maintenance"
        assert set(r["metrics"]) == set(names.split())
        assert r["method"]["name"] == method
        assert r["seconds"] > 0
        for key in ("arguments", "versions", "hardware", "command", "commit"):
            assert key in r
        for name in ("accuracy_matrix.png", "retention.png", "README.md", "model.safetensors", "continual_memory.st"):
            assert (folder / arm / name).stat().st_size > 1000, name
    assert results(folder, "classp")["optimizer"]["name"] == "CLASSP"
    assert results(folder, "ewc")["optimizer"]["name"] == "AdamW"
    # both arms start from the same weights and see the same test examples
    assert results(folder, "classp")["accuracy_matrix"][0] == results(folder, "ewc")["accuracy_matrix"][0]


@pytest.mark.slow  # four interpreters; test_killed_runs.py kills two ranks of a small model anywhere
def test_two_killed_processes_resume_to_the_result_of_one(one_process, tmp_path):
    """SIGKILL while the first arm trains its second task; the same command with the resume flag."""
    with open(tmp_path / "log", "w") as log:
        started = command(tmp_path, 2, *ARMS, interpreter=sys.executable)
        process = subprocess.Popen(started, stdout=log, stderr=log, start_new_session=True)
    state = tmp_path / "classp" / "sequence_state.json"
    deadline = time.monotonic() + 300
    while not (state.is_file() and len(json.loads(state.read_text())["accuracy_matrix"]) == 2):
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "classp" / "results.json").exists()
    run(tmp_path, 2, *ARMS, "--resume_from_checkpoint", "True", interpreter=sys.executable)
    for arm in ("classp", "ewc"):
        one, two = results(one_process[0], arm), results(tmp_path, arm)
        assert two["hardware"]["num_processes"] == 2
        for row, other in zip(one["accuracy_matrix"], two["accuracy_matrix"]):
            assert row == pytest.approx(other, abs=1 / 20 + 1e-9)  # one example on the edge may fall either way
        for file in ("model.safetensors", "continual_memory.st"):
            a, b = (load_file(folder / arm / file) for folder in (one_process[0], tmp_path))
            assert a.keys() == b.keys()
            difference = sum(float((a[k].float() - b[k].float()).abs().sum()) for k in a)
            assert difference < 1e-3 * sum(float(t.float().abs().sum()) for t in a.values()), (arm, file)


# ---- In this process, where a new interpreter would add nothing ----


@pytest.fixture
def main(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("sentiment_sequence", RECIPE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sentiment_sequence", module)
    spec.loader.exec_module(module)

    def call(*flags):
        argv = [str(RECIPE), *SMALL, "--use_cpu", "--output_dir", str(tmp_path / "out"), *flags]
        monkeypatch.setattr(sys, "argv", argv)
        module.main()
        return tmp_path / "out"

    return call


@pytest.fixture
def refused(capsys):
    """The one line that a command says before it ends with exit code 2."""

    def call(main, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(*flags)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
        return said

    return call


def test_what_a_training_raises_keeps_its_traceback(main, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("broken")

    monkeypatch.setattr("classp_hf.CLASSP.step", broken)
    with pytest.raises(ValueError, match="broken"):
        main("--compare", "none", *FEW)


def test_fpb_then_imdb_with_lora_from_original_files(main, refused, tmp_path):
    sentences = [f"Profit {w} in quarter {i} .@{name}" for i in range(40) for w, name in
                 (("rose", "positive"), ("fell", "negative"), ("was flat", "neutral"))]  # fmt: skip
    (tmp_path / "Sentences_50Agree.txt").write_text("\n".join(sentences), encoding="iso-8859-1")
    for split in ("train", "test"):
        for label in ("neg", "pos"):
            folder = tmp_path / "aclImdb" / split / label
            folder.mkdir(parents=True)
            for i in range(25):
                (folder / f"{i}_1.txt").write_text(
                    f"{'Awful' if label == 'neg' else 'Lovely'} film number {i}, {split}"
                )
    tasks = [f"fpb:{tmp_path / 'Sentences_50Agree.txt'}", f"imdb:{tmp_path / 'aclImdb'}"]
    out = main("--tasks", *tasks, "--use_peft", "--lora_r", "4", "--compare", "none")
    r = results(out, "classp")
    assert r["tasks"] == ["fpb", "imdb"]
    assert r["label_names"] == ["negative", "neutral", "positive"]  # one class for IMDB's pos and FPB's positive
    assert not (out / "naive").exists()
    memory = load_file(out / "classp" / "continual_memory.st")
    assert any("lora_A" in k for k in memory)
    assert "accumulator/classifier.weight" in memory
    assert sum(t.numel() for t in memory.values()) < 1_000_000  # adapters and the head, not the 22.7M weights
    card = (out / "classp" / "README.md").read_text()
    assert "PeftModel.from_pretrained(base, repo, is_trainable=True)" in card
    assert (
        json.loads((out / "classp" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == embedded.MODEL_ID
    )
    assert re.search("already holds runs of classp.*choose another --output_dir", refused(main, "--compare", "none"))


def test_a_classifier_of_the_same_labels_keeps_its_rows(tmp_path):
    """A model whose labels have another order (finbert's, say) must not have its head's rows renamed."""
    names = ["positive", "negative", "neutral"]
    kwargs = {"num_labels": 3, "id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    own = AutoModelForSequenceClassification.from_pretrained(embedded.model_path(), **kwargs)
    own.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(embedded.model_path()).save_pretrained(tmp_path)
    recipe = demo.SequenceArguments(model_name_or_path=str(tmp_path))
    model, _ = demo.build_model(recipe, sorted(names), Method())
    assert model.config.id2label == dict(enumerate(names))
    assert torch.equal(model.classifier.weight, own.classifier.weight)


def test_a_method_on_adapters_gets_them_and_saves_a_plain_model(main):
    out = main("--trainer", "olora", "--compare", "none", *FEW, "--olora_lambda", "2")
    assert results(out, "olora")["method"] == {"name": "olora", "olora_lambda": 2.0}
    AutoModelForSequenceClassification.from_pretrained(out / "olora")
    assert not (out / "olora" / "adapter_config.json").exists()
    assert "PeftModel" not in (out / "olora" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--trainer", "sgd"], "Unknown arm 'sgd' in --trainer or --compare. Known: classp, classp_paper, ewc"),
        (["--tasks", "icwsm14/nyt", "icwsm14/nyt"], "share a folder name"),
        (["--tasks", "imbd"], "Cannot read task 'imbd'. Built in: icwsm14/nyt"),
        (["--optim_args", "density=0.1,threshold=1e-6"], "exclude each other"),
        (["--ewc_lambda", "-1"], "ewc_lambda must be >= 0"),
        (["--model_name_or_path", "no/where"], "cached files"),
        (["--no_such_flag", "1"], "--no_such_flag"),
    ],
)
def test_bad_flags_stop_before_training(main, refused, tmp_path, flags, match):
    assert match in refused(main, *flags)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_every_training_argument_is_a_flag(main, capsys):
    with pytest.raises(SystemExit):
        main("--help")
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--learning_rate", "--push_to_hub", "--heads", "--ewc_lambda", "--replay_fraction", "--lora_r"):
        assert flag in text
    assert "adamw_torch_fused" in text and ",classp}" in text  # choices of --optim
    assert "(default: outputs/sentiment_sequence)" in text  # what the recipe does, not what Trainer would
