"""The linear layers of a network's blocks in 8 bits, GGML's blocks, NVFP4 or MXFP8, made from its own weights."""

import torch
from torch import Tensor, nn

from lightx2v.bench.subjects import Subject
from lightx2v.quant import microscaled
from lightx2v.quant.linear import GgufLinear, MicroscaledLinear, ScaledLinear
from lightx2v.quant.packing import FORMATS, GGUF, MICROSCALED_MULTIPLE, OPS, quantise_weight
from lightx2v_kernels import Kernels, registry
from lightx2v_kernels.ggml import quantise_q8_0

SUPER, GROUPS = 256, 8  # values of a block of Q4_K, and its groups of 32


def quantise_q4_k(weight: Tensor) -> Tensor:
    """weight (N, K), K a multiple of 256 -> its blocks (bytes,) uint8; of 32 values the least and largest stay.

    Files that people have are made with a search for better scales: they are somewhat more exact.
    Source of the layout: ggml-org/ggml, src/ggml-common.h, block_q4_K, as `lightx2v_kernels/ggml.py` reads it.
    """
    groups = weight.float().reshape(-1, GROUPS, 32)
    low = -groups.amin(2).clamp(max=0)
    step = (groups.amax(2) + low).clamp(min=0) / 15
    d, least = ((x.amax(1, keepdim=True) / 63).half() for x in (step, low))
    scales, minima = (
        torch.where(unit > 0, x / unit.float(), 0.0).round().clamp(0, 63).to(torch.uint8)
        for x, unit in ((step, d), (low, least))
    )
    exact = (d.float() * scales)[..., None]
    codes = torch.where(exact > 0, (groups + (least.float() * minima)[..., None]) / exact, 0.0)
    pairs = codes.round().clamp(0, 15).to(torch.uint8).unflatten(1, (4, 2))
    packed = [
        scales[:, :4] | (scales[:, 4:] >> 4) << 6,
        minima[:, :4] | (minima[:, 4:] >> 4) << 6,
        (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4,
        (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1),
    ]
    return torch.cat([d.view(torch.uint8), least.view(torch.uint8), *packed], 1).flatten()


# Name -> GGML's name, values of a block, bytes a value, how a weight is packed.
BLOCKS = {"gguf-q8_0": ("Q8_0", 32, 34 / 32, quantise_q8_0), "gguf-q4_k": ("Q4_K", SUPER, 144 / SUPER, quantise_q4_k)}
MICROSCALED = {"nvfp4": 4.5 / 8, "mxfp8": 8.25 / 8}  # bytes a value
SCHEMES = (*FORMATS, *BLOCKS, *MICROSCALED)


def packable(subject: Subject, network: nn.Module, scheme: str) -> dict[str, nn.Linear]:
    """The layers that files of a scheme pack, by name."""
    multiple = BLOCKS[scheme][1] if scheme in BLOCKS else MICROSCALED_MULTIPLE if scheme in MICROSCALED else 1
    found = ((name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear))
    return {
        name: linear for name, linear in found if subject.spec.quantises(name) and linear.in_features % multiple == 0
    }


def packed_bytes(subject: Subject, network: nn.Module, scheme: str) -> int:
    """What the packed layers take."""
    each = BLOCKS[scheme][2] if scheme in BLOCKS else MICROSCALED.get(scheme, 1)
    return int(each * sum(linear.weight.numel() for linear in packable(subject, network, scheme).values()))


def pack(subject: Subject, network: nn.Module, scheme: str, kernels: Kernels, linear: str = registry.AUTO) -> str:
    """Replace the layers of a network, in place, by ones of a scheme of SCHEMES; returns the backend that multiplies.

    linear: its name, or "auto". Raises UnsupportedBackendError where it cannot run.
    """
    layers = packable(subject, network, scheme)
    some = next(iter(layers.values())).weight
    op = GGUF if scheme in BLOCKS else microscaled.OPS.get(scheme) or OPS[FORMATS[scheme]]
    backend = registry.select(op, linear, some.device, some.dtype, subject.spec.head_dim)
    for name, layer in layers.items():
        with torch.device("meta"):
            empty = nn.Linear(layer.in_features, layer.out_features, dtype=some.dtype)
        packed = _packed(name, layer.weight, empty, scheme, backend, kernels)
        packed.bias = layer.bias
        network.set_submodule(name, packed)
    return backend.name


def _packed(
    name: str, weight: Tensor, empty: nn.Linear, scheme: str, backend: registry.Backend, kernels: Kernels
) -> ScaledLinear | GgufLinear | MicroscaledLinear:
    """empty: a layer of the same sizes, on the meta device."""
    if scheme in BLOCKS:
        encoding, _, _, quantise = BLOCKS[scheme]
        blocks = quantise(weight)
        stays = GgufLinear(empty, encoding, blocks.numel(), backend.load())
        stays.weight = nn.Parameter(blocks, requires_grad=False)
        return stays
    if scheme in MICROSCALED:
        kept = MicroscaledLinear(empty, scheme, False, backend.load())
        values, kept.weight_scale, *unit = microscaled.quantise(weight, scheme, name)
        kept.weight = nn.Parameter(values, requires_grad=False)
        if unit:
            kept.unit = unit[0]
        return kept
    reads = FORMATS[scheme]
    scaled = ScaledLinear(empty, reads, backend.load(), kernels.quantize)
    values, scaled.weight_scale = quantise_weight(weight, reads, name)
    scaled.weight = nn.Parameter(values, requires_grad=False)
    return scaled
