"""PyTorch's own fused attention: flash, memory-efficient or cuDNN on a GPU, as it sees fit; a tiled kernel on a CPU."""

import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.precision import FLOATS
from lightx2v_kernels.registry import Backend


def torch_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, L, H, D), k and v (B, S, H, D) -> (B, L, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


BACKENDS = (Backend("attention", "torch_sdpa", lambda: torch_sdpa, rank=90, dtypes=FLOATS),)
