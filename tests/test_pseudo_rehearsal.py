"""Pseudo-rehearsal: the texts, the answers, the gradient, and what is kept."""

import dataclasses

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import VOCABULARY, weights

from classp_hf import ContinualCallback, ContinualMemory, ContinualTrainer, embedded, methods, rehearsal
from classp_hf.methods import Context, PseudoRehearsal


@pytest.fixture
def causal_model():
    def make(seed=0):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=9, pad_token_id=0, initializer_range=0.3, **sizes
        )
        return transformers.LlamaForCausalLM(config)

    return make


# ---- Texts ----


def test_tokens_are_counted_without_special_ones():
    rows = {"input_ids": [[1, 10, 11, 10, 9], [1, 12, 9, 0, 0]]}
    tokens, lengths = rehearsal.count_tokens(rows, [0, 1, 9], 14)
    assert tokens.tolist() == [0] * 10 + [2, 1, 1, 0] and lengths.tolist() == [0, 1, 0, 1]
    assert rehearsal.frame(rows["input_ids"][1], [0, 1, 9], 0) == ([1], [9])
    assert rehearsal.frame([10, 11], [9], 9) == ([], [])


def test_pseudo_texts_have_the_frequencies_of_their_task():
    """Two tasks share no token: no text may mix them, and each has half of the texts."""
    tokens = [torch.tensor([0, 3, 1, 0, 0]), torch.tensor([0, 0, 0, 1, 1])]
    lengths = [torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 0, 0, 1])]
    texts = rehearsal.pseudo_texts(4000, tokens, lengths, ([7], [8]), torch.Generator().manual_seed(0))
    first = [t for t in texts if len(t) == 5]
    assert all(t[0] == 7 and t[-1] == 8 for t in texts)
    assert all(set(t[1:-1]) <= {1, 2} for t in first) and len(first) == pytest.approx(2000, abs=150)
    assert all(set(t[1:-1]) <= {3, 4} and len(t) == 7 for t in texts if t not in first)
    assert sum(t.count(1) for t in first) / (3 * len(first)) == pytest.approx(0.75, abs=0.03)


def test_a_stream_goes_through_all_texts_before_it_repeats_one():
    parts = [rehearsal.permuted(3, start, 7, seed=5) for start in range(0, 42, 3)]
    stream = torch.cat(parts).tolist()
    assert all(sorted(stream[i : i + 7]) == list(range(7)) for i in range(0, 42, 7))
    assert stream[:7] != stream[7:14]


def test_own_samples_follow_the_models_probabilities(causal_model):
    model = causal_model().train()
    texts = rehearsal.draw_samples(model, None, 2000, 2, seed=3, batch_size=500)
    assert model.training and all(len(t) == 2 and t[0] == 1 for t in texts)
    expected = model(torch.tensor([[1]])).logits[0, -1].detach().softmax(-1)
    found = torch.bincount(torch.tensor([t[1] for t in texts]), minlength=VOCABULARY) / 2000
    assert float((found - expected).abs().max()) < 0.04 < float((found - 1 / VOCABULARY).abs().max())
    state = torch.random.get_rng_state()
    assert rehearsal.draw_samples(model, None, 4, 6, seed=3) == rehearsal.draw_samples(model, None, 4, 6, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())  # training draws what it would have drawn


@pytest.mark.parametrize(
    ("file", "content", "source"),
    [
        ("a.txt", "one two three\n\nfour five six\n", "a.txt"),
        ("a.jsonl", '{"text": "one two three"}\n{"text": "four five six"}\n', "a.jsonl"),
        ("a:b.csv", "body,id\none two three,1\nfour five six,2\n", "a:b.csv:body"),
    ],
)
def test_given_texts(file, content, source, tmp_path):
    (tmp_path / file).write_text(content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.model_path())
    found = rehearsal.read_texts(str(tmp_path / source), tokenizer, 5, 4)
    assert sorted(tokenizer.decode(t, skip_special_tokens=True) for t in found) == ["four five", "one two"]


