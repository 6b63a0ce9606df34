"""Start and end images as a model reads them, against diffusers' pipeline and ComfyUI's functions, with a small VAE.

ComfyUI's nodes themselves need its server: tests/host/test_image_nodes.py.
"""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightx2v.frames import cover, fit_frames, whole_clips
from lightx2v.latents import WAN21, WAN22
from lightx2v.models.wan.conditioning import (
    image_condition,
    image_latent,
    to_model_input,
)
from lightx2v.shapes import VideoShape
from lightx2v.vae.layouts import from_diffusers
from lightx2v.vae.stream import encode
from lightx2v.vae.wan import WanVAE
from tiny_clip import picture
from tiny_vae import tiny_vae

BASE = 8
VIDEO = VideoShape(13, 32, 48)
SHAPE = (1, 16, 4, 4, 6)
SAME = 1e-6


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return tiny_vae(BASE).double()


@pytest.fixture(scope="module")
def pipeline(vae):
    """diffusers' image-to-video pipeline, of which nothing but the VAE is there. Float64, where the same formulas give
    the same numbers; float32 has its own test in test_vae_wan.py."""
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline

    peer = AutoencoderKLWan(base_dim=BASE).double().eval().requires_grad_(False)
    weights = vae.state_dict()
    peer.load_state_dict({name: weights[from_diffusers(name)].clone() for name in peer.state_dict()})
    return WanImageToVideoPipeline(tokenizer=None, text_encoder=None, vae=peer, scheduler=None)


def frame(seed: int) -> Tensor:
    return picture(VIDEO.height, VIDEO.width, seed=seed)


def for_diffusers(image: Tensor) -> Tensor:
    """(1, H, W, 3) in [0, 1] -> (1, 3, H, W) in [-1, 1], as its video_processor gives it."""
    return image.movedim(-1, 1) * 2 - 1


@pytest.mark.parametrize("with_end", [False, True], ids=["start", "start and end"])
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_diffusers(vae, pipeline, with_end: bool, batch: int) -> None:
    start, end = frame(1), frame(2) if with_end else None
    _, expected = pipeline.prepare_latents(
        for_diffusers(start),
        batch_size=batch,
        height=VIDEO.height,
        width=VIDEO.width,
        num_frames=VIDEO.num_frames,
        dtype=torch.float32,
        last_image=None if end is None else for_diffusers(end),
    )
    found = image_condition(whole_clips(lambda clip: encode(vae, clip)), VIDEO, WAN21, start=start, end=end)
    assert found.mask.shape == (1, 4, *SHAPE[2:]) and found.latents.shape == SHAPE
    ours = to_model_input(found.latents, found.concat_mask, WAN21, (batch, *SHAPE[1:]))
    assert torch.equal(ours[:, :4], expected[:, :4])
    assert relative(ours, expected) < SAME
    assert torch.equal(1 - found.mask, found.concat_mask.expand(-1, 4, -1, -1, -1))
    assert ours[0, :4].any() and not ours[0, :4].all()


def test_ti2v_equals_diffusers(vae, pipeline) -> None:
    """Its form with `expand_timesteps`; the latent space of the small VAE stands for the 48 channels."""
    pipeline.register_to_config(expand_timesteps=True)
    try:
        _, latents, mask = pipeline.prepare_latents(
            for_diffusers(frame(1)), 1, 16, VIDEO.height, VIDEO.width, VIDEO.num_frames, torch.float32
        )
    finally:
        pipeline.register_to_config(expand_timesteps=False)
    samples, noise_mask = image_latent(whole_clips(lambda clip: encode(vae, clip)), VIDEO, WAN21, frame(1))
    assert noise_mask is not None and torch.equal(noise_mask, mask)
    assert relative(WAN21.normalize(samples)[:, :, :1], latents) < SAME
    torch.testing.assert_close(WAN21.normalize(samples)[:, :, 1:], torch.zeros(1, 16, 3, 4, 6))


@pytest.fixture(scope="module")
def concat_cond(comfy: ModuleType):
    """What ComfyUI's WAN21 puts behind the noise of a 36-channel image-to-video model."""
    base = importlib.import_module("comfy.model_base")
    space = importlib.import_module("comfy.latent_formats").Wan21()
    weight = SimpleNamespace(shape=(64, 36, 1, 2, 2))
    model = SimpleNamespace(
        diffusion_model=SimpleNamespace(patch_embedding=SimpleNamespace(weight=weight)),
        latent_format=space,
        process_latent_in=space.process_in,
        image_to_video=True,
    )

    def call(image: Tensor | None, mask: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        given = {"concat_latent_image": image, "concat_mask": mask}
        given = {name: value.clone() for name, value in given.items() if value is not None}
        return base.WAN21.concat_cond(model, noise=torch.zeros(shape), device="cpu", **given)

    return call


def mask(*shape: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(4)) > 0.5).float()


CASES = {
    "as written by the nodes": ((1, 16, 4, 4, 6), (1, 1, 4, 4, 6)),
    "four channels": ((1, 16, 4, 4, 6), (1, 4, 4, 4, 6)),
    "another size": ((1, 16, 4, 9, 7), (1, 4, 4, 5, 11)),
    "a short mask": ((1, 16, 4, 4, 6), (1, 1, 2, 4, 6)),
    "no mask": ((1, 16, 4, 4, 6), None),
    "no image": (None, (1, 1, 4, 4, 6)),
    "nothing": (None, None),
    "two pictures": ((2, 16, 4, 4, 6), (2, 1, 4, 4, 6)),
    "three pictures": ((3, 16, 4, 4, 6), (1, 1, 4, 4, 6)),
}


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("case", CASES)
def test_equals_comfyui_where_the_sampler_begins(concat_cond, case: str, batch: int) -> None:
    image_shape, mask_shape = CASES[case]
    image = None if image_shape is None else torch.randn(image_shape, generator=torch.Generator().manual_seed(3)) * 2
    given = None if mask_shape is None else mask(*mask_shape)
    shape = (batch, *SHAPE[1:])
    kept = None if image is None else image.clone()
    ours, theirs = to_model_input(image, given, WAN21, shape), concat_cond(image, given, shape)
    assert ours.shape == theirs.shape == (batch, 20, 4, 4, 6)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert image is None or torch.equal(image, kept), "what came in is left as it was"


@pytest.mark.parametrize("size", [(32, 48), (33, 97), (480, 31), (75, 75), (20, 10), (1, 9), (1000, 500)])
@pytest.mark.parametrize("target", [(32, 48), (48, 32), (40, 40), (3, 17)])
def test_pictures_are_fitted_as_in_comfyui(comfy, size, target) -> None:
    utils = importlib.import_module("comfy.utils")
    image = picture(*size, batch=2)
    expected = utils.common_upscale(image.movedim(-1, 1), target[1], target[0], "bilinear", "center")
    assert torch.equal(cover(image.movedim(-1, 1), *target), expected)
    torch.testing.assert_close(fit_frames(image, *target), expected.movedim(0, 1)[None] * 2 - 1)


def test_the_spaces_are_comfyuis(comfy) -> None:
    formats = importlib.import_module("comfy.latent_formats")
    for ours, theirs in ((WAN21, formats.Wan21()), (WAN22, formats.Wan22())):
        raw = torch.randn(1, ours.channels, 2, 3, 4)
        torch.testing.assert_close(ours.normalize(raw), theirs.process_in(raw))
        torch.testing.assert_close(ours.denormalize(raw), theirs.process_out(raw))
