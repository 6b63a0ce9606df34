"""Our Wan2.2 VAE against diffusers' and ComfyUI's own, on the CPU with random weights.

The rules are those of test_vae_wan.py: float64 for the maths, and in float32 at most twice as wrong as the peer.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from closeness import assert_close, relative_error
from lightx2v.latents import WAN21, WAN22, LatentFormat
from lightx2v.vae.layouts import from_diffusers22
from lightx2v.vae.stream import decode, encode
from lightx2v.vae.wan22 import Wan22VAE
from tiny_vae import tiny_vae22

ENCODER, DECODER = 8, 12
SAME_MATHS = 1e-12
SAME_BUT_FOR_FLOAT32 = 1e-7  # diffusers' upsampling goes through float32 whatever the network's dtype
Peer = tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # and its encode and decode


def clip(dtype: torch.dtype) -> Tensor:
    """Two clips of 13 frames, higher than wide."""
    return torch.rand(2, 3, 13, 80, 48, generator=torch.Generator().manual_seed(1)).to(dtype) * 2 - 1


def latents(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 48, 4, 5, 3, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.fixture(scope="module")
def ours() -> Wan22VAE:
    return tiny_vae22(ENCODER, DECODER)


@pytest.fixture(scope="module")
def diffusers_vae(ours: Wan22VAE) -> Peer:
    from diffusers import AutoencoderKLWan

    # The figures that differ from Wan2.1's in vae/config.json of the published TI2V-5B.
    patches = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    widths = {"base_dim": ENCODER, "decoder_base_dim": DECODER, "z_dim": 48, "is_residual": True}
    peer = AutoencoderKLWan(**widths, **patches).eval().requires_grad_(False)
    weights = ours.state_dict()
    peer.load_state_dict({name: weights[from_diffusers22(name)].clone() for name in peer.state_dict()})
    return peer, lambda frames: peer.encode(frames).latent_dist.mode(), lambda raw: peer.decode(raw).sample


@pytest.fixture(scope="module")
def comfy_vae(ours: Wan22VAE, comfy: ModuleType) -> Peer:
    from comfy.ldm.wan.vae2_2 import WanVAE as ComfyWanVAE

    widths = {"dim": ENCODER, "dec_dim": DECODER, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    peer = ComfyWanVAE(**widths, attn_scales=[], temperal_downsample=[False, True, True], dropout=0.0)
    peer.eval().requires_grad_(False)
    peer.load_state_dict({name: tensor.clone() for name, tensor in ours.state_dict().items()})
    return peer, peer.encode, lambda raw: peer.decode(raw).clamp(-1, 1)


@pytest.fixture(params=["diffusers_vae", "comfy_vae"])
def peer(request: pytest.FixtureRequest) -> Peer:
    return request.getfixturevalue(request.param)


def test_the_same_maths(ours: Wan22VAE, peer: Peer) -> None:
    network, peer_encode, peer_decode = peer
    frames, raw = clip(torch.float64), latents(torch.float64)
    out = torch.empty(2, 3, 13, 80, 48, dtype=torch.float64)
    try:
        ours.double(), network.double()
        theirs_encoded, theirs_decoded = peer_encode(frames), peer_decode(raw)
        encoded, _ = ours.posterior(frames)
        decode(ours, raw, out=out)
    finally:
        ours.float(), network.float()
    assert 0.02 < out.abs().eq(1).double().mean() < 0.7, "the clamp should be at work, and not everywhere"
    assert (encoded[:, :, 1:] - encoded[:, :, :-1]).std() > 0.1 * encoded.std(), "latents should differ over time"
    assert relative_error(encoded, theirs_encoded) < SAME_MATHS
    is_comfy = type(network).__name__ == "WanVAE"
    assert relative_error(out, theirs_decoded) < (SAME_MATHS if is_comfy else SAME_BUT_FOR_FLOAT32)


def test_as_exact_in_float32(ours: Wan22VAE, peer: Peer) -> None:
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
def test_clip_lengths(ours: Wan22VAE, comfy_vae: Peer, frames: int) -> None:
    _, peer_encode, peer_decode = comfy_vae
    pixels = torch.rand(1, 3, frames, 32, 48) * 2 - 1
    raw = torch.randn(1, 48, (frames - 1) // 4 + 1, 2, 3)
    assert relative_error(encode(ours, pixels), peer_encode(pixels)) < 5e-6
    assert relative_error(decode(ours, raw), peer_decode(raw)) < 5e-6


def test_posterior_variance(ours: Wan22VAE, diffusers_vae: Peer) -> None:
    network, _, _ = diffusers_vae
    try:
        ours.double(), network.double()
        _, log_variance = ours.posterior(clip(torch.float64))
        theirs = network.encode(clip(torch.float64)).latent_dist.parameters[:, 48:]
    finally:
        ours.float(), network.float()
    assert relative_error(log_variance, theirs) < SAME_MATHS


@pytest.mark.parametrize(("space", "name"), [(WAN21, "Wan21"), (WAN22, "Wan22")])
def test_latent_statistics(comfy: ModuleType, space: LatentFormat, name: str) -> None:
    import comfy.latent_formats

    theirs = getattr(comfy.latent_formats, name)()
    raw = torch.randn(1, space.channels, 2, 3, 4)
    assert relative_error(space.normalize(raw), theirs.process_in(raw)) < 1e-6
    assert relative_error(space.denormalize(raw), theirs.process_out(raw)) < 1e-6
