"""Tasks: what a task is, loading one from a spec, aligning labels by name over a sequence."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value, load_dataset
from transformers.utils import logging

from . import embedded
from .files import READERS, read_table

logger = logging.get_logger(__name__)

SENTIMENT = ["negative", "neutral", "positive"]
BUILT_IN = [*(f"icwsm14/{domain}" for domain in embedded.DOMAINS), "fpb", "imdb"]
GRAMMAR = (
    "name:path_or_id[:config][,text=COL][,text_pair=COL][,label=COL][,names=a|b|c][,map=x>y|z>w], for example "
    "'reviews:data/reviews.csv,text=review,label=stars,names=bad|good,map=bad>negative|good>positive'"
)
PREPARE = (
    "Prepare all but texts (images, audio, float labels) first, by map, or with_transform and remove_unused_columns="
    "False: what the model takes, such as pixel_values, and labels as numbers. Any processing_class will then do."
)
_FPB = {"text_column": "sentence", "label_names": SENTIMENT}
_IMDB = {"label_map": {"neg": "negative", "pos": "positive"}}
_OPTIONS = {"text": "text_column", "text_pair": "text_pair_column", "label": "label_column"}
_OPTIONS |= {"names": "label_names", "map": "label_map"}
_FIXED_SEED = 0  # of what runs are compared on, whatever their own seed
_LABELS = {"labels", "label", "label_ids"}  # what the data collators of Transformers take
_INPUTS = {"input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features"}


@dataclass
class Task:
    """One task of a sequence, in one of three forms:

    - texts with a label each, as below: they are tokenised, and labels aligned by name;
    - for language models `messages`, `prompt` and `completion`, or `text`: see `prepare_language_tasks`;
    - prepared datasets for all else, used as they are: what the model takes (`pixel_values`, `input_ids`, ...) and
      `labels` (or `label`, `label_ids`) as numbers, by `Dataset.map`, or by `Dataset.with_transform` and
      `remove_unused_columns=False`. Labels of images and audio are class ids, of regression floats, of multi-label
      classification 0.0 or 1.0 a class, of token classification a class id a token (-100: no loss).

    Args:
        name: Unique in the sequence, of letters, digits, `.`, `_`, `-` and inner `/`, with a letter or digit first.
        train_dataset: The training split.
        eval_dataset: The validation split, for choices such as the best checkpoint or a hyperparameter.
        test_dataset: The split that the accuracy matrix is measured on. Default: `eval_dataset`.
        text_column: Column of the text. Default: "text".
        text_pair_column: Column of the second text of a sentence pair. Default: there is none.
        label_column: Column of a ClassLabel, of strings (each its own name), or of integers with `label_names`.
            Default: "label".
        label_map: This task's label names -> the sequence's, for synonyms ({"pos": "positive"}). Default: names stay.
        label_names: Names of integer labels, index = class id. Default: a ClassLabel's own names.
        label_ids: The model's class ids that belong to this task; `prepare_tasks` fills it.
        hub_id: Where on the Hub the data come from, for the model card; `load_task` fills it.

    Raises:
        ValueError: a `name` of another form.
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
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)*", self.name):
            usable = "letters, digits, '.', '_', '-' and inner '/', and begin with a letter or digit"
            raise ValueError(f"Task name {self.name!r} is not usable as a folder name; use {usable}.")

    @property
    def slug(self) -> str:
        """The name as a folder name: `icwsm14/nyt` -> `icwsm14-nyt`."""
        return self.name.replace("/", "-")

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
              negative below a mean valence of -0.5, positive above 0.5. The stratified 70/10/20 split is fixed.
            - `fpb`: Financial PhraseBank (Malo et al., 2014), sentences with at least 50% agreement, from the Hub;
              `fpb:/path/Sentences_50Agree.txt`: the same from the original file.
            - `imdb`: Large Movie Review Dataset (Maas et al., 2011), from the Hub; `imdb:/path/aclImdb`: the same
              from the original folder. Its neg/pos are mapped to negative/positive.
            - `name:path_or_id[:config][,text=COL][,text_pair=COL][,label=COL][,names=a|b|c][,map=x>y|z>w]`: a .csv,
              .tsv, .json, .jsonl or .parquet file, a local folder, or a Hub id; the options are fields of [`Task`].
        seed: Seed of the splits that are cut here and of the training subset; default 0. A source without a validation
            split loses a stratified 10% of train to it; one with neither validation nor test is cut 80/10/10.
        max_train_samples: Size, >= 1, of the (stratified) training subset; default None: all.
        max_eval_samples: The same for validation and for test, with a fixed seed; default None: all.

    Returns:
        The task, with texts and labels as they are in the source.

    Raises:
        ValueError: a spec, column, split or size that cannot be used.
        FileNotFoundError: a missing path.
    """
    if any(size is not None and size < 1 for size in (max_train_samples, max_eval_samples)):
        raise ValueError(f"{max_train_samples=}, {max_eval_samples=}: give a positive number, or None for all.")
    splits, fields = _read(spec)
    if "train" not in splits:
        raise ValueError(f"Task {fields['name']!r}: no split 'train', only {sorted(splits)}; build it with Task(...).")
    train, test = splits["train"], splits.get("test")
    held_out = next((splits[split] for split in ("validation", "valid", "val", "dev") if split in splits), train)
    task = Task(train_dataset=train, eval_dataset=held_out, test_dataset=test, **fields)
    _check_columns(task)
    if test is not None and set(map(str, test[task.label_column][:])) == {"-1"}:
        logger.warning(f"Task {task.name}: the labels of its test split are hidden (all -1); the split is left out.")
        task.test_dataset = None
    if held_out is train:
        made = ["validation", "test"] if task.test_dataset is None else ["validation"]
        logger.info(f"Task {task.name}: no {' and '.join(made)} split; cut 10% each from train with seed {seed}.")
        parts = _cut(train, task.label_column, [max(1, round(0.1 * len(train)))] * len(made), seed)
        if not all(map(len, parts)):
            raise ValueError(
                f"Task {task.name!r}: {len(train)} rows are too few to cut {' and '.join(made)} from. Give more, or "
                "the splits."
            )
        task = replace(task, **dict(zip(("train_dataset", "eval_dataset", "test_dataset"), parts)))
    validate_tasks([task])
    for split, dataset in task.splits.items():
        size, own_seed = (max_train_samples, seed) if split == "train_dataset" else (max_eval_samples, _FIXED_SEED)
        if size is not None and size < len(dataset):
            setattr(task, split, _cut(dataset, task.label_column, [size], own_seed)[1])
    return task


def sample_train(task: Task, size: int | None, seed: int) -> Task:
    """The task with a stratified training subset of that size; None, or more than there are: all."""
    if size is None or size >= len(task.train_dataset):
        return task
    return replace(task, train_dataset=_cut(task.train_dataset, task.label_column, [size], seed)[1])


def with_test_split(task: Task) -> Task:
    """The task with a test split that nothing is chosen on: where the source has none its validation split, whose
    place a stratified tenth of the training split takes."""
    if task.test_dataset is not None:
        return task
    tenth = max(1, round(0.1 * len(task.train_dataset)))
    train, held_out = _cut(task.train_dataset, task.label_column, [tenth], _FIXED_SEED)
    return replace(task, train_dataset=train, eval_dataset=held_out, test_dataset=task.eval_dataset)


def label_names(tasks: list[Task]) -> list[str]:
    """Return the label names of a sequence, in order of first appearance: index = the model's class id.

    Within a task the order is that of `label_names`, else the ClassLabel's, else alphabetical. Prepared ones add none.

    Raises:
        ValueError: labels without usable names.
    """
    validate_tasks(tasks)
    return list(dict.fromkeys(name for task in tasks if not is_prepared(task) for name in _named_labels(task)[0]))


def prepare_tasks(tasks: list[Task], tokenizer, label2id: dict[str, int], max_length: int | None = None) -> list[Task]:
    """Return new tasks, with every split tokenised and label names replaced by the model's ids; `label_ids` is filled.

    Their datasets hold the tokenizer's columns and integer `labels`; validation and test rows are sorted by length.

    Args:
        tasks: Left as they are; prepared ones pass through untouched.
        tokenizer: A `PreTrainedTokenizerBase`, called with truncation and without padding; unused if all are prepared.
        label2id: The model's `config.label2id`, over `label_names(tasks)`.
        max_length: In tokens; default None: `tokenizer.model_max_length` where the tokenizer has one.

    Raises:
        ValueError: what `label_names` refuses, no tokenizer, texts that are not strings, labels not in `label2id`.
    """
    names = label_names(tasks)
    if missing := [name for name in names if name not in label2id]:
        raise ValueError(
            f"Labels {missing} are not in the model's label2id {label2id}. Build it with num_labels=len(names), "
            "label2id={n: i for i, n in enumerate(names)}, id2label=dict(enumerate(names)), label_names(tasks) are "
            f"{names}, or rename them: Task(label_map={{'pos': 'positive'}}), map=pos>positive in a spec."
        )
    return [task if is_prepared(task) else _prepare(task, tokenizer, label2id, max_length) for task in tasks]


def token_limit(tokenizer: Any, max_length: int | None) -> int | None:
    """`max_length`, by default the tokenizer's own limit, if any. Raises `ValueError` for what is no tokenizer."""
    limit = getattr(tokenizer, "model_max_length", None)
    if limit is None:
        raise ValueError(f"Tasks that hold texts need a tokenizer as processing_class, got {type(tokenizer)}.")
    return limit if max_length is None and limit < 1_000_000 else max_length  # "no limit" is int(1e30)


