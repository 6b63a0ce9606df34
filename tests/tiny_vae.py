"""Narrow VAEs for tests, with weights in which every term shows."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from lightx2v.vae.hunyuan15 import HunyuanVAE, HunyuanVAEConfig
from lightx2v.vae.tae import Remember, TAEConfig, TinyVAE
from lightx2v.vae.wan import WanVAE, WanVAEConfig
from lightx2v.vae.wan22 import Wan22VAE, Wan22VAEConfig

Network = TypeVar("Network", bound=nn.Module)


def tiny_vae(base_channels: int = 8, *, seed: int = 0) -> WanVAE:
    """A Wan2.1 VAE; 0.9 M parameters at width 8."""
    return randomised(WanVAE(WanVAEConfig(base_channels)), seed)


def tiny_vae22(encoder_channels: int = 8, decoder_channels: int = 12, *, seed: int = 0) -> Wan22VAE:
    """A Wan2.2 VAE; 1.8 M parameters at these widths."""
    return randomised(Wan22VAE(Wan22VAEConfig(encoder_channels, decoder_channels)), seed)


def tiny_vae15(widths: tuple[int, int, int, int, int] = (16, 32, 64, 128, 128), *, seed: int = 0) -> HunyuanVAE:
    """A HunyuanVideo-1.5 VAE; 20 M parameters at these widths."""
    vae = randomised(HunyuanVAE(HunyuanVAEConfig(widths)), seed)
    for parameter in vae.parameters():  # the memory order of loaded weights: a convolution's last bits depend on it
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def tiny_tae(kind: str = "taew2_1", widths: tuple[int, int, int, int] = (256, 128, 64, 64), seed: int = 0) -> TinyVAE:
    """A tiny autoencoder; 11 M parameters at the published widths."""
    vae = randomised(TinyVAE(TAEConfig(kind, widths)), seed)
    for module in vae.modules():
        if isinstance(module, Remember):
            module.conv[-1].weight.mul_(0.3)  # branches of equal size all the way down would only add up rounding
    return vae


def randomised(vae: Network, seed: int) -> Network:
    """Random weights: gains far from 1, biases far from 0 and attention far from flat."""
    vae.eval().requires_grad_(False)
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
