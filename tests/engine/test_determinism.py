"""The same request gives the same bits: in another process, and while other threads make other videos."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dev.environment import REPOSITORY
from lightx2v import LightX2VPipeline
from tiny_pipeline import SMALL, lora, write_folder

DEMO = REPOSITORY / "demo" / "models" / "wan2.1_t2v"
PROMPT = "a red circle moves right over a navy background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("wan"))


def test_another_process_makes_the_same_bits(tmp_path: Path) -> None:
    """By the command line, and with other hashes of names, so that no order of a set is in them."""
    size = {"height": 64, "width": 64, "num_frames": 5, "infer_steps": 2}
    asked = {"model_path": DEMO, "prompt": PROMPT, "seed": 5, **size, "save_result_path": tmp_path / "clip.npy"}
    line = [sys.executable, "-m", "lightx2v", "generate"]
    line += [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    threads = {name: str(torch.get_num_threads()) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {**os.environ, **threads, "PYTHONHASHSEED": "7", "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(line, cwd=tmp_path, env=environment) as other:
        pipe = LightX2VPipeline(DEMO)
        pipe.create_generator(**size)
        mine = pipe.generate(5, PROMPT, return_result_tensor=True, progress=False)["video"]
        assert other.wait(timeout=300) == 0
    theirs = torch.from_numpy(np.load(tmp_path / "clip.npy"))
    assert mine is not None and mine.std() > 0.01 and torch.equal(mine, theirs)


def videos(pipe: LightX2VPipeline, seeds: list[int]) -> list[Tensor]:
    made = []
    for seed in seeds:
        frames = pipe.generate(seed, f"{seed} red circles", return_result_tensor=True, progress=False)["video"]
        assert frames is not None
        made.append(frames)
    return made


def test_two_pipelines_in_two_threads_do_not_meet(folder: Path, tmp_path: Path) -> None:
    """Other sizes, offload, LoRAs and attention, so that whatever they shared would show."""
    adapter = str(lora(folder, tmp_path / "lora.safetensors"))

    def make(kind: str) -> LightX2VPipeline:
        pipe = LightX2VPipeline(folder)
        changes: dict[str, Any] = {"width": 64, "attn_mode": "reference"} if kind == "b" else {}
        pipe.create_generator(**{**SMALL, **changes})
        if kind == "b":
            pipe.enable_offload(True)
            pipe.enable_lora([{"path": adapter}])
        return pipe

    seeds = {"a": [1, 2, 3], "b": [4, 5, 6]}
    alone = {kind: videos(make(kind), numbers) for kind, numbers in seeds.items()}
    together: dict[str, list[Tensor]] = {}
    start = threading.Barrier(2, timeout=60)

    def work(kind: str) -> None:
        pipe = make(kind)
        start.wait()
        together[kind] = videos(pipe, seeds[kind])

    threads = [threading.Thread(target=work, args=(kind,)) for kind in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for kind in seeds:
        assert all(torch.equal(a, b) for a, b in zip(together[kind], alone[kind], strict=True)), kind
    assert not torch.equal(alone["a"][0], alone["a"][1])


def test_a_video_does_not_depend_on_those_before_it(folder: Path) -> None:
    pipe = LightX2VPipeline(folder)
    pipe.create_generator(**SMALL)
    first = videos(pipe, [1, 2])
    torch.rand(7)  # other users of the global generator
    assert torch.equal(videos(pipe, [2])[0], first[1]) and torch.equal(videos(pipe, [1])[0], first[0])
