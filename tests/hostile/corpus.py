"""Small valid files of every kind that is read, as tables and as JSON: what the mutators begin with."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from host.tiny_models import train_tokenizer
from hostile.tables import Entry, Table, safetensors, safetensors_header
from hostile.tables import object_text as text_of
from lightx2v.cache.lookup import FORMAT
from lightx2v.models.hunyuan_video_15.config import HunyuanConfig
from lightx2v.models.hunyuan_video_15.transformer import HunyuanTransformer
from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.names import to_diffusers
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v.preview import COLOURS_KEY
from lightx2v.quant.microscaled import for_file
from lightx2v.text import qwen
from lightx2v.text.layout import EMBEDDED_TOKENIZER, Sizes, to_original_layout
from lightx2v.text.umt5 import empty_network
from lightx2v.vae.tae import TAEConfig, TinyVAE
from lightx2v.vae.wan import WanVAE, WanVAEConfig
from lightx2v.vae.wan22 import Wan22VAE, Wan22VAEConfig
from lightx2v.vision import clip, siglip
from lightx2v.vision.layout import Sizes as ImageSizes
from lightx2v_kernels import references
from tiny_encoders15 import byt5_state, qwen_state, siglip_state
from tiny_umt5 import to_fast

State = dict[str, Tensor]
WAN = WanConfig(128, 16, 1, 16, 16, text_dim=16, freq_dim=16, patch_size=(1, 2, 2))
HUNYUAN = HunyuanConfig(128, 16, 1, 1, 16, 65, 32, 16, 16, 16, 16, 16, (1, 1, 1))
IN_BLOCK = (".self_attn.", ".cross_attn.", ".ffn.")


def _drawn(network: nn.Module, dtype: torch.dtype = torch.bfloat16) -> State:
    generator = torch.Generator().manual_seed(0)
    state = network.state_dict()
    return {
        name: (0.1 * torch.randn(t.shape, generator=generator, device="cpu")).to(dtype) for name, t in state.items()
    }


@cache
def wan_network() -> WanTransformer:
    """Without numbers, on the meta device."""
    with torch.device("meta"):
        return WanTransformer(WAN, references())


def _wan() -> State:
    return _drawn(wan_network())


def _quantised(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.ndim == 2 and any(part in name for part in IN_BLOCK)


def _scaled(state: State, dtype: torch.dtype, suffix: str, *, rows: bool) -> State:
    """suffix: what stands for `weight` in the name of its scale."""
    made: State = {}
    for name, tensor in state.items():
        if not _quantised(name, tensor):
            made[name] = tensor
            continue
        scale = (tensor.float().abs().amax(1, keepdim=True) if rows else tensor.float().abs().max()) / 100
        scaled = tensor.float() / scale
        made[name] = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
        made[name.removesuffix("weight") + suffix] = scale
    return made


def _comfy_fp8() -> Table:
    state = _scaled(_wan(), torch.float8_e4m3fn, "weight_scale", rows=False)
    mark = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    state |= {
        name.removesuffix("_scale").removesuffix("weight") + "comfy_quant": mark for name in state if "_scale" in name
    }
    layers = {
        name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for name in state if name.endswith(".ffn.0.weight")
    }
    told = {"_quantization_metadata": json.dumps({"layers": layers}), "model_type": "t2v"}
    return Table.of({f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}, told)


def _nvfp4(layout: str) -> Table:
    made: State = {}
    layers = {}
    for name, tensor in _wan().items():
        if not _quantised(name, tensor):
            made[name] = tensor
            continue
        layer = name.removesuffix("weight")
        made |= {layer + leaf: each for leaf, each in for_file(tensor, "nvfp4", layout, name).items()}
        layers[layer[:-1]] = {"format": "nvfp4"}
    told = {"_quantization_metadata": json.dumps({"layers": layers})} if layout == "comfy" else {}
    return Table.of(made, told)


def _hunyuan(fused: bool) -> State:
    with torch.device("meta"):
        state = _drawn(HunyuanTransformer(HUNYUAN, references()))
    if not fused:
        return state
    made: State = {}
    for name, tensor in state.items():
        if "_attn_q." in name:
            made[name.replace("_attn_q.", "_attn_qkv.")] = torch.cat([tensor] * 3)
        elif "_attn_k." not in name and "_attn_v." not in name:
            made[name] = tensor
    return made


@cache
def transformers() -> tuple[Table, ...]:
    """Wan in its own and diffusers' names, in 8 and 4 bits as ComfyUI and LightX2V do; also HunyuanVideo-1.5's."""
    wan = _wan()
    colours = {COLOURS_KEY: json.dumps([[0.1, 0.2, 0.3]] * 17), "format": "pt"}
    return (
        Table.of(wan, colours),
        Table.of({to_diffusers(name): tensor for name, tensor in wan.items()}),
        _comfy_fp8(),
        Table.of(_scaled(wan, torch.int8, "weight_scale", rows=True)),
        Table.of(_hunyuan(False)),
        Table.of(_hunyuan(True)),
        _nvfp4("comfy"),
        _nvfp4("lightx2v"),
    )


@cache
def gguf_transformer() -> Table:
    """Q8_0 in the blocks; the patch embedding has five axes, which GGML cannot say."""
    entries, metadata = [], dict[str, Any]()
    for entry in Table.of({name: tensor.half() for name, tensor in _wan().items()}).entries:
        if len(entry.shape) > 4:
            metadata[f"comfy.gguf.orig_shape.{entry.name}"] = list(entry.shape)
            shape = (entry.shape[0] * entry.shape[1] * entry.shape[2], *entry.shape[3:])
            entries.append(Entry(entry.name, entry.kind, shape, entry.raw))
        elif (len(entry.shape) == 2 and ".ffn.0.weight" in entry.name) or "self_attn.q.weight" in entry.name:
            blocks = entry.shape[0] * entry.shape[1] // 32
            entries.append(Entry(entry.name, "Q8_0", entry.shape, (b"\0\x14" + bytes(range(32))) * blocks))
        else:
            entries.append(entry)
    return Table(tuple(entries), {**metadata, "general.alignment": 32, "general.name": "a"})


@cache
def vaes() -> Mapping[str, Table]:
    """File name, which of tiny autoencoders says the kind -> table."""
    return {
        "wan.safetensors": Table.of(_drawn(WanVAE(WanVAEConfig(4)))),
        "wan22.safetensors": Table.of(_drawn(Wan22VAE(Wan22VAEConfig(4, 4)))),
        "taew2_1.safetensors": Table.of(_drawn(TinyVAE(TAEConfig("taew2_1", (8, 8, 8, 8))))),
    }


@cache
def text_encoders() -> tuple[Table, ...]:
    """umT5 with its tokenizer inside, in transformers' and Wan's names."""
    sizes = Sizes(vocab_size=256, hidden_size=16, num_heads=2, head_dim=8, ffn_size=16, num_layers=2, num_buckets=4)
    state = _drawn(empty_network(sizes))
    words = {EMBEDDED_TOKENIZER: torch.frombuffer(bytearray(train_tokenizer()), dtype=torch.uint8)}
    return Table.of(state | words), Table.of(to_original_layout(state) | words)


@cache
def image_encoders() -> tuple[Table, ...]:
    size = ImageSizes(hidden_size=80, ffn_size=16, num_layers=2, patch_size=4, grid=2, projection_size=8)
    return (Table.of(_drawn(clip.empty(size))),)


@cache
def encoders15() -> Mapping[str, Table]:
    """Those of HunyuanVideo-1.5."""
    words = Sizes(vocab_size=384, hidden_size=16, num_heads=2, head_dim=8, ffn_size=16, num_layers=2, num_buckets=4)
    sight = siglip.Sizes(hidden_size=72, ffn_size=16, num_layers=2, patch_size=4, grid=2)
    talk = qwen.Sizes(vocab_size=64, hidden_size=128, num_heads=1, num_kv_heads=1, ffn_size=16, num_layers=3)
    return {
        "byt5.safetensors": Table.of({name: t.bfloat16() for name, t in byt5_state(words).items()}),
        "siglip.safetensors": Table.of({name: t.bfloat16() for name, t in siglip_state(sight).items()}),
        "qwen.safetensors": Table.of(
            {name: t.bfloat16() for name, t in qwen_state(talk).items() if "visual" not in name}
        ),
    }


@cache
def tokenizer_json() -> dict[str, Any]:
    """A tokenizer.json of umT5's kind."""
    found: dict[str, Any] = json.loads(to_fast(train_tokenizer()).to_str())
    return found


