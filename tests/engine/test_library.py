"""The pipeline as a library: names, calls in any order, changes for one video, several in one process, the doctor."""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dev.environment import REPOSITORY
from host.tiny_models import write_transformer
from lightx2v import LightX2VPipeline
from lightx2v.__main__ import main
from lightx2v.checkpoint import CheckpointError
from pyproject import read_pyproject
from tiny_wan import DIT, SMALL, T5, pipeline, quantised, video, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models"))


PUBLIC = [name for name, _ in inspect.getmembers(LightX2VPipeline, inspect.isfunction) if not name.startswith("_")]


@pytest.mark.parametrize("method", [*(name for name in PUBLIC if name != "calibrate"), "__init__"])
def test_a_name_that_a_method_lacks_is_an_error_with_the_nearest(folder: Path, method: str) -> None:
    parameters = [name for name in inspect.signature(getattr(LightX2VPipeline, method)).parameters if name != "self"]
    name = parameters[-1]
    slip = name[:-1] + "x"
    call: Callable[..., Any] = LightX2VPipeline if method == "__init__" else getattr(pipeline(folder), method)
    positional = [folder] if method == "__init__" else []
    with pytest.raises(TypeError, match=rf"{method}\(\) has no argument '{slip}'; it has .*did you mean '{name}'\?"):
        call(*positional, **{slip: 1})


def test_every_public_method_checks_its_names() -> None:
    assert {"generate", "create_generator", "enable_quantize", "enable_parallel", "switch_lora"} <= set(PUBLIC)
    assert all(hasattr(getattr(LightX2VPipeline, name), "__wrapped__") for name in (*PUBLIC, "__init__"))


def test_calibrate_hands_its_names_on(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"generate\(\) has no argument 'image_pat'.*did you mean 'image_path'"):
        pipeline(folder).calibrate(["a"], image_pat="x.png")


def test_what_only_lightx2v_has_is_refused_in_words(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline(folder)
    with pytest.raises(
        NotImplementedError, match=r"audio_path='song\.wav': no model that listens.*leave audio_path out"
    ):
        pipe.generate(audio_path="song.wav")  # type: ignore[call-arg]
    with pytest.raises(NotImplementedError, match=r"src_video='a\.mp4'"):
        pipe.generate(src_video="a.mp4")  # type: ignore[call-arg]
    video(pipe, audio_path=None, src_ref_images="", target_shape=[])
    with pytest.raises(ValueError, match="transformer_model_name='480p_t2v': only HunyuanVideo"):
        LightX2VPipeline(folder, transformer_model_name="480p_t2v")
    LightX2VPipeline(folder, transformer_model_name=None, sf_model_path=None)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"ulysses 2 x cfg 2 takes 4 processes.*torchrun --nproc_per_node 4"):
        pipe.enable_parallel(cfg_p_size=2, seq_p_size=2)
    with pytest.raises(ValueError, match=r"ulysses=4 cannot share the 2 heads of Wan2.1 T2V: choose 2, or ring"):
        pipe.enable_parallel(seq_p_size=4)
    pipe.enable_parallel()
    with caplog.at_level(logging.WARNING):
        pipe.create_generator(**SMALL, aspect_ratio="16:9", rope_type="torch_real_rope")  # type: ignore[call-arg]
    assert "aspect_ratio='16:9' changes nothing: height and width" in caplog.text


def test_a_checkpoint_that_the_class_has_no_place_for_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wan2\.1 has one transformer: give dit_original_ckpt, or choose another"):
        LightX2VPipeline(folder, high_noise_original_ckpt=folder / DIT)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"low_noise_original_ckpt": str(folder / DIT)}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"low_noise_original_ckpt=.*wan2\.1 has one transformer"):
        LightX2VPipeline(folder).create_generator(config_json=path)
    with pytest.raises(ValueError, match=r"wan2\.2_moe has two experts: give high_noise_original_ckpt and low_noise"):
        LightX2VPipeline(folder, "wan2.2_moe", dit_original_ckpt=folder / DIT)


