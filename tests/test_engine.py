"""Two runs of scripts that build a plain `transformers.Trainer`, the second started from the first one's output."""

from __future__ import annotations

import subprocess
import textwrap

import pytest
import torch
from conftest import weights
from fake_hub import FakeHub
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed
from warm_python import python

import classp_hf
from classp_hf import ClasspTrainer, ContinualCallback, ContinualMemory

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
        command = [python(), "-m", "classp_hf", str(tmp_path / "unedited.py"), str(tmp_path / start)]
        command += ["--output_dir", str(tmp_path / output), "--max_steps", "2", "--use_cpu", "--report_to", "none"]
        command += ["--optim", "classp", "--learning_rate", "1e-2", "--save_steps", "1", *flags]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        return run.stdout + run.stderr, ContinualMemory.load(tmp_path / output)

    log, first = launch("start", "a")
    assert "Going on from" not in log and "this run begins one" in log and "is written to" in log
    assert first.metadata["tasks"] == ["a"]
    log, second = launch("a", "b", "--optim_args", "anchor_strength=0.1,merge_weight=1")
    assert "Going on from the continual memory of a in" in log
    assert second.metadata["tasks"] == ["a", "b"]
    before, after = first.get("accumulator"), second.get("accumulator")
    assert all((after[n] >= s).all() for n, s in before.items()) and any(
        (after[n] > s).any() for n, s in before.items()
    )
    assert ContinualMemory.load(tmp_path / "b" / "checkpoint-1").get("merge.memory").keys() == before.keys()
    _, alone = launch("a", "c", "--optim_args", "memory=none")
    assert alone.metadata["tasks"] == ["c"]


def test_the_second_run_finds_the_memory_of_a_model_on_the_hub(make_model, tmp_path):
    """Over the wire: model and memory from one commit of a repository that moves on; and a repository without one."""
    (tmp_path / "unedited.py").write_text(textwrap.dedent(SCRIPT))
    model = make_model(num_labels=2)
    model.save_pretrained(tmp_path / "a")
    memory = ContinualMemory()
    memory.put("accumulator", {n: torch.full_like(p, 0.5) for n, p in model.named_parameters()})
    memory.metadata = {"tasks": ["finance"], "optimizer": {"power": 2.0}}
    memory.save(tmp_path / "a")
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    without = {n: content for n, content in files.items() if n != "continual_memory.st"}
    with FakeHub({("me/a", "main"): files, ("me/plain", "main"): without}) as hub:
        for repo, tasks in (("me/a", ["finance", "me-a"]), ("me/plain", ["me-plain"])):
            out = tmp_path / repo.replace("/", "-")
            command = [hub.python(), "-m", "classp_hf", str(tmp_path / "unedited.py"), repo, "--output_dir", str(out)]
            command += ["--max_steps", "2", "--use_cpu", "--report_to", "none", "--optim", "classp"]
            run = subprocess.run(
                [*command, "--learning_rate", "1e-2", "--save_strategy", "no"],
                capture_output=True,
                text=True,
                timeout=300,
                env=hub.env(),
            )
            assert run.returncode == 0, run.stderr
            assert ("Going on from the continual memory of finance in 'me/a'" in run.stderr) == (repo == "me/a")
            stored = ContinualMemory.load(out)
            assert stored.metadata["tasks"] == tasks
            assert all((s >= 0.5).all() for s in stored.get("accumulator").values()) == (repo == "me/a")