@cache
def loras() -> tuple[Table, ...]:
    """Of the Wan above: PEFT's names with settings, kohya's with alphas, whole differences."""
    layers = ("blocks.0.self_attn.q", "blocks.0.ffn.0", "head.head")
    shapes = {name: tuple(t.shape) for name, t in wan_network().state_dict().items()}
    peft: State = {}
    kohya: State = {}
    for layer in layers:
        out, into = shapes[f"{layer}.weight"]
        down, up = torch.full((2, into), 0.1), torch.full((out, 2), 0.1)
        peft |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
        flat = f"lora_unet_{layer.replace('.', '_')}"
        kohya |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(2.0)}
    whole = {
        "diffusion_model.blocks.0.ffn.0.diff": torch.zeros(shapes["blocks.0.ffn.0.weight"]),
        "diffusion_model.blocks.0.ffn.0.diff_b": torch.zeros(shapes["blocks.0.ffn.0.bias"]),
        "diffusion_model.blocks.0.modulation.diff": torch.zeros(shapes["blocks.0.modulation"]),
    }
    settings = {"lora_adapter_metadata": json.dumps(peft_settings())}
    return Table.of(peft, settings), Table.of(kohya), Table.of(whole)


def peft_settings() -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": False,
        "alpha_pattern": {"blocks.0.ffn.0": 8, r"head\.head": 1.5},
        "rank_pattern": {},
    }


