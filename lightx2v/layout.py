"""From the names in a file to the names of the model: prefixes, diffusers' names, quantised weights.

The result is a header again, so whoever reads it sees one layout whatever the file's was.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lightx2v.checkpoint import Header
from lightx2v.kinds import PREFIXES
from lightx2v.models import dialects
from lightx2v.quant import FILE_MARK, LAYER_MARK, METADATA_MARK, SCALES, find_packed

# What else a file with everything in it carries, and what to call it.
OTHER_PARTS = {
    "vae.": "the VAE",
    "first_stage_model.": "the VAE",
    "text_encoders.": "the text encoder",
    "cond_stage_model.": "the text encoder",
    "conditioner.": "the text encoder",
    "clip_vision.": "the image encoder",
}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Layout:
    """A checkpoint as its model sees it.

    header: under the model's own parameter names; packed weights know how they are restored.
    format: "original", "comfyui", "kijai", "lightx2v", "diffusers", "block-split" or "gguf". Files in one format can be
        the same to the byte as in another: this says which conventions were met.
    scheme: "bf16", "fp16", "fp32", or how most weights are packed: "fp8", "int8", "gguf".
    detail: of a packed scheme, e.g. "e4m3, a scale a tensor" or "Q4_K".
    unused: name in the file -> why no model needs it.
    """

    header: Header
    format: str
    scheme: str
    detail: str
    unused: Mapping[str, str]

    @property
    def quantised(self) -> bool:
        return bool(self.detail)

    def describe(self) -> str:
        """What is stored, in words."""
        if not self.quantised:
            return self.scheme
        return f"{self.scheme} weights ({self.detail})"


def read_layout(header: Header) -> Layout:
    """Raises CheckpointError for mixed layouts and for quantisation that is not known here."""
    named, others, dialect = _named_as_model(header)
    found = find_packed(named)
    scheme, detail = _scheme(found.header)
    stored = {name: named.tensors[name].stored or name for name in found.unused}
    unused = others | {stored[name]: reason for name, reason in found.unused.items()}
    return Layout(found.header, _format(header, found.marks, dialect), scheme, detail, unused)


def plain_dtype(header: Header) -> torch.dtype:
    """The type of most values that are stored as plain floats; bfloat16 where there are none."""
    total: dict[torch.dtype, int] = {}
    for info in header.tensors.values():
        if info.dtype in NAMES:
            total[info.dtype] = total.get(info.dtype, 0) + info.nbytes
    return max(total, key=lambda dtype: total[dtype], default=torch.bfloat16)


def _named_as_model(header: Header) -> tuple[Header, dict[str, str], str]:
    """The header under the model's names, what belongs to other models and why, and whose layout it was."""
    prefix = PREFIXES[0]
    others = {name: _other_part(name) for name in header.tensors if not name.startswith(prefix)}
    unused: dict[str, str] = {}
    if len(others) < len(header.tensors) and all(others.values()):
        unused = {name: f"belongs to {part}, which the file carries too" for name, part in others.items()}
        inside = {name: name.removeprefix(prefix) for name in header.tensors if name not in others}
        header = header.renamed(inside)
    else:
        header = header.without_prefix(*PREFIXES)
    dialect = next((dialect for dialect in dialects() if dialect.matches(header)), None)
    return (dialect.translate(header), unused, dialect.format) if dialect else (header, unused, "")


def _other_part(name: str) -> str | None:
    return next((part for prefix, part in OTHER_PARTS.items() if name.startswith(prefix)), None)


def _format(file: Header, marks: frozenset[str], dialect: str) -> str:
    if file.container in ("gguf", "block-split"):
        return file.container
    if dialect:
        return dialect
    if re.search(r"(?i)kijai|_kj\b", file.path.name):
        return "kijai"
    comfyui = {FILE_MARK, LAYER_MARK, METADATA_MARK, SCALES[0]}
    if marks & comfyui or any(name.startswith(PREFIXES[:2]) for name in file.tensors):
        return "comfyui"
    return "lightx2v" if SCALES[1] in marks or "lightx2v" in file.path.name.lower() else "original"


def _scheme(header: Header) -> tuple[str, str]:
    """Scheme and detail of most bytes; a scheme of several kinds (GGUF's K types) is named after the largest."""
    total: dict[tuple[str, str], int] = {}
    for info in header.tensors.values():
        if info.packed is not None and info.packed.scheme:
            key = (info.packed.scheme, info.packed.detail)
            total[key] = total.get(key, 0) + info.nbytes
    if total:
        return max(total, key=lambda key: total[key])
    return plain_name(header), ""


def plain_name(header: Header) -> str:
    """ "bf16", "fp16" or "fp32" for the type of most plain floats; "unknown" where there are none."""
    dtype = plain_dtype(header)
    return NAMES[dtype] if any(info.dtype in NAMES for info in header.tensors.values()) else "unknown"