def test_offline_the_memory_beside_a_model_comes_from_the_cache(make_model, tmp_path):
    """The cache holds the memory of one model, knows that another has none, and nothing of a third."""
    model = make_model()
    model.save_pretrained(tmp_path / "a")
    memory = ContinualMemory({f"accumulator/{n}": torch.ones_like(p) for n, p in model.named_parameters()})
    memory.metadata = {"tasks": ["finance"]}
    memory.save(tmp_path / "a")
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    without = {n: content for n, content in files.items() if n != "continual_memory.st"}
    code = """
        import os
        from transformers import AutoModelForSequenceClassification
        from classp_hf.memory import memory_beside
        for repo in ("me/a", "me/plain", "me/unknown"):
            model = AutoModelForSequenceClassification.from_pretrained(repo)
            if os.environ["HF_HUB_OFFLINE"] == "1" or repo != "me/unknown":
                found = memory_beside(model)
                print("FOUND", repo, found and found.tasks)
    """
    with FakeHub({("me/a", "main"): files, ("me/plain", "main"): without, ("me/unknown", "main"): without}) as hub:
        for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
            env = hub.env() | offline
            asked = len(hub.requests)
            run = subprocess.run(
                [hub.python(), "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300, env=env
            )
            assert run.returncode == 0, run.stderr
            found = [line for line in run.stdout.splitlines() if line.startswith("FOUND")]
            assert found[:2] == ["FOUND me/a ['finance']", "FOUND me/plain None"]
    assert len(hub.requests) == asked and found[2:] == ["FOUND me/unknown None"]
    assert run.stderr.count("could not be found out, so none is used") == 1 and "me/unknown" in run.stderr


@pytest.mark.parametrize("wrapped", [False, True], ids=["AutoModel", "sentence-transformers"])
def test_a_memory_passes_between_a_base_model_and_the_model_with_a_head(wrapped, make_model, make_args, tmp_path):
    """Both ways, with a method's state, as `from_pretrained` passes the weights."""

    def engine_that_read(memory, model):
        engine = ContinualCallback("ewc", memory="none")
        engine.load(ContinualMemory.load(tmp_path / memory), model, make_args(optim="classp"))
        return engine

    model = make_model()
    with_head = ContinualMemory(metadata={"tasks": ["first"], "optimizer": {"power": 2.0}})
    for kind in ("accumulator", "ewc.anchor", "ewc.importance"):
        with_head.put(kind, {n: torch.rand_like(p) for n, p in model.named_parameters()})
    with_head.save(tmp_path / "head")
    body = [n for n, _ in model.named_parameters() if n.startswith("bert.")]

    base, prefix = model.bert, ""
    if wrapped:
        base = torch.nn.Sequential(torch.nn.ModuleDict({"model": base}))
        prefix = "0.model."
    engine = engine_that_read("head", base)
    assert engine.accumulators().keys() == {prefix + n.removeprefix("bert.") for n in body}
    engine.write(tmp_path / "base")
    assert "accumulator/classifier.weight" in ContinualMemory.load(tmp_path / "base").tensors  # kept for a head

    engine = engine_that_read("base", make_model())
    for kind in ("accumulator", "ewc.anchor", "ewc.importance"):
        kept = engine.memory().get(kind)
        for n in body:
            torch.testing.assert_close(kept[n], with_head.get(kind)[n])


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
        args = TrainingArguments(**arguments(output, resume_from_checkpoint=resume, **changes))
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
        pseudo_rehearsal=False,
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
    assert any(isinstance(c, ContinualCallback) for c in trainer.callback_handler.callbacks)
    ours = ClasspTrainer(model=make_model(), args=make_args())
    assert sum(isinstance(c, ContinualCallback) for c in ours.callback_handler.callbacks) == 1  # its own


def test_a_memory_of_another_model_stops_the_run(plain, make_model, tmp_path):
    first, second, _, _ = plain
    start = first()
    config = BertConfig.from_pretrained(start)
    config.hidden_size, config.intermediate_size = 16, 24
    BertForSequenceClassification(config).save_pretrained(start)  # another model beside the old memory
    with pytest.raises(ValueError, match=r"does not fit this model: of its 41 tensors (.|\n)*memory=none"):
        second("plain", start)


def test_a_second_callback_does_nothing_twice(plain, make_tasks, collator):
    first, second, arguments, tasks = plain
    start = first()
    given = {"optim_args": "anchor_strength=0.3,merge_weight=1"}
    one = second("one", start, **given)
    set_seed(42)
    model = BertForSequenceClassification.from_pretrained(start)
    args = TrainingArguments(**arguments("two", **given))
    trainer = Trainer(model=model, args=args, train_dataset=tasks[1].train_dataset, data_collator=collator)
    trainer.add_callback(ContinualCallback())
    set_seed(42)
    trainer.train()
    assert all(torch.equal(w, weights(one.model)[n]) for n, w in weights(trainer.model).items())


def test_an_adapter_run_with_an_anchor_resumes(plain, collator, tmp_path):
    first, _, arguments, tasks = plain
    a = first()

    def run(output, resume=None):
        set_seed(42)
        lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules="all-linear")
        model = get_peft_model(BertForSequenceClassification.from_pretrained(a), lora)
        given = {"optim_args": "anchor_strength=0.3", "save_strategy": "steps", "save_steps": 5}
        args = TrainingArguments(**arguments(output, resume_from_checkpoint=resume, **given))
        trainer = Trainer(model=model, args=args, train_dataset=tasks[1].train_dataset, data_collator=collator)
        trainer.train(resume_from_checkpoint=resume)
        return weights(model)

    whole = run("whole")
    resumed = run("resumed", resume=str(tmp_path / "whole" / "checkpoint-5"))
    for n, w in resumed.items():
        torch.testing.assert_close(w, whole[n], rtol=1e-4, atol=1e-5)


