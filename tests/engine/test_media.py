"""What is written of a video: each form whole, with how it was made, and never over another's."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from lightx2v import media
from lightx2v.media import require_writable, save_video

HOW = {"prompt": 'a "red" círcle', "seed": 7, "guidance_scale": [4.0, 3.0]}
FRAMES = torch.rand(3, 16, 32, 3, generator=torch.Generator().manual_seed(0))
SMOOTH = torch.linspace(0, 1, 32).view(1, 1, 32, 1).expand(3, 16, 32, 3)


def test_a_video_holds_how_it_was_made(tmp_path: Path) -> None:
    path = save_video(SMOOTH, tmp_path / "new" / "clip.MP4", 16, HOW)
    with av.open(str(path)) as video:
        assert json.loads(video.metadata["comment"]) == HOW
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert video.streams.video[0].average_rate == 16
    assert len(frames) == 3 and np.abs(frames[0] / 255 - SMOOTH[0].numpy()).mean() < 0.03
    assert [each.name for each in path.parent.iterdir()] == ["clip.MP4"]


@pytest.mark.parametrize("name", ["frames/", "a_%03d.png", "deep/%d.png", "100%_%d_b.png"])
def test_pictures_are_exact_and_numbered(name: str, tmp_path: Path) -> None:
    save_video(FRAMES, f"{tmp_path}/{name}", 16, HOW)
    stem = {"frames/": "frames/frame_00002.png", "a_%03d.png": "a_002.png", "deep/%d.png": "deep/2.png"}
    last = tmp_path / stem.get(name, "100%_2_b.png")
    assert len(list(last.parent.iterdir())) == 3, "nothing else"
    with Image.open(last) as picture:
        assert json.loads(picture.text["comment"]) == HOW
        assert np.array_equal(np.asarray(picture), (FRAMES[2] * 255).round().to(torch.uint8).numpy())


def test_numbers_are_exact(tmp_path: Path) -> None:
    with safe_open(save_video(FRAMES, tmp_path / "clip.safetensors", 24, HOW), "pt") as file:
        assert torch.equal(file.get_tensor("video"), FRAMES)
        assert json.loads(file.metadata()["comment"]) == HOW and file.metadata()["fps"] == "24"
    assert np.array_equal(np.load(save_video(FRAMES, tmp_path / "clip.npy", 24, HOW)), FRAMES.numpy())


def test_pictures_of_another_video_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "frame_00100.png").touch()
    for name in (tmp_path, f"{tmp_path}/frame_%d.png"):
        with pytest.raises(ValueError, match=r"frame_00100\.png is already there: name another folder"):
            require_writable(name, 32, 16)
        with pytest.raises(ValueError, match="already there"):
            save_video(FRAMES, name, 16, HOW)
    assert [each.name for each in tmp_path.iterdir()] == ["frame_00100.png"]
    save_video(FRAMES, tmp_path / "other_%02d.png", 16, HOW)


@pytest.mark.parametrize("name", ["clip.mp4", "frames/", "clip.npy", "clip.safetensors"])
def test_what_fails_leaves_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("the disk is full")

    def half(frames: torch.Tensor, path: Path, *args: object) -> None:
        path.write_bytes(b"half")
        fail()

    for suffix in media.WRITERS:
        monkeypatch.setitem(media.WRITERS, suffix, half)
    saved: list[object] = []

    def save(self: Image.Image, path: Path, **kwargs: object) -> None:
        saved.append(path)
        path.write_bytes(b"half")
        if len(saved) == 2:
            fail()

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="the disk is full"):
        save_video(FRAMES, f"{tmp_path}/{name}", 16, HOW)
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == []


@pytest.mark.parametrize("name", ["clip", "clip.avi", "clip.png", "clip.gif"])
def test_other_names_are_refused_in_words(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"name the file something\.mp4, \.safetensors, \.npy, or for pictures a folder"
    ):
        require_writable(tmp_path / name, 32, 16)


def test_other_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"33x16 px: H\.264 with yuv420p needs an even width"):
        require_writable("clip.mp4", 33, 16)
    require_writable("clip.npy", 33, 15)
    with pytest.raises(ValueError, match=r"frames are \(1, 2\); expected"):
        save_video(torch.zeros(1, 2), tmp_path / "clip.mp4", 16, HOW)
