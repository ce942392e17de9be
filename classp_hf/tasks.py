"""Text-classification tasks: what a task is, loading one from a spec, aligning labels by name over a sequence."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from transformers.utils import logging

from . import embedded

logger = logging.get_logger(__name__)

SENTIMENT = ["negative", "neutral", "positive"]
BUILT_IN = [*(f"icwsm14/{domain}" for domain in embedded.DOMAINS), "fpb", "imdb"]
GRAMMAR = (
    "name:path_or_id[:config][,text=COL][,text_pair=COL][,label=COL][,names=a|b|c][,map=x>y|z>w], for example "
    "'reviews:data/reviews.csv,text=review,label=stars,names=bad|good,map=bad>negative|good>positive'"
)

_OPTIONS = {"text": "text_column", "text_pair": "text_pair_column", "label": "label_column"}
_OPTIONS |= {"names": "label_names", "map": "label_map"}
_FPB = {"text_column": "sentence", "label_names": SENTIMENT}
_IMDB = {"label_map": {"neg": "negative", "pos": "positive"}}
_VALIDATION_SPLITS = ["validation", "valid", "val", "dev"]
_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_FIXED_SEED = 0  # of what runs are compared on, whatever their own seed


@dataclass
class Task:
    """One task of a sequence.

    Args:
        name: Unique in the sequence and usable as a folder name: letters, digits, `.`, `_`, `-`, inner `/`.
        train_dataset: Rows of `text_column`, optionally `text_pair_column`, and `label_column`.
        eval_dataset: The validation split, for choices such as the best checkpoint or a hyperparameter.
        test_dataset: What the accuracy matrix is measured on; None: `eval_dataset` is.
        text_column: Default "text".
        text_pair_column: Second text of a sentence pair; default None.
        label_column: Default "label". A ClassLabel, strings (each its own name), or integers with `label_names`.
        label_map: This task's label names -> the sequence's, for synonyms ({"pos": "positive"}); a name without
            an entry stays as it is. Nothing is guessed.
        label_names: Names of integer labels, index = class id. Takes precedence over a ClassLabel's own names.
        label_ids: The model's class ids that belong to this task; `prepare_tasks` fills it.
        hub_id: Where on the Hub the data come from, for the model card; `load_task` fills it.

    Raises `ValueError` for a name that is not usable as a folder name.
    """

    name: str
    train_dataset: Dataset
    eval_dataset: Dataset
    test_dataset: Dataset | None = None
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    label_map: dict[str, str] | None = None
    label_names: list[str] | None = None
    label_ids: list[int] | None = None
    hub_id: str | None = None

    def __post_init__(self):
        _slug(self.name)

    @property
    def slug(self) -> str:
        """The name as a folder name: `icwsm14/nyt` -> `icwsm14-nyt`."""
        return _slug(self.name)

    @property
    def measured_dataset(self) -> Dataset:
        """The split that the accuracy matrix is measured on: test, or validation where there is no test."""
        return self.eval_dataset if self.test_dataset is None else self.test_dataset

    @property
    def splits(self) -> dict[str, Dataset]:
        """The datasets that are there, by the name of their field."""
        named = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        return named if self.test_dataset is None else named | {"test_dataset": self.test_dataset}


def load_task(
    spec: str, *, seed: int = 0, max_train_samples: int | None = None, max_eval_samples: int | None = None
) -> Task:
    """Load one task.

    Args:
        spec: One of
            - `icwsm14/nyt`, `icwsm14/movie`, `icwsm14/amazon`, `icwsm14/tweets`: real sentences that come by pip;
              negative below a mean valence of -0.5, positive above 0.5, else neutral. Duplicates are dropped;
              the stratified 70/10/20 split is fixed.
            - `fpb`: Financial PhraseBank (Malo et al., 2014), sentences with at least 50% agreement, from the Hub;
              `fpb:/path/Sentences_50Agree.txt`: the same from the original file.
            - `imdb`: Large Movie Review Dataset (Maas et al., 2011), from the Hub; `imdb:/path/aclImdb`: the same
              from the original folder. Its neg/pos are mapped to negative/positive.
            - anything else: `GRAMMAR`; a .csv, .tsv, .json, .jsonl or .parquet file, a local folder, or a Hub id.
        seed: Of the splits that are cut here and of the training subset; default 0. A source without a
            validation split loses a stratified 10% of train to it, one without any split is cut 80/10/10.
        max_train_samples: Size of the (stratified) training subset; default None: all.
        max_eval_samples: The same for validation and for test, with a fixed seed; default None: all.

    Raises `ValueError` for a spec, column, split or size that cannot be used, `FileNotFoundError` for a missing path.
    """
    if any(size is not None and size < 1 for size in (max_train_samples, max_eval_samples)):
        given = f"max_train_samples={max_train_samples}, max_eval_samples={max_eval_samples}"
        raise ValueError(f"{given}: give a positive number, or None for all.")
    splits, fields = _read(spec)
    train, evaluation, test = _complete(splits, fields, seed)
    task = Task(
        train_dataset=_subset(train, fields, max_train_samples, seed),
        eval_dataset=_subset(evaluation, fields, max_eval_samples, _FIXED_SEED),
        test_dataset=None if test is None else _subset(test, fields, max_eval_samples, _FIXED_SEED),
        **fields,
    )
    validate_tasks([task])
    return task


def label_names(tasks: list[Task]) -> list[str]:
    """The label names of a sequence, in order of first appearance: index = the model's class id.

    Within a task the order is `label_names`', else the ClassLabel's, else alphabetical. Tokenised tasks (with
    `input_ids` and `labels`) hold ids already and add no name. Raises `ValueError` for labels without usable names.
    """
    validate_tasks(tasks)
    named = (name for task in tasks if not is_tokenised(task) for name in _task_names(task))
    return list(dict.fromkeys(named))


def prepare_tasks(tasks: list[Task], tokenizer, label2id: dict[str, int], max_length: int | None = None) -> list[Task]:
    """Tokenise every split and replace labels by the model's ids, by name.

    Args:
        tasks: Left as they are. A task whose splits already hold `input_ids` and `labels` passes through untouched.
        tokenizer: A `PreTrainedTokenizerBase`; called with truncation and without padding.
        label2id: The model's `config.label2id`, over `label_names(tasks)`.
        max_length: In tokens; default None: `tokenizer.model_max_length` where the tokenizer has one.

    Returns:
        New tasks whose datasets hold the tokenizer's columns and integer `labels`, with `label_ids` filled; validation
        and test rows are sorted by length.

    Raises `ValueError` for whatever `validate_tasks` and `label_names` refuse, for texts that are not strings, and
    for labels that are not in `label2id`.
    """
    names = label_names(tasks)
    missing = [name for name in names if name not in label2id]
    if missing:
        raise ValueError(
            f"Labels {missing} are not in the model's label2id {label2id}. Build the model with num_labels=len(names), "
            "label2id={n: i for i, n in enumerate(names)}, id2label=dict(enumerate(names)) where "
            f"names = label_names(tasks), here {names}; or, where they are other names for the model's labels, rename them: "
            "Task(label_map={'pos': 'positive'}), or map=pos>positive in load_task's spec."
        )
    if tokenizer is None and not all(is_tokenised(task) for task in tasks):
        raise ValueError(
            "Tasks that hold texts need a tokenizer, got None; pass the trainer processing_class=tokenizer."
        )
    if (
        max_length is None and tokenizer is not None and tokenizer.model_max_length < 1_000_000
    ):  # "no limit" is int(1e30)
        max_length = tokenizer.model_max_length
    return [task if is_tokenised(task) else _prepare(task, tokenizer, label2id, max_length) for task in tasks]


def validate_tasks(tasks: list[Task]) -> None:
    """Raise `ValueError` for whatever `validate_splits` refuses, and for a missing column."""
    validate_splits(tasks)
    for task in tasks:
        if not is_tokenised(task):
            for split, dataset in task.splits.items():
                wanted = [task.text_column, task.text_pair_column, task.label_column]
                _check_columns(f"Task {task.name!r}: {split}", dataset, wanted)


def validate_splits(tasks: list[Task]) -> None:
    """Raise `ValueError` for an empty list, an element that is not a Task, names that collide as folders, a split that
    is empty or not a `datasets.Dataset`."""
    if not tasks:
        raise ValueError(f"tasks is {tasks!r}; give at least one Task, e.g. load_task('icwsm14/nyt').")
    slugs: dict[str, str] = {}
    for i, task in enumerate(tasks):
        if not isinstance(task, Task):
            raise ValueError(f"tasks[{i}] is {task!r}, not a Task; build it with Task(...) or load_task(spec).")
        slug = task.slug.casefold()  # some file systems do not tell Nyt from nyt
        if slug in slugs:
            raise ValueError(f"Tasks {slugs[slug]!r} and {task.name!r} share a folder name; rename one of them.")
        slugs[slug] = task.name
        for split, dataset in task.splits.items():
            where = f"Task {task.name!r}: {split}"
            if not isinstance(dataset, Dataset):
                raise ValueError(f"{where} is a {type(dataset).__name__}; give a datasets.Dataset.")
            if len(dataset) == 0:
                raise ValueError(f"{where} is empty; give it rows (a test_dataset may be left None).")


def _slug(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)*", name):
        usable = "letters, digits, '.', '_', '-' and inner '/', beginning with a letter or digit"
        raise ValueError(f"Task name {name!r} is not usable as a folder name; use {usable}.")
    return name.replace("/", "-")


def _check_columns(where: str, dataset: Dataset, columns: list[str | None]) -> None:
    for column in columns:
        if column is not None and column not in dataset.column_names:
            raise ValueError(
                f"{where} has no column {column!r}, only {dataset.column_names}; name the right one with text=COL, "
                "text_pair=COL or label=COL in the spec, or text_column, text_pair_column, label_column of Task."
            )


# --- labels ---


def is_tokenised(task: Task) -> bool:
    """Whether every split holds `input_ids` and `labels`."""
    return all({"input_ids", "labels"} <= set(dataset.column_names) for dataset in task.splits.values())


def _row_names(task: Task, split: str, dataset: Dataset) -> list[str]:
    """The label of every row as a name of the task's own, before `label_map`."""
    feature = dataset.features[task.label_column]
    kind = feature.dtype if isinstance(feature, (ClassLabel, Value)) else type(feature).__name__
    names: list[str] = task.label_names or (feature.names if isinstance(feature, ClassLabel) else [])
    where = f"Task {task.name!r}: {split}, label column {task.label_column!r}"
    values = list(dataset[task.label_column])
    seen = ", ".join(sorted({str(value) for value in values})[:10])
    is_text = kind in ("string", "large_string")
    if is_text:
        values = [value and value.strip() for value in values]
    absent = [i for i, value in enumerate(values) if value is None or value == ""]
    if absent:
        raise ValueError(f"{where}: row {absent[0]} (and {len(absent) - 1} more) has no label; drop such rows first.")
    if not is_text and kind != "bool" and not kind.startswith(("int", "uint")):
        remedy = "classification needs class names or integer ids, cast the column"
        raise ValueError(f"{where} holds {kind} values such as {seen}; {remedy}.")
    if not is_text and not names:
        raise ValueError(
            f"{where} holds the integers {seen} without names, and labels are aligned by name; give them with "
            "names=negative|neutral|positive in the spec or Task(label_names=[...]) (index = class id)."
        )
    known = (names or values) if is_text else range(len(names))
    bad = sorted(set(values).difference(known))[:10]
    if bad:
        raise ValueError(f"{where} holds {bad}, outside of the names {names}; drop those rows or name every class.")
    return values if is_text else [names[value] for value in values]


