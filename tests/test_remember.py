"""The memory of a model that nobody trained here."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, weights
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from warm_python import python

import classp_hf.remember
from classp_hf import CLASSP, EWC, ContinualCallback, ContinualMemory, ContinualTrainer, Elastic, embedded
from classp_hf.methods import PseudoRehearsal
from classp_hf.names import trainable_parameters
from classp_hf.rehearsal import draw_samples, padded, permuted
from classp_hf.remember import drawn_gradients, pretrained_memory, remember

SMALL = {"samples": 24, "max_length": 12, "batch_size": 8}
WORDS = ["[PAD]", "<s>", "</s>", "[MASK]", *(f"w{i}" for i in range(VOCABULARY - 4))]


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLASSP_HF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="[PAD]", mask_token="[MASK]"
    )


def llama(seed=0):
    """A causal language model of 21,000 weights with output that is far from uniform."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, initializer_range=0.15, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(" ".join(f"w{(3 * i + j) % 30}" for j in range(3 + i % 5)) for i in range(20)))
    return str(path)


def by_hand(model, ids, batch_size, seed, power, kind="causal"):
    """`sum |g|^power`, written out: the model's own loss of labels drawn from its distribution."""
    named, sums, steps = dict(trainable_parameters(model)), {}, 0
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    for rows in permuted(len(ids), 0, len(ids), seed).split(batch_size):
        batch, lengths = padded([ids[i] for i in rows])
        mask = torch.arange(batch.shape[1]) < lengths[:, None]
        given = {"input_ids": batch.long(), "attention_mask": mask.long()}
        with torch.no_grad():
            logits = model(**given).logits
        if kind == "causal":
            labels = torch.full_like(given["input_ids"], -100)
            p = logits[:, :-1][mask[:, 1:]].softmax(-1)
            labels[:, 1:][mask[:, 1:]] = torch.multinomial(p, 1, generator=generator)[:, 0]
        else:
            labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        model.zero_grad()
        model(**given, labels=labels).loss.backward()
        for n, p in named.items():
            sums[n] = sums.get(n, 0) + p.grad.abs() ** power
        steps += 1
    model.zero_grad()
    return sums, steps


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for n, t in expected.items():
        torch.testing.assert_close(found[n], t, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("power", [2.0, 1.0])
def test_the_accumulator_is_the_sum_of_powers_of_batch_gradients(power, tokenizer):
    model = llama()
    memory = remember(model, tokenizer, **SMALL, power=power, seed=3)
    ids = draw_samples(model, tokenizer, 24, 12, 3)
    sums, steps = by_hand(model, ids, 8, 3, power)
    assert_close(memory.get("accumulator"), sums)
    assert memory.metadata["steps"] == steps == 3
    assert memory.tasks == ["pretrained"] and memory.metadata["optimizer"]["power"] == power


def test_labels_of_given_texts_are_drawn_from_the_model(tokenizer, texts):
    model = llama()
    memory = remember(model, tokenizer, texts=texts, **SMALL)
    ids = classp_hf.remember.read_texts(texts, tokenizer, 24, 12, 0)
    assert len(ids) == 20 and memory.metadata["steps"] == 3
    assert_close(memory.get("accumulator"), by_hand(model, ids, 8, 0, 2)[0])
    assert "pseudo_rehearsal.pool" not in memory.kinds()  # given texts are not kept


def test_gradients_on_own_labels_have_mean_zero(tokenizer):
    """Their mean shrinks like noise, and so its square is what the sum of squares says: E|mean|^2 = E|g|^2 / n."""
    model = llama()
    ids = draw_samples(model, tokenizer, 512, 12, 0)

    def ratio(gradients):
        mean = sum(torch.cat([g.flatten() for g in one.values()]) for one in gradients) / len(gradients)
        size = sum(sum(g.square().sum() for g in one.values()) for one in gradients) / len(gradients)
        return float(mean.square().sum() / size) * len(gradients)

    drawn = list(drawn_gradients(model, tokenizer, ids, 8, 0))
    assert 0.5 < ratio(drawn) < 2.0
    other = []
    for rows in torch.arange(512).split(8):  # labels of another distribution: the gradients all point one way
        batch = padded([ids[i] for i in rows])[0].long()
        labels = torch.randint(4, VOCABULARY, batch.shape, generator=torch.Generator().manual_seed(int(rows[0])))
        loss = model(input_ids=batch, labels=labels).loss
        named = dict(trainable_parameters(model))
        other.append(dict(zip(named, torch.autograd.grad(loss, list(named.values())))))
    assert ratio(other) > 5


def test_the_same_seed_gives_the_same_memory_and_leaves_the_model_alone(tokenizer, tmp_path):
    model = llama().train()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = weights(model)
    torch.manual_seed(5)
    first = remember(model, tokenizer, **SMALL)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))  # the generator of the run is untouched
    assert model.training and (next(model.parameters()).grad == 1).all()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    again = remember(llama(), tokenizer, **SMALL)
    assert first.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(first.tensors[k], again.tensors[k]) for k in first.tensors)
    other = remember(llama(), tokenizer, **SMALL, seed=1)
    assert not torch.equal(first.tensors["pseudo_rehearsal.pool/ids"], other.tensors["pseudo_rehearsal.pool/ids"])
    first.save(tmp_path)
    assert ContinualMemory.load(tmp_path).metadata == first.metadata


