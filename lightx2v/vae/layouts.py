"""Telling a Wan2.1 VAE from what people pick by mistake, by tensor names; and its names in diffusers' layout."""

from __future__ import annotations

import re
from collections.abc import Callable

from lightx2v.checkpoint import CheckpointError, Header

Rename = Callable[[str], str]

PREFIXES = ("vae.", "first_stage_model.")  # of a VAE cut out of a larger checkpoint

NEEDED = "choose a Wan2.1 VAE (Wan2.1_VAE.pth, wan_2.1_vae.safetensors) or its LightVAE (lightvaew2_1)"

# What else is picked: a pattern that some tensor name of the file matches, and what to call it. First match wins.
OTHERS: tuple[tuple[str, str], ...] = (
    (r"lora_|\.diff(_b|_m)?$", "a LoRA"),
    (r"^encoder\.downsamples\.\d+\.downsamples\.", "the Wan2.2 VAE of TI2V-5B, with 48 latent channels"),
    (r"^encoder\.down_blocks\.\d+\.downsampler\.", "the Wan2.2 VAE of TI2V-5B, with 48 latent channels"),
    (r"^decoder\.\d+\.conv\.\d+\.weight$", "a tiny autoencoder (TAE)"),
    (r"^decoder\.(mid|mid_block|up|up_blocks)\.", "the autoencoder of another model"),
    (r"(^|\.)vision_model\.|^visual\.(patch_embedding|transformer)\.", "an image encoder"),
    (r"(^|\.)(self_attn\.q|img_attn_qkv|img_attn\.qkv|attn1?\.to_q)\.", "a diffusion transformer"),
    (r"(^|\.)(patch_embedding|img_in\.proj)\.", "a diffusion transformer"),
    (r"(^|\.)(token_embedding|shared|embed_tokens)\.weight$", "a text encoder"),
)


def require_wan_layout(header: Header) -> tuple[int, int, Rename]:
    """Base channels, latent channels and the rename to the original key names of a Wan2.1 VAE's header.

    Raises CheckpointError, which says what the file is and what is needed, when it is something else.
    """
    for names, rename in ((ORIGINAL, str), (DIFFUSERS, from_diffusers)):
        gamma, first, pixels = (header.shape(name) for name in names)
        if gamma and first and pixels and len(first) == 5 and pixels[1] == 3:
            return gamma[0], first[1], rename
    what = next((what for pattern, what in OTHERS if any(re.search(pattern, name) for name in header.tensors)), None)
    what = what or f"unknown ({len(header.tensors)} tensors, first '{next(iter(header.tensors), None)}')"
    raise CheckpointError(f"{header.path}: this is {what}, not a Wan2.1 VAE; {NEEDED}")


# The decoder's last norm and first convolution, and the encoder's first, in both layouts. Wan2.2's network has the same
# names, but its encoder reads 12 channels (2x2 patches of pixels).
ORIGINAL = ("decoder.head.0.gamma", "decoder.conv1.weight", "encoder.conv1.weight")
DIFFUSERS = ("decoder.norm_out.gamma", "decoder.conv_in.weight", "encoder.conv_in.weight")

_TOP = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    "conv_in": "conv1",
    "norm_out": "head.0",
    "conv_out": "head.2",
    "mid_block.resnets.0": "middle.0",
    "mid_block.attentions.0": "middle.1",
    "mid_block.resnets.1": "middle.2",
}
_BLOCK = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def from_diffusers(name: str) -> str:
    """The original name of a tensor of diffusers' AutoencoderKLWan; any other name is returned as it is."""

    def level(match: re.Match[str]) -> str:
        """A level of the decoder is three blocks and what doubles: four places in the original's one list."""
        index, kind, place = int(match[1]), match[2], int(match[3])
        return f"upsamples.{4 * index + (3 if kind == 'upsamplers' else place)}"

    name = re.sub(r"(?<=^decoder\.)up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)", level, name)
    name = re.sub(r"(?<=^encoder\.)down_blocks\.(\d+)", r"downsamples.\1", name)
    name = re.sub(
        rf"^((?:encoder\.|decoder\.)?)({'|'.join(map(re.escape, _TOP))})\b", lambda m: m[1] + _TOP[m[2]], name
    )
    inner = rf"(?<=\d\.)({'|'.join(_BLOCK)})(?=\.(weight|bias|gamma)$)"
    return re.sub(inner, lambda m: _BLOCK[m[1]], name)
