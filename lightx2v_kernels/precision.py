"""Which dtypes tokens may have, and the one in which an op computes."""

import torch
from torch import Tensor

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})


def widen(x: Tensor) -> Tensor:
    """x in fp32, or untouched if it is fp32 or fp64 already. A reference on fp64 is the truth that fp32 is held to."""
    return x if x.dtype == torch.float64 else x.float()
