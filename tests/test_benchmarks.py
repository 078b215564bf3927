"""That benchmarks, which tests do not run, take from each other what there is."""

import ast
from pathlib import Path

import pytest

import benchmarks

FILES = {path.stem: path for path in Path(benchmarks.__file__).parent.glob("*.py")}


def names_of(path: Path) -> set[str]:
    """All names that a file binds outside of functions."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        stored = (n for n in ast.walk(node) if isinstance(n, ast.Name))
        found |= {name.id for name in stored if isinstance(name.ctx, ast.Store)}
    return found


@pytest.mark.parametrize("name", sorted(FILES))
def test_benchmarks_have_what_others_take_of_them(name: str) -> None:
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks"):
            _, _, file = (node.module or "").partition(".")
            taken = {alias.name for alias in node.names}
            there = names_of(FILES[file or "__init__"]) | (set() if file else FILES.keys())
            assert taken <= there, node.module
