"""What runs here in place of the real files that some workflows name: the graph stays as it is, at a small size."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import tiny_encoders15
import tiny_hunyuan
import tiny_lora
from dev.environment import REPOSITORY
from host.tiny_models import I2V, TI2V, Input, transformer_shapes, write_transformer
from lightx2v.quant.writing import write_quantised
from tiny_vae import tiny_vae15, tiny_vae22

Api = dict[str, dict[str, Any]]
SIZE = {"width": 128, "height": 128, "length": 17}
DEMO = "wan2.1_t2v/"  # as ComfyUI's own loaders list it in the tests' server
TOKENIZER = REPOSITORY / "demo" / "models" / "wan2.1_t2v" / "google" / "umt5-xxl" / "spiece.model"


@dataclass(frozen=True)
class StandIn:
    """files: real name -> what is used instead; widgets: other values of any node; judged: it draws what is asked."""

    files: Mapping[str, str]
    widgets: Mapping[str, Any] = field(default_factory=dict)
    judged: bool = False


HUNYUAN = {
    "hunyuanvideo1.5_720p_t2v_fp16.safetensors": "workflow_hunyuan.safetensors",
    "hunyuanvideo1.5_720p_i2v_fp16.safetensors": "workflow_hunyuan.safetensors",
    "hunyuanvideo1.5_480p_t2v_fp16.safetensors": "workflow_hunyuan.safetensors",
    "hunyuanvideo1.5_t2v_480p_lightx2v_4step_lora_rank_32_bf16.safetensors": "workflow_lora_hunyuan.safetensors",
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": "workflow_qwen.safetensors",
    "byt5_small_glyphxl_fp16.safetensors": "workflow_byt5.safetensors",
    "sigclip_vision_patch14_384.safetensors": "workflow_siglip.safetensors",
    "hunyuanvideo15_vae_fp16.safetensors": "workflow_vae15.safetensors",
}
QWEN = replace(tiny_encoders15.QWEN, vocab_size=152064, hidden_size=64, num_layers=3)  # ComfyUI's vocabulary
STAND_INS = {
    **{
        name: StandIn(HUNYUAN, {"steps": 4} if name == "hunyuan15_4step" else {"steps": 9})
        for name in ("hunyuan15_i2v", "hunyuan15_4step")
    },
    "wan_t2v_mixed": StandIn(
        {
            "wan2.1_t2v_1.3B_fp16.safetensors": f"{DEMO}diffusion_pytorch_model.safetensors",
            "umt5_xxl_fp8_e4m3fn_scaled.safetensors": f"{DEMO}models_t5_umt5-xxl-enc.safetensors",
            "wan_2.1_vae.safetensors": f"{DEMO}Wan2.1_VAE.safetensors",
        },
        judged=True,
    ),
    "wan22_i2v_moe_4step_lora": StandIn(
        {
            "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors": "workflow_i2v_high_noise.safetensors",
            "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors": "workflow_i2v_low_noise.safetensors",
            "wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors": "workflow_lora_high_noise.safetensors",
            "wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors": "workflow_lora_low_noise.safetensors",
            "umt5_xxl_fp8_e4m3fn_scaled.safetensors": "tiny_umt5.safetensors",
            "wan_2.1_vae.safetensors": "tiny_wan2.1_vae.safetensors",
        }
    ),
    "wan22_ti2v_5b": StandIn(
        {
            "wan2.2_ti2v_5B_fp16.safetensors": "workflow_ti2v.safetensors",
            "umt5_xxl_fp8_e4m3fn_scaled.safetensors": "tiny_umt5.safetensors",
            "wan2.2_vae.safetensors": "workflow_vae22.safetensors",
        },
        {"steps": 10},
    ),
}
RELEASED_STAND_INS = {**STAND_INS, "hunyuan15_t2v": StandIn(HUNYUAN)}  # 0.1.0 had no small model of this kind


def write_stand_ins(models: Path) -> None:
    """The random ones; the other tiny models are there already."""
    folder = models / "diffusion_models"
    write_transformer(folder / "workflow_ti2v.safetensors", TI2V, seed=2, num_layers=1)
    for seed, role in enumerate(("high", "low")):
        # In 8 bits, as the file that it stands for: newer hosts refuse a file that the picker does not list.
        plain = write_transformer(models / f"{role}_noise.safetensors", I2V, seed=seed, num_layers=1)
        write_quantised(plain, folder / f"workflow_i2v_{role}_noise.safetensors", "fp8", "comfy", force=True)
        plain.unlink()
    save_file(tiny_vae22().state_dict(), models / "vae" / "workflow_vae22.safetensors")
    (models / "loras").mkdir(exist_ok=True)
    _write_hunyuan(models)
    for seed, role in enumerate(("high", "low")):
        tiny_lora.write(models / "loras" / f"workflow_lora_{role}_noise.safetensors", _lora(I2V, seed))


def _write_hunyuan(models: Path) -> None:
    eyes = tiny_encoders15.SIGLIP
    config = replace(tiny_hunyuan.CONFIG, num_layers=1, text_dim=QWEN.hidden_size, image_dim=eyes.hidden_size)
    transformer = tiny_hunyuan.make_tiny(config).state_dict()
    written = {
        "diffusion_models/workflow_hunyuan": tiny_hunyuan.to_merged(transformer),
        "loras/workflow_lora_hunyuan": _hunyuan_lora(transformer),
        "text_encoders/workflow_qwen": tiny_encoders15.qwen_state(QWEN),
        "text_encoders/workflow_byt5": tiny_encoders15.byt5_state(),
        "clip_vision/workflow_siglip": tiny_encoders15.siglip_state(eyes),
        "vae/workflow_vae15": tiny_vae15().state_dict(),
    }
    for name, state in written.items():
        path = models / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)


def _hunyuan_lora(transformer: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A pair for the feed-forwards of the blocks, in ComfyUI's names."""
    generator, found = torch.Generator().manual_seed(4), {}
    for name, weight in transformer.items():
        if name.startswith("double_blocks.") and "_mlp." in name and name.endswith(".weight"):
            layer = name.removesuffix(".weight").replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2")
            down = torch.randn(4, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
            found[f"diffusion_model.{layer}.lora_down.weight"] = down
            found[f"diffusion_model.{layer}.lora_up.weight"] = torch.randn(weight.shape[0], 4, generator=generator) / 5
    return found


def _lora(takes: Input, seed: int) -> dict[str, torch.Tensor]:
    """A pair for every matrix of the blocks, in Kijai's dialect."""
    generator, pairs = torch.Generator().manual_seed(seed), {}
    for name, shape in transformer_shapes(takes=takes, num_layers=1).items():
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2:
            down = torch.randn(4, shape[1], generator=generator) * shape[1] ** -0.5
            pairs[name.removesuffix(".weight")] = (down, 0.2 * torch.randn(shape[0], 4, generator=generator))
    return tiny_lora.tensors(pairs, "kijai")


def runnable(name: str, api: Api, stand_ins: Mapping[str, StandIn] = STAND_INS) -> Api:
    """The workflow as it is, or with its stand-ins. AssertionError if it names a file that has none."""
    graph = copy.deepcopy(api)
    if name not in stand_ins:
        return graph
    stand_in = stand_ins[name]
    for node in graph.values():
        inputs = node["inputs"]
        for key, value in inputs.items():
            if isinstance(value, str) and value.endswith(".safetensors"):
                assert value in stand_in.files, f"{name}: {node['_meta']['title']} names {value}"
                inputs[key] = stand_in.files[value]
        if "length" in inputs:
            inputs.update(SIZE)
        inputs.update({key: value for key, value in stand_in.widgets.items() if key in inputs})
        if node["class_type"] == "CLIPLoader":  # it makes umT5 in its published size only
            file = {"file": inputs["clip_name"], "tokenizer": str(TOKENIZER)}
            node.update(class_type="FixtureUmt5Clip", inputs=file)
    return graph
