"""The metrics of the accuracy matrix: by hand on small matrices, and through `evaluate` without network."""

from __future__ import annotations

import doctest
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import classp_hf
from classp_hf import metrics
from classp_hf.metrics import matrix

ROOT = Path(classp_hf.__file__).parents[1]
NAMES = [
    "average_accuracy",
    "learning_accuracy",
    "backward_transfer",
    "forward_transfer",
    "forgetting",
    "retained_accuracy",
]

# Task 1 is best after task 2 (0.9), so forgetting and -BWT differ. No two of the metrics have the same value.
R3 = [
    [0.1, 0.2, 0.3],
    [0.8, 0.3, 0.2],
    [0.9, 0.7, 0.5],
    [0.6, 0.5, 0.9],
]
BY_HAND = {
    "average_accuracy": (0.6 + 0.5 + 0.9) / 3,
    "learning_accuracy": (0.8 + 0.7 + 0.9) / 3,
    "backward_transfer": ((0.6 - 0.8) + (0.5 - 0.7)) / 2,
    "forward_transfer": ((0.3 - 0.2) + (0.5 - 0.3)) / 2,
    "forgetting": ((0.9 - 0.6) + (0.7 - 0.5)) / 2,
    "retained_accuracy": [0.6 / 0.8, 0.5 / 0.7, 1.0],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("as_type", [list, np.array], ids=["lists", "numpy"])
def test_three_tasks_by_hand(name, as_type):
    assert getattr(metrics, name)(as_type(R3)) == pytest.approx(BY_HAND[name])


def test_later_task_that_helps_has_positive_backward_transfer_and_negative_forgetting():
    R = [[0.0, 0.0], [0.5, 0.0], [0.7, 0.9]]
    assert metrics.backward_transfer(R) == pytest.approx(0.2)
    assert metrics.forgetting(R) == pytest.approx(-0.2)
    assert metrics.retained_accuracy(R) == pytest.approx([1.4, 1.0])


def test_forgetting_ignores_rows_before_the_task_was_trained():
    R = [[0.9, 0.9, 0.9], [0.5, 0.9, 0.9], [0.5, 0.4, 0.9], [0.5, 0.4, 0.5]]
    assert metrics.forgetting(R) == 0.0


def test_forward_transfer_is_negative_when_earlier_tasks_hurt():
    assert metrics.forward_transfer([[0.5, 0.5], [0.9, 0.3], [0.9, 0.9]]) == pytest.approx(-0.2)


@pytest.mark.filterwarnings("error")  # numpy warns about the mean of nothing
def test_one_task_has_no_transfer():
    R = [[0.25], [0.75]]
    assert all(math.isnan(f(R)) for f in (metrics.backward_transfer, metrics.forward_transfer, metrics.forgetting))
    assert metrics.summarize(R) == {
        "average_accuracy": 0.75,
        "learning_accuracy": 0.75,
        "backward_transfer": None,
        "forward_transfer": None,
        "forgetting": None,
        "retained_accuracy": [1.0],
    }


@pytest.mark.filterwarnings("error")  # numpy warns about a division by zero
def test_task_that_was_never_learnt_has_no_retained_accuracy():
    R = [[0.0, 0.0], [0.0, 0.0], [0.5, 0.5]]
    first, second = metrics.retained_accuracy(R)
    assert math.isnan(first) and second == 1.0
    assert metrics.summarize(R)["retained_accuracy"] == [None, 1.0]


def test_summary_is_every_metric_under_its_name_and_strict_json():
    summary = metrics.summarize(np.array(R3, dtype=np.float32))
    assert list(summary) == NAMES
    read_back = json.loads(json.dumps(summary, allow_nan=False))  # a numpy float or a nan fails here
    for name in NAMES:
        assert read_back[name] == pytest.approx(BY_HAND[name])


@pytest.mark.parametrize(
    ("R", "message"),
    [
        ([0.5, 0.5], r"must have 2 dimensions, got 1 \(shape \(2,\)\)"),
        (np.zeros((3, 2, 1)), r"must have 2 dimensions, got 3 \(shape \(3, 2, 1\)\)"),
        (np.zeros((2, 2)), r"2 task\(s\) must have shape \(3, 2\), got \(2, 2\).*row 0 before any training"),
        (np.zeros((2, 3)), r"3 task\(s\) must have shape \(4, 3\), got \(2, 3\)"),
        (np.zeros((1, 0)), r"no task: its shape is \(1, 0\)"),
        ([[0.1, 0.2], [0.3], [0.4, 0.5]], r"rectangular array of numbers, got \[\[0\.1, 0\.2\], \[0\.3\]"),
        ([[0.1, 0.2], [0.3, None], [0.4, 0.5]], r"must be finite, got nan in row 1, task 2 \(shape \(3, 2\)\)"),
        ([[0.1], [math.inf]], r"must be finite, got inf in row 1, task 1"),
    ],
    ids=["1d", "3d", "row 0 missing", "transposed", "no task", "ragged", "none", "inf"],
)
@pytest.mark.parametrize("name", [*NAMES, "summarize"])
def test_malformed_matrix_is_refused(name, R, message):
    with pytest.raises(ValueError, match=message):
        getattr(metrics, name)(R)


@pytest.mark.parametrize(
    ("acc", "expected"), [(0.5, 0.0), (0.6, 0.25), (0.9, 1.0), (0.4, -0.25), (1.0, 1.25)], ids=str
)
def test_gap_recovered(acc, expected):
    assert metrics.gap_recovered(acc, acc_sequential=0.5, acc_joint=0.9) == pytest.approx(expected)


@pytest.mark.parametrize("acc_joint", [0.5, 0.4])
def test_gap_recovered_without_a_gap_is_nan(acc_joint):
    assert math.isnan(metrics.gap_recovered(0.6, acc_sequential=0.5, acc_joint=acc_joint))


def test_gap_recovered_refuses_a_run_that_did_not_finish():
    with pytest.raises(ValueError, match="acc_joint=nan"):
        metrics.gap_recovered(0.6, 0.5, math.nan)


def test_docstring_examples_of_the_functions():
    results = doctest.testmod(matrix)
    assert results.attempted >= 4 and results.failed == 0


def run_python(code: str, cwd: Path, *args: str, **env: str) -> str:
    """Standard output of `code` in a fresh interpreter that finds the package wherever it stands."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_numpy_alone(tmp_path):
    code = "import sys, classp_hf.metrics; print([m for m in ('torch', 'transformers', 'evaluate', 'datasets') if m in sys.modules])"
    assert run_python(code, tmp_path).strip() == "[]"


def test_load_refuses_an_unknown_name():
    with pytest.raises(ValueError, match=r"no metric 'base' of the accuracy matrix.*'backward_transfer'"):
        metrics.load("base")  # a file of that name stands beside the metrics


THROUGH_EVALUATE = """
import doctest, json, socket, sys
from pathlib import Path

def no_network(*args, **kwargs):
    raise AssertionError(f"network access: {args}")

socket.getaddrinfo = socket.socket.connect = no_network

import evaluate
from classp_hf import metrics

R, names = json.loads(sys.argv[1]), json.loads(sys.argv[2])
report = {}
for name in names:
    by_path = evaluate.load(str(Path(metrics.__file__).parent / "modules" / f"{name}.py"))
    by_name = metrics.load(name)
    example = doctest.DocTestParser().get_doctest(by_name.inputs_description, {}, name, None, None)
    ran = doctest.DocTestRunner(verbose=False).run(example, out=sys.stderr.write)
    try:
        by_name.compute(accuracy_matrix=[[0.5, 0.5], [0.5, 0.5]])
        error = None
    except ValueError as e:
        error = str(e)
    report[name] = {
        "by_path": by_path.compute(accuracy_matrix=R),
        "by_name": by_name.compute(accuracy_matrix=R),
        "one_task": by_name.compute(accuracy_matrix=[[0.25], [0.75]]),
        "error": error,
        "examples": [ran.attempted, ran.failed],
        "description": by_name.description,
        "citation": by_name.citation,
    }
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def through_evaluate(tmp_path_factory):
    """What the six `evaluate` modules say, in one offline interpreter (seconds to import) with caches of its own."""
    cache = tmp_path_factory.mktemp("hf")
    out = run_python(
        THROUGH_EVALUATE,
        cache,
        json.dumps(R3),
        json.dumps(NAMES),
        HF_HOME=str(cache),
        HF_MODULES_CACHE=str(cache / "modules"),
        HF_METRICS_CACHE=str(cache / "metrics"),
        HF_HUB_OFFLINE="1",
    )
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_evaluate_module_says_what_the_function_says(name, through_evaluate):
    said, function = through_evaluate[name], getattr(metrics, name)
    assert said["by_path"] == said["by_name"] == {name: function(R3)}
    assert said["one_task"][name] == pytest.approx(function([[0.25], [0.75]]), nan_ok=True)
    assert "must have shape (3, 2), got (2, 2)" in said["error"]


@pytest.mark.parametrize(
    ("name", "author"),
    zip(NAMES, ["Lopez-Paz", "Riemer", "Lopez-Paz", "Lopez-Paz", "Chaudhry", None], strict=True),
)
def test_evaluate_module_documents_itself(name, author, through_evaluate):
    said = through_evaluate[name]
    assert said["examples"] == [3, 0]  # three lines ran, none failed
    assert said["description"].startswith(getattr(metrics, name).__doc__.splitlines()[0])
    if author is None:
        assert said["citation"] == ""
    else:
        assert f"Source: {author}" in said["description"] and author in said["citation"]
