"""Pixels, latents and tokens: the only place that knows how one becomes the other."""

from math import sqrt
from typing import NamedTuple

from lightx2v.latents import LatentFormat


class VideoShape(NamedTuple):
    """A finished video: frames, and pixels."""

    num_frames: int
    height: int
    width: int


class LatentShape(NamedTuple):
    """Cells of a latent (B, C, T, H, W) along T, H, W."""

    t: int
    h: int
    w: int


def to_latent(video: VideoShape, stride: tuple[int, int, int]) -> LatentShape:
    """The causal VAE maps F frames to (F - 1) // stride_t + 1 and pixels to pixels // stride."""
    st, sh, sw = stride
    return LatentShape((video.num_frames - 1) // st + 1, video.height // sh, video.width // sw)


def to_video(latent: LatentShape, stride: tuple[int, int, int]) -> VideoShape:
    st, sh, sw = stride
    return VideoShape((latent.t - 1) * st + 1, latent.h * sh, latent.w * sw)


def smaller(
    latent: LatentShape, share: float, stride: tuple[int, int, int], patch_size: tuple[int, int, int]
) -> list[VideoShape]:
    """Videos of at most that share of the tokens: as large but shorter, and as long but smaller. Less than one token
    is left out."""
    scale = sqrt(max(share, 0.0))
    sides = [int(side * scale) // cell * cell for side, cell in zip(latent[1:], patch_size[1:], strict=True)]
    shorter = latent._replace(t=int(latent.t * share))
    found = [shorter] if shorter.t >= 1 else []
    found += [latent._replace(h=sides[0], w=sides[1])] if min(sides) >= 1 else []
    return [to_video(each, stride) for each in found]


def num_tokens(latent: LatentShape, patch_size: tuple[int, int, int]) -> int:
    pt, ph, pw = patch_size
    return (latent.t // pt) * (latent.h // ph) * (latent.w // pw)


def snap(video: VideoShape, latents: LatentFormat, patch_size: tuple[int, int, int]) -> tuple[VideoShape, str | None]:
    """The nearest size the model can make, and a sentence about the change or None.

    Frames go to the nearest n * stride_t + 1 (80 -> 81); height and width go down to a multiple of stride * patch
    (720x536 -> 720x528), and are never below one patch.
    """
    if min(video) < 1:
        raise ValueError(f"video size {video.num_frames} frames, {video.height}x{video.width} px must be positive")
    st, sh, sw = latents.stride
    cell_h, cell_w = sh * patch_size[1], sw * patch_size[2]
    snapped = VideoShape(
        num_frames=(video.num_frames - 1 + st // 2) // st * st + 1,
        height=max(video.height // cell_h, 1) * cell_h,
        width=max(video.width // cell_w, 1) * cell_w,
    )
    if snapped == video:
        return video, None
    return snapped, (
        f"{video.width}x{video.height}, {video.num_frames} frames is not possible; made "
        f"{snapped.width}x{snapped.height}, {snapped.num_frames} frames "
        f"(width multiple of {cell_w}, height of {cell_h}, frames {st}n+1)"
    )


def size_for_image(
    area: int, image: tuple[int, int], latents: LatentFormat, patch_size: tuple[int, int, int]
) -> tuple[int, int]:
    """(height, width) in pixels of about `area` with the proportions of an image (height, width).

    Each side is a whole number of patches, rounded down, and at least one. Source: Wan2.1 wan/image2video.py.
    """
    ratio = image[0] / image[1]
    cells = (latents.stride[1] * patch_size[1], latents.stride[2] * patch_size[2])
    height, width = sqrt(area * ratio), sqrt(area / ratio)
    # A hair above, so that the square root of a whole number of cells is not rounded down to one less.
    return tuple(max(int(side / cell + 1e-6), 1) * cell for side, cell in zip((height, width), cells, strict=True))  # type: ignore[return-value]
