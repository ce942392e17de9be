"""Tasks: specs, splits, labels aligned by name, prepared datasets."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import subprocess
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, Image, Value
from fake_hub import FakeHub
from transformers import AutoTokenizer
from transformers.trainer_pt_utils import LabelSmoother

from classp_hf import embedded
from classp_hf.classification import classification_loss, is_single_label_classifier
from classp_hf.tasks import BUILT_IN, Task, is_prepared, label_names, load_task, prepare_tasks, validate_tasks

SENTIMENT = {"negative": 0, "neutral": 1, "positive": 2}


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded.model_path())


def make(name="a", texts=("x", "y", "z"), labels=("neg", "pos", "neg"), features=None, **fields) -> Task:
    """A task whose splits are all the same."""
    dataset = Dataset.from_dict({"text": list(texts)[: len(labels)], "label": list(labels)})
    if features is not None:
        dataset = dataset.cast_column("label", features)
    return Task(name, dataset, dataset, dataset, **fields)


# --- specs ---


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
def test_icwsm14_split_is_fixed_disjoint_and_stratified(domain, sizes, digest):
    task = load_task(f"icwsm14/{domain}")
    assert tuple(map(len, task.splits.values())) == sizes
    lines = sorted(f"{row['label']} {row['text']}" for row in task.test_dataset)
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest
    texts = [text.lower() for dataset in task.splits.values() for text in dataset["text"]]
    assert len(set(texts)) == len(texts)  # in no split twice, in no two splits
    counts = [Counter(dataset["label"]) for dataset in task.splits.values()]
    total = sum(counts, Counter())
    for fraction, count in zip((0.7, 0.1, 0.2), counts):
        assert all(abs(count[label] - fraction * total[label]) <= 2 for label in range(3))


def test_icwsm14_thresholds_are_exclusive():
    label = {text: i for d in load_task("icwsm14/amazon").splits.values() for text, i in zip(d["text"], d["label"])}
    for valence, name in ((-0.55, "negative"), (-0.5, "neutral"), (0.5, "neutral"), (0.55, "positive")):
        found = [label[text] for text, v in embedded.icwsm14("amazon") if v == valence and text in label]
        assert len(found) > 10 and set(found) == {SENTIMENT[name]}


def test_seed_moves_the_training_subset_only():
    def texts(seed):
        task = load_task("icwsm14/nyt", seed=seed, max_train_samples=100, max_eval_samples=50)
        return [list(dataset["text"]) for dataset in task.splits.values()]

    (train0, *held0), (train1, *held1) = texts(0), texts(1)
    assert held0 == held1 and set(train0) != set(train1) and texts(0)[0] == train0
    assert [len(train0), *map(len, held0)] == [100, 50, 50]
    everything = load_task("icwsm14/nyt").train_dataset
    label, share = dict(zip(everything["text"], everything["label"])), Counter(everything["label"])
    subset = Counter(label[text] for text in train0)
    assert all(abs(subset[c] - 100 * share[c] / len(everything)) <= 2 for c in range(3))


def write_fpb(path: Path) -> Path:
    """30 lines in the original format: ISO-8859-1, `sentence@label`."""
    lines = ["Net sales of Raisio plc rose , says a@b.fi@positive", "Hyvää päivää , said Nokian Renkaat@neutral"]
    lines += [f"Loss {i} widened@negative" for i in range(14)] + [f"Profit {i} rose@positive" for i in range(14)]
    path.write_bytes("\r\n".join(lines).encode("iso-8859-1") + b"\r\n")
    return path


def write_imdb(path: Path) -> Path:
    for split, label in (("train", "pos"), ("train", "neg"), ("train", "unsup"), ("test", "pos"), ("test", "neg")):
        (path / split / label).mkdir(parents=True)
        for i in range(10):
            (path / split / label / f"{i}_7.txt").write_text(f"{label} {split} film {i} ü", encoding="utf-8")
    return path


def test_original_files_share_ids_by_name(tmp_path, tokenizer):
    """IMDB's pos is its own class 1, FPB's positive is its own class 2: by id they would be confused."""
    label2id = {"positive": 0, "negative": 1, "neutral": 2}
    tasks = [load_task(f"imdb:{write_imdb(tmp_path / 'i')}"), load_task(f"fpb:{write_fpb(tmp_path / 'f.txt')}")]
    imdb, fpb = tasks
    assert [Counter(d["label"]) for d in imdb.splits.values()] == [{0: 9, 1: 9}, {0: 1, 1: 1}, {0: 10, 1: 10}]
    assert imdb.test_dataset[0]["text"].endswith(" ü") and (imdb.hub_id, fpb.hub_id) == (None, None)
    assert [len(dataset) for dataset in fpb.splits.values()] == [24, 3, 3]
    found = {s: label for d in fpb.splits.values() for s, label in zip(d["sentence"], d["label"])}
    assert found["Hyvää päivää , said Nokian Renkaat"] == "neutral"
    assert found["Net sales of Raisio plc rose , says a@b.fi"] == "positive"
    assert label_names(tasks) == ["negative", "positive", "neutral"]
    imdb, fpb = prepare_tasks(tasks, tokenizer, label2id)
    words = {"pos": 0, "neg": 1, "profit": 0, "net": 0, "loss": 1}
    for row in [*imdb.test_dataset, *fpb.train_dataset]:
        word = tokenizer.decode(row["input_ids"], skip_special_tokens=True).split()[0]
        assert row["labels"] == words.get(word, 2)
    assert imdb.label_ids == [0, 1] and fpb.label_ids == [0, 1, 2]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_local_file_without_splits(tmp_path, suffix, caplog):
    rows = [{"review": f"text number {i}", "stars": i % 2} for i in range(30)]
    path, data = tmp_path / f"reviews.{suffix}", Dataset.from_list(rows)
    if suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix in ("csv", "tsv"):
        data.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)
    else:
        (data.to_parquet if suffix == "parquet" else data.to_json)(path)
    spec = f"my/reviews:{path},text=review,label=stars,names=bad|good,map=bad>negative|good>positive"
    with caplog.at_level(logging.INFO):
        task, other = load_task(spec, seed=3), load_task(spec, seed=4)
    assert caplog.text.count("no validation and test split; cut 10% each from train with seed 3") == 1
    assert task.slug == "my-reviews" and label_names([task]) == ["negative", "positive"]
    assert [len(dataset) for dataset in task.splits.values()] == [24, 3, 3]
    assert sorted(r["review"] for d in task.splits.values() for r in d) == sorted(r["review"] for r in rows)
    assert set(task.test_dataset["review"]) != set(other.test_dataset["review"])


@pytest.mark.parametrize("validation", ["validation", "val", None])
def test_local_folder_with_splits(tmp_path, validation):
    """`val` is not a name that datasets finds in a file name, so those files stand in a card."""
    names = {"train": 20, "test": 21} | ({validation: 22} if validation else {})
    for split, rows in names.items():
        texts = [f"{split} {j}" for j in range(rows)]
        Dataset.from_dict({"text": texts, "label": ["ab"[j % 2] for j in range(rows)]}).to_csv(
            tmp_path / f"{split}.csv"
        )
    files = "".join(f"  - split: {split}\n    path: {split}.csv\n" for split in names)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    task = load_task(f"mine:{tmp_path}")
    assert {text.split()[0] for text in task.eval_dataset["text"]} == {validation or "train"}
    assert [len(d) for d in task.splits.values()] == ([20, 22, 21] if validation else [18, 2, 21])


def test_words_that_csv_readers_take_for_missing_values(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\n" + "null,NA\nNA,None\n" * 10)
    task = load_task(f"x:{tmp_path / 'x.csv'}")
    assert label_names([task]) == ["NA", "None"] and set(task.train_dataset["text"]) == {"null", "NA"}


def test_hidden_test_labels_are_left_out(tmp_path, caplog):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    for split, ids in {"train": [0, 1] * 10, "validation": [0, 1] * 2, "test": [-1] * 5}.items():
        data = Dataset.from_dict({"text": [f"{split} {i}" for i in range(len(ids))], "label": ids}, features=features)
        data.to_parquet(tmp_path / f"{split}.parquet")
    task = load_task(f"glue:{tmp_path}")
    assert "glue: the labels of its test split are hidden" in caplog.text
    assert task.test_dataset is None and task.measured_dataset is task.eval_dataset
    assert set(task.splits) == {"train_dataset", "eval_dataset"}


def parquet(names: list[str], labels=(0, 1), **columns) -> bytes:
    features = Features({key: Value("string") for key in columns} | {"label": ClassLabel(names=names)})
    buffer = io.BytesIO()
    Dataset.from_dict({**columns, "label": [*labels] * 10}, features=features).to_parquet(buffer)
    return buffer.getvalue()


ASK_THE_HUB = """
import json
from classp_hf.tasks import label_names, load_task
tasks = [load_task(spec) for spec in ("imdb", "fpb", "pairs:some/pairs:small,text=a,text_pair=b")]
columns = lambda task: {split: sorted(set(data[task.text_column])) for split, data in task.splits.items()}
print(json.dumps([[columns(task) for task in tasks], label_names(tasks), [task.hub_id for task in tasks]]))
"""


def test_hub_ids_over_the_wire(tmp_path):
    """The built-in ids load without a script: fpb from the Hub's Parquet branch, imdb from its own Parquet files."""
    fpb = [f"fpb {i}" for i in range(30)]
    card = b"---\nconfigs:\n- config_name: plain_text\n  data_files:\n"
    imdb = {}
    for split in ("train", "test", "unsupervised"):
        card += b"  - {split: %s, path: plain_text/%s-*}\n" % (split.encode(), split.encode())
        ids, texts = (-1, -1) if split == "unsupervised" else (0, 1), [f"{split} {i}" for i in range(20)]
        imdb[f"plain_text/{split}-00000-of-00001.parquet"] = parquet(["neg", "pos"], ids, text=texts)
    configs = b"- {config_name: small, data_files: s.parquet}\n- {config_name: big, data_files: b.parquet}\n"
    repos = {
        ("takala/financial_phrasebank", "main"): {"financial_phrasebank.py": b"1 / 0"},
        ("takala/financial_phrasebank", "refs/convert/parquet"): {
            "sentences_50agree/train/0000.parquet": parquet(list(SENTIMENT), (0, 1, 2), sentence=fpb),
            "sentences_allagree/train/0000.parquet": parquet(list(SENTIMENT), sentence=["all"] * 20),
        },
        ("stanfordnlp/imdb", "main"): {"README.md": card + b"---\n"} | imdb,
        ("some/pairs", "main"): {
            "README.md": b"---\nconfigs:\n" + configs + b"---\n",
            "s.parquet": parquet(["no", "yes"], a=["a"] * 20, b=["b"] * 20),
            "b.parquet": parquet(["no", "yes"], a=["big"] * 20, b=["b"] * 20),
        },
    }
    with FakeHub(repos) as hub:
        command, root = [hub.python(), "-c", ASK_THE_HUB], Path(__file__).parent.parent
        run = subprocess.run(command, env=hub.env(), cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (imdb, fpb_found, pairs), names, hub_ids = json.loads(run.stdout)
    assert imdb["test_dataset"] == sorted(f"test {i}" for i in range(20))
    assert sorted(imdb["train_dataset"] + imdb["eval_dataset"]) == sorted(f"train {i}" for i in range(20))
    assert sorted(text for texts in fpb_found.values() for text in texts) == sorted(fpb)
    assert all(texts == ["a"] for texts in pairs.values())
    assert names == ["negative", "positive", "neutral", "no", "yes"]
    assert hub_ids == ["stanfordnlp/imdb", "takala/financial_phrasebank", "some/pairs"]


# --- labels and tokens ---


def test_label_order_over_a_sequence():
    train, late = make(labels=["a"]).train_dataset, make(labels=["late"]).train_dataset
    tasks = [
        make("strings", labels=[" z ", "b", "z"]),  # alphabetical, stripped
        make("class-label", labels=[0, 0, 1], features=ClassLabel(names=["y", "b", "unseen"])),
        make("integers", labels=[1, 0, 1], label_names=["q", "p"], label_map={"p": "z"}),
        Task("in the test split only".replace(" ", "-"), train, train, late),
    ]
    assert label_names(tasks) == ["b", "z", "y", "unseen", "q", "a", "late"]


def test_prepared_columns(tokenizer):
    """Only the tokenizer's columns and int labels; truncated, not padded; the given tasks stay as they are."""
    texts = {"text": ["one two three four five", "one"], "b": ["six", "seven"]}
    data = Dataset.from_dict({**texts, "labels": [0, 1], "id": [7, 8]})
    data = data.cast_column("labels", ClassLabel(names=["y", "z"]))  # a column of that name with another order
    other = data.cast_column("labels", ClassLabel(names=["z", "y"]))
    task = Task("t", data, other, text_pair_column="b", label_column="labels")
    prepared = prepare_tasks([task], tokenizer, {"z": 0, "y": 3}, max_length=6)[0]
    train = prepared.train_dataset
    assert train.column_names == ["input_ids", "token_type_ids", "attention_mask", "labels"]
    assert train.features["labels"] == Value("int64") and train["labels"][:] == [3, 0]
    assert [len(ids) for ids in train["input_ids"]] == [6, 5]
    assert train[1]["input_ids"] == tokenizer("one", "seven")["input_ids"]
    assert prepared.eval_dataset["labels"][:] == [3, 0]  # z y by length: of its own order, the shorter text first
    assert prepared.label_ids == [0, 3] and prepared.test_dataset is None
    assert task.train_dataset is data and task.label_ids is None
    long = prepare_tasks([make(texts=["word " * 700, "y", "z"])], tokenizer, {"neg": 0, "pos": 1})[0]
    assert len(long.train_dataset[0]["input_ids"]) == tokenizer.model_max_length == 512


# --- prepared datasets ---

IDS, LABEL = [[1, 2], [3]], [0, 1]
PIXELS = {"pixel_values": np.zeros((2, 3, 4, 4), dtype=np.float32).tolist()}
PREPARED = {
    "tokens": {"input_ids": IDS, "labels": LABEL},
    "tokens beside their text": {"text": ["a", "b"], "label": LABEL, "input_ids": IDS, "labels": LABEL},
    "regression": {"input_ids": IDS, "label": [0.5, 1.5]},
    "several labels": {"input_ids": IDS, "labels": [[0.0, 1.0], [1.0, 1.0]]},
    "token classification": {"tokens": [["a", "b"], ["c"]], "input_ids": IDS, "labels": [[0, -100], [1]]},
    "images": {**PIXELS, "labels": LABEL, "path": ["a.png", "b.png"]},
    "audio": {"input_values": [[0.1, 0.2], [0.3]], "label_ids": LABEL},
    "a model of one's own": {"x": [0.1, 0.2], "y": [1, 2], "labels": LABEL},
    "arrays beside their source": {"x": [[0.1], [0.2]], "path": ["a", "b"], "labels": LABEL},
}


@pytest.mark.parametrize("kind", PREPARED)
def test_prepared_datasets_of_any_kind_are_used_as_they_are(kind, tokenizer):
    data = Dataset.from_dict(PREPARED[kind])
    task = Task("ready", data, data)
    for processing_class in (None, object()):
        assert prepare_tasks([task], processing_class, {})[0] is task and task.label_ids is None
    prepared = prepare_tasks([task, make()], tokenizer, {"neg": 0, "pos": 1})
    assert prepared[0] is task and prepared[1].label_ids == [0, 1] and label_names([task, make()]) == ["neg", "pos"]


def images(**columns) -> Dataset:
    features = {"image": Image(), "label": ClassLabel(names=["cat", "dog"])} | {c: Value("int64") for c in columns}
    pictures = list(np.zeros((2, 4, 4, 3), dtype=np.uint8))
    return Dataset.from_dict({"image": pictures, "label": LABEL, **columns}, features=Features(features))


def test_columns_computed_on_access_count():
    """As in Transformers' image classification example: the stored columns are still image and label."""

    def pixels(batch):
        return {"pixel_values": [torch.zeros(3, 4, 4) for _ in batch["image"]]}

    def boxes(batch):
        return {
            **pixels(batch),
            "labels": [{"boxes": torch.zeros(0, 4), "area": torch.ones(1)} for _ in batch["label"]],
        }

    for transform in (lambda batch: {**pixels(batch), "labels": batch["label"]}, boxes):
        data = images().with_transform(transform)
        assert prepare_tasks([Task("pets", data, data)], object(), {})[0].train_dataset is data
    with pytest.raises(ValueError, match=r"no column 'label', only \['pixel_values'\].*labels as numbers"):
        prepare_tasks([Task("pets", images().with_transform(pixels), data)], None, {})


def test_what_is_not_prepared():
    arrays = Features({"pixel_values": Array3D((3, 4, 4), "float32"), "label": ClassLabel(names=["cat", "dog"])})
    ready = Dataset.from_dict({**PIXELS, "label": LABEL}, features=arrays).with_format("torch")
    assert is_prepared(Task("ready", ready, ready))
    for columns in (
        {"sentence": ["a", "b"], "idx": [0, 1], "label": LABEL},  # GLUE: the text column is not named
        {"text": ["a", "b"], "input_ids": IDS, "label": LABEL},  # a label that is aligned by name
        {"prompt": ["a", "b"], "completion": ["c", "d"], "scores": [[0.5], [0.5]], "label": LABEL},
        {"tokens": [["a"], ["b"]], "labels": [[0], [1]]},
        {"input_ids": IDS, "label": ["a", "b"]},
        {"input_ids": IDS},
        {"label": LABEL},
    ):
        raw = Dataset.from_dict(columns)
        assert not is_prepared(Task("raw", raw, raw)) and not is_prepared(Task("raw", ready, raw)), columns


# --- errors: (what fails, what the message has to hold: the bad value and the remedy) ---


def prepare(*tasks, processing_class="tokenizer", **label2id):
    if processing_class == "tokenizer":
        processing_class = AutoTokenizer.from_pretrained(embedded.model_path())
    return prepare_tasks(list(tasks), processing_class, label2id or {"neg": 0, "pos": 1})


def names(*labels, **fields):
    return label_names([make(labels=labels, **fields)])


def load(path: Path, text: str, name: str = "a", encoding: str = "utf-8") -> Task:
    path.write_text(text, encoding)
    return load_task(f"{name}:{path.parent if path.name == 'test.csv' else path}")


EMPTY, FULL = Dataset.from_dict({"text": [], "label": []}), make().train_dataset
NUMBERED = images(idx=LABEL)
ROUTE = "pixel_values; with_transform; remove_unused_columns=False; labels as numbers; Any processing_class"
ERRORS = [
    (lambda p: validate_tasks([]), "[]; load_task('icwsm14/nyt')"),
    (lambda p: validate_tasks([make(), "fpb"]), "tasks[1] is 'fpb'; load_task(spec)"),
    (lambda p: prepare(make("a"), make("a")), "'a' and 'a'; rename"),
    (lambda p: validate_tasks([make("a/B"), make("A-b")]), "'a/B' and 'A-b'; rename"),
    (lambda p: validate_tasks([Task("e", FULL, FULL, EMPTY)]), "'e'; test_dataset; num_rows: 0; with rows"),
    (lambda p: validate_tasks([Task("d", DatasetDict(train=FULL), FULL)]), "train_dataset; DatasetDict; give a"),
    (lambda p: prepare(make(text_column="txt")), "'txt'; ['text', 'label']; text=COL"),
    (lambda p: prepare(make(text_pair_column="b")), "'b'; text_pair=COL"),
    (lambda p: prepare(make(label_column="y")), "'y'; ['text', 'label']; label=COL"),
    (lambda p: prepare(make(), processing_class=None), "need a tokenizer as processing_class; NoneType"),
    (lambda p: prepare(make(), processing_class=p), "need a tokenizer as processing_class; PosixPath"),
    (lambda p: prepare(Task("pets", images(), images())), "'pets'; ['image', 'label']; " + ROUTE),
    (lambda p: prepare(Task("pets", NUMBERED, NUMBERED)), "'pets'; ['image', 'label', 'idx']; " + ROUTE),
    (lambda p: make("../up"), "'../up'; use letters"),
    (lambda p: load_task("imbd"), "; ".join(["'imbd'", *BUILT_IN, "name:path_or_id", "reviews:data/reviews.csv"])),
    (lambda p: load_task("a:b:c:d"), "'a:b:c:d'; name:path_or_id"),
    (lambda p: load_task("a:o/b,lable=y"), "'lable=y'; label=COL"),
    (lambda p: load_task("a:o/b,map=x"), "'map=x'; map=x>y|z>w"),
    (lambda p: label_names([load(p / "f.txt", "a@neutral\nno label\n" * 9, "fpb")]), "'no label'; 'neutral'"),
    (lambda p: load_task(f"imdb:{p}"), "train lacks neg; give the folder aclImdb"),
    (lambda p: load_task(f"a:{p}/x.csv"), "{p}/x.csv"),
    (lambda p: load_task(f"imdb:{p}/x"), "{p}/x"),
    (lambda p: load(p / "x.csv", "text,y\n" + "b,1\n" * 20), "'label'; ['text', 'y']; label=COL"),
    (lambda p: load(p / "x.csv", "txt,label\n" + "b,1\n" * 20), "'text'; ['txt', 'label']; text=COL"),
    (lambda p: load(p / "x.csv", "text,label\nb,1\nc,1"), "2 rows are too few to cut validation and test from"),
    (lambda p: load(p / "test.csv", "text,label\nb,1"), "['test']; Task("),
    (lambda p: load(p / "x.csv", "text,label\nd\xe9,1\n" * 9, encoding="latin-1"), "{p}/x.csv cannot be read; UTF-8"),
    (lambda p: load_task("icwsm14/nyt", max_train_samples=0), "max_train_samples=0; positive"),
    (lambda p: names(0, 2, 0), "'a'; train_dataset; row 0; the label 0; names=a|b|c"),
    (lambda p: names(0, 2, 0, label_names=["n", "p"]), "row 1; the label 2; ['n', 'p']"),
    (lambda p: names(0, -1, 0, label_names=["n", "p"]), "row 1; the label -1"),
    (lambda p: names("neg", "pos", label_names=["neg"]), "'pos'; ['neg']"),
    (lambda p: names("a", None, "b"), "row 1; None; Drop what has no label"),
    (lambda p: names("a", " ", "b"), "row 1; ''; Drop what has no label"),
    (lambda p: names(0.0, 1.0, label_names=["n", "p"]), "0.0; " + ROUTE),
    (lambda p: names([0], [0, 1]), "[0]; " + ROUTE),
    (lambda p: names("neg", "pos", label_map={"posi": "p"}), "['posi']; ['neg', 'pos']; correct the keys"),
    (
        lambda p: prepare(make(), neg=0, LABEL_1=1),
        "['pos']; {'neg': 0, 'LABEL_1': 1}; label2id=; id2label=; label_names(",
    ),
    (lambda p: prepare(make(texts=["x", None, "z"])), "'text' holds None; drop such"),
]


@pytest.mark.parametrize(("fail", "parts"), ERRORS, ids=[parts for _, parts in ERRORS])
def test_errors_show_the_value_and_the_remedy(fail, parts, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        fail(tmp_path)
    for part in parts.split("; "):
        assert part.replace("{p}", str(tmp_path)) in str(error.value)


def test_label_smoothing_is_trainers():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = LabelSmoother(epsilon=0.3)({"logits": logits}, labels)
    torch.testing.assert_close(classification_loss({"logits": logits}, labels, label_smoothing=0.3), expected)
    halves = [classification_loss({"logits": logits[i]}, labels[i], 6, 0.3) for i in (slice(2), slice(2, 6))]
    torch.testing.assert_close(sum(halves), expected)
    assert not is_single_label_classifier(torch.nn.Linear(2, 3))
