"""What a run leaves to be read: exact tables, the whole model card, no secret anywhere, no half-written file."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import classp_hf
from classp_hf import redaction, report
from classp_hf.memory import MEMORY_NAME
from classp_hf.metrics import summarize

GOLDEN = Path(__file__).parent / "data" / "model_card.md"
TOKEN = "hf_" + "Ab1" * 8
R = [[0.331, 0.31], [0.678, 0.402], [0.442, 0.788]]
TASKS = ["icwsm14/nyt", "fpb"]


def make_results(tasks=TASKS, accuracy_matrix=R, **changes):
    """results.json of CLASSP + EWC on two tasks, with secrets where a careless writer would leave them."""
    return {
        "tasks": tasks,
        "datasets": ["takala/financial_phrasebank"],
        "accuracy_matrix": accuracy_matrix,
        "metrics": summarize(accuracy_matrix),
        "label_names": ["negative", "neutral", "positive"],
        "method": {"name": "ewc", "ewc_lambda": 3.0, "ewc_mode": "online"},
        "optimizer": {"name": "CLASSP", "lr": 0.003, "power": 1.0, "eps": 1e-08, "apply_decay": True, "density": None},
        "arguments": {
            "output_dir": "/home/someone/out",
            "hub_model_id": "someone/kept",
            "hub_token": TOKEN,
            "learning_rate": 0.003,
            "optim": "classp",
            "optim_args": "power=1",
            "num_train_epochs": 2,
            "per_device_train_batch_size": 32,
            "warmup_steps": 0,
            "lr_scheduler_type": "linear",
            "seed": 0,
            "method": "ewc",
            "sequence_metric": "accuracy",
            "heads": "shared",
        },
        "versions": {"python": "3.11.7", "torch": "2.13.0", "peft": "not installed", "classp_hf": "0.1.0"},
        "hardware": {
            "platform": "Linux-6.1-x86_64",
            "cpu": "Some CPU",
            "cpu_count": 16,
            "torch_threads": 8,
            "gpus": ["NVIDIA H200", "NVIDIA H200"],
            "num_processes": 2,
        },
        "commit": "0123456789abcdef0123456789abcdef01234567-dirty",
        "command": f"python recipes/sentiment_sequence.py --hub_token {TOKEN} --learning_rate 3e-3",
        "seconds": 123.4,
        **changes,
    }


# ---- JSON -------------------------------------------------------------------------------------------------------------


def test_json_is_indented_and_creates_its_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "a.json"
    report.write_json(path, {"a": [1, None]})
    assert path.read_text() == '{\n  "a": [\n    1,\n    null\n  ]\n}\n'


def test_json_is_replaced_as_a_whole(tmp_path):
    """Who reads while it is written sees the old file, not a part of the new one."""
    path = tmp_path / "a.json"
    report.write_json(path, {"old": 1})
    with open(path) as reader:
        report.write_json(path, {"new": 1})
        assert json.load(reader) == {"old": 1}
    assert json.loads(path.read_text()) == {"new": 1}


@pytest.mark.parametrize("bad", [float("nan"), object()])
def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path, bad):
    path = tmp_path / "a.json"
    report.write_json(path, {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        report.write_json(path, {"new": 1, "bad": bad})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    report.write_json(path, {"old": 1})

    def disk_full(self, text, encoding):
        with open(self, "w") as file:
            file.write(text[:3])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(OSError, match="No space"):
        report.write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


# ---- Environment ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_from(tmp_path, monkeypatch):
    """A folder that the package seems to run from, and a function for git in it."""
    (tmp_path / "classp_hf").mkdir()
    monkeypatch.setattr(report, "__file__", str(tmp_path / "classp_hf" / "report.py"))

    def git(*command):
        name = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        return subprocess.run(
            ["git", *name, *command], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    return tmp_path, git


def test_environment_outside_of_git(run_from):
    found = report.environment(num_processes=3)
    assert found["commit"] is None
    assert found["hardware"]["num_processes"] == 3
    assert found["versions"]["torch"].startswith("2.")
    assert set(found["versions"]) == {"python", "torch", "transformers", "accelerate", "datasets", "peft", "classp_hf"}
    json.dumps(found, allow_nan=False)


def test_environment_without_git_and_without_a_package(run_from, monkeypatch):
    def missing(name):
        raise report.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(report.importlib.metadata, "version", missing)
    found = report.environment()
    assert found["commit"] is None
    assert found["versions"]["peft"] == "not installed"


def test_commit_of_a_clean_and_of_a_changed_checkout(run_from):
    folder, git = run_from
    git("init", "-q")
    assert report.environment()["commit"] is None  # no commit yet
    (folder / "file").write_text("a")
    git("add", "file")
    git("commit", "-qm", "message")
    head = git("rev-parse", "HEAD")
    assert report.environment()["commit"] == head
    (folder / "file").write_text("b")
    assert report.environment()["commit"] == f"{head}-dirty"


def test_a_package_installed_inside_another_checkout_does_not_claim_its_commit(run_from, monkeypatch):
    folder, git = run_from
    git("init", "-q")
    git("commit", "-qm", "another project's", "--allow-empty")
    monkeypatch.setattr(report, "__file__", str(folder / "venv" / "classp_hf" / "report.py"))
    (folder / "venv").mkdir()
    assert report.environment()["commit"] is None


# ---- Secrets ----------------------------------------------------------------------------------------------------------


def test_public_arguments_drop_secrets_at_any_depth():
    arguments = {
        "hub_token": "plain",
        "wandb_api_key": "plain",
        "DB_PASSWORD": "plain",
        "nested": {"client_secret": "plain", "rate": 1},
        "memory": f"prefix-{TOKEN}",
        "urls": ["https://me:plain@example.org/x"],
        "tokenizer_name": "kept",
        "seed": 0,
    }
    assert redaction.public_arguments(arguments) == {
        "nested": {"rate": 1},
        "memory": "prefix-REDACTED",
        "urls": ["https://REDACTED@example.org/x"],
        "tokenizer_name": "kept",
        "seed": 0,
    }
    assert arguments["nested"]["client_secret"] == "plain"  # the trainer still needs its own


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["t.py", "--hub_token", "plain", "--seed", "1"], "t.py --hub_token REDACTED --seed 1"),
        (["t.py", "--hub-token=plain", "--API-KEY", "plain"], "t.py --hub-token=REDACTED --API-KEY REDACTED"),
        (["t.py", "--password", "-1234"], "t.py --password REDACTED"),
        (["t.py", "--text", f"see {TOKEN}."], "t.py --text 'see REDACTED.'"),
        (["t.py", "--memory", "hf_oauth_a.b-c_d"], "t.py --memory REDACTED"),
        (["HF_TOKEN=plain", "t.py"], "HF_TOKEN=REDACTED t.py"),
        # Not secrets: a flag without a value before another flag, a file's name, a tokenizer.
        (["t.py", "--count_tokens", "--seed", "1"], "t.py --count_tokens --seed 1"),
        (["token_test.py", "--tokenizer_name", "bert"], "token_test.py --tokenizer_name bert"),
    ],
)
def test_public_command(argv, expected):
    assert redaction.public_command(argv) == expected


# ---- Tables -----------------------------------------------------------------------------------------------------------


def test_format_sequence_is_aligned():
    assert report.format_sequence(TASKS, R, summarize(R), "classp") == (
        "classp\n"
        "                   icwsm14/nyt   fpb\n"
        "at the start              33.1  31.0\n"
        "after icwsm14/nyt         67.8  40.2\n"
        "after fpb                 44.2  78.8\n"
        "\n"
        "average accuracy    61.5  (mean over all tasks at the end)\n"
        "learning accuracy   73.3  (mean over tasks, each right after its own training)\n"
        "backward transfer  -23.6  (points since each earlier task was learned; negative = forgetting)\n"
        "forward transfer    +9.2  (points over the model at the start, each task before its own training)\n"
        "forgetting          23.6  (points below each earlier task's best; positive = forgetting)\n"
        "retained accuracy  65.2, 100.0  (% of each task's own learned accuracy left at the end)"
    )


def test_tasks_that_were_learned_before_are_not_shown_as_trained(tmp_path):
    text = report.format_sequence(TASKS, R, summarize(R), "classp", learned=1)
    assert "learned before: icwsm14/nyt" in text and "after fpb" in text and text.endswith(report.LEARNED_BEFORE)


def test_format_sequence_of_one_task_has_undefined_metrics():
    one = [[0.0], [1.0]]
    text = report.format_sequence(["a"], one, summarize(one), "title")
    assert "after a       100.0\n" in text
    for metric in ("backward transfer", "forward transfer ", "forgetting       "):
        assert f"\n{metric}    n/a  (" in text


def test_format_comparison_says_what_was_learned_and_what_was_kept():
    arms = {
        "naive": make_results(),
        "a|b": make_results(accuracy_matrix=[[0.331, 0.31], [0.678, 0.402], [0.67797, 1.0]], seconds=1000),
    }
    assert report.format_comparison(arms) == (
        "| arm   |  icwsm14/nyt |   fpb |  ACC |   LA |   BWT | forgetting | seconds |\n"
        "| ----- | -----------: | ----: | ---: | ---: | ----: | ---------: | ------: |\n"
        "| naive | 67.8 -> 44.2 |  78.8 | 61.5 | 73.3 | -23.6 |       23.6 |     123 |\n"
        "| a\\|b  | 67.8 -> 67.8 | 100.0 | 83.9 | 83.9 |  +0.0 |        0.0 |    1000 |\n"
        "\n"
        "Accuracy in %: right after the task's own training -> after the last task."
    )


def test_arms_of_different_tasks_are_not_compared():
    with pytest.raises(ValueError, match="same tasks"):
        report.format_comparison({"a": make_results(), "b": make_results(tasks=["imdb", "fpb"])})
    with pytest.raises(ValueError, match="same tasks"):
        report.format_comparison({})


def test_a_matrix_that_does_not_fit_the_tasks_is_refused():
    with pytest.raises(ValueError, match=re.escape("3 tasks need 4 rows of 3 columns, got 3 rows of [2] columns.")):
        report.format_sequence(["a", "b", "c"], R, summarize(R), "title")


# ---- Figures ----------------------------------------------------------------------------------------------------------


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def drawn(monkeypatch):
    """The figures that are saved from now on."""
    figures = []
    save = report._save
    monkeypatch.setattr(report, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def test_accuracy_matrix_figure_grows_with_the_tasks(tmp_path):
    for T in (1, 2, 10):
        matrix = [[(t + j) / 20 for j in range(T)] for t in range(T + 1)]
        report.plot_accuracy_matrix([f"task-{j}" for j in range(T)], matrix, tmp_path / f"{T}.png", "title")
    small, large = png_size(tmp_path / "2.png"), png_size(tmp_path / "10.png")
    assert 500 < small[0] < large[0] < 2500 and 250 < small[1] < large[1] < 2000
    assert sorted(os.listdir(tmp_path)) == ["1.png", "10.png", "2.png"]


def test_accuracy_matrix_figure_puts_the_numbers_in_their_cells(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    report.plot_accuracy_matrix(TASKS, R, tmp_path / "a.png", "title")
    axes = figures[0].axes[0]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (j, t): f"{100 * R[t][j]:.1f}" for t in range(3) for j in range(2)
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["at the start", "after icwsm14/nyt", "after fpb"]


def test_retention_figure_has_a_panel_a_task_and_a_line_an_arm(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    tasks = [f"task-{j}" for j in range(4)]
    matrix = [[(t + 4 * j) / 20 for j in range(4)] for t in range(5)]
    arms = {name: make_results(tasks=tasks, accuracy_matrix=matrix) for name in ("naive", "classp", "ewc")}
    report.plot_retention(arms, tmp_path / "a.png")
    panels = [axes for axes in figures[0].axes if axes.axison]
    assert [axes.get_title() for axes in panels] == ["1. task-0", "2. task-1", "3. task-2", "4. task-3"]
    for j, axes in enumerate(panels):
        trained, *lines = axes.get_lines()
        assert list(trained.get_xdata()) == [j + 1, j + 1]
        assert [list(line.get_ydata()) for line in lines] == [[100 * row[j] for row in matrix]] * 3
        assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 3
        assert axes.get_ylim() == (0, 100)
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == ["the task's own training", "naive", "classp", "ewc"]
    width, height = png_size(tmp_path / "a.png")
    assert 800 < width < 2500 and 500 < height < 2000


def test_figures_leave_pyplot_alone(tmp_path):
    """A caller in a notebook keeps its backend: pyplot is not even imported."""
    code = (
        "import sys; from classp_hf import report; "
        f"report.plot_accuracy_matrix(['a'], [[0.0], [1.0]], {str(tmp_path / 'a.png')!r}, 'title'); "
        "assert 'matplotlib.figure' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(classp_hf.__file__).parents[1])


def test_without_matplotlib_figures_say_what_to_install_and_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape('pip install "classp_hf[demo]"')):
        report.plot_retention({"a": make_results()}, tmp_path / "a.png")
    report.write_figures(tmp_path, make_results())
    assert os.listdir(tmp_path) == []


def test_write_figures_writes_both(tmp_path):
    report.write_figures(tmp_path, make_results())
    assert sorted(os.listdir(tmp_path)) == ["accuracy_matrix.png", "retention.png"]


# ---- Model card -------------------------------------------------------------------------------------------------------


@pytest.fixture
def write_card(tmp_path):
    def write(results, *, memory=True, figures=(), base_model="sentence-transformers/all-MiniLM-L6-v2", **kwargs):
        path = tmp_path / "kept" / "README.md"
        path.parent.mkdir(exist_ok=True)
        for name in [*([MEMORY_NAME] if memory else []), *figures]:
            (path.parent / name).touch()
        report.write_model_card(path, results=results, base_model=base_model, **kwargs)
        return path

    return write


def test_model_card_as_a_whole(write_card):
    """After an intended change: `UPDATE_GOLDEN=1 pytest tests/test_report.py`, and read the difference."""
    results = make_results()
    before = copy.deepcopy(results)
    path = write_card(results, license="apache-2.0", figures=["accuracy_matrix.png"])
    if "UPDATE_GOLDEN" in os.environ:
        GOLDEN.write_bytes(path.read_bytes())
    assert path.read_text() == GOLDEN.read_text()
    assert results == before
    assert sorted(os.listdir(path.parent)) == ["README.md", "accuracy_matrix.png", MEMORY_NAME]


def test_model_card_metadata_is_what_the_hub_reads(write_card):
    card = ModelCard.load(write_card(make_results()))
    data = card.data.to_dict()
    index = data.pop("model-index")
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["continual-learning", "classp", "ewc"],
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "datasets": ["takala/financial_phrasebank"],
    }
    assert [model["name"] for model in index] == ["kept"]
    values = {r["dataset"]["name"]: r["metrics"][0]["value"] for r in index[0]["results"]}
    assert values == {"icwsm14/nyt": 0.442, "fpb": 0.788}
    assert {r["metrics"][0]["type"] for r in index[0]["results"]} == {"accuracy"}


def test_model_card_never_holds_a_secret(write_card):
    results = make_results()
    results["arguments"] |= {"wandb_api_key": "plain-secret", "optim_args": f"power=1,x={TOKEN}"}
    results["command"] += " --password plain-secret"
    text = write_card(results).read_text()
    assert "hf_" not in text.replace("classp_hf", "")
    assert "plain-secret" not in text


def test_model_card_of_a_run_without_memory_method_or_hub(write_card, tmp_path, monkeypatch):
    (tmp_path / "private" / "my-base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    results = make_results(method={"name": "none"}, optimizer={"name": "AdamW", "lr": 1e-4}, commit=None, datasets=[])
    del results["arguments"]["hub_model_id"]
    results["hardware"] = {**results["hardware"], "gpus": [], "num_processes": 1}
    path = write_card(results, memory=False, base_model="private/my-base")  # a folder that looks like a Hub id
    text = path.read_text()
    data = ModelCard.load(path).data
    assert data.base_model is None and data.tags == ["continual-learning", "adamw"] and data.datasets is None
    assert "`my-base`" in text and "private" not in text
    assert 'repo = "kept"' in text
    assert MEMORY_NAME not in text and "kirkpatrick" not in text and "ludwig2024classp" in text
    assert "no GPU" in text and "1 process;" in text and "Commit" not in text


@pytest.mark.parametrize(
    ("method", "optimizer", "expected"),
    [
        (
            {"name": "ewc", "ewc_lambda": 3.0},
            "CLASSP",
            ['METHODS["ewc"](ewc_lambda=3.0)', "trainer = ContinualTrainer(", 'optim="classp"'],
        ),
        ({"name": "none"}, "CLASSP", ["trainer = ContinualTrainer(", 'optim="classp"']),
        (
            {"name": "logit_adjustment", "prior_strength": 0.5},
            "CLASSP",
            ['METHODS["logit_adjustment"](prior_strength=0.5)', "trainer = ClasspTrainer("],
        ),
        (
            {
                "name": "l2sp+ema",
                "l2sp_alpha": 1,
                "ema_decay": 0.9,
                "parts": [{"name": "l2sp", "l2sp_alpha": 1}, {"name": "ema"}],
            },
            "AdamW",
            ['method=[METHODS["l2sp"](l2sp_alpha=1), METHODS["ema"]()]'],
        ),
        ({"name": "l2sp"}, "AdamW", ['METHODS["l2sp"]()', "trainer = ContinualTrainer(", 'optim="adamw_torch"']),
    ],
)
def test_model_card_code_is_python_with_names_that_exist(write_card, method, optimizer, expected):
    results = make_results(method=method, optimizer={"name": optimizer})
    results["arguments"]["optim"] = "classp" if optimizer == "CLASSP" else "adamw_torch"
    code = "".join(re.findall(r"```python\n(.*?)```", write_card(results).read_text(), re.DOTALL))
    compile(code, "card", "exec")
    names = re.search(r"from classp_hf import (.*)", code)[1].split(", ")
    assert all(name in classp_hf.__all__ for name in names)
    assert all(code.count(name) > 1 for name in names)  # and that are used
    for text in expected:
        assert text in code


HOSTILE = "a`b``<img src=x onerror=alert(1)>|\n---\n# [x](http://evil.example) **b** ![i](j.png)\n```\n{{ 7 * 7 }} __c__ ~~d~~"


def test_no_name_breaks_the_model_card_or_adds_to_it(write_card, tmp_path):
    """With hostile text in every place that names anything, the card has the same blocks, and no link, image or HTML."""
    from markdown_it import MarkdownIt

    def card(text):
        results = make_results(tasks=["fpb", text], label_names=["negative", text], metric=text, datasets=[text])
        results["method"] = {"name": "ewc", "ewc_lambda": 3.0, "ewc_mode": text}
        results["optimizer"] |= {"name": text}
        results["arguments"] |= {"hub_model_id": text, "optim_args": text, "run_name": text, "warmup_steps": text}
        results["command"] = f"python train.py --text {shlex.quote(text)}"
        return write_card(results, base_model=text.replace("/", ""), license=text, tags=[text])

    shown = []
    for text in ("plain", HOSTILE):
        path = card(text)
        content = path.read_text()
        tokens = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(ModelCard.load(path).text)
        inline = {child.type for token in tokens for child in token.children or ()}
        shown.append(([token.type for token in tokens], inline - {"softbreak", "text_special"}))
        code = "".join(re.findall(r"^```python\n(.*?)^```", content, re.DOTALL | re.MULTILINE))
        compile(code, "card", "exec")
    assert shown[0] == shown[1]
    assert shown[1][1] <= {"text", "code_inline", "strong_open", "strong_close"}
    data = ModelCard.load(path).data
    assert data.datasets == [HOSTILE] and data.license == HOSTILE and HOSTILE in data.tags
    assert "49" not in content  # no template of its own
    cell = next(child for token in tokens for child in token.children or () if "after" in child.content)
    assert cell.content  # names are shown, as they are
    assert "<img src=x onerror=alert(1)>" in "".join(c.content for t in tokens for c in t.children or ())


def test_a_failing_model_card_leaves_the_old_one(write_card):
    path = write_card(make_results())
    old = path.read_text()
    with pytest.raises(ValueError, match="1 tasks need 2 rows"):
        write_card(make_results() | {"tasks": ["only"]})
    assert path.read_text() == old