@pytest.mark.parametrize(
    ("source", "message"),
    [("a.jsonl:body", "has no column 'body'"), ("b.txt", "no file"), ("c.txt", "holds no texts")],
)
def test_texts_that_cannot_be_read(source, message, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "c.txt").write_text("\n\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.model_path())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        rehearsal.read_texts(str(tmp_path / source), tokenizer, 5, 8)


# ---- Answers ----


@pytest.mark.parametrize("k", [4, VOCABULARY])
def test_divergence_is_that_of_whole_distributions_or_of_the_best_and_the_rest(k, causal_model):
    old, new, texts = causal_model(0), causal_model(1), [[1, 5, 6, 7], [1, 4], [1, 8, 3]]
    answers = rehearsal.answer(old, texts, k)
    assert float(rehearsal.divergence(old, answers, torch.arange(3))) == pytest.approx(0, abs=2e-3)
    expected = []
    for text in texts:
        p, q = (m(torch.tensor([text])).logits[0].log_softmax(-1) for m in (old, new))
        top = p.topk(k).indices
        p, q = (torch.cat([x.gather(-1, top), (1 - x.gather(-1, top).exp().sum(-1, True)).clamp(1e-6).log()], -1)
                for x in (p, q)) if k < VOCABULARY else (p, q)  # fmt: skip
        expected.append((p.exp() * (p - q)).sum(-1))
    found = rehearsal.divergence(new, answers, torch.arange(3))
    assert float(found) == pytest.approx(float(torch.cat(expected).sum()), rel=5e-3)
    found.backward()
    assert all(p.grad is not None for p in new.parameters())


def test_answers_are_at_the_texts_own_tokens_under_prompt_tuning(causal_model, make_args):
    """Its virtual tokens stand before them, and have no answers."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(causal_model(), config)
    texts = [[1, 10, 11, 12], [1, 13]]
    answers = rehearsal.answer(model, texts, VOCABULARY)
    assert rehearsal.readable(model, 2**20) == model.config.max_position_embeddings - 3
    assert answers.values.shape == (2, 4, VOCABULARY)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(texts[:1])).logits[0, -4:]
        assert torch.allclose(answers.values[0].float(), F.log_softmax(logits, -1).sort(descending=True)[0], atol=1e-2)
        assert float(rehearsal.divergence(model, answers, torch.arange(2))) == pytest.approx(0, abs=1e-3)
        assert rehearsal.measure(model, answers)[1] == pytest.approx(0, abs=1e-3)


def test_kinds_of_models(causal_model, make_model):
    assert (rehearsal.kind_of_model(causal_model()), rehearsal.kind_of_model(make_model())) == ("causal", "sequence")
    for refused in (
        transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1)),
        make_model(num_labels=1),
        torch.nn.Linear(2, 2),
    ):
        with pytest.raises(ValueError, match="cannot be rehearsed"):
            rehearsal.kind_of_model(refused)


# ---- The method ----


def test_its_gradient_is_clipped_apart_and_added_whatever_the_accumulation(make_model, make_args, make_tasks):
    """8 texts at once and 2 by 2, in batches and in accumulated ones: the same gradient on top of the task's."""
    first, second = make_tasks(2)
    added = []
    for batch, accumulation, norm in ((16, 1, 0.0), (4, 4, 0.0), (16, 1, 0.01)):
        args = make_args(
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_grad_norm=norm
        )
        method, model = PseudoRehearsal(), make_model()
        learned = Context(model, args, task="first", task_dataset=first.train_dataset, max_steps=9)
        method.before_task(learned)
        assert method.answers is None  # a first task has nothing to rehearse
        method.after_task(learned)
        method.before_task(Context(model, args, ["first"], task_dataset=second.train_dataset, max_steps=9))
        with torch.no_grad():
            model.classifier.weight.mul_(-1)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        method.before_step(model)
        added.append(torch.cat([(p.grad - 1).flatten() for p in model.parameters()]))
    assert added[0].norm() > 0.1 and torch.allclose(added[0], added[1], atol=2e-6)
    assert float(added[2].norm()) == pytest.approx(0.01, rel=1e-2)
    assert F.cosine_similarity(added[0], added[2], dim=0) > 0.999


def test_a_sequence_forgets_less_and_keeps_counts_alone(make_model, make_args, make_tasks, collator, tmp_path):
    kept, tasks = {}, make_tasks(2)
    for method in ("none", "pseudo_rehearsal"):
        args = make_args(output_dir=str(tmp_path / method), num_train_epochs=12, optim="adamw_torch")
        trainer = ContinualTrainer(make_model(), args, collator, method=method)
        trainer.train_sequence(tasks)
        kept[method] = [trainer.evaluate(task.test_dataset)["eval_loss"] for task in tasks]
    assert kept["pseudo_rehearsal"][0] < kept["none"][0] - 1 and kept["pseudo_rehearsal"][1] < 0.3
    memory = ContinualMemory.load(tmp_path / "pseudo_rehearsal")
    assert memory.kinds() == ["pseudo_rehearsal.lengths", "pseudo_rehearsal.tokens", "samples"]
    tokens = memory.get("pseudo_rehearsal.tokens")
    expected = [len(row) for row in tasks[0].train_dataset["input_ids"]]
    card = (tmp_path / "pseudo_rehearsal" / "README.md").read_text()
    assert "holds what the tasks so far need. Of the data it tells how often each token and each length" in card
    assert "how often each token" not in (tmp_path / "none" / "README.md").read_text()
    assert set(tokens) == {"first", "second"} and int(tokens["first"].sum()) == sum(expected)


def test_without_counts_the_memory_of_the_embedding_says_which_tokens(
    make_model, make_args, make_tasks, collator, tmp_path, caplog
):
    trainer = ContinualTrainer(
        make_model(), make_args(optim="classp", learning_rate=1e-2), collator,
        method=PseudoRehearsal(rehearse_counts="off"),
    )  # fmt: skip
    first, second = make_tasks(2)
    trainer.train_sequence([first])
    assert ContinualMemory.load(trainer.args.output_dir).kinds() == ["accumulator", "samples"]
    method = trainer.methods[0]
    method.before_task(trainer_context(trainer, second))
    seen = {i for row in first.train_dataset["input_ids"] for i in row}
    assert method.answers is not None and set(method.answers.ids.unique().tolist()) - {0} <= seen

    # a head of other labels knows nothing worth keeping
    trainer.model.classifier.out = torch.nn.Linear(2, 2)
    method.before_task(trainer_context(trainer, second))
    assert method.answers is None and "classifier.out.weight is new" in caplog.text
    del trainer.model.classifier.out
    # what could not be rehearsed when a task began is not when it is resumed: the memory now holds that task
    method.before_task(dataclasses.replace(trainer_context(trainer, second), start={}))
    assert method.answers is None


def test_texts_are_as_long_as_the_model_reads_and_never_empty():
    lengths, cut = torch.tensor([1, 2, 3, 4, 5]), methods.pseudo_rehearsal._cut
    assert cut(lengths, 9, True).tolist() == [1, 2, 3, 4, 5] and cut(lengths, 2, True).tolist() == [1, 2, 12]
    assert cut(lengths, 9, False).tolist() == [0, 2, 3, 4, 5] and cut(lengths, -1, False).tolist() == [0]
    model = torch.nn.Linear(1, 1)
    for limit, length in ((-1, 7), (None, 7), (5, 5)):  # XLNet's is -1
        model.config = transformers.PretrainedConfig(max_position_embeddings=limit)
        assert rehearsal.readable(model, 7) == length


def trainer_context(trainer, task):
    return Context(
        trainer.model, trainer.args, ["first"], trainer.accumulators, task=task.name, task_dataset=task.train_dataset,
        max_steps=20,
    )  # fmt: skip


def test_a_language_model_keeps_what_it_knew_at_its_first_training(causal_model, make_args, tmp_path):
    """SmolLM2's case in small: new text pulls it away from its own samples, rehearsal holds it."""
    from datasets import Dataset

    rows = [[1, *([3, 4, 5, 6] * 3)[: 4 + i % 8]] for i in range(64)]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows, "attention_mask": [[1] * len(r) for r in rows]})
    held_out = rehearsal.draw_samples(causal_model(), None, 64, 12, seed=99)
    answers, distance, sizes = rehearsal.answer(causal_model(), held_out, VOCABULARY), [], {}
    for method in ("none", PseudoRehearsal(rehearse_samples=64, rehearse_length=12)):
        args = make_args(output_dir=str(tmp_path / str(type(method))), optim="adamw_torch", learning_rate=3e-3)
        args.num_train_epochs = 5
        model = causal_model()
        collate = transformers.DataCollatorForSeq2Seq(_Padding(), model=None, padding=True)
        trainer = ContinualTrainer(model, args, collate, train_dataset=data, method=method)
        trainer.train()
        distance.append(rehearsal.measure(model, answers)[1])
        sizes = ContinualMemory.load(args.output_dir).get("pseudo_rehearsal.pool") if method != "none" else sizes
    none, rehearsed = distance
    assert rehearsed < 0.5 * none
    assert {n: tuple(t.shape) for n, t in sizes.items()} == {"ids": (64, 12), "lengths": (64,), "steps": ()}


