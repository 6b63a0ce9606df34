"""Which layers of a transformer keep packed weights, what they multiply with, and how a file fills them.

`Engine.quant` says what is wanted. "auto": what the file packs in 8 bits, NVFP4, MXFP8 or GGML's blocks stays so where
a kernel for it runs on the device, and is restored otherwise. "none": everything is restored. "fp8", "int8", "nvfp4"
and "mxfp8": the layers that the family names (`ModelSpec.quantises`) are in that format, from whatever file: what is
stored in it stays as it is, the rest is quantised as it is read, one tensor at a time, rounded to the nearest.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lightx2v.checkpoint import CheckpointError, Header, Packed, TensorInfo, read_tensors
from lightx2v.config import Engine
from lightx2v.identify import CheckpointInfo
from lightx2v.lora.branch import BranchedLinear
from lightx2v.quant import microscaled
from lightx2v.quant.linear import PACKED, GgufLinear, MicroscaledLinear, ScaledLinear
from lightx2v_kernels import Kernels, UnsupportedBackendError, registry
from lightx2v_kernels.quantize.reference import quantize

log = logging.getLogger(__name__)
FORMATS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
OPS = {torch.float8_e4m3fn: "fp8_linear", torch.int8: "int8_linear"}
GGUF = "gguf_linear"
SCHEMES = {op: scheme for scheme, op in microscaled.OPS.items()}
SCALE = "weight_scale"
MULTIPLE = 16  # of rows and columns, which every 8-bit kernel wants
MICROSCALED_MULTIPLE = 32  # of columns: a block of MXFP8, 16 bytes of NVFP4
REFERENCE = "reference"
CHUNK = 1 << 24  # values quantised at once: their float32 copies take 64 MB each


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


def choose_products(
    info: CheckpointInfo, engine: Engine, device: torch.device, dtype: torch.dtype
) -> Mapping[str, registry.Backend]:
    """Op -> what computes it, for every op that linear layers with packed weights of this checkpoint need.

    dtype: of the tokens. An op is missing where "auto" found nothing: such weights are restored.
    Raises UnsupportedBackendError where the format or the kernel that was named cannot run on the device.
    """
    place = _Place(device, dtype, info.spec.head_dim, engine.linear)
    found: dict[str, registry.Backend] = {}
    for op in sorted({op for name in info.header.tensors if (op := _op(name, info, engine))}):
        backend = place.backend_or_none(op) if engine.quant == "auto" else place.backend(op)
        if backend is not None:
            found[op] = backend
    return found


def pack(
    transformer: nn.Module,
    info: CheckpointInfo,
    engine: Engine,
    products: Mapping[str, registry.Backend],
    kernels: Kernels,
) -> None:
    """Put packed layers in place of linear ones, in a meta-device network that has its dtypes."""
    for name, linear in list(transformer.named_modules()):
        backend = products.get(_op(f"{name}.weight", info, engine))
        if backend is None or not isinstance(linear, nn.Linear):
            continue
        stored = info.header.tensors[f"{name}.weight"]
        if backend.op == GGUF:
            packed: nn.Module = GgufLinear(linear, stored.encoding, stored.nbytes, backend.load())
        elif (scheme := SCHEMES.get(backend.op)) is not None:
            high = _stays(stored, scheme) and stored.packed is not None and microscaled.high_first(stored.packed)
            packed = MicroscaledLinear(linear, scheme, high, backend.load())
        else:
            reads = next(dtype for dtype, op in OPS.items() if op == backend.op)
            packed = ScaledLinear(linear, reads, backend.load(), kernels.quantize)
        transformer.set_submodule(name, packed)


def _op(weight: str, info: CheckpointInfo, engine: Engine) -> str:
    """The op that computes the layer of that weight if it is packed; "" where it is not to be."""
    name, _, leaf = weight.rpartition(".")
    stored = info.header.tensors.get(weight)
    if leaf != "weight" or stored is None or len(stored.shape) != 2 or engine.quant == "none":
        return ""
    if engine.quant in microscaled.OPS:
        return microscaled.OPS[engine.quant] if _in_blocks(weight, stored, info) else ""
    if engine.quant in FORMATS:
        return OPS[FORMATS[engine.quant]] if multiplies(weight, stored, info) else ""
    if stored.encoding:
        in_block = re.search(r"blocks\.\d+\.", name) and not info.spec.keep_float32(weight)
        return GGUF if in_block else ""
    if stored.packed is not None and (op := microscaled.OPS.get(stored.packed.scheme)):
        return op if _in_blocks(weight, stored, info) else ""
    found = stored_format(stored)
    return OPS[found] if found is not None and multiplies(weight, stored, info) else ""


def multiplies(weight: str, stored: TensorInfo, info: CheckpointInfo) -> bool:
    """Whether this weight is of a layer that may multiply in 8 bits."""
    name, _, leaf = weight.rpartition(".")
    whole = len(stored.shape) == 2 and not any(size % MULTIPLE for size in stored.shape)
    return leaf == "weight" and whole and info.spec.quantises(name)


def _in_blocks(weight: str, stored: TensorInfo, info: CheckpointInfo) -> bool:
    """Whether this weight may be in NVFP4 or MXFP8."""
    return multiplies(weight, stored, info) and stored.shape[1] % MICROSCALED_MULTIPLE == 0


def packable(weight: str, stored: TensorInfo, info: CheckpointInfo, scheme: str) -> bool:
    """Whether this weight may be in the scheme, of FORMATS or microscaled.OPS."""
    return (_in_blocks if scheme in microscaled.OPS else multiplies)(weight, stored, info)


def _stays(stored: TensorInfo, scheme: str) -> bool:
    return stored.packed is not None and stored.packed.scheme == scheme


def stored_format(stored: TensorInfo) -> torch.dtype | None:
    """The 8-bit dtype that a weight is stored in, where kernels multiply in it."""
    if stored.packed is None or stored.packed.scheme not in FORMATS:
        return None
    found = stored.packed.parts["weight"].dtype
    return found if found in OPS else None


def filling(transformer: nn.Module, header: Header, device: torch.device) -> Header:
    """The header whose tensors fill a network that was given packed layers. device: where to quantise."""
    tensors: dict[str, TensorInfo] = {}
    layers = dict(transformer.named_modules())
    for name, info in header.tensors.items():
        layer_name, _, leaf = name.rpartition(".")
        layer = layers.get(layer_name)
        if leaf != "weight" or not isinstance(layer, PACKED):
            tensors[name] = info
        elif isinstance(layer, MicroscaledLinear):
            found = (
                microscaled.kept(name, info)
                if _stays(info, layer.scheme)
                else _microscaling(header, name, device, layer)
            )
            tensors |= {f"{layer_name}.{leaf}": each for leaf, each in found.items()}
        elif isinstance(layer, GgufLinear):
            tensors[name] = replace(info, stored=info.stored or name, shape=(info.nbytes,), packed=None)
        else:
            scale = f"{layer_name}.{SCALE}"
            stays = stored_format(info) == layer.reads
            tensors[name], tensors[scale] = _as_stored(info) if stays else _scaling(header, name, device, layer.reads)
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


def _scaling(header: Header, name: str, device: torch.device, reads: torch.dtype) -> tuple[TensorInfo, TensorInfo]:
    """What gives the values (N, K) in 8 bits, and what gives their scales (N,) float32."""
    shape = header.tensors[name].shape
    quantising = Quantising(header, name, device, partial(quantise_weight, dtype=reads))
    values, scale = quantising.infos((shape, reads), (shape[:1], torch.float32))
    return values, scale


def _microscaling(header: Header, name: str, device: torch.device, layer: MicroscaledLinear) -> dict[str, TensorInfo]:
    made = microscaled.room(layer.scheme, layer.out_features, layer.in_features)
    quantising = Quantising(header, name, device, partial(microscaled.quantise, scheme=layer.scheme))
    return dict(zip(made, quantising.infos(*made.values()), strict=True))


class Quantising:
    """One weight on its way into fewer bits: given as several tensors, and read once where they follow each other.

    header: has the weight (N, K), plain or packed in any way. device: where to compute.
    quantise: the weight, and `where` for errors -> the tensors.
    """

    def __init__(
        self, header: Header, name: str, device: torch.device, quantise: Callable[..., tuple[Tensor, ...]]
    ) -> None:
        self._header, self._name, self._device, self._quantise = header, name, device, quantise
        self._rest: dict[int, Tensor] = {}

    def infos(self, *kinds: tuple[tuple[int, ...], torch.dtype]) -> tuple[TensorInfo, ...]:
        """What gives the tensors that `quantise` returns, whose shapes and dtypes are `kinds`."""
        info = self._header.tensors[self._name]

        def first(found: Mapping[str, Tensor]) -> Tensor:
            parts = {role: part.to(self._device) for role, part in found.items()}
            weight = info.packed.unpack(parts) if info.packed is not None else parts["weight"]
            made = self._made(weight)
            self._rest = dict(enumerate(made[1:], 1))
            return made[0]

        def later(index: int, found: Mapping[str, Tensor]) -> Tensor:
            if index not in self._rest:  # the values stay in the file
                ((_, weight),) = read_tensors(self._header, [self._name], self._device)
                self._rest = dict(enumerate(self._made(weight.to(self._device))[1:], 1))
            return self._rest.pop(index)

        parts = info.packed.parts if info.packed is not None else {"weight": info}
        ways = [Packed("", "", parts, first)]
        ways += [Packed("", "", {}, partial(later, index)) for index in range(1, len(kinds))]
        return tuple(
            replace(info, shape=shape, dtype=dtype, packed=way) for (shape, dtype), way in zip(kinds, ways, strict=True)
        )

    def _made(self, weight: Tensor) -> tuple[Tensor, ...]:
        return self._quantise(weight, where=f"{self._header.tensors[self._name].file}: '{self._name}'")


def quantise_weight(weight: Tensor, dtype: torch.dtype, where: str) -> tuple[Tensor, Tensor]:
    """weight (N, K) floats -> values (N, K) in dtype and scales (N,) float32, on the device of the weight.

    A row's largest value becomes 127 or 448, the others are rounded to the nearest. Raises CheckpointError, naming
    `where`, for weights that are not finite.
    """
    parts = [quantize(rows, dtype) for rows in weight.split(max(1, CHUNK // weight.shape[1]))]
    values, scale = torch.cat([part.values for part in parts]), torch.cat([part.scale for part in parts]).flatten()
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(f"{where} holds values that are not finite; download the file again")
    return values, scale


def keep_packed(source: nn.Module, target: nn.Module) -> None:
    """Give `target`, another network over the same weights, the packed layers of `source`, not what is beside them."""
    for name, layer in source.named_modules():
        base = layer.base if isinstance(layer, BranchedLinear) else layer
        if isinstance(base, PACKED):
            target.set_submodule(name, base)
