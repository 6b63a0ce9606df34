"""Files that are written while the disk fills up, or by a process that is killed: whole, or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dev.environment import REPOSITORY
from lightx2v.cache.figures import Figures
from lightx2v.cache.lookup import Occasion, write_figures
from lightx2v.identify import identify
from lightx2v.media import save_video
from lightx2v.quant.writing import write_quantised
from lightx2v.unfinished import STALE_SECONDS, unfinished

resource = pytest.importorskip("resource", reason="this system limits no files' sizes")
FRAMES = torch.rand(24, 64, 64, 3, generator=torch.Generator().manual_seed(0))
T2V = REPOSITORY / "demo" / "models" / "wan2.1_t2v" / "diffusion_pytorch_model.safetensors"


@contextmanager
def room_for(nbytes: int) -> Iterator[None]:
    """No file grows beyond that, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def video(name: str) -> Callable[[Path], object]:
    return lambda folder: save_video(FRAMES, f"{folder}/{name}", 16, {"seed": 1})


def quantised(folder: Path) -> object:
    return write_quantised(T2V, folder / "m.safetensors", "fp8")


def calibrated(folder: Path) -> object:
    (folder / "m.safetensors").symlink_to(T2V)
    figures = Figures("here", tea=(1.0,) * 9, mag=(1.0,) * 900, steps=50, shift=5.0)
    occasion = Occasion("2026-01-01", 1, 5.0, "unipc", 128, 128, 17)
    try:
        return write_figures(identify(folder / "m.safetensors"), "alone", figures, occasion)
    finally:
        (folder / "m.safetensors").unlink()


WRITERS: dict[str, tuple[Callable[[Path], object], float]] = {
    "clip.mp4": (video("clip.mp4"), 0.3),
    "clip.mp4, its index": (video("clip.mp4"), 0.998),
    "clip.safetensors": (video("clip.safetensors"), 0.5),
    "clip.npy": (video("clip.npy"), 0.5),
    "pictures": (video("pictures/"), 0.99),
    "quantize": (quantised, 0.5),
    "calibrate": (calibrated, 0.5),
}


def written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_said_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    (write, share), (there, full) = WRITERS[name], (tmp_path / "there", tmp_path / "full")
    there.mkdir()
    full.mkdir()
    write(there)
    files = written(there)
    assert files and all(path.suffix != ".part" for path in files)
    limit = int(share * max(path.stat().st_size for path in files))
    with room_for(limit), pytest.raises(OSError, match=r"the disk is full.*make room, or write to another folder"):
        write(full)
    assert written(full) == []
    write(full)
    assert len(written(full)) == len(files)


KILLED = """
import os, signal, sys
from pathlib import Path
from lightx2v.unfinished import unfinished
with unfinished(Path(sys.argv[1])) as partial:
    partial.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_leaves_goes_with_the_next_file(tmp_path: Path) -> None:
    target, other = tmp_path / "clip.mp4", tmp_path / ".clip.mp4.notes.part"
    other.touch()
    os.utime(other, (0, 0))
    line = [sys.executable, "-c", KILLED, str(target)]
    assert subprocess.run(line, cwd=REPOSITORY).returncode == -signal.SIGKILL
    (left,) = set(tmp_path.iterdir()) - {other}
    assert left.name.startswith(".clip.mp4.") and left.suffix == ".part", "hidden, and no video by its name"
    save_video(FRAMES[:1], target, 16, {})
    assert left.exists(), "another process may be writing it"
    before = left.stat().st_mtime - STALE_SECONDS
    os.utime(left, (before, before))
    save_video(FRAMES[:1], target, 16, {})
    assert set(tmp_path.iterdir()) == {target, other}, "what is somebody else's stays"


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "clip.npy"
    with unfinished(target) as first, unfinished(target) as second:
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first" and list(tmp_path.iterdir()) == [target]
