"""Given frames: masks, sizes and bad input. Numbers of other implementations are in tests/parity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightx2v.frames import whole_clips
from lightx2v.latents import WAN21, WAN22
from lightx2v.models.wan.conditioning import (
    given_mask,
    image_condition,
    image_latent,
    to_model_input,
)
from lightx2v.shapes import LatentShape, VideoShape

LATENT = LatentShape(5, 2, 3)
VIDEO = VideoShape(17, 32, 48)


def slots(start: int, end: int = 0) -> list[str]:
    """The mask at one place, a word of four frames for each latent frame."""
    mask = given_mask(LATENT, start, end)
    assert mask.shape == (1, 4, 5, 2, 3)
    assert all(torch.equal(mask[..., y, x], mask[..., 0, 0]) for y in range(2) for x in range(3))
    return ["".join(str(int(value)) for value in word) for word in mask[0, :, :, 0, 0].T]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 0, ["0000", "0000", "0000", "0000", "0000"]),
        (1, 0, ["1111", "0000", "0000", "0000", "0000"]),
        (4, 0, ["1111", "0000", "0000", "0000", "0000"]),
        (5, 0, ["1111", "1111", "0000", "0000", "0000"]),
        (17, 0, ["1111", "1111", "1111", "1111", "1111"]),
        (0, 1, ["0000", "0000", "0000", "0000", "0001"]),
        (1, 1, ["1111", "0000", "0000", "0000", "0001"]),
        (3, 6, ["1111", "1100", "0000", "0011", "1111"]),
    ],
)
def test_masks(start: int, end: int, expected: list[str]) -> None:
    assert slots(start, end) == expected


def test_given_frames_stand_at_their_places_and_the_rest_is_grey() -> None:
    seen: list[Tensor] = []

    def encode(clip: Tensor) -> Tensor:
        seen.append(clip)
        return torch.zeros(1, 16, 5, 4, 6)

    first, last = torch.rand(2, 32, 48, 3), torch.rand(3, 32, 48, 4)
    image_condition(whole_clips(encode), VIDEO, WAN21, start=first, end=last)
    (clip,) = seen
    assert clip.shape == (1, 3, 17, 32, 48)
    torch.testing.assert_close(clip[0, :, :2], first.movedim(-1, 0) * 2 - 1)
    torch.testing.assert_close(clip[0, :, -3:], last[..., :3].movedim(-1, 0) * 2 - 1)
    assert not clip[:, :, 2:-3].any()


@pytest.mark.parametrize(
    ("start", "end", "expected"), [(40, 0, (17, 0)), (0, 40, (0, 17)), (16, 3, (14, 3)), (2, 17, (0, 17))]
)
def test_frames_beyond_the_video_are_left_out(start: int, end: int, expected: tuple[int, int]) -> None:
    seen = {}

    def encode(num_frames: int, **given: Tensor | None) -> Tensor:
        seen.update({name: 0 if frames is None else frames.shape[2] for name, frames in given.items()})
        return torch.zeros(1, 16, 5, 4, 6)

    frames = [torch.rand(count, 8, 8, 3) if count else None for count in (start, end)]
    image_condition(encode, VIDEO, WAN21, start=frames[0], end=frames[1])
    assert (seen["start"], seen["end"]) == expected


def test_no_image_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a start nor an end image"):
        image_condition(fake_vae(16, 8), VIDEO, WAN21)


def fake_vae(channels: int, stride: int):
    """Latents that say where they come from: the mean of the frames of each latent frame, in every channel."""

    def encode(clip: Tensor) -> Tensor:
        assert clip.shape[2] % 4 == 1
        means = torch.cat([clip[:, :, :1], clip[:, :, 1:].unflatten(2, (-1, 4)).mean(3)], 2)
        small = torch.nn.functional.avg_pool3d(means.mean(1, keepdim=True), (1, stride, stride))
        return small.expand(-1, channels, -1, -1, -1) + 2

    return whole_clips(encode)


def test_condition_of_a_start_image() -> None:
    found = image_condition(fake_vae(16, 8), VIDEO, WAN21, start=torch.ones(1, 32, 48, 3))
    assert found.latents.shape == (1, 16, 5, 4, 6) and found.mask.shape == (1, 4, 5, 4, 6)
    assert found.concat_mask.shape == (1, 1, 5, 4, 6)
    assert (found.latents[:, :, 0] == 3).all() and (found.latents[:, :, 1:] == 2).all()
    both = image_condition(fake_vae(16, 8), VIDEO, WAN21, start=torch.ones(1, 9, 9, 3), end=torch.zeros(1, 9, 9, 3))
    assert both.concat_mask.shape == (1, 4, 5, 4, 6)
    assert (both.latents[:, :, -1] == 1.75).all()


@pytest.mark.parametrize("frames", [1, 3, 5, 8, 40])
def test_latent_of_a_start_image(frames: int) -> None:
    known = {1: 1, 3: 1, 5: 2, 8: 2, 40: 5}[frames]
    raw, mask = image_latent(fake_vae(48, 16), VIDEO, WAN22, torch.ones(frames, 32, 48, 3), batch=2)
    assert raw.shape == (2, 48, 5, 2, 3) and mask is not None and mask.shape == (2, 1, 5, 2, 3)
    assert (raw[:, :, :known] == 3).all() and not mask[:, :, :known].any()
    mean = torch.tensor(WAN22.mean).view(1, 48, 1, 1, 1)
    assert torch.equal(raw[:, :, known:], mean.expand(2, -1, 5 - known, 2, 3)) and (mask[:, :, known:] == 1).all()


def test_no_image_is_an_empty_latent() -> None:
    raw, mask = image_latent(fake_vae(48, 16), VIDEO, WAN22, None, batch=2)
    assert raw.shape == (2, 48, 5, 2, 3) and not raw.any() and mask is None


def test_a_vae_of_another_space_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"latents \(1, 48, 5, 2, 3\) of 17 frames of 48x32 pixels; expected \(1, 16, 5"
    ):
        image_condition(fake_vae(48, 16), VIDEO, WAN21, start=torch.ones(1, 32, 48, 3))


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the image is \(32, 48, 3\); expected \(frames, H, W, 3\)"):
        image_condition(fake_vae(16, 8), VIDEO, WAN21, start=torch.ones(32, 48, 3))


SHAPE = (1, 16, 5, 4, 6)
REFUSED = [
    ((1, 48, 5, 4, 6), None, "concat_latent_image is (1, 48, 5, 4, 6); expected (B, 16, 5, h, w)"),
    ((1, 16, 4, 6), None, "concat_latent_image is (1, 16, 4, 6); expected (B, 16, 5, h, w)"),
    ((0, 16, 5, 4, 6), None, "concat_latent_image is (0, 16, 5, 4, 6)"),
    ((1, 16, 3, 4, 6), None, "concat_latent_image has 3 latent frames (9 frames), the video has 5 (17)"),
    ((1, 16, 5, 4, 6), (1, 2, 5, 4, 6), "concat_mask is (1, 2, 5, 4, 6); expected (B, 1 or 4, 5, h, w)"),
    ((1, 16, 5, 4, 6), (1, 1, 7, 4, 6), "concat_mask is (1, 1, 7, 4, 6)"),
    ((1, 16, 5, 4, 6), (1, 1, 4, 6), "concat_mask is (1, 1, 4, 6)"),
]


@pytest.mark.parametrize(("image", "mask", "words"), REFUSED)
def test_what_does_not_fit_the_video_is_refused(image, mask, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        to_model_input(torch.zeros(image), None if mask is None else torch.zeros(mask), WAN21, SHAPE)
    assert words in str(caught.value)
