"""What `mkdocs build --strict` does beyond its own checks; `mkdocs.yml` names this file as a hook and an extension.

- Links from a page to files of the repository outside docs/ become plain text; a link to nothing fails the build.
- Every exported name must be on a reference page and must have a docstring, and so must its methods.
- Docstrings name classes as Transformers' do, [`Name`]: shown is `Name`. A field with a help text
  (`flag(default, help)`) is shown with its default and that text.
"""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parents[1]
logger = logging.getLogger("mkdocs.hooks.site")  # a warning fails a strict build


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    folder = (ROOT / "docs" / page.file.src_path).parent

    def plain(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = (folder / target).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return match.group()
        if not path.exists():
            logger.warning(f"{page.file.src_path}: the link {target!r} leads to no file of the repository")
        return text if text.startswith("`") else f"`{text}`"

    return re.sub(r"(?<!!)\[([^\]]+)\]\((\.\.[^)#]*)(?:#[^)]*)?\)", plain, markdown)


def on_pre_build(config: Any) -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md"))
    shown = {line.rsplit(".", 1)[1]: line.split()[1] for line in pages.splitlines() if line.startswith("::: ")}
    package = griffe.load("classp_hf", search_paths=[ROOT])
    for name in sorted(_exports(package) - shown.keys()):
        logger.warning(f"docs/reference: {name} is exported and on no page")
    for path in shown.values():
        found = package[path.removeprefix("classp_hf.")]
        members = found.all_members.values() if found.is_class else ()
        for part in (found, *(m for m in members if m.is_function and not m.name.startswith(("_", "on_")))):
            inherits = part.parent.is_class and any(part.name in base.members for base in part.parent.mro())
            if not (part.has_docstring or inherits):
                logger.warning(f"{part.path} has no docstring")


def _exports(package: Any) -> set[str]:
    """The names behind `TYPE_CHECKING` in `classp_hf/__init__.py`."""
    members = package.members.items()
    return {name for name, m in members if m.is_alias and m.target_path.startswith("classp_hf.")}


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"\[`~?(?:[\w.]*\.)?(\w+)`\](?![\[(])", r"`\1`", obj.docstring.value)

    def on_attribute_instance(self, *, node: Any, attr: Any, **kwargs: Any) -> None:
        call = getattr(node, "value", None)
        name = getattr(getattr(call, "func", None), "id", None)
        given = {k.arg: k.value for k in call.keywords} if name == "field" else {}
        if name in ("flag", "_flag"):
            given = {"default": call.args[0], "help": call.args[1]}
        elif "metadata" in given:
            given["help"] = next(
                v for k, v in zip(given["metadata"].keys, given["metadata"].values) if k.value == "help"
            )
        if "help" in given:
            attr.value, text = ast.unparse(given["default"]), given["help"]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            text = "".join(p.value if isinstance(p, ast.Constant) else _constant(p.value) for p in parts)
            attr.docstring = griffe.Docstring(text.replace("%%", "%"), parent=attr)


def _constant(expression: ast.expr) -> str:
    """What `{expression}` in a help text shows: the value of a constant of the package, else dots."""
    for path in (ROOT / "classp_hf").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            constant = isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            if constant and ast.unparse(node.targets[0]) == ast.unparse(expression):
                return str(node.value.value).replace("[", "\\[")
    return "..."
