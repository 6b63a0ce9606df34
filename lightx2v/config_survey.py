"""What each key of one of LightX2V's JSON files becomes, also of a file that cannot be used as it is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightx2v.config_json import ConfigError, Reading, Told, is_comment
from lightx2v.config_keys import HONOURED, KEYS, MODEL, REFUSED

ABSENT, IDLE = "absent", "idle"
# What is found of keys, beside the verdicts of config_keys.py.
IDLES = "says what is so without it, or belongs to what is switched off"
FOUND = {ABSENT: "names a file that is not here: nothing else is wrong", IDLE: IDLES}
RUNS, NEEDS, CANNOT = "runs", "needs files", "cannot run"
LONG = 4  # members of a list that are written out


@dataclass(frozen=True)
class Finding:
    """One key. verdict: of `VERDICTS` in config_keys.py, or of FOUND. becomes: arguments of methods, or why none."""

    key: str
    value: Any
    verdict: str
    becomes: str


@dataclass(frozen=True)
class Survey:
    """A whole file. told: what is asked for without the keys that cannot be honoured."""

    findings: tuple[Finding, ...]
    told: Told

    @property
    def verdict(self) -> str:
        found = {finding.verdict for finding in self.findings}
        return CANNOT if REFUSED in found else NEEDS if ABSENT in found else RUNS

    def of(self, *verdicts: str) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.verdict in verdicts)


def survey(reading: Reading) -> Survey:
    """What becomes of every key: where one cannot be honoured, the others are read without it."""
    settings, errors = dict(reading.settings), dict[str, ConfigError]()
    while True:
        able = replace(reading, settings=settings)
        try:
            told = able.translate()
            break
        except ConfigError as error:
            errors[error.key] = error
            del settings[error.key]
    unused = {key: why for key, _, why in able.unused()}
    found = []
    for key, value in reading.settings.items():
        if is_comment(key):
            continue
        if key in errors:
            found.append(Finding(key, value, ABSENT if errors[key].absent else REFUSED, errors[key].reason))
        elif key in unused:
            found.append(Finding(key, value, KEYS[key].verdict, unused[key]))
        else:
            found.append(_effect(key, able, told))
    return Survey(tuple(found), told)


def _effect(key: str, able: Reading, told: Told) -> Finding:
    """What the file asks for because of this key: what it would not ask for without, or what the key alone asks for,
    where another says the same."""
    value, row = able.settings[key], KEYS[key]
    if row.verdict != HONOURED:
        return Finding(key, value, row.verdict, row.says) if row.verdict == MODEL else Finding(key, value, IDLE, IDLES)
    without = _asked(able, {name: other for name, other in able.settings.items() if name != key})
    because = {name: what for name, what in asked(told) if name not in without or without[name] != what}
    because = because or _asked(able, {key: value})
    return Finding(key, value, HONOURED, "; ".join(_calls(because))) if because else Finding(key, value, IDLE, IDLES)


def _asked(reading: Reading, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What these settings ask for; nothing where they cannot stand without the others."""
    try:
        return dict(asked(replace(reading, settings=settings).translate()))
    except ConfigError:
        return {}


def asked(told: Told) -> Iterator[tuple[str, Any]]:
    """("method.argument", value), of all that a file asks for."""
    groups = {"LightX2VPipeline": told.originals, "create_generator": told.generator, **told.calls}
    for method, arguments in groups.items():
        for name, value in arguments.items():
            yield f"{method}.{name}", value


def _calls(because: Mapping[str, Any]) -> Iterator[str]:
    """ "method(argument=value, ...)" of each method."""
    methods = dict.fromkeys(name.partition(".")[0] for name in because)
    for method in methods:
        mine = {name.partition(".")[2]: value for name, value in because.items() if name.startswith(f"{method}.")}
        yield f"{method}({', '.join(f'{name}={shown(value)}' for name, value in mine.items())})"


def shown(value: Any) -> str:
    """As Python writes it, long lists counted, paths by their names."""
    if isinstance(value, Path):
        return repr(value.name)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {shown(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        if len(value) > LONG:
            return f"[{len(value)} values]"
        return f"[{', '.join(map(shown, value))}]"
    return repr(value)
