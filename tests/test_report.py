"""What a run leaves to be read: exact tables, figures with the numbers in their places, the whole model card."""

import io
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import classp_hf
from classp_hf import ClasspTrainer, report
from classp_hf.memory import MEMORY_NAME
from classp_hf.metrics import summarize
from classp_hf.report import figures, results

GOLDEN = Path(__file__).parent / "data" / "model_card.md"
R = [[0.331, 0.31], [0.678, 0.402], [0.442, 0.788]]
BASE = "sentence-transformers/all-MiniLM-L6-v2"
EWC = {"name": "ewc", "ewc_lambda": 3.0, "ewc_mode": "online"}
TASKS = ["icwsm14/nyt", "fpb"]


def make_results(tasks=TASKS, accuracy_matrix=R, **changes):
    """results.json of CLASSP + EWC on two tasks."""
    arguments = {"output_dir": "/home/me/out", "hub_model_id": "someone/kept", "hub_token": "plain-secret", "seed": 0}
    arguments |= {"learning_rate": 0.003, "optim": "classp", "optim_args": "power=1", "warmup_steps": 0}
    hardware = {"platform": "Linux-6.1-x86_64", "cpu": "Some CPU", "cpu_count": 16, "torch_threads": 8}
    found = {"tasks": tasks, "accuracy_matrix": accuracy_matrix, "metrics": summarize(accuracy_matrix)}
    found |= {"datasets": ["takala/financial_phrasebank"], "label_names": ["negative", "neutral", "positive"]}
    found |= {"method": EWC, "arguments": arguments, "seconds": 123.4, "commit": "0123abcd-dirty"}
    found |= {"optimizer": {"name": "CLASSP", "lr": 0.003, "eps": 1e-08, "apply_decay": True, "density": None}}
    found |= {"hardware": {**hardware, "gpus": ["NVIDIA H200", "NVIDIA H200"], "num_processes": 2}}
    found |= {"versions": {"python": "3.11.7", "torch": "2.13.0", "peft": "not installed"}}
    return found | {"command": "python recipes/a.py --hub_token plain-secret --learning_rate 3e-3", **changes}


@pytest.mark.parametrize("bad", [float("nan"), object()])
def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path, bad):
    report.write_json(tmp_path / "a.json", {"old": [1, None]})
    with pytest.raises((ValueError, TypeError)):
        report.write_json(tmp_path / "a.json", {"new": 1, "bad": bad})
    assert (tmp_path / "a.json").read_text() == '{\n  "old": [\n    1,\n    null\n  ]\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_environment_says_which_code_ran_and_on_what(tmp_path, monkeypatch):
    """The commit of the package's own checkout, never that of a project whose virtual environment holds it."""

    def git(*command):
        command = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", *command]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    def found_in(folder):
        monkeypatch.setattr(results, "__file__", str(folder / "classp_hf" / "report" / "results.py"))
        return report.environment(num_processes=3)

    assert found_in(tmp_path)["commit"] is None
    git("init", "-q")
    assert found_in(tmp_path)["commit"] is None  # no commit yet
    git("commit", "-qm", "message", "--allow-empty")
    git("tag", "v1")
    assert found_in(tmp_path)["commit"] == git("rev-parse", "HEAD")
    (tmp_path / "file").touch()
    git("add", "file")
    assert found_in(tmp_path)["commit"] == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 5}, raising=False)  # a container's CPUs
    found = found_in(tmp_path / "venv")
    assert found["commit"] is None and found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["hardware"]["cpu_count"] == 2 and found["hardware"]["num_processes"] == 3


def test_tables_are_aligned_and_say_how_to_read_them():
    """The whole of them in percent is in the model card below."""
    found = make_results()
    found["arguments"]["learned_tasks"] = 1
    matrix, metrics, note = report.sequence_tables(found)
    assert matrix.splitlines()[2:] == [
        "| at the start                |        33.1 |     31.0 |",
        "| learned before: icwsm14/nyt |        67.8 |     40.2 |",
        "| after fpb                   |        44.2 | **78.8** |",
    ]
    assert note == "Tasks learned before this run count as learned with what they had at its start."
    loss = make_results(["a"], [[2.5], [0.75]], metric="loss", greater_is_better=False)
    loss["metrics"] = summarize(loss["accuracy_matrix"], greater_is_better=False)
    matrix, metrics = report.sequence_tables(loss)
    assert "| after a      | **0.750** |" in matrix and re.search(r"backward transfer +\| +n/a \| gain of", metrics)


