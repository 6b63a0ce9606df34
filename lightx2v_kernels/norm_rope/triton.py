"""Whole tokens in one pass: one read, one write."""

from lightx2v_kernels.opaque import triton_backend

BACKENDS = (triton_backend("norm_rope", "lightx2v_kernels.norm_rope._triton"),)