def _task_names(task: Task) -> list[str]:
    """The task's label names after `label_map`, in its order."""
    present = {n for split, dataset in task.splits.items() for n in _row_names(task, split, dataset)}
    feature = task.train_dataset.features[task.label_column]
    own = list(task.label_names or (feature.names if isinstance(feature, ClassLabel) else ()))
    own += sorted(present - set(own))
    mapping = task.label_map or {}
    unknown = [name for name in mapping if name not in own]
    if unknown:
        raise ValueError(f"Task {task.name!r}: label_map has {unknown}, but the labels are {own}; correct the keys.")
    return list(dict.fromkeys(mapping.get(name, name) for name in own))


def _prepare(task: Task, tokenizer, label2id: dict[str, int], max_length: int | None) -> Task:
    # Bound here, so that the hash of `tokenise`, which names the cache file of map, does not take in the datasets.
    name, columns = task.name, [c for c in (task.text_column, task.text_pair_column) if c is not None]

    def tokenise(batch):
        for column in columns:
            bad = next((text for text in batch[column] if not isinstance(text, str)), "")
            if bad != "":
                raise ValueError(f"Task {name!r}: column {column!r} holds {bad!r}, not a text; drop such rows first.")
        texts = [batch[column] for column in columns]
        return tokenizer(*texts, truncation=max_length is not None, max_length=max_length)

    prepared = {}
    for split, dataset in task.splits.items():
        rows = [(task.label_map or {}).get(row, row) for row in _row_names(task, split, dataset)]
        tokens = dataset.map(tokenise, batched=True, remove_columns=dataset.column_names, desc=f"Tokenise {name}")
        # Not inside map, where a column that was already called "labels" would impose its old ClassLabel.
        tokens = tokens.add_column("labels", np.array([label2id[row] for row in rows], dtype=np.int64))
        if split != "train_dataset":  # an evaluation batch of like lengths holds little padding
            tokens = tokens.select(np.argsort([len(ids) for ids in tokens["input_ids"]], kind="stable"))
        prepared[split] = tokens
    return dataclasses.replace(task, **prepared, label_ids=sorted(label2id[n] for n in _task_names(task)))