class _Padding(transformers.PreTrainedTokenizerBase):
    padding_side = "right"

    def __init__(self):
        super().__init__(pad_token="[PAD]")

    @property
    def pad_token_id(self):
        return 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pool: {**pool, "ids": pool["ids"] + VOCABULARY},
        lambda pool: {**pool, "ids": pool["ids"].float()},
        lambda pool: {**pool, "ids": -pool["ids"]},
        lambda pool: {**pool, "lengths": pool["lengths"] + 100},
        lambda pool: {**pool, "lengths": pool["lengths"] * 0},
        lambda pool: {k: v for k, v in pool.items() if k != "lengths"},
        lambda pool: {k: v for k, v in pool.items() if k != "indices"},
        lambda pool: {**pool, "indices": pool["indices"] + VOCABULARY},
        lambda pool: {**pool, "values": pool["values"][:, :1]},
    ],
)
def test_samples_that_no_run_writes_are_refused(spoil, causal_model):
    model = causal_model()
    pool = vars(rehearsal.answer(model, [[1, 3], [1, 4, 5]], 4))
    PseudoRehearsal().check_state({"pool": pool}, model)
    with pytest.raises(ValueError, match="samples or counts of tokens"):
        PseudoRehearsal().check_state({"pool": spoil(pool)}, model)


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [([1.5, 2.0], [0, 1]), ([-1, 2], [0, 1]), ([1, 2], None), ([[1], [2]], [0, 1])],
)
def test_counts_that_no_run_writes_are_refused(tokens, lengths, make_model):
    state = {"tokens": {"a": torch.tensor(tokens)}}
    state |= {"lengths": {"a": torch.tensor(lengths)}} if lengths else {}
    with pytest.raises(ValueError, match="samples or counts of tokens"):
        PseudoRehearsal().check_state(state, make_model())


