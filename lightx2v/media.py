"""Pictures from files, frames to files."""

import os
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor


def to_frames(video: Tensor) -> Tensor:
    """Decoded video (1, 3, F, H, W) in [-1, 1] -> (F, H, W, 3) float32 in [0, 1]."""
    if video.ndim != 5 or video.shape[:2] != (1, 3):
        raise ValueError(f"video is {tuple(video.shape)}; expected (1, 3, F, H, W)")
    return ((video[0].float() + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0).contiguous()


def read_image(path: str | Path) -> Tensor:
    """A picture file (PNG, JPEG, WebP, ...) -> (1, H, W, 3) float32 RGB in [0, 1], turned as its EXIF says.

    Raises FileNotFoundError, and ValueError for a file that is no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such picture")
    try:
        with Image.open(path) as picture:
            pixels = ImageOps.exif_transpose(picture).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error}); give a PNG or JPEG file") from error
    raw = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
    return raw.view(1, pixels.height, pixels.width, 3).float() / 255


def require_mp4(path: str | Path, width: int, height: int) -> Path:
    """The path, if a video of this size can be written there; ValueError with what to change if not."""
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"{path}: only .mp4 can be written; name the file something.mp4")
    if height % 2 or width % 2:
        raise ValueError(f"{width}x{height} px: H.264 with yuv420p needs an even width and height")
    return path


def save_mp4(frames: Tensor, path: str | Path, fps: int, *, comment: str = "") -> Path:
    """Write (F, H, W, 3) float frames in [0, 1] as H.264 (yuv420p, CRF 18); the file appears whole or not at all.

    comment: stored in the file's metadata. Raises ValueError for other shapes, suffixes and odd sizes.
    """
    import av

    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {tuple(frames.shape)}; expected (F, H, W, 3)")
    _, height, width, _ = frames.shape
    path = require_mp4(path, width, height)
    pixels = (frames * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.mp4")
    try:
        with av.open(str(partial), "w", options={"movflags": "use_metadata_tags+faststart"}) as container:
            if comment:
                container.metadata["comment"] = comment
            stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "18"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for image in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