def validate_tasks(tasks: list[Task]) -> None:
    """Raise `ValueError` for no task, for what is none, for names of one folder, for splits without rows."""
    if not tasks:
        raise ValueError(f"tasks is {tasks!r}; give at least one Task, e.g. load_task('icwsm14/nyt').")
    slugs: dict[str, int] = {}
    for i, task in enumerate(tasks):
        if not isinstance(task, Task):
            raise ValueError(f"tasks[{i}] is {task!r}, not a Task; build it with Task(...) or load_task(spec).")
        first = slugs.setdefault(task.slug.casefold(), i)  # some file systems do not tell Nyt from nyt
        if first < i:
            raise ValueError(f"Tasks {tasks[first].name!r} and {task.name!r} share a folder name; rename one of them.")
        for split, dataset in task.splits.items():
            if not isinstance(dataset, Dataset) or len(dataset) == 0:
                raise ValueError(f"Task {task.name!r}: {split} is {dataset!r:.80}; give a datasets.Dataset with rows.")


def is_prepared(task: Task) -> bool:
    """Whether every split holds labels and inputs of a model, as numbers, and no text that is to be tokenised."""
    for columns in map(_columns, task.splits.values()):
        numbers = {name for name, kind in columns.items() if not re.search("string|binary|json", kind)}
        # beside a text that could be tokenised `label` is what is aligned by name, and inputs have a known name
        raw = {task.text_column, "messages", "prompt"} & columns.keys()
        labels, inputs = numbers & ({"labels"} if raw else _LABELS), numbers - _LABELS
        arrays = not raw and any(re.search("list|extension", columns[name]) for name in inputs)
        if not (labels and inputs and (inputs & _INPUTS or arrays or numbers == columns.keys())):
            return False
    return True


