"""Clips that are mostly blank: the same latents as the whole clip's, from fewer runs of the first stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from closeness import assert_exact_enough, relative_error
from lightx2v.vae.layers import advance
from lightx2v.vae.loading import VAE
from lightx2v.vae.padded import encode_padded, stages
from lightx2v.vae.stream import encode
from tiny_vae import tiny_vae, tiny_vae22

# Frames: of the clip, at its start, at its end.
CLIPS = [
    (1, 1, 0),
    (1, 0, 1),
    (5, 1, 0),
    (5, 1, 1),
    (17, 1, 1),
    (17, 0, 1),
    (29, 3, 2),
    (41, 6, 0),
    (41, 1, 7),
    (9, 4, 5),
]
LONG = [(81, 1, 0), (81, 1, 1), (81, 0, 1), (129, 1, 1)]


@pytest.fixture(scope="module", params=[tiny_vae, tiny_vae22], ids=["wan2.1", "wan2.2"])
def vae(request: pytest.FixtureRequest) -> VAE:
    make: Callable[[], VAE] = request.param
    return make()


def pictures(count: int, seed: int = 0) -> Tensor | None:
    """More than a cell's neighbourhood wide, so that borders and the inside differ."""
    if not count:
        return None
    return torch.rand(1, 3, count, 48, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def whole(num_frames: int, start: Tensor | None, end: Tensor | None, blank: float) -> Tensor:
    clip = torch.full((1, 3, num_frames, 48, 64), blank)
    if start is not None:
        clip[:, :, : start.shape[2]] = start
    if end is not None:
        clip[:, :, -end.shape[2] :] = end
    return clip


@pytest.mark.parametrize("blank", [0.0, 0.7])
@pytest.mark.parametrize(("num_frames", "first", "last"), CLIPS)
def test_as_the_whole_clip(vae: VAE, num_frames: int, first: int, last: int, blank: float) -> None:
    start, end = pictures(first), pictures(last, seed=1)
    raw = encode_padded(vae, num_frames, start=start, end=end, blank=blank)
    assert_exact_enough(raw, encode(vae, whole(num_frames, start, end, blank)))


@pytest.mark.parametrize(("num_frames", "first", "last"), LONG)
def test_as_a_long_clip(vae: VAE, num_frames: int, first: int, last: int) -> None:
    start, end = pictures(first), pictures(last, seed=1)
    raw = encode_padded(vae, num_frames, start=start, end=end)
    assert_exact_enough(raw, encode(vae, whole(num_frames, start, end, 0.0)))


def stage_outputs(vae: VAE, clip: Tensor) -> list[Tensor]:
    x, made = vae.prepare(clip), []
    for stage in vae.encoder.stages():
        x = advance(stage, x, None)
        made.append(x)
    return made


@pytest.mark.parametrize("blank_from", [1, 2, 5, 8])
def test_the_last_frame_that_a_stage_makes_of_the_picture(vae: VAE, blank_from: int) -> None:
    """NaN in the picture's last frame reaches all that it has a part in, however small, and nothing else."""
    clip = torch.zeros(1, 3, 129, 16, 16)
    clip[:, :, blank_from - 1] = torch.nan
    for index, (stage, made) in enumerate(zip(stages(vae, blank_from), stage_outputs(vae, clip), strict=True)):
        assert made.shape[2] == 128 // stage.rate + 1, index
        assert made[:, :, stage.still :].isfinite().all() and made[:, :, stage.still - 1].isnan().any(), index


def test_the_start_of_a_blank_clip_is_no_steady_state(vae: VAE) -> None:
    for index, (stage, made) in enumerate(
        zip(stages(vae, 0), stage_outputs(vae, torch.zeros(1, 3, 129, 16, 16)), strict=True)
    ):
        late = made[:, :, -1:]
        assert_exact_enough(made[:, :, stage.still :], late.expand_as(made[:, :, stage.still :]))
        assert relative_error(made[:, :, :1], late) > 1e-3 or index == 0, index


# Chunks until a stage's first repeating frame: frame 3 of the first stage is in the second chunk, frames 1 to 4.
RUNS = [2, 3, 4, 4, 5, 6, 7, 9, 11, 12, 16, 20, 24, 24, 28, 30]


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("num_frames", [81, 161])
def test_stages_that_repeat_themselves_are_not_run(num_frames: int, last: int) -> None:
    vae, ran = tiny_vae(), Counter[nn.Module]()
    for stage in vae.encoder.stages():
        stage.register_forward_pre_hook(lambda stage, _: ran.update([stage]))
    encode_padded(vae, num_frames, start=pictures(1), end=pictures(last))
    latent_frames = (num_frames - 1) // 4 + 1
    assert [ran[stage] for stage in vae.encoder.stages()] == [min(runs + last, latent_frames) for runs in RUNS]


def test_progress_counts_latent_frames(vae: VAE) -> None:
    seen: list[tuple[int, int]] = []
    encode_padded(vae, 17, start=pictures(1), on_chunk=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_pictures_of_another_type_and_a_latent_to_train_on() -> None:
    vae, start = tiny_vae(), pictures(1)
    assert start is not None
    raw = encode_padded(vae, 9, start=start.half())
    assert raw.dtype == torch.float32 and not raw.is_inference()
    assert_exact_enough(raw, encode_padded(vae, 9, start=start.half().float()))


@pytest.mark.parametrize(
    ("num_frames", "start", "end", "words"),
    [
        (80, (1, 3, 1, 48, 64), None, "80 frames: expected 4n"),
        (0, (1, 3, 1, 48, 64), None, "0 frames: expected 4n"),
        (81, None, None, "neither start nor end is given"),
        (5, (1, 3, 4, 48, 64), (1, 3, 2, 48, 64), "start and end are 6 frames, the clip is 5"),
        (5, (1, 3, 1, 48, 64), (1, 3, 1, 48, 48), "start is 1 x 64x48 pixels and end is 1 x 48x48 pixels"),
        (5, (1, 3, 1, 48, 64), (2, 3, 1, 48, 64), "start is 1 x 64x48 pixels and end is 2 x"),
        (5, (1, 3, 1, 48, 60), None, "60x48 pixels: expected multiples of 8"),
        (5, None, (1, 4, 1, 48, 64), r"\(1, 4, 1, 48, 64\); expected \(B, 3, F, H, W\)"),
        (5, (1, 3, 0, 48, 64), None, "no frames"),
    ],
)
def test_refuses(num_frames: int, start: tuple[int, ...] | None, end: tuple[int, ...] | None, words: str) -> None:
    given = {name: torch.zeros(shape) for name, shape in (("start", start), ("end", end)) if shape is not None}
    with pytest.raises(ValueError, match=words):
        encode_padded(tiny_vae(), num_frames, **given)
