"""LoRA files: what each tensor name of each dialect means. Reads headers and the scalar alphas, never a factor.

A tensor is called PREFIX + layer + suffix. The suffix says which part of the layer's change it holds (`SUFFIXES`); the
prefix says who wrote the file and is dropped; the layer is a module's name in Wan's, diffusers' or ComfyUI's spelling,
kohya's with every dot an underscore. `matching.py` finds the layer in a model.

    kohya, musubi   lora_unet_blocks_0_self_attn_q . lora_down.weight | lora_up.weight | alpha
    PEFT            base_model.model. blocks.0.self_attn.q . lora_A.weight | lora_A.default.weight | lora_B.bias
    diffusers       transformer. blocks.0.attn1.to_q . lora_A.weight | lora_B.weight
    ComfyUI         diffusion_model. blocks.0.self_attn.q . lora_down.weight | lora_A.weight | alpha
    Kijai, LightX2V the same, and diff (a weight), diff_b (a bias), diff_m (a modulation)
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from lightx2v import strict_json
from lightx2v.checkpoint import CheckpointError, Header, read_header, read_tensors
from lightx2v.identify import other_kind

# Longest first; several may stand before one name (PEFT around a pipeline's component).
PREFIXES = ("model.diffusion_model.", "base_model.model.", "diffusion_model.", "transformer.", "model.", "unet.")
FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
TEXT_ENCODERS = (
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "text_encoder.",
    "text_encoders.",
    "cond_stage_model.",
)

# Part of a layer -> how a tensor's name ends. What may stand between lora_A and weight is PEFT's name of the adapter.
SUFFIXES = {
    "down": r"(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)down\.weight|\.lora_A(?:(?:\.[^.]+)?\.weight)?",
    "up": r"(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)up\.weight|\.lora_B(?:(?:\.[^.]+)?\.weight)?",
    "up_bias": r"\.lora_B(?:\.[^.]+)?\.bias|\.lora_up\.bias",
    "alpha": r"\.alpha",
    "diff": r"\.diff|\.w_norm",
    "diff_b": r"\.diff_b|\.b_norm",
    "diff_m": r"\.diff_m",
}
MAX_PATTERN = 300  # characters
# Other ways to change a weight, by their tensors. Applying what is left of such a file would give another picture.
REFUSED = {
    "DoRA": r"\.dora_scale|\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?",
    "LoHa": r"\.hada_[wt]\w+",
    "LoKr": r"\.lokr_[wt]\w+",
    "GLoRA": r"\.[ab][12]\.weight",
    "OFT": r"\.oft_\w+(?:\.[^.]+)?(?:\.weight)?",
    "Tucker": r"\.lora_mid\.weight",
}
SUFFIX = re.compile("(?:" + "|".join(f"(?P<{part}>{end})" for part, end in {**SUFFIXES, **REFUSED}.items()) + ")$")


@dataclass(frozen=True)
class Layer:
    """One module's part of a file. Every field but `scale` is the name of a tensor in the file."""

    down: str | None = None  # (rank, in)
    up: str | None = None  # (out, rank)
    up_bias: str | None = None  # (out,), scaled like the product of the two
    alpha: str | None = None
    diff: str | None = None  # added to the weight, unscaled
    diff_b: str | None = None  # to the bias
    diff_m: str | None = None  # to the modulation
    scale: float = 1.0  # of up @ down


@dataclass(frozen=True)
class LoraFile:
    """What one file holds. A layer is keyed by its name without prefix; kohya's keep underscores (`flat`)."""

    path: Path
    header: Header
    layers: Mapping[str, Layer]
    flat: frozenset[str]
    ignored: Mapping[str, str] = field(default_factory=dict)  # tensor name -> why it belongs to no layer

    def rank(self, layer: Layer) -> int | None:
        return self.header.tensors[layer.down].shape[0] if layer.down else None


def is_lora(path: Path) -> bool:
    """Whether a file holds a LoRA that can be read here; raises CheckpointError saying why not."""
    return bool(_layers(read_header(path)).layers)


def read_lora(path: str | Path) -> LoraFile:
    """Every tensor of a LoRA by layer and part, and each layer's scale.

    path: a file, or PEFT's folder of adapter_model.safetensors and adapter_config.json.
    scale = alpha / rank; alpha / sqrt(rank) where PEFT's settings say use_rslora (arXiv:2312.03732); 1 without alpha.
    Raises CheckpointError for files that hold no LoRA, half a layer, or another kind of adapter (DoRA, LoKr, ...).
    """
    file = _layers(read_header(path))
    settings = _peft_settings(file.header)
    alphas = _alphas(file)
    layers = {}
    for name, layer in file.layers.items():
        rank = file.rank(layer)
        scale = 1.0 if rank is None else _scale(name, rank, alphas.get(layer.alpha or ""), settings)
        layers[name] = replace(layer, scale=scale)
    return replace(file, layers=layers)


