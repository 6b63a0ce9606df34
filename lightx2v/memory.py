"""How much memory a stage needs beside its weights. Pure functions of shapes."""

from collections.abc import Sequence

import torch
from torch import nn

from lightx2v.identify import CheckpointInfo
from lightx2v.models.wan.config import WanConfig
from lightx2v.quant.feeding import piece_of
from lightx2v.shapes import LatentShape, num_tokens
from lightx2v.vae.hunyuan15 import HunyuanVAEConfig
from lightx2v.vae.loading import VAEInfo
from lightx2v.vae.tae import KINDS, TAEConfig, frames_at_once
from lightx2v.vae.wan22 import Wan22VAEConfig

# Those of a block that would otherwise write rows in float32.
FUSED = ("rms_norm", "modulate", "gated_residual", "norm_rope", "residual_modulate", "residual_layer_norm")
ACTIVATION_SLACK = 1.05  # text, angles, timesteps, and what an allocator cannot fill
# One umT5-xxl block widened to float32 (0.77 GB) and its products for 512 tokens, or one of Qwen2.5-VL 7B (0.93 GB).
TEXT_ENCODER_ACTIVATION_BYTES = 1_500_000_000


def transformer_activation_bytes(
    info: CheckpointInfo, latent_shape: Sequence[int], dtype: torch.dtype, parts: int = 1, *, fused: bool = False
) -> int:
    """Peak of one forward pass over latents (B, C, T, H, W): an upper estimate, in bytes.

    Per token and block: the stream, its modulated copy, q, k, v, their rotated copies and the attention result (8 rows
    of hidden_size), or the feed-forward's hidden row before and after GELU, and two float32 rows inside the norms.
    fused: whether the ops on single tokens write nothing but their results (`fused_by`). A Wan block then has at most 7
    rows of hidden_size (the embedded video, its own input, q, k, v, the attention result, and q and k in 8 bits), or
    what its feed-forward takes, both counted in tests/engine/test_activations.py.
    parts: processes that share the tokens, of which each also holds the whole stream three times where it is gathered,
    and what it sends and receives (6 rows) beside the rest.
    """
    batch, config = latent_shape[0], info.config
    tokens = batch * num_tokens(LatentShape(*latent_shape[2:]), info.spec.patch_size)
    if parts == 1 and fused and isinstance(config, WanConfig):
        hidden, fed = config.hidden_size, 2 * config.ffn_size * piece_of(tokens)
        rows = max(7 * hidden * tokens, (3 if tokens == piece_of(tokens) else 4) * hidden * tokens + fed)
        return int(ACTIVATION_SLACK * rows * dtype.itemsize)
    row = (8 * config.hidden_size + 2 * config.ffn_size) * dtype.itemsize + 2 * config.hidden_size * 4
    if parts == 1:
        return tokens * row
    sent = 6 * config.hidden_size * dtype.itemsize
    return -(-tokens // parts) * (row + sent) + tokens * 3 * config.hidden_size * dtype.itemsize


def waiting_bytes(info: CheckpointInfo, latent_shape: Sequence[int], rows: int, dtype: torch.dtype) -> int:
    """What a pass of guidance holds while the other one computes a block, in bytes: an upper estimate.

    Its embedded video, what its last block left (Wan: the tokens, and what is still to be added to them), and cos and
    sin of every place. rows: of text and images, which HunyuanVideo's tokens have behind the video's.
    """
    batch, config = latent_shape[0], info.config
    row, places = config.hidden_size * dtype.itemsize, num_tokens(LatentShape(*latent_shape[2:]), info.spec.patch_size)
    beside = rows * row * (1 if isinstance(config, WanConfig) else 3)
    return int(ACTIVATION_SLACK * (batch * (3 * places * row + beside) + 4 * places * info.spec.head_dim))


def text_bytes(info: CheckpointInfo, batch: int, rows: int, dtype: torch.dtype) -> int:
    """What is kept from step to step of a sample's `rows` tokens of text and image: themselves, embedded, and where
    they are read by cross-attention (Wan), keys and values of every block."""
    config = info.config
    wide = 1 + (2 * config.num_layers if isinstance(config, WanConfig) else 0)
    return batch * rows * wide * config.hidden_size * dtype.itemsize


def fused_by(network: nn.Module) -> bool:
    """Whether Triton computes all ops on single tokens of a network."""
    names = getattr(getattr(network, "kernels", None), "names", {})
    return all(names.get(op) == "triton" for op in FUSED)


# Beside what is counted: the workspace of convolutions, and what an allocator cannot fill.
VAE_SLACK = 1.2


def vae_decode_bytes(info: VAEInfo, latent_shape: Sequence[int], dtype: torch.dtype, *, frames: bool = True) -> int:
    """Peak of decoding raw latents (B, C, T, h, w), as many at a time as the VAE says, in bytes: an upper estimate.

    frames: whether the decoded video, 12 bytes a pixel and frame, lies on the same device. The rest does not depend on
    T, or hardly: numbers a pixel of one frame, counted by running each network on tensors without contents
    (tests/engine/test_vae_memory.py), at the stage of the largest frames and with all that the layers remember.
    """
    batch, _, latent_frames, height, width = latent_shape
    config, (_, rows, columns) = info.config, info.space.stride
    if isinstance(config, TAEConfig):
        eighth, quarter, half, full = config.decoder_channels
        remembered = 3 * half / 4 + 3 * quarter / 16 + 3 * eighth / 64
        at_once = min(frames_at_once(height, width), latent_frames)
        numbers = at_once * ((4 * max(half + full, 2 * full) + remembered) / KINDS[config.kind].patch ** 2 + 24)
    elif isinstance(config, Wan22VAEConfig):
        numbers = 13.2 * config.decoder_channels + 30
    elif isinstance(config, HunyuanVAEConfig):  # keys and values are kept of every latent frame
        numbers = 45.5 * config.widths[0] + latent_frames * config.widths[-1] / 128 + 30
    else:
        numbers = 42 * config.base_channels + 30
    pixels = batch * height * rows * width * columns
    video = 12 * pixels * (4 * latent_frames - 3) if frames else 0
    return int(VAE_SLACK * numbers * pixels * dtype.itemsize) + video


def vae_encode_bytes(info: VAEInfo, height: int, width: int, dtype: torch.dtype) -> int:
    """Peak of encoding frames of so many pixels, four at a time, in bytes: an upper estimate, as above."""
    config = info.config
    if isinstance(config, TAEConfig):
        numbers = 12 * (config.encoder_channels or 0) / KINDS[config.kind].patch ** 2 + 60
    elif isinstance(config, Wan22VAEConfig):
        numbers = 7.6 * config.encoder_channels + 30
    elif isinstance(config, HunyuanVAEConfig):  # what is kept of 32 latent frames, 125 frames of the clip
        numbers = 46 * config.widths[0] + config.widths[-1] / 4 + 30
    else:
        numbers = 28.5 * config.base_channels + 30
    return int(VAE_SLACK * numbers * height * width * dtype.itemsize)
