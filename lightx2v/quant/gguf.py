"""GGML's block types as a scheme: which tensors of a GGUF file are packed."""

from collections.abc import Mapping

from torch import Tensor

from lightx2v.checkpoint import Packed, TensorInfo
from lightx2v_kernels.ggml import restore


def recognise(weight: TensorInfo, scale: TensorInfo | None) -> Packed | None:
    """The weight as packed blocks; None for tensors of GGUF files that are plain numbers, and of other files."""
    if not weight.encoding or scale is not None:
        return None
    encoding, shape = weight.encoding, weight.shape

    def unpack(parts: Mapping[str, Tensor]) -> Tensor:
        return restore(parts["weight"], encoding, shape)

    return Packed("gguf", encoding, {"weight": weight}, unpack)
