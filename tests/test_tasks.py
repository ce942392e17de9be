"""Tasks: specs, splits, and labels aligned by name."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from fake_hub import FakeHub
from transformers import AutoTokenizer

from classp_hf import embedded
from classp_hf.tasks import BUILT_IN, Task, label_names, load_task, prepare_tasks, validate_tasks

DOMAINS = list(embedded.DOMAINS)
SENTIMENT = {"negative": 0, "neutral": 1, "positive": 2}


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded.model_path())


@pytest.fixture(scope="module")
def icwsm():
    return {domain: load_task(f"icwsm14/{domain}") for domain in DOMAINS}


def rows(n: int = 30) -> list[dict]:
    return [{"review": f"text number {i}", "stars": i % 2} for i in range(n)]


def make(name="a", texts=("x", "y", "z"), labels=("neg", "pos", "neg"), features=None, **fields) -> Task:
    """A task whose splits are all the same."""
    dataset = Dataset.from_dict({"text": list(texts), "label": list(labels)})
    if features is not None:
        dataset = dataset.cast_column("label", features)
    return Task(name, dataset, dataset, dataset, **fields)


# --- icwsm14 ---


# sha256 over the sorted labels and texts of the test split: published numbers are measured on exactly these.
@pytest.mark.parametrize(
    ("domain", "sizes", "digest"),
    [
        ("nyt", (3583, 512, 1024), "0b1ee5dd2ce4a6a8b2f8c28ba7343f8beba37dc39a01ddd5aa4e26b0d5684583"),
        ("movie", (7422, 1060, 2121), "b4e66bb200034909fa76475451206bdd44a1a89f5a302f51d9c553dd60de3ea7"),
        ("amazon", (2581, 369, 737), "ab41c9fc8c51694ff3c2cbcbc7886e0f75318d32391177900a7a53d6b40098ca"),
        ("tweets", (2832, 405, 809), "015e35638059c26e6eea512c8aa94877a851e10b5bdd105a694e048a9f46c802"),
    ],
)
def test_icwsm14_split_is_fixed_disjoint_and_stratified(icwsm, domain, sizes, digest):
    task = icwsm[domain]
    assert tuple(map(len, task.splits.values())) == sizes
    lines = sorted(f"{row['label']} {row['text']}" for row in task.test_dataset)
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest

    normal = [re.sub(r"[^\w]|_", " ", text.lower()).split() for d in task.splits.values() for text in d["text"]]
    assert len(set(map(tuple, normal))) == len(normal) and [] not in normal  # in no split twice, in no two splits

    counts = [Counter(dataset["label"]) for dataset in task.splits.values()]
    total = sum(counts, Counter())
    for fraction, count in zip((0.7, 0.1, 0.2), counts):
        assert all(abs(count[label] - fraction * total[label]) <= 2 for label in range(3))


@pytest.mark.parametrize(
    ("valence", "name"), [(-0.55, "negative"), (-0.5, "neutral"), (0.5, "neutral"), (0.55, "positive")]
)
def test_icwsm14_thresholds_are_exclusive(icwsm, valence, name):
    label = {text: label for d in icwsm["amazon"].splits.values() for text, label in zip(d["text"], d["label"])}
    found = [label[text] for text, v in embedded.icwsm14("amazon") if v == valence and text in label]
    assert len(found) > 10 and set(found) == {SENTIMENT[name]}


def test_seed_moves_the_training_subset_only(icwsm):
    def texts(seed):
        task = load_task("icwsm14/nyt", seed=seed, max_train_samples=100, max_eval_samples=50)
        return [list(dataset["text"]) for dataset in task.splits.values()]

    (train0, *held0), (train1, *held1) = texts(0), texts(1)
    assert held0 == held1 and set(train0) != set(train1) and texts(0)[0] == train0
    assert [len(train0), *map(len, held0)] == [100, 50, 50]
    assert set(train0 + train1) <= set(icwsm["nyt"].train_dataset["text"])
    everything = icwsm["nyt"].train_dataset
    share = Counter(everything["label"])
    label = dict(zip(everything["text"], everything["label"]))
    subset = Counter(label[text] for text in train0)
    assert all(abs(subset[c] - 100 * share[c] / len(everything)) <= 2 for c in range(3))


# --- the other sources ---


def write_fpb(path: Path) -> Path:
    """30 lines in the original format: ISO-8859-1, `sentence@label`."""
    lines = ["Net sales of Raisio plc rose , says a@b.fi@positive", "Hyvää päivää , said Nokian Renkaat@neutral"]
    lines += [f"Loss number {i} widened@negative" for i in range(14)]
    lines += [f"Profit number {i} rose@positive" for i in range(14)]
    path.write_bytes("\r\n".join(lines).encode("iso-8859-1") + b"\r\n")
    return path


def write_imdb(path: Path) -> Path:
    for split in ("train", "test"):
        for label in ("pos", "neg"):
            (path / split / label).mkdir(parents=True)
            for i in range(10):
                (path / split / label / f"{i}_7.txt").write_text(f"{label} {split} film {i} – über", encoding="utf-8")
    (path / "train" / "unsup").mkdir()
    (path / "train" / "unsup" / "0_0.txt").write_text("no label", encoding="utf-8")
    return path


def test_fpb_original_file(tmp_path):
    task = load_task(f"fpb:{write_fpb(tmp_path / 'Sentences_50Agree.txt')}")
    assert (task.name, task.text_column) == ("fpb", "sentence")
    found = {s: label for d in task.splits.values() for s, label in zip(d["sentence"], d["label"])}
    assert found["Hyvää päivää , said Nokian Renkaat"] == "neutral"
    assert found["Net sales of Raisio plc rose , says a@b.fi"] == "positive"
    assert [len(dataset) for dataset in task.splits.values()] == [24, 3, 3]


def test_imdb_original_folder(tmp_path):
    task = load_task(f"imdb:{write_imdb(tmp_path / 'aclImdb')}")
    assert [Counter(d["label"]) for d in task.splits.values()] == [{0: 9, 1: 9}, {0: 1, 1: 1}, {0: 10, 1: 10}]
    assert all(text.startswith("pos test") for text in task.test_dataset.filter(lambda row: row["label"] == 1)["text"])
    assert task.test_dataset[0]["text"].endswith("– über")
    assert not any("test" in text for text in [*task.train_dataset["text"], *task.eval_dataset["text"]])


@pytest.mark.parametrize("label2id", [SENTIMENT, {"positive": 0, "negative": 1, "neutral": 2}])
def test_imdb_and_fpb_share_ids_by_name(tmp_path, tokenizer, label2id):
    """IMDB's pos is its own class 1, FPB's positive is its own class 2: by id they would be confused."""
    tasks = [load_task(f"imdb:{write_imdb(tmp_path / 'i')}"), load_task(f"fpb:{write_fpb(tmp_path / 'f.txt')}")]
    assert label_names(tasks) == ["negative", "positive", "neutral"]
    imdb, fpb = prepare_tasks(tasks, tokenizer, label2id)
    for row in imdb.test_dataset:
        word = tokenizer.decode(row["input_ids"], skip_special_tokens=True).split()[0]
        assert row["labels"] == label2id[{"pos": "positive", "neg": "negative"}[word]]
    for row in fpb.train_dataset:
        word = tokenizer.decode(row["input_ids"], skip_special_tokens=True).split()[0]
        expected = {"profit": "positive", "net": "positive", "loss": "negative", "h": "neutral"}
        assert row["labels"] == label2id[expected.get(word, "neutral")]
    assert imdb.label_ids == sorted((label2id["negative"], label2id["positive"]))
    assert fpb.label_ids == [0, 1, 2]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_local_file_without_splits(tmp_path, suffix, caplog):
    path, data = tmp_path / f"reviews.{suffix}", Dataset.from_list(rows())
    if suffix == "parquet":
        data.to_parquet(path)
    elif suffix == "json":
        path.write_text(json.dumps(rows()))
    elif suffix == "jsonl":
        data.to_json(path)
    else:
        data.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)

    spec = f"my/reviews:{path},text=review,label=stars,names=bad|good,map=bad>negative|good>positive"
    with caplog.at_level(logging.INFO):
        task, other = load_task(spec, seed=3), load_task(spec, seed=4)
    assert caplog.text.count("no validation and test split in ['train']; cut 10% each from train with seed 3") == 1
    assert task.slug == "my-reviews" and label_names([task]) == ["negative", "positive"]
    assert [len(dataset) for dataset in task.splits.values()] == [24, 3, 3]
    assert sorted(r["review"] for d in task.splits.values() for r in d) == sorted(r["review"] for r in rows())
    assert set(task.test_dataset["review"]) != set(other.test_dataset["review"])


@pytest.mark.parametrize("validation", ["validation", "dev", "val", None])
def test_local_folder_with_splits(tmp_path, validation):
    """`val` is not a name that datasets finds in a file name, so those files stand in a card."""
    names = {"train": "train", "test": "test"} | ({validation: validation} if validation else {})
    for i, split in enumerate(names):
        Dataset.from_dict(
            {"text": [f"{split} {j}" for j in range(20 + i)], "label": ["a", "b"] * 10 + ["a"] * i}
        ).to_csv(tmp_path / f"{split}.csv", index=False)
    files = "".join(f"  - split: {split}\n    path: {split}.csv\n" for split in names)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    task = load_task(f"mine:{tmp_path}")
    assert {text.split()[0] for text in task.eval_dataset["text"]} == {validation or "train"}
    assert [len(d) for d in task.splits.values()] == ([20, 22, 21] if validation else [18, 2, 21])


def test_words_that_csv_readers_take_for_missing_values(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\n" + "null,NA\nNA,None\n" * 10)
    task = load_task(f"x:{tmp_path / 'x.csv'}")
    assert label_names([task]) == ["NA", "None"]
    assert set(task.train_dataset["text"]) == {"null", "NA"}


def test_hidden_test_labels_are_left_out(tmp_path, caplog):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    labels = {"train": [0, 1] * 10, "validation": [0, 1] * 2, "test": [-1] * 5}
    for split, ids in labels.items():
        data = Dataset.from_dict({"text": [f"{split} {i}" for i in range(len(ids))], "label": ids}, features=features)
        data.to_parquet(tmp_path / f"{split}.parquet")
    task = load_task(f"glue:{tmp_path}")
    assert "glue: the labels of its test split are hidden" in caplog.text
    assert task.test_dataset is None and task.measured_dataset is task.eval_dataset
    assert set(task.splits) == {"train_dataset", "eval_dataset"}


def parquet(columns: dict, names: list[str]) -> bytes:
    features = Features({key: Value("string") for key in columns} | {"label": ClassLabel(names=names)})
    buffer = io.BytesIO()
    Dataset.from_dict(columns, features=features).to_parquet(buffer)
    return buffer.getvalue()


IMDB_CARD = b"""---
configs:
- config_name: plain_text
  data_files:
  - {split: train, path: plain_text/train-*}
  - {split: test, path: plain_text/test-*}
  - {split: unsupervised, path: plain_text/unsupervised-*}
  default: true
