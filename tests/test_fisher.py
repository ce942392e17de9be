"""The Fisher in batches, against its definition: autograd's gradient of one example after the other, squared."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import weights
from datasets import Dataset, IterableDataset
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertForMaskedLM,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import classp_hf  # ContinualTrainer is used by name
from classp_hf.methods import EWC, Context, fisher
from classp_hf.methods.fisher import sum_squared_gradients

WORDS = 40


@pytest.fixture
def make(make_model):
    """Models by kind, without dropout but in training mode, with larger weights than a new model's."""

    def build(kind):
        torch.manual_seed(0)
        small = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
        if kind == "bert":
            model = make_model(dropout=0.5)
        elif kind == "lora":
            config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["query", "value"])
            model = get_peft_model(make_model(), config)
            for n, p in model.named_parameters():
                if "lora_B" in n:
                    nn.init.normal_(p, std=0.1)
        elif kind in ("gpt2", "tied gpt2"):
            sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
            model = GPT2LMHeadModel(GPT2Config(**small, **sizes, tie_word_embeddings=kind == "tied gpt2"))
        elif kind == "llama":
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
            model = LlamaForCausalLM(LlamaConfig(**small, **sizes, initializer_range=0.2))
        else:
            small.pop("bos_token_id")
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
            model = T5ForConditionalGeneration(T5Config(**small, **sizes, decoder_start_token_id=0))
        return model.train()

    return build


def examples(kind, count=13):
    generator = torch.Generator().manual_seed(1)

    def draw(high, shape):
        return torch.randint(2, high, shape, generator=generator)

    made = []
    for i in range(count):
        ids = draw(12, (1, 3 + i % 3))  # few words: some come twice in a text
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if kind in ("bert", "lora"):
            example["labels"] = draw(5, (1,)) - 2
        else:
            example["labels"] = draw(12, (1, 4)) if kind == "t5" else ids.clone()
            example["labels"][:, 0] = -100
        made.append(example)
    return made


def by_definition(model, given, seeds=()):
    """Sum of squared gradients, each of one backward pass over one example."""
    model.eval()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
    for i, example in enumerate(given):
        labels = example["labels"]
        logits = model(**example).logits.float()
        if logits.ndim == 3:
            decoder = not getattr(model.config, "is_encoder_decoder", False)
            logits, labels = (logits[0, :-1], labels[0, 1:]) if decoder else (logits[0], labels[0])
        if seeds:
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(seeds[i]))[:, 0]
            labels = torch.where(labels == -100, labels, drawn)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        for n, g in zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)):
            if g is not None:
                total[n] += g.float().square()
    model.train()
    return total, parameters


def in_batches(model, given, size, seeds=()):
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return sum_squared_gradients(model, given, parameters, size, seeds)


def assert_equal(found, expected, rtol=1e-4, atol=1e-6):
    assert found.keys() == expected.keys()
    largest = max(float(t.max()) for t in expected.values())
    for n, t in expected.items():
        assert found[n].dtype is torch.float32
        torch.testing.assert_close(found[n], t, rtol=rtol, atol=atol * largest, msg=lambda m, n=n: f"{n}: {m}")


@pytest.fixture
def forward_sizes(monkeypatch):
    """Number of examples of every forward pass."""
    sizes = []
    original = fisher.log_likelihood

    def counting(model, batch, seeds=()):
        sizes.append(len(batch["labels"]))
        return original(model, batch, seeds)

    monkeypatch.setattr(fisher, "log_likelihood", counting)
    return sizes


@pytest.mark.parametrize("labels", ["empirical", "sampled"])
@pytest.mark.parametrize("kind", ["bert", "lora", "gpt2", "tied gpt2", "llama", "t5"])
def test_batches_give_the_sum_of_the_squared_gradients_of_single_examples(kind, labels, make, forward_sizes):
    model, given = make(kind), examples(kind)
    seeds = list(range(100, 100 + len(given))) if labels == "sampled" else ()
    expected, parameters = by_definition(model, given, seeds)
    assert sum(t.any() for t in expected.values()) >= len(expected) - 1
    for size in (1, 3, 8):
        forward_sizes.clear()
        assert_equal(in_batches(model, given, size, seeds), expected)
        # tied weights are not told apart in a batch
        assert max(forward_sizes) == (1 if kind in ("tied gpt2", "t5") else min(size, 4)), forward_sizes
    assert model.training and all(p.grad is None and p.requires_grad for p in parameters.values())
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_models_and_autocast_in_bfloat16(kind, make):
    """Sums in float32; the gradients differ by what a batch and a single example round differently."""
    given, with_autocast = examples(kind), make(kind)
    with_autocast.forward = torch.autocast("cpu", torch.bfloat16)(with_autocast.forward)
    for model in (make(kind).bfloat16(), with_autocast):
        expected, _ = by_definition(model, given)
        assert_equal(in_batches(model, given, 5), expected, rtol=0.05, atol=0.02)