def test_a_classifier_and_a_masked_model_by_texts(make_model, tokenizer, texts):
    model = make_model()
    memory = remember(model, tokenizer, texts=texts, **SMALL)
    ids = classp_hf.remember.read_texts(texts, tokenizer, 24, 12, 0)
    assert_close(memory.get("accumulator"), by_hand(model, ids, 8, 0, 2, "sequence")[0])
    counts = memory.get("pseudo_rehearsal.tokens")["pretrained"]
    assert int(counts.sum()) == sum(map(len, ids)) and int(counts[4]) == sum(i.count(4) for i in ids)
    masked = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1,
                                        num_attention_heads=1, intermediate_size=16))  # fmt: skip
    seen = []
    masked.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"]), with_kwargs=True)
    memory = remember(masked, tokenizer, texts=texts, **SMALL)
    hidden = sum(int((ids == 3).sum()) for ids in seen)
    assert 3 <= hidden < sum(map(len, ids)) / 3 and float(memory.get("accumulator")["cls.predictions.bias"].sum()) > 0


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        ("classifier", {}, "writes no samples of itself: give texts"),
        ("llama", {"samples": 0}, "samples, batch_size and power must be > 0"),
        ("llama", {"power": float("nan")}, "'power': nan"),
        ("regression", {}, "cannot be rehearsed: supported are"),
        ("frozen", {}, "nothing to remember"),
        ("broken", {}, "gradients of this model are not finite"),
    ],
)
def test_what_cannot_be_remembered(make, given, message, make_model, tokenizer, texts):
    model = (
        make_model(num_labels=1 if make == "regression" else 3) if make in ("classifier", "regression") else llama()
    )
    if make == "frozen":
        model.requires_grad_(False)
    if make == "broken":
        model.model.norm.weight.data.fill_(float("nan"))
        given = {"texts": texts}
    with pytest.raises(ValueError, match=message):
        remember(model, tokenizer, **{**SMALL, **given})


# ---- In trainings ----


@pytest.fixture
def small(monkeypatch):
    """`remember` at small defaults."""
    calls = []
    original = classp_hf.remember.remember

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **{**SMALL, **kwargs})

    counted.__kwdefaults__ = original.__kwdefaults__
    monkeypatch.setattr(classp_hf.remember, "remember", counted)
    return calls