def test_support_tasks(folder: Path) -> None:
    pipe = LightX2VPipeline(folder, support_tasks=["t2v"])
    pipe.create_generator(**SMALL)
    video(pipe, task="t2v")
    with pytest.raises(ValueError, match="task='i2v' is not supported yet; known: t2v"):
        video(pipe, task="i2v")
    with pytest.raises(ValueError, match=r"task of wan2\.1='t2i'.*did you mean 't2v'"):
        LightX2VPipeline(folder, support_tasks=["t2i"])
    with pytest.raises(CheckpointError, match="which does t2v, not i2v"):
        LightX2VPipeline(folder, support_tasks=["i2v"])


def test_changes_for_one_video_are_those_of_create_generator(folder: Path) -> None:
    pipe = pipeline(folder)
    plain = video(pipe)
    for change, size in (
        ({"infer_steps": 3}, (5, 32, 48)),
        ({"height": 48, "width": 32}, (5, 48, 32)),
        ({"num_frames": 9}, (9, 32, 48)),
        ({"guidance_scale": 1.0}, (5, 32, 48)),
        ({"sample_shift": 2.0}, (5, 32, 48)),
    ):
        changed = video(pipe, **change)
        assert changed.shape[:3] == size
        assert changed.shape != plain.shape or not torch.equal(changed, plain), change
        assert torch.equal(changed, video(pipeline(folder, **change))), change
    assert torch.equal(video(pipe, target_shape=[48, 32]), video(pipe, height=48, width=32))
    assert torch.equal(video(pipe), plain), "the next video is as before"
    with pytest.raises(ValueError, match=r"target_shape=\[48, 32\]: give \[height, width\]"):
        video(pipe, target_shape=[48, 32], height=16)


def test_steps_of_a_distilled_model_are_its_list(folder: Path) -> None:
    pipe = LightX2VPipeline(folder, "wan2.1_distill")
    pipe.create_generator(**{**SMALL, "infer_steps": 4}, guidance_scale=1)
    assert torch.equal(video(pipe, infer_steps=4), video(pipe))
    with pytest.raises(ValueError, match=r"infer_steps=8: a distilled model walks denoising_step_list=\[1000, 750"):
        video(pipe, infer_steps=8)


def test_metadata(folder: Path, tmp_path: Path) -> None:
    made = pipeline(folder).generate(
        7, "a red circle", "blue", tmp_path / "a.mp4", num_frames=6, fps=8, guidance_scale=[2, 3], progress=False
    )
    told = made["metadata"]
    assert made["video"] is None and (tmp_path / "a.mp4").stat().st_size
    assert set(told.pop("seconds")) == {"encode", "sample", "decode", "save"}
    assert told == {
        "model": "Wan2.1 T2V",
        "model_cls": "wan2.1",
        "task": "t2v",
        "prompt": "a red circle",
        "negative_prompt": "blue",
        "seed": 7,
        "width": 48,
        "height": 32,
        "num_frames": 5,
        "fps": 8,
        "steps": 2,
        "scheduler": "unipc",
        "guidance_scale": [2.0, 3.0],
        "sample_shift": 5.0,
    }