def _columns(dataset: Dataset) -> dict[str, str]:
    """Column -> Arrow type of the rows as they are read, which `with_transform` computes on access."""
    computed = dataset.format["type"] == "custom"
    schema = (Dataset.from_list([dataset[0]]) if computed else dataset).features.arrow_schema
    return {field.name: str(field.type) for field in schema if computed or field.name in dataset.format["columns"]}


def _check_columns(task: Task) -> None:
    needed = [task.label_column, *([] if is_prepared(task) else [task.text_column, task.text_pair_column])]
    for split, dataset in task.splits.items():
        columns = list(_columns(dataset))
        if missing := [column for column in needed if column is not None and column not in columns]:
            raise ValueError(
                f"Task {task.name!r}: {split} has no column {missing[0]!r}, only {columns}. For texts give text=COL, "
                "text_pair=COL, label=COL in a spec or Task(text_column=..., label_column=...). " + PREPARE
            )


def _named_labels(task: Task) -> tuple[list[str], dict[str, list[str]]]:
    """The task's label names in its order, and the label of every row of every split, both after `label_map`."""
    _check_columns(task)
    own, rows, mapping = list(task.label_names or []), {}, task.label_map or {}
    for split, dataset in task.splits.items():
        feature, values = dataset.features[task.label_column], dataset[task.label_column][:]
        names: list[str] = task.label_names or (feature.names if isinstance(feature, ClassLabel) else [])
        own, known = own or list(names), dict[Any, str](enumerate(names))
        if isinstance(feature, Value) and "string" in feature.dtype:
            values = [value and value.strip() for value in values]
            known = {name: name for name in names or values if name}
        for row, value in enumerate(values):
            if isinstance(value, (float, list, dict)) or value not in known:
                remedy = "Drop such rows, or name it in label_names." if value else "Drop what has no label."
                if isinstance(value, int):
                    remedy = "Name integers: names=a|b|c or Task(label_names=[...]) (index = id)."
                elif isinstance(value, (float, list, dict)):
                    remedy = PREPARE
                where = f"Task {task.name!r}: {split}, row {row}"
                raise ValueError(f"{where}: the label {value!r} is none of the names {names}. {remedy}")
        rows[split] = [known[value] for value in values]
    own += sorted({name for names in rows.values() for name in names}.difference(own))
    if unknown := [name for name in mapping if name not in own]:
        raise ValueError(f"Task {task.name!r}: label_map has {unknown}, but the labels are {own}; correct the keys.")
    renamed = {name: mapping.get(name, name) for name in own}
    return list(dict.fromkeys(renamed.values())), {s: [renamed[name] for name in names] for s, names in rows.items()}


