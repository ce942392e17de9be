"""Pushing over the wire: huggingface_hub's own client against a loopback server."""

from __future__ import annotations

import json
import shlex
import subprocess
import textwrap
from pathlib import Path

import pytest
from fake_hub import FakeHub

TOKEN = "hf_" + "a" * 34

PUSH = """
import sys
from test_hub import train
trainer = train(sys.argv[1])
print(trainer.push_to_hub())
"""


def tiny():
    """Model, two tasks and collator, for a process of its own."""
    from conftest import collator, make_model, make_tasks

    model, tasks, collate = (fixture.__wrapped__() for fixture in (make_model, make_tasks, collator))
    return model(), tasks(), collate


def train(folder):
    """Two tiny tasks in `folder`, as a script that pushes would train them."""
    from classp_hf import ClasspTrainer, ContinualTrainingArguments

    model, tasks, collate = tiny()
    args = ContinualTrainingArguments(
        output_dir=folder,
        hub_model_id="me/kept",
        hub_token=TOKEN,
        push_to_hub=True,
        hub_strategy="end",
        model_license="apache-2.0",
        max_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = ClasspTrainer(model, args, collate)
    trainer.train_sequence(tasks)
    return trainer


@pytest.fixture
def push(tmp_path):
    def call(hub):
        changes = {"PYTHONPATH": str(Path(__file__).parent)}
        return subprocess.run(
            [hub.python(), "-c", textwrap.dedent(PUSH), str(tmp_path / "run")],
            capture_output=True,
            text=True,
            timeout=300,
            env=hub.env() | changes,
        )

    return call


def test_push_sends_model_memory_and_card_in_one_commit(push, tmp_path):
    with FakeHub({}) as hub:
        run = push(hub)
        assert run.returncode == 0, run.stderr
        assert "/me/kept/commit/" in run.stdout
        _, files = hub.repos["me/kept", "main"]
        assert set(files) == {
            *("README.md", "accuracy_matrix.png", "config.json", "continual_memory.st", "model.safetensors"),
            *("importance.png", "results.html", "results.json", "retention.png"),
        }
        assert all(files[n] == (tmp_path / "run" / n).read_bytes() for n in files)
        assert hub.messages["me/kept"] == ["initial commit", "End of training"]
        assert hub.tokens == {f"Bearer {TOKEN}"}
        assert not any(TOKEN.encode() in content for content in files.values())
        card = files["README.md"].decode()
        assert "license: apache-2.0" in card and "- continual-learning\n- classp\n" in card
        assert all(f"]({name}.png)" in card for name in ("accuracy_matrix", "retention", "importance"))
        assert json.loads(files["results.json"])["tasks"] == ["first", "second"]


def test_a_failed_push_loses_nothing(push, tmp_path):
    with FakeHub({}) as hub:
        hub.failures = {"commit": 409}
        run = push(hub)
        assert run.returncode != 0 and "409" in run.stderr
        assert TOKEN not in run.stdout + run.stderr
        for name in ("model.safetensors", "continual_memory.st", "results.json", "README.md"):
            assert (tmp_path / "run" / name).is_file()
        assert hub.messages["me/kept"] == ["initial commit"]

        hub.failures = {}  # the command that the message gives
        command = run.stderr.partition("Nothing local is lost. To try again: ")[2].splitlines()[0]
        client = [hub.python(), "-m", "huggingface_hub.cli.hf", *shlex.split(command)[1:]]
        env = hub.env() | {"HF_TOKEN": TOKEN}
        again = subprocess.run(client, capture_output=True, text=True, timeout=300, env=env)
        assert again.returncode == 0, again.stderr
        assert "model.safetensors" in hub.repos["me/kept", "main"][1]
        assert not [n for n in hub.repos["me/kept", "main"][1] if n.startswith("00-")]


def test_a_repository_that_cannot_be_made_stops_the_run_before_training(push, tmp_path):
    with FakeHub({}) as hub:
        hub.failures = {"create": 401}
        run = push(hub)
        assert run.returncode != 0 and "401" in run.stderr
        assert not (tmp_path / "run" / "sequence_state.json").exists()
