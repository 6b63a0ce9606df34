"""The linear layers of a network's blocks in 8 bits, made from its own weights."""

import torch
from torch import nn

from lightx2v.bench.subjects import Subject
from lightx2v.quant.linear import ScaledLinear
from lightx2v.quant.packing import FORMATS, OPS, quantise_weight
from lightx2v_kernels import Kernels, registry

SCHEMES = tuple(FORMATS)


def packable(subject: Subject, network: nn.Module) -> dict[str, nn.Linear]:
    """The layers that may multiply in 8 bits, by name."""
    found = ((name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear))
    return {name: linear for name, linear in found if subject.spec.quantises(name)}


def packed_bytes(subject: Subject, network: nn.Module) -> int:
    """What the packed layers take: a byte a weight."""
    return sum(linear.weight.numel() for linear in packable(subject, network).values())


def pack(subject: Subject, network: nn.Module, scheme: str, kernels: Kernels, linear: str = registry.AUTO) -> str:
    """Replace the layers of a network, in place, by ones of a scheme of SCHEMES; returns the backend that multiplies.

    linear: its name, or "auto". Raises UnsupportedBackendError where it cannot run.
    """
    reads = FORMATS[scheme]
    layers = packable(subject, network)
    some = next(iter(layers.values())).weight
    backend = registry.select(OPS[reads], linear, some.device, some.dtype, subject.spec.head_dim)
    for name, layer in layers.items():
        with torch.device("meta"):
            empty = nn.Linear(layer.in_features, layer.out_features, dtype=some.dtype)
        packed = ScaledLinear(empty, reads, backend.load(), kernels.quantize)
        values, packed.weight_scale = quantise_weight(layer.weight, reads, name)
        packed.weight = nn.Parameter(values, requires_grad=False)
        packed.bias = layer.bias
        network.set_submodule(name, packed)
    return backend.name
