"""What `mkdocs build --strict` does beyond its own checks; `mkdocs.yml` names this file as a hook and an extension.

- Links from a page to files of the repository outside docs/ become plain text; a link to nothing fails the build.
- Every exported name must be on a reference page and must have a docstring, and so must its methods.
- Docstrings name classes as Transformers' do, [`Name`]: shown is `Name`. `flag(default, help)` is shown as an
  attribute with a default and a docstring.
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
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "flag":
            default, text = call.args
            attr.value = ast.unparse(default)
            if isinstance(text, ast.JoinedStr):
                text = "".join(v.value if isinstance(v, ast.Constant) else ast.unparse(v.value) for v in text.values)
            else:
                text = ast.literal_eval(text)
            attr.docstring = griffe.Docstring(text.replace("%%", "%"), parent=attr)
