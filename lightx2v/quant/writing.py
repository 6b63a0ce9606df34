"""A transformer's checkpoint as a file in 8 or 4 bits, in LightX2V's layout or in ComfyUI's.

"lightx2v": the layers that the family names (`ModelSpec.quantises`), fp8 or int8, with a `weight_scale` (N, 1) float32
for each row (LightX2V, tools/convert). "comfy": fp8 with one `weight_scale` for each tensor, and the layers listed in
the file's metadata, which ComfyUI 0.3.75 and newer read (comfy/model_detection.py, detect_layer_quantization). nvfp4
and mxfp8 in either: `lightx2v.quant.microscaled`. All else stays as it is stored. The numbers are those that quantising
at load gives, to the bit, except fp8 for ComfyUI.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lightx2v.checkpoint import CheckpointError, TensorInfo, read_tensors
from lightx2v.checkpoint.writing import Entry, write_safetensors
from lightx2v.config import one_of
from lightx2v.identify import CheckpointInfo, identify
from lightx2v.quant import METADATA_MARK, microscaled
from lightx2v.quant.packing import FORMATS, SCALE, packable, quantise_weight

log = logging.getLogger(__name__)
LAYOUTS = ("lightx2v", "comfy")
SCHEMES = (*FORMATS, *microscaled.OPS)
# ComfyUI, comfy/quant_ops.py, QUANT_ALGOS: fp8 since 0.3.75, the others with the package comfy-kitchen.
COMFY_FORMATS = {"fp8": "float8_e4m3fn", "nvfp4": "nvfp4", "mxfp8": "mxfp8"}


@dataclass(frozen=True)
class Quantised:
    """What was written: layers in the scheme, and bytes of the weights before and after."""

    layers: int
    before: int
    after: int


def write_quantised(
    source: str | Path,
    target: str | Path,
    scheme: str,
    layout: str = "lightx2v",
    *,
    force: bool = False,
    device: torch.device | None = None,
    progress: bool = False,
) -> Quantised:
    """Write the transformer in `source`, a file or folder in bf16, fp16 or fp32, as the .safetensors file `target`.

    scheme: of SCHEMES. layout: see above. force: replace a file that is there. device: where to compute.
    No more than one tensor is in memory. What fails or is cancelled leaves nothing behind.
    Raises CheckpointError for a source that is no transformer or quantised already, ValueError for a layout that cannot
    hold the scheme, a target of another kind, and one that is there.
    """
    target = Path(target)
    one_of("scheme", scheme, SCHEMES)
    one_of("layout", layout, LAYOUTS)
    if layout == "comfy" and scheme not in COMFY_FORMATS:
        raise ValueError(f"layout='comfy': ComfyUI reads no {scheme} files; use scheme='fp8', or layout='lightx2v'")
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: the result is one .safetensors file; give a name that ends so")
    info = identify(source)
    _require_plain(info, layout)
    if target.exists() and (not force or any(target.samefile(file) for file in _files(info))):
        raise ValueError(f"{target}: is there already; give another name{', or force' if not force else ''}")
    packed = [name for name, stored in info.header.tensors.items() if packable(name, stored, info, scheme)]
    if not packed:
        raise CheckpointError(
            f"{info.path}: has no layer whose sizes are multiples of 16, and of 32 along a row for nvfp4 and mxfp8"
        )
    entries = list(_entries(info, set(packed), scheme, layout))
    tensors = _tensors(info, set(packed), scheme, layout, device or torch.device("cpu"), progress)
    write_safetensors(target, entries, tensors, _metadata(info, packed, scheme, layout))
    return Quantised(len(packed), info.header.nbytes, sum(entry.nbytes for entry in entries))


def _require_plain(info: CheckpointInfo, layout: str) -> None:
    if info.quantised:
        raise CheckpointError(
            f"{info.path}: is quantised already, {info.scheme} ({info.detail}): give the bf16, fp16 or fp32 version, "
            "or use this one as it is"
        )
    if layout == "comfy" and info.spec.family != "wan":
        raise CheckpointError(
            f"{info.path}: {info.spec.title} is read by ComfyUI in another layout than is written here; use "
            "layout='lightx2v'"
        )


def _files(info: CheckpointInfo) -> set[Path]:
    return {tensor.file for tensor in info.header.tensors.values()}


def _entries(info: CheckpointInfo, packed: set[str], scheme: str, layout: str) -> Iterator[Entry]:
    for name, stored in info.header.tensors.items():
        if name not in packed:
            yield Entry(name, stored.dtype, stored.shape)
            continue
        rows, size = stored.shape
        if scheme in microscaled.OPS:
            kinds = microscaled.stored_as(scheme, layout, rows, size)
        else:
            each: tuple[int, ...] = (rows, 1) if layout == "lightx2v" else ()
            kinds = {"weight": (stored.shape, FORMATS[scheme]), SCALE: (each, torch.float32)}
        for leaf, (shape, dtype) in kinds.items():
            yield Entry(name.removesuffix("weight") + leaf, dtype, shape)


def _tensors(
    info: CheckpointInfo, packed: set[str], scheme: str, layout: str, device: torch.device, progress: bool
) -> Iterator[tuple[str, Tensor]]:
    stored: Mapping[str, TensorInfo] = info.header.tensors
    with tqdm(total=info.header.nbytes, unit="B", unit_scale=True, desc=scheme, disable=not progress) as bar:
        for name, tensor in read_tensors(info.header):
            if name not in packed:
                yield name, tensor
            else:
                made = _made(tensor.to(device), scheme, layout, f"{info.path}: '{name}'")
                yield from ((name.removesuffix("weight") + leaf, each) for leaf, each in made.items())
            bar.update(stored[name].nbytes)


def _made(weight: Tensor, scheme: str, layout: str, where: str) -> dict[str, Tensor]:
    """The tensors of one layer, by their last names."""
    if scheme in microscaled.OPS:
        return microscaled.for_file(weight, scheme, layout, where)
    rows = weight if layout == "lightx2v" else weight.reshape(1, -1)
    values, scale = quantise_weight(rows, FORMATS[scheme], where)
    return {"weight": values.view(weight.shape), SCALE: scale[:, None] if layout == "lightx2v" else scale.reshape(())}


def _metadata(info: CheckpointInfo, packed: list[str], scheme: str, layout: str) -> dict[str, str]:
    kept = dict(info.header.metadata)
    if layout == "comfy":
        layers = {name.removesuffix(".weight"): {"format": COMFY_FORMATS[scheme]} for name in packed}
        kept[METADATA_MARK] = json.dumps({"format_version": "1.0", "layers": layers})
    return kept