class Layers(nn.Module):
    """A classifier of token ids; subclasses use its layers in ways that a batch must not confuse."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(WORDS, 6, padding_idx=3), nn.Embedding(9, 6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.LayerNorm(6)
        self.out = nn.Linear(6, 3, bias=False)

    def hidden(self, x):
        return self.second(self.scale(self.first(input=x)).tanh()).relu_()

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.hidden(self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])[None]))
        return SequenceClassifierOutput(logits=self.out(x.tanh().mean(1)))


class Convolved(Layers):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(6, 6, 3, padding=1)

    def hidden(self, x):
        return super().hidden(x) + self.convolution(x.mT).mT


class Repeated(Layers):
    def hidden(self, x):
        return self.second(self.first(self.first(x).tanh()) + self.first(x))


class Functional(Layers):
    def hidden(self, x):
        return self.second(x) + F.linear(x, self.second.weight.T)


class Tied(Layers):
    def __init__(self):
        super().__init__()
        self.second.weight = self.first.weight


class Parametrized(Layers):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.first)


class Flattened(Layers):
    def hidden(self, x):
        return self.second(self.first(x.reshape(-1, 6))).view(x.shape)


class TokensFirst(Layers):
    def hidden(self, x):
        return self.second(self.first(x.transpose(0, 1))).transpose(0, 1)


class Partly(Layers):
    def hidden(self, x):
        with torch.no_grad():
            fixed = self.first(x)
        return self.second(x) + fixed + self.first(x.detach()).detach()


class Replaced(Layers):
    def __init__(self):
        super().__init__()
        forward = self.first.forward
        self.first.forward = lambda input: 2 * forward(input)


class Recurrent(Layers):
    """A layer that returns a tuple."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(6, 6, batch_first=True)

    def hidden(self, x):
        return self.recurrent(super().hidden(x))[0]


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self):
        return self.weight


class Added(Layers):
    """A layer without an input."""

    def __init__(self):
        super().__init__()
        self.bare = Bare()

    def hidden(self, x):
        return super().hidden(x) * self.bare()


class Hooked(Layers):
    """What is done to a layer's output after it."""

    def __init__(self):
        super().__init__()
        self.scale.register_forward_hook(lambda module, args, output: 2 * output)


class Seldom(Layers):
    """One use in the first examples, another in later ones."""

    def hidden(self, x):
        return super().hidden(x) + (self.first.weight.sum() if x.shape[1] == 5 else 0)


APART = [Recurrent, Added, Repeated, Functional, Tied, Parametrized, Flattened, TokensFirst, Replaced]


@pytest.mark.parametrize("cls", [Layers, Convolved, Hooked, Partly, Seldom, *APART])
def test_whatever_is_done_with_a_weight(cls, forward_sizes):
    model, given = cls(), examples("bert", 16)
    expected, _ = by_definition(model, given)
    # 3 tokens, and batches of 3: a first dimension of tokens could pass for the examples'
    assert_equal(in_batches(model, given, 3), expected)
    assert max(forward_sizes) == (1 if cls in APART else 3)


def test_examples_of_one_token_do_not_vouch_for_longer_ones():
    model, given = TokensFirst(), examples("bert", 16)
    for key in ("input_ids", "attention_mask"):
        given[0][key] = given[0][key][:, :1]
    ordered = [given[0], *sorted(given[1:], key=lambda e: e["input_ids"].shape[1])][:4]
    assert_equal(in_batches(model, ordered, 3), by_definition(model, ordered)[0])


