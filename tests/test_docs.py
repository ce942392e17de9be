"""What README.md, CONTRIBUTING.md and docs/ show works: Python runs, with tiny models and few rows; commands parse."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import test_language
from accelerate.commands.launch import launch_command_parser
from fake_hub import FakeHub
from transformers import LlamaConfig, LlamaForCausalLM

from classp_hf import ClasspTrainer, ContinualTrainingArguments, embedded, tasks
from classp_hf import __main__ as command_line

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
BERT, LLAMA = "google-bert/bert-base-uncased", "HuggingFaceTB/SmolLM2-135M-Instruct"
ON_THE_HUB = ["docs/how-to/hub.md", "docs/tutorials/hub.md"]
# Pages of excerpts: a model is at hand, and of some what is imported here; `...` in a call is what a trainer needs.
EXCERPTS = ("docs/concepts/", "docs/methods/", "docs/how-to/own_method", "docs/how-to/own_metric")
IMPORTED = "from classp_hf import *; from peft import *; from transformers import Trainer"


@functools.cache
def few_rows(spec: str, load_task=tasks.load_task, **given):
    """`load_task` of few rows, whatever the page says; a file as it is."""
    return load_task(spec, **(given if ":" in spec else {"max_train_samples": 24, "max_eval_samples": 12}))


def blocks(page: str, language: str) -> list[str]:
    """The page's blocks, each after as many empty lines as give its lines the numbers that they have on the page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(rf"(?ms)^( *)```{language}\n(.*?)^\1```$", text)
    return ["\n" * (text[: m.start()].count("\n") + 1) + re.sub(f"(?m)^{m[1]}", "", m[2]) for m in found]


