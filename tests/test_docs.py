"""The documents hold: links lead somewhere, commands exist, the tree in the README is the tree."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import pytest

from cascadevl.cli.main import make_parser
from cascadevl.tasks import base

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Fragments that a document's headings can be linked by, as GitHub makes them."""
    kept = (re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in HEADING.findall(text))
    return {heading.replace(" ", "-") for heading in kept}


def broken_links(document: Path) -> list[str]:
    broken = []
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, fragment = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        if not file.exists() or (
            fragment and fragment not in anchors(file.read_text(encoding="utf-8"))
        ):
            broken.append(target)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path):
    assert broken_links(document) == []


def test_a_broken_link_is_found(tmp_path: Path):
    (tmp_path / "b.md").write_text("# One Thing\n")
    document = tmp_path / "a.md"
    document.write_text("[x](b.md#one-thing) [y](c.md) [z](b.md#two) [w](https://example.org)")
    assert broken_links(document) == ["c.md", "b.md#two"]


def commands_in(document: Path) -> list[str]:
    """Lines of code blocks that call the command line."""
    blocks = re.findall(r"```\w*\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    lines = (line.strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if re.match(r"(\.venv/bin/)?cascadevl ", line)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_in_the_documents_are_understood(document: Path):
    for command in commands_in(document):
        make_parser().parse_args(shlex.split(command, comments=True)[1:])


def test_the_readme_shows_commands():
    assert len(commands_in(ROOT / "README.md")) >= 5


def test_make_targets_in_the_documents_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        named = re.findall(r"`make ([a-z-]+)[^`]*`|^make ([a-z-]+)", document.read_text(), re.M)
        assert {first or second for first, second in named} <= targets, document


def kinds_of_errors() -> set[str]:
    """Every kind of `DataError` that the package raises."""
    kinds: set[str] = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "DataError":
                values = [each.value for each in node.keywords if each.arg == "kind"]
                kinds |= {value.value for value in values if isinstance(value, ast.Constant)}
    return kinds


def test_every_kind_of_error_is_explained():
    page = (ROOT / "docs" / "concepts" / "data.md").read_text(encoding="utf-8")
    rows = page.partition("## Every kind of error")[2].splitlines()
    first_cells = [row.split("|")[1] for row in rows if row.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(first_cells))) == kinds_of_errors()


def test_concept_pages_are_short():
    for page in (ROOT / "docs" / "concepts").glob("*.md"):
        assert len(page.read_text(encoding="utf-8").splitlines()) < 80, page


def test_the_task_in_the_documents_is_a_task():
    page = (ROOT / "docs" / "concepts" / "adding_a_task.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"dataclass": dataclass, "ClassVar": ClassVar, "np": np, "PIL": PIL}
    names |= {name: getattr(base, name) for name in ("Question", "Scene", "Split")}
    exec(code, names | {"scene_generator": base.scene_generator}, names)
    task = names["Stripes"]()
    assert isinstance(task, base.Task)
    for index in range(20):
        scene = task.draw("train", 0, index)
        row = np.asarray(scene.image)[0, :, 0] < 128
        num_stripes = int((row[1:] & ~row[:-1]).sum())
        assert scene.questions[0].check(str(num_stripes))


def tree() -> str:
    """Every module of the package with the first sentence of its docstring."""
    package = ROOT / "src" / "cascadevl"
    lines: list[str] = []
    files = [file for file in package.rglob("*.py") if "assets" not in file.parts]
    for file in sorted(files, key=lambda file: (file.parent != package, file)):
        if file == package / "__init__.py":
            continue
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        sentence = docstring.partition("\n")[0].replace("``", "").replace("`", "").rstrip(".")
        if file.name == "__init__.py":
            lines.append(f"{file.parent.name + '/':<28}{sentence}")
        else:
            indent = "" if file.parent == package else "  "
            lines.append(f"{indent + file.name:<28}{sentence}")
    return "\n".join(lines)


START, END = "<!-- tree -->\n```text\n", "\n```\n<!-- /tree -->"


def test_the_tree_in_the_readme_is_the_tree():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    written = text.partition(START)[2].partition(END)[0]
    assert written == tree(), "write it anew with: .venv/bin/python tests/test_docs.py"


def write_tree() -> None:
    """Bring the tree in the README up to date."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    readme.write_text(before + START + tree() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    write_tree()
