"""Writes docs/api.md, the library's methods with their docstrings: `python dev.py run -m dev.api_reference`."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from dev.environment import REPOSITORY
from lightx2v.config import Cache, Engine, Parallel, Request, Sampling
from lightx2v.pipeline import LightX2VPipeline

PAGE = REPOSITORY / "docs" / "api.md"
HEAD = """# Reference

What `from lightx2v import LightX2VPipeline` has, from its docstrings; [python-api.md](python-api.md) shows how it is
used. Written by `dev/api_reference.py`.
"""
MODULES = re.compile(r"\b(?:pathlib|collections\.abc|typing)\.")
SETTINGS = (Engine, Sampling, Cache, Parallel, Request)


def page() -> str:
    """The whole document."""
    methods = (each for name, each in vars(LightX2VPipeline).items() if not name.startswith("_") and callable(each))
    parts = [HEAD, _entry("LightX2VPipeline", LightX2VPipeline, LightX2VPipeline.__init__)]
    parts += [_entry(each.__name__, each, each) for each in methods]
    parts.append("## Settings\n\nFrozen dataclasses behind the methods' arguments.\n")
    parts += [_entry(each.__name__, each, each, "###") for each in SETTINGS]
    return "\n".join(parts)


def _entry(name: str, documented: Any, called: Callable[..., Any], level: str = "##") -> str:
    words = inspect.getdoc(documented) or ""
    if not words:
        raise ValueError(f"{name} has no docstring: say what it does, its units and its errors")
    return f"{level} {name}\n\n```python\n{name}{_signature(called)}\n```\n\n```text\n{words}\n```\n"


def _signature(called: Callable[..., Any]) -> str:
    """An argument a line, as it stands in the source."""
    signature = inspect.signature(called)
    given = [parameter for name, parameter in signature.parameters.items() if name != "self"]
    shown: list[str] = []
    for parameter in given:
        if parameter.kind is parameter.KEYWORD_ONLY and "    *," not in shown:
            shown.append("    *,")
        shown.append(f"    {MODULES.sub('', str(parameter))},")
    returns = signature.return_annotation
    ended = "" if returns in (None, "None", inspect.Signature.empty) else f" -> {returns}"
    return "\n".join(["(", *shown, f"){ended}"]) if shown else f"(){ended}"


def main() -> int:
    unfinished = PAGE.with_name(PAGE.name + ".part")
    unfinished.write_text(page(), encoding="utf-8")
    unfinished.replace(PAGE)
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
