"""The rooms of commons/: imports point down the floors, lazy ones and those for types included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# From the top down. A module may import its own room and every floor below its own; rooms of one floor do not know each
# other.
FLOORS = (
    ("launch", "train_gpt_demo", "benchmarks", "sample"),
    ("cli",),
    ("training", "planner", "checkpoint"),
    ("plans",),
    ("model",),
    ("distributed", "reporting"),
    ("config",),
    ("model_zoo",),
    ("ops", "doctor", "data"),
    ("lifecycle",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """The room of a dotted module name, "" where it is none of the suite's or a package of all rooms."""
    parts = module.split(".")
    name = parts[1] if parts[0] == "commons" and len(parts) > 1 else parts[0]
    return name if name in FLOOR_OF or (parts[0] == "commons" and len(parts) > 1) else ""


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "commons":
            yield from (f"commons.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports inside of the suite are absolute"
            yield node.module or ""


def breaches(module: str, source: str) -> list[str]:
    """What ``module`` imports though the floors do not allow it, a sentence each."""
    here = room_of(module)
    found = []
    for imported in dict.fromkeys(imports(ast.parse(source))):
        there = room_of(imported)
        if there and there != here and FLOOR_OF.get(there, -1) <= FLOOR_OF[here]:
            found.append(f"{module} imports {imported}: {here} may import only rooms on floors below its own")
    return found


def modules() -> dict[str, Path]:
    """The suite's own modules by dotted name, without tests."""
    files = [*REPOSITORY.glob("commons/**/*.py"), *REPOSITORY.glob("benchmarks/**/*.py"), *REPOSITORY.glob("*.py")]
    return {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path for path in files
    }


def test_imports_point_down() -> None:
    found = [breach for name, path in modules().items() if room_of(name) for breach in breaches(name, path.read_text())]
    assert not found, "\n".join(found)


def test_every_room_says_what_it_may_import() -> None:
    for number, rooms in enumerate(FLOORS):
        below = [room for floor in FLOORS[number + 1 :] for room in floor]
        for room in rooms:
            path = REPOSITORY / "commons" / room / "__init__.py"
            if not path.exists() or room == "doctor":  # which keeps to the standard library, and says so
                continue
            words = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
            said = words.partition("May import: ")[2].partition(".")[0]
            assert said == (", ".join(below) or "nothing of the suite"), path
            assert "May not: " in words, path


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(name) for name in modules()} - {""}
    assert rooms == set(FLOOR_OF), rooms ^ set(FLOOR_OF)


@pytest.mark.parametrize(
    "source",
    [
        "import commons.plans.registry",
        "def late():\n    from commons.training.loop import train_steps",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from commons.reporting import sinks",
        "from commons import cli",
        "import commons.attic.thing",
    ],
)
def test_a_breach_is_named(source: str) -> None:
    (sentence,) = breaches("commons.distributed.device", source)
    assert "commons.distributed.device imports commons." in sentence and "distributed may import only" in sentence
