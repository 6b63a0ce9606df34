"""Which tensor of a LoRA changes which parameter of a model, and what is left over."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lightx2v.checkpoint import CheckpointError
from lightx2v.lora.dialects import Layer, LoraFile
from lightx2v.models.wan.names import to_diffusers

log = logging.getLogger(__name__)
Shape = tuple[int, ...]

# ComfyUI's modules of HunyuanVideo-1.5, whose LoRAs it saves under these names, by the names of the original file.
# Source: ComfyUI comfy/ldm/hunyuan_video/model.py, and Tencent's hyvideo/models/transformers.
COMFY_HUNYUAN = (
    (re.compile(r"(double_blocks\.\d+\.(?:img|txt))_mod\.linear"), r"\1_mod.lin"),
    (re.compile(r"(double_blocks\.\d+\.(?:img|txt))_attn_([qk])_norm"), r"\1_attn.norm.\2_norm"),
    (re.compile(r"(double_blocks\.\d+\.(?:img|txt))_attn_[qkv]"), r"\1_attn.qkv"),  # three layers of ours in one
    (re.compile(r"(double_blocks\.\d+\.(?:img|txt))_attn_proj"), r"\1_attn.proj"),
    (re.compile(r"(.+_refiner\.blocks\.\d+)\.self_attn_(qkv|proj)"), r"\1.self_attn.\2"),
    (re.compile(r"(.+)mlp\.fc1"), r"\1mlp.0"),
    (re.compile(r"(.+)mlp\.fc2"), r"\1mlp.2"),
    (re.compile(r"(time_in|time_r_in|txt_in\.t_embedder)\.mlp\.0"), r"\1.in_layer"),
    (re.compile(r"(time_in|time_r_in|txt_in\.t_embedder)\.mlp\.2"), r"\1.out_layer"),
    (re.compile(r"(txt_in\.c_embedder)\.linear_1"), r"\1.in_layer"),
    (re.compile(r"(txt_in\.c_embedder)\.linear_2"), r"\1.out_layer"),
)


@dataclass(frozen=True)
class Patch:
    """One change of one parameter: scale * up @ down, or scale * a whole tensor."""

    parameter: str
    tensors: tuple[str, ...]  # names in the file: (up, down), or one of the parameter's shape
    scale: float  # without the user's strength
    rows: tuple[int, int] | None = None  # of up or of the whole tensor, where the file fuses several layers


@dataclass(frozen=True)
class Coverage:
    """What becomes of each tensor of a file in one model. applied and skipped together are the whole file."""

    name: str  # of the file
    patches: tuple[Patch, ...]
    applied: frozenset[str]
    skipped: Mapping[str, str]  # tensor name -> reason
    ranks: frozenset[int]
    scales: frozenset[float]

    def line(self, strength: float) -> str:
        """One line for the log: "a.safetensors: 400 of 400 tensors applied (rank 64, scale 0.125 x strength 1)"."""
        total = len(self.applied) + len(self.skipped)
        factors = f"rank {_range(self.ranks)}, scale {_range(self.scales)} x " if self.ranks else ""
        return f"{self.name}: {len(self.applied)} of {total} tensors applied ({factors}strength {strength:g})"

    def report(self, strength: float) -> None:
        """Log the line; what was skipped is a warning that names the first five."""
        log.info(self.line(strength))
        if self.skipped:
            first = "; ".join(f"'{key}' {reason}" for key, reason in list(self.skipped.items())[:5])
            more = f"; and {len(self.skipped) - 5} more" if len(self.skipped) > 5 else ""
            log.warning("%s: %d tensors not applied: %s%s", self.name, len(self.skipped), first, more)


def _range(values: frozenset[int] | frozenset[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """Name -> shape of everything that a LoRA may change.

    A layer with in_features and out_features counts as (out, in) whatever its weight is stored as, so quantised and
    packed weights match like plain ones.
    """
    shapes: dict[str, Shape] = {}
    for path, owner in module.named_modules():
        start = f"{path}." if path else ""
        shapes |= {start + name: tuple(value.shape) for name, value in owner._parameters.items() if value is not None}
        size_in, size_out = getattr(owner, "in_features", None), getattr(owner, "out_features", None)
        if isinstance(size_in, int) and isinstance(size_out, int):
            shapes[f"{start}weight"] = (size_out, size_in)
            if getattr(owner, "bias", None) is not None:
                shapes[f"{start}bias"] = (size_out,)
    return shapes


@dataclass(frozen=True)
class Change:
    """One part of a layer: what it does to which of the layer's parameters."""

    leaf: str  # weight, bias or modulation
    tensors: tuple[str, ...]  # (up, down), or one
    scale: float
    keys: tuple[str, ...]  # of the file, that are used up by it


def changes(layer: Layer) -> list[Change]:
    """The parts of a layer in this order: product of factors, its bias, whole differences."""
    found = []
    if layer.up and layer.down:
        pair = (layer.up, layer.down)
        found.append(Change("weight", pair, layer.scale, (*pair, layer.alpha) if layer.alpha else pair))
    if layer.up_bias:
        found.append(Change("bias", (layer.up_bias,), layer.scale, (layer.up_bias,)))
    for leaf, key in (("weight", layer.diff), ("bias", layer.diff_b), ("modulation", layer.diff_m)):
        if key:
            # An alpha beside whole differences alone scales nothing: they are stored as they are to be added.
            unused = (layer.alpha,) if layer.alpha and not layer.up else ()
            found.append(Change(leaf, (key,), 1.0, (key, *unused)))
    return found


