"""int8: symmetric, a scale a row (LightX2V's tools/convert) or a tensor."""

import torch

from lightx2v.checkpoint import Packed, TensorInfo
from lightx2v.quant.scale import granularity, unpack


def recognise(weight: TensorInfo, scale: TensorInfo | None) -> Packed | None:
    """The weight as packed int8; None where it is something else, or has no scale of its own."""
    if weight.dtype != torch.int8 or scale is None:
        return None
    per = granularity(weight, scale)
    return Packed("int8", per, {"weight": weight, "scale": scale}, unpack) if per else None
