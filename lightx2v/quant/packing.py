"""Which layers of a transformer keep packed weights, what they multiply with, and how a file fills them.

`Engine.quant` says what is wanted. "auto": what the file packs in 8 bits or in GGML's blocks stays so where a kernel
for it runs on the device, and is restored otherwise. "none": everything is restored. "fp8" and "int8": the layers that
the family names (`ModelSpec.quantises`) multiply in that format, from whatever file: what is stored in it stays as it
is, the rest is quantised as it is read, one tensor at a time, rounded to the nearest with one scale a row.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightx2v.checkpoint import CheckpointError, Header, Packed, TensorInfo
from lightx2v.config import Engine
from lightx2v.identify import CheckpointInfo
from lightx2v.lora.branch import BranchedLinear
from lightx2v.quant.linear import GgufLinear, ScaledLinear
from lightx2v_kernels import Kernels, UnsupportedBackendError, registry
from lightx2v_kernels.quantize.reference import quantize

log = logging.getLogger(__name__)
FORMATS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
OPS = {torch.float8_e4m3fn: "fp8_linear", torch.int8: "int8_linear"}
GGUF = "gguf_linear"
SCALE = "weight_scale"
MULTIPLE = 16  # of rows and columns, which every 8-bit kernel wants
REFERENCE = "reference"


@dataclass(frozen=True)
class _Place:
    """Where layers are to run. kernel: of 8-bit products, by name, or "auto"."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    kernel: str

    def backend(self, op: str) -> registry.Backend:
        """The one that was named, or the best. Of these the reference only on a CPU: on a GPU it would be slower than
        weights that were restored once."""
        known = op != GGUF or self.kernel in registry.names(op)
        name = self.kernel if known else registry.AUTO
        found = registry.select(op, name, self.device, self.dtype, self.head_dim)
        if name == registry.AUTO and found.name == REFERENCE and self.device.type != "cpu":
            refusals = registry.registry(op).refusals(self.device, self.dtype, self.head_dim)
            why = "; ".join(f"{name}: {reason or 'failed its self-test'}" for name, reason in refusals.items())
            raise UnsupportedBackendError(f"no {op} kernel runs on {self.device}: {why}")
        return found

    def backend_or_none(self, op: str) -> registry.Backend | None:
        """The same; None, with the reasons in the log, where "auto" finds none, and on a CPU, where packed weights
        save memory but cost time."""
        if self.kernel != registry.AUTO:
            return self.backend(op)
        if self.device.type == "cpu":
            return None
        try:
            return self.backend(op)
        except UnsupportedBackendError as error:
            log.info("packed weights are restored as they are read: %s", error)
            return None


def pack(transformer: nn.Module, info: CheckpointInfo, engine: Engine, kernels: Kernels, device: torch.device) -> None:
    """Put packed layers in place of linear ones, in a meta-device network that has its dtypes.

    Raises UnsupportedBackendError where the format or the kernel that was named cannot run on the device.
    """
    if engine.quant == "none":
        return
    chosen: dict[str, registry.Backend | None] = {}
    for name, linear in list(transformer.named_modules()):
        if not isinstance(linear, nn.Linear) or f"{name}.weight" not in info.header.tensors:
            continue
        stored = info.header.tensors[f"{name}.weight"]
        reads, encoding = _reads(name, linear, stored, info, engine), _encoding(name, stored, info, engine)
        if reads is None and not encoding:
            continue
        op = OPS[reads] if reads is not None else GGUF
        if op not in chosen:
            place = _Place(device, linear.weight.dtype, info.spec.head_dim, engine.linear)
            chosen[op] = place.backend_or_none(op) if engine.quant == "auto" else place.backend(op)
        if (backend := chosen[op]) is None:
            continue
        if reads is not None:
            packed: nn.Module = ScaledLinear(linear, reads, backend.load(), kernels.quantize)
        else:
            packed = GgufLinear(linear, encoding, stored.nbytes, backend.load())
        transformer.set_submodule(name, packed)
    for op, found in chosen.items():
        if found is not None:
            log.info("%s: %s", op, found.name)


def _reads(
    name: str, linear: nn.Linear, stored: TensorInfo, info: CheckpointInfo, engine: Engine
) -> torch.dtype | None:
    """The 8-bit dtype that a layer is to multiply in; None: it is not to."""
    if not info.spec.quantises(name) or linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
        return None
    return FORMATS[engine.quant] if engine.quant in FORMATS else stored_format(stored)


