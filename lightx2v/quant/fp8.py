"""fp8: e4m3 or e5m2 with a scale a tensor or a row, or values that were merely rounded to it."""

import torch

from lightx2v.checkpoint import Packed, TensorInfo
from lightx2v.quant.scale import granularity, unpack

DTYPES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def recognise(weight: TensorInfo, scale: TensorInfo | None) -> Packed | None:
    """The weight as packed fp8; None where it is something else or the scale is not its own."""
    if weight.dtype not in DTYPES:
        return None
    kind = DTYPES[weight.dtype]
    if scale is None:
        return Packed("fp8", f"{kind}, no scale", {"weight": weight}, unpack)
    per = granularity(weight, scale)
    return Packed("fp8", f"{kind}, {per}", {"weight": weight, "scale": scale}, unpack) if per else None
