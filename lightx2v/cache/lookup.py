"""Which figures a checkpoint has: measured ones next to its file, or published ones."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightx2v import strict_json
from lightx2v.cache.figures import CALIBRATE, Figures
from lightx2v.checkpoint import CheckpointError
from lightx2v.checkpoint.reader import read_bytes
from lightx2v.config import Cache
from lightx2v.identify import CheckpointInfo
from lightx2v.messages import readable
from lightx2v.models import specs
from lightx2v.unfinished import unfinished

log = logging.getLogger(__name__)
FORMAT = "lightx2v-cache-1"
ENDING = ".cache.json"
EXPERT_USUAL = {"magcache": 0.06}  # MagCache4Wan2.2, README.md: A14B, with K 2 and retention_ratio 0.4 (T2V), 0.1 (I2V)
_SUFFIX = re.compile(r"(-\d{5}-of-\d{5})?\.(safetensors|gguf|pth|pt)(\.index\.json)?$")


def published() -> dict[str, Figures]:
    """All published figures by name: the variant, and what its checkpoint's name says where one layout is several."""
    named = ((spec.name, key, figures) for spec in specs() for key, figures in spec.figures.items())
    return {f"{name}_{key}" if key else name: figures for name, key, figures in named}


def figures_for(cache: Cache, infos: Sequence[CheckpointInfo]) -> tuple[Figures, ...]:
    """Figures of the model, or of the high- and the low-noise expert; () for a cache that reads none.

    First what `cache.figures` names, then a .cache.json next to the checkpoint, then published figures.
    Raises ValueError saying how to measure a checkpoint that nobody has.
    """
    if cache.method == "none":
        return ()
    if cache.figures and len(infos) > 1:
        raise ValueError(
            f"figures={cache.figures!r}: of two experts each has its own; leave it empty, and calibrate the pair"
        )
    if cache.figures:
        return (_named(cache.figures, infos[0]),)
    return tuple(_own(info, role) for info, role in zip(infos, roles(infos), strict=True))


def roles(infos: Sequence[CheckpointInfo]) -> tuple[str, ...]:
    """What each checkpoint is in a model. The same file may be a model of its own and an expert, with other steps."""
    return ("alone",) if len(infos) == 1 else ("high", "low")


def _named(name: str, info: CheckpointInfo) -> Figures:
    if name in (known := published()):
        return known[name]
    if name.endswith(".json"):
        return read_figures(Path(name), info, strict=False)
    raise ValueError(f"figures={name!r} is neither a {ENDING} nor one of {', '.join(known)}")


def _own(info: CheckpointInfo, role: str) -> Figures:
    beside = figures_path(info.path)
    if beside.is_file():
        return read_figures(beside, info, role)
    if role != "alone" or info.expert_hint:
        raise ValueError(f"{info.path}: nobody publishes cache figures of Wan2.2's experts; {CALIBRATE}")
    known = info.spec.figures
    if not known:
        raise ValueError(f"{info.path}: no cache figures are known for {info.spec.title}; {CALIBRATE}")
    if "" in known:
        return known[""]
    told = f"{info.path.parent.name}/{info.path.name}".lower()
    found = [figures for key, figures in known.items() if key in told]
    if len(found) != 1:
        names = " or ".join(f"{info.spec.name}_{key}" for key in known)
        raise ValueError(
            f"{info.path}: {info.spec.title} is published as {' and '.join(known)}, and the name does not say which "
            f"this is; set figures to {names}, or {CALIBRATE}"
        )
    return found[0]


def figures_path(checkpoint: Path) -> Path:
    """Where a checkpoint's measured figures lie: beside the file, the first shard, the index or the folder."""
    return checkpoint.with_name(_SUFFIX.sub("", checkpoint.name) + ENDING)


