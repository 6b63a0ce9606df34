"""Other implementations of the same networks, given the engine's own weights, so that results can be compared.

Each is run as its project runs it: its own dtypes for parameters, its own attention, its own matrix products. Where a
parameter has the engine's dtype the two share its memory. ComfyUI is found where PYTHONPATH or .host/ has its `comfy`.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peer_hunyuan import diffusers_hunyuan
from dev.comfyui import find_comfyui
from lightx2v.bench.engine import Setting, small_setting
from lightx2v.bench.race import Contestant, Entry
from lightx2v.bench.weights import weight_bytes
from lightx2v.models.hunyuan_video_15.config import HunyuanConfig
from lightx2v.models.wan.config import HEAD_DIM, WanConfig
from lightx2v.models.wan.names import to_diffusers
from lightx2v_kernels.closeness import relative_error

# diffusers keeps these in float32 (WanTransformer3DModel._keep_in_fp32_modules), the rest in the model's dtype.
DIFFUSERS_FLOAT32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
FP8 = torch.float8_e4m3fn
# In float32 the peers' own angles of the timestep differ from the engine's float64 ones by some 5e-6. A GPU's
# convolution of the patches rounds its operands to TF32, but the same ones in the same way.
AGREED = 1e-4


def diffusers_wan(setting: Setting) -> nn.Module:
    """diffusers' Wan with the engine's weights, wherever they are."""
    from diffusers import WanTransformer3DModel
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    config = _wan(setting)
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_attention_heads=config.num_heads,
            attention_head_dim=HEAD_DIM,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_size,
            num_layers=config.num_layers,
            eps=config.eps,
        )

    def kept(name: str) -> torch.dtype:
        wide = any(part in name.split(".") for part in DIFFUSERS_FLOAT32)
        return torch.float32 if wide else setting.dtype

    renamed = {to_diffusers(name): tensor for name, tensor in setting.network.state_dict().items()}
    theirs.load_state_dict({name: t.to(kept(name)) for name, t in renamed.items()}, assign=True)
    theirs.rope = WanRotaryPosEmbed(HEAD_DIM, config.patch_size, 1024).to(
        setting.device
    )  # no parameters: not in the file
    return theirs.eval().requires_grad_(False)


def set_attention(theirs: Any, attention: str) -> None:
    """attention: of diffusers' names; "_flash_3" raises where the package is not there."""
    if attention == "_flash_3":
        _give_flash3()
    theirs.set_attention_backend(attention)


