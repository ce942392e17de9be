from __future__ import annotations

import functools
import gc
import os

# Before anything imports the libraries: tests need no network, and two workers must not fight over two cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jinja2
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

from classp_hf import ContinualTrainingArguments, Task, files, sequence

VOCABULARY = 40
LABELS = ("negative", "neutral", "positive")


SLOW = ("test_compare_methods.py",)
"""Left out without `--slow`, unless they are named: what tests a benchmark. `make test-slow`."""


LONG = ("test_distributed.py", "test_recipe.py", "test_trainer.py", "test_methods.py")
"""They come first, so that two workers, which get a file at a time, end together."""


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help=f"also run {', '.join(SLOW)} and tests marked slow")


def pytest_ignore_collect(collection_path, config):
    return True if collection_path.name in SLOW and not _wanted(collection_path, config) else None


def _wanted(path, config):
    return config.getoption("--slow") or any(path.name in argument for argument in config.args)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out without `--slow`, unless the file is named")


def pytest_collection_modifyitems(items, config):
    items[:] = [item for item in items if not item.get_closest_marker("slow") or _wanted(item.path, config)]
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish():
    gc.freeze()  # every training collects garbage, which among all that the libraries made takes half a second


@pytest.fixture(autouse=True)
def environment():
    """Commands that run in this process set variables, which would make tests/warm_python.py start real interpreters,
    and what is logged."""
    ours = logging.get_logger("classp_hf")
    before, verbosity, level = dict(os.environ), logging.get_verbosity(), ours.level
    yield
    os.environ.clear()
    os.environ.update(before)
    logging.set_verbosity(verbosity)
    ours.setLevel(level)


# The model card's template takes longer to compile than a tiny model to train.
jinja2.Template = functools.cache(jinja2.Template)


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Figures take longer than the training of a tiny model, and so does waiting for the disk. A test that needs them
    asks for the fixture `figures`."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(sequence, "write_figures", lambda *_: None)
    if request.node.path.name != "test_files.py":
        monkeypatch.setattr(files, "_sync", lambda *_: None)


@pytest.fixture
def figures():
    """Runs write their figures."""


@pytest.fixture
def collator():
    """Pads token ids with 0."""

    def pad(features):
        width = max(len(f["input_ids"]) for f in features)
        ids = [list(f["input_ids"]) + [0] * (width - len(f["input_ids"])) for f in features]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": (torch.tensor(ids) != 0).long(),
            "labels": torch.tensor([f["labels"] for f in features]),
        }

    return pad


@pytest.fixture
def make_model():
    """A BERT classifier of 20,000 weights, built on the spot; the same weights for the same seed."""

    def make(seed=0, num_labels=3, dropout=0.0):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=16,
            initializer_range=0.15,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            id2label=dict(enumerate(LABELS[:num_labels])),
            label2id={name: i for i, name in enumerate(LABELS[:num_labels])},
        )
        return BertForSequenceClassification(config)

    return make


@pytest.fixture
def make_tasks():
    """Token-id tasks that can be learned: one of three key tokens says the label, another rule in every task."""

    def split(position, rows, seed):
        rng = np.random.default_rng([seed, position])
        keys = rng.integers(0, 3, rows)
        ids = [
            [1, *rng.integers(10, VOCABULARY, rng.integers(1, 4)).tolist(), 2 + int(key), 9] for key in keys
        ]  # the meaning of the key tokens rotates from task to task
        return Dataset.from_dict({"input_ids": ids, "labels": ((keys + position) % 3).tolist()})

    def make(count=2, rows=64, names=None):
        return [
            Task(
                name=(names or ["first", "second", "third", "fourth"])[position],
                train_dataset=split(position, rows, 0),
                eval_dataset=split(position, 30, 1),
                test_dataset=split(position, 30, 2),
            )
            for position in range(count)
        ]

    return make


@pytest.fixture
def make_args(tmp_path):
    def make(**changes):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 30,
            "num_train_epochs": 1,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
        }
        return ContinualTrainingArguments(**{**defaults, **changes})

    return make


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}
