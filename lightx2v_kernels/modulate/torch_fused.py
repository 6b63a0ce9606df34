"""The residual in one addition and PyTorch's own layer norm at the dtype of the tokens: what a CPU runs."""

from torch import Tensor

from lightx2v_kernels.modulate.reference import residual
from lightx2v_kernels.norm.torch_fused import layer_norm
from lightx2v_kernels.precision import FLOATS
from lightx2v_kernels.registry import Backend


def residual_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x and y (B, L, D), gate (B, 1 | L, D) fp32, weight and bias (D,) -> x + y * gate, and that normed."""
    x = residual(x, y, gate)
    return x, layer_norm(x, weight, bias, eps)


BACKENDS = (Backend("residual_layer_norm", "torch_fused", lambda: residual_layer_norm, rank=500, dtypes=FLOATS),)
