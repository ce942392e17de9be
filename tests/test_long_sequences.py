"""Fifty tasks: what a run keeps, on the disk and in memory, does not grow with their number."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from transformers import TrainerCallback

from classp_hf import ContinualTrainer

T = 50
KILLED_IN = 37


class Kept(TrainerCallback):
    """What there is when the training of a task begins."""

    def __init__(self, folder, stop_at=None):
        self.folder, self.stop_at = folder, stop_at
        self.tensors, self.disk, self.steps = [], [], []

    def on_train_begin(self, args, state, control, **kwargs):
        gc.collect()
        alive = {id(t): t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}
        self.tensors.append(sum(t.numel() * t.element_size() for t in alive.values()))
        files = [p for p in self.folder.rglob("*") if p.is_file()]
        self.disk.append(sum(p.stat().st_size for p in files if p.name != "sequence_state.json"))
        self.steps.append(0)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps[-1] += 1
        if self.stop_at is not None and len(self.steps) == self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def quick_collection():
    """Trainer collects garbage before every training: the libraries' objects are none."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def many_tasks(make_tasks):
    first, second, third = make_tasks(3, rows=16)
    small = [dataclasses.replace(t, test_dataset=t.test_dataset.select(range(8))) for t in (first, second, third)]
    return [dataclasses.replace(small[t % 3], name=f"task-{t}") for t in range(T)]


@pytest.mark.slow
def test_fifty_tasks(many_tasks, make_model, make_args, collator, tmp_path):
    evaluations = []

    def first_weight(model, processing_class, dataset):
        evaluations.append(1)
        return float(model.classifier.weight[0, 0])

    def trainer(stop_at=None, **changes):
        kept = Kept(tmp_path / "run", stop_at)
        args = make_args(optim="classp", max_steps=2, **changes)
        chosen = {"method": "ewc+merge+logit_adjustment", "task_metric": first_weight}
        return ContinualTrainer(make_model(), args, collator, callbacks=[kept], **chosen), kept

    interrupted, before = trainer(KILLED_IN)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train_sequence(many_tasks)
    assert len(evaluations) == T * KILLED_IN
    del interrupted
    resumed, after = trainer(resume_from_checkpoint="True")
    results = resumed.train_sequence(many_tasks)

    assert [len(results["accuracy_matrix"]), {len(row) for row in results["accuracy_matrix"]}] == [T + 1, {T}]
    # the folder of the last task alone
    assert [p.name for p in (tmp_path / "run").iterdir() if p.is_dir()] == [f"{T - 1}-task-{T - 1}"]
    assert before.disk[4] == pytest.approx(before.disk[KILLED_IN - 1], rel=0.01)
    assert after.disk[1] == pytest.approx(after.disk[-1], rel=0.01)
    assert before.tensors[4] == before.tensors[KILLED_IN - 1] > 0
    # going on in task 37 trains and evaluates what is left, and nothing again
    assert len(evaluations) == T * (T + 1)
    assert after.steps == [2] * (T + 1 - KILLED_IN)


def test_a_head_a_task_is_all_that_grows(many_tasks, make_model, make_args, collator, tmp_path):
    head = sum(p.numel() * p.element_size() for p in make_model().classifier.parameters())
    for count in (5, 7):
        kept = Kept(tmp_path / str(count))
        args = make_args(optim="adamw_torch", heads="per_task", max_steps=1, output_dir=str(tmp_path / str(count)))
        model = make_model()
        ContinualTrainer(model, args, collator, callbacks=[kept]).train_sequence(many_tasks[:count])
        assert kept.tensors[-1] - kept.tensors[2] == (count - 3) * head
        del model


def test_earlier_tasks_models_are_kept_on_request(make_model, make_tasks, make_args, collator, tmp_path):
    trainer = ContinualTrainer(make_model(), make_args(keep_task_models=True), collator)
    trainer.train_sequence(make_tasks(3))
    for folder in ("00-first", "01-second", "02-third"):
        type(trainer.model).from_pretrained(tmp_path / "run" / folder)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "keep_task_models" not in card.partition("Arguments")[2]
