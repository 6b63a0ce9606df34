"""One state dict in every published layout. Each writer returns the path to load and the weights that must come out."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from torch import Tensor

from lightx2v.models.wan.names import to_diffusers

State = dict[str, Tensor]
Writer = Callable[[State, Path], tuple[Path, State]]
# What LightX2V's converter and ComfyUI's files quantise: the linear layers of the blocks.
QUANTISED = (".self_attn.", ".cross_attn.", ".ffn.")


def _save(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
    return path


def _index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _split(state: State, folder: Path, file_of: Callable[[int, str], str]) -> dict[str, str]:
    weight_map = {name: file_of(index, name) for index, name in enumerate(state)}
    for file in set(weight_map.values()):
        _save({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    return weight_map


def original(state: State, folder: Path) -> tuple[Path, State]:
    return _save(state, folder / "m.safetensors"), state


def sharded(state: State, folder: Path) -> tuple[Path, State]:
    stem = "diffusion_pytorch_model-0000{}-of-00002.safetensors"
    _index(folder, _split(state, folder, lambda index, name: stem.format(1 + index % 2)))
    return folder, state


def one_shard_of_two(state: State, folder: Path) -> tuple[Path, State]:
    _split(state, folder, lambda index, name: f"m-0000{1 + index % 2}-of-00002.safetensors")
    return folder / "m-00002-of-00002.safetensors", state


def comfyui_prefix(state: State, folder: Path) -> tuple[Path, State]:
    return _save({f"model.diffusion_model.{k}": v for k, v in state.items()}, folder / "m.safetensors"), state


def diffusers(state: State, folder: Path) -> tuple[Path, State]:
    renamed = {to_diffusers(name): tensor for name, tensor in state.items()}
    assert len(renamed) == len(state) and "condition_embedder.time_proj.weight" in renamed
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    _save(renamed, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder, state


def _block_file(index: int, name: str) -> str:
    return f"block_{name.split('.')[1]}.safetensors" if name.startswith("blocks.") else "non_block.safetensors"


def block_split(state: State, folder: Path) -> tuple[Path, State]:
    weight_map = _split(state, folder, _block_file)
    _index(folder, weight_map)
    return folder, state


def block_split_without_index(state: State, folder: Path) -> tuple[Path, State]:
    _split(state, folder, _block_file)
    return folder, state


def pickled(state: State, folder: Path) -> tuple[Path, State]:
    folder.mkdir(parents=True)
    torch.save(state, folder / "m.pth")
    return folder / "m.pth", state


def _is_quantised(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.ndim == 2 and any(part in name for part in QUANTISED)


def _rounded(
    state: State, dtype: torch.dtype, *, rows: bool, rest: torch.dtype = torch.bfloat16
) -> tuple[State, dict[str, Tensor], State]:
    """What is stored, the scales by weight (a tensor or a row each), and what that stands for."""
    stored, scales, expected = {}, {}, {}
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    for name, tensor in state.items():
        if not _is_quantised(name, tensor):
            stored[name] = tensor.to(rest)
            expected[name] = stored[name].float()
            continue
        peak = tensor.abs().amax(dim=1, keepdim=True) if rows else tensor.abs().max()
        scale = peak / largest
        scaled = tensor / scale
        stored[name] = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
        scales[name] = scale
        expected[name] = stored[name].float() * scale
    assert scales
    return stored, scales, expected


def _scaled_fp8(state: State, folder: Path, prefix: str, name: str, shape: tuple[int, ...]) -> tuple[Path, State]:
    """The older scaled files: scale_weight, with or without the input's, and a mark."""
    stored, scales, expected = _rounded(state, torch.float8_e4m3fn, rows=False, rest=torch.float16)
    extra = {k.removesuffix("weight") + "scale_weight": v.reshape(shape) for k, v in scales.items()}
    extra |= {k.removesuffix("weight") + "scale_input": torch.tensor(3.0) for k in scales if not shape}
    extra["scaled_fp8"] = torch.zeros(2 if shape else 0, dtype=torch.float8_e4m3fn)
    return _save({prefix + k: v for k, v in (stored | extra).items()}, folder / name), expected


def comfyui_fp8_scaled(state: State, folder: Path) -> tuple[Path, State]:
    return _scaled_fp8(state, folder, "", "m_fp8_scaled.safetensors", ())


def comfyui_fp8_scaled_prefix(state: State, folder: Path) -> tuple[Path, State]:
    return _scaled_fp8(state, folder, "model.diffusion_model.", "m_fp8_scaled.safetensors", ())


def kijai_fp8_scaled(state: State, folder: Path) -> tuple[Path, State]:
    return _scaled_fp8(state, folder, "", "m_fp8_e4m3fn_scaled_KJ.safetensors", (1,))


def _weight_scale(stored: State, scales: dict[str, Tensor]) -> State:
    return stored | {name + "_scale": scale for name, scale in scales.items()}


def comfyui_comfy_quant(state: State, folder: Path) -> tuple[Path, State]:
    stored, scales, expected = _rounded(state, torch.float8_e4m3fn, rows=False)
    said = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    marks = {name.removesuffix("weight") + "comfy_quant": said.clone() for name in scales}
    return _save(_weight_scale(stored, scales) | marks, folder / "m.safetensors"), expected


