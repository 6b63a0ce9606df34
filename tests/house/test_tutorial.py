"""Every command and every block of the tutorial runs, in its order, on the CPU and at small sizes."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from blocks import Stage
from dev.environment import REPOSITORY
from lightx2v import models
from lightx2v.__main__ import main
from lightx2v_kernels import registry

TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
SMALL = {
    "generate": "--height 32 --width 48 --num_frames 5 --infer_steps 2 --quiet --device cpu",
    "calibrate": "--height 32 --width 32 --num_frames 1 --infer_steps 10 --quiet --device cpu --prompt one",
}
ADDED = {"lightx2v_kernels/attention": "lightx2v_kernels.attention", "lightx2v/models": "lightx2v.models"}


@dataclass(frozen=True)
class Block:
    mark: str
    language: str
    code: str


def tutorial() -> list[Block]:
    text = TUTORIAL.read_text(encoding="utf-8")
    return [Block(met["mark"] or "", met["language"], met["code"]) for met in BLOCK.finditer(text)]


def lines(code: str) -> list[list[str]]:
    return [shlex.split(line) for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def commands(code: str) -> list[list[str]]:
    """What follows `python -m lightx2v` on each line."""
    assert all(line[:3] == ["python", "-m", "lightx2v"] for line in lines(code)), code
    return [line[3:] for line in lines(code)]


def by_several(code: str, folder: Path) -> None:
    """What torchrun starts, in the folder, by as many processes as it says."""
    for first, *rest in lines(code):
        assert first == "torchrun", code
        command = [sys.executable, "-m", "torch.distributed.run", *rest, *SMALL["generate"].split()]
        env = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with what the tutorial names, in which files may be added to the packages."""
    shutil.copytree(REPOSITORY / "demo" / "models", tmp_path / "demo" / "models")
    shutil.copytree(REPOSITORY / "workflows" / "images", tmp_path / "workflows" / "images")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    for folder, name in ADDED.items():
        package = importlib.import_module(name)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / folder)])
    yield tmp_path
    monkeypatch.undo()
    for name in set(sys.modules) - before:
        if name.startswith(("lightx2v.models.shifted", "lightx2v_kernels.attention.in_pieces")):
            del sys.modules[name]
    found_anew()


def found_anew() -> None:
    for found in (registry.registries, models.specs, models.dialects):
        found.cache_clear()
    importlib.invalidate_caches()


def test_the_tutorial_runs_from_its_first_line_to_its_last(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = 0
    for block in tutorial():
        if block.mark.startswith("needs "):
            continue
        if block.mark.startswith("file: "):
            path = checkout / block.mark.removeprefix("file: ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code, encoding="utf-8")
            found_anew()
        elif block.language == "python":
            Stage({}).run(block.code, checkout, monkeypatch)
        elif block.code.startswith("torchrun"):
            by_several(block.code, checkout)
        else:
            for command in commands(block.code):
                assert main([*command, *SMALL.get(command[0], "").split()]) == 0, (command, capsys.readouterr().err)
        ran += 1
    said = capsys.readouterr().out
    assert ran >= 19 and "Shifted T2V, 48x32, 5 frames at 12 fps" in said
    assert re.search(r"attention in_pieces\b", said)
    made = {path.name for path in checkout.glob("*.mp4")}
    named = {name for block in tutorial() for name in re.findall(r"(\w+\.mp4)", block.code)}
    assert made == named - {"fox.mp4"} | {"square1.mp4", "square2.mp4"}
    assert "diffusion_pytorch_model.cache.json: measured on" in said


def test_what_does_not_run_here_says_why() -> None:
    marks = [block.mark for block in tutorial() if block.mark and not block.mark.startswith("file: ")]
    assert marks == ["needs published weights and a GPU", "needs a running ComfyUI with this pack"]
    for block in tutorial():
        if block.mark.startswith("needs "):
            assert commands(block.code)
