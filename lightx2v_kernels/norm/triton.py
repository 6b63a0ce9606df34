"""Whole rows in one pass: one read, one write."""

from lightx2v_kernels.opaque import triton_backend

BACKENDS = (
    triton_backend("rms_norm", "lightx2v_kernels.norm._triton"),
    triton_backend("layer_norm", "lightx2v_kernels.norm._triton"),
    triton_backend("layer_norm_quantize", "lightx2v_kernels.norm._triton"),
)
