"""Code blocks of a document, run as a reader would run them: on a CPU, at sizes that take about a second."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import lightx2v
from lightx2v import LightX2VPipeline
from lightx2v_kernels import UnsupportedBackendError

SMALL: Mapping[str, Any] = {"height": 32, "width": 48, "num_frames": 5, "infer_steps": 1}


class Small(LightX2VPipeline):
    """A pipeline that is asked for what a document asks for, and then makes a small video of it.

    refused: what it raised for attention that needs a GPU or a package; it goes on with "auto".
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.refused: list[str] = []
        super().__init__(*args, **kwargs)

    def create_generator(self, *args: Any, **kwargs: Any) -> None:
        """As it is asked for first, so that nothing of it goes unread; then smaller."""
        try:
            super().create_generator(*args, **kwargs)
        except UnsupportedBackendError as error:
            self.refused.append(str(error))
            kwargs["attn_mode"] = "auto"
            super().create_generator(*args, **kwargs)
        super().create_generator(*args, **{**kwargs, **SMALL})


@dataclass(frozen=True)
class Stage:
    """Where blocks run. places: a path of the document -> the real one. changes: other text -> what stands for it."""

    places: Mapping[str, Path]
    changes: Mapping[str, str] = field(default_factory=dict)

    def real(self, code: str) -> str:
        """The code with real paths. Raises AssertionError for one that has none."""
        for named, path in self.places.items():
            code = code.replace(f'"{named}"', repr(str(path)))
        for text, other in self.changes.items():
            code = code.replace(text, other)
        left = re.findall(r'"(?:/path/to|configs/)[^"]*"', code)
        assert not left, f"no file stands for {', '.join(left)}"
        return code

    def run(self, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **names: Any) -> dict[str, Any]:
        """What the code has defined in the end. names: what it finds defined."""
        monkeypatch.setattr(lightx2v, "LightX2VPipeline", Small, raising=False)
        script = folder / "block.py"
        script.write_text(self.real(code), encoding="utf-8")
        return runpy.run_path(str(script), init_globals={"LightX2VPipeline": Small, **names})


def blocks(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def statements(code: str) -> Iterator[str]:
    """Each statement with the comments before it and on its lines."""
    lines, begin = code.splitlines(), 0
    for node in ast.parse(code).body:
        assert node.end_lineno is not None
        yield "\n".join(lines[begin : node.end_lineno])
        begin = node.end_lineno
