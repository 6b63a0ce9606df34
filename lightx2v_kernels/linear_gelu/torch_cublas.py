"""cuBLAS' product, whose last step adds the bias and takes GELU before anything is written.

`torch._addmm_activation` is what PyTorch's own nn.TransformerEncoderLayer calls. It has no gradient, and the self-test
holds that it computes the tanh form here: on a CPU it does not.
"""

import torch
from torch import Tensor

from lightx2v_kernels.linear_gelu import torch_steps
from lightx2v_kernels.precision import FLOATS
from lightx2v_kernels.registry import Backend


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N) in the dtype of x."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return torch_steps.linear_gelu(x, weight, bias)
    y = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return y.view(*x.shape[:-1], -1)


BACKENDS = (
    Backend("linear_gelu", "torch_cublas", lambda: linear_gelu, rank=300, devices=frozenset({"cuda"}), dtypes=FLOATS),
)