def test_format_comparison_says_what_was_learned_and_what_was_kept():
    other = make_results(accuracy_matrix=[[0.331, 0.31], [0.678, 0.402], [0.67797, 1.0]], seconds=1000)
    assert report.format_comparison({"naive": make_results(), "a|b": other}) == (
        "| arm   |  icwsm14/nyt |   fpb |  ACC |   LA |   BWT | forgetting | seconds |\n"
        "| ----- | -----------: | ----: | ---: | ---: | ----: | ---------: | ------: |\n"
        "| naive | 67.8 -> 44.2 |  78.8 | 61.5 | 73.3 | -23.6 |       23.6 |     123 |\n"
        "| a\\|b  | 67.8 -> 67.8 | 100.0 | 83.9 | 83.9 |  +0.0 |        0.0 |    1000 |\n"
        "\n"
        "Accuracy in %: right after the task's own training -> after the last task."
    )


@pytest.mark.parametrize("T", [1, 4, pytest.param(25, marks=pytest.mark.slow)])
def test_figures_put_the_numbers_in_their_places(tmp_path, monkeypatch, T):
    """Of names that are formulas to matplotlib, too; and pyplot, whose backend is the caller's, is not touched."""
    drawn = []
    save = figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: (drawn.append(figure), save(figure, path)))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    tasks = [f"$x^$ {j}" for j in range(T)]
    matrix = [[(t + j) / 100 for j in range(T)] for t in range(T + 1)]
    found = make_results(tasks, matrix, importance={f"layer.{i}": [0.5] * (T + 1) for i in range(3)})
    report.write_figures(tmp_path, found)
    assert sorted(os.listdir(tmp_path)) == ["accuracy_matrix.png", "importance.png", "retention.png"]
    axes = drawn[0].axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(j, t): f"{t + j:.1f}" for t in range(T + 1) for j in range(T)}
    assert axes.get_yticklabels()[1].get_text() == "after \\$x^\\$ 0"
    report.plot_retention({"naive": found, "ewc": found}, tmp_path / "retention.png")
    panels = [axes for axes in drawn[-1].axes if axes.axison]
    last = min(T, 12)  # of many tasks the first twelve have a panel
    assert len(panels) == last and panels[-1].get_title() == f"{last}. \\$x^\\$ {last - 1}"
    trained, *lines = panels[-1].get_lines()
    assert list(trained.get_xdata()) == [last, last] and panels[-1].get_ylim() == (0, 100)
    assert [list(line.get_ydata()) for line in lines] == [[100 * row[last - 1] for row in matrix]] * 2
    legend = [text.get_text() for text in drawn[-1].legends[0].get_texts()]
    assert legend == ["the task's own training", "naive", "ewc"]


def test_without_matplotlib_figures_say_what_to_install_and_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape('pip install "classp_hf[demo]"')):
        report.plot_retention({"a": make_results()}, tmp_path / "a.png")
    report.write_figures(tmp_path, make_results())
    assert os.listdir(tmp_path) == []


def write_card(folder, results, holds=(MEMORY_NAME,), base_model=BASE, **kwargs):
    path = folder / "kept" / "README.md"
    path.parent.mkdir(exist_ok=True)
    for name in holds:
        (path.parent / name).touch()
    report.write_model_card(path, results, base_model, **kwargs)
    return path


def test_model_card_as_a_whole(tmp_path):
    """But for metadata, code, citations. After an intended change: `UPDATE_GOLDEN=1 pytest tests/test_report.py`."""
    path = write_card(tmp_path, make_results(), license="apache-2.0", holds=[MEMORY_NAME, "accuracy_matrix.png"])
    text, data = path.read_text(), ModelCard.load(path).data
    card = text[text.index("# kept") : text.index("\n## How to load it")]
    if "UPDATE_GOLDEN" in os.environ:
        GOLDEN.write_text(card)
    assert card == GOLDEN.read_text() and "plain-secret" not in card
    assert re.findall(r"@article{(\w+)", text) == ["ludwig2024classp", "kirkpatrick2017overcoming"]
    assert data.base_model == BASE and data.license == "apache-2.0" and data.library_name == "transformers"
    assert data.tags == ["continual-learning", "classp", "ewc"] and data.pipeline_tag == "text-classification"
    values = {x.dataset_name: (x.metric_type, x.metric_value) for x in data.eval_results}
    assert values == {"icwsm14/nyt": ("accuracy", 0.442), "fpb": ("accuracy", 0.788)}


