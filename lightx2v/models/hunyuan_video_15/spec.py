"""HunyuanVideo-1.5 checkpoints: what their headers look like and which network they mean."""

import re
from functools import partial

from torch import nn

from lightx2v.checkpoint import Header, block_numbers
from lightx2v.latents import HUNYUAN15
from lightx2v.models import ImageInput, ModelSpec
from lightx2v.models.hunyuan_video_15.caching import PUBLISHED, time_signal
from lightx2v.models.hunyuan_video_15.conditioning import arguments, image_condition, to_model_input
from lightx2v.models.hunyuan_video_15.config import HEAD_DIM, HunyuanConfig
from lightx2v.models.hunyuan_video_15.encoders import ENCODERS
from lightx2v.models.hunyuan_video_15.sizes import size_for_image, usual
from lightx2v.models.hunyuan_video_15.transformer import HunyuanTransformer
from lightx2v_kernels import Kernels

# Noisy latents, those of the given frames, and their mask. The super-resolution model reads 33 more.
IN_CHANNELS = HUNYUAN15.channels * 2 + 1
REFINER = "txt_in.individual_token_refiner.blocks"


def read_config(header: Header) -> HunyuanConfig:
    """Every size from the shapes of the tensors; call it on a header that `is_hunyuan` accepts."""

    def shape(name: str) -> tuple[int, ...]:
        return header.tensors[f"{name}.weight"].shape

    def count(blocks: str) -> int:
        return max(block_numbers(header.path, header.tensors, re.compile(rf"{re.escape(blocks)}\.(\d+)\."))) + 1

    patch = shape("img_in.proj")
    patch_size = (patch[2], patch[3], patch[4])
    return HunyuanConfig(
        hidden_size=patch[0],
        ffn_size=shape("double_blocks.0.img_mlp.fc1")[0],
        num_layers=count("double_blocks"),
        refiner_layers=count(REFINER),
        refiner_ffn_size=shape(f"{REFINER}.0.mlp.fc1")[0],
        in_channels=patch[1],
        out_channels=shape("final_layer.linear")[0] // (patch_size[0] * patch_size[1] * patch_size[2]),
        text_dim=shape("txt_in.input_embedder")[1],
        glyph_dim=shape("byt5_in.fc1")[1],
        glyph_size=shape("byt5_in.fc1")[0],
        image_dim=shape("vision_in.proj.1")[0],
        freq_dim=shape("time_in.mlp.0")[1],
        patch_size=patch_size,
        reads_step_end="time_r_in.mlp.0.weight" in header.tensors,
    )


def is_hunyuan(header: Header) -> bool:
    """The original key layout of any text- or image-to-video HunyuanVideo-1.5 transformer."""
    ranks = {
        "img_in.proj": 5,
        "double_blocks.0.img_attn_q": 2,
        "double_blocks.0.img_mlp.fc1": 2,
        f"{REFINER}.0.mlp.fc1": 2,
        "final_layer.linear": 2,
        "txt_in.input_embedder": 2,
        "byt5_in.fc1": 2,
        "vision_in.proj.1": 2,
        "time_in.mlp.0": 2,
        "cond_type_embedding": 2,
    }
    fits = all(len(header.shape(f"{name}.weight") or ()) == rank for name, rank in ranks.items())
    return fits and header.tensors["img_in.proj.weight"].shape[1] == IN_CHANNELS


def keep_float32(name: str) -> bool:
    """The timestep path is small and sensitive."""
    return name.startswith(("time_in.", "time_r_in.", "txt_in.t_embedder."))


def quantises(name: str) -> bool:
    """The layers that see every token. Modulation stays, which LightX2V quantises: a third of the parameters, but its
    error would be every token's, and its time is nothing."""
    return bool(re.fullmatch(r"double_blocks\.\d+\.(img|txt)_(attn_(q|k|v|proj)|mlp\.fc[12])", name))


def _build(config: HunyuanConfig, kernels: Kernels) -> nn.Module:
    return HunyuanTransformer(config, kernels)


def _spec(name: str, title: str, step_distilled: bool) -> ModelSpec:
    def matches(header: Header) -> bool:
        return is_hunyuan(header) and ("time_r_in.mlp.0.weight" in header.tensors) == step_distilled

    return ModelSpec(
        name=name,
        title=title,
        family="hunyuan1.5",
        task="",  # one layout is both: only a file's name or metadata can tell
        matches=matches,
        config=read_config,
        build=_build,
        keep_float32=keep_float32,
        quantises=quantises,
        head_dim=HEAD_DIM,
        latents=HUNYUAN15,
        patch_size=(1, 1, 1),
        encoders=ENCODERS,
        arguments=partial(arguments, reads_step_end=step_distilled),
        image_input=ImageInput(image_condition, to_model_input),
        reads_clip=True,
        shows_cut=True,
        image_states="last_hidden_state",
        fps=24,
        usual=usual,
        size_for_image=size_for_image,
        time_signal=time_signal,
        figures={} if step_distilled else PUBLISHED,
    )


SPECS = (
    _spec("hunyuan1.5", "HunyuanVideo-1.5", step_distilled=False),
    _spec("hunyuan1.5_step_distilled", "HunyuanVideo-1.5, step-distilled", step_distilled=True),
)