---
"""

ASK_THE_HUB = """
import json, sys
from datasets import load_dataset
from classp_hf.tasks import label_names, load_task
try:
    load_dataset("takala/financial_phrasebank")
except RuntimeError as error:
    main_branch = str(error)
tasks = [load_task(spec) for spec in ("imdb", "fpb", "pairs:some/pairs:small,text=a,text_pair=b")]
columns = lambda task: {split: sorted(set(data[task.text_column])) for split, data in task.splits.items()}
print(json.dumps([[columns(task) for task in tasks], label_names(tasks), main_branch]))
"""


def test_hub_ids_over_the_wire(tmp_path):
    """The built-in ids load without a script: fpb from the Hub's Parquet branch, imdb from its own Parquet files."""
    fpb = {"sentence": [f"fpb {i}" for i in range(30)], "label": [i % 3 for i in range(30)]}
    repos = {
        ("takala/financial_phrasebank", "main"): {"financial_phrasebank.py": b"1 / 0"},
        ("takala/financial_phrasebank", "refs/convert/parquet"): {
            "sentences_50agree/train/0000.parquet": parquet(fpb, list(SENTIMENT)),
            "sentences_allagree/train/0000.parquet": parquet({"sentence": ["all"], "label": [0]}, list(SENTIMENT)),
        },
        ("stanfordnlp/imdb", "main"): {"README.md": IMDB_CARD}
        | {
            f"plain_text/{split}-00000-of-00001.parquet": parquet(
                {
                    "text": [f"{split} {i}" for i in range(20)],
                    "label": [-1 if split == "unsupervised" else i % 2 for i in range(20)],
                },
                ["neg", "pos"],
            )
            for split in ("train", "test", "unsupervised")
        },
        ("some/pairs", "main"): {
            "README.md": b"---\nconfigs:\n- {config_name: small, data_files: s.parquet}\n- {config_name: big, data_files: b.parquet}\n---\n",
            "s.parquet": parquet({"a": ["a"] * 20, "b": ["b"] * 20, "label": [0, 1] * 10}, ["no", "yes"]),
            "b.parquet": parquet({"a": ["big"] * 20, "b": ["b"] * 20, "label": [0, 1] * 10}, ["no", "yes"]),
        },
    }
    with FakeHub(repos) as hub:
        command = [sys.executable, "-c", ASK_THE_HUB]
        root = Path(__file__).parent.parent
        run = subprocess.run(command, env=hub.env(tmp_path), cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (imdb, fpb_found, pairs), names, main_branch = json.loads(run.stdout)
    assert imdb["test_dataset"] == sorted(f"test {i}" for i in range(20))
    assert sorted(imdb["train_dataset"] + imdb["eval_dataset"]) == sorted(f"train {i}" for i in range(20))
    assert sorted(text for texts in fpb_found.values() for text in texts) == sorted(fpb["sentence"])
    assert all(texts == ["a"] for texts in pairs.values())
    assert names == ["negative", "positive", "neutral", "no", "yes"]
    assert "Dataset scripts are no longer supported" in main_branch
    assert not any("allagree" in request and "resolve" in request for request in hub.requests)


# --- labels and tokens ---


def test_label_order_over_a_sequence():
    tasks = [
        make("strings", labels=[" z ", "b", "z"]),  # alphabetical, stripped
        make("class-label", labels=[0, 0, 1], features=ClassLabel(names=["y", "b", "unseen"])),
        make("integers", labels=[1, 0, 1], label_names=["q", "p"], label_map={"p": "z"}),
    ]
    assert label_names(tasks) == ["b", "z", "y", "unseen", "q"]


def test_a_class_of_the_test_split_only_is_counted():
    train = Dataset.from_dict({"text": ["x"], "label": ["a"]})
    test = Dataset.from_dict({"text": ["x"], "label": ["late"]})
    assert label_names([Task("t", train, train, test)]) == ["a", "late"]


def test_class_labels_are_read_by_each_splits_own_order(tokenizer):
    train = make(labels=[0, 1, 0], features=ClassLabel(names=["neg", "pos"])).train_dataset
    test = make(labels=[0, 1, 0], features=ClassLabel(names=["pos", "neg"])).train_dataset
    task = prepare_tasks([Task("t", train, train, test)], tokenizer, {"neg": 0, "pos": 1})[0]
    assert task.train_dataset["labels"][:] == [0, 1, 0] and task.test_dataset["labels"][:] == [1, 0, 1]


def test_prepared_columns(tokenizer):
    """Only the tokenizer's columns and int labels; truncated, not padded; the given tasks stay as they are."""
    data = Dataset.from_dict(
        {"text": ["one two three four five", "one"], "b": ["six", "seven"], "labels": [0, 1], "id": [7, 8]}
    )
    data = data.cast_column("labels", ClassLabel(names=["y", "z"]))  # a column of that name with another order
    task = Task("t", data, data, text_pair_column="b", label_column="labels")
    prepared = prepare_tasks([task], tokenizer, {"z": 0, "y": 3}, max_length=6)[0]
    train = prepared.train_dataset
    assert train.column_names == ["input_ids", "token_type_ids", "attention_mask", "labels"]
    assert train.features["labels"] == Value("int64") and train["labels"][:] == [3, 0]
    assert [len(ids) for ids in train["input_ids"]] == [6, 5]
    assert train[1]["input_ids"] == tokenizer("one", "seven")["input_ids"]
    assert prepared.label_ids == [0, 3] and prepared.test_dataset is None
    assert task.train_dataset is data and task.label_ids is None


def test_default_max_length_is_the_tokenizers(tokenizer):
    task = make(texts=["word " * 700, "y", "z"])
    prepared = prepare_tasks([task], tokenizer, {"neg": 0, "pos": 1})[0]
    assert len(prepared.train_dataset[0]["input_ids"]) == tokenizer.model_max_length == 512


def test_tokenised_tasks_pass_through(tokenizer):
    data = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [5]})
    task = Task("ready", data, data)
    prepared = prepare_tasks([task, make()], tokenizer, {"neg": 0, "pos": 1})
    assert prepared[0] is task and task.label_ids is None
    assert prepare_tasks(prepared, tokenizer, {})[1] is prepared[1]
    assert label_names([task, make()]) == ["neg", "pos"]