def test_full_and_adapter_fine_tuning_alternate(plain, make_tasks, collator, tmp_path, caplog):
    """Full on A, LoRA on B, that LoRA further on C, merged and full on D."""
    first, _, arguments, tasks = plain
    a = first()
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules="all-linear")

    def train(model, output, **changes):
        args = TrainingArguments(**arguments(output, **changes))
        Trainer(model=model, args=args, train_dataset=tasks[1].train_dataset, data_collator=collator).train()
        return ContinualMemory.load(tmp_path / output).get("accumulator")

    of_a = ContinualMemory.load(a).get("accumulator")
    model = get_peft_model(BertForSequenceClassification.from_pretrained(a), lora)
    of_b = train(model, "b")  # found beside the base model
    body = [n for n in of_a if not n.startswith("classifier")]
    assert all(torch.equal(of_b[n], of_a[n]) for n in body)  # frozen: kept, not used
    assert (of_b["classifier.weight"] > of_a["classifier.weight"]).any()
    adapters = of_b.keys() - of_a.keys()
    assert len(adapters) == 2 * 13 and any((of_b[n] > 0).any() for n in adapters)
    assert f"{len(body)} tensors are kept for parameters that are frozen" in caplog.text

    model.save_pretrained(tmp_path / "b")
    base = BertForSequenceClassification.from_pretrained(a)
    model = PeftModel.from_pretrained(base, tmp_path / "b", is_trainable=True)
    of_c = train(model, "c", optim_args=f"memory={tmp_path / 'b'}")
    assert of_c.keys() == of_b.keys()
    assert all((of_c[n] >= of_b[n] * (1 - 1e-6) - 1e-12).all() for n in of_c)  # eps is added and taken off again
    assert "is dropped" not in caplog.text

    merged = model.merge_and_unload().requires_grad_(True)  # PEFT had frozen it
    of_d = train(merged, "d", optim_args=f"memory={tmp_path / 'c'}")
    assert of_d.keys() == of_a.keys()
    assert all((of_d[n] >= of_a[n] * (1 - 1e-6) - 1e-12).all() for n in body) and any(
        (of_d[n] > of_a[n]).any() for n in body
    )
    assert f"that of {len(adapters)} adapter weights is dropped" in caplog.text

    caplog.clear()  # another adapter of the same name on the merged model: the old one's memory is not its own
    model = get_peft_model(BertForSequenceClassification.from_pretrained(a), lora)
    of_e = train(model, "e", optim_args=f"memory={tmp_path / 'c'}", max_steps=1)
    assert "is dropped, for that adapter is merged or new" in caplog.text
    assert any((of_e[n] < of_c[n]).any() for n in adapters) and all(torch.equal(of_e[n], of_a[n]) for n in body)


def test_optim_args_choose_the_uses_in_classp_trainer(make_model, make_args):
    args = make_args(optim_args="anchor_strength=0.3,merge_weight=2")
    trainer = ClasspTrainer(model=make_model(), args=args, pseudo_rehearsal=False)
    assert [m.describe() for m in trainer.methods] == [
        {"name": "elastic", "anchor_strength": 0.3},
        {"name": "merge", "merge_weight": 2.0},
    ]


def test_a_run_with_an_adapter_says_where_its_memory_would_be(make_model, plain, collator, caplog):
    _, _, arguments, tasks = plain
    model = get_peft_model(make_model(), LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules="all-linear"))
    Trainer(model, TrainingArguments(**arguments("a", max_steps=1)), collator, tasks[0].train_dataset).train()
    assert "this run begins one. To go on with an adapter, pass its folder as --memory or memory=." in caplog.text


def test_weights_that_are_on_no_device_are_refused(make_model, make_args):
    """As ranks other than 0 have them of a checkpoint without a head, with FSDP's cpu_ram_efficient_loading."""
    model = make_model()
    model.classifier.to("meta")
    with pytest.raises(ValueError, match=r"2 parameters are on no device \(classifier.weight.*loading: false"):
        ContinualCallback().on_init_end(make_args(optim="classp"), None, None, model=model)
    ContinualCallback().on_init_end(make_args(), None, None, model=model)  # a run that is not ours


def test_a_model_a_training_is_refused_where_something_holds_on_to_one(make_model, make_args, collator):
    given = {"model_init": lambda: make_model(), "args": make_args(heads="per_task"), "data_collator": collator}
    with pytest.raises(ValueError, match="model_init makes another model for every train"):
        ClasspTrainer(**given, pseudo_rehearsal=False)
