"""Imports run one way (docs/architecture.md), rooms stay small, and importing the package does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "classp_hf"

# Rooms from the ground up: each imports rooms above it in this list alone.
FLOORS = [
    {"files", "redaction", "optim", "embedded", "launch", "metrics", "preemption"},
    {"names", "optim_args"},
    {"memory", "heads", "classification", "compat", "tasks", "rehearsal"},
    {"methods", "language", "matching", "guard", "zero"},
    {"remember"},
    {"resume", "live"},
    {"engine"},
    {"registration"},
    {"training_args"},
    {"report"},
    {"sequence", "blend"},
    {"trainer"},
    {"named_trainers"},
    {"demo"},
    {"compare"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Private names, and overridden private methods, of other libraries: in compat.py, or listed here.
PRIVATE = {
    "trainer": {"_get_output_dir", "_save", "_push_from_checkpoint"},
    "optim": {"_fused_adagrad_"},
}


def rooms():
    files = {p: p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in PACKAGE.rglob("*.py")}
    return sorted(files.items())


def imported_rooms(path):
    """Rooms that a file imports, by relative or absolute import, at any depth, behind TYPE_CHECKING too."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module
            if node.level:
                here = path.relative_to(PACKAGE.parent).with_suffix("").parts[: depth + 1 - node.level]
                module = ".".join([*here, *([node.module] if node.module else [])])
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
    if room == "__init__":  # loads everything lazily
        return
    assert room in FLOOR, f"{room} is a new room: give it a floor here and a line in docs/architecture.md"
    wrong = {other for other in set(imported_rooms(path)) - {room} if FLOOR.get(other, 99) >= FLOOR[room]}
    assert not wrong, f"{path.name} imports {wrong}, which stand on its floor or above"


def test_private_names_of_other_libraries_are_in_compat():
    import accelerate
    import transformers

    theirs = {
        n
        for cls in (transformers.Trainer, transformers.TrainingArguments, accelerate.Accelerator)
        for n in dir(cls)
        if n.startswith("_") and not n.startswith("__")
    }
    for path, room in rooms():
        if room == "compat":
            continue
        tree = ast.parse(path.read_text())
        used = {
            a.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and _foreign(node)
            for a in node.names
        }
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & theirs
        used |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)} & theirs
        private = {name for name in used if name.startswith("_")} - PRIVATE.get(room, set())
        assert not private, f"{path}: {private}"


def _foreign(node):
    return not node.level and (node.module or "").split(".")[0] in ("transformers", "accelerate", "torch", "peft")


def test_rooms_are_small():
    lines = {path: len(path.read_text().splitlines()) for path, _ in rooms()}
    assert not {path.name: n for path, n in lines.items() if n > 450}


def test_importing_the_package_loads_nothing_and_optional_packages_are_asked_for_where_they_are_used():
    code = (
        "import sys; sys.modules['evaluate'] = sys.modules['peft'] = sys.modules['matplotlib'] = None; "
        "import classp_hf; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules); "
        "assert 'ClasspTrainer' in dir(classp_hf); "
        "assert all(getattr(classp_hf, n) is not None for n in classp_hf.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        import classp_hf

        classp_hf.nothing  # noqa: B018