def test_a_set_up_without_token_ids_is_refused_before_training(make_model, make_args, make_tasks):
    dataset = make_tasks(1)[0].train_dataset.remove_columns("input_ids")
    with pytest.raises(ValueError, match="needs a column"):
        PseudoRehearsal().check(Context(make_model(), make_args(), task_dataset=dataset), [])
    assert weights(make_model())


def test_given_texts_are_rehearsed_and_never_written(causal_model, make_args, tmp_path):
    model, tokenizer, file = causal_model(), _Words(), tmp_path / "texts.txt"
    file.write_text("3 4 5\n\n6 7 8 9\n")
    method = PseudoRehearsal(rehearse_texts=str(file))
    context = Context(model, make_args(), task="a", processing_class=tokenizer, max_steps=2)
    method.before_task(context)
    assert sorted(map(tuple, method.answers.ids.tolist())) == [(3, 4, 5, 0), (6, 7, 8, 9)]
    model.zero_grad()
    state = method.state_dict()
    assert "ids" not in state["pool"]
    # a resumed run reads the texts again and has the answers of the model as it was
    again = PseudoRehearsal(rehearse_texts=str(file))
    again.check_state(state, model)
    again.load_state_dict(state)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    resumed = dataclasses.replace(context, start={})
    again.before_task(resumed)
    assert torch.equal(again.answers.ids, method.answers.ids)
    assert torch.equal(again.answers.values, method.answers.values)
    file.write_text("3 4 5 6\n")
    with pytest.raises(ValueError, match="other texts than the resumed run began with"):
        again.load_state_dict(state) or again.before_task(resumed)
    method.after_task(context)
    assert method.state_dict() == {}