def test_model_card_of_a_run_without_memory_method_or_hub(tmp_path, monkeypatch):
    (tmp_path / "private" / "my-base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = make_results(method={"name": "none"}, optimizer={"name": "AdamW", "lr": 1e-4}, commit=None, datasets=[])
    del found["arguments"]["hub_model_id"]
    found["hardware"] |= {"gpus": [], "num_processes": 1}
    path = write_card(tmp_path, found, holds=(), base_model="private/my-base")  # a folder that looks like a Hub id
    text, data = path.read_text(), ModelCard.load(path).data
    assert data.base_model is None and data.tags == ["continual-learning", "adamw"] and data.datasets is None
    assert "`my-base`" in text and "private" not in text and 'repo = "kept"' in text
    assert MEMORY_NAME not in text and "kirkpatrick" not in text and "ludwig2024classp" in text
    assert "no GPU" in text and "1 process;" in text and "Commit" not in text


TWO = {"name": "l2sp+ema", "l2sp_alpha": 1, "parts": [{"name": "l2sp", "l2sp_alpha": 1}, {"name": "ema"}]}


@pytest.mark.parametrize("changes", [{}, {"peft": True}, {"peft": True, "label_names": [], "folds_adapters": True}])
def test_model_card_code_is_python_with_names_that_exist(tmp_path, changes):
    for method, optim, trainer, expected in (
        ({"name": "none"}, "classp", "ContinualTrainer", 'optim="classp",'),
        (EWC, "classp", "ContinualTrainer", 'method=METHODS["ewc"](ewc_lambda=3.0, ewc_mode="online"),'),
        ({"name": "pseudo_rehearsal"}, "classp", "ClasspTrainer", 'method=METHODS["pseudo_rehearsal"](),'),
        (TWO, "adamw_torch", "ContinualTrainer", 'method=[METHODS["l2sp"](l2sp_alpha=1), METHODS["ema"]()],'),
    ):
        found = make_results(method=method, **changes)
        found["optimizer"]["name"] = "CLASSP" if optim == "classp" else "AdamW"
        found["arguments"]["optim"] = optim
        code = "".join(re.findall(r"```python\n(.*?)```", write_card(tmp_path, found).read_text(), re.DOTALL))
        compile(code, "card", "exec")
        names = re.search(r"from classp_hf import (.*)", code)[1].split(", ")
        assert all(name in classp_hf.__all__ and code.count(name) > 1 for name in names)
        expected = [expected, f"trainer = {trainer}(", "    learning_rate=0.003,", 'repo = "someone/kept"']
        assert [text for text in expected if text not in code] == []


@pytest.mark.parametrize(
    ("auto_class", "pipeline", "loads"),
    [
        ("AutoModelForTokenClassification", "token-classification", "AutoTokenizer.from_pretrained(repo)"),
        ("AutoModelForImageClassification", "image-classification", "AutoProcessor.from_pretrained(repo)"),
        ("BertForMultipleChoice", None, "BertForMultipleChoice.from_pretrained(repo)"),
        ("Bag", None, "`model.safetensors` holds the weights of `Bag`"),
    ],
)
def test_model_card_of_other_models(auto_class, pipeline, loads, tmp_path):
    path = write_card(tmp_path, make_results(auto_class=auto_class))
    text = path.read_text()
    assert ModelCard.load(path).data.pipeline_tag == pipeline and loads in text and "load_task" not in text
    assert ("trainer.train_sequence([Task(" in text) == (auto_class != "Bag")
    compile("".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), "card", "exec")


HOSTILE = "a`b``<img src=x onerror=alert(1)>|\n---\n# [x](http://evil.example) **b** ![i](j.png)\n```\n{{ 7*7 }} __c__"


def test_no_name_breaks_the_model_card_or_adds_to_it(tmp_path):
    """With hostile text wherever anything is named, the card has the same blocks, and no link, image or HTML."""
    from markdown_it import MarkdownIt

    shown = []
    for text in ("plain", HOSTILE):
        found = make_results(["fpb", text], label_names=["negative", text], metric=text, datasets=[text])
        found["arguments"] |= {"hub_model_id": text, "optim_args": text, "run_name": text, "warmup_steps": text}
        found["command"] = f"python train.py --text {shlex.quote(text)}"
        found["method"] = {"name": "ewc", "ewc_mode": text}
        found["optimizer"]["name"] = text
        path = write_card(tmp_path, found, base_model=text.replace("/", ""), license=text, tags=[text])
        tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard.load(path).text)
        inline = {child.type for token in tokens for child in token.children or ()}
        shown.append(([token.type for token in tokens], inline - {"softbreak", "text_special"}))
        compile("".join(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.M)), "card", "exec")
    assert shown[0] == shown[1] and shown[1][1] <= {"text", "code_inline", "strong_open", "strong_close"}
    data = ModelCard.load(path).data
    assert data.datasets == [HOSTILE] and data.license == HOSTILE and HOSTILE in data.tags
    assert "49" not in path.read_text()  # no template of its own
    assert "<img src=x onerror=alert(1)>" in "".join(c.content for t in tokens for c in t.children or ())


