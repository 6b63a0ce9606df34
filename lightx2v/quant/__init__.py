"""Weights stored in fewer bits: which scheme a file uses, tensor by tensor, and how the values come back.

A scheme is a file here with `recognise(weight, scale) -> Packed | None`; what it packs says itself how to unpack.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lightx2v import strict_json
from lightx2v.checkpoint import CheckpointError, Header, TensorInfo, read_bytes
from lightx2v.quant import fp8, gguf, int8, microscaled

SCHEMES = (fp8, int8, gguf)
WEIGHT = ".weight"
# One scale, two names: ComfyUI's older scaled files and Kijai's; LightX2V's and ComfyUI's newer files.
SCALES = (".scale_weight", ".weight_scale")
INPUT_SCALES = (".scale_input", ".input_scale")
INPUT_ABSMAX = ".input_absmax"
FILE_MARK = "scaled_fp8"
LAYER_MARK = ".comfy_quant"
MAX_MARK_BYTES = 4096
METADATA_MARK = "_quantization_metadata"
# Of both marks, those that are read here (ComfyUI, comfy/quant_ops.py).
FORMATS = ("float8_e4m3fn", "float8_e5m2", *microscaled.OPS)
USE_ANOTHER = "use a bf16, fp16, fp8, int8, NVFP4, MXFP8 or GGUF version of the file"

# Names that only another scheme has. First match wins.
FOREIGN: tuple[tuple[str, str], ...] = (
    (r"\.weight_packed$", "compressed-tensors' 4 bits"),
    (r"\.pre_quant_scale$", "4 bits with a scale for each channel of the tokens"),
    (r"\.(absmax|quant_map|nested_absmax|nested_quant_map)$|\.quant_state\.", "bitsandbytes' 4 or 8 bits"),
    (r"\.(qweight|wscales|wtscale|smooth_factor)$", "Nunchaku's SVDQuant"),
    (r"\.(qzeros|g_idx|scales)$", "GPTQ or AWQ"),
    (r"\.weight_scale_inv$", "fp8 with a scale for each 128 x 128 block"),
)


@dataclass(frozen=True)
class Unpacked:
    """A header whose packed weights know how to be restored, and what of the file is not needed for that.

    unused: name in the file -> the reason, in words.
    marks: which conventions the file follows: any of SCALES, FILE_MARK, LAYER_MARK, METADATA_MARK.
    """

    header: Header
    unused: Mapping[str, str]
    marks: frozenset[str]


def find_packed(header: Header) -> Unpacked:
    """Give every weight that a scheme packs its `packed`, and leave out the tensors that only serve it.

    Weights that have theirs already keep it.
    Raises CheckpointError for schemes that are not known here, scales without their weights and weights without theirs.
    """
    header = header.renamed({name: name for name in header.tensors})  # parts are read by their names in the file
    _refuse_foreign(header)
    marks, stated = _check_marks(header)
    unused = {name: reason for name in header.tensors if (reason := _reason(name))}
    scales = _scales(header)
    beside = _beside(header)
    apart = {*unused, *scales.values(), *(name for names in beside.values() for name in names.values())}
    tensors: dict[str, TensorInfo] = {}
    for name, info in header.tensors.items():
        if name in apart:
            continue
        if info.packed is not None:
            tensors[name] = info
            continue
        scale = header.tensors[scales[name]] if name in scales else None
        parts = {leaf: header.tensors[each] for leaf, each in beside.get(name, {}).items()}
        parts |= {"weight": info} | ({microscaled.SCALE: scale} if scale is not None else {})
        layer = (info.stored or name).removesuffix(WEIGHT)
        format = stated.get(layer) or stated.get(name.removesuffix(WEIGHT), "")
        if found := microscaled.recognise(name, parts, format):
            tensors[name] = replace(info, shape=found[0], packed=found[1])
        else:
            tensors[name] = _packed(header, name, info, scale, expected=bool(scales) or FILE_MARK in marks)
    suffixes = {suffix for name in scales.values() for suffix in SCALES if name.endswith(suffix)}
    return Unpacked(replace(header, tensors=tensors), unused, frozenset(marks | suffixes))


def _packed(header: Header, name: str, info: TensorInfo, scale: TensorInfo | None, *, expected: bool) -> TensorInfo:
    """expected: other weights of the file have scales, so that one without must have lost its own."""
    packed = next((packed for scheme in SCHEMES if (packed := scheme.recognise(info, scale))), None)
    if packed is None and name.endswith(WEIGHT) and _word(info) in ("uint8", "int16", "int32"):
        raise CheckpointError(
            f"{header.path}: '{name}' holds weights packed into {_word(info)} in a scheme that is not known; "
            f"{USE_ANOTHER}"
        )
    if packed is None and scale is not None:
        raise CheckpointError(
            f"{header.path}: '{name}' has a scale {list(scale.shape)} {_word(scale)} that does not belong to "
            f"{list(info.shape)} {_word(info)}; known are one scale a tensor or one a row; {USE_ANOTHER}"
        )
    alone = name.endswith(WEIGHT) and scale is None and not info.encoding
    if alone and (_word(info) == "int8" or (packed and expected)):
        raise CheckpointError(f"{header.path}: '{name}' ({_word(info)}) has lost its scale; download the file again")
    return replace(info, packed=packed)


def _word(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _refuse_foreign(header: Header) -> None:
    for pattern, words in FOREIGN:
        if name := next((name for name in header.tensors if re.search(pattern, name)), None):
            raise CheckpointError(f"{header.path}: quantised as {words} ('{name}'), which is not known; {USE_ANOTHER}")


def _reason(name: str) -> str | None:
    if name.rpartition(".")[2] == FILE_MARK:
        return "says that the fp8 weights have scales"
    if name.endswith(LAYER_MARK):
        return "says how the layer is quantised"
    if name.endswith(INPUT_SCALES):
        return "scales activations for fp8 arithmetic; dequantised weights do without"
    if name.endswith(INPUT_ABSMAX):
        return "scales activations for NVFP4 arithmetic; here they get a scale of their own each time"
    return None


def _beside(header: Header) -> dict[str, dict[str, str]]:
    """Name of a weight -> what else of NVFP4 it has: leaf -> name.

    `alpha` alone is a word of many files: it counts beside an `input_global_scale`.
    """
    found: dict[str, dict[str, str]] = {}
    for name in header.tensors:
        layer, _, leaf = name.rpartition(".")
        if leaf not in microscaled.BESIDE:
            continue
        if leaf == microscaled.ALPHA and f"{layer}.{microscaled.INPUT}" not in header.tensors:
            continue
        if layer + WEIGHT not in header.tensors:
            raise CheckpointError(f"{header.path}: '{name}' scales a weight that the file lacks; download it again")
        found.setdefault(layer + WEIGHT, {})[leaf] = name
    return found


def _scales(header: Header) -> dict[str, str]:
    """Name of a weight -> name of its scale."""
    found: dict[str, str] = {}
    for name in header.tensors:
        suffix = next((suffix for suffix in SCALES if name.endswith(suffix)), None)
        if suffix is None:
            continue
        weight = name.removesuffix(suffix) + WEIGHT
        if weight not in header.tensors:
            raise CheckpointError(f"{header.path}: '{name}' scales a weight that the file lacks; download it again")
        if weight in found:
            raise CheckpointError(
                f"{header.path}: mixes two layouts: '{weight}' has two scales, '{found[weight]}' and '{name}'; "
                "download the file again"
            )
        found[weight] = name
    return found


def _check_marks(header: Header) -> tuple[set[str], dict[str, str]]:
    """Which marks the file carries, and the format that they state of each layer, by its name in the file.

    What they say must be known.
    """
    stated: dict[str, str] = {}
    marks = {FILE_MARK} if any(name.rpartition(".")[2] == FILE_MARK for name in header.tensors) else set()
    if layers := [name for name in header.tensors if name.endswith(LAYER_MARK)]:
        marks.add(LAYER_MARK)
        if long := next((name for name in layers if header.tensors[name].nbytes > MAX_MARK_BYTES), None):
            raise CheckpointError(
                f"{header.path}: '{long}' has {header.tensors[long].nbytes} bytes, a mark has some 30 and at most "
                f"{MAX_MARK_BYTES}; download the file again"
            )
        texts = read_bytes(header, layers)
        once = {text: name for name, text in texts.items()}  # most layers say the same
        formats = {text: _format(header, name, _json(header, name, text)) for text, name in once.items()}
        for name, text in texts.items():
            stated[(header.tensors[name].stored or name).removesuffix(LAYER_MARK)] = formats[text]
    if METADATA_MARK in header.metadata:
        marks.add(METADATA_MARK)
        listed = _json(header, METADATA_MARK, header.metadata[METADATA_MARK]).get("layers")
        if not isinstance(listed, dict):
            raise CheckpointError(f"{header.path}: {METADATA_MARK} lists no layers; download the file again")
        for layer, entry in listed.items():
            stated[layer] = _format(header, f"{METADATA_MARK}, {layer}", entry)
    return marks, stated


def _json(header: Header, where: str, text: bytes | str) -> dict:
    try:
        value = strict_json.parse(text)
    except ValueError as error:
        raise CheckpointError(f"{header.path}: '{where}' is not JSON ({error}); download the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{header.path}: '{where}' is no JSON object; download the file again")
    return value


def _format(header: Header, where: str, entry: object) -> str:
    stated = entry.get("format") if isinstance(entry, dict) else None
    if stated not in FORMATS:
        raise CheckpointError(
            f"{header.path}: '{where}' states the format {stated!r}, known are {', '.join(FORMATS)}; {USE_ANOTHER}"
        )
    return stated
