"""JSON of files that anyone may have written: bounded in size and depth, and of one meaning only."""

import json
from math import isfinite
from pathlib import Path
from typing import Any

MAX_BYTES = 16 << 20  # of a file; Wan2.1 14B's index has 97 kB
MAX_DEPTH = 64  # far below where Python's own functions for nested values give up


def parse(text: str | bytes) -> Any:
    """The value. Raises ValueError, in words, for what is no JSON, for a key that stands twice, for NaN, infinities and
    numbers that become one, for text that is no Unicode, and for more than MAX_DEPTH lists or objects in each other."""
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from error
    _check(value)
    return value


def read(path: Path, most: int = MAX_BYTES) -> Any:
    """The value of a file in UTF-8. Raises OSError for one that cannot be read, and ValueError as `parse` does and for
    more than `most` bytes."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError("not a file")
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"larger than {most >> 20} MB")
    try:
        return parse(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:100]!r} stands twice in one object")
        found[name] = value
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    if not isfinite(value := float(text)):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _check(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        inside: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inside += [*each, *each.values()]
            elif isinstance(each, list):
                inside += each
            elif isinstance(each, str) and not each.isascii():
                _require_unicode(each)
        level, depth = inside, depth + 1


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"a text with half a character, {text[error.start]!a}") from error
