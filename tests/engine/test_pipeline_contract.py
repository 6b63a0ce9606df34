"""What users of LightX2V write runs here: LightX2V's documented calls, block by block, on small models.

The calls below are those of its documents in words of our own. Where the document itself lies beside this repository,
its blocks are run too.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

import tiny_hunyuan_folder
from blocks import SMALL, Small, Stage, blocks, statements
from demo.shipped import BASE, I2V
from dev.environment import REPOSITORY
from tiny_vae import tiny_tae
from tiny_wan import quantised

DOCUMENT = REPOSITORY.parent / "shared" / "reference" / "pipeline-api.md"
PICTURE = REPOSITORY / "workflows" / "images" / "lightx2v_start.png"
CALLS = """
# A video from a prompt
from lightx2v import LightX2VPipeline
pipe = LightX2VPipeline(model_path="/path/to/Wan2.1-T2V-14B", model_cls="wan2.1", task="t2v")
pipe.create_generator(attn_mode="sage_attn2", infer_steps=40, height=480, width=832, num_frames=81,
                      guidance_scale=6.0, sample_shift=8.0)
pipe.generate(seed=1, prompt="a red circle", negative_prompt="a blue square", save_result_path="/path/to/output.mp4")

# Experts by name
pipe = LightX2VPipeline(model_path="/path/to/Wan2.2-I2V-A14B", model_cls="wan2.2_moe", task="i2v",
                        high_noise_original_ckpt="/path/to/high_noise_model.safetensors",
                        low_noise_original_ckpt="/path/to/low_noise_model.safetensors")

# Settings from a file
pipe.create_generator(config_json="configs/wan/wan_t2v.json", attn_mode="auto")

# Every setting by hand
pipe.create_generator(attn_mode="flash_attn2", infer_steps=40, num_frames=81, height=480, width=832, guidance_scale=6.0,
                      sample_shift=8.0, fps=16, aspect_ratio="16:9", boundary=0.9, boundary_step_index=2,
                      denoising_step_list=[1000, 750, 500, 250])

# Offload, in both granularities
pipe.enable_offload(cpu_offload=True, offload_granularity="block", text_encoder_offload=True,
                    image_encoder_offload=False, vae_offload=False)

pipe.enable_offload(cpu_offload=True, offload_granularity="phase", text_encoder_offload=False,
                    image_encoder_offload=False, vae_offload=True)

# Nothing quantised
pipe.enable_quantize(dit_quantized=False, text_encoder_quantized=False, image_encoder_quantized=False,
                     dit_quantized_ckpt=None, low_noise_quantized_ckpt=None, high_noise_quantized_ckpt=None,
                     text_encoder_quantized_ckpt=None, image_encoder_quantized_ckpt=None, quant_scheme="fp8-sgl")

# HunyuanVideo-1.5: transformer and text encoder in fp8
pipe.enable_quantize(quant_scheme="fp8-sgl", dit_quantized=True, text_encoder_quantized=True,
                     dit_quantized_ckpt="/path/to/hy15_720p_i2v_fp8_e4m3_lightx2v.safetensors",
                     text_encoder_quantized_ckpt="/path/to/hy15_qwen25vl_llm_encoder_fp8_e4m3_lightx2v.safetensors")

# Wan2.1 i2v in fp8
pipe.enable_quantize(dit_quantized=True,
                     dit_quantized_ckpt="/path/to/wan2.1_i2v_480p_scaled_fp8_e4m3_lightx2v_4step.safetensors")

# Wan2.2 i2v, both experts in fp8
pipe.enable_quantize(
    dit_quantized=True,
    high_noise_quantized_ckpt="/path/to/wan2.2_i2v_A14b_high_noise_scaled_fp8_e4m3_lightx2v_4step_1030.safetensors",
    low_noise_quantized_ckpt="/path/to/wan2.2_i2v_A14b_low_noise_scaled_fp8_e4m3_lightx2v_4step.safetensors")

