"""The metrics of the accuracy matrix: by hand on small matrices, and through `evaluate` without network."""

import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from warm_python import python

from classp_hf import metrics

# Task 1 is best after task 2 (0.9), so forgetting and -BWT differ. No two of the metrics have the same value.
R3 = [[0.1, 0.2, 0.3], [0.8, 0.3, 0.2], [0.9, 0.7, 0.5], [0.6, 0.5, 0.9]]
BY_HAND = {
    "average_accuracy": (0.6 + 0.5 + 0.9) / 3,
    "learning_accuracy": (0.8 + 0.7 + 0.9) / 3,
    "backward_transfer": ((0.6 - 0.8) + (0.5 - 0.7)) / 2,
    "forward_transfer": ((0.3 - 0.2) + (0.5 - 0.3)) / 2,
    "forgetting": ((0.9 - 0.6) + (0.7 - 0.5)) / 2,
    "retained_accuracy": [0.6 / 0.8, 0.5 / 0.7, 1.0],
    "performance_maintenance": (((0.9 - 0.8) + (0.6 - 0.8)) / 2 + (0.5 - 0.7)) / 2,
}


def test_three_tasks_by_hand():
    summary = metrics.summarize(np.array(R3, dtype=np.float32))
    assert list(summary) == list(BY_HAND)
    for name, value in json.loads(json.dumps(summary, allow_nan=False)).items():  # a numpy float or a nan fails here
        assert value == pytest.approx(BY_HAND[name]) and getattr(metrics, name)(R3) == pytest.approx(value)


def test_signs_and_what_does_not_count_as_forgetting():
    helped = [[0.0, 0.0], [0.5, 0.0], [0.7, 0.9]]
    assert metrics.backward_transfer(helped) == pytest.approx(0.2) == -metrics.forgetting(helped)
    assert metrics.retained_accuracy(helped) == pytest.approx([1.4, 1.0])
    assert metrics.forward_transfer([[0.5, 0.5], [0.9, 0.3], [0.9, 0.9]]) == pytest.approx(-0.2)
    assert metrics.forgetting([[0.9, 0.9, 0.9], [0.5, 0.9, 0.9], [0.5, 0.4, 0.9], [0.5, 0.4, 0.5]]) == 0.0


def test_of_a_loss_the_signs_keep_their_meaning():
    loss = metrics.summarize([[4.0, 3.0], [1.0, 2.5], [2.0, 0.5]], greater_is_better=False)
    assert loss["average_accuracy"] == 1.25 and loss["learning_accuracy"] == 0.75
    assert loss["backward_transfer"] == -1.0 and loss["forgetting"] == 1.0 and loss["forward_transfer"] == 0.5
    assert loss["retained_accuracy"] == [0.5, 1.0]


@pytest.mark.filterwarnings("error")  # numpy warns about the mean of nothing, and about a division by zero
def test_what_is_not_defined_is_nan_and_none_in_the_summary():
    one = [[0.25], [0.75]]
    assert all(math.isnan(f(one)) for f in (metrics.backward_transfer, metrics.forward_transfer, metrics.forgetting))
    undefined = {"backward_transfer": None, "forward_transfer": None, "forgetting": None}
    undefined["performance_maintenance"] = None
    defined = {"average_accuracy": 0.75, "learning_accuracy": 0.75, "retained_accuracy": [1.0]}
    assert metrics.summarize(one) == undefined | defined
    assert metrics.summarize([[0.0, 0.0], [0.0, 0.0], [0.5, 0.5]])["retained_accuracy"] == [None, 1.0]


def test_a_malformed_matrix_is_refused():
    for R, message in (
        ([0.5, 0.5], r"must have shape \(T\+1, T\), got \(2,\)"),
        (np.zeros((2, 2)), r"got \(2, 2\).*a row before any training"),
        (np.zeros((1, 0)), r"got \(1, 0\)"),
        ([[0.1, 0.2], [0.3], [0.4, 0.5]], "inhomogeneous shape"),
        ([[0.1, 0.2], [0.3, None], [0.4, 0.5]], r"must be finite, got .*\[0\.3, nan\]"),
    ):
        for function in (*metrics.METRICS, metrics.summarize):
            with pytest.raises(ValueError, match=message):
                function(R)


def test_learning_curves_against_those_of_an_expert():
    ours, expert = [0.2, 0.6, 0.9, 0.7], [0.1, 0.2, 0.5, 0.5, 0.75]
    assert metrics.relative_performance(ours, expert) == pytest.approx(2.4 / 1.3)
    assert metrics.sample_efficiency(ours, expert) == pytest.approx(0.9 / 0.75 * 5 / 3)
    assert metrics.relative_performance(expert, expert) == metrics.sample_efficiency(expert, expert) == 1
    assert math.isnan(metrics.relative_performance(ours, [0, 0])) and math.isnan(metrics.sample_efficiency(ours, [0]))


def test_gap_recovered():
    for acc, expected in ((0.5, 0.0), (0.6, 0.25), (0.9, 1.0), (0.4, -0.25), (1.0, 1.25)):
        assert metrics.gap_recovered(acc, acc_sequential=0.5, acc_joint=0.9) == pytest.approx(expected)
    assert math.isnan(metrics.gap_recovered(0.6, acc_sequential=0.5, acc_joint=0.5))
    assert math.isnan(metrics.gap_recovered(0.6, 0.5, math.nan))


THROUGH_EVALUATE = """
import sys, classp_hf.metrics as metrics
assert not {"torch", "transformers", "evaluate", "datasets"} & set(sys.modules)
import doctest, evaluate
from pathlib import Path

R = [[0.1, 0.2], [0.8, 0.3], [0.6, 0.7]]
path = str(Path(metrics.__file__).with_name("accuracy_matrix.py"))
assert doctest.testmod(metrics) == (0, 2)
for function, author in zip(metrics.METRICS, ("Lopez", "Riemer", "Lopez", "Lopez", "Chaudhry", "", "New")):
    name, metric = function.__name__, metrics.load(function.__name__)
    for one in (metric, evaluate.load(path, name)):
        assert one.compute(accuracy_matrix=R) == {name: function(R)}
    assert metric.description.startswith(function.__doc__.splitlines()[0]) and author in metric.citation
example = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, name, None, None)
assert doctest.DocTestRunner(verbose=False).run(example, out=sys.stderr.write) == (0, 3)
for wrong in (lambda: metric.compute(accuracy_matrix=R[1:]), lambda: metrics.load("base")):
    try:
        print(wrong())
    except ValueError as error:
        print(error)
"""


def test_every_metric_through_evaluate(tmp_path):
    """By name and by path, in an interpreter without a network or other caches."""
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [python(), "-c", THROUGH_EVALUATE]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == 2 and "must have shape (T+1, T), got (2, 2)" in said[0], done.stderr
    assert said[1].startswith("Unknown metric 'base' of the accuracy matrix. Choose one of ['average_accuracy', ")