class LargestTensor(TorchDispatchMode):
    """The numbers in the largest tensor that operations made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result._is_view() and not any(result is a for a in args):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_no_gradient_of_a_layer_is_made_for_all_examples_at_once(make_model):
    model = make_model()
    model.resize_token_embeddings(3000)  # 96,000 weights, of which a text touches 160
    given = [e for e in examples("bert", 60) if e["input_ids"].shape[1] == 5]
    with LargestTensor() as made:
        totals = sum_squared_gradients(model, given, dict(model.bert.encoder.named_parameters()), len(given))
    assert sum(t.numel() for t in totals.values()) > 15_000 and made.numbers <= len(given) * 5 * 48
    with LargestTensor() as made:
        sum_squared_gradients(model, given, dict(model.named_parameters()), len(given))
    assert made.numbers == 96_000  # the total, and no dense gradient of each example


@pytest.fixture
def task_fisher(make_model, make_tasks, collator):
    def collate(rows):
        assert all(row.keys() == {"input_ids", "labels"} for row in rows)
        return collator(rows)

    def run(labels="sampled", dataset=None, **changes):
        args = SimpleNamespace(
            seed=3, process_index=0, local_process_index=0, world_size=1, device="cpu", disable_tqdm=True
        )
        vars(args).update({"per_device_train_batch_size": 4, "remove_unused_columns": True, **changes})
        method = EWC(fisher_samples=20, fisher_labels=labels)
        dataset = make_tasks(1)[0].train_dataset if dataset is None else dataset
        context = Context(make_model(), args, task_dataset=dataset, collate=collate)
        method.before_task(context)
        return method.task_fisher(context)

    return run


def test_a_tasks_fisher_does_not_depend_on_how_examples_are_shared_out(task_fisher, forward_sizes):
    one = task_fisher(per_device_train_batch_size=1)
    assert max(forward_sizes) == 1
    assert_equal(task_fisher(), one)
    assert max(forward_sizes) == 4
    for flag in ("activation_checkpointing", "gradient_checkpointing"):
        forward_sizes.clear()
        assert_equal(task_fisher(**{flag: True}), one)
        assert max(forward_sizes) == 1  # evaluation mode checkpoints nothing
    ranks = [task_fisher(world_size=2, process_index=rank) for rank in range(2)]
    assert_equal({n: ranks[0][n] + ranks[1][n] for n in one}, one)
    assert any(not torch.allclose(t, one[n]) for n, t in task_fisher("empirical").items())


def test_a_tasks_fisher_of_datasets_of_any_kind(task_fisher, make_tasks):
    rows = make_tasks(1)[0].train_dataset
    expected = task_fisher("empirical")
    described = rows.add_column("text", ["columns the model does not take"] * len(rows))
    assert_equal(task_fisher("empirical", described), expected)
    assert_equal(task_fisher("empirical", [dict(row) for row in rows]), expected)
    for endless in (IterableDataset.from_generator(lambda: iter(rows)), Dataset.from_dict({"input_ids": []})):
        with pytest.raises(ValueError, match="needs one of known length, with examples, got a .*Dataset"):
            task_fisher("empirical", endless)


def test_models_with_a_label_a_token(make_model):
    """Token classifiers and masked language models: the sum over the tokens that have a label."""
    config = make_model().config
    for cls, classes in ((BertForTokenClassification, 3), (BertForMaskedLM, WORDS)):
        torch.manual_seed(0)
        model, given = cls(config), examples("gpt2")
        for i, example in enumerate(given):
            example["labels"] = torch.where(example["labels"] == -100, -100, example["labels"] % classes)
            example["labels"][:, 1 + i % 2] = -100
        model.eval()
        parameters = dict(model.named_parameters())
        expected = {n: torch.zeros_like(p) for n, p in parameters.items()}
        for example in given:
            loss = model(**example).loss * (example["labels"] != -100).sum()  # the model's mean over its labels
            for n, g in zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)):
                expected[n] += 0 if g is None else g.square()
        assert_equal(in_batches(model, given, 4), expected)
        assert not torch.allclose(
            in_batches(model, given, 4, list(range(13)))["bert.embeddings.LayerNorm.weight"],
            expected["bert.embeddings.LayerNorm.weight"],
        )


@pytest.mark.parametrize(
    ("num_labels", "labels", "shown"),
    [
        (1, 0.5, r"\(1, 1\) .*float32"),
        (3, [0.0, 1.0, 1.0], r"\(1, 3\) .*float32"),
        (3, [0, 1, 1], r"\(1, 3\) .*int64"),
    ],
)
def test_models_without_a_likelihood_are_refused_before_they_train(num_labels, labels, shown, make_model, make_args):
    rows = Dataset.from_dict({"input_ids": [[1, 5, 9]] * 8, "labels": [labels] * 8})
    trainer = classp_hf.ContinualTrainer(
        make_model(num_labels=num_labels), make_args(optim="adamw_torch"), default_data_collator, rows, method="ewc"
    )
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=f"needs log p.*got logits of shape {shown}. Use --method l2sp, elastic or"):
        trainer.train()
    assert all(torch.equal(w, before[n]) for n, w in weights(trainer.model).items()) and not trainer.state.log_history


def test_a_look_at_the_first_example_changes_no_random_number(make_model, make_tasks, collator, make_args):
    def masked_at_random(rows):
        return {**collator(rows), "attention_mask": (torch.rand(1, len(rows[0]["input_ids"])) < 0.8).long()}

    rows = make_tasks(1)[0].train_dataset
    context = Context(make_model().train(), make_args(), task_dataset=rows, collate=masked_at_random)
    state = torch.get_rng_state()
    EWC().before_task(context)
    assert torch.equal(state, torch.get_rng_state()) and context.model.training


def test_rows_with_lengths_beside_them_take_a_pass_each(make):
    """TRL's packed rows hold the numbers of their parts: those of several rows are no tensor to be joined."""
    model, rows = make("llama"), examples("llama", 4)
    parameters = dict(model.named_parameters())
    expected = sum_squared_gradients(model, rows, parameters)
    for given in ({"max_length_q": 4}, {"cu_seq_lens_q": torch.tensor([0, 2, 3])}):
        found = sum_squared_gradients(model, [{**row, **given} for row in rows], parameters, size=4)
        assert all(torch.equal(t, found[n]) for n, t in expected.items())