class Page(HTMLParser):
    """A page's elements: every opened one is closed again. `cells` are the heat map's, row by row."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.sources, self.cells, self.text = [], [], [], [[]], path.read_text()
        self.feed(self.text)
        assert not self.open, self.open
        self.cells = [row for row in self.cells if row]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open += [tag] if tag not in ("meta", "img", "link") else []
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.cells.append([])
        self.own = tag == "td" and " own" in dict(attrs).get("class", "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["td"] and self.tags.count("table") == 1:
            self.cells[-1].append(f"[{data}]" if self.own else data)


def test_the_page_shows_r_and_loads_nothing(tmp_path):
    found = make_results(guard={"summary": "General text: loss 1 -> 2.", "texts": "own samples", "tokens": 7})
    report.write_figures(tmp_path, found)
    report.write_page(tmp_path / "results.html", found)
    page = Page(tmp_path / "results.html")
    assert page.cells == [["33.1", "31.0"], ["[67.8]", "40.2"], ["44.2", "[78.8]"]]
    assert [source[:22] for source in page.sources] == ["data:image/png;base64,"]
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[^\"]*", "", page.text))
    assert "General text: loss 1 -&gt; 2. Measured on own samples (7 tokens)" in page.text
    assert "123 s" in page.text and "commit of classp_hf 0123abcd-dirty" in page.text and "2 processes" in page.text
    assert "--hub_token REDACTED --learning_rate 3e-3" in page.text and "plain-secret" not in page.text


def test_no_name_adds_to_the_page(tmp_path, monkeypatch):
    """And without matplotlib there are the heat map and the tables."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    pages = []
    for text in ("plain", "<script>alert(1)</script>\" onload='x' {{ 7*7 }} \u202e"):
        found = make_results([text, "fpb"], metric=text, command=f"python {shlex.quote(text)}", versions={text: text})
        found |= {"method": {"name": text, "mode": text}, "guard": {"summary": text, "texts": text, "tokens": 1}}
        found["hardware"] |= {"gpus": [text], "cpu": text, "platform": text}
        report.write_figures(tmp_path, found)
        report.write_page(tmp_path / "results.html", found)
        pages.append(Page(tmp_path / "results.html"))
    assert pages[0].tags == pages[1].tags and "script" not in pages[1].tags and "img" not in pages[1].tags
    assert pages[0].cells == pages[1].cells and "\u202e" not in pages[1].text and "49" not in pages[1].text
    assert pages[1].text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10


def test_scores_below_zero_are_seen(tmp_path, monkeypatch):
    """A negative share is no colour; and the panel of log-likelihoods ended below the best of them."""
    report.write_page(tmp_path / "results.html", make_results(["a"], [[-0.2], [0.5]], metric="mcc"))
    assert re.findall(r"--share: (.*?)%", Page(tmp_path / "results.html").text) == ["0", "58"]
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    report.plot_retention({"a": make_results(["a"], [[-3.0], [-1.0]])}, tmp_path / "a.png")
    low, high = drawn[0].axes[0].get_ylim()
    assert low <= -3 and high >= -1


def test_a_resumed_run_writes_its_page(make_model, make_tasks, make_args, collator, tmp_path):
    first = ClasspTrainer(make_model(), make_args(), collator).train_sequence(make_tasks(2))
    assert first["peak_memory"] is None or 1e7 < first["peak_memory"] < 1e12
    for name in ("results.json", "results.html"):
        (tmp_path / "run" / name).unlink()
    trainer = ClasspTrainer(make_model(), make_args(), collator)
    results = trainer.train_sequence(make_tasks(2), resume_from_checkpoint=True)
    cells = [[f"{100 * value:.1f}" for value in row] for row in results["accuracy_matrix"]]
    assert [[c.strip("[]") for c in row] for row in Page(tmp_path / "run" / "results.html").cells] == cells


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("shown", [True, False], ids=["terminal", "file"])
def test_one_bar_over_the_sequence(make_model, make_tasks, make_args, collator, monkeypatch, shown):
    monkeypatch.setattr(sys, "stderr", Terminal() if shown else io.StringIO())
    args = make_args(disable_tqdm=False)
    results = ClasspTrainer(make_model(), args, collator).train_sequence(make_tasks(2))
    said = sys.stderr.getvalue()
    assert "8/8 [" in said  # Trainer's own
    (_, (a, _), (b, c)) = ([100 * value for value in row] for row in results["accuracy_matrix"])
    steps = ["Task 1/2 first", "Task 1/2 first, step ", f"Task 2/2 second; earlier tasks: accuracy {a:.1f}%  50%|"]
    steps.append(f"2/2 tasks; all tasks: accuracy {(b + c) / 2:.1f}% 100%|")
    places = [said.find(step) for step in steps]
    assert places == sorted(places) and (min(places) >= 0 if shown else max(places) < 0)
    args = make_args(disable_tqdm=True, output_dir=str(args.output_dir) + "2")
    monkeypatch.setattr(sys, "stderr", Terminal())
    ClasspTrainer(make_model(), args, collator).train_sequence(make_tasks(2))
    assert "Task" not in sys.stderr.getvalue()
