"""The model card: `model_card_template.md` beside this file, filled from the content of `results.json` alone."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

from ..files import replacing
from ..redaction import UNPRINTABLE, public_arguments, public_command
from .results import LEARNED_BEFORE, AnyPath, Names, Results, Scale, markdown_table, metric_rows, stages

# Class to load a model with -> the Hub's name of what it does, and a text's.
_KINDS = {
    "AutoModelForSequenceClassification": ("text-classification", "text classifier"),
    "AutoModelForCausalLM": ("text-generation", "language model"),
    "AutoModelForSeq2SeqLM": ("text2text-generation", "sequence-to-sequence model"),
}


def write_model_card(
    path: AnyPath, results: Results, base_model: str | None = None, license: str | None = None, tags: Names = ()
) -> None:
    """Write the model card, with the metadata that the Hub reads, to `path`, the README.md of a model's folder.

    It shows the figures, and tells how to continue from the continual memory, that the folder holds.

    Args:
        results (`Mapping`): content of `results.json`; secrets in its arguments and command are left out.
        base_model (`str`, default: unknown): Hub id, or a local folder, of which only the last part is told.
        license (`str`, default: none): the Hub's name of the model's license, such as "apache-2.0".
        tags (`Sequence[str]`, default: none): tags beside those of the package, the optimizer and the methods.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    from ..memory import MEMORY_NAME
    from ..training_args import ContinualTrainingArguments

    folder, tasks, R, method = Path(path).parent, results["tasks"], results["accuracy_matrix"], results["method"]
    arguments, scale = public_arguments(results["arguments"]), Scale.of(results)
    repo, learned = arguments.get("hub_model_id") or folder.resolve().name, arguments.get("learned_tasks", 0)
    methods = [m for m in method.get("parts", [method]) if m["name"] != "none"]
    auto_class = results.get("auto_class", "AutoModelForSequenceClassification")
    pipeline, kind = _KINDS[auto_class]
    hub_id = re.fullmatch(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", base_model or "") and not Path(str(base_model)).exists()
    base = base_model if hub_id or not base_model else Path(base_model).name
    datasets, names = results.get("datasets") or None, [_plain(task) for task in tasks]
    data = ModelCardData(base_model=base if hub_id else None, datasets=datasets, license=license)
    data.library_name, data.pipeline_tag, data.model_name = "transformers", pipeline, repo.split("/")[-1]
    data.tags = ["continual-learning", results["optimizer"]["name"].lower(), *(m["name"] for m in methods), *tags]
    named: dict[str, Any] = {"metric_type": scale.metric, "metric_name": f"{scale.metric} after the last task"}
    data.eval_results = [EvalResult(pipeline, x, x, metric_value=round(v, 4), **named) for x, v in zip(tasks, R[-1])]
    matrix = [["", *names]]
    for t, (stage, row) in enumerate(zip(stages(names, R, learned), R)):
        cells = map(scale.text, row)
        matrix.append([stage, *(f"**{cell}**" if t == j + 1 > learned else cell for j, cell in enumerate(cells))])
    metrics = [["metric", "value", "meaning"], *([*map(_plain, r)] for r in metric_rows(results["metrics"], scale))]
    figures = [n for n in ("accuracy_matrix", "retention", "importance") if (folder / f"{n}.png").is_file()]
    memory_name = MEMORY_NAME if (folder / MEMORY_NAME).is_file() else None
    defaults = {field.name: field.default for field in dataclasses.fields(ContinualTrainingArguments)}
    shown = {"results": results, "arguments": arguments, "defaults": defaults, "methods": methods, "names": names}
    shown |= {"repo": repo, "kind": kind, "auto_class": auto_class, "base": base, "metric": _plain(scale.title)}
    shown |= {"matrix_table": markdown_table(matrix, "<" + ">" * len(names)), "figures": figures}
    shown |= {"metrics_table": markdown_table(metrics, "<><"), "learned_note": LEARNED_BEFORE if learned else None}
    shown |= {"command": public_command(shlex.split(results["command"])), "memory_name": memory_name}
    shown |= {"plain": _plain, "code": _code, "literal": _literal}
    template = Path(__file__).with_name("model_card_template.md")
    card = ModelCard.from_template(data, template_path=str(template), **shown)
    with replacing(path) as temporary:
        temporary.write_text(str(card).rstrip() + "\n", encoding="utf-8")


def _plain(text: str) -> str:
    """`text` on one line, as Markdown that shows it as it is."""
    line = " ".join(UNPRINTABLE.sub(" ", text).split())
    return re.sub(r"[\\`*\[\]<>~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", line)


def _code(value: Any) -> str:
    """A value on one line as a Markdown code span, between more backticks than it holds."""
    line = UNPRINTABLE.sub(" ", str(value))
    ticks = "`" * (1 + line.count("`"))
    return f"{ticks} {line} {ticks}" if len(ticks) > 1 else f"`{line}`"


def _literal(value: Any) -> str:
    """Python source of a value, strings in double quotes as formatters want them."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
