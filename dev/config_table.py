"""Writes what every key of LightX2V's own JSON files becomes: `python dev.py run -m dev.config_table FOLDER`.

The table is tests/engine/golden/configs.txt; FOLDER holds the files, which are not part of this repository.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dev.environment import REPOSITORY
from lightx2v.config_json import Reading, read_config
from lightx2v.config_keys import HONOURED, REFUSED
from lightx2v.config_survey import ABSENT, Finding, survey

TABLE = REPOSITORY / "tests" / "engine" / "golden" / "configs.txt"
HEAD = """What each key of LightX2V's own JSON files becomes, a line a file; written by dev/config_table.py.
dead, model, idle: accepted, changes nothing (docs/config-json.md). HunyuanVideo-1.5 folders are there, other files not.
"""
TRANSFORMERS = ("480p_t2v", "480p_i2v", "720p_t2v", "720p_i2v")


def lines(folder: Path) -> Iterator[str]:
    """A line a file, in the order of their names."""
    with tempfile.TemporaryDirectory() as models:
        for name in TRANSFORMERS:
            (Path(models) / "transformer" / name).mkdir(parents=True)
        for path in sorted(folder.rglob("*.json")):
            name = path.relative_to(folder).as_posix()
            found = survey(Reading(Path(name), read_config(path), folders=(Path(models),)))
            yield f"{name}: {found.verdict}: {' | '.join(f'{each.key} -> {_short(each)}' for each in found.findings)}"


def _short(found: Finding) -> str:
    """Without what differs from machine to machine: where files were looked for, and which attentions there are."""
    if found.verdict == ABSENT:
        return f"no file {found.value!r}"
    if found.verdict in (HONOURED, REFUSED):
        return found.becomes.partition("; write one of")[0]
    return found.verdict


def text(folder: Path) -> str:
    return HEAD + "\n" + "\n".join(lines(folder)) + "\n"


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text(Path(sys.argv[1])), encoding="utf-8")
    print(TABLE)
