"""Our HunyuanVideo-1.5 VAE against diffusers' and ComfyUI's own, on the CPU, random weights.

In the middle of the network a frame attends to itself and to what was before. In this release of ComfyUI it attends to
what comes after too, so ComfyUI is compared where there is nothing after, on clips of one latent frame, and on whole
clips once its attention is told to look back only. diffusers, which ports the original's mask, does as we do.
"""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from closeness import assert_close, relative_error
from lightx2v.latents import HUNYUAN15
from lightx2v.vae.hunyuan15 import HunyuanVAE, HunyuanVAEConfig, from_diffusers
from lightx2v.vae.stream import decode

WIDTHS = (16, 32, 64, 128, 128)
Peer = tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
FRAMES, HEIGHT, WIDTH = 9, 32, 48


def random(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clip(frames: int = FRAMES, batch: int = 1) -> Tensor:
    return random((batch, 3, frames, HEIGHT, WIDTH)).tanh()  # of several clips diffusers' attention mask takes one only


def latents(frames: int = (FRAMES - 1) // 4 + 1, batch: int = 1) -> Tensor:
    return random((batch, 32, frames, HEIGHT // 16, WIDTH // 16))


@pytest.fixture(scope="module")
def ours() -> HunyuanVAE:
    """In float64, with norms that are not flat and attention that picks."""
    network = HunyuanVAE(HunyuanVAEConfig(WIDTHS)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma"):
            parameter.copy_(1 + 0.3 * noise)
        elif ".attn_1.q" in name or ".attn_1.k" in name:
            parameter.copy_(noise * parameter[0].numel() ** -0.5 * 2)
        else:
            parameter.copy_(noise * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1))
    return network.double()


@pytest.fixture(scope="module")
def diffusers_vae(ours: HunyuanVAE) -> Peer:
    from diffusers import AutoencoderKLHunyuanVideo15

    peer = AutoencoderKLHunyuanVideo15(block_out_channels=WIDTHS).eval().requires_grad_(False).double()
    weights = ours.state_dict()
    peer.load_state_dict({name: weights[from_diffusers(name)].clone() for name in peer.state_dict()})
    return peer, lambda frames: peer.encode(frames).latent_dist.mode(), lambda raw: peer.decode(raw).sample


@pytest.fixture(scope="module")
def comfy_vae(ours: HunyuanVAE, comfy: ModuleType) -> Peer:
    from comfy.ldm.hunyuan_video.vae_refiner import Decoder, Encoder

    sizes = {"z_channels": 32, "block_out_channels": list(WIDTHS), "num_res_blocks": 2}
    sizes |= {"ffactor_spatial": 16, "ffactor_temporal": 4}
    peer = nn.Module()
    peer.encoder, peer.decoder = Encoder(in_channels=3, **sizes), Decoder(out_channels=3, **sizes)
    peer.eval().requires_grad_(False).double()
    peer.load_state_dict(ours.state_dict())
    return peer, peer.encoder, peer.decoder


def test_the_same_maths_as_diffusers(ours: HunyuanVAE, diffusers_vae: Peer) -> None:
    _, peer_encode, peer_decode = diffusers_vae
    mean, _ = ours.posterior(clip())
    assert (mean[:, :, 1:] - mean[:, :, :-1]).std() > 0.1 * mean.std(), "latents should differ over time"
    assert relative_error(mean, peer_encode(clip())) < 1e-12
    assert relative_error(ours.reconstruct(latents()), peer_decode(latents())) < 1e-12


def test_posterior_variance(ours: HunyuanVAE, diffusers_vae: Peer) -> None:
    network, *_ = diffusers_vae
    _, log_variance = ours.posterior(clip())
    assert relative_error(log_variance, network.encode(clip()).latent_dist.parameters[:, 32:]) < 1e-12


def test_the_same_maths_as_comfyui(ours: HunyuanVAE, comfy_vae: Peer) -> None:
    _, peer_encode, peer_decode = comfy_vae
    assert relative_error(ours.to_latents(clip(1)), peer_encode(clip(1))) < 1e-12
    assert relative_error(ours.reconstruct(latents(1)), peer_decode(latents(1))) < 1e-12


def test_comfyui_differs_where_the_middle_looks_ahead(
    ours: HunyuanVAE, comfy_vae: Peer, diffusers_vae: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to look at the past only, it agrees on whole clips too; until then the peers are far from each other."""
    network, peer_encode, peer_decode = comfy_vae
    assert relative_error(peer_decode(latents()), diffusers_vae[2](latents())) > 1e-3

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frame, size = q.shape[3] * q.shape[4], q.shape
        q, k, v = (x.flatten(2).transpose(1, 2) for x in (q, k, v))
        at = torch.arange(q.shape[1]) // frame
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=at[None] <= at[:, None])
        return y.transpose(1, 2).reshape(size)

    for half in (network.encoder, network.decoder):
        monkeypatch.setattr(half.mid.attn_1, "optimized_attention", causal)
    assert relative_error(ours.to_latents(clip()), peer_encode(clip())) < 1e-12
    assert relative_error(ours.reconstruct(latents()), peer_decode(latents())) < 1e-12


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunk_by_chunk_is_the_whole_clip(ours: HunyuanVAE, chunk: int) -> None:
    frames, raw = clip(13), latents(4)
    whole = ours.reconstruct(raw)
    out = torch.empty_like(whole)
    decode(ours, raw, chunk=chunk, out=out, clamp=False)
    assert relative_error(out, whole) < 1e-12
    state: dict[nn.Module, Tensor] = {}
    cuts = [(0, 1)] + [(i, min(i + 4 * chunk, 13)) for i in range(1, 13, 4 * chunk)]
    parts = [ours.to_latents(frames[:, :, a:b], state) for a, b in cuts]
    assert relative_error(torch.cat(parts, 2), ours.to_latents(frames)) < 1e-12


def test_clips_of_a_batch_do_not_meet(ours: HunyuanVAE) -> None:
    frames, raw = clip(5, batch=2), latents(2, batch=2)
    assert relative_error(ours.to_latents(frames)[1:], ours.to_latents(frames[1:])) < 1e-12
    assert relative_error(ours.reconstruct(raw)[1:], ours.reconstruct(raw[1:])) < 1e-12


def test_as_exact_in_float32(ours: HunyuanVAE, diffusers_vae: Peer) -> None:
    network, peer_encode, peer_decode = diffusers_vae
    true_encoded, true_decoded = peer_encode(clip()), peer_decode(latents())
    frames, raw = clip().float(), latents().float()
    try:
        ours.float(), network.float()
        assert_close("encode", ours.to_latents(frames), true_encoded, peer_encode(frames))
        assert_close("decode", ours.reconstruct(raw), true_decoded, peer_decode(raw))
    finally:
        ours.double(), network.double()


def test_latent_statistics(comfy: ModuleType) -> None:
    import comfy.latent_formats

    theirs = comfy.latent_formats.HunyuanVideo15()
    raw = torch.randn(1, 32, 2, 3, 4)
    assert relative_error(HUNYUAN15.normalize(raw), theirs.process_in(raw)) < 1e-6
    assert relative_error(HUNYUAN15.denormalize(raw), theirs.process_out(raw)) < 1e-6
