"""`results.html`: what `results.json` holds as one page that loads nothing from elsewhere; `page_template.html` is its
form."""

import base64
import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..files import replacing
from ..redaction import UNPRINTABLE, public_command
from .results import AnyPath, Results, Scale, learned_tasks, metric_rows, stages

_FIGURES = {
    "retention": "the metric of every task after every stage",
    "importance": "what each task left in the memory, layer by layer",
}
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: UNPRINTABLE.sub(" ", value) if isinstance(value, str) else value,
)


def write_page(path: AnyPath, results: Results) -> None:
    """Write the page to `path`, atomically, with R as a heat map and the figures (PNG) that lie beside it. All text is
    escaped."""
    tasks, scale, learned, rows = results["tasks"], Scale(results), learned_tasks(results), []
    for t, (stage, row) in enumerate(zip(stages(results), results["accuracy_matrix"])):
        rows.append((stage, [(scale.text(v), scale.share(v), t == j > learned) for j, v in enumerate(row, 1)]))
    figures = {title: Path(path).with_name(f"{name}.png") for name, title in _FIGURES.items()}
    text = _ENVIRONMENT.get_template("page_template.html").render(
        results=results,
        heading=" → ".join(tasks if len(tasks) < 5 else [f"{len(tasks)} tasks: {tasks[0]}", "…", tasks[-1]]),
        names=[described(results[part]) for part in ("optimizer", "method") if results[part]["name"] != "none"],
        title=scale.title,
        rows=rows,
        metrics=metric_rows(results),
        figures={k: base64.b64encode(p.read_bytes()).decode() for k, p in figures.items() if p.is_file()},
        command=public_command(shlex.split(results["command"])),
    )
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def described(part: Results) -> str:
    """An optimizer or a method with its hyperparameters, as in `EWC (ewc_lambda=3.0)`."""
    given = ", ".join(f"{k}={v}" for k, v in part.items() if k not in ("name", "parts") and v is not None)
    return f"{part['name']} ({given})" if given else part["name"]
