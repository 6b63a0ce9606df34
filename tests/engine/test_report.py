"""The report of one video: every fact on a line of its own, from values alone."""

from pathlib import Path

import pytest
import torch

from lightx2v.__main__ import main
from lightx2v.report import Report, Stage, Watch
from tiny_pipeline import lora, pipeline, video, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("wan"))


def test_the_text_has_every_stage_and_what_it_said() -> None:
    report = Report().then(Stage("encode", 1.25), Stage("sample", 61.0, 15_900_000_000, ("memory: all", "cache: off")))
    assert report.stages[0].peak is None
    lines = report.then(Stage("decode", 2.0)).text().splitlines()
    assert lines[:3] == [
        "memory: all",
        "cache: off",
        "stages: encode 1.2 s, sample 61.0 s (peak 15.9 GB), decode 2.0 s",
    ]
    assert all(line.startswith("RAM: ") for line in lines[3:])
    assert len(report.stages) == 2, "a report is a value"


def test_a_stage_that_fails_is_no_stage() -> None:
    watch = Watch(torch.device("cpu"))
    with watch.stage("encode") as lines:
        lines.append("said")
    with pytest.raises(ValueError, match="stop"), watch.stage("sample"):
        raise ValueError("stop")
    assert [(stage.name, stage.lines) for stage in watch.stages] == [("encode", ("said",))]


def test_a_pipeline_says_what_ran(folder: Path, tmp_path: Path) -> None:
    pipe = pipeline(folder)
    assert pipe.report.stages == ()
    pipe.enable_offload(True)
    pipe.enable_lora([{"path": str(lora(folder, tmp_path / "lora.safetensors")), "strength": 0.5}])
    pipe.enable_cache("Tea", teacache_thresh=0.2, coefficients=[1.0, 0.0, 0.0, 0.0, 0.0])
    video(pipe)
    model, kernels, memory, change, cache, stages, *_ = pipe.report.text().splitlines()
    assert model.startswith("model: diffusion_pytorch_model.safetensors: Wan2.1 T2V")
    assert kernels.startswith("kernels: attention") and kernels.endswith("; computing in float32 on the CPU")
    assert memory == plan_line(pipe) and "0 of 2 blocks" in memory
    assert change.startswith("LoRA: lora.safetensors: 4 of 4 tensors applied (rank 4") and change.endswith("0.5)")
    assert cache == "cache: teacache: off: 2 steps; caches pay from 9 on"
    assert [part.split()[0] for part in stages.removeprefix("stages: ").split(", ")] == ["encode", "sample", "decode"]
    pipe.enable_offload(False)
    pipe.enable_lora([])
    video(pipe)
    assert "offload: none, whole transformers" in pipe.report.text() and "LoRA" not in pipe.report.text()


def plan_line(pipe) -> str:
    assert pipe.memory_plan is not None
    return pipe.memory_plan.line()


def test_the_command_line_prints_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "32", "--width", "48", "--num_frames", "5", "--infer_steps", "1", "--guidance_scale", "1"]
    line = ["generate", "--model_path", str(folder), "--prompt", "a", "--quiet", *size]
    assert main([*line, "--save_result_path", str(tmp_path / "video.mp4")]) == 0
    out = capsys.readouterr().out
    assert "\n  kernels: attention" in out and "\n  stages: encode " in out and ", save " in out
