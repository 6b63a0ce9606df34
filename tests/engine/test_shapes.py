import pytest

from lightx2v.latents import WAN21
from lightx2v.shapes import LatentShape, VideoShape, num_tokens, snap, to_latent, to_video

PATCH = (1, 2, 2)


def test_wan_480p() -> None:
    latent = to_latent(VideoShape(81, 480, 832), WAN21.stride)
    assert latent == LatentShape(21, 60, 104)
    assert to_video(latent, WAN21.stride) == VideoShape(81, 480, 832)
    assert num_tokens(latent, PATCH) == 32760


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ((81, 480, 832), (81, 480, 832)),
        ((80, 536, 720), (81, 528, 720)),
        ((1, 16, 16), (1, 16, 16)),
        ((2, 1, 40), (1, 16, 32)),
        ((82, 64, 64), (81, 64, 64)),
        ((83, 64, 64), (85, 64, 64)),
    ],
)
def test_snap(asked: tuple[int, int, int], made: tuple[int, int, int]) -> None:
    shape, note = snap(VideoShape(*asked), WAN21, PATCH)
    assert shape == made
    assert (note is None) == (asked == made)
    if note:
        assert f"{asked[2]}x{asked[1]}" in note
        assert f"{made[2]}x{made[1]}, {made[0]} frames" in note


def test_nothing_is_not_a_video() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        snap(VideoShape(0, 64, 64), WAN21, PATCH)