def comfyui_quantization_metadata(state: State, folder: Path) -> tuple[Path, State]:
    stored, scales, expected = _rounded(state, torch.float8_e5m2, rows=False)
    layers = {name.removesuffix(".weight"): {"format": "float8_e5m2"} for name in scales}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return _save(_weight_scale(stored, scales), folder / "m.safetensors", metadata), expected


def fp8_unscaled(state: State, folder: Path) -> tuple[Path, State]:
    stored = {k: v.to(torch.float8_e4m3fn) if _is_quantised(k, v) else v.to(torch.bfloat16) for k, v in state.items()}
    return _save(stored, folder / "m.safetensors"), {name: tensor.float() for name, tensor in stored.items()}


def lightx2v_fp8(state: State, folder: Path) -> tuple[Path, State]:
    stored, scales, expected = _rounded(state, torch.float8_e4m3fn, rows=True)
    return _save(_weight_scale(stored, scales), folder / "m.safetensors"), expected


def lightx2v_int8(state: State, folder: Path) -> tuple[Path, State]:
    stored, scales, expected = _rounded(state, torch.int8, rows=True)
    return _save(_weight_scale(stored, scales), folder / "m.safetensors"), expected


def lightx2v_fp8_pickled(state: State, folder: Path) -> tuple[Path, State]:
    stored, scales, expected = _rounded(state, torch.float8_e4m3fn, rows=True)
    return pickled(_weight_scale(stored, scales), folder)[0], expected


def lightx2v_int8_block_split(state: State, folder: Path) -> tuple[Path, State]:
    stored, scales, expected = _rounded(state, torch.int8, rows=True)
    return block_split(_weight_scale(stored, scales), folder)[0], expected


def lightx2v_fp8_scales_in_another_shard(state: State, folder: Path) -> tuple[Path, State]:
    stored, scales, expected = _rounded(state, torch.float8_e4m3fn, rows=True)
    everything = _weight_scale(stored, scales)
    _index(folder, _split(everything, folder, lambda index, name: f"part{int(name.endswith('_scale'))}.safetensors"))
    return folder, expected


def diffusers_fp8(state: State, folder: Path) -> tuple[Path, State]:
    stored, scales, expected = _rounded(state, torch.float8_e4m3fn, rows=True)
    renamed = {to_diffusers(name): tensor for name, tensor in _weight_scale(stored, scales).items()}
    return _save(renamed, folder / "m.safetensors"), expected


def _gguf(state: State, path: Path, kind: GGMLQuantizationType) -> tuple[Path, State]:
    """As city96's converter writes them: block linears packed, the rest float16, what has over four axes reshaped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer, expected = GGUFWriter(path, "wan"), {}
    for name, tensor in state.items():
        if _is_quantised(name, tensor) and kind != GGMLQuantizationType.F16:
            packed = quantize(tensor.numpy(), kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            expected[name] = torch.from_numpy(dequantize(packed, kind))
        elif tensor.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
            writer.add_tensor(name, tensor.flatten(0, 2).numpy())
            expected[name] = tensor
        else:
            writer.add_tensor(name, tensor.half().numpy())
            expected[name] = tensor.half().float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, expected


def gguf_f16(state: State, folder: Path) -> tuple[Path, State]:
    return _gguf(state, folder / "m.gguf", GGMLQuantizationType.F16)


def gguf_q8_0(state: State, folder: Path) -> tuple[Path, State]:
    return _gguf(state, folder / "m-Q8_0.gguf", GGMLQuantizationType.Q8_0)


def gguf_q5_1(state: State, folder: Path) -> tuple[Path, State]:
    return _gguf(state, folder / "m-Q5_1.gguf", GGMLQuantizationType.Q5_1)


# Writer -> format and scheme that its files must be recognised as.
WRITERS: dict[Writer, tuple[str, str]] = {
    original: ("original", "fp32"),
    sharded: ("original", "fp32"),
    one_shard_of_two: ("original", "fp32"),
    comfyui_prefix: ("comfyui", "fp32"),
    diffusers: ("diffusers", "fp32"),
    block_split: ("block-split", "fp32"),
    block_split_without_index: ("block-split", "fp32"),
    pickled: ("original", "fp32"),
    comfyui_fp8_scaled: ("comfyui", "fp8"),
    comfyui_fp8_scaled_prefix: ("comfyui", "fp8"),
    kijai_fp8_scaled: ("kijai", "fp8"),
    comfyui_comfy_quant: ("comfyui", "fp8"),
    comfyui_quantization_metadata: ("comfyui", "fp8"),
    fp8_unscaled: ("original", "fp8"),
    lightx2v_fp8: ("lightx2v", "fp8"),
    lightx2v_int8: ("lightx2v", "int8"),
    lightx2v_fp8_pickled: ("lightx2v", "fp8"),
    lightx2v_int8_block_split: ("block-split", "int8"),
    lightx2v_fp8_scales_in_another_shard: ("lightx2v", "fp8"),
    diffusers_fp8: ("diffusers", "fp8"),
    gguf_f16: ("gguf", "fp16"),
    gguf_q8_0: ("gguf", "gguf"),
    gguf_q5_1: ("gguf", "gguf"),
}
