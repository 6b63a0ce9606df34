"""Whole rows in one pass: one read, one write of 8 bits."""

from lightx2v_kernels.opaque import triton_backend

BACKENDS = (
    triton_backend("quantize", "lightx2v_kernels.quantize._triton"),
    triton_backend("gelu_quantize", "lightx2v_kernels.quantize._triton"),
)