def test_the_order_of_calls_changes_nothing(folder: Path, tmp_path: Path) -> None:
    wan = Path(shutil.copytree(folder, tmp_path / "wan"))
    other = quantised(wan / DIT, wan / "fp8" / "model_fp8.safetensors", "_attn.", "ffn.")
    parts = {"A": torch.ones(4, 256), "B": torch.full((256, 4), 0.05)}
    names = {f"diffusion_model.blocks.0.self_attn.q.lora_{part}.weight": matrix for part, matrix in parts.items()}
    lora = tmp_path / "lora.safetensors"
    save_file(names, lora)
    figures = {"coefficients": [[1.0, 0.0], [1.0, 0.0]], "teacache_thresh": 0.2}
    calls: dict[str, Callable[[LightX2VPipeline], None]] = {
        "create": lambda pipe: pipe.create_generator(**{**SMALL, "infer_steps": 4}),
        "offload": lambda pipe: pipe.enable_offload(True, "model"),
        "cache": lambda pipe: pipe.enable_cache("Tea", **figures),
        "lora": lambda pipe: pipe.enable_lora([{"path": lora, "strength": 0.5}]),
        "vae": lambda pipe: pipe.enable_lightvae(vae_path=wan / "Wan2.1_VAE.safetensors"),
        "quantize": lambda pipe: pipe.enable_quantize(dit_quantized=True, dit_quantized_ckpt=other),
    }

    def made(order: tuple[str, ...], path: Path = wan) -> torch.Tensor:
        pipe = LightX2VPipeline(path)
        for name in order:
            calls[name](pipe)
        clip = video(pipe)
        assert len(pipe.cache_reports) == 1, "the cache is in use"
        return clip

    orders = [*itertools.islice(itertools.permutations(calls), 0, 720, 187), tuple(reversed(calls))]
    first = made(tuple(calls))
    assert not torch.equal(first, video(pipeline(wan, infer_steps=4)))
    for order in orders:
        assert torch.equal(made(order), first), order
    for name in ("lora", "quantize"):
        assert not torch.equal(made(tuple(one for one in calls if one != name)), first), f"{name} counts"
    (wan / DIT).unlink()
    bare = tuple(name for name in calls if name not in ("create", "quantize"))
    assert torch.equal(made((*bare, "quantize", "create")), first), "before it is known which transformer it is"


