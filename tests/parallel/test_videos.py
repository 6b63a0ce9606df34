"""Whole videos by several processes are those of one: the last estimate in float32, to 1e-5."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import tiny_hunyuan_folder
from closeness import relative_error
from demo.shipped import NIGHT, SHIPPED
from host.tiny_models import TI2V, write_tiny_models, write_transformer
from lightx2v import LightX2VPipeline
from ranks import Ranks
from tiny_vae import tiny_vae22

# 45 tokens, which nothing divides: 3 latent frames of 3 x 5.
SMALL: Mapping[str, Any] = {"height": 48, "width": 80, "num_frames": 9, "infer_steps": 3}
ULYSSES, RING, CFG = {"seq_p_size": 2}, {"seq_p_size": 2, "seq_p_attn_type": "ring"}, {"cfg_p_size": 2}
BOTH, ALL = {"seq_p_size": 4, "ulysses_p_size": 2}, {"seq_p_size": 2, "cfg_p_size": 2}


def t2v(folder: Path) -> LightX2VPipeline:
    """With little guidance: by 4 the difference of two exact attentions, on one process, grows to 2.5e-5."""
    return SHIPPED["t2v"].pipeline(**SMALL, guidance_scale=2.0)


def wrapped(folder: Path) -> LightX2VPipeline:
    """Steps skipped, a LoRA beside weights in 8 bits, blocks that pass through."""
    pipe = SHIPPED["t2v"].pipeline(**{**SMALL, "infer_steps": 10})
    pipe.enable_quantize(dit_quantized=True, quant_scheme="int8")
    pipe.enable_lora([{"path": NIGHT}], lora_dynamic_apply=True)
    pipe.enable_cache("Tea", coefficients=[[1.0, 0.0], [1.0, 0.0]], teacache_thresh=0.2)
    pipe.enable_offload(True, "block")
    return pipe


def mag(folder: Path) -> LightX2VPipeline:
    pipe = SHIPPED["t2v"].pipeline(**{**SMALL, "infer_steps": 10})
    pipe.enable_cache("Mag", magcache_ratios=[[1.0, *[0.98] * 9], [1.0, *[0.9] * 9]])
    return pipe


def i2v(folder: Path) -> LightX2VPipeline:
    return SHIPPED["i2v"].pipeline(**SMALL, resize_mode="fixed_shape")


def moe(folder: Path) -> LightX2VPipeline:
    """The second expert without guidance."""
    pipe = SHIPPED["moe"].pipeline(**{**SMALL, "infer_steps": 4}, guidance_scale=[4.0, 1.0], boundary_step_index=2)
    pipe.enable_offload(True, "block")
    return pipe


def ti2v(folder: Path) -> LightX2VPipeline:
    """From a picture: the frames have timesteps of their own. 3 x 4 tokens a frame."""
    pipe = LightX2VPipeline(folder / "ti2v", "wan2.2", "i2v")
    pipe.create_generator(height=96, width=128, num_frames=9, infer_steps=3, resize_mode="fixed_shape")
    return pipe


def hunyuan(folder: Path) -> LightX2VPipeline:
    return tiny_hunyuan_folder.pipeline(folder / "original", height=48, width=80, num_frames=9, infer_steps=3)


MODELS: dict[str, Callable[[Path], LightX2VPipeline]] = {
    made.__name__: made for made in (t2v, wrapped, mag, i2v, moe, ti2v, hunyuan)
}


def shown(pipe: LightX2VPipeline, folder: Path, **changes: Any) -> Any:
    """The last estimate and the frames, None but on rank 0; what caches skipped."""
    seen: list[Tensor] = []
    first = {"image_path": folder / "first.png"} if pipe._task == "i2v" else {}
    asked = {"seed": 5, "prompt": 'a red circle says "HI"', "progress": False, **first, **changes}
    made = pipe.generate(return_result_tensor=True, on_step=lambda step, x0: seen.append(x0), **asked)
    return seen[-1].clone() if seen else None, made["video"], [each.skipped for each in pipe.cache_reports]


def made_by(name: str, parallel: Mapping[str, Any], folder: Path) -> Any:
    pipe = MODELS[name](folder)
    pipe.enable_parallel(**parallel)
    # Only rank 0 knows what is asked for.
    return shown(pipe, folder, **({} if pipe._parts.mesh.first else {"seed": 6, "prompt": "", "image_path": None}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    names = write_tiny_models(root)
    (root / "ti2v").mkdir()
    (root / "text_encoders" / names.text_encoder).rename(root / "ti2v" / "models_t5_umt5-xxl-enc.safetensors")
    save_file(tiny_vae22().state_dict(), root / "ti2v" / "Wan2.2_VAE.safetensors")
    write_transformer(root / "ti2v" / "diffusion_pytorch_model.safetensors", TI2V, seed=3)
    tiny_hunyuan_folder.write_folder(root)
    Image.effect_noise((80, 48), 80).convert("RGB").save(root / "first.png")
    return root


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[str], Any]:
    """What one process makes, once each."""
    made: dict[str, Any] = {}
    return lambda name: (
        made.setdefault(name, None) or made.update({name: shown(MODELS[name](folder), folder)}) or made[name]
    )


def check(name: str, found: list[Any], wanted: Any, exact: float = 1e-5) -> None:
    (latents, video, skipped), *others = found
    assert relative_error(latents, wanted[0]) < exact, name
    assert relative_error(video, wanted[1]) < 10 * exact, name
    assert skipped == wanted[2] and (name not in ("wrapped", "mag") or any(skipped[0].values()))
    assert all(other[:2] == (None, None) and other[2] == skipped for other in others), (
        "one has the video, all skip alike"
    )


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("t2v", ULYSSES),
        ("t2v", CFG),
        ("wrapped", ULYSSES),
        ("mag", CFG),
        ("i2v", RING),
        ("ti2v", ULYSSES),
        ("hunyuan", ULYSSES),
    ],
)
def test_two_processes(two: Ranks, alone: Callable[[str], Any], folder: Path, name: str, parallel: Any) -> None:
    check(name, two.run(made_by, name, parallel, folder), alone(name))


@pytest.mark.parametrize(
    ("name", "parallel"), [("t2v", BOTH), ("moe", ALL), ("i2v", ALL), ("ti2v", BOTH), ("hunyuan", BOTH)]
)
def test_four_processes(four: Ranks, alone: Callable[[str], Any], folder: Path, name: str, parallel: Any) -> None:
    check(name, four.run(made_by, name, parallel, folder), alone(name))