# --- errors: (what fails, what the message has to hold: the bad value and the remedy) ---


def prepare(task, label2id=SENTIMENT, tokenizer=None):
    return prepare_tasks([task], tokenizer or AutoTokenizer.from_pretrained(embedded.model_path()), label2id)


EMPTY = Dataset.from_dict({"text": [], "label": []})
FULL = make().train_dataset

ERRORS = {
    "no tasks": (lambda p: validate_tasks([]), ["[]", "load_task('icwsm14/nyt')"]),
    "not a task": (lambda p: validate_tasks([make(), "fpb"]), ["tasks[1] is 'fpb'", "load_task(spec)"]),
    "same name": (lambda p: validate_tasks([make("a"), make("a")]), ["'a' and 'a'", "rename"]),
    "same folder": (lambda p: validate_tasks([make("a/B"), make("A-b")]), ["'a/B' and 'A-b'", "rename"]),
    "empty train": (lambda p: validate_tasks([Task("e", EMPTY, FULL)]), ["'e'", "train_dataset is empty", "give it"]),
    "empty test": (lambda p: validate_tasks([Task("e", FULL, FULL, EMPTY)]), ["test_dataset is empty", "None"]),
    "DatasetDict": (
        lambda p: validate_tasks([Task("d", DatasetDict(train=FULL), FULL)]),
        ["train_dataset is a DatasetDict", "give a datasets.Dataset"],
    ),
    "no text column": (
        lambda p: validate_tasks([make(text_column="txt")]),
        ["'txt'", "['text', 'label']", "text=COL"],
    ),
    "no pair column": (lambda p: validate_tasks([make(text_pair_column="b")]), ["'b'", "text_pair=COL"]),
    "no label column": (lambda p: validate_tasks([make(label_column="y")]), ["'y'", "['text', 'label']", "label=COL"]),
    "name": (lambda p: make("../up"), ["'../up'", "use letters"]),
    "bare unknown": (
        lambda p: load_task("imbd"),
        ["'imbd'", *BUILT_IN, "name:path_or_id", "reviews:data/reviews.csv"],
    ),
    "unknown domain": (lambda p: load_task("icwsm14/yelp"), ["'icwsm14/yelp'", "icwsm14/tweets"]),
    "three colons": (lambda p: load_task("a:b:c:d"), ["'a:b:c:d'", "name:path_or_id"]),
    "spec name": (lambda p: load_task("a b:x.csv"), ["'a b'", "use letters"]),
    "option": (lambda p: load_task("a:o/b,lable=y"), ["'lable=y'", "label=COL"]),
    "map option": (lambda p: load_task("a:o/b,map=x"), ["'map=x'", "map=x>y|z>w"]),
    "options of an original": (lambda p: load_task("fpb:x.txt,text=y"), ["'fpb:x.txt,text=y'", "takes no options"]),
    "fpb line": (
        lambda p: load_file(p / "f.txt", "a@neutral\nno label", "fpb"),
        ["line 2", "'no label'", "give"],
    ),
    "imdb folder": (lambda p: load_task(f"imdb:{p}"), ["train/neg", "give the folder aclImdb"]),
    "missing file": (lambda p: load_task(f"a:{p}/x.csv"), ["x.csv", "correct the path"]),
    "missing folder": (lambda p: load_task(f"imdb:{p}/x"), ["'{p}/x'", "correct the path"]),
    "spec label column": (
        lambda p: load_file(p / "x.csv", "text,y\n" + "b,1\n" * 20),
        ["'label'", "['text', 'y']", "label=COL"],
    ),
    "spec text column": (
        lambda p: load_file(p / "x.csv", "txt,label\n" + "b,1\n" * 20),
        ["'text'", "['txt', 'label']", "text=COL"],
    ),
    "too few rows": (
        lambda p: load_file(p / "x.csv", "text,label\nb,1\nc,1"),
        ["2 rows", "give the splits"],
    ),
    "no train": (lambda p: load_folder(p, test="text,label\nb,1"), ["['test']", "Task("]),
    "no samples": (lambda p: load_task("icwsm14/nyt", max_train_samples=0), ["max_train_samples=0", "positive"]),
    "integers": (
        lambda p: label_names([make(labels=[0, 2, 0])]),
        ["'a'", "'label'", "0, 2", "names=negative|neutral"],
    ),
    "out of names": (
        lambda p: label_names([make(labels=[0, 2, 0], label_names=["n", "p"])]),
        ["[2]", "['n', 'p']", "drop"],
    ),
    "-1": (lambda p: label_names([make(labels=[0, -1, 0], label_names=["n", "p"])]), ["[-1]", "drop those rows"]),
    "unknown string": (lambda p: label_names([make(label_names=["neg"])]), ["['pos']", "['neg']", "drop those rows"]),
    "None": (lambda p: label_names([make(labels=["a", None, None])]), ["row 1 (and 1 more)", "drop such rows"]),
    "blank": (lambda p: label_names([make(labels=["a", " ", "b"])]), ["row 1 (and 0 more)", "drop such rows"]),
    "floats": (lambda p: label_names([make(labels=[0.0, 0.5, 1.0])]), ["float64", "0.5", "cast the column"]),
    "lists": (lambda p: label_names([make(labels=[[0], [1], [0, 1]])]), ["List", "[0, 1]", "cast the column"]),
    "map key": (
        lambda p: label_names([make(label_map={"posi": "p"})]),
        ["['posi']", "['neg', 'pos']", "correct the keys"],
    ),
    "not in the model": (
        lambda p: prepare(make(), {"neg": 0, "LABEL_1": 1}),
        [
            "['pos']",
            "{'neg': 0, 'LABEL_1': 1}",
            "num_labels=len(names)",
            "label2id=",
            "id2label=",
            "label_names(tasks)",
        ],
    ),
    "text": (
        lambda p: prepare(make(texts=["x", None, "z"]), {"neg": 0, "pos": 1}),
        ["'text' holds None", "drop such"],
    ),
}


