"""Pictures from files, frames to files."""

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightx2v.checkpoint.writing import Entry, write_safetensors
from lightx2v.messages import readable
from lightx2v.unfinished import unfinished

if TYPE_CHECKING:
    import numpy as np

PICTURES = "frame_%05d.png"
MAX_PIXELS = 1 << 27  # of a picture that is read, 12 bytes each in float32
_NUMBER = re.compile(r"%(0?\d*)d")


def to_frames(video: Tensor) -> Tensor:
    """Decoded video (1, 3, F, H, W) in [-1, 1] -> (F, H, W, 3) float32 in [0, 1]."""
    if video.ndim != 5 or video.shape[:2] != (1, 3):
        raise ValueError(f"video is {tuple(video.shape)}; expected (1, 3, F, H, W)")
    return ((video[0].float() + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0).contiguous()


def read_image(path: str | Path) -> Tensor:
    """A picture file (PNG, JPEG, WebP, ...) -> (1, H, W, 3) float32 RGB in [0, 1], turned as its EXIF says.

    Raises FileNotFoundError, and ValueError for a file that is no picture, is damaged, or has more than MAX_PIXELS.
    """
    from PIL import Image, ImageOps

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such picture")
    try:
        with Image.open(path) as picture:
            if (count := picture.width * picture.height) > MAX_PIXELS:
                raise ValueError(f"{count:,} pixels, at most {MAX_PIXELS:,} are read")
            pixels = ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # Pillow's readers raise SyntaxError, struct.error and all sorts for damage
        why = readable(str(error), 300)
        raise ValueError(f"{path}: cannot be read as a picture ({why}); give a PNG or JPEG file") from error
    raw = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
    return raw.view(1, pixels.height, pixels.width, 3).float() / 255


def require_writable(path: str | Path, width: int, height: int) -> Path:
    """The path, if a video of this size can be written there in the form that its name asks for; see `save_video`.

    Raises ValueError with what to change if not.
    """
    if _pattern(path) is not None:
        return _require_empty(path)
    if Path(path).suffix.lower() not in WRITERS:
        raise ValueError(
            f"{path}: name the file something{', '.join(WRITERS)}, or for pictures a folder, with / at its end, or a "
            "pattern such as clip_%04d.png"
        )
    if Path(path).suffix.lower() == ".mp4" and (height % 2 or width % 2):
        raise ValueError(f"{width}x{height} px: H.264 with yuv420p needs an even width and height")
    return Path(path)


def save_video(frames: Tensor, path: str | Path, fps: int, parameters: Mapping[str, Any]) -> Path:
    """Write (F, H, W, 3) float frames in [0, 1]; what is written appears whole or not at all.

    path: an .mp4; a .safetensors ("video", float32, as it is here) or .npy; a folder that exists or ends in "/", for
        frame_00000.png and so on; or a pattern with a number, such as clip_%04d.png, for pictures of other names.
    parameters: how it was made, kept as JSON in the file's metadata ("comment"; of pictures in each; .npy has none).
    Raises ValueError for other shapes and names, odd sizes of an .mp4, and where such pictures are already there.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {tuple(frames.shape)}; expected (F, H, W, 3)")
    _, height, width, _ = frames.shape
    target, comment = require_writable(path, width, height), json.dumps(parameters)
    pattern = _pattern(path)
    folder = pattern.parent if pattern is not None else target.parent
    folder.mkdir(parents=True, exist_ok=True)
    if pattern is not None:
        _write_pictures(frames, pattern, comment)
        return Path(path)
    with unfinished(target) as partial:
        WRITERS[target.suffix.lower()](frames, partial, fps, comment)
    return target


def _pattern(path: str | Path) -> Path | None:
    """Folder and name of numbered pictures, where a path asks for them."""
    if str(path).endswith(("/", os.sep)) or Path(path).is_dir():
        return Path(path) / PICTURES
    return Path(path) if Path(path).suffix.lower() == ".png" and _NUMBER.search(Path(path).name) else None


def _named(pattern: Path) -> tuple[str, str, str]:
    """What stands before the number, its digits as Python formats them, and what follows."""
    found = _NUMBER.search(pattern.name)
    assert found is not None
    return pattern.name[: found.start()], found[1], pattern.name[found.end() :]


def _require_empty(path: str | Path) -> Path:
    """The path; ValueError where pictures of these names are there: those of a longer video would stay between."""
    pattern = _pattern(path)
    assert pattern is not None
    before, _, after = _named(pattern)
    names = re.compile(rf"{re.escape(before)}\d+{re.escape(after)}")
    held = pattern.parent.iterdir() if pattern.parent.is_dir() else ()
    if there := sorted(each.name for each in held if names.fullmatch(each.name)):
        raise ValueError(f"{pattern.parent}: {there[0]} is already there: name another folder, or remove its pictures")
    return Path(path)


def _write_pictures(frames: Tensor, pattern: Path, comment: str) -> None:
    """First beside each other under temporary names, then by their own."""
    from PIL import Image, PngImagePlugin

    told = PngImagePlugin.PngInfo()
    before, digits, after = _named(pattern)
    told.add_itxt("comment", comment)
    with ExitStack() as written:
        for index, image in enumerate(_bytes(frames)):
            path = pattern.with_name(f"{before}{index:{digits}d}{after}")
            Image.fromarray(image).save(written.enter_context(unfinished(path)), format="PNG", pnginfo=told)


def _bytes(frames: Tensor) -> "np.ndarray":
    pixels: np.ndarray = (frames * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return pixels


def _write_mp4(frames: Tensor, path: Path, fps: int, comment: str) -> None:
    """H.264 (yuv420p, CRF 18)."""
    import av

    _, height, width, _ = frames.shape
    with av.open(str(path), "w", format="mp4", options={"movflags": "use_metadata_tags+faststart"}) as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in _bytes(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _write_safetensors(frames: Tensor, path: Path, fps: int, comment: str) -> None:
    entry = Entry("video", torch.float32, tuple(frames.shape))
    write_safetensors(path, [entry], [("video", frames.float())], {"comment": comment, "fps": str(fps)})


def _write_npy(frames: Tensor, path: Path, fps: int, comment: str) -> None:
    from numpy.lib import format as npy

    array = frames.float().cpu().contiguous().numpy()
    with path.open("wb") as file:  # np.save's own way of writing does not say what went wrong
        npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(array))
        file.write(array.data)


WRITERS: Mapping[str, Callable[[Tensor, Path, int, str], None]] = {
    ".mp4": _write_mp4,
    ".safetensors": _write_safetensors,
    ".npy": _write_npy,
}
