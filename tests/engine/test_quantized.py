"""Quantised checkpoints of the pipeline: found, named, left again, refused."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import tiny_clip
from host.tiny_models import Input, write_transformer
from lightx2v import LightX2VPipeline
from lightx2v.checkpoint import CheckpointError
from lightx2v_kernels import UnsupportedBackendError
from lightx2v_kernels.machine import importable
from tiny_wan import DIT, SMALL, T5, pipeline, quantised, video, write_folder

WIDTH = tiny_clip.SIZES.hidden_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models"))


def test_quantised_files_are_found_named_and_left_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wan = Path(shutil.copytree(folder, tmp_path / "wan"))
    fp8 = quantised(wan / DIT, wan / "fp8" / DIT, "_attn.", "ffn.")
    int8 = quantised(wan / DIT, tmp_path / "int8.safetensors", "_attn.", "ffn.", dtype=torch.int8)
    text = quantised(wan / T5, wan / "fp8" / "models_t5_umt5-xxl-enc-fp8.safetensors", "attn.", "ffn.")
    pipe = pipeline(wan)
    plain = video(pipe)
    with caplog.at_level(logging.INFO):
        pipe.enable_quantize(dit_quantized=True)
    assert re.search(rf"{re.escape(str(fp8))}: fp8 \(e4m3, a scale a row\)", caplog.text)
    found = video(pipe)
    assert 0 < (found - plain).abs().mean() < 0.05
    assert torch.equal(found, video(_quantised_only(wan, fp8)))
    pipe.enable_quantize(text_encoder_quantized=True)
    packed = video(pipe)
    assert not torch.equal(packed, plain)
    pipe.enable_quantize(text_encoder_quantized=True, text_encoder_quantized_ckpt=text, text_encoder_quant_scheme="fp8")
    assert torch.equal(video(pipe), packed)
    pipe.enable_quantize()
    assert torch.equal(video(pipe), plain)
    caplog.clear()
    pipe.enable_quantize(dit_quantized=True, dit_quantized_ckpt=int8, quant_scheme="fp8")
    assert f"{int8}: quant_scheme is 'fp8', the file is int8; the file decides" in caplog.text


def _quantised_only(wan: Path, fp8: Path) -> LightX2VPipeline:
    """Of a folder that has no plain transformer."""
    bare = wan.parent / "bare"
    if not bare.exists():
        shutil.copytree(wan, bare, ignore=lambda root, names: [DIT, "fp8"])
    pipe = LightX2VPipeline(bare)
    with pytest.raises(CheckpointError, match="no transformer here"):
        pipe.create_generator(**SMALL)
    pipe.enable_quantize(dit_quantized=True, dit_quantized_ckpt=fp8)
    pipe.create_generator(**SMALL)
    return pipe


def test_quantised_experts(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wan = Path(shutil.copytree(folder, tmp_path / "wan"))
    plain = {
        role: write_transformer(wan / f"{role}_noise_model.safetensors", seed=3 + len(role)) for role in ("high", "low")
    }
    fp8 = {role: quantised(path, wan / "fp8" / f"{role}_noise_fp8.safetensors", "ffn.") for role, path in plain.items()}
    pipe = LightX2VPipeline(wan, "wan2.2_moe")
    pipe.create_generator(**SMALL)
    before = video(pipe)
    pipe.enable_quantize(dit_quantized=True)
    found = video(pipe)
    assert not torch.equal(found, before)
    named = {f"{role}_noise_quantized_ckpt": path for role, path in fp8.items()}
    pipe.enable_quantize(dit_quantized=True, **named)
    assert torch.equal(video(pipe), found)
    with pytest.raises(ValueError, match="this model has two experts; give high_noise_quantized_ckpt"):
        pipe.enable_quantize(dit_quantized=True, dit_quantized_ckpt=fp8["high"])
    fp8["low"].unlink()
    with caplog.at_level(logging.INFO):
        pipe.enable_quantize(dit_quantized=True)
    assert f"{plain['low']}: fp32, quantised to fp8 as it is read" in caplog.text
    assert not torch.equal(video(pipe), before)
    plain["low"].unlink()
    with pytest.raises(CheckpointError, match="no low-noise expert here"):
        LightX2VPipeline(wan, "wan2.2_moe").create_generator(**SMALL)


def test_quantised_files_are_refused_in_words(folder: Path, tmp_path: Path) -> None:
    pipe = pipeline(folder)
    plain = video(pipe)
    for arguments, error, message in (
        (
            {"dit_quantized": True, "quant_scheme": "gguf-Q4_0"},
            CheckpointError,
            "no gguf transformer here; looked for .*give dit_quantized_ckpt",
        ),
        (
            {"dit_quantized": True, "quant_scheme": "fp8-triton"},
            UnsupportedBackendError,
            "fp8_linear backend 'triton' cannot run on cpu",
        ),
        (
            {"dit_quantized": True, "quant_scheme": "int8-q8f"},
            UnsupportedBackendError,
            "kernels of q8f are not known here; use 'int8' for the best that is installed, or int8-sgl",
        ),
        ({"dit_quantized": True, "quant_scheme": "none"}, ValueError, "name a format, such as 'fp8'"),
        ({"dit_quantized": True, "dit_quantized_ckpt": folder / DIT}, CheckpointError, "is not quantised, it holds"),
        ({"dit_quantized": True, "dit_quantized_ckpt": tmp_path / "gone.safetensors"}, CheckpointError, "gone"),
        (
            {"dit_quantized": True, "high_noise_quantized_ckpt": "a"},
            ValueError,
            "are of wan2.2_moe; give dit_quantized",
        ),
        ({"quant_scheme": "fp8-sgI"}, ValueError, "quant_scheme='fp8-sgI' is not known; .*did you mean 'fp8-sgl'"),
        ({"quant_scheme": "mxfp4"}, ValueError, "mxfp4.*cannot be read here"),
        (
            {"dit_quantized": True, "quant_scheme": "nvfp4-torchao"},
            UnsupportedBackendError,
            "nvfp4_linear backend .torch_scaled_mm. cannot run on cpu.*sm_100 or newer",
        ),
        ({"text_encoder_quantized": True}, CheckpointError, "looked for models_t5_.*give text_encoder_quantized_ckpt"),
        (
            {"text_encoder_quantized": True, "text_encoder_quantized_ckpt": folder / T5},
            CheckpointError,
            "is not quantised; leave text_encoder_quantized_ckpt",
        ),
    ):
        with pytest.raises(error, match=message):
            pipe.enable_quantize(**arguments)
    assert torch.equal(video(pipe), plain), "what was refused changed nothing"


@pytest.mark.parametrize("scheme", ["fp8", "int8", "nvfp4", "mxfp8"])
def test_a_plain_transformer_is_quantised_as_it_is_read(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, scheme: str
) -> None:
    """Also where the file was named; and it is left again."""
    pipe = pipeline(folder)
    plain = video(pipe)
    with caplog.at_level(logging.INFO):
        pipe.enable_quantize(dit_quantized=True, quant_scheme=scheme)
        found = video(pipe)
    assert re.search(rf"{DIT}: fp\d+, quantised to {scheme} as it is read", caplog.text)
    assert "linear layers: 20 in " in caplog.text
    assert 0 < (found - plain).abs().mean() < 0.05
    named = LightX2VPipeline(folder, dit_original_ckpt=folder / DIT)
    named.create_generator(**SMALL)
    named.enable_quantize(dit_quantized=True, quant_scheme=scheme)
    assert torch.equal(video(named), found)
    pipe.enable_quantize()
    assert torch.equal(video(pipe), plain)


def test_the_image_encoder_is_looked_for_where_there_is_one(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """LightX2V's files of text-to-video switch it on too."""
    with caplog.at_level(logging.INFO):
        pipeline(folder).enable_quantize(image_encoder_quantized=True)
    assert "Wan2.1 T2V has no image encoder: image_encoder_quantized changes nothing" in caplog.text
    dit = write_transformer(tmp_path / "i2v.safetensors", Input(channels=36, clip=WIDTH), num_layers=1)
    pipe = LightX2VPipeline(folder, task="i2v", dit_original_ckpt=dit)
    with pytest.raises(CheckpointError, match=r"looked for models_clip_.*give image_encoder_quantized_ckpt"):
        pipe.enable_quantize(image_encoder_quantized=True)
    tensors = {name: tensor.contiguous() for name, tensor in tiny_clip.original(tiny_clip.state_dict()).items()}
    plain = tmp_path / "models_clip_tiny.safetensors"
    save_file(tensors, plain)
    with pytest.raises(CheckpointError, match="is not quantised; leave image_encoder_quantized_ckpt"):
        pipe.enable_quantize(image_encoder_quantized=True, image_encoder_quantized_ckpt=plain)
    packed = quantised(plain, tmp_path / "models_clip_tiny-int8.safetensors", "attn.", "mlp.", dtype=torch.int8)
    caplog.clear()
    pipe.enable_quantize(image_encoder_quantized=True, image_encoder_quantized_ckpt=packed)
    assert "quant_scheme is 'fp8', the file is int8" in caplog.text
    pipe.create_generator(**SMALL, resize_mode="fixed_shape")
    picture = tmp_path / "a.png"
    Image.new("RGB", (48, 32), "red").save(picture)
    seen = video(pipe, image_path=picture)
    plain.rename(folder / plain.name)
    pipe.enable_quantize()
    try:
        assert not torch.equal(video(pipe, image_path=picture), seen)
    finally:
        (folder / plain.name).unlink()


def test_a_scheme_of_a_package_that_is_not_here_is_its_format(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in LightX2V's own examples, which say fp8-sgl of every file."""
    named, plain = pipeline(folder), pipeline(folder)
    named.enable_quantize(dit_quantized=True, quant_scheme="fp8-sgl")
    plain.enable_quantize(dit_quantized=True, quant_scheme="fp8")
    assert torch.equal(video(named), video(plain))
    if not importable("sgl_kernel"):
        assert "'fp8-sgl': the package sgl_kernel is not installed; the fastest fp8 kernel" in caplog.text