# --- loading ---


def _read(spec: str) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """The source's splits under its own names, and the fields of Task that go with them."""
    source, *options = spec.split(",")
    name, *where = source.split(":")
    if len(where) > 2 or "" in where or (not where and (options or name not in BUILT_IN)):
        raise ValueError(f"Cannot read task {spec!r}. Built in: {', '.join(BUILT_IN)}. Otherwise: {GRAMMAR}.")
    _slug(name)  # Task checks this too, but only after the download
    path = Path(*where[:1]).expanduser()
    if not where:
        splits, fields = _built_in(name)
    elif (name == "fpb" and path.suffix == ".txt") or (name == "imdb" and path.is_dir()):
        if options or where[1:]:
            raise ValueError(f"Task {spec!r}: the original {name} format takes no options; stop after the path.")
        splits, fields = _fpb_file(path) if name == "fpb" else _imdb_folder(path)
    else:
        fields = _parse_options(spec, options) | {"hub_id": None if path.exists() else where[0]}
        splits = _load(*where)
    return splits, {"name": name, "label_column": "label", **fields}


def _built_in(name: str) -> tuple[dict[str, Dataset], dict[str, Any]]:
    if name == "fpb":
        # The main branch is a loading script, which datasets refuses since 4.0; this is the Hub's own conversion of it.
        files = {"train": "sentences_50agree/train/*.parquet"}
        splits = load_dataset("takala/financial_phrasebank", revision="refs/convert/parquet", data_files=files)
        return dict(splits), {**_FPB, "hub_id": "takala/financial_phrasebank"}
    if name == "imdb":
        return dict(load_dataset("stanfordnlp/imdb")), {**_IMDB, "hub_id": "stanfordnlp/imdb"}
    rows: dict[str, tuple[str, float]] = {}
    for text, valence in embedded.icwsm14(name.removeprefix("icwsm14/")):
        rows.setdefault(re.sub(r"[\W_]+", " ", text.lower()).strip(), (text, valence))
    rows.pop("", None)  # punctuation only
    columns = {
        "text": [text for text, _ in rows.values()],
        "label": [1 + (valence > 0.5) - (valence < -0.5) for _, valence in rows.values()],
    }
    features = Features({"text": Value("string"), "label": ClassLabel(names=SENTIMENT)})
    cut = _cut(name, Dataset.from_dict(columns, features=features), "label", [0.1, 0.2], _FIXED_SEED)
    return dict(zip(("train", "validation", "test"), cut)), {}


