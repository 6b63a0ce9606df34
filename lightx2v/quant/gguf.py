"""GGML's block types, restored by the `gguf` package's own arithmetic."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightx2v.checkpoint import Packed, TensorInfo


def recognise(weight: TensorInfo, scale: TensorInfo | None) -> Packed | None:
    """The weight as packed blocks; None for tensors of GGUF files that are plain numbers, and of other files."""
    if not weight.encoding or scale is not None:
        return None
    encoding, shape = weight.encoding, weight.shape

    def unpack(parts: Mapping[str, Tensor]) -> Tensor:
        return dequantise(parts["weight"], encoding, shape)

    return Packed("gguf", encoding, {"weight": weight}, unpack)


def dequantise(raw: Tensor, encoding: str, shape: tuple[int, ...]) -> Tensor:
    """All bytes of a tensor (n,) uint8, in blocks of GGML's type `encoding` -> its values (*shape), float32.

    Runs on the CPU, where the package's arithmetic is; the result is on the device of `raw`.
    """
    # Here and not at the top: only GGUF files need the package, and it imports numpy's and more.
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks = raw.cpu().numpy().reshape(*shape[:-1], -1)
    values = dequantize(blocks, GGMLQuantizationType[encoding])
    return torch.from_numpy(values).view(shape).to(raw.device)