def test_a_sample_ends_with_its_text_whatever_the_models_own_settings_are(causal_model):
    """transformers fills what is not asked for from the model's generation_config: ends, penalties."""
    model = causal_model()
    model.generation_config.eos_token_id, model.generation_config.repetition_penalty = [9, 3], 5.0
    own = model.generation_config
    texts = rehearsal.draw_samples(model, None, 300, 12, seed=0)
    assert model.generation_config is own
    ended = [t for t in texts if {9, 3} & set(t)]
    assert ended and all(t[-1] in (9, 3) and not {9, 3} & set(t[:-1]) for t in ended)
    assert all(len(t) == 12 for t in texts if t not in ended)
    model.generation_config.repetition_penalty = 1.0
    assert rehearsal.draw_samples(model, None, 300, 12, seed=0) == texts


def test_a_decoder_that_classifies_answers_alike_alone_and_in_a_batch():
    """It finds the end of a text by the padding token, which need not be 0."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=40, pad_token_id=39, num_labels=3, initializer_range=0.3, **sizes)
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config)
    texts = [[5, 6, 7, 8, 11], [5, 6]]
    together, alone = (rehearsal.answer(model, rows, 3) for rows in (texts, texts[1:]))
    assert torch.equal(together.values[1], alone.values[0])


@pytest.mark.parametrize("frame", [0, 40])
def test_a_long_template_leaves_room_for_what_is_said(causal_model, frame):
    class Chat(_Words):
        chat_template = "{{ messages }}"
        bos_token_id = 1

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return " ".join(["2"] * (4 + frame)) + messages[0]["content"] + "3 4"

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [int(word) for word in text.split()]}

    texts = rehearsal.draw_samples(causal_model(), Chat(), 8, 16, seed=0)
    chats = [t for t in texts if t[0] == 2]
    assert len(chats) == 4 and len({tuple(t) for t in chats}) == 4
    assert all(4 + frame + 3 < len(t) <= 4 + frame + 2 + 16 for t in chats)


def test_a_template_that_wants_more_than_a_users_turn_gives_no_chats(causal_model, caplog):
    class Chat:
        chat_template, bos_token_id = "x", 1

        def apply_chat_template(self, *args, **kwargs):
            raise ValueError("a system prompt is needed")

    assert all(t[0] == 1 for t in rehearsal.draw_samples(causal_model(), Chat(), 4, 8, seed=0))
    assert "a system prompt is needed" in caplog.text


def test_counts_keep_the_name_of_their_task(make_model, make_args, make_tasks, collator, tmp_path):
    """Which may look like a parameter's under a wrapper."""
    model, memory = make_model(), "none"
    for task, name in zip(make_tasks(2), ("base_model.nyt", "nyt")):
        args = make_args(output_dir=str(tmp_path / name))
        trainer = ContinualTrainer(model, args, collator, method="pseudo_rehearsal", memory=memory)
        trainer.train_sequence([dataclasses.replace(task, name=name)])
        memory = tmp_path / name
    assert trainer.continual_memory().get("pseudo_rehearsal.tokens").keys() == {"base_model.nyt", "nyt"}


def test_without_counts_none_are_taken_over(make_model):
    state = {"tokens": {"a": torch.tensor([1, 2])}, "lengths": {"a": torch.tensor([0, 3])}}
    method = PseudoRehearsal(rehearse_counts="off")
    method.load_state_dict(state)
    assert method.state_dict() == {}


