"""NVFP4 and MXFP8: recognised in ComfyUI's layout and in LightX2V's, and the tensors of a layer that keeps them.

ComfyUI (comfy/ops.py, _load_quantized_module; Comfy-Org/comfy-kitchen, tensor/nvfp4.py and mxfp8.py): a layer is marked
by `comfy_quant` or listed in the file's metadata. nvfp4: `weight` (N, K / 2) U8, the first of two values in the upper
half of a byte; `weight_scale` F8_E4M3; `weight_scale_2` F32, by which values are multiplied. mxfp8: `weight` (N, K)
F8_E4M3; `weight_scale` F8_E8M0, or U8. Its writer fills odd sizes up to multiples of 16 and 32.
LightX2V (lightx2v/common/ops/mm/mm_weight.py, tools/convert/quant/quant.py): nvfp4: `weight` U8, the first value in the
lower half (cvt.rn.satfinite.e2m1x2.f32 of nvfp4_quant_kernels_sm120.cu); `weight_scale` F8_E4M3; `weight_global_scale`
F32, by which values are divided, or `alpha` and `input_global_scale`, whose product they are multiplied by. mxfp8:
`weight` (N, K) U8, `weight_scale` F8_E8M0.
Both: scales in tiles (`lightx2v_kernels.microscaled`). Files of other writers have the same names without the tiles;
so `weight_scale_2` without ComfyUI's mark is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightx2v.checkpoint import CheckpointError, Packed, TensorInfo
from lightx2v_kernels.microscaled import (
    MXFP8_BLOCK,
    NOT_A_NUMBER,
    NVFP4_BLOCK,
    quantise_mxfp8,
    quantise_nvfp4,
    restore_mxfp8,
    restore_nvfp4,
    scale_shape,
    tiled,
    unit_of,
)

OPS = {"nvfp4": "nvfp4_linear", "mxfp8": "mxfp8_linear"}
BLOCKS = {"nvfp4": NVFP4_BLOCK, "mxfp8": MXFP8_BLOCK}
DETAILS = {"nvfp4": "e2m1, a scale for 16 values", "mxfp8": "e4m3, a scale for 32 values"}
SCALE, COMFY_UNIT, UNIT, ALPHA, INPUT = (
    "weight_scale",
    "weight_scale_2",
    "weight_global_scale",
    "alpha",
    "input_global_scale",
)
BESIDE = (COMFY_UNIT, UNIT, ALPHA, INPUT)  # what else a layer may have beside `weight` and `weight_scale`
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)  # since PyTorch 2.7
SCALE_DTYPES = {"nvfp4": (torch.float8_e4m3fn, torch.uint8), "mxfp8": (E8M0, torch.uint8)}
SCALE_CODES = {"nvfp4": "e4m3", "mxfp8": "e8m0"}
WEIGHT_DTYPES = {"nvfp4": (torch.uint8,), "mxfp8": (torch.float8_e4m3fn, torch.uint8)}
CHUNK = 1 << 24  # values quantised at once


def recognise(name: str, parts: Mapping[str, TensorInfo], stated: str) -> tuple[tuple[int, ...], Packed] | None:
    """Shape of the values of the weight `name`, and how they are restored; None where it is something else.

    parts: "weight", and what lies beside it of SCALE and BESIDE. stated: the format by ComfyUI's mark, or "".
    Raises CheckpointError for tensors that are missing or of another shape than the format has.
    """
    weight = parts["weight"]
    where = f"{weight.file}: '{name}'"
    scheme = _scheme(where, parts, stated)
    if not scheme:
        return None
    _check(where, scheme, parts)
    rows, columns = weight.shape
    shape = (rows, columns * 2) if scheme == "nvfp4" else (rows, columns)
    used = ("weight", SCALE, *_units(parts)) if scheme == "nvfp4" else ("weight", SCALE)
    packed = Packed(scheme, DETAILS[scheme], {role: parts[role] for role in used}, _unpack(where, scheme))
    return shape, packed


def _scheme(where: str, parts: Mapping[str, TensorInfo], stated: str) -> str:
    weight, scale = parts["weight"], parts.get(SCALE)
    if stated in OPS:
        return stated
    if COMFY_UNIT in parts:
        raise CheckpointError(
            f"{where} has a {COMFY_UNIT}, but no comfy_quant mark says that it is ComfyUI's nvfp4; files of other "
            "programs order their scales in other ways: use one that ComfyUI reads"
        )
    if not stated and any(leaf in parts for leaf in BESIDE):
        return "nvfp4"
    if stated or weight.dtype != torch.uint8 or len(weight.shape) != 2:
        return ""
    return "mxfp8" if scale is not None and scale.dtype in SCALE_DTYPES["mxfp8"] else ""


def _units(parts: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Which tensors say NVFP4's unit; none where they are missing."""
    return next((names for names in ((COMFY_UNIT,), (UNIT,), (ALPHA, INPUT)) if all(n in parts for n in names)), ())


