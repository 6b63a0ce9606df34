"""Our Wan2.1 VAE against diffusers' and ComfyUI's own, on the CPU with random weights.

Float64 tells whether the maths is the same: there no wrong order of frames, channels or padding can hide in rounding.
Float32 is what runs; through some 40 layers its rounding grows to about 1e-6 (measured on such a network, to float64:
diffusers and ComfyUI 1.1e-6, ours 1.2e-6; diffusers to ComfyUI 1.0e-6), so we may be at most twice as wrong as they.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from closeness import assert_close, relative_error
from lightx2v.vae.layouts import from_diffusers
from lightx2v.vae.wan import WanVAE, decode, encode
from tiny_vae import tiny_vae

BASE = 8
SAME_MATHS = 1e-12
SAME_BUT_FOR_FLOAT32 = 1e-7  # diffusers' upsampling goes through float32 whatever the network's dtype
Peer = tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # and its encode and decode


def clip(dtype: torch.dtype) -> Tensor:
    """Two clips of 13 frames, higher than wide."""
    return torch.rand(2, 3, 13, 40, 24, generator=torch.Generator().manual_seed(1)).to(dtype) * 2 - 1


def latents(dtype: torch.dtype) -> Tensor:
    """As wide as raw latents of real clips: a standard deviation of 2."""
    return torch.randn(2, 16, 4, 5, 3, generator=torch.Generator().manual_seed(2)).to(dtype) * 2


@pytest.fixture(scope="module")
def ours() -> WanVAE:
    return tiny_vae(BASE)


@pytest.fixture(scope="module")
def diffusers_vae(ours: WanVAE) -> Peer:
    from diffusers import AutoencoderKLWan

    peer = AutoencoderKLWan(base_dim=BASE).eval().requires_grad_(False)
    weights = ours.state_dict()
    peer.load_state_dict({name: weights[from_diffusers(name)].clone() for name in peer.state_dict()})
    return peer, lambda frames: peer.encode(frames).latent_dist.mode(), lambda raw: peer.decode(raw).sample


@pytest.fixture(scope="module")
def comfy_vae(ours: WanVAE, comfy: ModuleType) -> Peer:
    from comfy.ldm.wan.vae import WanVAE as ComfyWanVAE

    widths = {"dim": BASE, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
    peer = ComfyWanVAE(**widths, temperal_downsample=[False, True, True], dropout=0.0).eval().requires_grad_(False)
    peer.load_state_dict({name: tensor.clone() for name, tensor in ours.state_dict().items()})
    return peer, peer.encode, lambda raw: peer.decode(raw).clamp(-1, 1)


@pytest.fixture(params=["diffusers_vae", "comfy_vae"])
def peer(request: pytest.FixtureRequest) -> Peer:
    return request.getfixturevalue(request.param)


def test_the_same_maths(ours: WanVAE, peer: Peer) -> None:
    network, peer_encode, peer_decode = peer
    frames, raw = clip(torch.float64), latents(torch.float64)
    out = torch.empty(2, 3, 13, 40, 24, dtype=torch.float64)
    try:
        ours.double(), network.double()
        theirs_encoded, theirs_decoded = peer_encode(frames), peer_decode(raw)
        encoded, _ = ours.posterior(frames)
        decode(ours, raw, out=out)
    finally:
        ours.float(), network.float()
    assert 0.05 < out.abs().eq(1).double().mean() < 0.5, "the clamp should be at work, and not everywhere"
    assert (encoded[:, :, 1:] - encoded[:, :, :-1]).std() > 0.1 * encoded.std(), "latents should differ over time"
    assert relative_error(encoded, theirs_encoded) < SAME_MATHS
    is_comfy = type(network).__name__ == "WanVAE"
    assert relative_error(out, theirs_decoded) < (SAME_MATHS if is_comfy else SAME_BUT_FOR_FLOAT32)


def test_as_exact_in_float32(ours: WanVAE, peer: Peer) -> None:
    network, peer_encode, peer_decode = peer
    try:
        network.double()
        true_encoded, true_decoded = peer_encode(clip(torch.float64)), peer_decode(latents(torch.float64))
    finally:
        network.float()
    frames, raw = clip(torch.float32), latents(torch.float32)
    assert_close("encode", encode(ours, frames), true_encoded, peer_encode(frames))
    assert_close("decode", decode(ours, raw), true_decoded, peer_decode(raw))


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_clip_lengths(ours: WanVAE, comfy_vae: Peer, frames: int) -> None:
    _, peer_encode, peer_decode = comfy_vae
    pixels = torch.rand(1, 3, frames, 16, 24) * 2 - 1
    raw = torch.randn(1, 16, (frames - 1) // 4 + 1, 2, 3)
    assert relative_error(encode(ours, pixels), peer_encode(pixels)) < 5e-6
    assert relative_error(decode(ours, raw), peer_decode(raw)) < 5e-6


def test_posterior_variance(ours: WanVAE, diffusers_vae: Peer) -> None:
    network, _, _ = diffusers_vae
    try:
        ours.double(), network.double()
        _, log_variance = ours.posterior(clip(torch.float64))
        theirs = network.encode(clip(torch.float64)).latent_dist.parameters[:, 16:]
    finally:
        ours.float(), network.float()
    assert relative_error(log_variance, theirs) < SAME_MATHS
