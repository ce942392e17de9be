"""The comparison of methods and its report, with few steps of a small model on the real data."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from transformers import AutoTokenizer, BertConfig, BertModel

from classp_hf import METHODS, embedded

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare_methods  # noqa: E402
import language_sequence  # noqa: E402
import plot_methods  # noqa: E402
import report_methods  # noqa: E402
import report_performance  # noqa: E402
from compare_methods import ARMS, Job, first_task, folder_of, frozen_setting, job_of, read_lines  # noqa: E402
from data_removal import RemovalSampler  # noqa: E402


@pytest.fixture
def small(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_path())
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    monkeypatch.setattr(embedded, "model_path", lambda: str(folder))
    steps = compare_methods.BASE.replace("--max_steps 80", "--max_steps 2").replace("batch_size 16", "batch_size 4")
    examples = {"tune": 20, "report": 24}
    for name, value in {"BASE": steps, "TRAIN_EXAMPLES": 32, "EVAL_EXAMPLES": examples}.items():
        monkeypatch.setattr(compare_methods, name, value)
    monkeypatch.setattr(compare_methods, "prepared_task", functools.cache(compare_methods.prepared_task.__wrapped__))


def test_tuned_and_reported_runs_share_no_example(small, monkeypatch):
    monkeypatch.setattr(compare_methods, "TRAIN_EXAMPLES", 1200)
    prepared = compare_methods.prepared_task
    tuned, reported, other = (prepared("amazon", *how) for how in [("tune", 0), ("report", 0), ("report", 1)])

    def texts(dataset):
        return {tuple(ids) for ids in dataset["input_ids"]}

    # but those that are the same once cut to 32 tokens
    assert len(texts(tuned.train_dataset) & texts(reported.train_dataset)) <= 2
    assert not texts(tuned.test_dataset) & texts(reported.test_dataset)
    assert texts(other.test_dataset) == texts(reported.test_dataset)
    assert texts(other.train_dataset) != texts(reported.train_dataset)
    monkeypatch.setattr(compare_methods, "TRAIN_EXAMPLES", 600)
    halves = [prepared(name, "report", 2) for name in ("amazon", "amazon/1")]
    assert len(texts(halves[0].train_dataset) & texts(halves[1].train_dataset)) <= 2
    assert texts(halves[0].test_dataset) == texts(halves[1].test_dataset) and halves[0].name != halves[1].name


def run(job, cache):
    for memory in ("old", ARMS[job.arm].memory):
        if (first := first_task(job, memory)) and not folder_of(first, cache).is_dir():
            compare_methods.train_first_task(first, cache)
    return json.loads(json.dumps(compare_methods.run(job, cache)))


def test_a_shared_first_task_changes_no_result(small, monkeypatch, tmp_path):
    jobs = {arm: Job("tune", arm, ARMS[arm].settings[0], "nyt>movie", 0) for arm in ARMS}
    firsts = {arm: first_task(job) for arm, job in jobs.items()}
    assert firsts["ewc"] == firsts["lwf"] != firsts["adamw"] and firsts["mofo"] is None
    assert firsts["ewc"].setting.endswith("--learning_rate 0.0001 --reset_optimizer --gather_memory")
    assert firsts["adamw_1e-5"] == firsts["ewc"] and firsts["classp_dropped"] == firsts["classp"]
    for arm in ("adamw", "merge", "classp_logit_adjustment"):
        shared = run(jobs[arm], tmp_path)
        monkeypatch.setattr(ARMS[arm], "alone", True)
        whole = run(jobs[arm], tmp_path)
        assert shared["R"][1:] == whole["R"][1:] and shared["bytes_a_weight"] == whole["bytes_a_weight"]
    assert [p.name[:9] for p in tmp_path.iterdir()] == ["tune_nyt_"] * 3  # nothing half-written


def test_controls_differ_in_the_memory_alone(small, monkeypatch, tmp_path):
    """The arms `classp*` begin at the same first task, and end elsewhere."""
    monkeypatch.setattr(ARMS["classp_other_memory"], "memory", "tweets")
    arms = ("classp", "classp_dropped", "classp_other_memory", "pseudo_rehearsal", "pseudo_rehearsal_new_counts")
    seen, build = [], compare_methods.build_trainer

    def built(args, *rest, **kwargs):
        seen.append(build(args, *rest, **kwargs))
        return seen[-1]

    monkeypatch.setattr(compare_methods, "build_trainer", built)
    weights, counts = [], []
    for arm in arms:
        line = run(Job("report", arm, ARMS[arm].settings[1], "nyt>movie", 0), tmp_path)
        assert line["R"][0] == line["R"][1]
        weights.append(seen[-1].model.get_input_embeddings().weight.detach().clone())
        counts.append(getattr(seen[-1].methods[0], "tokens", {}) if seen[-1].methods else {})
    assert len({w.numpy().tobytes() for w in weights}) == 5
    (old, new), (control, same) = (c.values() for c in counts[-2:])
    assert torch.equal(control, new) and torch.equal(same, new) and not torch.equal(old, new)


def test_runs_and_their_report(small, tmp_path):
    sequences = dict.fromkeys(("adamw", "classp_logit_adjustment", "mofo", "lora", "olora", "osf"), "nyt>movie")
    jobs = [Job("report", arm, ARMS[arm].settings[0], s, 0) for arm, s in {**sequences, "joint": "movie>nyt"}.items()]
    lines = [run(job, tmp_path) for job in jobs]
    assert [job_of(line) for line in lines] == jobs
    plain, ours, mofo, lora, olora, osf, joint = lines
    assert plain["precision"] == compare_methods.PRECISION and plain["hardware"]["cpu_capability"]
    assert [len(row) for row in plain["R"]] == [2, 2, 2] and len(joint["R"]) == 1
    # optimizer state a weight: two moments, an accumulator, adapters
    assert [x["bytes_a_weight"] for x in (plain, ours, mofo)] == pytest.approx([8, 4, 8], abs=0.1)
    assert lora["bytes_a_weight"] < olora["bytes_a_weight"] < 1 and osf["method"]["name"] == "osf"
    assert ours["method"]["prior_strength"] == 0.25 and ours["optimizer"]["name"] == "CLASSP"

    found = report_methods.collect(lines, "nyt>movie")
    assert found["joint"][0] == [joint["R"][0][::-1]]
    table = report_methods.table(found, ["nyt", "movie"])
    assert len(found) == 7 and all(f"`{arm}`" in table for arm in found)
    assert "`lora`" in report_methods.costs(lines)


def test_what_is_not_separated_from_its_control_is_said(monkeypatch, tmp_path):
    def line(stage, arm, setting, sequence, seed, R):
        return {**vars(Job(stage, arm, setting, sequence, seed)), "R": R}

    tuned = [line("tune", arm, s, "a>b", 0, [[0.5]]) for arm in ("adamw", "classp") for s in ARMS[arm].settings]
    lines = [
        line("report", arm, ARMS[arm].settings[0], sequence, seed, [[0.6, 0.4]] * 2 + [[old + seed * noise, 0.7]])
        for arm, old, noise in (("adamw", 0.4, 0), ("classp", 0.5, 0.01), ("classp_dropped", 0.48, 0.04))
        for sequence in compare_methods.REPORTED
        for seed in range(3)
    ]
    joint = [line("report", "joint", ARMS["adamw"].settings[0], "movie>nyt", seed, [[0.7, 0.6]]) for seed in range(3)]
    source = report_methods.Source("compare_methods_2.jsonl", [*lines, *joint], tuned)
    text, table = report_methods.controls([source])
    assert text.startswith("Better than without it: CLASSP, its step and its memory (5.5 ± 1.2, 3 seeds)")
    assert "Not separated from what is without it: the memory of CLASSP (-0.5 ± 3.7, 3 seeds)" in text
    assert "Not run with 3 seeds, so that nothing is claimed: that memory being of the old task" in text
    assert "`classp` - `classp_dropped`" in table
    middle, low, high = report_methods.gap(source.found, "classp")
    assert low < middle < high and middle == pytest.approx(0.55)


def test_figures(tmp_path):
    ends = {"a b c": np.array([[0.4, 0.7], [0.5, 0.7]]), "d": np.array([[0.45, 0.7]])}
    plot_methods.plot_gap({"a": (0.5, 0.4, 0.6), "d": (0.2, 0.1, 0.3)}, {"a"}, tmp_path / "gap.png")
    plot_methods.plot_old_new(ends, {"d"}, "d", ["a b c", "d"], ["x", "y"], tmp_path / "old_new.png")
    plot_methods.plot_cost({"a": (1.0, 0.5), "d": (1.0, 0.5)}, {"a"}, tmp_path / "cost.png")
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 3


def test_the_setting_with_the_best_validation_accuracy_is_frozen():
    settings = ARMS["ewc"].settings
    runs = [Job("tune", "ewc", setting, sequence, 0) for setting in settings for sequence in compare_methods.TUNING]
    lines = [{**vars(job), "R": [[0.5, 0.5 + 0.1 * (job.setting == settings[1])]]} for job in runs]
    assert frozen_setting("ewc", lines) == frozen_setting("ewc_summed", lines) == settings[1]
    with pytest.raises(ValueError, match="'ewc': not all settings were tuned alike. Run: compare_methods.py tune"):
        frozen_setting("ewc", lines[:-1])


def test_a_killed_runs_last_line_is_no_result(tmp_path):
    (tmp_path / "runs").write_text('{"a": 1}\n{"a": 2, "R": [[0.1')
    assert read_lines(tmp_path / "runs") == [{"a": 1}] and read_lines(tmp_path / "none") == []


def test_every_method_has_an_arm_and_every_arm_three_settings():
    assert {name for arm in ARMS.values() for name in arm.method.split("+")} == set(METHODS)
    extended = {"ewc", "lwf", "pseudo_rehearsal", "classp_pseudo_rehearsal", "classp_pseudo_rehearsal_no_counts"}
    for name, arm in ARMS.items():
        if arm.tuned_as is None and "pseudo_rehearsal_lwf" not in name:
            assert len(arm.settings) == (1 if arm.first else 3 + (name in extended)), name


def test_data_removal_keeps_what_was_answered_wrongly_and_the_order_of_plain_training():
    torch.manual_seed(5)
    data = list(range(20))
    plain = SeedableRandomSampler(data)
    sampler = RemovalSampler(20, 8)
    first = list(sampler)
    assert first == list(plain) and len(sampler) == 8
    wrong = {3, 7, 11, 12, 19}
    for at in range(0, 20, 4):
        sampler.count(torch.tensor([i in wrong for i in first[at : at + 4]]))
    second, order = list(sampler), list(plain)
    assert len(second) == 8 and wrong < set(second)
    assert second == [i for i in order if i in second]
    assert [i for i in second if i not in wrong] == [i for i in order if i not in wrong][:3]


def test_the_committed_results_give_the_committed_pages(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    argv = ["report_methods.py", "--output", str(tmp_path / "results.md"), "--readme", str(readme)]
    monkeypatch.setattr(sys, "argv", argv)
    report_methods.main()
    assert readme.read_text() == (ROOT / "README.md").read_text()
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs/results.md").read_text()
    assert report_performance.page(ROOT / "benchmarks/results") == (ROOT / "docs/performance.md").read_text()


def test_the_language_models_page_is_of_the_committed_runs():
    lines = read_lines(ROOT / "benchmarks/results/language_sequence.jsonl")
    assert language_sequence.page(lines) == (ROOT / "docs/language_sequence.md").read_text()