def trained(name: str) -> dict:
    """What a trainer is given, with a tiny model in the place of the named one."""
    tokenizer = test_language.tokenizer.__wrapped__()
    tokenizer.model_max_length = 16
    given = {"args": ContinualTrainingArguments("run", reset_optimizer=True), "processing_class": tokenizer}
    if name == BERT:
        return given | {"model": conftest.make_model.__wrapped__()()}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    llama = LlamaConfig(vocab_size=len(tokenizer), **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    return given | {"model": LlamaForCausalLM(llama), "train_dataset": [{"input_ids": [1, 4], "labels": [1, 4]}] * 8}


def run(page: str, monkeypatch) -> None:
    """The page's blocks, one after another in one namespace, in the working directory."""
    monkeypatch.setattr(tasks, "load_task", few_rows)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # figures take longest, and have tests of their own
    names: dict = {"__name__": "__main__"}
    if page.startswith(EXCERPTS):
        given = trained(LLAMA if page == "docs/concepts/guard.md" else BERT)
        names |= {**given, "given": given, "tokenizer": given["processing_class"]}
        exec("" if "/own_" in page else IMPORTED, names)
    for block in blocks(page, "python"):
        exec(compile(block.replace("(...", "(**given"), page, "exec"), names)
    if "/own_me" in page:  # the trainer uses what the page defines
        names["trainer"].train_sequence([few_rows("icwsm14/nyt"), few_rows("icwsm14/movie")])


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python") and p not in ON_THE_HUB])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """A folder is there under every name that the page takes from the Hub, and the files it reads."""
    monkeypatch.chdir(tmp_path)
    for name in (BERT, LLAMA):
        trained(name)["model"].save_pretrained(name)
        trained(name)["processing_class"].save_pretrained(name)
    Path("reviews.csv").write_text("review,stars\n" + "".join(f"Film {i}.,{i % 2}\n" for i in range(40)))
    for path in map(Path, ("summaries/train.jsonl", "summaries/test.jsonl", "sql/train.jsonl", "sql/test.jsonl")):
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"prompt": "Say it:", "completion": " it"}')
    run(page, monkeypatch)


def test_the_python_of_the_pages_about_the_hub_runs(tmp_path, monkeypatch):
    """In a process that speaks to a loopback Hub, where a model with a memory is."""
    monkeypatch.chdir(tmp_path)
    ClasspTrainer(**trained(BERT)).train_sequence([few_rows("icwsm14/nyt")])
    files = {p.name: p.read_bytes() for p in Path("run").iterdir() if p.suffix in (".json", ".safetensors", ".st")}
    program = "import pytest, test_docs as t\nfor page in t.ON_THE_HUB: t.run(page, pytest.MonkeyPatch())"
    with FakeHub({("me/kept", revision): files for revision in ("main", "v1")}) as hub:
        env = hub.env() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        env |= {"HF_TOKEN": "hf_" + "a" * 34, "CLASSP_HF_CACHE": str(embedded.cache_folder())}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "continual_memory.st" in hub.commits["me/b"][-1]


def parse(main, arguments: list[str], monkeypatch) -> None:
    """Have `main` parse its arguments, and do no more; it exits for wrong ones."""

    def stop(*given, real=argparse.ArgumentParser.parse_known_args, **options):
        assert real(*given, **options)[1] == [], "unknown arguments"
        raise StopIteration

    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(sys, "argv", arguments)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        main()


def check(words: list[str], monkeypatch) -> None:
    files = [word for word in words if re.match(r"(benchmarks|docs|recipes|tests)/|constraints.txt", word)]
    assert all((ROOT / file).exists() for file in files), files
    match words:
        case ["accelerate", "launch", *rest]:
            given = launch_command_parser().parse_args(rest)
            script = [*["-m"] * bool(given.module), given.training_script, *given.training_script_args]
            check(["python", *script], monkeypatch)
        case ["python", "-m", "classp_hf", *rest] if rest != ["--help"]:
            own, script = command_line.split(rest, command := command_line.parser())
            command_line.for_register(command.parse_args(own), command)
            command_line.check_script_arguments(script)
            if script and script[0] in command_line.COMMANDS:
                return parse(importlib.import_module(f"classp_hf.{script[0]}").main, script, monkeypatch)
            ours = command._option_string_actions.keys() - {"--optim", "--optim_args", "--learning_rate", "-m"}
            assert not ours & set(script), "these stand before the script's name"
        case ["python" | "python3.11", "-m", module, *_]:
            assert importlib.util.find_spec(module), module
        case ["python", "-c", program]:
            exec(program.replace("()", ""))  # looks its functions up, and does not call them
        case ["python", script, *rest] | [script, *rest] if script in files:
            source = (ROOT / script).read_text(encoding="utf-8")
            if "ArgumentParser" in source or "demo import main" in source:
                monkeypatch.syspath_prepend((ROOT / script).parent)
                parse(lambda: runpy.run_path(str(ROOT / script), run_name="__main__"), [script, *rest], monkeypatch)
        case ["make", *targets]:
            assert set(targets) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        case ["pip", "install", *_, what]:
            assert re.sub(r".*\[(\w+)\]", r"\n\1 = [", what) in (ROOT / "pyproject.toml").read_text()
        case _:
            assert words[0] in {".", "tensorboard", "pre-commit"}, f"unknown: {words}"


def test_the_commands_of_the_pages_parse(monkeypatch):
    """Those of blocks and those between backquotes, without `...` and [options]."""
    kinds = r"python -|python \w+/|accelerate launch (?=[^`]*(?:\.py|-m ))|make |pip install|recipes/\S+ -"
    for page in PAGES:
        lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
        lines += re.findall(rf"(?<!`)`((?:{kinds})[^`]+)`", (ROOT / page).read_text(encoding="utf-8"))
        lines = [re.sub(r"^\w+=\$\((.*)\)$|(?<= )(?:\.\.\.|\[[^]]*\])", r"\1", line) for line in lines]
        for words in filter(None, (shlex.split(part, comments=True) for line in lines for part in line.split("&&"))):
            print(page, words)  # a parser that exits does not say where
            check(words, monkeypatch)
