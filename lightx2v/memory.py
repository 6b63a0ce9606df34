"""How much memory a stage needs beside its weights. Pure functions of shapes."""

from collections.abc import Sequence

import torch

from lightx2v.identify import CheckpointInfo
from lightx2v.shapes import LatentShape, num_tokens

# One umT5-xxl block widened to float32 (0.77 GB) and its products for 512 tokens.
TEXT_ENCODER_ACTIVATION_BYTES = 1_500_000_000


def transformer_activation_bytes(info: CheckpointInfo, latent_shape: Sequence[int], dtype: torch.dtype) -> int:
    """Peak of one forward pass over latents (B, C, T, H, W): an upper estimate, in bytes.

    Per token and block: the stream, its modulated copy, q, k, v, their rotated copies and the attention result (8 rows
    of hidden_size), or the feed-forward's hidden row before and after GELU, and two float32 rows inside the norms.
    """
    batch, config = latent_shape[0], info.config
    tokens = batch * num_tokens(LatentShape(*latent_shape[2:]), info.spec.patch_size)
    row = (8 * config.hidden_size + 2 * config.ffn_size) * dtype.itemsize + 2 * config.hidden_size * 4
    return tokens * row