def load_file(path: Path, text: str, name: str = "a") -> Task:
    path.write_text(text)
    return load_task(f"{name}:{path}")


def load_folder(path: Path, **files: str) -> Task:
    for split, text in files.items():
        (path / f"{split}.csv").write_text(text)
    return load_task(f"a:{path}")


@pytest.mark.parametrize("case", ERRORS)
def test_errors_show_the_value_and_the_remedy(case, tmp_path):
    fail, parts = ERRORS[case]
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        fail(tmp_path)
    for part in parts:
        assert part.replace("{p}", str(tmp_path)) in str(error.value)


def test_prepare_validates_first(tokenizer):
    with pytest.raises(ValueError, match="rename"):
        prepare_tasks([make("a"), make("a")], tokenizer, {})


def test_evaluation_rows_are_sorted_by_length_and_keep_their_labels():
    class Words:
        model_max_length = 512

        def __call__(self, texts, truncation, max_length):
            return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    rows = Dataset.from_dict({"text": ["3 3 3", "1", "2 2"], "label": ["c", "a", "b"]})
    task = prepare_tasks([Task("t", rows, rows, rows)], Words(), {"a": 0, "b": 1, "c": 2})[0]
    assert [(row["input_ids"][0] - 1, row["labels"]) for row in task.test_dataset] == [(0, 0), (1, 1), (2, 2)]
    assert task.train_dataset["labels"] == [2, 0, 1]  # training order is the sampler's business
