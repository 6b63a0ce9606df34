"""What a file holds, as one object: for scripts, and for the words of `lightx2v inspect`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from lightx2v.checkpoint import CheckpointError, Header
from lightx2v.identify import DISTILLED, FileInfo, recognise
from lightx2v.lora import read_lora
from lightx2v_kernels import references

NAMES = {
    "tiny autoencoder": "tae",
    "text encoder": "text_encoder",
    "image encoder": "image_encoder",
    "text mapper": "text_mapper",
}
_LAYER = re.compile(r"(?:^|[._])(?:(?:double_|transformer_)?blocks?|layers|resblocks|blk)[._](\d+)[._]")


@dataclass(frozen=True)
class Inspected:
    """One file, from its header alone.

    kind: "transformer", "vae", "tae", "text_encoder", "image_encoder", "text_mapper", "lora", or "unknown" for a file
        that nobody here knows or that cannot be read: `notes` say why.
    family: "wan", "wan2.1", "wan2.2", "hunyuan1.5", ... or "". task: "t2v", "i2v", "flf2v", "ti2v", "sr" or None.
        variant: the name of its spec, of a transformer that can be run.
    expert: "high", "low" or None, by the file's name. format, scheme: see `lightx2v.layout.Layout`.
    parameters: values, however they are packed. bytes: of the weights. layers: blocks, of a LoRA the layers it changes.
    unconsumed: names in the file that the model does not read. missing: names that it needs and the file has not; None
        where that is not looked into.
    """

    path: Path
    kind: str
    family: str = ""
    task: str | None = None
    expert: str | None = None
    format: str = ""
    scheme: str = ""
    parameters: int = 0
    bytes: int = 0
    layers: int | None = None
    unconsumed: tuple[str, ...] = ()
    missing: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    variant: str | None = None

    def as_json(self) -> dict[str, object]:
        return {**vars(self), "path": str(self.path)}


def inspect_file(path: str | Path) -> Inspected:
    """What a file, an index or a folder holds; of kind "unknown" where it cannot be told."""
    try:
        found = recognise(path)
    except (CheckpointError, OSError) as error:
        return Inspected(Path(path), "unknown", notes=(str(error),))
    return inspected(found)


def inspected(found: FileInfo) -> Inspected:
    """The object of a file that was recognised."""
    header, layout = found.layout.header, found.layout
    notes = [found.describe()]
    if found.distilled:
        notes.append(f"{DISTILLED[found.distilled]}, by its name or metadata")
    missing: tuple[str, ...] | None = None
    unconsumed, layers = dict(layout.unused), _layers(header)
    if found.model is not None:
        needed = _needed(found)
        missing = tuple(sorted(needed - header.tensors.keys()))
        unconsumed |= {header.tensors[name].stored or name: "" for name in sorted(header.tensors.keys() - needed)}
        notes.append(str(found.model.config))
    elif found.kind == "lora":
        file = read_lora(found.path)
        layers, unconsumed = len(file.layers), dict(file.ignored)
    reasons: Mapping[str, list[str]] = _grouped(unconsumed)
    notes += [f"not needed: {_some(names)} ({reason})" for reason, names in reasons.items() if reason]
    return Inspected(
        path=found.path,
        kind=NAMES.get(found.kind, found.kind),
        family=found.family,
        task=found.task,
        expert=found.expert_hint,
        format=layout.format,
        scheme=layout.scheme,
        parameters=sum(prod(info.shape) for info in header.tensors.values()),
        bytes=header.nbytes,
        layers=layers,
        unconsumed=tuple(sorted(unconsumed)),
        missing=missing,
        notes=tuple(notes),
        variant=found.model.spec.name if found.model else None,
    )


def _needed(found: FileInfo) -> set[str]:
    """Names of all weights of the network that the file is of."""
    assert found.model is not None
    with torch.device("meta"):
        network = found.model.spec.build(found.model.config, references())
    return set(network.state_dict())


def _layers(header: Header) -> int | None:
    indices = {int(met[1]) for name in header.tensors if (met := _LAYER.search(name))}
    return max(indices) + 1 if indices else None


def _grouped(unconsumed: Mapping[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in unconsumed.items():
        grouped.setdefault(reason, []).append(name)
    return grouped


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
