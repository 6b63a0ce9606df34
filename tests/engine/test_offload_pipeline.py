"""Offload through the pipeline and the command line, with a budget, LoRAs and two experts: always the same video."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightx2v import LightX2VPipeline
from lightx2v.__main__ import main
from lightx2v.checkpoint import CheckpointError
from lightx2v.config import Engine
from lightx2v.identify import identify
from lightx2v.offload import Asked, DoesNotFitError, Placing, planned
from lightx2v.offload.placing import held_bytes, ram_bytes
from lightx2v.offload.plan import GB, measure
from tiny_pipeline import SMALL, lora, pipeline, plan_of, video, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("wan"))


def test_a_budget_lets_some_blocks_stay(folder: Path) -> None:
    pipe = pipeline(folder)
    expected = video(pipe)
    assert pipe.memory_plan is None, "nothing is planned on a CPU unless it is asked for"
    pipe.enable_offload(True)
    assert torch.equal(video(pipe), expected)
    least = plan_of(pipe)
    assert (least.resident, least.prefetch) == (0, 1) and least.streamed == 2 and least.ram
    (network,) = pipe._parts._transformers
    assert least.ram == measure(network).total
    sizes, vae = measure(network), held_bytes(pipe._parts.vae())
    whole = least.peak - vae - 2 * max(sizes.blocks) + sum(sizes.blocks)
    for budget, stays in ((whole, 2), (whole - 1, 0)):
        pipe.enable_offload(True, vram_budget_gb=(budget + 0.5) / GB)
        assert torch.equal(video(pipe), expected)
        made = plan_of(pipe)
        assert made.peak <= budget and made.resident == stays and made.vae == "visits"
        assert made.tile == (128 if stays else 0) and made.text_encoder == "cpu"
    pipe.enable_offload(False)
    assert torch.equal(video(pipe), expected) and pipe.memory_plan is None


def test_what_does_not_fit_is_said_and_the_pipeline_goes_on(folder: Path) -> None:
    pipe = pipeline(folder)
    expected = video(pipe)
    pipe.enable_offload(True, vram_budget_gb=0.1)
    with pytest.raises(DoesNotFitError, match=r"0\.6 GB of GPU memory are needed at least .* 0\.1 GB may be used"):
        video(pipe)
    pipe.enable_offload(True)
    assert torch.equal(video(pipe), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_loras_come_go_and_change(folder: Path, tmp_path: Path, dynamic: bool) -> None:
    path = lora(folder, tmp_path / "lora.safetensors")
    resident, streamed = pipeline(folder), pipeline(folder)
    streamed.enable_offload(vae_offload=True)
    seen, read = [], set()
    for strength in (0.0, 1.0, 0.5, None):
        for pipe in (resident, streamed):
            configs = [] if strength is None else [{"path": str(path), "strength": strength}]
            pipe.enable_lora(configs, lora_dynamic_apply=dynamic)
        expected = video(resident)
        assert torch.equal(video(streamed), expected)
        seen.append(expected)
        read.add(streamed._parts._transformers)
    assert len(read) == 1, "one network for all strengths, read once"
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[3], video(pipeline(folder)))


def test_two_experts(folder: Path, tmp_path: Path) -> None:
    source = folder / "diffusion_pytorch_model.safetensors"
    paths = {role: tmp_path / f"wan2.2_t2v_{role}_noise.safetensors" for role in ("high", "low")}
    for path in paths.values():
        path.write_bytes(source.read_bytes())
    options = {f"{role}_noise_original_ckpt": path for role, path in paths.items()}
    pipe = LightX2VPipeline(folder, "wan2.2_moe", **options)
    change = lora(folder, tmp_path / "lora.safetensors")
    pipe.enable_lora([{"path": str(change), "name": "low_noise_model"}])
    pipe.create_generator(**SMALL, boundary_step_index=1)
    expected = video(pipe)
    pipe.enable_offload(True)
    assert torch.equal(video(pipe), expected) and torch.equal(video(pipe), expected)
    assert plan_of(pipe).ram == sum(measure(network).total for network in pipe._parts._transformers)


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--save_result_path", str(tmp_path / "video.mp4"), "--quiet"]
    size = ["--height", "32", "--width", "48", "--num_frames", "5", "--infer_steps", "1", "--guidance_scale", "1"]
    line = ["generate", "--model_path", str(folder), "--prompt", "a", *size, *out]
    assert main([*line, "--offload", "block"]) == 0
    assert "memory: 0 of" in capsys.readouterr().out
    assert main([*line, "--offload", "block", "--vram_budget_gb", "0.2"]) == 1
    assert "0.6 GB of GPU memory are needed at least" in capsys.readouterr().err
    assert main([*line, "--offload", "none"]) == 0 and "memory:" not in capsys.readouterr().out


def test_which_settings_are_planned(folder: Path) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert {how for how in ("none", "model", "block", "auto") if planned(Engine(offload=how), cpu)} == {"block"}
    assert {how for how in ("none", "model", "block", "auto") if planned(Engine(offload=how), cuda)} == {
        "block",
        "auto",
    }
    info = identify(folder / "diffusion_pytorch_model.safetensors")
    asked, auto = Asked((1, 16, 2, 4, 6), free=10**12), Engine(offload="auto")
    placing = Placing(cpu)
    assert placing.plan(auto, [info], [], asked).whole, "from the header alone"
    assert not placing.plan(auto, [info], [], replace(asked, free=610_000_000)).whole
    plain = placing.plan(auto, [info], [], asked).peak
    assert placing.plan(auto, [info], [], replace(asked, cached=True)).peak > plain
    with pytest.raises(CheckpointError):
        identify(folder / "Wan2.1_VAE.safetensors")
    free, total = ram_bytes()
    assert 0 < free <= total