def stored_format(stored: TensorInfo) -> torch.dtype | None:
    """The 8-bit dtype that a weight is stored in, where kernels multiply in it."""
    if stored.packed is None or stored.packed.scheme not in FORMATS:
        return None
    found = stored.packed.parts["weight"].dtype
    return found if found in OPS else None


def _encoding(name: str, stored: TensorInfo, info: CheckpointInfo, engine: Engine) -> str:
    """GGML's type of a weight that stays in its blocks; "" for others."""
    stays = (
        engine.quant == "auto" and re.search(r"blocks\.\d+\.", name) and not info.spec.keep_float32(f"{name}.weight")
    )
    return stored.encoding if stays else ""


def filling(transformer: nn.Module, header: Header, device: torch.device) -> Header:
    """The header whose tensors fill a network that was given packed layers. device: where to quantise."""
    tensors: dict[str, TensorInfo] = {}
    layers = dict(transformer.named_modules())
    for name, info in header.tensors.items():
        layer_name, _, leaf = name.rpartition(".")
        layer = layers.get(layer_name)
        if leaf != "weight" or not isinstance(layer, ScaledLinear | GgufLinear):
            tensors[name] = info
        elif isinstance(layer, GgufLinear):
            tensors[name] = replace(info, stored=info.stored or name, shape=(info.nbytes,), packed=None)
        else:
            scale = f"{layer_name}.{SCALE}"
            stays = stored_format(info) == layer.reads
            tensors[name], tensors[scale] = (
                _as_stored(info) if stays else Quantising(name, info, device).infos(layer.reads)
            )
    return replace(header, tensors=tensors)


def _as_stored(info: TensorInfo) -> tuple[TensorInfo, TensorInfo]:
    """Weight and scale as a file has them; one scale for all rows is repeated, none is 1."""
    assert info.packed is not None
    parts, rows = info.packed.parts, info.shape[0]

    def spread(found: Mapping[str, Tensor]) -> Tensor:
        scale = found["scale"].float().flatten() if "scale" in found else torch.ones(1)
        return scale.expand(rows).contiguous()

    scale = Packed("", "", {role: part for role, part in parts.items() if role == "scale"}, spread)
    return parts["weight"], replace(info, shape=(rows,), dtype=torch.float32, packed=scale)


class Quantising:
    """One weight on its way into 8 bits: read once, given as two tensors, the weight first.

    info: (N, K), plain or packed in any way. device: where to compute.
    """

    def __init__(self, name: str, info: TensorInfo, device: torch.device) -> None:
        self._name, self._info, self._device = name, info, device
        self._scale: Tensor | None = None

    def infos(self, dtype: torch.dtype) -> tuple[TensorInfo, TensorInfo]:
        """What gives the values (N, K) in dtype, and what gives their scales (N,) float32 after that."""
        info = self._info

        def values(found: Mapping[str, Tensor]) -> Tensor:
            parts = {role: part.to(self._device) for role, part in found.items()}
            weight = info.packed.unpack(parts) if info.packed is not None else parts["weight"]
            values, self._scale = quantise_weight(weight, dtype, f"{info.file}: '{self._name}'")
            return values

        def scale(found: Mapping[str, Tensor]) -> Tensor:
            assert self._scale is not None, "the weight is read before its scale"
            scale, self._scale = self._scale, None
            return scale

        parts = info.packed.parts if info.packed is not None else {"weight": info}
        weight = replace(info, dtype=dtype, packed=Packed("", "", parts, values))
        return weight, replace(info, shape=info.shape[:1], dtype=torch.float32, packed=Packed("", "", {}, scale))


def quantise_weight(weight: Tensor, dtype: torch.dtype, where: str) -> tuple[Tensor, Tensor]:
    """weight (N, K) floats -> values (N, K) in dtype and scales (N,) float32, on the device of the weight.

    A row's largest value becomes 127 or 448, the others are rounded to the nearest. Raises CheckpointError, naming
    `where`, for weights that are not finite.
    """
    packed = quantize(weight, dtype)
    if not bool(torch.isfinite(packed.scale).all()):
        raise CheckpointError(f"{where} holds values that are not finite; download the file again")
    return packed.values, packed.scale.flatten()


def keep_packed(source: nn.Module, target: nn.Module) -> None:
    """Give `target`, another network over the same weights, the packed layers of `source`, not what is beside them."""
    for name, layer in source.named_modules():
        base = layer.base if isinstance(layer, BranchedLinear) else layer
        if isinstance(base, ScaledLinear | GgufLinear):
            target.set_submodule(name, base)
