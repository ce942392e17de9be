"""Models between a start and what it was tuned to: the points are right, and the right one is saved."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
import transformers
from conftest import weights
from safetensors.torch import load_file, save_file
from test_language import WORDS, make_causal, tokenizer  # noqa: F401  (fixtures)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from warm_python import python

from classp_hf import ContinualMemory, embedded
from classp_hf.blend import _batches, _Blender, blend, format_blend
from classp_hf.remember import load_saved

NAME = "transformer.h.1.mlp.c_fc.weight"
SETTINGS = {"samples_drawn": 4, "length": 16}


@pytest.fixture
def pair(make_causal, tokenizer, tmp_path):  # noqa: F811
    """Folders of a start and a tuned model, with the file that it was tuned on."""
    start, tuned = tmp_path / "start", tmp_path / "tuned"
    model = make_causal()
    for folder in (start, tuned):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(1)
        batch = tokenizer(["say a then b", "say c then d"], return_tensors="pt")
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(20 if folder == start else 0):
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": t}) for t in ("say a then b", "say c then d")))
    return str(start), str(tuned), str(file)


def remember(folder, power_of, names=("other",)):
    model = AutoModelForCausalLM.from_pretrained(folder)
    memory = ContinualMemory({}, {"tasks": ["t"]})
    memory.put("accumulator", {n: power_of(n, p.detach()) for n, p in model.named_parameters()})
    memory.save(folder)


def saved(pair, out, **changes):
    results = blend(*pair[:2], str(out), eval_file=pair[2], **{**SETTINGS, **changes})
    return results, weights(AutoModelForCausalLM.from_pretrained(out))


def both(pair):
    return (weights(AutoModelForCausalLM.from_pretrained(folder)) for folder in pair[:2])


def test_the_best_point_within_the_limit_is_saved(pair, tmp_path):
    results, _ = saved(pair, tmp_path / "free", max_rise=1e9)
    line = [p for p in results["points"] if p["path"] == "line"]
    assert [p["share"] for p in line] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert line[0]["rise"] == 0 and line[0]["guard_kl"] == pytest.approx(0, abs=1e-3)
    assert line[-1]["guard_loss"] > line[0]["guard_loss"] and line[-1]["task"] < line[0]["task"]
    assert results["points"][results["chosen"]]["task"] == min(p["task"] for p in results["points"])
    limited, w = saved(pair, tmp_path / "limited", max_rise=line[2]["rise"] + 1e-6)
    chosen = limited["points"][limited["chosen"]]
    within = [p for p in limited["points"] if p["rise"] <= line[2]["rise"] + 1e-6]
    assert len(within) < len(limited["points"]) and chosen["task"] == min(p["task"] for p in within)
    nothing, w = saved(pair, tmp_path / "nothing", max_rise=0.0, shares=(0.0, 1.0))
    start, _ = both(pair)
    if nothing["chosen"] == 0:
        assert all(torch.equal(w[n], t) for n, t in start.items())
    assert json.loads((tmp_path / "free" / "blend.json").read_text()) == results
    assert (tmp_path / "free" / "blend.png").stat().st_size > 5000
    assert (tmp_path / "free" / "tokenizer.json").is_file()
    assert f"Bold: saved ({results['rule']})" in format_blend(results)


def test_the_guard_and_task_losses_are_those_of_the_saved_model(pair, tokenizer, tmp_path):  # noqa: F811
    results, _ = saved(pair, tmp_path / "out", max_rise=1e9, shares=(0.0, 0.5))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    losses = []
    for text in ("say a then b", "say c then d"):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    assert results["points"][results["chosen"]]["task"] == pytest.approx(sum(losses) / 2, rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_points_of_line_and_depth(pair, tmp_path, share):
    from classp_hf.blend import _Blender

    model = AutoModelForCausalLM.from_pretrained(pair[1])
    start, tuned = both(pair)
    blender = _Blender(model, *pair[:2])
    blender.put("line", share)
    for n, p in model.named_parameters():
        assert torch.allclose(p, start[n] + share * (tuned[n] - start[n]), atol=1e-6), n
    blender.put("depth", share)
    shares = {"transformer.wte.weight": share, "transformer.h.0.attn.c_attn.weight": share}
    shares |= {NAME: 1.0, "transformer.ln_f.weight": 1.0}  # the second of two layers, and what follows
    now = dict(model.named_parameters())
    for n, s in shares.items():
        assert torch.allclose(now[n], start[n] + s * (tuned[n] - start[n]), atol=1e-6), n
    assert blender.only_tuned == []


def test_the_memory_weighs_as_merge_does(pair, tmp_path):
    from classp_hf.blend import _Blender

    def importance(scale):
        def of(name, p):
            torch.manual_seed(len(name) + scale)
            return torch.rand(p.shape) * scale + (1.0 if name == NAME else 0.0)

        return of

    remember(pair[0], importance(1))
    remember(pair[1], lambda n, p: importance(1)(n, p) + importance(3)(n, p))
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    start, tuned = both(pair)
    old = {n: importance(1)(n, p) for n, p in model.named_parameters()}
    new = {n: importance(3)(n, p) for n, p in model.named_parameters()}
    mean_old, mean_new = (torch.cat([t.flatten() for t in f.values()]).mean() for f in (old, new))
    blender = _Blender(model, *pair[:2])
    blender.put("memory", 0.5)
    for n, p in model.named_parameters():
        f_old, f_new = old[n] / mean_old, new[n] / mean_new
        expected = (f_old * start[n] + f_new * tuned[n]) / (f_old + f_new)
        assert torch.allclose(p, expected, atol=1e-5), n
    results, w = saved(pair, tmp_path / "out", max_rise=1e9, shares=(0.0, 0.5))
    assert {p["path"] for p in results["points"]} == {"line", "depth", "memory"}
    memory = ContinualMemory.load(tmp_path / "out")  # the tuned model's, which knows the saved weights
    assert torch.equal(memory.get("samples")[NAME][:1], w[NAME].flatten()[:1])
    assert torch.equal(memory.get("accumulator")[NAME], ContinualMemory.load(pair[1]).get("accumulator")[NAME])


def test_a_classifier_keeps_the_head_that_its_start_lacks(make_model, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(40)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0")  # noqa: F811
    tuned = make_model(seed=1)
    make_model(seed=0).bert.save_pretrained(tmp_path / "start")  # without a head, and without its prefix
    tuned.save_pretrained(tmp_path / "tuned")
    for name in ("start", "tuned"):
        tokenizer.save_pretrained(tmp_path / name)
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"w{i} w{i + 1} w9", "label": ("negative", "neutral", "positive")[i % 3]} for i in range(10, 25)]
    file.write_text("\n".join(map(json.dumps, rows)))
    results = blend(
        str(tmp_path / "start"), str(tmp_path / "tuned"), str(tmp_path / "out"), str(file), str(file),
        max_rise=1e9, shares=(0.0, 0.5, 1.0),
    )  # fmt: skip
    assert results["only_tuned"] == ["classifier.bias", "classifier.weight"]
    assert results["metric"] == "accuracy"
    tuned.eval()
    labels = [tuned.config.label2id[row["label"]] for row in rows]
    with torch.no_grad():
        said = tuned(**tokenizer([r["text"] for r in rows], return_tensors="pt")).logits.argmax(-1).tolist()
    whole = next(p for p in results["points"] if p["share"] == 1.0)
    assert whole["task"] == pytest.approx(sum(map(int.__eq__, said, labels)) / len(rows))
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(found.classifier.weight, tuned.classifier.weight)
    with pytest.raises(ValueError, match="A classifier has no general text"):
        blend(str(tmp_path / "start"), str(tmp_path / "tuned"), str(tmp_path / "out"))
    numbers = tmp_path / "numbers.jsonl"  # the same labels, as integers
    numbers.write_text("\n".join(json.dumps({**row, "label": i}) for row, i in zip(rows, labels)))
    folders = [str(tmp_path / name) for name in ("start", "tuned", "again")]
    again = blend(*folders, None, str(numbers), shares=(0.0, 0.5, 1.0))
    assert [p["task"] for p in again["points"]] == [p["task"] for p in results["points"]]
    transformers.BertForTokenClassification(tuned.config).save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="gives a text no label"):
        blend(*folders, None, str(numbers))


def mixture():
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


@pytest.mark.parametrize("kind", ["mixture of experts", "gamma and beta"])
def test_names_that_transformers_converts(kind, make_model, tmp_path):
    """Share 0 is the start, and share 1 the tuned model, also where a file has other names than the model."""
    models = []
    for seed, name in enumerate(("start", "tuned")):
        torch.manual_seed(seed)
        model = mixture() if kind == "mixture of experts" else make_model(seed=seed)
        for p in model.parameters():
            torch.nn.init.normal_(p)
        model.save_pretrained(tmp_path / name)
        models.append(weights(model))
    if kind == "gamma and beta":
        file = tmp_path / "start" / "model.safetensors"
        old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
               for n, t in load_file(file).items()}  # fmt: skip
        save_file(old, file, {"format": "pt"})
    model = load_saved(str(tmp_path / "tuned"))
    blender = _Blender(model, str(tmp_path / "start"), str(tmp_path / "tuned"))
    assert blender.only_tuned == []
    for share, wanted in zip((0.0, 1.0, 0.0), (*models, models[0])):
        blender.put("line", share)
        found = weights(model)
        assert found.keys() == wanted.keys() and all(torch.allclose(found[n], wanted[n]) for n in wanted)


def test_a_start_without_pooler_leaves_the_tuned_ones(make_model, tmp_path):
    """Loading such a start would draw one at random."""
    tuned = make_model(seed=1)
    start = transformers.BertModel(tuned.config, add_pooling_layer=False)
    start.save_pretrained(tmp_path / "start")
    tuned.save_pretrained(tmp_path / "tuned")
    model = load_saved(str(tmp_path / "tuned"))
    blender = _Blender(model, str(tmp_path / "start"), str(tmp_path / "tuned"))
    assert "bert.pooler.dense.weight" in blender.only_tuned
    blender.put("line", 0.0)
    assert torch.equal(model.bert.pooler.dense.weight, tuned.bert.pooler.dense.weight)
    assert torch.equal(model.bert.encoder.layer[0].output.dense.weight, start.encoder.layer[0].output.dense.weight)


def test_a_head_of_another_number_of_labels_is_no_pair(make_model, tmp_path):
    make_model(seed=0).save_pretrained(tmp_path / "start")
    tuned = make_model(seed=1, num_labels=2)
    tuned.save_pretrained(tmp_path / "tuned")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    blender = _Blender(model, str(tmp_path / "start"), str(tmp_path / "tuned"))
    assert blender.only_tuned == ["classifier.bias", "classifier.weight"]
    blender.put("line", 0.0)
    assert torch.equal(model.classifier.weight, tuned.classifier.weight)


def test_what_is_no_whole_model_is_refused(pair, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    from classp_hf.blend import _weights

    with pytest.raises(ValueError, match="merge it into its model first"):
        _weights(str(tmp_path / "adapter"))


def test_the_command(pair, tmp_path):
    command = [python(), "-m", "classp_hf", "blend", *pair[:2], "--output_dir", str(tmp_path / "out")]
    run = subprocess.run([*command, "--eval_file", pair[2]], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "guard loss" in run.stdout and (tmp_path / "out" / "model.safetensors").is_file()


def test_labels_whose_names_look_like_numbers_are_matched_by_name(make_model, tmp_path):
    model, tokenizer = make_model(), AutoTokenizer.from_pretrained(embedded.model_path())  # noqa: F811
    model.config.id2label, model.config.label2id = {0: "1", 1: "2", 2: "3"}, {"1": 0, "2": 1, "3": 2}
    (tmp_path / "rows.csv").write_text("text,label\none,1\ntwo,2\nthree,2\n")
    (batch,) = _batches(model, tokenizer, str(tmp_path / "rows.csv"))
    assert batch["labels"].tolist() == [0, 1, 1]