def test_each_task_adds_as_many_samples_and_old_ones_end(causal_model, make_args):
    model, method = causal_model(), PseudoRehearsal(rehearse_samples=4, rehearse_length=8)
    sizes = []
    for seen in range(6):
        context = Context(model, make_args(), [str(i) for i in range(seen)], task=str(seen), max_steps=2)
        method.before_task(context)
        sizes.append(len(method.answers))
        method.after_task(context)
    assert sizes == [4, 8, 12, 16, 16, 16]


class _Words:
    def __call__(self, text, truncation, max_length):
        return {"input_ids": [int(word) for word in text.split()][:max_length]}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_killed_language_models_run_resumes_with_the_same_samples(accumulation, causal_model, tmp_path):
    """In a script nobody edits; the samples and answers of the model as it was come from the checkpoint."""
    from datasets import Dataset

    rows = [[1, *([3, 4, 5, 6] * 3)[: 4 + i % 8]] for i in range(32)]
    data = Dataset.from_dict({"input_ids": rows})

    def collate(features):
        ids = [torch.tensor(f["input_ids"]) for f in features]
        batch = {
            "input_ids": (ids, 0),
            "labels": (ids, -100),
            "attention_mask": ([torch.ones_like(i) for i in ids], 0),
        }
        return {k: torch.nn.utils.rnn.pad_sequence(v, True, fill) for k, (v, fill) in batch.items()}

    def train(folder, stop=None, resume=None):
        keywords = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
        keywords |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
        args = transformers.TrainingArguments(
            str(tmp_path / folder), gradient_accumulation_steps=accumulation, **keywords
        )
        method = PseudoRehearsal(rehearse_samples=16, rehearse_length=10)
        trainer = transformers.Trainer(
            causal_model(), args, collate, data, callbacks=[ContinualCallback(method), *([stop] if stop else [])]
        )
        trainer.train(resume_from_checkpoint=resume)
        return weights(trainer.model)

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("cut", Kill())
    resumed = train("cut", resume=str(tmp_path / "cut" / "checkpoint-2"))
    assert all(torch.equal(w, resumed[n]) for n, w in whole.items())
    pools = [ContinualMemory.load(tmp_path / folder).get("pseudo_rehearsal.pool") for folder in ("whole", "cut")]
    assert pools[0].keys() == pools[1].keys() and all(torch.equal(t, pools[1][n]) for n, t in pools[0].items())


def test_ragged_texts_weigh_by_their_tokens_whatever_the_batches_and_ranks(causal_model, make_args):
    """16 texts of 2 to 12 tokens at once, in batches of 4, and as the mean of two ranks: one gradient."""
    model, texts = causal_model(1), [[1, *range(3, 4 + i % 11)] for i in range(16)]
    answers = rehearsal.answer(causal_model(0), texts, VOCABULARY)

    def added(batch, ranks, rank):
        args = make_args(per_device_train_batch_size=batch, gradient_accumulation_steps=16 // batch // ranks)
        method = PseudoRehearsal(rehearse_fraction=1, rehearse_samples=16)
        method.pool = {**vars(answers)}
        args.max_grad_norm = 0.0
        method.before_task(Context(model, args, max_steps=2, start={}))  # resumed: with this pool
        method.ranks, method.rank = ranks, rank
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        method.before_step(model)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = added(16, 1, 0)
    assert torch.allclose(added(4, 1, 0), whole, atol=1e-5)
    assert torch.allclose((added(8, 2, 0) + added(8, 2, 1)) / 2, whole, atol=1e-5)
    assert whole.norm() > 0.1


@pytest.mark.parametrize("counts", ["on", "off"])
def test_an_embedding_that_is_no_parameter_draws_nothing(counts, make_model, make_args, make_tasks, collator):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="SEQ_CLS", r=2, trainable_token_indices=[3, 4])
    trainer = ContinualTrainer(
        get_peft_model(make_model(), config),
        make_args(optim="classp"),
        collator,
        method=PseudoRehearsal(rehearse_counts=counts),
    )
    rehearsed, own = [], trainer.methods[0].before_step
    trainer.methods[0].before_step = lambda model: (
        rehearsed.append(trainer.methods[0].answers is not None),
        own(model),
    )
    trainer.train_sequence(make_tasks(2))
    assert any(rehearsed) == (counts == "on")
