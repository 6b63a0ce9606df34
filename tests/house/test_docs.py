"""What docs/ lists is what the code has: arguments, flags, backends, schedulers."""

from __future__ import annotations

import inspect
import re

import pytest

from dev import api_reference
from dev.environment import REPOSITORY
from lightx2v.__main__ import _parser
from lightx2v.config import SCHEDULERS
from lightx2v.pipeline import LightX2VPipeline
from lightx2v_kernels.registry import registries


def document(name: str) -> str:
    return (REPOSITORY / "docs" / name).read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("method", ["__init__", "create_generator", "generate"])
def test_every_argument_of_the_pipeline_is_explained(method: str) -> None:
    heading = "LightX2VPipeline" if method == "__init__" else method
    section = document("python-api.md").split(f"\n## {heading}(")[1].split("\n## ")[0]
    listed = {name: row[1] for row in rows(section) for name in code(row[0])}
    parameters = inspect.signature(getattr(LightX2VPipeline, method)).parameters
    assert list(listed) == [name for name in parameters if name != "self"]
    shared = {"height": "480, 832", "width": "480, 832"} if method == "create_generator" else {}
    for name, parameter in parameters.items():
        if parameter.default is not parameter.empty:
            shown = repr(parameter.default).replace("'", '"')
            assert shared.get(name, shown) == listed[name].replace("`", ""), name


def test_every_flag_is_explained_and_none_is_stale() -> None:
    (commands,) = (action for action in _parser()._actions if action.choices)
    generate = commands.choices["generate"]
    flags = {flag for action in generate._actions for flag in action.option_strings if flag not in ("-h", "--help")}
    listed = {flag for row in rows(document("command-line.md")) for flag in code(row[0])}
    assert listed == flags
    assert all(f"\n## {name}" in document("command-line.md") for name in commands.choices)


def test_every_backend_is_listed_best_first() -> None:
    listed = {op: code(row[2]) for row in rows(document("kernels.md")) for op in code(row[0])}
    assert listed == {op: list(registry.names()) for op, registry in registries().items()}


def test_every_scheduler_is_listed() -> None:
    listed = [name for row in rows(document("sampling.md")) for name in code(row[0])]
    assert listed == list(SCHEDULERS)


@pytest.mark.parametrize("name", ["doctor", "inspect"])
def test_pictures_of_commands_are_small_and_ask_no_other_server(name: str) -> None:
    drawn = (REPOSITORY / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8")
    assert len(drawn) < 60_000 and f"images/{name}.svg" in document("command-line.md")
    assert set(re.findall(r"https?://[^\"'\s)]*", drawn)) == {"http://www.w3.org/2000/svg"}
    assert f"lightx2v&#160;{name}" in drawn


def test_the_reference_is_what_the_docstrings_say() -> None:
    assert document("api.md") == api_reference.page(), "python dev.py run -m dev.api_reference writes it"
