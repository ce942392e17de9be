"""`python -m classp_hf compare`: a real process, and what it makes of its runs."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import fields
from types import SimpleNamespace

import pytest
from warm_python import python

from classp_hf import METHODS, compare
from classp_hf.metrics import confidence, summarize

FLAGS = ["--max_train_samples", "16", "--max_eval_samples", "8", "--num_train_epochs", "1", "--max_length", "16"]
FLAGS += ["--report_to", "none", "--use_cpu", "True"]


def run(folder, *flags):
    command = [python(), "-m", "classp_hf", "compare", *FLAGS, "--output_dir", str(folder), *flags]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    found = run(folder, "--arms", "naive", "--seeds", "1")
    assert found.returncode == 0, found.stderr[-4000:]
    return folder, found.stdout


def test_every_setting_is_tried_and_the_best_is_measured_on_test_data(compared):
    folder, said = compared
    runs = {path.stem: json.loads(path.read_text()) for path in (folder / "runs").iterdir()}
    assert len(runs) == 4
    assert all(f"] {name}: ACC" in said for name in runs)
    tried = {name.split(" ")[2]: r["metrics"]["average_accuracy"] for name, r in runs.items() if name[:4] == "tune"}
    assert tried.keys() == {f"learning_rate={rate:g}" for rate in compare.ADAMW_RATES[1:]}
    best = compare.chosen({setting: tried[setting] for setting in compare.settings("naive")})
    (measured,) = [name for name in runs if name[:4] == "test"]
    assert measured == f"test naive {best} seed 43"
    for name, r in runs.items():
        assert r["arguments"]["learning_rate"] == float(name.split("=")[1].split(" ")[0])
        assert r["arguments"]["seed"] == int(name.split(" ")[-1])
    assert "One seed separates nothing" in said
    assert not list((folder / "unfinished").iterdir())
    assert (folder / "comparison.md").read_text().startswith("# icwsm14/nyt -> icwsm14/movie\n")
    assert (folder / "comparison.png").stat().st_size > 10_000


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Runs the command with trainers that train nothing; returns the seed, tasks and folder of each run."""

    def command(*flags, fails=False):
        seen = []

        def build_trainer(parser, words, arm, tasks, folder):
            def train_sequence(tasks):
                seen.append((words[words.index("--seed") + 1], tasks))
                return results(0.5, 0.5)

            waits = SimpleNamespace(wait_for_everyone=lambda: None)
            return SimpleNamespace(train_sequence=train_sequence, accelerator=waits, remove_callback=lambda _: None)

        monkeypatch.setattr(compare.demo, "build_trainer", build_trainer)
        monkeypatch.setattr("sys.argv", ["compare", *FLAGS, "--output_dir", str(tmp_path / "out"), *flags])
        compare.main()
        return seen

    return command


def texts(task, split):
    return set(getattr(task, f"{split}_dataset")["text"])


def test_settings_are_chosen_on_validation_data(stub):
    seen = stub("--arms", "ewc")
    assert [seed for seed, _ in seen] == [*["42"] * 3, "43", "44", "45"] * 2  # of ewc and naive
    for seed, tasks in seen:
        assert all((texts(t, "test") == texts(t, "eval")) == (seed == "42") for t in tasks)


@pytest.mark.parametrize("source", ["one file", "no test split"])
def test_nothing_is_chosen_on_what_is_tested(stub, tmp_path, source):
    rows = [f"text {i},{('good', 'bad')[i % 2]}" for i in range(200)]
    if source == "one file":
        path = tmp_path / "data.csv"
        path.write_text("\n".join(["text,label", *rows]))
    else:
        path = tmp_path / "data"
        path.mkdir()
        for name, part in (("train", rows[:150]), ("validation", rows[150:])):
            (path / f"{name}.csv").write_text("\n".join(["text,label", *part]))
    seen = stub("--arms", "naive", "--tasks", f"first:{path}", f"second:{path}", "--max_eval_samples", "1000")
    used, tested = set(), [texts(tasks[0], "test") for seed, tasks in seen if seed != "42"]
    for seed, tasks in seen:
        if seed == "42":
            used |= texts(tasks[0], "train") | texts(tasks[0], "test")
        assert not texts(tasks[0], "train") & (texts(tasks[0], "test") | tested[0])
    assert tested[0] == tested[1] == tested[2] and not tested[0] & used
    trained = {frozenset(texts(tasks[0], "train")) for _, tasks in seen}
    assert len(trained) == 4  # a seed chooses the training examples


