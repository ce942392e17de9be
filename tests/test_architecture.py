"""Imports run one way (docs/architecture.md), and importing the package does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "classp_hf"

# room -> rooms it may import
ARROWS = {
    "files": set(),
    "preemption": set(),
    "optim": set(),
    "redaction": set(),
    "memory": {"files", "optim", "redaction"},
    "embedded": set(),
    "launch": set(),
    "metrics": set(),
    "tasks": {"embedded"},
    "language": {"tasks"},
    "hub": {"redaction"},
    "methods": {"memory", "optim"},
    "heads": {"memory"},
    "classification": {"memory"},
    "optim_args": {"optim"},
    "callback": {"memory", "methods", "optim", "optim_args", "redaction"},
    "registration": {"optim", "optim_args", "callback"},
    "training_args": {"registration", "redaction"},
    "report": {"files", "memory", "training_args", "redaction"},
    "resume": {"memory", "methods"},
    "trainer": {
        *(
            "files",
            "preemption",
            "optim",
            "memory",
            "tasks",
            "metrics",
            "methods",
            "heads",
            "registration",
            "launch",
            "optim_args",
            "callback",
            "training_args",
            "report",
            "redaction",
            "resume",
            "classification",
            "language",
            "launch",
            "hub",
        ),
    },
    "__main__": {"registration", "launch"},
    "__init__": set(),  # loads everything lazily
}


def rooms():
    files = {p: p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in PACKAGE.rglob("*.py")}
    return sorted(files.items())


def imported_rooms(path):
    """Rooms that a file imports at run time, by relative or absolute import, at any depth."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            if node.level:
                here = path.relative_to(PACKAGE.parent).with_suffix("").parts[: depth + 1 - node.level]
                module = ".".join([*here, *([node.module] if node.module else [])])
            else:
                module = node.module
            names = [f"{module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "classp_hf" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize(("path", "room"), rooms(), ids=lambda v: str(v) if isinstance(v, str) else v.name)
def test_imports_run_one_way(path, room):
    assert room in ARROWS, f"{room} is a new room: give it its arrows here and in docs/architecture.md"
    assert set(imported_rooms(path)) - {room} <= ARROWS[room]


def test_only_registration_touches_private_names_of_transformers():
    for path, room in rooms():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
                private = [a.name for a in node.names if a.name.startswith("_")]
                assert not private or room == "registration", f"{path}: {private}"


def test_importing_the_package_loads_nothing_and_lists_its_names():
    code = (
        "import sys, classp_hf; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules); "
        "assert 'ClasspTrainer' in dir(classp_hf); "
        "assert all(getattr(classp_hf, n) is not None for n in classp_hf.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        import classp_hf

        classp_hf.nothing  # noqa: B018