def _prepare(task: Task, tokenizer, label2id: dict[str, int], max_length: int | None) -> Task:
    # Bound here, so that the hash of `tokenise`, which names the cache file of map, does not take in the datasets.
    name, columns = task.name, [c for c in (task.text_column, task.text_pair_column) if c is not None]
    max_length = token_limit(tokenizer, max_length)

    def tokenise(batch):
        for column in columns:
            if bad := [text for text in batch[column] if not isinstance(text, str)]:
                raise ValueError(f"Task {name!r}: column {column!r} holds {bad[0]!r}, not a text; drop such rows.")
        return tokenizer(*map(batch.get, columns), truncation=max_length is not None, max_length=max_length)

    prepared: dict[str, Any] = {}
    names, rows = _named_labels(task)
    for split, dataset in task.splits.items():
        tokens = dataset.map(tokenise, batched=True, remove_columns=dataset.column_names, desc=f"Tokenise {name}")
        # Not inside map, where a column that was already called "labels" would impose its old ClassLabel.
        tokens = tokens.add_column("labels", np.array([label2id[row] for row in rows[split]], dtype=np.int64))
        if split != "train_dataset":  # an evaluation batch of like lengths holds little padding
            batches = tokens.select_columns("input_ids").iter(1000)  # a column is read a row at a time
            lengths = [len(ids) for batch in batches for ids in batch["input_ids"]]
            tokens = tokens.select(np.argsort(lengths, kind="stable"))
        prepared[split] = tokens
    return replace(task, **prepared, label_ids=sorted(label2id[n] for n in names))