def _fpb_file(path: Path) -> tuple[dict[str, Dataset], dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="iso-8859-1").split("\n"), 1):
        sentence, _, label = line.strip().rpartition("@")
        if sentence:
            rows.append({"sentence": sentence, "label": label})
        elif line.strip():
            raise ValueError(f"{path}, line {number}: {line!r} is not 'sentence@label'; give Sentences_50Agree.txt.")
    return {"train": Dataset.from_list(rows)}, _FPB


def _imdb_folder(path: Path) -> tuple[dict[str, Dataset], dict[str, Any]]:
    splits = {}
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    for split in ("train", "test"):
        files = [(file, label) for label in ("neg", "pos") for file in sorted((path / split / label).glob("*.txt"))]
        if {label for _, label in files} != {"neg", "pos"}:
            raise ValueError(f"{path} lacks {split}/neg/*.txt or {split}/pos/*.txt; give the folder aclImdb.")
        rows = [{"text": file.read_text(encoding="utf-8"), "label": label} for file, label in files]
        splits[split] = Dataset.from_list(rows, features=features)
    return splits, _IMDB


def _load(source: str, config: str | None = None) -> dict[str, Dataset]:
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in _READERS and config is None:
        # "null" and "NA" are texts, not missing values.
        csv = {"keep_default_na": False, "sep": "\t" if path.suffix == ".tsv" else ","}
        reader = _READERS[path.suffix]
        return dict(load_dataset(reader, data_files={"train": str(path)}, **(csv if reader == "csv" else {})))
    if path.is_dir():
        return dict(load_dataset(str(path), config))
    if path.suffix in _READERS or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise FileNotFoundError(
            f"{source!r} (config {config!r}) is no local folder, no {', '.join(_READERS)} file (these have no config) "
            "and no Hub id (owner/name); correct the path."
        )
    return dict(load_dataset(source, config))


