"""Previews: latents to colours, frames to a picture that loops, and the colours that a checkpoint may bring."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from lightx2v.bench.subjects import subject
from lightx2v.checkpoint import CheckpointError, Header
from lightx2v.preview import COLOURS_KEY, Colours, LoopingPicture, latent_to_rgb, read_colours, tiny_to_rgb
from lightx2v.vae.stream import decode
from lightx2v.vae.tae import TinyVAE
from tiny_vae import tiny_tae

RED_IS_FIRST = Colours([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [0, 0, -1])


def test_latents_become_the_colours_they_stand_for() -> None:
    x0 = torch.zeros(2, 3, 4, 5, 6)
    x0[0, 0] = 1.0
    x0[0, 1] = -3.0  # beyond the range
    frames = latent_to_rgb(x0, RED_IS_FIRST)
    assert frames.shape == (4, 5, 6, 3)
    assert frames.unique(dim=0).shape[0] == 1
    assert frames[0, 0, 0].tolist() == [255, 0, 0]


def test_a_long_video_is_thinned_to_its_ends() -> None:
    x0 = torch.linspace(-1, 1, 40).view(1, 1, 40, 1, 1).expand(1, 3, 40, 2, 2)
    frames = latent_to_rgb(x0, RED_IS_FIRST, max_frames=12)
    assert len(frames) == 12
    assert frames[0, 0, 0, 0] == 0 and frames[-1, 0, 0, 0] == 255


def test_a_tiny_autoencoder_shows_what_it_decodes() -> None:
    tae = tiny_tae("taew2_1", (12, 10, 8, 6))
    x0 = torch.randn(2, 16, 30, 2, 3)
    frames = tiny_to_rgb(x0, tae, max_frames=4)
    assert frames.shape == (4, 16, 24, 3) and frames.dtype == torch.uint8 and frames.float().std() > 10
    decoded = decode(tae, tae.space.denormalize(x0[:1, :, [0, 10, 19, 29]]))[0, :, [0, 4, 8, 12]]
    assert torch.equal(frames, ((decoded.movedim(0, -1) + 1) * 127.5).round().to(torch.uint8))


def test_a_preview_is_at_most_a_hundredth_of_a_pass() -> None:
    """Arithmetic at 832x480 and 81 frames, of the smallest model: a step is one pass, or two with guidance. Counted
    for a small piece of the picture, for it grows with the pixels."""
    small, whole = (4, 4), (60, 104)
    x0, tae = torch.randn(1, 16, 21, *small), TinyVAE().eval().requires_grad_(False)
    with FlopCounterMode(display=False) as of_colours:
        latent_to_rgb(x0, Colours([[1, 0, 0]] * 16, [0, 0, 0]))
    with FlopCounterMode(display=False) as of_tiny:
        frames = tiny_to_rgb(x0, tae)
    times = math.prod(whole) / math.prod(small)
    least = 0.01 * subject("wan2.1-1.3b", "480p").flops()
    assert 0 < of_colours.get_total_flops() < of_tiny.get_total_flops() < least / times
    assert frames.shape == (5, 32, 32, 3)


def test_picture_loops() -> None:
    frames = torch.randint(0, 255, (5, 8, 16, 3), dtype=torch.uint8)
    file = io.BytesIO()
    LoopingPicture(frames, width=64).save(file, format="PNG", quality=95)
    image = Image.open(file)
    assert (image.format, image.size, image.n_frames, image.info["loop"]) == ("PNG", (64, 32), 5, 0)


def header(text: str | None) -> Header:
    return Header(Path("model.safetensors"), {}, {} if text is None else {COLOURS_KEY: text})


def test_colours_of_a_checkpoint() -> None:
    assert read_colours(header(None), 3) is None
    assert read_colours(header(RED_IS_FIRST.to_metadata()[COLOURS_KEY]), 3) == RED_IS_FIRST


@pytest.mark.parametrize(
    "text", ["", "3", "[[1, 2, 3]]", "[[1, 2], [1, 2], [1, 2], [1, 2]]", json.dumps([["x"] * 3] * 4)]
)
def test_colours_that_cannot_be_read_are_named(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its metadata 'latent_colours' is not 4 rows"):
        read_colours(header(text), 3)
