"""LightX2VPipeline and the command line on a Wan folder of small random weights."""

import logging
from pathlib import Path

import av
import pytest
import torch

from host.tiny_models import write_tiny_models
from lightx2v import LightX2VPipeline
from lightx2v.__main__ import main
from lightx2v.checkpoint import CheckpointError
from lightx2v_kernels import UnsupportedBackendError

SMALL = {"height": 32, "width": 48, "num_frames": 5, "infer_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in Wan's own layout, in a path with a space and a letter outside ASCII."""
    models, wan = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("wan") / "Wan 2.1 é"
    names = write_tiny_models(models)
    wan.mkdir()
    for source, target in (
        (models / "diffusion_models" / names.diffusion_model, "diffusion_pytorch_model.safetensors"),
        (models / "text_encoders" / names.text_encoder, "models_t5_umt5-xxl-enc.safetensors"),
        (models / "vae" / names.vae, "Wan2.1_VAE.safetensors"),
    ):
        source.rename(wan / target)
    return wan


def frames_of(path: Path) -> list:
    with av.open(str(path)) as video:
        return list(video.decode(video=0))


def test_smallest_example(folder: Path, tmp_path: Path) -> None:
    pipe = LightX2VPipeline(model_path=str(folder), model_cls="wan2.1", task="t2v")
    pipe.create_generator(attn_mode="torch_sdpa", guidance_scale=5.0, sample_shift=5.0, **SMALL)
    path = tmp_path / "new folder" / "output.mp4"
    result = pipe.generate(seed=42, prompt="a red circle", negative_prompt="", save_result_path=str(path))
    assert result["video"] is None
    assert [(f.width, f.height) for f in frames_of(path)] == [(48, 32)] * 5
    assert [p.name for p in path.parent.iterdir()] == ["output.mp4"], "nothing half-written stays"


def tensor(pipe: LightX2VPipeline, **changes) -> torch.Tensor:
    arguments = {"seed": 1, "prompt": "a red circle", "return_result_tensor": True, "progress": False, **changes}
    return pipe.generate(**arguments)["video"]


@pytest.fixture(scope="module")
def pipe(folder: Path) -> LightX2VPipeline:
    pipe = LightX2VPipeline(folder)
    pipe.create_generator(**SMALL)
    return pipe


def test_tensor_result(pipe: LightX2VPipeline) -> None:
    video = tensor(pipe)
    assert video.shape == (5, 32, 48, 3)
    assert video.dtype == torch.float32
    assert video.min() >= 0 and video.max() <= 1 and video.std() > 0.01


def test_seed_and_prompt_decide_the_video(pipe: LightX2VPipeline) -> None:
    video = tensor(pipe)
    assert torch.equal(tensor(pipe), video)
    assert not torch.equal(tensor(pipe, seed=2), video)
    assert not torch.equal(tensor(pipe, prompt="a blue square"), video)
    assert not torch.equal(tensor(pipe, negative_prompt="a blue square"), video)


def test_offload_and_attention_can_be_changed_between_videos(folder: Path) -> None:
    pipe = LightX2VPipeline(folder)
    pipe.create_generator(**SMALL)
    video = tensor(pipe)
    for granularity in ("model", "block", "phase", "auto"):
        pipe.enable_offload(True, offload_granularity=granularity, vae_offload=granularity == "phase")
        assert torch.equal(tensor(pipe), video)
        assert (pipe.memory_plan is None) == (granularity in ("model", "auto"))
    pipe.create_generator(attn_mode="reference", **SMALL)
    torch.testing.assert_close(tensor(pipe), video, rtol=0, atol=1e-3)


def test_distilled_class_walks_its_list(folder: Path) -> None:
    pipe = LightX2VPipeline(folder, model_cls="wan2.1_distill")
    pipe.create_generator(**{**SMALL, "infer_steps": 50}, guidance_scale=1.0)
    steps: list[float] = []
    tensor(pipe, on_step=lambda step, x0: steps.append(step.sigma))
    assert steps == pytest.approx([1.0, 0.9375, 0.83333, 0.625], abs=1e-4)


def test_a_hook_can_cancel_and_the_pipeline_goes_on(pipe: LightX2VPipeline) -> None:
    class Cancelled(Exception):
        pass

    def cancel(step, x0) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        tensor(pipe, on_step=cancel)
    assert tensor(pipe).shape == (5, 32, 48, 3)


def test_sizes_are_snapped_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = LightX2VPipeline(folder)
    with caplog.at_level(logging.WARNING):
        pipe.create_generator(height=40, width=50, num_frames=6, infer_steps=1, guidance_scale=1)
    assert "made 48x32, 5 frames" in caplog.text
    assert tensor(pipe).shape == (5, 32, 48, 3)


def test_original_checkpoint_can_be_named(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes((folder / "diffusion_pytorch_model.safetensors").read_bytes())
    pipe = LightX2VPipeline(folder, dit_original_ckpt=other)
    pipe.create_generator(**SMALL)
    assert tensor(pipe).shape == (5, 32, 48, 3)


def test_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_cls='wan3' is not supported yet; known: wan2"):
        LightX2VPipeline(folder, model_cls="wan3")
    with pytest.raises(ValueError, match=r"this is Wan2\.1 T2V, which does t2v, not i2v"):
        LightX2VPipeline(folder, task="i2v")
    with pytest.raises(CheckpointError, match="not a folder"):
        LightX2VPipeline(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no transformer here; looked for diffusion_pytorch_model"):
        LightX2VPipeline(tmp_path).create_generator()
    with pytest.raises(CheckpointError, match=r"a Wan2\.1 VAE, with 16 latent channels; load it with"):
        LightX2VPipeline(folder, dit_original_ckpt=folder / "Wan2.1_VAE.safetensors")
    pipe = LightX2VPipeline(folder)
    with pytest.raises(ValueError, match="offload_granularity='disk' is not one of block, phase, model, auto"):
        pipe.enable_offload(True, offload_granularity="disk")
    with pytest.raises(ValueError, match="vram_budget_gb=-1 must be 0"):
        pipe.enable_offload(True, vram_budget_gb=-1)
    with pytest.raises(ValueError, match="vram_budget_gb=8 without cpu_offload=True changes nothing"):
        pipe.enable_offload(vram_budget_gb=8)
    with pytest.raises(UnsupportedBackendError, match="sage_attn2"):
        pipe.create_generator(attn_mode="sage_attn2", **SMALL)


def test_a_failed_save_leaves_nothing(pipe: LightX2VPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name the file something\.mp4"):
        pipe.generate(prompt="a", save_result_path=tmp_path / "video.png", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cli.mp4"
    size = [f"--{name}={value}" for name, value in SMALL.items()]
    arguments = ["--model_path", str(folder), "--prompt", "a red circle", *size, "--save_result_path", str(path)]
    assert main(["generate", *arguments]) == 0
    printed = capsys.readouterr()
    assert str(path) in printed.out and "48x32, 5 frames" in printed.out
    assert "sample" in printed.err, "a progress bar"
    assert len(frames_of(path)) == 5

    assert main(["generate", *arguments, "--model_path", str(tmp_path)]) == 1
    assert "no transformer here" in capsys.readouterr().err
    assert main(["inspect", str(folder / "diffusion_pytorch_model.safetensors")]) == 0
    assert "Wan2.1 T2V" in capsys.readouterr().out
    assert main(["doctor"]) == 0
    assert "torch_sdpa" in capsys.readouterr().out
