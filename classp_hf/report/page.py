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
    """Write the page to `path`, atomically, with R as a heat map and the figures (PNG) that lie beside it.

    Args:
        results: content of `results.json`; secrets in its command are left out, all text is escaped.
    """
    folder, scale, R = Path(path).parent, Scale(results), results["accuracy_matrix"]
    low, high = (0.0, 1.0) if scale.percent else (min(map(min, R)), max(map(max, R)))
    learned, rows = learned_tasks(results), []
    for t, (stage, row) in enumerate(zip(stages(results), R)):
        cells = [
            (scale.text(v), (v - low) / ((high - low) or 1.0), t > learned and j == t - 1) for j, v in enumerate(row)
        ]
        rows.append((stage, cells))
    tasks = results["tasks"]
    figures = {title: folder / f"{name}.png" for name, title in _FIGURES.items()}
    text = _ENVIRONMENT.get_template("page_template.html").render(
        results=results,
        heading=" → ".join(tasks if len(tasks) < 5 else [f"{len(tasks)} tasks: {tasks[0]}", "…", tasks[-1]]),
        names=[described(results[part]) for part in ("optimizer", "method") if results[part]["name"] != "none"],
        title=scale.title,
        rows=rows,
        metrics=metric_rows(results),
        figures={k: base64.b64encode(p.read_bytes()).decode() for k, p in figures.items() if p.is_file()},
        costs=_costs(results),
        guard=results.get("guard"),
        command=public_command(shlex.split(results["command"])),
    )
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def described(part: Results) -> str:
    """An optimizer or a method with its hyperparameters, as in `EWC (ewc_lambda=3.0)`."""
    given = ", ".join(f"{k}={v}" for k, v in part.items() if k not in ("name", "parts") and v is not None)
    return f"{part['name']} ({given})" if given else part["name"]


def _costs(results: Results) -> dict[str, str]:
    """What is known of time and memory, as it is shown."""
    found = {"training and evaluation": f"{results['seconds']:,.0f} s"}
    if (seconds := results.get("boundary_seconds")) is not None:
        found["of it the method's, before and after tasks"] = f"{seconds:,.1f} s"
    if peak := results.get("peak_memory"):
        found["largest memory of the first process"] = f"{peak / 1e9:,.2f} GB"
    return found
