"""How valid files become hostile ones. What is drawn comes from a `Dice`: hypothesis', atheris' or a seeded one."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from hostile.tables import Entry, Table
from lightx2v.checkpoint import DTYPES

T = TypeVar("T")


class Dice(Protocol):
    def number(self, low: int, high: int) -> int: ...


class Seeded:
    """The same numbers for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def number(self, low: int, high: int) -> int:
        return self._random.randint(low, high)


def pick(dice: Dice, choices: Sequence[T]) -> T:
    return choices[dice.number(0, len(choices) - 1)]


def one_in(dice: Dice, count: int) -> bool:
    return dice.number(1, count) == 1


# ---- bytes

LENGTHS = (0, 1, 2, 7, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def damage(dice: Dice, raw: bytes) -> bytes:
    """One to three changes of bytes, half of them near the start, where headers are."""
    for _ in range(dice.number(1, 3)):
        near = min(len(raw), 600 if one_in(dice, 2) else len(raw))
        at = dice.number(0, near)
        size = dice.number(1, 64)
        kind = dice.number(0, 7)
        if kind == 0:
            raw = raw[:at]
        elif kind == 1:
            raw = raw[:at] + bytes([dice.number(0, 255)]) + raw[at + 1 :]
        elif kind == 2:
            width = pick(dice, (1, 2, 4, 8))
            raw = raw[:at] + (pick(dice, LENGTHS) % 256**width).to_bytes(width, "little") + raw[at + width :]
        elif kind == 3:
            raw = raw[:at] + raw[at + size :]
        elif kind == 4:
            raw = raw[:at] + raw[at : at + size] * dice.number(2, 5) + raw[at + size :]
        elif kind == 5:
            raw = raw[:at] + b"\0" * size + raw[at + size :]
        elif kind == 6:
            raw = raw + bytes(size)
        else:
            raw = (
                raw[:at]
                + pick(dice, (b"\xff\xfe", b"\xed\xa0\x80", b"[" * 3000, b'{"a":' * 1500, b"\x1b[2J"))
                + raw[at:]
            )
    return raw


# ---- JSON


class Literal(str):
    """Text that is written into JSON as it is."""

    __slots__ = ()


class Twice(dict):  # type: ignore[type-arg]
    """An object of which every key is written twice."""


HOSTILE_NUMBERS = (-1, 0, 1, 3, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e308)
HOSTILE_TEXTS = (
    *("", "x", ".", "..", "../../etc/passwd", "/etc/passwd", "~", "C:evil", "\\\\host\\share", "a/" * 400 + "b"),
    *(
        "a" * 5000,
        "\ud800",
        "\0",
        "a\0b",
        "\u00b2",
        "\u0663",
        "\x1b[31mred\x1b[0m",
        "two\nlines",
        "\u202etxt.exe",
        "%s{0}",
    ),
    *("nan", "inf", "1e999", "(a+)+$", "(" * 50, "[", "'; DROP TABLE", "__import__('os').system('true')"),
)
HOSTILE_LITERALS = tuple(
    Literal(text)
    for text in (
        *("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "1" * 400, '{"a":1,"a":2}'),
        *("[" * 100_000, "[" * 900 + "]" * 900, "[" + "[]," * 20_000 + "[]]", "{" + '"a":{' * 300 + "}" * 301),
    )
)
HOSTILE_OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    ["a", 1],
    {"a": {}},
    {"": []},
    [[1, 2], [3]],
)


def hostile_value(dice: Dice) -> Any:
    return pick(dice, pick(dice, (HOSTILE_NUMBERS, HOSTILE_TEXTS, HOSTILE_LITERALS, HOSTILE_OTHERS)))


def damage_json(dice: Dice, value: Any, keys: Sequence[str] = ()) -> Any:
    """One to three places changed; keys: names that a new entry may take. What comes back goes through `written`."""
    for _ in range(dice.number(1, 3)):
        value = _damaged(dice, value, keys)
    return value


def _damaged(dice: Dice, value: Any, keys: Sequence[str]) -> Any:
    inside = isinstance(value, dict | list) and len(value) > 0 and not one_in(dice, 12)
    if not inside:
        return hostile_value(dice)
    if isinstance(value, list):
        at = dice.number(0, len(value) - 1)
        return [*value[:at], *_in_list(dice, value[at], keys), *value[at + 1 :]]
    if keys and one_in(dice, 3):
        return {**value, pick(dice, keys): hostile_value(dice)}
    key = pick(dice, list(value))
    kind = dice.number(0, 7)
    if kind == 0:
        return {k: v for k, v in value.items() if k != key}
    if kind == 1:
        return {(pick(dice, HOSTILE_TEXTS) if k == key else k): v for k, v in value.items()}
    if kind == 2:
        return Twice(value)
    return {**value, key: _damaged(dice, value[key], ())}


def _in_list(dice: Dice, value: Any, keys: Sequence[str]) -> list[Any]:
    kind = dice.number(0, 5)
    return [] if kind == 0 else [value] * 1000 if kind == 1 else [_damaged(dice, value, keys)]


def written(value: Any) -> str:
    """JSON, also of what is none."""
    if isinstance(value, Literal):
        return str(value)
    if isinstance(value, dict):
        pairs = [f"{json.dumps(key)}:{written(each)}" for key, each in value.items()]
        return "{" + ",".join(pairs * (2 if isinstance(value, Twice) else 1)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


def json_bytes(dice: Dice, value: Any, keys: Sequence[str] = ()) -> bytes:
    """A damaged object as a file, whose bytes may be damaged too."""
    raw = written(damage_json(dice, value, keys)).encode("utf-8")
    if one_in(dice, 8):
        raw = raw.decode("utf-8").encode(pick(dice, ("utf-16", "utf-32", "utf-8-sig")))
    return damage(dice, raw) if one_in(dice, 4) else raw


# ---- tables

HOSTILE_NAMES = (
    *HOSTILE_TEXTS,
    "blocks.999999999.ffn.0.weight",
    "blocks.9999999999999999999999.x",
    "blocks.-1.a",
    ".",
    "a..b",
)
SHAPES = (
    (),
    (0,),
    (1,),
    (1, 1),
    (0, 2**40),
    (2**31, 2**31, 2**31),
    (2**62, 4),
    (2**63, 2),
    (1,) * 9,
    (1,) * 70,
    (3, 0, 5),
)


def damage_table(dice: Dice, table: Table) -> Table:
    """One to three tensors renamed, reshaped, retyped, filled, dropped or doubled; the file stays consistent or not."""
    for _ in range(dice.number(1, 3)):
        entries = list(table.entries)
        if not entries:
            return table
        at = dice.number(0, len(entries) - 1)
        change = pick(dice, (_drop, _double, _rename, _swap_names, _reshape, _retype, _fill, _number_block))
        table = replace(table, entries=tuple(change(dice, entries, at)))
    return table


def _drop(dice: Dice, entries: list[Entry], at: int) -> list[Entry]:
    return entries[:at] + entries[at + dice.number(1, 3) :]


def _double(dice: Dice, entries: list[Entry], at: int) -> list[Entry]:
    return [*entries, entries[at]]


def _rename(dice: Dice, entries: list[Entry], at: int) -> list[Entry]:
    suffix = pick(
        dice, (".scale_weight", "_scale", ".comfy_quant", ".weight", ".lora_A.weight", ".diff", ".dora_scale")
    )
    name = entries[at].name + suffix if one_in(dice, 3) else pick(dice, HOSTILE_NAMES)
    return [*entries[:at], replace(entries[at], name=name), *entries[at + 1 :]]


def _swap_names(dice: Dice, entries: list[Entry], at: int) -> list[Entry]:
    other = dice.number(0, len(entries) - 1)
    names = [entry.name for entry in entries]
    names[at], names[other] = names[other], names[at]
    return [replace(entry, name=name) for entry, name in zip(entries, names, strict=True)]


def _number_block(dice: Dice, entries: list[Entry], at: int) -> list[Entry]:
    """As if it were of another block."""
    number = pick(dice, ("2", "9", "100", "4096", "1000000", "99999999999", "00", "\u0663"))
    name = entries[at].name.replace(".0.", f".{number}.").replace("_0_", f"_{number}_")
    return [*entries, replace(entries[at], name=name)]


def _reshape(dice: Dice, entries: list[Entry], at: int) -> list[Entry]:
    entry, count = entries[at], 1
    for size in entry.shape:
        count *= size
    shapes = (entry.shape[::-1], (count,), (1, *entry.shape), (*entry.shape, 1), entry.shape[1:], pick(dice, SHAPES))
    shape = pick(dice, shapes)
    wanted = 1
    for size in shape:
        wanted *= size
    fits = one_in(dice, 2) and 0 <= wanted < 10 * max(count, 1)
    raw = entry.raw
    if fits and count:
        width = max(1, len(raw) // count)
        raw = (raw * (1 + wanted // count))[: wanted * width]
    return [*entries[:at], replace(entry, shape=shape, raw=raw), *entries[at + 1 :]]


def _retype(dice: Dice, entries: list[Entry], at: int) -> list[Entry]:
    entry = entries[at]
    kind = pick(dice, (*DTYPES, "F4", "Q8_0", "Q4_K", "F8_E8M0", "", "\ud800"))
    raw = entry.raw
    if kind in DTYPES and one_in(dice, 2):
        count = 1
        for size in entry.shape:
            count *= size
        raw = (raw * 9)[: count * DTYPES[kind].itemsize] if raw else raw
    return [*entries[:at], replace(entry, kind=kind, raw=raw), *entries[at + 1 :]]


def _fill(dice: Dice, entries: list[Entry], at: int) -> list[Entry]:
    """NaN, infinity, zero or the largest number, in whatever type it is."""
    entry = entries[at]
    pattern = pick(dice, (b"\xff", b"\0", b"\x7f", b"\x80\x7f", b"\0\x7c", b"\0\0\x80\x7f", b"\x80\xff"))
    raw = (pattern * (1 + len(entry.raw) // len(pattern)))[: len(entry.raw)]
    return [*entries[:at], replace(entry, raw=raw), *entries[at + 1 :]]


# ---- zip files, as torch.save writes them


class _Runs:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return (__import__, ("antigravity",))  # which no test imports


PICKLES = (
    pickle.dumps({"a": _Runs()}),
    pickle.dumps(_Runs()),
    pickle.dumps({1: 2, "a": [None] * 5}),
    pickle.dumps([1, 2, 3]),
    b"\x80\x02" + b"]" * 40_000 + b".",
    b"\x80\x02" + b"(" * 40_000 + b"t" * 40_000 + b".",
    b"",
    b".",
)


def damage_zip(dice: Dice, raw: bytes) -> bytes:
    """The archive written anew with one of its entries damaged, lost, doubled, packed, or much larger."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = dice.number(0, len(members) - 1) if one_in(dice, 2) else 0  # the pickle comes first
    name, content = members[at]
    kind = dice.number(0, 7)
    packed = False
    if kind == 0:
        content = damage(dice, content)
    elif kind == 1:
        content = pick(dice, PICKLES)
    elif kind == 2:
        name = pick(
            dice, ("../../evil", "/etc/passwd", "archive/data/0", "x/data.pkl", "archive/constants.pkl", "a" * 300)
        )
    elif kind == 3:
        content, packed = content + b"\0" * dice.number(1, 2**22), True
    elif kind == 4:
        members.append((name, content))
    elif kind == 5:
        packed = True
    elif kind == 6:
        members.append(("archive/" + pick(dice, ("constants.pkl", "code/a.py", "byteorder", "version")), b"big"))
    members[at] = (name, content)
    if kind == 7 and len(members) > 1:
        del members[at]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for each, data in members:
            archive.writestr(zipfile.ZipInfo(each), data, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
    return file.getvalue()