def fingerprint(info: CheckpointInfo) -> str:
    """Of a checkpoint: names and shapes of its tensors, and the bytes of one small one that training changes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(info.header.tensors.items()):
        digest.update(f"{name} {tensor.shape}\n".encode())
    names = [name for name in ("head.modulation", "final_layer.linear.bias") if name in info.header.tensors]
    if not names:
        raise CheckpointError(
            f"{info.path}: has neither head.modulation nor final_layer.linear.bias; download it again"
        )
    small = names[0]
    digest.update(read_bytes(info.header, [small])[small])
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Occasion:
    """How figures were measured. date: ISO. prompts: how many. width, height: pixels."""

    date: str
    prompts: int
    cfg_scale: float
    scheduler: str
    width: int
    height: int
    num_frames: int


def write_figures(info: CheckpointInfo, role: str, figures: Figures, occasion: Occasion) -> Path:
    """Write figures into the .cache.json next to a checkpoint, whole or not at all; returns its path.

    Figures of the same checkpoint in another role stay.
    """
    path = figures_path(info.path)
    checkpoint = {"file": info.path.name, "variant": info.spec.name, "fingerprint": fingerprint(info)}
    measured = {"steps": figures.steps, "shift": figures.shift, **asdict(occasion)}
    entry = {
        "measured": measured,
        "teacache": {
            "time": figures.tea,
            "time_range": figures.tea_range,
            "projected": figures.tea_projected,
            "projected_range": figures.tea_projected_range,
        },
        "magcache": {"cond": figures.mag, "uncond": figures.mag_uncond},
    }
    kept = {}
    try:
        before = strict_json.read(path)
        if before["format"] == FORMAT and before["checkpoint"]["fingerprint"] == checkpoint["fingerprint"]:
            kept = dict(before["roles"])
    except (OSError, ValueError, LookupError, TypeError):
        log.debug("%s: written anew", path)
    told = {"format": FORMAT, "checkpoint": checkpoint, "roles": {**kept, role: entry}}
    text = re.sub(r"\[[^\]{]*\]", lambda match: " ".join(match[0].split()), json.dumps(told, indent=1))
    with unfinished(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    return path


def read_figures(path: Path, info: CheckpointInfo, role: str = "alone", *, strict: bool = True) -> Figures:
    """A .cache.json for this checkpoint. Raises ValueError for a damaged one and for one of another model.

    strict: it must have been measured on this very file; else another file of the same variant, such as a quantised
    one, earns a line in the log.
    """
    try:
        told = strict_json.read(path)
        if told["format"] != FORMAT:
            raise ValueError(f"format {told['format']!r}")
        checkpoint = told["checkpoint"]
        file, variant, measured_on = (str(checkpoint[name]) for name in ("file", "variant", "fingerprint"))
        entries = {name: _entry(path.name, name, entry) for name, entry in told["roles"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        why = readable(repr(error), 500)
        raise ValueError(f"{path}: cannot be read as cache figures ({why}); {CALIBRATE}") from error
    if variant != info.spec.name:
        raise ValueError(f"{path}: measured on {readable(variant, 100)}, the model is {info.spec.name}; {CALIBRATE}")
    if role not in entries:
        known = readable(" and ".join(entries), 300)
        raise ValueError(f"{path}: measured {known}, not {role}; {CALIBRATE}")
    if measured_on != fingerprint(info):
        if strict:
            raise ValueError(f"{path}: measured on another checkpoint than {info.path.name}; {CALIBRATE}")
        log.info("%s was measured on %s, used for %s", path.name, readable(file, 200), info.path.name)
    return entries[role]


def _entry(file: str, role: str, entry: Mapping[str, Any]) -> Figures:
    measured, tea, mag = entry["measured"], entry["teacache"], entry["magcache"]
    return Figures(
        f"{file} of {measured['date']}",
        tea=_floats(tea["time"]),
        tea_projected=_floats(tea["projected"]),
        mag=_floats(mag["cond"]),
        mag_uncond=_floats(mag["uncond"]),
        steps=int(measured["steps"]),
        shift=float(measured["shift"]),
        tea_range=_range(tea["time_range"]),
        tea_projected_range=_range(tea["projected_range"]),
        usual={} if role == "alone" else EXPERT_USUAL,
    )


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _range(values: Any) -> tuple[float, float]:
    low, high = values
    return float(low), float(high)