# TeaCache with published figures
pipe.enable_cache(cache_method="Tea", teacache_thresh=0.2,
                  coefficients=[-3.08907507e+04, 1.67786188e+04, -3.19178643e+03, 2.60740519e+02, -8.19205881e+00, 0.1])

# MagCache
pipe.enable_cache(cache_method="Mag", magcache_thresh=0.24, magcache_K=2, magcache_retention_ratio=0.2)

# The model's own VAE
pipe.enable_lightvae(use_lightvae=False, use_tae=False, vae_path=None, tae_path=None)

# A tiny autoencoder
pipe.enable_lightvae(use_tae=True, tae_path="/path/to/lighttaew2_1.safetensors", use_lightvae=False, vae_path=None)

# A tiny autoencoder of HunyuanVideo-1.5
pipe.enable_lightvae(use_tae=True, tae_path="/path/to/lighttaehy1_5.safetensors", use_lightvae=False, vae_path=None)

# A LoRA, then none
pipe.enable_lora([{"path": "/path/to/lora.safetensors", "strength": 0.8}], lora_dynamic_apply=True)
pipe.switch_lora("")
"""
PARALLEL = 'pipe.enable_parallel(seq_p_size=4, seq_p_attn_type="ulysses")'


def linked(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk
        target.write_bytes(source.read_bytes())
    return target


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A small file behind every path of the documents."""
    root = tmp_path_factory.mktemp("contract")
    hunyuan = tiny_hunyuan_folder.write_folder(root)
    transformer = hunyuan / tiny_hunyuan_folder.PLACES["original"]["transformer"]
    language = hunyuan / tiny_hunyuan_folder.PLACES["original"]["language"]
    a14b = root / "Wan2.2-I2V-A14B"
    for path in (path for path in BASE.rglob("*") if path.is_file() and not path.name.startswith("diffusion_pytorch")):
        linked(path, a14b / path.relative_to(BASE))
    for name in ("high_noise_model.safetensors", "low_noise_model.safetensors"):
        linked(I2V, a14b / name)
    tiny = root / "lighttaehy1_5.safetensors"
    tiny_hunyuan_folder.write(tiny_tae("lighttaehy1_5", (12, 10, 8, 6)).state_dict(), tiny)
    (root / "wan_t2v.json").write_text(
        '{"infer_steps": 50, "target_video_length": 81, "text_len": 512, "target_height": 480, "target_width": 832, '
        '"self_attn_1_type": "flash_attn3", "cross_attn_1_type": "flash_attn3", "cross_attn_2_type": "flash_attn3", '
        '"sample_guide_scale": 6, "sample_shift": 8, "enable_cfg": true, "cpu_offload": false}',
        encoding="utf-8",
    )
    experts = {
        f"wan2.2_i2v_A14b_{role}_noise_scaled_fp8_e4m3_lightx2v_4step{end}.safetensors": I2V
        for role, end in (("low", ""), ("high", "_1030"))
    }
    named = {
        "Wan2.1-T2V-14B": BASE,
        "Wan2.2-I2V-A14B": a14b,
        "high_noise_model.safetensors": a14b / "high_noise_model.safetensors",
        "low_noise_model.safetensors": a14b / "low_noise_model.safetensors",
        "output.mp4": root / "output.mp4",
        "hy15_720p_i2v_fp8_e4m3_lightx2v.safetensors": quantised(
            transformer, root / "hy15_720p_i2v_fp8.safetensors", "_attn_", "mlp"
        ),
        "hy15_qwen25vl_llm_encoder_fp8_e4m3_lightx2v.safetensors": quantised(
            language, root / "qwen25vl_fp8.safetensors", "_proj"
        ),
        "wan2.1_i2v_480p_scaled_fp8_e4m3_lightx2v_4step.safetensors": I2V,
        **{name: linked(path, root / name) for name, path in experts.items()},
        "lighttaew2_1.safetensors": I2V.parent / "taew2_1_demo.safetensors",
        "lighttaehy1_5.safetensors": tiny,
        "lora.safetensors": BASE.parent / "loras" / "wan_t2v_night_lora_rank8.safetensors",
    }
    places = {f"/path/to/{name}": path for name, path in named.items()}
    return Stage({**places, "configs/wan/wan_t2v.json": root / "wan_t2v.json", "HunyuanVideo-1.5": hunyuan})