def test_a_config_file_makes_what_its_arguments_make(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {
        "infer_steps": 3,
        "target_height": 48,
        "target_width": 32,
        "target_video_length": 5,
        "sample_guide_scale": [3, 3],
        "enable_cfg": True,
        "sample_shift": 8,
        "fps": 24,
        "self_attn_1_type": "reference",
        "cpu_offload": True,
        "offload_granularity": "model",
        "feature_caching": "Tea",
        "coefficients": [[1.0, 0.0], [1.0, 0.0]],
        "text_len": 512,
        "dim": 5120,
        "seed": 3,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    pipe = LightX2VPipeline(folder)
    with caplog.at_level(logging.WARNING):
        pipe.create_generator(config_json=path)
    assert "seed (give it to" in caplog.text and "dim=5120 (the checkpoint has 256)" in caplog.text
    by_hand = LightX2VPipeline(folder)
    by_hand.create_generator("reference", 3, 48, 32, 5, 3, 8, 24)
    by_hand.enable_cache("Tea", coefficients=settings["coefficients"])  # type: ignore[arg-type]
    clip = video(pipe)
    assert clip.shape == (5, 48, 32, 3) and torch.equal(clip, video(by_hand))
    assert pipe.cache_reports

    pipe.create_generator(config_json=path, width=48, infer_steps=50)  # 50: also a default
    told = pipe.generate(return_result_tensor=True, infer_steps=2, progress=False)["metadata"]
    assert (told["width"], told["height"], told["fps"], pipe.describe()) == (48, 48, 24, pipe.describe())
    assert "50 unipc steps" in pipe.describe()

    asked = LightX2VPipeline(folder)
    asked.enable_cache("None")
    asked.create_generator(config_json=path)
    video(asked)
    assert not asked.cache_reports, "a method that was called wins over the file"

    path.write_text(json.dumps({**settings, "feature_caching": "NoCaching", "infer_steps": 2}), encoding="utf-8")
    pipe.create_generator(config_json=path)
    video(pipe)
    path.write_text(json.dumps({"infer_steps": 2, "target_height": 32, "target_width": 48, "target_video_length": 5}))
    pipe.create_generator(config_json=path)
    video(pipe)
    assert not pipe.cache_reports


def test_a_config_file_names_checkpoints(folder: Path, tmp_path: Path) -> None:
    other = write_transformer(tmp_path / "other.safetensors", seed=5)
    path = tmp_path / "config.json"
    size = {"infer_steps": 2, "target_height": 32, "target_width": 48, "target_video_length": 5}
    path.write_text(json.dumps({**size, "dit_original_ckpt": "other.safetensors"}), encoding="utf-8")
    pipe = LightX2VPipeline(folder)
    pipe.create_generator(config_json=path)
    named = LightX2VPipeline(folder, dit_original_ckpt=other)
    named.create_generator(**SMALL)
    assert torch.equal(video(pipe), video(named))
    quantised(other, tmp_path / "other_fp8.safetensors", "_attn.", "ffn.")
    path.write_text(json.dumps({**size, "dit_quantized": True, "dit_quantized_ckpt": "other_fp8.safetensors"}))
    pipe.create_generator(config_json=path)
    named.enable_quantize(dit_quantized=True, dit_quantized_ckpt=tmp_path / "other_fp8.safetensors")
    assert torch.equal(video(pipe), video(named))


def test_pipelines_of_different_dtypes_share_nothing(folder: Path) -> None:
    def made(dtype: str) -> torch.Tensor:
        return video(pipeline(folder, dtype=dtype))

    def settings() -> tuple[object, ...]:
        return torch.get_default_dtype(), torch.backends.cudnn.deterministic, torch.get_rng_state().tolist()

    before = settings()
    alone = {dtype: made(dtype) for dtype in ("fp32", "bf16")}
    assert not torch.equal(alone["fp32"], alone["bf16"])
    both = {dtype: pipeline(folder, dtype=dtype) for dtype in alone}
    for dtype in (*alone, *alone):
        assert torch.equal(video(both[dtype]), alone[dtype])
    with ThreadPoolExecutor(2) as threads:
        for _ in range(2):
            clips = dict(zip(alone, threads.map(lambda dtype: video(both[dtype]), alone), strict=True))
            assert all(torch.equal(clips[dtype], alone[dtype]) for dtype in alone)
    assert settings() == before, "nothing global is seeded or set"


def test_the_import_brings_nothing_heavy() -> None:
    heavy = (
        "transformers diffusers flash_attn sageattention sgl_kernel vllm torchao gguf decord torchvision comfy numba"
    )
    script = f"""
import sys
from lightx2v import LightX2VPipeline
print(sorted({{name.split(".")[0] for name in sys.modules}} & set({heavy.split()})))
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stdout + run.stderr


def test_types_are_packaged() -> None:
    data = read_pyproject()["tool"]["setuptools"]["package-data"]
    for package in ("lightx2v", "lightx2v_kernels"):
        assert "py.typed" in data[package] and (REPOSITORY / package / "py.typed").is_file()


def test_the_command_line_takes_a_config_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "config.json", tmp_path / "a.mp4"
    size = {"infer_steps": 2, "target_height": 32, "target_width": 48, "target_video_length": 5}
    path.write_text(json.dumps({**size, "self_attn_1_type": "no_such_attn"}), encoding="utf-8")
    line = ["generate", "--model_path", str(folder), "--prompt", "a", "--save_result_path", str(out), "--quiet"]
    line += ["--config_json", str(path)]
    assert main(line) == 1
    assert "self_attn_1_type='no_such_attn'" in capsys.readouterr().err
    assert main([*line, "--attn_mode", "auto", "--infer_steps", "1"]) == 0
    said = capsys.readouterr().out
    assert "48x32, 5 frames" in said and "1 unipc steps" in said and "decode" in said and out.exists()
    assert main([*line, "--teacache_thresh", "0.1"]) == 1
    assert "teacache_thresh without a cache: give --cache_method Tea" in capsys.readouterr().err


def test_the_doctor_looks_at_machine_and_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"Python {sys.version.split()[0]}" in said and "attention backends for" in said
    assert f"{DIT}: Wan2.1 T2V" in said and f"{T5}: a umT5 text encoder" in said
    assert "image encoder   not here" in said
    assert main(["doctor", str(folder / "nowhere")]) == 1
    assert "not a folder" in capsys.readouterr().err
