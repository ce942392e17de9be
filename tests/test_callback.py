"""Two runs of scripts that build a plain `transformers.Trainer`, the second started from the first one's output."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import weights
from transformers import BertForSequenceClassification, Trainer, TrainingArguments, set_seed

import classp_hf
from classp_hf import ClasspTrainer, ContinualMemory, ContinualMemoryCallback

SCRIPT = """
import sys
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, HfArgumentParser, Trainer, TrainingArguments

if __name__ == "__main__":
    start, *flags = sys.argv[1:]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(flags)
    data = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 8, "labels": [0, 1] * 4})
    model = AutoModelForSequenceClassification.from_pretrained(start)
    trainer = Trainer(model=model, args=args, train_dataset=data)
    trainer.train()
    trainer.save_model()
"""


def test_two_runs_of_an_unedited_script(make_model, tmp_path):
    make_model(num_labels=2).save_pretrained(tmp_path / "start")
    (tmp_path / "unedited.py").write_text(textwrap.dedent(SCRIPT))

    def launch(start, output, *flags):
        command = [sys.executable, "-m", "classp_hf", str(tmp_path / "unedited.py"), str(tmp_path / start)]
        command += ["--output_dir", str(tmp_path / output), "--max_steps", "2", "--use_cpu", "--report_to", "none"]
        command += ["--optim", "classp", "--learning_rate", "1e-2", "--save_steps", "1", *flags]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        return run.stdout + run.stderr, ContinualMemory.load(tmp_path / output)

    log, first = launch("start", "a")
    assert "Going on from" not in log
    assert first.metadata["tasks"] == ["a"]
    log, second = launch("a", "b", "--optim_args", "anchor_strength=0.1,merge_weight=1")
    assert "Going on from the continual memory of a in" in log
    assert second.metadata["tasks"] == ["a", "b"]
    before, after = first.get("accumulator"), second.get("accumulator")
    assert all((after[n] >= s).all() for n, s in before.items()) and any(
        (after[n] > s).any() for n, s in before.items()
    )
    assert ContinualMemory.load(tmp_path / "b" / "checkpoint-1").kinds() == ["accumulator"]
    _, alone = launch("a", "c", "--optim_args", "memory=none")
    assert alone.metadata["tasks"] == ["c"]


@pytest.fixture
def plain(make_model, make_tasks, collator, tmp_path):
    """A plain Trainer on the second task, started from the folder `first`, which ClasspTrainer wrote."""
    classp_hf.register()
    tasks = make_tasks(2)

    def arguments(output, **changes):
        keywords = {"learning_rate": 1e-2, "per_device_train_batch_size": 8, "num_train_epochs": 1, "use_cpu": True}
        keywords |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
        return {"output_dir": str(tmp_path / output), "optim": "classp", **keywords, **changes}

    def first():
        args = classp_hf.ContinualTrainingArguments(**arguments("first"))
        ClasspTrainer(model=make_model(), args=args, data_collator=collator).train_sequence(tasks[:1])
        return tmp_path / "first"

    def second(output, start, resume=None, **changes):
        set_seed(42)
        model = BertForSequenceClassification.from_pretrained(start)
        args = TrainingArguments(**arguments(output, **changes))
        trainer = Trainer(model=model, args=args, train_dataset=tasks[1].train_dataset, data_collator=collator)
        set_seed(42)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return first, second, arguments, tasks


@pytest.mark.parametrize(
    ("optim_args", "kwargs"),
    [
        (None, {}),
        ("anchor_strength=0.3", {"consolidation": "anchor", "anchor_strength": 0.3}),
        ("merge_weight=0.5", {"consolidation": "merge", "merge_weight": 0.5}),
        ("anchor_strength=0.3,merge_weight=2", {"consolidation": "both", "anchor_strength": 0.3, "merge_weight": 2.0}),
    ],
)
def test_a_plain_trainer_does_what_classp_trainer_does(optim_args, kwargs, plain, collator):
    first, second, arguments, tasks = plain
    start = first()
    trainer = second("plain", start, optim_args=optim_args)
    ours = ClasspTrainer(
        model=BertForSequenceClassification.from_pretrained(start),
        args=classp_hf.ContinualTrainingArguments(**arguments("ours")),
        data_collator=collator,
        memory=start,
        logit_adjustment=False,
        **kwargs,
    )
    ours.train_sequence(tasks[1:])
    expected = weights(ours.model)
    for n, w in weights(trainer.model).items():
        torch.testing.assert_close(w, expected[n], rtol=1e-5, atol=1e-7)
    stored = ContinualMemory.load(trainer.args.output_dir).get("accumulator")
    for n, s in ContinualMemory.load(ours.args.output_dir).get("accumulator").items():
        torch.testing.assert_close(stored[n], s, rtol=1e-4, atol=1e-10)


def test_a_plain_run_resumes_to_the_same_end(plain):
    """The anchor and the old weights of the merge are those the run began with, not the checkpoint's."""
    first, second, _, _ = plain
    start = first()
    given = {"optim_args": "anchor_strength=0.3,merge_weight=1", "save_strategy": "steps", "save_steps": 5}
    whole = second("whole", start, **given)
    resumed = second("resumed", start, resume=f"{whole.args.output_dir}/checkpoint-5", **given)
    expected = weights(whole.model)
    assert all(torch.equal(w, expected[n]) for n, w in weights(resumed.model).items())


def test_it_rests_under_other_optimizers_and_in_our_trainers(plain, make_model, make_args, tmp_path):
    first, second, _, _ = plain
    trainer = second("other", first(), optim="adamw_torch")
    assert not list((tmp_path / "other").glob("continual_memory*"))
    assert any(isinstance(c, ContinualMemoryCallback) for c in trainer.callback_handler.callbacks)
    ours = ClasspTrainer(model=make_model(), args=make_args())
    assert not any(isinstance(c, ContinualMemoryCallback) for c in ours.callback_handler.callbacks)


def test_a_memory_that_does_not_fit_stops_the_run(plain, make_model, tmp_path):
    first, second, _, _ = plain
    start = first()
    make_model(num_labels=2).save_pretrained(start)  # another head beside the old memory
    with pytest.raises(ValueError, match=r"does not fit this model's trainable parameters"):
        second("plain", start)


def test_optim_args_choose_the_uses_in_classp_trainer(make_model, make_args):
    args = make_args(optim_args="anchor_strength=0.3,merge_weight=2")
    trainer = ClasspTrainer(model=make_model(), args=args, logit_adjustment=False)
    assert [m.name for m in trainer.method.parts()] == ["elastic", "merge"]
    assert trainer.method.hyperparameters() == {"anchor_strength": 0.3, "merge_weight": 2.0}
