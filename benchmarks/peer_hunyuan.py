"""diffusers' HunyuanVideo-1.5 with the engine's weights, asked as its pipeline asks it: with padding and masks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightx2v.bench.engine import Setting
from lightx2v.bench.race import Contestant
from lightx2v.bench.weights import weight_bytes
from lightx2v.models.hunyuan_video_15.config import HEAD_DIM, HunyuanConfig
from lightx2v.models.hunyuan_video_15.names import HEAD, from_diffusers

# What its pipeline always sends: rows of the language model, of byT5 and of the image encoder.
TEXT_ROWS, GLYPH_ROWS, IMAGE_ROWS = 1000, 256, 729


def diffusers_hunyuan(setting: Setting, attention: str = "native") -> Contestant:
    """Text-to-video: no glyphs, no image, and a prompt that fills a part of its rows."""
    from diffusers import HunyuanVideo15Transformer3DModel

    config = setting.subject.config
    with torch.device("meta"):
        theirs = HunyuanVideo15Transformer3DModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_attention_heads=config.num_heads,
            attention_head_dim=HEAD_DIM,
            num_layers=config.num_layers,
            num_refiner_layers=config.refiner_layers,
            text_embed_dim=config.text_dim,
            text_embed_2_dim=config.glyph_dim,
            image_embed_dim=config.image_dim,
        )
    theirs.load_state_dict(_state(setting, theirs), assign=True)
    theirs.eval().requires_grad_(False)
    theirs.set_attention_backend(attention)
    args = _arguments(setting, config)
    return Contestant(lambda: theirs(**args, return_dict=False)[0], weight_bytes(theirs))


def _state(setting: Setting, theirs: nn.Module) -> dict[str, Tensor]:
    """What differs in more than names: the refiner's q, k and v lie apart there, and the head's two halves other way
    round."""
    ours = setting.network.state_dict()
    state: dict[str, Tensor] = {}
    for name in theirs.state_dict():
        own = from_diffusers(name)
        base, _, leaf = own.rpartition(".")
        if own in ours:
            tensor = ours[own]
            tensor = torch.cat(tensor.chunk(2)[::-1]) if base == HEAD else tensor
        else:
            tensor = ours[f"{base[:-1]}qkv.{leaf}"].chunk(3)["qkv".index(base[-1])]
        state[name] = tensor.to(setting.dtype)
    return state


def _arguments(setting: Setting, config: HunyuanConfig) -> dict[str, Tensor]:
    given, device = setting.inputs, setting.device
    text = given.context.text.to(setting.dtype)
    known = torch.ones(1, text.shape[1], dtype=torch.long, device=device)
    return {
        "hidden_states": torch.cat([given.latents, given.more["image"]], 1).to(setting.dtype),
        "timestep": given.timestep.to(setting.dtype),  # as its pipeline does
        "encoder_hidden_states": F.pad(text, (0, 0, 0, TEXT_ROWS - text.shape[1])),
        "encoder_attention_mask": F.pad(known, (0, TEXT_ROWS - text.shape[1])),
        "encoder_hidden_states_2": text.new_zeros(1, GLYPH_ROWS, config.glyph_dim),
        "encoder_attention_mask_2": known.new_zeros(1, GLYPH_ROWS),
        "image_embeds": text.new_zeros(1, IMAGE_ROWS, config.image_dim),
    }
