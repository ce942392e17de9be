"""Trainers of other libraries, driven as their users do: two runs, the second from the first one's output, no edit."""

from __future__ import annotations

import json
import subprocess
import textwrap

import pytest
import torch
from test_language import make_causal, make_seq2seq, tokenizer  # noqa: F401  (fixtures)
from warm_python import python

from classp_hf import ContinualMemory, embedded

FLAGS = [
    "--optim",
    "classp",
    "--learning_rate",
    "1e-2",
    "--max_steps",
    "3",
    "--use_cpu",
    "True",
    "--report_to",
    "none",
    "--save_strategy",
    "no",
]


@pytest.fixture
def launch(tmp_path):
    def call(target, *flags):
        run = subprocess.run(
            [python(), "-m", "classp_hf", *target, *flags, *FLAGS],
            capture_output=True,
            text=True,
            timeout=500,
            cwd=tmp_path,
        )
        assert run.returncode == 0, run.stderr[-4000:]
        return run.stdout + run.stderr

    return call


def check_second_run(tmp_path, log, kept=lambda name: True):
    """It found the first run's memory in folder `a`, and its own, in `b`, has grown from it."""
    assert "Going on from the continual memory of a in" in log
    first, second = (ContinualMemory.load(tmp_path / run) for run in "ab")
    assert second.metadata["tasks"] == ["a", "b"]
    before, after = first.get("accumulator"), second.get("accumulator")
    assert before.keys() <= after.keys()
    assert all((after[n] >= s).all() for n, s in before.items() if kept(n))
    assert any((after[n] > s).any() for n, s in before.items() if kept(n))


@pytest.mark.parametrize("peft", [False, True], ids=["full", "then LoRA"])
def test_trls_sft_script(peft, launch, make_causal, tokenizer, tmp_path):  # noqa: F811
    pytest.importorskip("trl")
    make_causal().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    rows = [{"prompt": f"say {c}", "completion": d} for c, d in zip("abcdefg" * 4, "bcdefgh" * 4)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--dataset_name", str(tmp_path / "data"), "--dtype", "float32", "--bf16", "False"]
    common += ["--per_device_train_batch_size", "4", "--max_length", "16"]
    sft = ("-m", "trl.scripts.sft")
    log = launch(sft, "--model_name_or_path", str(tmp_path / "start"), "--output_dir", "a", *common)
    assert "Going on" not in log
    lora = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "all-linear"] if peft else []
    log = launch(sft, "--model_name_or_path", str(tmp_path / "a"), "--output_dir", "b", *common, *lora)
    if not peft:
        check_second_run(tmp_path, log)
    else:  # the base weights' memory waits until they are trained again
        before, after = (ContinualMemory.load(tmp_path / run).get("accumulator") for run in "ab")
        assert all(torch.equal(after[n], s) for n, s in before.items())
        assert any("lora_A" in n and s.any() for n, s in after.items())
        assert "are kept for parameters that are frozen" in log
    rehearsing = ("--rehearse", "0.5", "--rehearse_samples", "4", "--rehearse_length", "12", "--guard", *sft)
    log = launch(rehearsing, "--model_name_or_path", str(tmp_path / "start"), "--output_dir", "c", *common, *lora)
    assert "General text: loss" in log and "nats from the start" in log
    memory = ContinualMemory.load(tmp_path / "c")
    assert set(memory.get("pseudo_rehearsal.pool")) == {"ids", "lengths", "steps"}


SEQ2SEQ = """
import sys
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments

if __name__ == "__main__":
    start, *flags = sys.argv[1:]
    (args,) = HfArgumentParser(Seq2SeqTrainingArguments).parse_args_into_dataclasses(flags)
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 8, "labels": [[6, 1]] * 8})
    trainer = Seq2SeqTrainer(model=AutoModelForSeq2SeqLM.from_pretrained(start), args=args, train_dataset=data)
    trainer.train()
    trainer.save_model()
"""

SENTENCES = """
import sys
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import CosineSimilarityLoss
from transformers import HfArgumentParser

if __name__ == "__main__":
    start, *flags = sys.argv[1:]
    (args,) = HfArgumentParser(SentenceTransformerTrainingArguments).parse_args_into_dataclasses(flags)
    pairs = {"a": ["one day", "a night"] * 4, "b": ["some day", "the moon"] * 4, "score": [1.0, 0.2] * 4}
    data = Dataset.from_dict(pairs)
    model = SentenceTransformer(start, device="cpu")
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=CosineSimilarityLoss(model))
    trainer.train()
    model.save_pretrained(args.output_dir)
"""


def test_a_seq2seq_trainer_script(launch, make_seq2seq, tmp_path):  # noqa: F811
    make_seq2seq().save_pretrained(tmp_path / "start")
    (tmp_path / "script.py").write_text(textwrap.dedent(SEQ2SEQ))
    launch(["script.py"], str(tmp_path / "start"), "--output_dir", "a")
    log = launch(["script.py"], str(tmp_path / "a"), "--output_dir", "b", "--optim_args", "anchor_strength=0.1")
    check_second_run(tmp_path, log)


def test_a_sentence_transformers_script(launch, tmp_path):
    pytest.importorskip("sentence_transformers")
    (tmp_path / "script.py").write_text(textwrap.dedent(SENTENCES))
    launch(["script.py"], str(embedded.model_path()), "--output_dir", "a")
    log = launch(["script.py"], str(tmp_path / "a"), "--output_dir", "b")
    check_second_run(tmp_path, log)