def _read(spec: str) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """The source's splits under its own names, and the fields of Task that go with them."""
    source, *options = spec.split(",")
    name, *where = source.split(":")
    if len(where) > 2 or "" in where or (not where and (options or name not in BUILT_IN)):
        raise ValueError(f"Cannot read task {spec!r}. Built in: {', '.join(BUILT_IN)}. Otherwise: {GRAMMAR}.")
    path, fields = Path(*where[:1]).expanduser(), dict[str, Any](name=name)
    for option in options:
        key, _, value = option.strip().partition("=")
        parts = value.split("|")
        pairs = [part.partition(">")[::2] for part in parts]
        if key not in _OPTIONS or not all(parts) or (key == "map" and not all(map(all, pairs))):
            raise ValueError(f"Cannot read option {option!r} of task {spec!r}; the grammar is {GRAMMAR}.")
        fields[_OPTIONS[key]] = parts if key == "names" else dict(pairs) if key == "map" else value
    if not where and name.startswith("icwsm14/"):
        return _icwsm14(name.removeprefix("icwsm14/")), fields
    if spec == "imdb":
        return load_dataset("stanfordnlp/imdb"), fields | _IMDB | {"hub_id": "stanfordnlp/imdb"}
    if spec == "fpb":
        # its main branch is a loading script, which datasets refuses since 4.0; this is the Hub's conversion of it
        hub_id, files = "takala/financial_phrasebank", {"train": "sentences_50agree/train/*.parquet"}
        splits = load_dataset(hub_id, revision="refs/convert/parquet", data_files=files)
        return splits, fields | _FPB | {"hub_id": hub_id}
    if name == "fpb" and path.suffix == ".txt":
        lines = [line.strip().rpartition("@") for line in path.read_text(encoding="iso-8859-1").split("\n")]
        rows = [{"sentence": text, "label": label} for text, _, label in lines if text or label]
        return {"train": Dataset.from_list(rows)}, _FPB | fields
    if name == "imdb" and path.is_dir():
        return {split: _imdb_folder(path / split) for split in ("train", "test")}, _IMDB | fields
    if path.suffix in READERS:
        return read_table(path, *where[1:]), fields
    if path.exists():
        return load_dataset(str(path), *where[1:]), fields
    return load_dataset(*where), {**fields, "hub_id": where[0]}


def _icwsm14(domain: str) -> dict[str, Dataset]:
    rows: dict[str, tuple[str, float]] = {}
    for text, valence in embedded.icwsm14(domain):
        rows.setdefault(re.sub(r"[\W_]+", " ", text.lower()).strip(), (text, valence))
    rows.pop("", None)  # punctuation only
    data = [{"text": text, "label": 1 + (valence > 0.5) - (valence < -0.5)} for text, valence in rows.values()]
    dataset = Dataset.from_list(data).cast_column("label", ClassLabel(names=SENTIMENT))
    parts = _cut(dataset, "label", [round(0.1 * len(data)), round(0.2 * len(data))], _FIXED_SEED)
    return dict(zip(("train", "validation", "test"), parts))


def _imdb_folder(path: Path) -> Dataset:
    files = [(file, i) for i, label in enumerate(("neg", "pos")) for file in sorted((path / label).glob("*.txt"))]
    if {i for _, i in files} != {0, 1}:
        raise ValueError(f"{path} lacks neg/*.txt or pos/*.txt; give the folder aclImdb.")
    rows = [{"text": file.read_text(encoding="utf-8"), "label": i} for file, i in files]
    return Dataset.from_list(rows).cast_column("label", ClassLabel(names=["neg", "pos"]))


def _cut(dataset: Dataset, label_column: str, sizes: list[int], seed: int) -> list[Dataset]:
    """The rest, then parts of these sizes; each has about the label proportions of the whole."""
    # RandomState, not default_rng: its streams are frozen (NEP 19), so the fixed splits outlive NumPy's versions.
    random = np.random.RandomState(seed)
    _, classes = np.unique([str(label) for label in dataset[label_column][:]], return_inverse=True)
    position = np.empty(len(classes))
    for c in range(classes.max() + 1):
        members = random.permutation(np.flatnonzero(classes == c))
        position[members] = (np.arange(len(members)) + random.random_sample()) / len(members)  # evenly, 1/n apart
    *parts, rest = np.split(np.argsort(position, kind="stable"), np.cumsum(sizes))
    return [dataset.select(indices) for indices in (rest, *parts)]