def pipeline(stage: Stage, code: str) -> Small:
    """The pipeline that a reader of this code has by then: of the model that it speaks of."""
    task = "i2v" if re.search("i2v", code, re.IGNORECASE) else "t2v"
    if re.search(r"hunyuan|hy1", code, re.IGNORECASE):
        pipe = Small(stage.places["HunyuanVideo-1.5"], "hunyuan_video_1.5", task)
    elif "_noise_" in code and "quantized=True" in code:
        pipe = Small(stage.places["/path/to/Wan2.2-I2V-A14B"], "wan2.2_moe", task)
    else:
        pipe = Small(BASE, "wan2.1", task, dit_original_ckpt=I2V if task == "i2v" else None)
    pipe.create_generator()
    return pipe


def clip(pipe: Small) -> torch.Tensor:
    first = PICTURE if pipe._task == "i2v" else None
    made = pipe.generate(prompt="a red circle", image_path=first, return_result_tensor=True, progress=False)["video"]
    assert made is not None and made.shape[0] == 5 and made.std() > 0.001 and made.isfinite().all()
    return made


def check_refusals(code: str, refused: list[str]) -> None:
    """Kernels of packages and GPUs that are not here raise by name, and say what would run."""
    named = re.findall(r'attn_mode="(?!auto)(\w+)"', code)
    assert len(refused) == len(named), refused
    for name, why in zip(named, refused, strict=True):
        assert f"backend '{name}' cannot run on cpu" in why and "needs an NVIDIA GPU" in why and "use auto" in why


def run(stage: Stage, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """The pipeline after this code, which made a video with it."""
    if "enable_parallel" in code:
        with pytest.raises(ValueError, match=r"ulysses=4 cannot share the 2 heads"):  # tests/parallel runs it
            stage.run(code, folder, monkeypatch, pipe=pipeline(stage, code))
        return pipeline(stage, "")
    given = {} if "LightX2VPipeline(" in code else {"pipe": pipeline(stage, code)}
    pipe: Small = stage.run(code, folder, monkeypatch, **given)["pipe"]
    if pipe._request.sampling.steps != SMALL["infer_steps"]:  # nothing in the code has made the generator
        pipe.create_generator()
    if not torch.cuda.is_available():
        check_refusals(code, pipe.refused)
    clip(pipe)
    return pipe


@pytest.mark.parametrize("code", CALLS.strip().split("\n\n"), ids=lambda code: code.splitlines()[0].strip("# "))
def test_every_call_works(code: str, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = run(stage, code, tmp_path, monkeypatch)
    if "output.mp4" in code:
        assert stage.places["/path/to/output.mp4"].stat().st_size > 500
    if "lora" not in code:
        assert not pipe._loras


def test_heads_that_gpus_cannot_share(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(stage, PARALLEL, tmp_path, monkeypatch)


def documented() -> list[str]:
    """None where the document is not."""
    return blocks(DOCUMENT.read_text(encoding="utf-8")) if DOCUMENT.is_file() else []


@pytest.mark.skipif(not DOCUMENT.is_file(), reason=f"LightX2V's document is not at {DOCUMENT}")
@pytest.mark.parametrize("index", range(len(documented())))
def test_every_block_of_the_document_runs(
    index: int, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block whole where it makes its own pipeline; else statement by statement, each on the model it is of."""
    code = documented()[index]
    for part in [code] if "LightX2VPipeline(" in code else list(statements(code)):
        run(stage, part, tmp_path, monkeypatch)


def test_the_document_was_found_whole() -> None:
    if DOCUMENT.is_file():
        assert len(documented()) == 9
    names = set(re.findall(r"pipe\.(\w+)\(", CALLS + PARALLEL))
    told = set(re.findall(r"pipe\.(\w+)\(", "".join(documented())))
    assert told <= names, "a method of the document has no call here"