def data(rows=16):
    ids = [[1, *[(5 * i + j) % 30 + 4 for j in range(6)]] for i in range(rows)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def train(engine, tokenizer, folder, model=None, steps=2, **changes):
    """An unedited script's training."""
    defaults = {"max_steps": steps, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 4,
                "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True}  # fmt: skip
    args = TrainingArguments(str(folder), **{**defaults, **changes})
    trainer = Trainer(
        model or llama(), args, train_dataset=data(), processing_class=tokenizer, callbacks=[engine],
        optimizers=(None, None) if "optim" in changes else (CLASSP((model or llama()).parameters(), 1e-2), None),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


class Watched(ContinualCallback):
    """Keeps what the first step began with."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.first = {n: t.clone() for n, t in self.accumulators().items()}
            self.begun = list(self.tasks)


@pytest.mark.parametrize("strength", [None, 7.0])
def test_classp_begins_with_it_and_the_cache_computes_nothing_again(strength, small, tokenizer, tmp_path):
    expected = remember(llama(), tokenizer, **SMALL).get("accumulator")
    classp_hf.register()
    for output in ("a", "b"):
        engine = Watched(memory="pretrained", memory_strength=strength)
        train(engine, tokenizer, tmp_path / output, optim="classp")
        assert len(small) == 1  # the second run reads
        assert engine.begun == ["pretrained"] and ContinualMemory.load(tmp_path / output).tasks == [
            "pretrained",
            output,
        ]
        assert_close(engine.first, {n: t * (strength / 3 if strength else 1) for n, t in expected.items()})
        written = ContinualMemory.load(tmp_path / output)
        assert all((written.get("accumulator")[n] >= s).all() for n, s in engine.first.items())
        assert "steps" not in written.metadata  # it counts once


def test_the_cache_is_of_one_model_and_one_power_and_a_damaged_one_is_made_anew(small, tokenizer, tmp_path):
    first = pretrained_memory(llama(), tokenizer, 2.0)
    assert all(torch.equal(first.tensors[k], t) for k, t in pretrained_memory(llama(), tokenizer, 2.0).tensors.items())
    assert len(small) == 1
    pretrained_memory(llama(1), tokenizer, 2.0)
    pretrained_memory(llama(), tokenizer, 1.0)
    assert len(small) == 3
    pretrained_memory(llama(2), tokenizer, 2.0, writes=False)
    files = list((tmp_path / "cache").rglob("*"))
    assert len([f for f in files if f.is_file()]) == 3 and not [f for f in files if f.name.startswith(".")]
    for file in (f for f in files if f.is_file()):
        file.write_bytes(file.read_bytes()[:-100])
    again = pretrained_memory(llama(), tokenizer, 2.0)
    assert len(small) == 5 and all(torch.equal(first.tensors[k], t) for k, t in again.tensors.items())


def test_ewc_at_the_first_fine_tuning(small, tokenizer, tmp_path):
    for normalize, strength in ((True, None), (False, None), (False, 30.0)):
        memory = remember(llama(), tokenizer, **SMALL).get("accumulator")
        method = EWC(1.0, fisher_normalize=normalize, fisher_samples=2)
        seen = {}

        class Keeping(ContinualCallback):
            def on_step_begin(self, args, state, control, seen=seen, **kwargs):
                seen.setdefault("state", {k: dict(t) for k, t in self.methods[0].state_dict().items()})

        engine = Keeping(method, "pretrained", memory_strength=strength)
        train(engine, tokenizer, tmp_path / f"{normalize}{strength}", optim="adamw_torch")
        mean = sum(float(t.sum()) for t in memory.values()) / sum(t.numel() for t in memory.values())
        assert_close(seen["state"]["importance"], {n: t / (mean if normalize else 3) for n, t in memory.items()})
        assert_close(seen["state"]["anchor"], weights(llama()))
        kept = engine.methods[0].importance
        assert all((kept[n] >= t * 0.999).all() for n, t in seen["state"]["importance"].items())  # Fisher of the task


def test_ewc_and_elastic_hold_the_weights_at_the_first_fine_tuning(small, tokenizer, tmp_path):
    importance, start = pretrained_memory(llama(), tokenizer, 2.0).get("accumulator"), weights(llama())

    def moved(method, memory):
        engine = ContinualCallback(method, memory)
        trainer = train(engine, tokenizer, tmp_path / "run", steps=20, optim="sgd", learning_rate=0.02)
        now = trainer.model.named_parameters()
        return sum(float((importance[n] * (p.detach() - start[n]) ** 2).sum()) for n, p in now)

    for make in (lambda: EWC(0.5, fisher_samples=2), lambda: Elastic(0.5)):
        assert moved(make(), "pretrained") < 0.8 * moved(make(), "none")


def test_rehearsal_goes_on_from_its_samples(small, tokenizer, tmp_path, monkeypatch):
    drawn = remember(llama(), tokenizer, **SMALL).get("pseudo_rehearsal.pool")
    method = PseudoRehearsal(rehearse_samples=12, rehearse_length=12)
    monkeypatch.setattr("classp_hf.rehearsal.draw_samples", None)  # none are missing
    engine = ContinualCallback(method, "pretrained")
    train(engine, tokenizer, tmp_path / "run", optim="adamw_torch")
    assert torch.equal(engine.methods[0].pool["ids"], drawn["ids"])
    written = engine.methods[0].state_dict()["pool"]
    assert written.keys() == drawn.keys()
    assert all(written[k].dtype == drawn[k].dtype and written[k].shape == drawn[k].shape for k in drawn)


def test_a_model_that_has_a_memory_keeps_it(small, tokenizer, tmp_path, caplog):
    classp_hf.register()
    train(ContinualCallback(memory="pretrained"), tokenizer, tmp_path / "a", optim="classp")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    engine = Watched(memory="pretrained", memory_strength=1.0)
    train(engine, tokenizer, tmp_path / "b", model, optim="classp")
    assert engine.begun == ["pretrained", "a"] and len(small) == 1
    assert_close(engine.first, ContinualMemory.load(tmp_path / "a").get("accumulator"))  # not scaled again
    assert "(memory='pretrained' is for models that have none): it is used for 21 parameters" in caplog.text
    trainer = Trainer(model, engine.args, train_dataset=data(), callbacks=[other := Watched(memory="pretrained")])
    trainer.train()  # in one process: that of the engine before
    assert other.begun == ["pretrained", "a", "b"] and len(small) == 1


def test_a_sequence_of_tasks(small, tokenizer, make_args, tmp_path):
    tasks = [classp_hf.Task(name, data(), eval_dataset=data(4), test_dataset=data(4)) for name in ("first", "second")]
    args = make_args(memory="pretrained", memory_strength=5, optim="classp", learning_rate=1e-2)
    trainer = ContinualTrainer(llama(), args, processing_class=tokenizer, method="elastic")
    trainer.train_sequence(tasks)
    assert trainer.seen_tasks == ["pretrained", "first", "second"] and len(small) == 1
    with pytest.raises(ValueError, match="memory_strength is in steps' worth and must be > 0, got -1"):
        ContinualTrainer(llama(), make_args(memory_strength=-1))


@pytest.mark.parametrize("steps", ["many", 0, -3, float("inf"), True, [1]])
def test_hostile_numbers_of_steps_are_refused(steps, tokenizer, tmp_path):
    memory = remember(llama(), tokenizer, **SMALL)
    memory.metadata["steps"] = steps
    memory.save(tmp_path)
    with pytest.raises(ValueError, match="steps must be a finite number > 0"):
        ContinualMemory.load(tmp_path)


def test_foreign_memories_and_set_ups_are_refused(small, make_model, tokenizer, tmp_path):
    remember(llama(), tokenizer, **SMALL, power=1.0).save(tmp_path / "power")
    classp_hf.register()
    with pytest.raises(ValueError, match="sums |g|\\^1, and this run |g|\\^2"):
        train(ContinualCallback(memory=str(tmp_path / "power")), tokenizer, tmp_path / "run", optim="classp")
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="causal language models without adapters, which gain nothing by it"):
        pretrained_memory(lora, tokenizer, 2.0)
    with pytest.raises(ValueError, match="python -m classp_hf remember MODEL"):
        pretrained_memory(make_model(), tokenizer, 2.0)
    remember(llama(), tokenizer, **SMALL).save(tmp_path / "llama")
    with pytest.raises(ValueError, match="does not fit this model"):
        engine = ContinualCallback(memory=str(tmp_path / "llama"))
        train(engine, tokenizer, tmp_path / "run", make_model(), optim="classp")


SCRIPT = """
import sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

if __name__ == "__main__":
    start, *flags = sys.argv[1:]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(flags)
    ids = [[1, 5, 6, 7, 8]] * 8
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    model = AutoModelForCausalLM.from_pretrained(start)
    trainer = Trainer(model, args, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(start))
    trainer.train()
    trainer.save_model()
"""


def test_the_command_and_an_unedited_script(tokenizer, tmp_path):
    """The command's folder is a model with its memory, which a script goes on from; the launcher takes a strength."""

    def run(*command, code=0):
        command = [python(), "-m", "classp_hf", *map(str, command)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    llama().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    (tmp_path / "unedited.py").write_text(textwrap.dedent(SCRIPT))
    told = run("remember", tmp_path / "start", "--output_dir", tmp_path / "kept", "--samples", 24, "--max_length", 12)
    assert "the memory of 3 batches" in told
    memory = ContinualMemory.load(tmp_path / "kept")
    assert_close(memory.get("accumulator"), remember(llama(), tokenizer, **SMALL).get("accumulator"))
    assert AutoTokenizer.from_pretrained(tmp_path / "kept").bos_token == "<s>"
    card = (tmp_path / "kept" / "README.md").read_text()
    assert "`sum |g|^2` over\n3 batches of 8 samples of the model" in card and "It holds the samples." in card
    common = ("--max_steps", 1, "--use_cpu", "--report_to", "none", "--optim", "classp", "--learning_rate", "1e-2")
    script = (tmp_path / "unedited.py", tmp_path / "kept", "--output_dir", tmp_path / "out", *common)
    told = run("--memory_strength", 6, "--method", "ewc", *script)
    assert "Going on from the continual memory of pretrained" in told
    after = ContinualMemory.load(tmp_path / "out")
    assert after.tasks == ["pretrained", "out"]
    assert all((after.get("accumulator")[n] >= 2 * s * 0.999).all() for n, s in memory.get("accumulator").items())
    assert "must be > 0, got 0" in run("--memory_strength", 0, *script, code=2)
    assert "samples, batch_size" in run(
        "remember", tmp_path / "start", "--output_dir", tmp_path / "x", "--samples", 0, code=2
    )


RANKS = """
import os, sys
sys.path.insert(0, sys.argv[2])
import torch
from test_remember import SMALL, data, llama
from transformers import Trainer, TrainingArguments
import classp_hf, classp_hf.remember

rank = int(os.environ["RANK"])
os.environ["CLASSP_HF_CACHE"] = f"{sys.argv[1]}/cache{rank}"  # as on two machines
original = classp_hf.remember.remember

def noisy(*args, **kwargs):
    memory = original(*args, **{**SMALL, **kwargs})
    for key in memory.tensors:
        memory.tensors[key] *= 1 + rank  # as sums on GPUs differ, only more
    return memory

noisy.__kwdefaults__ = original.__kwdefaults__
classp_hf.remember.remember = noisy
classp_hf.register(memory="pretrained", optim="classp", learning_rate=1e-2)
args = TrainingArguments(f"{sys.argv[1]}/run", max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
trainer = Trainer(llama(), args, train_dataset=data())
trainer.train()
state = trainer.optimizer.optimizer.state
torch.save([state[p]["accumulator"] for p in trainer.model.parameters()], f"{sys.argv[1]}/{rank}.pt")
"""


def test_all_ranks_begin_with_the_same_memory(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "ranks.py"), str(tmp_path), str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and sum(float(t.sum()) for t in first) > 0
    kept = [next((tmp_path / f"cache{rank}").rglob("*.st"), None) for rank in (0, 1)]
    assert kept[0] is not None and kept[1] is None  # of one machine, one rank writes


def test_smollm2_remembers_itself(monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.delenv("CLASSP_HF_CACHE")
    folder = embedded.smollm2()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    memory = remember(model, tokenizer, samples=4, max_length=24, batch_size=2)
    accumulators = memory.get("accumulator")
    assert accumulators.keys() == {n for n, _ in model.named_parameters()} and memory.metadata["steps"] == 2
    assert all(float(t.sum()) > 0 for t in accumulators.values())
    ids, lengths = (memory.get("pseudo_rehearsal.pool")[k] for k in ("ids", "lengths"))
    written = [tokenizer.decode(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist())]
    assert sum("<|im_start|>user" in text for text in written) >= 2  # its template has the user speak in half of them
    with torch.no_grad():  # what it wrote is likelier than noise
        noise = torch.randint(10, 40000, (1, 24))
        own = torch.tensor([ids[-1, : lengths[-1]].tolist()])
        losses = [float(F.cross_entropy(model(t).logits[0, :-1], t[0, 1:])) for t in (own, noise)]
    assert losses[0] < losses[1]
