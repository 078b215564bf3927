"""The order of the rooms, and that shared ones know no family of models."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchtune_vl

PACKAGE = Path(torchtune_vl.__file__).parent
# From above; a file imports from its own room and from those below it
ROOMS = (
    "cli",
    "recipes",
    "validation",
    "evaluation",
    "training",
    "generation",
    "checkpoint",
    "datasets",
    "data",
    "models",
    "chat",
    "modules",
    "media",
    "files",
    "_torchtune",
    "_torchao",
    "_numba",
)
FILES = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
FAMILIES = {path.parent.name for path in PACKAGE.glob("models/*/__init__.py")}
# Their folders' names, and Qwen2-VL and Qwen2.5-VL however they are written
_FAMILY = re.compile(
    "|".join([*map(re.escape, FAMILIES), r"qwen2[._-]?(5[._-]?)?vl"]), re.IGNORECASE
)


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> Iterator[str]:
    """All modules of the package that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "torchtune_vl":
                yield from (f"torchtune_vl.{alias.name}" for alias in node.names)
            yield node.module


def test_every_room_has_its_place() -> None:
    rooms = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    assert rooms - {"__init__", "__pycache__", "py"} <= {*ROOMS}
    assert FAMILIES


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_run_downhill(name: str) -> None:
    room = name.split("/")[0].removesuffix(".py")
    if room == "__init__":
        return
    uphill = {
        module
        for module in imports(FILES[name])
        if module.startswith("torchtune_vl.")
        and room_of(module) in ROOMS
        and ROOMS.index(room_of(module)) < ROOMS.index(room)
    }
    assert not uphill


@pytest.mark.parametrize("name", sorted(FILES))
def test_some_libraries_come_through_one_door(name: str) -> None:
    libraries = ("torchtune", "torchao", "numba")
    taken = {m for m in imports(FILES[name]) if m.split(".")[0] in libraries}
    if name not in ("_torchtune.py", "_torchao.py", "_numba.py"):
        assert not taken
    assert not any(part.startswith("_") for module in taken for part in module.split("."))


def code(path: Path) -> Iterator[str]:
    """Names and strings of a file, without what is written for people to read."""
    tree = ast.parse(path.read_text())
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in documentation:
            yield node.value
        for field in ("id", "attr", "name", "module", "arg"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield value


@pytest.mark.parametrize("name", sorted(FILES))
def test_shared_rooms_name_no_family(name: str) -> None:
    # The registry, and names of old that are aliases now
    if name in ("models/_registry.py", "training/__init__.py"):
        return
    if name.startswith("models/") and name.split("/")[1] in FAMILIES:
        return
    named = {text for text in code(FILES[name]) if _FAMILY.search(text)}
    if name.startswith("cli/"):  # examples of help
        named = {text for text in named if "tune-vl" not in text}
    assert not named


def test_transforms_need_neither_torchtune_nor_what_compiles_models() -> None:
    """Each takes seconds to import, which data workers and checks of configs would spend."""
    program = "import sys, torchtune_vl.models.qwen2_5_vl; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert loaded.stderr == ""
    heavy = {"torchtune", "torchao", "torch._dynamo", "datasets", "transformers", "matplotlib"}
    assert not heavy & set(loaded.stdout.split())
