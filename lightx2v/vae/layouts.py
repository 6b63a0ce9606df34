"""Telling Wan's VAEs from what people pick by mistake, by tensor names; and their names in diffusers' layout."""

from __future__ import annotations

import re
from collections.abc import Callable

from lightx2v.checkpoint import CheckpointError, Header
from lightx2v.kinds import in_words
from lightx2v.latents import WAN21, WAN22, LatentFormat

Rename = Callable[[str], str]

PREFIXES = ("vae.", "first_stage_model.")  # of a VAE cut out of a larger checkpoint

NEEDED = "choose a Wan2.1 VAE (Wan2.1_VAE.pth, wan_2.1_vae.safetensors) or its LightVAE (lightvaew2_1)"
NEEDED22 = "choose a Wan2.2 VAE (Wan2.2_VAE.pth, wan2.2_vae.safetensors)"


def require_wan_layout(header: Header) -> tuple[int, int, Rename]:
    """Base channels, latent channels and the rename to the original key names of a Wan2.1 VAE's header.

    Raises CheckpointError, which says what the file is and what is needed, when it is something else.
    """
    found = _find(header, 3, from_diffusers)
    if found is None or found[2] != WAN21.channels:
        raise CheckpointError(f"{header.path}: this is {in_words(header)}, not a Wan2.1 VAE; {NEEDED}")
    _, base, latent, rename = found
    return base, latent, rename


def require_wan22_layout(header: Header) -> tuple[int, int, int, Rename]:
    """Base channels of encoder and decoder, latent channels, and the rename, of a Wan2.2 VAE's header; or as above."""
    found = _find(header, 12, from_diffusers22)
    if found is None or found[2] != WAN22.channels:
        raise CheckpointError(f"{header.path}: this is {in_words(header)}, not a Wan2.2 VAE; {NEEDED22}")
    return found


def require_any_layout(header: Header) -> LatentFormat:
    """The latent space of a VAE's header; raises CheckpointError, which says what the file is, for anything else."""
    for pixels, rename, space in ((3, from_diffusers, WAN21), (12, from_diffusers22, WAN22)):
        found = _find(header, pixels, rename)
        if found is not None and found[2] == space.channels:
            return space
    raise CheckpointError(f"{header.path}: this is {in_words(header)}, not a Wan VAE; {NEEDED}, or {NEEDED22}")


def _find(header: Header, pixels: int, diffusers: Rename) -> tuple[int, int, int, Rename] | None:
    """Base channels of encoder and decoder, latent channels and the rename, if the encoder reads `pixels` channels."""
    for names, rename in ((ORIGINAL, str), (DIFFUSERS, diffusers)):
        gamma, first, reads = (header.shape(name) for name in names)
        if gamma and first and reads and len(first) == len(reads) == 5 and reads[1] == pixels:
            return reads[0], gamma[0], first[1], rename
    return None


# The decoder's last norm and first convolution, and the encoder's first, in both layouts. Both networks have them, but
# Wan2.2's encoder reads 12 channels (2x2 patches of pixels).
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


def from_diffusers22(name: str) -> str:
    """The original name of a tensor of diffusers' AutoencoderKLWan, as Wan2.2; other names are returned as they are."""
    name = re.sub(r"(?<=^encoder\.)down_blocks\.(\d+)\.resnets\.(\d+)", r"downsamples.\1.downsamples.\2", name)
    name = re.sub(r"(?<=^encoder\.)down_blocks\.(\d+)\.downsampler\b", r"downsamples.\1.downsamples.2", name)
    name = re.sub(r"(?<=^decoder\.)up_blocks\.(\d+)\.resnets\.(\d+)", r"upsamples.\1.upsamples.\2", name)
    name = re.sub(r"(?<=^decoder\.)up_blocks\.(\d+)\.upsampler\b", r"upsamples.\1.upsamples.3", name)
    return from_diffusers(name)


def from_diffusers(name: str) -> str:
    """The same for Wan2.1, whose levels of the encoder are one list of blocks and whose layers are named otherwise."""

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