def plain(table: Table) -> bytes:
    """A valid .safetensors file."""
    return safetensors(text_of(safetensors_header(table)).encode(), table)


@cache
def halves() -> tuple[dict[str, bytes], dict[str, Any]]:
    """Two files of one transformer, and their index."""
    table = transformers()[0]
    parts = {"a.safetensors": table.entries[::2], "b.safetensors": table.entries[1::2]}
    weight_map = {entry.name: name for name, entries in parts.items() for entry in entries}
    files = {name: plain(Table(entries)) for name, entries in parts.items()}
    return files, {"metadata": {"total_size": 1}, "weight_map": weight_map}


@cache
def blocks() -> dict[str, bytes]:
    """One file a block."""
    table = transformers()[0]
    inside = tuple(entry for entry in table.entries if entry.name.startswith("blocks.0."))
    outside = tuple(entry for entry in table.entries if entry not in inside)
    return {"block_0.safetensors": plain(Table(inside)), "non_block.safetensors": plain(Table(outside))}


@cache
def pictures() -> dict[str, bytes]:
    """One small picture in the usual formats, with an orientation in its EXIF."""
    picture = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    exif = picture.getexif()
    exif[0x0112] = 6
    made = {}
    for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff"):
        file = io.BytesIO()
        picture.save(file, kind, exif=exif)
        made[f"a.{kind}"] = file.getvalue()
    return made


CONFIG: dict[str, Any] = {
    "infer_steps": 4,
    "target_video_length": 81,
    "target_height": 480,
    "target_width": 832,
    "self_attn_1_type": "torch_sdpa",
    "cross_attn_1_type": "torch_sdpa",
    "sample_guide_scale": [4.0, 3.0],
    "sample_shift": 5,
    "enable_cfg": True,
    "cpu_offload": False,
    "denoising_step_list": [1000, 750, 500, 250],
    "feature_caching": "Tea",
    "coefficients": [[1.0, 2.0], [3.0]],
    "teacache_thresh": 0.2,
    "dit_quantized": True,
    "dit_quant_scheme": "fp8-sgl",
    "lora_configs": [{"path": "a.safetensors", "strength": 1.0}],
    "parallel": {"seq_p_size": 1},
    "transformer_model_name": "720p_t2v",
    "aspect_ratio": "16:9",
    "scheduler_type": "WanScheduler",
    "vae_path": "",
    "_comment": "x",
}

FIGURES: dict[str, Any] = {
    "format": FORMAT,
    "checkpoint": {"file": "m.safetensors", "variant": "wan2.1_t2v", "fingerprint": "?"},
    "roles": {
        "alone": {
            "measured": {"steps": 4, "shift": 5.0, "date": "2026-01-01", "prompts": 1, "cfg_scale": 5.0},
            "teacache": {
                "time": [1.0, 2.0],
                "time_range": [0.1, 0.2],
                "projected": [1.0],
                "projected_range": [0.1, 0.2],
            },
            "magcache": {"cond": [1.0, 0.9, 0.8, 0.7], "uncond": [1.0, 0.9, 0.8, 0.7]},
        }
    },
}

GRAPH: dict[str, Any] = {
    "1": {"class_type": "LightX2VLoadModel", "inputs": {"model": "wan.safetensors"}, "_meta": {"title": "Load"}},
    "2": {"class_type": "SaveVideo", "inputs": {"video": ["1", 0], "filename_prefix": "video/wan"}},
}
