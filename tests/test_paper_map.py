"""Every row of docs/paper_map.md names a function that can be imported and a test that exists."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"`([^`]+)`")


def rows() -> list[tuple[str, str, str]]:
    """(equation, names of functions, names of tests) of every row of every table."""
    found = []
    for line in (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        is_row = line.startswith("|") and len(cells) >= 4 and set(cells[0]) != {"-"}
        if is_row and cells[-2] != "function":
            found.append((" ".join(cells[:-2]), cells[-2], cells[-1]))
    return found


def import_name(name: str) -> object:
    """Import ``cascadevl.a.b.Class.method`` as far as its modules go, then follow attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
            continue
        for attribute in parts[length:]:
            value = getattr(value, attribute)
        return value
    raise ModuleNotFoundError(name)


def functions_of(file: Path) -> set[str]:
    """Names of all functions of a test file, those of classes as ``Class::test``."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            methods = (each for each in node.body if isinstance(each, ast.FunctionDef))
            names |= {f"{node.name}::{method.name}" for method in methods}
    return names


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:50])
def test_row_names_a_function_and_a_test(row: tuple[str, str, str]):
    _, functions, tests = row
    names = CODE.findall(functions)
    assert names, f"no function named in {functions!r}"
    for name in names:
        assert callable(import_name(f"cascadevl.{name}")) or name.isupper() or "." in name
    named_tests = CODE.findall(tests)
    assert named_tests, f"no test named in {tests!r}"
    for test in named_tests:
        file, _, function = test.partition("::")
        assert function.rpartition("::")[2].startswith("test_")
        assert function in functions_of(ROOT / "tests" / file), test


def test_the_map_has_rows():
    assert len(rows()) >= 10


def test_a_name_that_is_not_there_is_found():
    with pytest.raises(AttributeError):
        import_name("cascadevl.sequence.expnd")
    with pytest.raises((ModuleNotFoundError, AttributeError)):
        import_name("cascadevl.sequnce.expand")