def match(file: LoraFile, model: nn.Module | Mapping[str, Shape]) -> Coverage:
    """Find the layers of a LoRA in a model, or in the names and shapes of one.

    A tensor that fits nothing is skipped and named. Raises CheckpointError, with both shapes, where nothing fits or
    more layers are of another shape than fit: the file was made for another model.
    """
    shapes = shapes_of(model) if isinstance(model, nn.Module) else model
    named, flat = _index(shapes)
    patches: list[Patch] = []
    applied: set[str] = set()
    skipped, misfits = dict(file.ignored), []
    for name, layer in file.layers.items():
        owners = (flat if name in file.flat else named).get(name, [])
        for change in changes(layer):
            targets = [target for owner in owners if (target := _target(shapes, owner, change.leaf))]
            if not targets or len(targets) < len(owners):
                skipped |= dict.fromkeys(change.keys, "names a layer that this model does not have")
            elif not _fits(given := _shape(file, change), [shapes[target] for target in targets]):
                reason = f"is for {_words(given)}, the model's '{targets[0]}' is {_words(shapes[targets[0]])}"
                skipped |= dict.fromkeys(change.keys, reason)
                misfits.append((change.tensors[0], reason))
            else:
                patches += _patches(change, targets, shapes)
                applied |= set(change.keys)
    if not applied or (len(misfits) > len(patches)):
        raise CheckpointError(f"{file.path}: made for another model: {_mismatch(file, shapes, misfits)}")
    pairs = [layer for layer in file.layers.values() if layer.up in applied]
    ranks = frozenset(rank for layer in pairs if (rank := file.rank(layer)) is not None)
    scales = frozenset(layer.scale for layer in pairs)
    return Coverage(file.path.name, tuple(patches), frozenset(applied), skipped, ranks, scales)


def _index(shapes: Mapping[str, Shape]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Every name that a dialect may give a module or a bare parameter -> those of the model; then with underscores.

    Several of ours under one name are the parts of a fused layer, in the order of its rows.
    """
    named: dict[str, list[str]] = {}
    for owner in dict.fromkeys(part for name in shapes for part in (name.rpartition(".")[0], name)):
        fused = {re.sub(pattern, new, owner) for pattern, new in COMFY_HUNYUAN if pattern.fullmatch(owner)}
        for alias in {owner, to_diffusers(owner)} | fused:
            named.setdefault(alias, []).append(owner)
    for alias in [alias for alias, owners in named.items() if len(owners) > 1]:
        named[alias] = sorted(named[alias], key=lambda owner: "qkv".find(owner[-1]))
    return named, {alias.replace(".", "_"): owners for alias, owners in named.items()}


def _target(shapes: Mapping[str, Shape], owner: str, leaf: str) -> str | None:
    if f"{owner}.{leaf}" in shapes:
        return f"{owner}.{leaf}"
    # A parameter without a module of its own carries its whole name: "blocks.0.modulation" + ".diff".
    return owner if owner in shapes and leaf != "bias" else None


def _shape(file: LoraFile, change: Change) -> Shape:
    """(out, in) of a product of factors, the shape of a whole tensor; without dimensions of one."""
    shapes = [file.header.tensors[key].shape for key in change.tensors]
    if len(shapes) == 1:
        return tuple(size for size in shapes[0] if size != 1)
    return shapes[0][0], math.prod(shapes[1][1:])


def _fits(given: Shape, targets: list[Shape]) -> bool:
    """Whether the rows of `targets` one below the other are what `given` describes."""
    flat = [tuple(size for size in target if size != 1) for target in targets]
    if len(targets) == 1 and given == flat[0]:
        return True
    if not given:
        return False
    columns = {math.prod(target[1:]) for target in targets}
    return columns == {math.prod(given[1:])} and sum(target[0] for target in targets) == given[0]


def _patches(change: Change, targets: list[str], shapes: Mapping[str, Shape]) -> list[Patch]:
    if len(targets) == 1:
        return [Patch(targets[0], change.tensors, change.scale)]
    found, start = [], 0
    for target in targets:
        stop = start + shapes[target][0]
        found.append(Patch(target, change.tensors, change.scale, (start, stop)))
        start = stop
    return found


def _mismatch(file: LoraFile, shapes: Mapping[str, Shape], misfits: list[tuple[str, str]]) -> str:
    if misfits:
        key, reason = min(misfits, key=lambda misfit: " x " not in misfit[1])  # a matrix says more than a bias
        return f"'{key}' {reason}; use a LoRA that was made for this model"
    first = min((change for layer in file.layers.values() for change in changes(layer)), key=lambda c: -len(c.tensors))
    weights = [name for name, shape in shapes.items() if len(shape) > 1]
    ours = next((name for name in weights if ".0." in name), weights[0] if weights else "")
    theirs = _words(_shape(file, first))
    return (
        f"none of its {len(file.layers)} layers is in the model; its '{first.tensors[0]}' is for {theirs}, "
        f"the model has for example '{ours}', {_words(shapes.get(ours, ()))}; use a LoRA that was made for this model"
    )


def _words(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "one number"