def _layers(header: Header) -> LoraFile:
    parts: dict[str, dict[str, str]] = {}
    flat: set[str] = set()
    ignored: dict[str, str] = {}
    for key in header.tensors:
        if key.startswith(TEXT_ENCODERS):
            ignored[key] = "changes a text encoder, not this model"
            continue
        match = SUFFIX.search(key)
        if match is None or match.lastgroup is None:
            ignored[key] = "is not a LoRA's tensor"
            continue
        if match.lastgroup in REFUSED:
            raise CheckpointError(
                f"{header.path}: holds {match.lastgroup} layers ('{key}'), which are not supported; "
                "use a plain LoRA of the same model"
            )
        name, is_flat = _layer_name(key[: match.start()])
        earlier = parts.setdefault(name, {}).setdefault(match.lastgroup, key)
        if earlier != key:
            raise CheckpointError(
                f"{header.path}: '{earlier}' and '{key}' change the same layer; keep one adapter in a file"
            )
        flat |= {name} if is_flat else set()
    layers = {name: Layer(**cast(dict[str, Any], found)) for name, found in parts.items() if set(found) != {"alpha"}}
    ignored |= {
        found["alpha"]: "scales a layer that is not in the file" for name, found in parts.items() if name not in layers
    }
    if not layers:
        raise CheckpointError(f"{header.path}: {_without_layers(header)}; pick a LoRA of a video model")
    for name, layer in layers.items():
        _require_whole(header, name, layer)
    return LoraFile(header.path, header, layers, frozenset(flat), ignored)


def _layer_name(name: str) -> tuple[str, bool]:
    """The name without its writer's prefix, and whether its dots are underscores."""
    for prefix in FLAT_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix), True
    while prefix := next((known for known in PREFIXES if name.startswith(known)), ""):
        name = name.removeprefix(prefix)
    return name, False


def _without_layers(header: Header) -> str:
    if any(key.startswith(TEXT_ENCODERS) for key in header.tensors):
        return "changes only a text encoder"
    return f"holds no LoRA tensors; it is {other_kind(header) or 'of a kind that is not known'}"


def _require_whole(header: Header, name: str, layer: Layer) -> None:
    if (layer.down is None) != (layer.up is None) or (layer.up_bias and not layer.up):
        there = layer.down or layer.up or layer.up_bias
        raise CheckpointError(
            f"{header.path}: '{there}' lacks its counterpart for layer '{name}'; the file is damaged, download it again"
        )
    if layer.down and layer.up:
        down, up = header.tensors[layer.down].shape, header.tensors[layer.up].shape
        if len(down) < 2 or len(up) < 2 or not down[0] or math.prod(up[1:]) != down[0]:
            raise CheckpointError(
                f"{header.path}: '{layer.up}' {list(up)} and '{layer.down}' {list(down)} are no factors of one matrix: "
                "expected (out, rank) and (rank, in); the file is damaged or of an unknown kind"
            )


def _alphas(file: LoraFile) -> dict[str, float]:
    """Tensor name -> value. Lightning's LoRAs store them as 64-bit integers, others as floats, () or (1,)."""
    names = [layer.alpha for layer in file.layers.values() if layer.alpha]
    for name in names:
        if math.prod(file.header.tensors[name].shape) != 1:
            shape = list(file.header.tensors[name].shape)
            raise CheckpointError(f"{file.path}: '{name}' must be one number, is {shape}; the file is damaged")
    alphas = {name: float(tensor.item()) for name, tensor in read_tensors(file.header, names)}
    if bad := next((name for name, value in alphas.items() if not math.isfinite(value)), None):
        raise CheckpointError(f"{file.path}: '{bad}' is {alphas[bad]}, expected a number; the file is damaged")
    return alphas


@dataclass(frozen=True)
class PeftSettings:
    """What PEFT's LoraConfig says about scale."""

    alpha: float | None = None
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...] = ()  # layers with an alpha of their own
    use_rslora: bool = False


def _scale(name: str, rank: int, alpha: float | None, settings: PeftSettings) -> float:
    if alpha is None:
        alpha = next((value for end, value in settings.alpha_pattern if end.fullmatch(name)), settings.alpha)
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if settings.use_rslora else rank)


def _peft_settings(header: Header) -> PeftSettings:
    """From diffusers' metadata entry, or from the adapter_config.json beside PEFT's adapter_model.safetensors."""
    source, text = "its metadata 'lora_adapter_metadata'", header.metadata.get("lora_adapter_metadata")
    beside = (header.path if header.path.is_dir() else header.path.parent) / "adapter_config.json"
    files = {info.file.name for info in header.tensors.values()}
    from_file = text is None and files == {"adapter_model.safetensors"} and beside.is_file()
    if text is None and not from_file:
        return PeftSettings()
    try:
        if from_file:
            source = str(beside)
        told = strict_json.read(beside) if text is None else strict_json.parse(text)
        # diffusers writes "transformer.lora_alpha", a component's name before each entry; PEFT itself does not.
        entries = {key.removeprefix("transformer."): value for key, value in told.items()}
        alpha = entries.get("lora_alpha")
        return PeftSettings(
            alpha=None if alpha is None else float(alpha),
            alpha_pattern=tuple(
                (_pattern(end), float(value)) for end, value in (entries.get("alpha_pattern") or {}).items()
            ),
            use_rslora=bool(entries.get("use_rslora", False)),
        )
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise CheckpointError(f"{header.path}: {source} is damaged ({error}); expected PEFT's settings") from error


def _pattern(end: str) -> re.Pattern[str]:
    """PEFT's pattern of a layer's name, which may begin anywhere in it.

    Raises ValueError for one that could take hours to try: repeated groups, more than two repetitions, back references.
    """
    repeated = len(re.findall(r"(?<!\\)[*+{]", end))
    if len(end) > MAX_PATTERN or repeated > 2 or re.search(r"\)[*+?{]|\\[1-9]|\(\?P=", end):
        raise ValueError(f"the pattern {end[:60]!r} is not a layer's name")
    return re.compile(rf"(?:.*\.)?(?:{end})")
