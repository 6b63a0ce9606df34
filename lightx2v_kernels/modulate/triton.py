"""Each op in one pass: every tensor of tokens is read or written once."""

from lightx2v_kernels.opaque import triton_backend

BACKENDS = (
    triton_backend("modulate", "lightx2v_kernels.modulate._triton"),
    triton_backend("gated_residual", "lightx2v_kernels.modulate._triton"),
    triton_backend("residual_modulate", "lightx2v_kernels.modulate._triton"),
    triton_backend("residual_layer_norm", "lightx2v_kernels.modulate._triton"),
    triton_backend("modulate_quantize", "lightx2v_kernels.modulate._triton"),
    triton_backend("residual_modulate_quantize", "lightx2v_kernels.modulate._triton"),
    triton_backend("residual_layer_norm_quantize", "lightx2v_kernels.modulate._triton"),
)
