"""pyproject.toml, read on every Python that the pack runs on."""

from __future__ import annotations

import sys
from typing import Any

from dev.environment import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest


def read_pyproject() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
