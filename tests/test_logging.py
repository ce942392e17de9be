"""What the loggers of `report_to` are sent, read back from TensorBoard's own files."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from warm_python import python

from classp_hf import CLASSP, ClasspTrainer, ContinualTrainer


@pytest.fixture
def scalars(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder):
        events = EventAccumulator(str(folder)).Reload()
        return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}

    return read


def test_one_run_for_the_whole_sequence(make_model, make_tasks, make_args, collator, tmp_path, scalars, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = make_args(report_to="tensorboard", logging_strategy="steps", logging_steps=4, optim_args="density=0.25")
    trainer = ClasspTrainer(make_model(), args, collator)
    results = trainer.train_sequence(make_tasks(3))
    assert not (tmp_path / "runs").exists()  # where TensorBoard writes when nobody tells it
    logged = scalars(tmp_path / "run" / "runs")
    assert list(logged["train/first/loss"]) == [4, 8]
    assert list(logged["train/third/loss"]) == [20, 24]
    R = results["accuracy_matrix"]
    assert logged["eval/first/accuracy"] == pytest.approx({8 * t: R[t][0] for t in range(4)})
    assert logged["train/sequence/accuracy/second"] == pytest.approx({16: R[2][1], 24: R[3][1]})
    forgotten = results["metrics"]["forgetting"]
    assert logged["train/sequence/forgetting"][24] == pytest.approx(forgotten)
    assert logged["train/sequence/average_accuracy"][24] == pytest.approx(sum(R[-1]) / 3)
    assert all(0.05 < value < 0.3 for value in logged["train/second/update_density"].values())
    assert len(trainer.state.log_history) and trainer.state.global_step == 8  # the task's own


def test_plain_training_logs_as_trainer_does(make_model, make_tasks, make_args, collator):
    task = make_tasks(1)[0]
    for trainer_class, optim in ((ClasspTrainer, "classp"), (ContinualTrainer, "adamw_torch")):
        args = make_args(logging_strategy="steps", logging_steps=4, optim=optim)
        trainer = trainer_class(make_model(), args, collator, train_dataset=task.train_dataset)
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["step"] for entry in steps] == [4, 8]
        assert all(("update_density" in entry) == (optim == "classp") for entry in steps)


def test_update_density_counts_what_a_step_changes():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((40, 50), (100,), (7,))]
    for kwargs in ({}, {"threshold": 0.5}, {"density": 0.3}):
        optimizer = CLASSP(parameters, **kwargs)
        for p in parameters[:2]:
            p.grad = torch.randn_like(p) * (torch.rand_like(p) < 0.5)
        before = [p.detach().clone() for p in parameters]
        predicted = optimizer.update_density()
        optimizer.step()
        changed = sum(int((p != b).sum()) for p, b in zip(parameters, before))
        assert predicted == pytest.approx(changed / 2107)
        for p in parameters:
            p.grad = None
    assert optimizer.update_density() == 0.0


def test_importance_says_which_layers_grew(figures, make_model, make_tasks, make_args, collator, tmp_path):
    results = ClasspTrainer(make_model(), make_args(), collator).train_sequence(make_tasks(2))
    importance = results["importance"]
    assert list(importance) == [
        *("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler", "classifier")
    ]
    assert all(0 == a < b < c for a, b, c in importance.values())
    assert (tmp_path / "run" / "importance.png").stat().st_size > 5000
    args = make_args(output_dir=str(tmp_path / "sgd"), optim="sgd")
    assert ContinualTrainer(make_model(), args, collator).train_sequence(make_tasks(2))["importance"] == {}
    assert not (tmp_path / "sgd" / "importance.png").exists()
    # a second run begins where the memory left off
    args = make_args(output_dir=str(tmp_path / "next"))
    second = ClasspTrainer(make_model(), args, collator, memory=tmp_path / "run").train_sequence(make_tasks(2)[:1])
    assert {n: means[0] for n, means in second["importance"].items()} == pytest.approx(
        {n: means[-1] for n, means in importance.items()}
    )


TRACKIO = """
import json, sys
from test_hub import tiny
from classp_hf import ClasspTrainer
model, tasks, collate = tiny()
from classp_hf import ContinualTrainingArguments
args = ContinualTrainingArguments(output_dir="run", project="kept", run_name="one", report_to="trackio",
logging_steps=4,
                                  use_cpu=True, disable_tqdm=True, learning_rate=1e-3)
print(json.dumps(ClasspTrainer(model, args, collate).train_sequence(tasks)["accuracy_matrix"]))
"""


def test_trackio_gets_one_run_for_the_whole_sequence(tmp_path):
    """Trackio's own package writes into its own database, in a process of its own."""
    pytest.importorskip("trackio")
    env = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run([python(), "-c", TRACKIO], capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    R = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("[[")))
    read = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; "
        "print(json.dumps({run: S.get_logs('kept', run) for run in S.get_runs('kept')}, default=str))"
    )
    shown = subprocess.run([python(), "-c", read], capture_output=True, text=True, timeout=300, env=env)
    assert shown.returncode == 0, shown.stderr
    runs = json.loads(shown.stdout.splitlines()[-1])
    assert list(runs) == ["one"]
    accuracies = {e["train/global_step"]: e["eval/first/accuracy"] for e in runs["one"] if "eval/first/accuracy" in e}
    assert accuracies == pytest.approx({8 * t * 3: R[t][0] for t in range(3)})
