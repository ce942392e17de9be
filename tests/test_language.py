"""Sequences of tasks for causal and sequence-to-sequence language models, built on the spot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import weights
from datasets import Dataset, Features, Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from classp_hf import EWC, ClasspTrainer, ContinualTrainer, Task
from classp_hf.language import IGNORED, prepare_language_tasks

WORDS = ["<pad>", "</s>", "<user>", "<assistant>", "<end>", *"abcdefgh", "up", "down", "say", "then"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", chat_template=TEMPLATE
    )


@pytest.fixture
def make_causal():
    def make():
        torch.manual_seed(0)
        sizes = {"vocab_size": len(WORDS), "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
        config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        return GPT2LMHeadModel(config)

    return make


@pytest.fixture
def make_seq2seq():
    def make():
        torch.manual_seed(0)
        sizes = {"vocab_size": len(WORDS), "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2}
        tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
        config = T5Config(**sizes, **tokens, dropout_rate=0.0)
        return T5ForConditionalGeneration(config)

    return make


def split(word, rows, seed, form):
    """`say x` is answered by x's neighbour in the alphabet: upwards in one task, downwards in the other."""
    rng = np.random.default_rng(seed)
    said = [chr(ord("b") + int(i)) for i in rng.integers(0, 6, rows)]
    answers = [chr(ord(c) + (1 if word == "up" else -1)) for c in said]
    made = []
    for c, answer in zip(said, answers):
        user, assistant = {"role": "user", "content": f"{word} say {c}"}, {"role": "assistant", "content": answer}
        made.append(
            {
                "pair": {"prompt": f"{word} say {c}", "completion": answer},
                "chat pair": {"prompt": [user], "completion": [assistant]},
                "messages": {"messages": [user, assistant]},
            }[form]
        )
    return Dataset.from_list(made)


def tasks(form="pair", rows=48):
    return [Task(word, split(word, rows, 0, form), split(word, 12, 1, form)) for word in ("up", "down")]