def _parse_options(spec: str, options: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for option in options:
        key, _, value = option.strip().partition("=")
        names = value.split("|")
        pairs = [name.partition(">")[::2] for name in names]
        if key not in _OPTIONS or not all(names) or (key == "map" and not all(map(all, pairs))):
            raise ValueError(f"Cannot read option {option!r} of task {spec!r}; the grammar is {GRAMMAR}.")
        fields[_OPTIONS[key]] = names if key == "names" else dict(pairs) if key == "map" else value
    return fields


def _complete(splits: dict[str, Dataset], fields: dict[str, Any], seed: int):
    """Train, validation and test (or None), cutting from train what the source does not have."""
    name, column = fields["name"], fields["label_column"]
    validation = next((splits[split] for split in _VALIDATION_SPLITS if split in splits), None)
    train, test = splits.get("train"), splits.get("test")
    if train is None:
        raise ValueError(f"Task {name!r} has no split 'train', only {sorted(splits)}; build it with Task(...).")
    for dataset in (train, validation, test):
        if dataset is not None:
            _check_columns(f"Task {name!r}: split {str(dataset.split)!r}", dataset, [column])
    if test is not None and set(test[column]) == {-1}:
        logger.warning(f"Task {name}: the labels of its test split are hidden (all -1); the split is left out.")
        test = None
    if validation is None:
        fractions = [0.1, 0.1] if test is None else [0.1]
        train, validation, *cut = _cut(name, train, column, fractions, seed)
        test = cut[0] if cut else test
        made = "validation and test" if cut else "validation"
        logger.info(f"Task {name}: no {made} split in {sorted(splits)}; cut 10% each from train with seed {seed}.")
    return train, validation, test


def _cut(name: str, dataset: Dataset, label_column: str, fractions: list[float], seed: int) -> list[Dataset]:
    """The rest, then one stratified part per fraction."""
    sizes = [max(1, round(fraction * len(dataset))) for fraction in fractions]
    if sum(sizes) >= len(dataset):
        raise ValueError(f"Task {name!r}: {len(dataset)} rows are too few to cut {sizes} from; give the splits.")
    *parts, rest = np.split(_stratified_order(dataset[label_column], seed), np.cumsum(sizes))
    return [dataset.select(indices) for indices in (rest, *parts)]


def _subset(dataset: Dataset, fields: dict[str, Any], size: int | None, seed: int) -> Dataset:
    if size is None or size >= len(dataset):
        return dataset
    return dataset.select(_stratified_order(dataset[fields["label_column"]], seed)[:size])


def _stratified_order(labels, seed: int) -> np.ndarray:
    """A permutation of the rows of which every contiguous slice has about the label proportions of the whole."""
    # RandomState, not default_rng: its streams are frozen (NEP 19), so the fixed splits outlive NumPy's versions.
    random = np.random.RandomState(seed)
    _, classes = np.unique([str(label) for label in labels], return_inverse=True)
    position = np.empty(len(classes))
    for c in range(classes.max() + 1):
        members = random.permutation(np.flatnonzero(classes == c))
        # n members at even distances 1/n, from a random start.
        position[members] = (np.arange(len(members)) + random.random_sample()) / len(members)
    return np.argsort(position, kind="stable")