def test_what_cannot_be_compared_is_refused_before_anything_runs(stub, capsys, tmp_path):
    for flags, message in (
        (["--tasks", "icwsm14/nyt"], "One task is no sequence"),
        (["--sequence_metric", "loss"], "a metric where higher is better, got 'loss'"),
        (["--push_to_hub", "True"], "leave --push_to_hub out"),
        (["--tasks", "icwsm14/nyt", "x:missing.csv"], "missing.csv"),
    ):
        with pytest.raises(SystemExit) as stopped:
            stub(*flags)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # the corrected command may use the folder
    assert len(stub("--arms", "naive", "--hub_token", "hf_secret")) == 6
    assert "secret" not in (tmp_path / "out/flags.json").read_text()
    assert stub("--arms", "naive", "--disable_tqdm", "True", "--resume_from_checkpoint", "True") == []


def test_finished_runs_are_not_run_again_and_other_flags_are_refused(compared):
    folder, _ = compared
    times = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    (folder / "unfinished" / "test naive").mkdir()  # of a killed process
    again = run(folder, "--arms", "naive", "--seeds", "1")
    assert again.returncode == 0 and "[" not in again.stdout.split("| arm")[0]
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()} == times
    other = run(folder, "--arms", "naive", "--weight_decay", "0.1")
    assert other.returncode == 2 and "holds runs with another weight_decay" in other.stderr
    assert run(folder, "--arms", "nive").stderr.startswith("error: Unknown arm 'nive' in --arms. Known: classp,")


def test_what_is_tuned_is_around_what_the_main_job_does():
    assert compare.GRIDS.keys() <= compare.demo.ARMS.keys()
    for arm in compare.demo.ARMS:
        name, *values = compare.GRIDS.get(arm, compare.ADAMW_RATES)
        assert len(values) == 3
        method = METHODS[compare.demo.ARMS[arm][0]]
        own = {f.name: f.default for f in fields(method) if f.init}
        if name in own:
            assert values[1] == own[name], arm


def results(*last):
    R = [[0.2, 0.2], [0.8, 0.2], list(last)]
    return {"accuracy_matrix": R, "metrics": summarize(R), "seconds": 3.0}


def test_the_words_below_the_table():
    grid = {"a=1": 50.0, "a=2": 60.0, "a=3": 55.0}
    good = [results(0.7 + s, 0.8) for s in (0.0, 0.02, 0.04)]
    bad = [results(0.4 + s, 0.8) for s in (0.0, 0.021, 0.04)]
    table, _, words, *_ = compare.tables({"ewc": grid, "naive": grid}, {"ewc": good, "naive": bad})
    assert words == "Highest: ewc with --a 2."
    assert "| ewc   | a=2     | 76.0 ± 2.5 |   +15.0 ± 0.1 |" in table, table
    edge = {"a=1": 70.0, "a=2": 60.0, "a=3": 55.0}
    *_, words, _, _ = compare.tables({"ewc": edge, "naive": grid}, {"ewc": good, "naive": good})
    assert words == (
        "Highest: ewc with --a 1. Not separated from it: naive. Plain fine-tuning is among them: these runs show no "
        "need for a method. At the edge of the grid, where a setting beyond may be better: ewc."
    )
    assert compare.chosen({"a=1": 60.0, "a=2": 60.0, "a=3": 55.0}) == "a=2"


def test_the_interval_is_students():
    assert confidence([1.0]) == (1.0, 0.0)
    assert confidence([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5), abs=1e-3)
    for size, t in ((11, 2.228), (31, 2.042), (101, 1.984)):
        values = [0.0, 1.0] * (size // 2) + [0.5]
        spread = (sum((v - 0.5) ** 2 for v in values) / (size - 1)) ** 0.5
        assert confidence(values)[1] == pytest.approx(t * spread / size**0.5, rel=2e-3)
