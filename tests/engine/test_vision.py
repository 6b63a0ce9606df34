"""The image encoder's behaviour around the network: sizes, choices, bad input. Numbers are in tests/parity."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import tiny_clip
from lightx2v.checkpoint import CheckpointError
from lightx2v.vision.clip import ImageEncoder, activation_bytes, load, preprocess
from lightx2v.vision.layout import Sizes
from tiny_clip import picture


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> ImageEncoder:
    path = tmp_path_factory.mktemp("clip") / "tiny.safetensors"
    save_file(tiny_clip.state_dict(), path)
    return load(path)


def test_shapes_and_types(encoder) -> None:
    found = encoder.features(picture(80, 60, batch=2).half())
    assert found.penultimate.shape == found.last.shape == (2, 17, 160)
    assert found.embedding.shape == (2, 64)
    assert {tensor.dtype for tensor in vars(found).values()} == {torch.float32}


def test_pictures_of_a_batch_do_not_mix(encoder) -> None:
    both = picture(80, 60, batch=2)
    torch.testing.assert_close(encoder.encode(both)[1:], encoder.encode(both[1:]), rtol=1e-5, atol=1e-5)


def test_alpha_is_dropped(encoder) -> None:
    image = picture(80, 60)
    with_alpha = torch.cat([image, torch.rand(1, 80, 60, 1)], -1)
    assert torch.equal(encoder.encode(with_alpha), encoder.encode(image))


def test_none_sees_the_edges_and_center_does_not(encoder) -> None:
    image = picture(60, 180)
    edge = image.clone()
    edge[:, :, :40] = 0
    assert not torch.equal(encoder.encode(image), encoder.encode(edge))
    assert torch.equal(encoder.encode(image, crop="center"), encoder.encode(edge, crop="center"))
    assert torch.equal(encoder.encode(image), encoder.encode(image, crop="none", resize="wan"))


def test_wan_does_not_filter_and_comfyui_does() -> None:
    stripes = torch.zeros(1, 4 * 56, 4 * 56, 3)
    stripes[:, :, ::4] = 1
    wan = [preprocess(stripes.roll(shift, 2), 56, resize="wan")[0, 0, 28, 28] for shift in range(4)]
    comfyui = [preprocess(stripes.roll(shift, 2), 56, resize="comfyui")[0, 0, 28, 28] for shift in range(4)]
    assert max(wan) - min(wan) > 1 > 10 * (max(comfyui) - min(comfyui))


def test_a_picture_of_the_right_size_is_only_normalised() -> None:
    image = picture(56, 56)
    expected = (image - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(preprocess(image, 56), expected.movedim(-1, 1))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.rand(56, 56, 3), "the image is (56, 56, 3); expected (B, H, W, 3)"),
        (torch.rand(1, 3, 56, 56), "the image is (1, 3, 56, 56)"),
        (torch.rand(1, 0, 56, 3), "the image is (1, 0, 56, 3)"),
    ],
)
def test_what_is_no_image_is_refused(encoder, image, words) -> None:
    with pytest.raises(ValueError) as caught:
        encoder.encode(image)
    assert words in str(caught.value)


def test_unknown_choices_are_refused(encoder) -> None:
    with pytest.raises(ValueError, match=r"crop=.centre. is not one of none, center"):
        encoder.encode(picture(), crop="centre")
    with pytest.raises(ValueError, match=r"resize=.lanczos. is not one of wan, comfyui"):
        encoder.encode(picture(), resize="lanczos")


def test_broken_pictures_and_weights_are_told_apart(encoder, tmp_path) -> None:
    hole = picture()
    hole[0, 3, 3] = float("nan")
    with pytest.raises(CheckpointError, match="the image holds NaN"):
        encoder.encode(hole)
    state = tiny_clip.state_dict()
    state["vision_model.encoder.layers.1.mlp.fc2.bias"][0] = float("inf")
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors: the image encoder gave infinities.*is damaged"):
        load(tmp_path / "broken.safetensors").encode(picture())


def test_every_block_is_a_place_to_cancel(encoder) -> None:
    seen = []
    encoder.encode(picture(), on_block=lambda index, total: seen.append((index, total)))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]

    class Cancelled(Exception):
        pass

    def cancel(index: int, total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        encoder.encode(picture(), on_block=cancel)


def test_held_types(tmp_path) -> None:
    save_file(tiny_clip.state_dict(), tmp_path / "tiny.safetensors")
    half = load(tmp_path / "tiny.safetensors", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half.encode(picture()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"dtype torch\.float64: expected one of"):
        load(tmp_path / "tiny.safetensors", dtype=torch.float64)


def test_activation_bytes_grow_with_the_pictures() -> None:
    one, two = activation_bytes(Sizes(), 1), activation_bytes(Sizes(), 2)
    assert 79e6 < one < 110e6 and 20e6 < two - one < 25e6
