"""Our tiny autoencoders against ComfyUI's TAEHV, on the CPU with random weights at the published widths."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from closeness import relative_error
from lightx2v.latents import WAN21, WAN22
from lightx2v.vae.stream import decode, encode
from lightx2v.vae.tae import KINDS, TinyVAE
from tiny_vae import tiny_tae

SAME = 1e-6
SAME_MATHS = 1e-12
DECODED = [("taew2_1", "Wan21"), ("lighttaew2_1", None), ("taew2_2", "Wan22"), ("lighttaew2_2", None)]


def peer_of(ours: TinyVAE, latent_format: str | None) -> nn.Module:
    """ComfyUI's network with the same weights."""
    import comfy.latent_formats
    from comfy.taesd.taehv import TAEHV

    known = None if latent_format is None else getattr(comfy.latent_formats, latent_format)
    peer = TAEHV(ours.space.channels, latent_format=known, show_progress_bar=False)
    peer.load_state_dict({name: tensor.clone() for name, tensor in ours.state_dict().items()})
    return peer.eval().requires_grad_(False)


def latents(channels: int, frames: int = 4) -> Tensor:
    """Raw latents of two clips, wide enough for the soft clamp to show."""
    return 2 * torch.randn(2, channels, frames, 3, 5, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("kind", "latent_format"), DECODED)
def test_decode(comfy: ModuleType, kind: str, latent_format: str | None) -> None:
    ours = tiny_tae(kind)
    raw = latents(ours.space.channels)
    theirs = peer_of(ours, latent_format).decode(raw) * 2 - 1
    made = decode(ours, raw, clamp=False)
    assert made.shape == theirs.shape == (2, 3, 13, *(ours.space.stride[1] * side for side in (3, 5)))
    assert (theirs[:, :, 1:] - theirs[:, :, :-1]).std() > 0.1 * theirs.std(), "frames should differ over time"
    assert relative_error(made, theirs) < SAME


# ComfyUI takes every file of 32 channels for lighttaehy1_5, and normalises latents for it; its makers do not.
@pytest.mark.parametrize("kind", ["lighttaew2_1", "lighttaew2_2", "lighttaehy1_5"])
def test_the_same_maths(comfy: ModuleType, kind: str) -> None:
    ours = tiny_tae(kind).double()
    raw = latents(ours.space.channels).double()
    theirs = peer_of(ours, None).double().decode(raw)
    made = torch.empty(theirs.shape, dtype=torch.float64)
    decode(ours, raw, clamp=False, out=made)
    assert relative_error(made, theirs if KINDS[kind].signed else theirs * 2 - 1) < SAME_MATHS


@pytest.mark.parametrize(("kind", "latent_format"), [("taew2_1", "Wan21"), ("lighttaew2_1", None)])
def test_encode(comfy: ModuleType, kind: str, latent_format: str | None) -> None:
    ours = tiny_tae(kind)
    pixels = torch.rand(2, 3, 13, 24, 40, generator=torch.Generator().manual_seed(1))
    theirs = peer_of(ours, latent_format).encode(pixels)
    assert relative_error(encode(ours, pixels * 2 - 1), theirs) < SAME


def test_encode_patches(comfy: ModuleType) -> None:
    """ComfyUI does not encode with files of patches, so its layers are handed patches of ours."""
    from comfy.taesd.taehv import apply_model_with_memblocks

    ours = tiny_tae("taew2_2")
    pixels = torch.rand(1, 3, 5, 32, 48, generator=torch.Generator().manual_seed(1))
    clip = F.pixel_unshuffle(torch.cat([pixels, pixels[:, :, -1:].repeat(1, 1, 3, 1, 1)], 2).movedim(2, 1), 2)
    theirs = apply_model_with_memblocks(peer_of(ours, None).encoder, clip, True, False).movedim(2, 1)
    assert relative_error(encode(ours, pixels * 2 - 1), WAN22.denormalize(theirs)) < SAME


def test_an_image(comfy: ModuleType) -> None:
    ours = tiny_tae("taew2_1")
    raw = latents(WAN21.channels, frames=1)
    theirs = peer_of(ours, "Wan21").decode(raw) * 2 - 1
    assert theirs.shape[2] == 1 and relative_error(decode(ours, raw, clamp=False), theirs) < SAME