@pytest.mark.parametrize("form", ["pair", "messages", "chat pair"])
def test_a_causal_model_learns_chats_and_completions(form, make_causal, make_args, tokenizer, tmp_path):
    args = make_args(num_train_epochs=4, learning_rate=1e-2)
    results = ClasspTrainer(make_causal(), args, processing_class=tokenizer).train_sequence(tasks(form))
    R = np.array(results["accuracy_matrix"])
    assert results["metric"] == "loss" and not results["greater_is_better"]
    assert R[1, 0] < 0.6 * R[0, 0] and R[2, 1] < 0.6 * R[0, 1]
    known = results["metrics"]
    assert known["forgetting"] == pytest.approx(R[2, 0] - R[1, 0]) == -known["backward_transfer"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "A language model, fine-tuned on 2 tasks" in card
    assert "Loss, lower is better on the held-out examples" in card and "Labels:" not in card
    assert "AutoModelForCausalLM.from_pretrained(repo)" in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_task_metric_that_generates(kind, make_causal, make_seq2seq, make_args, tokenizer, tmp_path):
    def generated(model, tokenizer, dataset):
        """Share of completions that greedy decoding writes."""
        assert not model.training
        right = 0
        for row in dataset:
            given = tokenizer(row["prompt"], return_tensors="pt")
            written = model.generate(**given, max_new_tokens=1, do_sample=False)[0]
            right += tokenizer.decode(written[-1:]) == row["completion"]
        return right / len(dataset)

    model = make_causal() if kind == "causal" else make_seq2seq()
    args = make_args(num_train_epochs=12, optim="adamw_torch", learning_rate=5e-3)
    trainer = ContinualTrainer(model, args, processing_class=tokenizer, task_metric=generated, method="lwf")
    results = trainer.train_sequence(tasks())
    R = results["accuracy_matrix"]
    assert results["metric"] == "generated" and results["greater_is_better"]
    assert R[0][0] < 0.6 and R[1][0] > 0.8 and R[2][1] > 0.8
    assert results["auto_class"] == ("AutoModelForCausalLM" if kind == "causal" else "AutoModelForSeq2SeqLM")
    args = make_args(output_dir=str(tmp_path / "nan"))
    trainer = ContinualTrainer(model, args, processing_class=tokenizer, task_metric=lambda *_: float("nan"))
    with pytest.raises(ValueError, match="<lambda> is nan for task 'up'"):
        trainer.train_sequence(tasks())


def test_the_loss_is_on_what_the_model_is_to_write(tokenizer):
    def labels(rows, encoder_decoder=False, **kwargs):
        given = [Task("t", Dataset.from_list(rows), Dataset.from_list(rows))]
        prepared = prepare_language_tasks(given, tokenizer, encoder_decoder, **kwargs)[0].train_dataset
        shown = [[tokenizer.decode([i]) if i != IGNORED else "-" for i in ids] for ids in prepared["labels"]]
        assert list(map(len, prepared["attention_mask"])) == list(map(len, prepared["input_ids"]))
        return shown

    pair = {"prompt": "say a", "completion": "b c"}
    assert labels([pair]) == [["-", "-", "b", "c", "</s>"]]
    assert labels([pair], encoder_decoder=True) == [["b", "c"]]
    assert labels([{"text": "a b"}]) == [["a", "b", "</s>"]]
    turns = [("user", "say a"), ("assistant", "b"), ("user", "then"), ("assistant", "c d")]
    chat = {"messages": [{"role": r, "content": c} for r, c in turns]}
    assert labels([chat]) == [[*"----", "-", "b", "<end>", *"---", "-", "c", "d", "<end>"]]
    # cut: what has nothing left to learn is left out
    long = {"prompt": "say a say a say a", "completion": "b"}
    assert labels([pair, long], max_length=4) == [["-", "-", "b", "c"]]


def test_a_pair_of_texts_counts_where_messages_stand_beside_it(tokenizer):
    """Chat datasets keep `prompt` and `completion` beside `messages`: as texts they are no list of messages."""
    (plain,) = tasks("pair", 4)[:1]
    messages = [[{"role": "user", "content": "up say b"}, {"role": "assistant", "content": "c"}]] * 4
    both = Task("both", *(plain.train_dataset.add_column("messages", messages) for _ in range(2)))
    for encoder_decoder in (False, True):
        found, expected = (prepare_language_tasks([t], tokenizer, encoder_decoder)[0] for t in (both, plain))
        assert found.train_dataset.to_list() == expected.train_dataset.to_list()


def test_columns_and_tokenizers_that_do_not_fit(tokenizer):
    def prepare(row, encoder_decoder=False, **kwargs):
        rows = Dataset.from_list([row])
        return prepare_language_tasks([Task("t", rows, rows)], tokenizer, encoder_decoder, **kwargs)

    with pytest.raises(ValueError, match=r"'t': train_dataset needs the columns .*'text'; it has \['story'\]"):
        prepare({"story": "a"})
    with pytest.raises(ValueError, match="needs the columns 'prompt' and 'completion'"):
        prepare({"text": "a"}, encoder_decoder=True)
    with pytest.raises(ValueError, match="train_dataset: no example has anything left to learn within max_length=1"):
        prepare({"prompt": "say a", "completion": "b"}, max_length=1)
    tokenizer.chat_template = "{% for m in messages %}{{ loop.length }} {{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="chat template writes a message differently when others follow"):
        prepare({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    with pytest.raises(ValueError, match="holds messages, but an encoder-decoder is given texts"):
        prepare({"prompt": [{"role": "user", "content": "a"}], "completion": []}, encoder_decoder=True)
    for processing_class in (None, object()):
        with pytest.raises(ValueError, match="need a tokenizer as processing_class"):
            prepare_language_tasks(tasks(), processing_class, False)


def test_prepared_datasets_pass_with_any_processing_class(tokenizer):
    """Captions of images, say; and images that nobody prepared are told the way."""
    captions = Dataset.from_list([{"pixel_values": [[[0.5]]], "labels": [5, 6]}])
    task = Task("captions", captions, captions)
    assert prepare_language_tasks([task], object(), True)[0] is task
    assert prepare_language_tasks([task, *tasks()], tokenizer, True)[0] is task
    raw = Dataset.from_dict({"image": [np.zeros((2, 2, 3), dtype=np.uint8)]}, Features({"image": Image()}))
    with pytest.raises(ValueError, match=r"it has \['image'\]. Prepare all .*pixel_values, and labels as numbers"):
        prepare_language_tasks([Task("raw", raw, raw)], tokenizer, True)


@pytest.mark.parametrize("method", ["ewc", "lwf"])
def test_encoder_decoders_need_no_decoder_inputs_from_the_collator(method, make_seq2seq, make_args, tokenizer):
    collator = DataCollatorForSeq2Seq(tokenizer)  # without the model it makes none
    args = make_args(optim="adamw_torch")
    ContinualTrainer(make_seq2seq(), args, collator, processing_class=tokenizer, method=method).train_sequence(tasks())


def test_columns_of_their_own_reach_neither_collator_nor_replay(make_causal, make_args, tokenizer):
    first = Dataset.from_list([{"text": "a b c", "label": 1, "id": 7}] * 16)
    second = Dataset.from_list([{"prompt": "say a", "completion": "b", "id": "seven"}] * 16)
    given = [Task("one", first, first), Task("two", second, second)]
    trainer = ContinualTrainer(make_causal(), make_args(), processing_class=tokenizer, method="replay")
    trainer.train_sequence(given)
    tokenizer.model_max_length = 3
    prepared = prepare_language_tasks(given[:1], tokenizer, False)[0].train_dataset
    assert prepared.column_names == ["input_ids", "attention_mask", "labels"] and len(prepared[0]["input_ids"]) == 3


def test_ewc_holds_a_language_model_back(make_causal, make_args, tokenizer, tmp_path):
    moved = {}
    for strength in (0.0, 100.0):
        changes = {"output_dir": str(tmp_path / str(strength)), "keep_task_models": True}
        args = make_args(optim="adamw_torch", num_train_epochs=2, **changes)
        trainer = ContinualTrainer(make_causal(), args, processing_class=tokenizer, method=EWC(strength))
        trainer.train_sequence(tasks())
        first = AutoModelForCausalLM.from_pretrained(tmp_path / str(strength) / "00-up")
        moved[strength] = sum(
            float((a - b).square().sum()) for a, b in zip(weights(first).values(), weights(trainer.model).values())
        )
    assert moved[100.0] < moved[0.0] / 2
