"""Caches through LightX2VPipeline and the command line, on a Wan folder of small random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from host.tiny_models import write_tiny_models
from lightx2v import LightX2VPipeline
from lightx2v.__main__ import main

SMALL = {"height": 32, "width": 48, "num_frames": 5, "infer_steps": 10}
FLAGS = ["--height", "32", "--width", "48", "--num_frames", "5", "--infer_steps", "10", "--quiet"]
FIGURES = "diffusion_pytorch_model.cache.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = write_tiny_models(tmp_path / "models")
    wan = tmp_path / "wan"
    wan.mkdir()
    for source, target in (
        (Path("diffusion_models") / names.diffusion_model, "diffusion_pytorch_model.safetensors"),
        (Path("text_encoders") / names.text_encoder, "models_t5_umt5-xxl-enc.safetensors"),
        (Path("vae") / names.vae, "Wan2.1_VAE.safetensors"),
    ):
        (tmp_path / "models" / source).rename(wan / target)
    return wan


def made(pipe: LightX2VPipeline) -> torch.Tensor:
    video = pipe.generate(seed=1, prompt="a red circle", return_result_tensor=True, progress=False)["video"]
    assert video is not None
    return video


def test_lightx2vs_names_calibrate_and_skip(folder: Path) -> None:
    pipe = LightX2VPipeline(folder)
    pipe.create_generator(**SMALL)
    plain = made(pipe)
    with pytest.raises(ValueError, match=r"no cache figures are known for Wan2\.1 T2V; measure them with"):
        pipe.enable_cache(cache_method="Tea")
    pipe.enable_cache(cache_method="Mag", magcache_calibration=True)
    assert torch.equal(made(pipe), plain) and pipe.cache_reports == ()
    assert json.loads((folder / FIGURES).read_text())["roles"]["alone"]["measured"]["steps"] == 10
    pipe.enable_cache(cache_method="Mag", magcache_thresh=0.5, magcache_K=1, magcache_retention_ratio=0.3)
    skipped = made(pipe)
    (report,) = pipe.cache_reports
    assert report.skipped["cond"][0] == 3 and 0 < report.saved <= 0.4 and not torch.equal(skipped, plain)
    pipe.enable_cache("Tea", teacache_thresh=0)
    assert torch.equal(made(pipe), plain) and pipe.cache_reports[0].saved == 0
    pipe.enable_cache("Tea", coefficients=[[0.0], [0.04]], teacache_thresh=0.1)
    made(pipe)
    assert pipe.cache_reports[0].skipped["cond"] == (1, 2, 4, 5, 7, 8)
    pipe.enable_cache("Tea", coefficients=[[0.0], [0.04]], teacache_thresh=0.1, use_ret_steps=True)
    made(pipe)
    assert pipe.cache_reports[0].skipped["uncond"] == (5, 6, 7, 8, 9)
    pipe.enable_cache("None")
    assert torch.equal(made(pipe), plain) and pipe.cache_reports == ()
    with pytest.raises(
        ValueError, match="cache_method='taylorseer' is not supported yet; known: none, nocaching, tea, mag"
    ):
        pipe.enable_cache("TaylorSeer")


def test_the_command_line_calibrates_and_says_what_was_skipped(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = ["generate", "--model_path", str(folder), "--prompt", "a", *FLAGS, "--cache_method", "Tea"]
    generate += ["--save_result_path", str(tmp_path / "a.mp4")]
    assert main(generate) == 1
    assert "python -m lightx2v calibrate" in capsys.readouterr().err
    calibrate = ["calibrate", "--model_path", str(folder), "--prompt", "a", "--prompt", "b", *FLAGS]
    assert main(calibrate) == 0
    assert capsys.readouterr().out.strip().endswith(f"{FIGURES}: measured on 2 prompts")
    measured = json.loads((folder / FIGURES).read_text())["roles"]["alone"]["measured"]
    assert measured["prompts"] == 2 and (measured["width"], measured["scheduler"]) == (48, "unipc")
    assert main([*generate, "--teacache_thresh", "0.4"]) == 0
    assert "  cache: teacache: skips steps " in capsys.readouterr().out
    assert main([*calibrate[:-2], "4", "--quiet"]) == 1, "4 steps"
    assert "7 steps or more of each network" in capsys.readouterr().err
