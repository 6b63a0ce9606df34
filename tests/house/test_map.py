"""The map in CONTRIBUTING.md names every module, and no file that is gone; links between documents lead somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from dev.environment import REPOSITORY

MAPPED = ("lightx2v", "lightx2v_kernels", "nodes", "dev", "demo")
DOCUMENTS = sorted([REPOSITORY / "CONTRIBUTING.md", *REPOSITORY.glob("docs/*.md")])


def named(text: str) -> list[str]:
    """The paths that the map's entries begin with: "- `a.py`, `b.py`: what they are"."""
    entries = re.findall(r"^- ((?:`[^`]+`(?:, )?)+): \S", text.split("\n## The map\n")[1], re.MULTILINE)
    return [path for entry in entries for path in re.findall(r"`([^`]+)`", entry)]


def modules() -> set[str]:
    """Every Python file of the packages that does more than mark a folder."""
    files = (path for package in MAPPED for path in (REPOSITORY / package).rglob("*.py"))
    return {path.relative_to(REPOSITORY).as_posix() for path in files if path.name != "__init__.py" or _does(path)}


def _does(path: Path) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)


@pytest.fixture(scope="module")
def entries() -> list[str]:
    return named((REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_every_module_is_on_the_map(entries) -> None:
    assert sorted(modules() - set(entries)) == [], "add a line to the map in CONTRIBUTING.md"


def test_the_map_names_nothing_twice_and_nothing_that_is_gone(entries) -> None:
    assert len(set(entries)) == len(entries)
    assert [path for path in entries if not (REPOSITORY / path).exists()] == []


def test_a_line_without_words_does_not_count() -> None:
    assert named("\n## The map\n\n- `a.py`: what it is\n- `b.py`:\n- `c/`, `d.py`: both\n") == ["a.py", "c/", "d.py"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (document.parent / link).exists()] == []
