"""The comparison recipe and its report, on the real model and data, with few steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "benchmarks")]

import compare_methods  # noqa: E402
import report_methods  # noqa: E402
import report_performance  # noqa: E402
from compare_methods import ARMS, FirstTask, Job, frozen_setting, job_of, read_lines  # noqa: E402

from classp_hf import METHODS  # noqa: E402


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(compare_methods, "BASE", compare_methods.BASE.replace("--max_steps 80", "--max_steps 2"))
    monkeypatch.setattr(compare_methods, "TRAIN_EXAMPLES", 32)
    monkeypatch.setattr(compare_methods, "EVAL_EXAMPLES", 24)
    monkeypatch.setattr(compare_methods, "TRACE_EXAMPLES", 12)
    compare_methods.prepared_task.cache_clear()
    yield
    compare_methods.prepared_task.cache_clear()


def test_tuned_and_reported_runs_share_no_example(small, monkeypatch):
    monkeypatch.setattr(compare_methods, "TRAIN_EXAMPLES", 1200)
    tuned, reported = (compare_methods.prepared_task("amazon", stage, 0) for stage in ("tune", "report"))

    def texts(dataset):
        return {tuple(ids) for ids in dataset["input_ids"]}

    # beyond those that are the same once cut to 32 tokens
    assert len(texts(tuned.train_dataset) & texts(reported.train_dataset)) <= 2
    assert not texts(tuned.test_dataset) & texts(reported.test_dataset)
    other = compare_methods.prepared_task("amazon", "report", 1)
    assert texts(other.test_dataset) == texts(reported.test_dataset)
    assert texts(other.train_dataset) != texts(reported.train_dataset)


def run(job, cache):
    first = FirstTask.of(job)
    if first is not None and not first.folder(cache).is_dir():
        compare_methods.train_first_task(first, cache)
    return compare_methods.run(job, cache)


def test_a_shared_first_task_changes_no_result(small, monkeypatch, tmp_path):
    for arm in ("adamw", "merge", "classp_logit_adjustment"):
        job = Job("tune", arm, ARMS[arm].settings[0], "nyt>movie", 0)
        shared = run(job, tmp_path)
        monkeypatch.setattr(ARMS[arm], "alone", True)
        assert FirstTask.of(job) is None
        whole = run(job, tmp_path)
        assert shared["R"][1:] == whole["R"][1:] and shared["bytes_a_weight"] == whole["bytes_a_weight"]
    of = {arm: FirstTask.of(Job("tune", arm, ARMS[arm].settings[0], "nyt>movie", 0)) for arm in ("ewc", "lwf", "mofo")}
    assert of["ewc"] == of["lwf"] and of["mofo"] is None
    assert of["ewc"].flags == "--optim adamw_torch_fused --learning_rate 1e-4 --reset_optimizer --gather_memory"
    assert sorted(p.name.split("_")[1] for p in tmp_path.iterdir()) == [
        "nyt",
        "nyt",
        "nyt",
    ]  # and nothing half-written


def test_runs_and_their_report(small, tmp_path):
    lines = []
    for arm, sequence in (
        ("adamw", "nyt>movie"),
        ("classp_logit_adjustment_lwf", "nyt>movie"),
        ("mofo", "nyt>movie"),
        ("lora", "nyt>movie"),
        ("olora", "nyt>movie"),
        ("osf", "nyt>movie"),
        ("joint", "movie>nyt"),
    ):
        job = Job("report", arm, ARMS[arm].settings[0], sequence, 0)
        line = json.loads(json.dumps(run(job, tmp_path)))
        assert job_of(line) == job
        lines.append(line)
    plain, ours, mofo, lora, olora, osf, joint = lines
    assert [len(row) for row in plain["R"]] == [2, 2, 2] and len(joint["R"]) == 1
    assert [point[0] for point in plain["trace"]] == [2]
    # optimizer state a weight: two moments, an accumulator and a teacher, adapters
    assert plain["bytes_a_weight"] == pytest.approx(8, abs=0.1)
    assert ours["bytes_a_weight"] == pytest.approx(8, abs=0.1)
    assert mofo["bytes_a_weight"] == pytest.approx(8, abs=0.1) and lora["bytes_a_weight"] < 1
    assert lora["bytes_a_weight"] < olora["bytes_a_weight"] < 1 and osf["method"]["name"] == "osf"
    assert ours["method"]["prior_strength"] == 0.25 and ours["optimizer"]["name"] == "CLASSP"

    found = report_methods.collect(lines, "movie>nyt")
    assert list(found) == ["joint"] and found["joint"][0] == [joint["R"][0]]
    found = report_methods.collect(lines, "nyt>movie")
    assert found["joint"][0] == [joint["R"][0][::-1]]
    text = report_methods.table(found, ["nyt", "movie"])
    assert all(f"`{arm}`" in text for arm in found)
    seen = report_methods.traces(lines, ("nyt", "movie"))
    report_methods.plot_front(seen, ("nyt", "movie"), tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000
    assert "`mofo`" in report_methods.equal_plasticity(seen) and "`lora`" in report_methods.costs(lines)


def fake_line(arm, setting, sequence, seed, final):
    return {
        "stage": "tune",
        "arm": arm,
        "setting": setting,
        "sequence": sequence,
        "seed": seed,
        "R": [[0, 0], [0, 0], final],
    }


def test_the_setting_with_the_best_validation_accuracy_is_frozen():
    settings = ARMS["ewc"].settings
    lines = [
        fake_line("ewc", setting, sequence, 0, [0.5, 0.5 + 0.1 * (i == 1)])
        for i, setting in enumerate(settings)
        for sequence in compare_methods.TUNING
    ]
    assert frozen_setting("ewc", lines) == frozen_setting("ewc_summed", lines) == settings[1]
    for unequal in (lines[:-1], []):
        with pytest.raises(
            ValueError, match="settings of 'ewc' were not all tuned alike. Run: compare_methods.py tune"
        ):
            frozen_setting("ewc", unequal)


def test_a_killed_runs_last_line_is_no_result(tmp_path):
    path = tmp_path / "runs.jsonl"
    assert read_lines(path) == []
    path.write_text(json.dumps({"a": 1}) + "\n" + '{"a": 2, "R": [[0.1')
    assert read_lines(path) == [{"a": 1}]


def test_every_method_has_an_arm_and_every_arm_three_settings():
    used = {name for arm in ARMS.values() for name in arm.method.split("+")}
    assert used == set(METHODS)
    assert all(len(arm.settings) == 3 for arm in ARMS.values())


def test_the_committed_results_give_the_committed_tables(tmp_path, monkeypatch):
    """docs/results.md and README's table are what the script makes of the raw runs."""
    results = ROOT / "benchmarks/results/compare_methods.jsonl"
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "report_methods.py",
            "--input",
            str(results),
            "--output",
            str(tmp_path / "results.md"),
            "--readme",
            str(readme),
        ],
    )
    report_methods.main()
    assert readme.read_text() == (ROOT / "README.md").read_text()
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs/results.md").read_text()


def test_the_committed_benchmarks_give_the_committed_page():
    page = report_performance.page(ROOT / "benchmarks/results")
    assert page == (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert all(
        heading in page for heading in ("A step of the optimizer", "A whole training", "A penalty", "EWC's Fisher")
    )
