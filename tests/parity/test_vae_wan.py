"""Our Wan2.1 and Wan2.2 VAEs against diffusers' and ComfyUI's own, on the CPU with random weights.

Float64 tells whether the maths is the same: there no wrong order of frames, channels or padding can hide in rounding.
Float32 is what runs; through some 40 layers its rounding grows to about 1e-6 (measured on such a network, to float64:
diffusers and ComfyUI 1.1e-6, ours 1.2e-6; diffusers to ComfyUI 1.0e-6), so we may be at most twice as wrong as they.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from closeness import assert_close, relative_error
from lightx2v.latents import WAN21, WAN22, LatentFormat
from lightx2v.vae.layouts import from_diffusers, from_diffusers22
from lightx2v.vae.loading import FullVAE
from lightx2v.vae.stream import decode, encode
from tiny_vae import tiny_vae, tiny_vae22

WIDTH, DECODER_WIDTH = 8, 12  # the Wan2.1 VAE has one width
SAME_MATHS = 1e-12
SAME_BUT_FOR_FLOAT32 = 1e-7  # diffusers' upsampling goes through float32 whatever the network's dtype
Peer = tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # and its encode and decode


@dataclass(frozen=True)
class Case:
    """One VAE, how wide its layers are, and how wide latents of real clips."""

    network: FullVAE
    spread: float
    width: int = WIDTH

    @property
    def space(self) -> LatentFormat:
        return self.network.space

    def clip(self, dtype: torch.dtype, frames: int = 13, rows: int = 5, columns: int = 3, batch: int = 2) -> Tensor:
        """Clips of so many latent rows and columns, higher than wide."""
        generator = torch.Generator().manual_seed(1)
        shape = (batch, 3, frames, rows * self.space.stride[1], columns * self.space.stride[2])
        return torch.rand(shape, generator=generator).to(dtype) * 2 - 1

    def latents(self, dtype: torch.dtype, t: int = 4, rows: int = 5, columns: int = 3, batch: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return torch.randn(batch, self.space.channels, t, rows, columns, generator=generator).to(dtype) * self.spread


@pytest.fixture(scope="module", params=["2.1", "2.2"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(tiny_vae(WIDTH), 2.0) if request.param == "2.1" else Case(tiny_vae22(WIDTH, DECODER_WIDTH), 1.0)


@pytest.fixture(scope="module")
def diffusers_vae(case: Case) -> Peer:
    return diffusers_peer(case)


def diffusers_peer(case: Case) -> Peer:
    from diffusers import AutoencoderKLWan

    arguments: dict[str, object] = {"base_dim": case.width}
    if case.space == WAN22:  # the figures that differ from Wan2.1's in vae/config.json of the published TI2V-5B
        arguments |= {"decoder_base_dim": DECODER_WIDTH, "z_dim": 48, "is_residual": True, "in_channels": 12}
        arguments |= {"out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    peer = AutoencoderKLWan(**arguments).eval().requires_grad_(False)
    weights, original = case.network.state_dict(), from_diffusers22 if case.space == WAN22 else from_diffusers
    peer.load_state_dict({name: weights[original(name)].clone() for name in peer.state_dict()})
    return peer, lambda frames: peer.encode(frames).latent_dist.mode(), lambda raw: peer.decode(raw).sample


@pytest.fixture(scope="module")
def comfy_vae(case: Case, comfy: ModuleType) -> Peer:
    return comfy_peer(case)


def comfy_peer(case: Case) -> Peer:
    import comfy.ldm.wan.vae
    import comfy.ldm.wan.vae2_2

    arguments: dict[str, object] = {"dim": case.width, "z_dim": case.space.channels, "dim_mult": [1, 2, 4, 4]}
    arguments |= {"num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0}
    if case.space == WAN22:
        peer = comfy.ldm.wan.vae2_2.WanVAE(**arguments, dec_dim=DECODER_WIDTH)
    else:
        peer = comfy.ldm.wan.vae.WanVAE(**arguments)
    peer.eval().requires_grad_(False)
    peer.load_state_dict({name: tensor.clone() for name, tensor in case.network.state_dict().items()})
    return peer, peer.encode, lambda raw: peer.decode(raw).clamp(-1, 1)


@pytest.fixture(params=["diffusers_vae", "comfy_vae"])
def peer(request: pytest.FixtureRequest) -> Peer:
    return request.getfixturevalue(request.param)


def test_the_same_maths(case: Case, peer: Peer) -> None:
    (network, peer_encode, peer_decode), ours = peer, case.network
    frames, raw = case.clip(torch.float64), case.latents(torch.float64)
    out = torch.empty_like(frames)
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


def test_as_exact_in_float32(case: Case, peer: Peer) -> None:
    network, peer_encode, peer_decode = peer
    try:
        network.double()
        true_encoded, true_decoded = peer_encode(case.clip(torch.float64)), peer_decode(case.latents(torch.float64))
    finally:
        network.float()
    frames, raw = case.clip(torch.float32), case.latents(torch.float32)
    assert_close("encode", encode(case.network, frames), true_encoded, peer_encode(frames))
    assert_close("decode", decode(case.network, raw), true_decoded, peer_decode(raw))


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_clip_lengths(case: Case, comfy_vae: Peer, frames: int) -> None:
    _, peer_encode, peer_decode = comfy_vae
    pixels = case.clip(torch.float32, frames, 2, 3, batch=1)
    raw = case.latents(torch.float32, (frames - 1) // 4 + 1, 2, 3, batch=1)
    assert relative_error(encode(case.network, pixels), peer_encode(pixels)) < 5e-6
    assert relative_error(decode(case.network, raw), peer_decode(raw)) < 5e-6


@pytest.mark.parametrize("make", [diffusers_peer, comfy_peer])
def test_lightvae(comfy: ModuleType, make: Callable[[Case], Peer]) -> None:
    """A quarter of Wan2.1's widths; that the published file has them is held in engine/test_vae_files.py."""
    case = Case(tiny_vae(24), 2.0, 24)
    network, peer_encode, peer_decode = make(case)
    pixels, raw = case.clip(torch.float64, 5, 2, 3, batch=1), case.latents(torch.float64, 2, 2, 3, batch=1)
    try:
        case.network.double(), network.double()
        truth = peer_encode(pixels), peer_decode(raw)
        made = case.network.posterior(pixels)[0], case.network.reconstruct(raw).clamp(-1, 1)
    finally:
        case.network.float(), network.float()
    assert relative_error(made[0], truth[0]) < SAME_MATHS
    assert relative_error(made[1], truth[1]) < (SAME_MATHS if make is comfy_peer else SAME_BUT_FOR_FLOAT32)
    assert_close("encode", encode(case.network, pixels.float()), truth[0], peer_encode(pixels.float()))
    assert_close("decode", decode(case.network, raw.float()), truth[1], peer_decode(raw.float()))


def test_posterior_variance(case: Case, diffusers_vae: Peer) -> None:
    (network, _, _), ours = diffusers_vae, case.network
    try:
        ours.double(), network.double()
        _, log_variance = ours.posterior(case.clip(torch.float64))
        parameters = network.encode(case.clip(torch.float64)).latent_dist.parameters
    finally:
        ours.float(), network.float()
    assert relative_error(log_variance, parameters[:, case.space.channels :]) < SAME_MATHS


@pytest.mark.parametrize(("space", "name"), [(WAN21, "Wan21"), (WAN22, "Wan22")])
def test_latent_statistics(comfy: ModuleType, space: LatentFormat, name: str) -> None:
    import comfy.latent_formats

    theirs = getattr(comfy.latent_formats, name)()
    raw = torch.randn(1, space.channels, 2, 3, 4)
    assert relative_error(space.normalize(raw), theirs.process_in(raw)) < 1e-6
    assert relative_error(space.denormalize(raw), theirs.process_out(raw)) < 1e-6