def _check(where: str, scheme: str, parts: Mapping[str, TensorInfo]) -> None:
    weight, scale = parts["weight"], parts.get(SCALE)
    if weight.dtype not in WEIGHT_DTYPES[scheme] or len(weight.shape) != 2:
        raise CheckpointError(
            f"{where} is {_described(weight)}, {scheme} weights are {_words(WEIGHT_DTYPES[scheme])} of two axes; "
            "download the file again"
        )
    size = weight.shape[1] * (2 if scheme == "nvfp4" else 1)
    if size % BLOCKS[scheme]:
        raise CheckpointError(
            f"{where} has {size} values a row, {scheme} has whole blocks of {BLOCKS[scheme]}; download the file again"
        )
    if scale is None or (scheme == "nvfp4" and not _units(parts)):
        lost = "scale" if scale is None else f"{COMFY_UNIT} or {UNIT}"
        raise CheckpointError(f"{where} ({scheme}) has lost its {lost}; download the file again")
    wanted = scale_shape(weight.shape[0], size // BLOCKS[scheme])
    if scale.dtype not in SCALE_DTYPES[scheme] or scale.shape != wanted:
        raise CheckpointError(
            f"{where} ({scheme}) is {_described(weight)} and its {SCALE} {_described(scale)}; the tiles of its scales "
            f"are {list(wanted)} {_words(SCALE_DTYPES[scheme])}: use nvfp4 or mxfp8 (no mxfp4, no mxfp6) in the "
            "layout of ComfyUI or LightX2V"
        )
    if weight.rows and not scale.rows:  # see `pieces.split`: tiles of 128 rows are cut where rows are
        raise CheckpointError(
            f"{where} is cut out of a layer whose {SCALE} has no whole tiles for each part; use a file in the model's "
            "original layout"
        )
    for role in _units(parts) if scheme == "nvfp4" else ():
        if parts[role].dtype != torch.float32 or parts[role].shape not in ((), (1,)):
            raise CheckpointError(
                f"{where} (nvfp4): its {role} is {_described(parts[role])}, it is one float32; download the file again"
            )


def _described(info: TensorInfo) -> str:
    return f"{list(info.shape)} {_words((info.dtype,))}"


def _words(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))


def high_first(packed: Packed) -> bool:
    """Whether of two NVFP4 values the first is in the upper half of its byte."""
    return COMFY_UNIT in packed.parts


