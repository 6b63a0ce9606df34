"""Numbers times a scale: what the 8-bit schemes share."""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from lightx2v.checkpoint import TensorInfo

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def granularity(weight: TensorInfo, scale: TensorInfo) -> str | None:
    """What one number of the scale stands for, in words; None for scales that are not for this weight."""
    if scale.dtype not in FLOATS:
        return None
    if prod(scale.shape) == 1:
        return "a scale a tensor"
    if len(weight.shape) == 2 and scale.shape in ((weight.shape[0], 1), (weight.shape[0],)):
        return "a scale a row"
    return None


def unpack(parts: Mapping[str, Tensor]) -> Tensor:
    """weight (out, in) times scale (one number, (out,) or (out, 1)) -> float32; a weight without scale as it is."""
    weight = parts["weight"].float()
    if "scale" not in parts:
        return weight
    scale = parts["scale"].float()
    return weight.mul_(scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1))
