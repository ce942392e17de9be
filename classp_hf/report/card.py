"""The model card: `model_card_template.md` beside this file, filled from the content of `results.json` alone."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import replacing
from ..memory import MEMORY_NAME
from ..redaction import UNPRINTABLE, public_arguments, public_command
from ..training_args import ContinualTrainingArguments
from .results import AnyPath, Names, Results, Scale, plain, sequence_tables

# Class to load a model with -> the Hub's name of what it does, and the card's.
_KINDS = {
    "AutoModelForSequenceClassification": ("text-classification", "text classifier"),
    "AutoModelForCausalLM": ("text-generation", "language model"),
    "AutoModelForSeq2SeqLM": ("text2text-generation", "sequence-to-sequence model"),
    "AutoModelForMaskedLM": ("fill-mask", "masked language model"),
    "AutoModelForTokenClassification": ("token-classification", "token classifier"),
    "AutoModelForImageClassification": ("image-classification", "image classifier"),
    "AutoModelForAudioClassification": ("audio-classification", "audio classifier"),
}


def write_model_card(
    path: AnyPath, results: Results, base_model: str | None = None, license: str | None = None, tags: Names = ()
) -> None:
    """Write the model card, with the metadata that the Hub reads, to `path`, the README.md of a model's folder.

    Args:
        results: content of `results.json`; secrets in its arguments and command are left out.
        base_model: Hub id, or a local folder, of which only the last part is shown. Default: unknown.
        license: the Hub's name of the model's license, such as "apache-2.0". Default: none.
        tags: tags beside those of the package, the optimizer and the methods.
    """
    folder, method, scale = Path(path).parent, results["method"], Scale(results)
    arguments = public_arguments(results["arguments"])
    repo = arguments.get("hub_model_id") or folder.resolve().name
    methods = [m for m in method.get("parts", [method]) if m["name"] != "none"]
    auto_class = results.get("auto_class", "AutoModelForSequenceClassification")
    pipeline, kind = _KINDS.get(auto_class, (None, "model"))
    hub_id = re.fullmatch(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", base_model or "") and not Path(str(base_model)).exists()
    named: dict[str, Any] = {"metric_type": scale.metric, "metric_name": f"{scale.metric} after the last task"}
    at_the_end = zip(results["tasks"], results["accuracy_matrix"][-1])
    data = ModelCardData(
        base_model=base_model if hub_id else None,
        datasets=results.get("datasets") or None,
        license=license,
        library_name="transformers",
        pipeline_tag=pipeline,
        model_name=repo.split("/")[-1],
        tags=["continual-learning", results["optimizer"]["name"].lower(), *(m["name"] for m in methods), *tags],
        eval_results=[EvalResult(pipeline or "other", t, t, metric_value=round(v, 4), **named) for t, v in at_the_end],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card_template.md")),
        results=results,
        arguments=arguments,
        defaults={field.name: field.default for field in dataclasses.fields(ContinualTrainingArguments)},
        methods=methods,
        repo=repo,
        kind=kind,
        auto_class=auto_class if hasattr(transformers, auto_class) else None,
        processor="AutoProcessor" if re.search("Image|Audio|Video", auto_class) else "AutoTokenizer",
        class_name=auto_class,
        base=base_model if hub_id or not base_model else Path(base_model).name,
        metric=plain(scale.title),
        tables=sequence_tables(results),
        figures=[n for n in ("accuracy_matrix", "retention", "importance") if (folder / f"{n}.png").is_file()],
        memory_name=MEMORY_NAME if (folder / MEMORY_NAME).is_file() else None,
        command=public_command(shlex.split(results["command"])),
        plain=plain,
        code=_code,
        literal=_literal,
    )
    with replacing(path) as temporary:
        temporary.write_text(str(card).rstrip() + "\n", encoding="utf-8")


def _code(value: Any) -> str:
    """A value on one line as a Markdown code span, between more backticks than it holds."""
    line = UNPRINTABLE.sub(" ", str(value))
    ticks = "`" * (1 + line.count("`"))
    return f"{ticks} {line} {ticks}" if len(ticks) > 1 else f"`{line}`"


def _literal(value: Any) -> str:
    """Python source of a value, strings in double quotes as formatters want them."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
