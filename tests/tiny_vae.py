"""A narrow Wan2.1 VAE for tests, with weights in which every term shows."""

from __future__ import annotations

import torch

from lightx2v.vae.wan import WanVAE, WanVAEConfig


def tiny_vae(base_channels: int = 8, *, seed: int = 0) -> WanVAE:
    """Random weights: gains far from 1, biases far from 0 and attention far from flat; 0.9 M parameters at width 8."""
    vae = WanVAE(WanVAEConfig(base_channels)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma"):
            parameter.copy_(1 + 0.3 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_(noise * parameter[0].numel() ** -0.5 * (2 if "to_qkv" in name else 1))
    return vae