def called(setting: Setting, theirs: nn.Module) -> Callable[[], Tensor]:
    """One forward pass of diffusers' Wan with the inputs of a setting."""
    given, config = setting.inputs, _wan(setting)
    patch, times = config.patch_size[1] * config.patch_size[2], given.timestep
    if times.ndim == 2:  # one a token there, one a latent frame here
        times = times.repeat_interleave(given.latents.shape[3] * given.latents.shape[4] // patch, dim=1)
    latents, context = given.latents.to(setting.dtype), given.context.to(setting.dtype)
    return lambda: theirs(latents, times, context, return_dict=False)[0]


def _diffusers(setting: Setting, attention: str = "native", compiled: bool = False, fp8: bool = False) -> Contestant:
    if isinstance(setting.subject.config, HunyuanConfig) and not (compiled or fp8):
        return diffusers_hunyuan(setting, attention)
    theirs: Any = diffusers_wan(setting)
    set_attention(theirs, attention)
    if fp8:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        # Its own settings for the compiler search for minutes; without them it is as fast.
        how = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
        quantize_(theirs.blocks, how)
    if compiled:
        theirs.compile_repeated_blocks(fullgraph=True)
    return Contestant(called(setting, theirs), weight_bytes(theirs))


def _give_flash3() -> None:
    """diffusers looks for FlashAttention-3 as its authors build it; the wheel of it has another name."""
    from diffusers.models import attention_dispatch

    if attention_dispatch.flash_attn_3_func is None:
        from fa3_fwd_interface import flash_attn_func

        attention_dispatch.flash_attn_3_func = flash_attn_func
        attention_dispatch._CAN_USE_FLASH_ATTN_3 = True


def _comfyui(setting: Setting, fp8: bool = False) -> Contestant:
    _find_comfy(setting.device)
    import comfy.ldm.wan.model
    import comfy.ops

    config = _wan(setting)
    plain = comfy.ops.disable_weight_init
    operations = comfy.ops.scaled_fp8_ops(fp8_matrix_mult=True, override_dtype=FP8) if fp8 else plain
    theirs = comfy.ldm.wan.model.WanModel(
        model_type="t2v",
        in_dim=config.in_channels,
        out_dim=config.out_channels,
        dim=config.hidden_size,
        ffn_dim=config.ffn_size,
        freq_dim=config.freq_dim,
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        text_dim=config.text_dim,
        operations=operations,
        dtype=setting.dtype,
        device="meta",
    )
    theirs.load_state_dict(_comfyui_state(setting, theirs), assign=True)
    theirs.eval().requires_grad_(False)
    given = setting.inputs
    latents, context = given.latents.to(setting.dtype), given.context.to(setting.dtype)
    return Contestant(lambda: theirs(latents, given.timestep, context), weight_bytes(theirs))


def _comfyui_state(setting: Setting, theirs: nn.Module) -> dict[str, Tensor]:
    """The engine's weights in ComfyUI's dtypes.

    Those of fp8 layers have one scale a tensor, and layers outside the blocks are not packed, as in the files that
    ComfyUI publishes.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in setting.network.state_dict().items():
        wanted = theirs.get_parameter(name).dtype
        scale = torch.ones((), device=setting.device)
        if wanted == FP8 and name.startswith("blocks.") and name.endswith(".weight"):
            scale = tensor.abs().amax().float() / torch.finfo(FP8).max
            tensor = (tensor.float() / scale).to(FP8)
        else:
            tensor = tensor.to(setting.dtype if wanted == FP8 else wanted)
        state[name] = tensor
        scaled = name.removesuffix("weight") + "scale_weight"
        if name.endswith("weight") and hasattr(theirs.get_submodule(name.rpartition(".")[0]), "scale_weight"):
            state[scaled] = scale
    return state


def _find_comfy(device: torch.device) -> None:
    root = find_comfyui()
    if root is not None and str(root) not in sys.path:
        sys.path.append(str(root))  # last, so that nothing at its top level shadows a module of this repository
    import comfy.cli_args

    if device.type == "cpu":
        comfy.cli_args.args.cpu = True  # before anything else of it is imported


def _wan(setting: Setting) -> WanConfig:
    config = setting.subject.config
    if not isinstance(config, WanConfig):
        raise ValueError(f"{setting.subject.name}: only Wan is run through this peer")
    return config


def _agree(setting: Setting, name: str, make: Callable[[Setting], Contestant]) -> None:
    """Raises ValueError unless the peer computes in float32 what the engine does, on two blocks of the same width."""
    small = small_setting(setting)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # peers embed patches by a convolution
        ours = small.inputs.run(small.network)
        error = relative_error(make(small).call(), ours)
    if not error <= AGREED:
        raise ValueError(f"{name} is given the same weights and is {error:.1e} away in float32, {AGREED:.0e} expected")


def _entry(
    name: str, make: Callable[[Setting], Contestant], extra: float = 0.0, **facts: Any
) -> Callable[[Setting], Entry]:
    """extra: bytes that it holds beside the shared weights, for each of their bytes."""
    plain = _comfyui if facts["engine"] == "comfyui" else _diffusers

    def agreed(setting: Setting) -> Contestant:
        _agree(setting, name, plain)
        return make(setting)

    def of(setting: Setting) -> Entry:
        held = int(extra * weight_bytes(setting.network))
        return Entry(
            name, lambda: agreed(setting), lossy=extra > 0, holds=name if held else "", extra_bytes=held, facts=facts
        )

    return of


DIFFUSERS, COMFYUI = {"engine": "diffusers"}, {"engine": "comfyui"}
PEERS: Mapping[str, Callable[[Setting], Entry]] = {
    "diffusers": _entry("diffusers", lambda s: _diffusers(s, "native"), quant="none", attention="sdpa", **DIFFUSERS),
    "diffusers-fa3": _entry(
        "diffusers, FA3", lambda s: _diffusers(s, "_flash_3"), quant="none", attention="fa3", **DIFFUSERS
    ),
    "diffusers-compile": _entry(
        "diffusers, compiled",
        lambda s: _diffusers(s, "native", compiled=True),
        quant="none",
        attention="sdpa",
        **DIFFUSERS,
    ),
    "diffusers-fa3-compile": _entry(
        "diffusers, FA3, compiled",
        lambda s: _diffusers(s, "_flash_3", compiled=True),
        quant="none",
        attention="fa3",
        **DIFFUSERS,
    ),
    "diffusers-fa3-fp8-compile": _entry(
        "diffusers, FA3, torchao fp8, compiled",
        lambda s: _diffusers(s, "_flash_3", compiled=True, fp8=True),
        extra=0.5,
        quant="fp8",
        attention="fa3",
        **DIFFUSERS,
    ),
    "comfyui": _entry("ComfyUI", _comfyui, quant="none", attention="sdpa", **COMFYUI),
    "comfyui-fp8": _entry(
        "ComfyUI, fp8", lambda s: _comfyui(s, fp8=True), extra=0.5, quant="fp8", attention="sdpa", **COMFYUI
    ),
}
