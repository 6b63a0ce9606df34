"""HunyuanVideo-1.5 in every layout: what comes out of the file is what went in, and draws the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightx2v.checkpoint import CheckpointError
from lightx2v.config import Engine
from lightx2v.identify import identify
from lightx2v.loading import load_transformer
from lightx2v.models.hunyuan_video_15.transformer import Conditioning
from tiny_hunyuan import CONFIG, DISTILLED, State, make_tiny, to_comfyui, to_diffusers, to_merged

CPU = torch.device("cpu")
LAYOUTS: dict[str, tuple[Callable[[State], State], str]] = {
    "original": (dict, "original"),
    "merged": (to_merged, "comfyui"),
    "comfyui": (to_comfyui, "comfyui"),
    "diffusers": (to_diffusers, "diffusers"),
}
FP8 = torch.float8_e4m3fn


def save(state: State, folder: Path, prefix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({prefix + name: tensor.contiguous() for name, tensor in state.items()}, folder / "m.safetensors")
    return folder / "m.safetensors"


def packed_fp8(state: State, *, rows: bool) -> State:
    """Block linears as fp8: a scale a tensor, as ComfyUI's scaled files, or a row, as LightX2V's."""
    found: State = {} if rows else {"scaled_fp8": torch.zeros(2).to(FP8)}
    for name, tensor in state.items():
        if not (name.startswith("double_blocks") and tensor.ndim == 2):
            found[name] = tensor
            continue
        scale = (tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().max().reshape(1)) / 448
        found[name] = (tensor / scale).to(FP8)
        found[name.replace(".weight", ".weight_scale" if rows else ".scale_weight")] = scale
    return found


def restored(state: State) -> State:
    """What fp8 leaves of the weights, by the same sum as its definition."""
    found = {}
    for name, tensor in state.items():
        if name == "scaled_fp8":
            continue
        scale = state.get(name.replace(".weight", ".weight_scale"), state.get(name.replace(".weight", ".scale_weight")))
        if tensor.dtype != FP8:
            found[name] = tensor
        elif scale is not None:
            found[name] = tensor.float() * scale
    return {name: tensor for name, tensor in found.items() if "scale" not in name}


def drawn(network: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    asked = Conditioning(torch.randn(1, 5, CONFIG.text_dim, generator=generator))
    with torch.no_grad():
        return network(torch.randn(1, 65, 2, 4, 4, generator=generator), torch.tensor([500.0]), asked)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_went_in_comes_out(layout: str, tmp_path: Path) -> None:
    tiny, (write, said) = make_tiny(), LAYOUTS[layout]
    info = identify(save(write(tiny.state_dict()), tmp_path))
    assert (info.spec.name, info.format, info.scheme, info.config) == ("hunyuan1.5", said, "fp32", CONFIG)
    assert info.header.nbytes == sum(tensor.nbytes for tensor in tiny.state_dict().values())
    network = load_transformer(info, Engine(dtype="fp32"), CPU)
    loaded = network.state_dict()
    assert loaded.keys() == tiny.state_dict().keys()
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    assert torch.equal(drawn(network), drawn(tiny))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_step_distilled_one_is_told_apart(layout: str, tmp_path: Path) -> None:
    info = identify(save(LAYOUTS[layout][0](make_tiny(DISTILLED).state_dict()), tmp_path))
    assert (info.spec.name, info.config, info.distilled) == ("hunyuan1.5_step_distilled", DISTILLED, "steps")


@pytest.mark.parametrize(("write", "rows"), [(dict, True), (to_merged, True), (to_merged, False)])
def test_packed_layers_are_cut_with_their_scales(write: Callable[[State], State], rows: bool, tmp_path: Path) -> None:
    packed = packed_fp8(write(make_tiny().state_dict()), rows=rows)
    info = identify(save(packed, tmp_path))
    assert (info.scheme, info.detail) == ("fp8", f"e4m3, a scale a {'row' if rows else 'tensor'}")
    loaded = load_transformer(info, Engine(dtype="fp32"), CPU).state_dict()
    values = restored(packed)
    for name, tensor in values.items():
        if "attn_qkv" in name and name.startswith("double_blocks"):
            mine = torch.cat([loaded[name.replace("qkv", part)] for part in "qkv"])
            assert torch.equal(mine, tensor), name
        else:
            assert torch.equal(loaded[name], tensor), name


def test_a_pickled_file_is_cut_too(tmp_path: Path) -> None:
    tiny = make_tiny().state_dict()
    torch.save(to_merged(tiny), tmp_path / "m.pth")
    loaded = load_transformer(identify(tmp_path / "m.pth"), Engine(dtype="fp32"), CPU).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tiny.items())


def test_comfyuis_prefix(tmp_path: Path) -> None:
    info = identify(save(to_comfyui(make_tiny().state_dict()), tmp_path, "model.diffusion_model."))
    assert (info.spec.name, info.format) == ("hunyuan1.5", "comfyui")


def test_the_timestep_path_stays_float32(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in make_tiny().state_dict().items()}
    network = load_transformer(identify(save(state, tmp_path)), Engine(dtype="bf16"), CPU)
    assert network.get_parameter("time_in.mlp.0.weight").dtype == torch.float32
    assert network.get_parameter("double_blocks.0.img_attn_q.weight").dtype == torch.bfloat16
    assert drawn(network).dtype == torch.bfloat16


def test_pieces_that_do_not_fit(tmp_path: Path) -> None:
    whole = to_diffusers(make_tiny().state_dict())
    name = "context_embedder.token_refiner.refiner_blocks.1.attn.to_k.bias"
    with pytest.raises(CheckpointError, match=r"blocks\.1\.self_attn_k\.bias' is missing; the file is incomplete"):
        identify(save({k: t for k, t in whole.items() if k != name}, tmp_path / "missing"))
    packed = whole | {name.replace("bias", "weight"): whole[name.replace("bias", "weight")].to(FP8)}
    with pytest.raises(CheckpointError, match="is float8_e4m3fn and is one of several tensors that make one layer"):
        identify(save(packed, tmp_path / "packed"))