def _unpack(where: str, scheme: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def unpack(found: Mapping[str, Tensor]) -> Tensor:
        values, scales = found["weight"].view(torch.uint8), _scales(where, scheme, found)
        if scheme == "mxfp8":
            return restore_mxfp8(values, scales)
        return restore_nvfp4(values, scales, _unit(where, found), COMFY_UNIT in found)

    return unpack


def _scales(where: str, scheme: str, found: Mapping[str, Tensor]) -> Tensor:
    scales = found[SCALE].view(torch.uint8)
    code = NOT_A_NUMBER[SCALE_CODES[scheme]]
    if bool(((scales & code) == code).any()):
        raise CheckpointError(f"{where}: a scale in its {SCALE} is NaN; download the file again")
    return scales


def _unit(where: str, found: Mapping[str, Tensor]) -> Tensor:
    """What values are multiplied by, (1,) float32."""
    if COMFY_UNIT in found:
        unit = found[COMFY_UNIT]
    else:
        unit = 1 / found[UNIT] if UNIT in found else found[ALPHA] * found[INPUT]
    if not bool(unit.isfinite().all()):
        raise CheckpointError(f"{where}: its scale for the whole tensor is {unit.item()}; download the file again")
    return unit.reshape(1)


def kept(name: str, info: TensorInfo) -> dict[str, TensorInfo]:
    """The tensors of a layer that keeps this packed weight: "weight", "weight_scale", and for NVFP4 "unit"."""
    assert info.packed is not None
    scheme, parts, where = info.packed.scheme, info.packed.parts, f"{info.file}: '{name}'"
    scale = Packed("", "", {SCALE: parts[SCALE]}, lambda found: _scales(where, scheme, found))
    tensors = {
        "weight": _bytes(parts["weight"]),
        SCALE: replace(parts[SCALE], dtype=torch.uint8, packed=scale),
    }
    if scheme == "nvfp4":
        said = {role: parts[role] for role in _units(parts)}
        unit = Packed("", "", said, lambda found: _unit(where, found))
        tensors["unit"] = replace(next(iter(said.values())), shape=(1,), packed=unit)
    return tensors


def _bytes(info: TensorInfo) -> TensorInfo:
    """The same tensor as uint8, which lies in the file as it is wanted, except in a .pth."""
    if info.span is not None:
        return replace(info, dtype=torch.uint8)
    viewed = Packed("", "", {"weight": info}, lambda found: found["weight"].view(torch.uint8))
    return replace(info, dtype=torch.uint8, packed=viewed)


def room(scheme: str, rows: int, size: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors of a layer (rows, size), by the names of `kept`."""
    weight = (rows, size // 2) if scheme == "nvfp4" else (rows, size)
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"weight": (weight, torch.uint8)}
    found[SCALE] = (scale_shape(rows, size // BLOCKS[scheme]), torch.uint8)
    if scheme == "nvfp4":
        found["unit"] = ((1,), torch.float32)
    return found


def stored_as(scheme: str, layout: str, rows: int, size: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of a layer's tensors in a file, by their last names. layout: "comfy" or "lightx2v"."""
    shapes = [shape for shape, _ in room(scheme, rows, size).values()]
    if scheme == "nvfp4":
        unit = COMFY_UNIT if layout == "comfy" else UNIT
        return {
            "weight": (shapes[0], torch.uint8),
            SCALE: (shapes[1], torch.float8_e4m3fn),
            unit: ((), torch.float32),
        }
    return {
        "weight": (shapes[0], torch.float8_e4m3fn if layout == "comfy" else torch.uint8),
        SCALE: (shapes[1], E8M0),
    }


def for_file(weight: Tensor, scheme: str, layout: str, where: str) -> dict[str, Tensor]:
    """What `stored_as` announces, from a weight (N, K) of floats; raises as `quantise` does."""
    made = quantise(weight, scheme, where, high_first=layout == "comfy")
    kinds = stored_as(scheme, layout, *weight.shape)
    found = {}
    for (leaf, (shape, dtype)), tensor in zip(kinds.items(), made, strict=True):
        found[leaf] = (1 / tensor if leaf == UNIT else tensor).view(dtype).reshape(shape)
    return found


def quantise(weight: Tensor, scheme: str, where: str, high_first: bool = False) -> tuple[Tensor, ...]:
    """weight (N, K) floats -> the tensors of `room`, in that order, on the device of the weight.

    Raises CheckpointError, naming `where`, for weights that are not finite.
    """
    pieces = weight.split(max(1, CHUNK // weight.shape[1]))
    largest = torch.stack([piece.abs().amax().float() for piece in pieces]).amax()
    if not bool(largest.isfinite()):
        raise CheckpointError(f"{where} holds values that are not finite; download the file again")
    unit = unit_of(largest)
    found = [quantise_nvfp4(p, unit, high_first) if scheme == "nvfp4" else quantise_mxfp8(p) for p in pieces]
    values, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    return (values, tiled(scales), unit) if scheme == "nvfp4" else (values, tiled(scales))
