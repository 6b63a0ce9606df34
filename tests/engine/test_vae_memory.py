"""What decoding and encoding take, counted on tensors without contents, against the estimates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from counting import Peak
from lightx2v.memory import VAE_SLACK, vae_decode_bytes, vae_encode_bytes
from lightx2v.vae.hunyuan15 import HunyuanVAEConfig
from lightx2v.vae.loading import VAEInfo
from lightx2v.vae.stream import decode, encode
from lightx2v.vae.tae import TAEConfig
from lightx2v.vae.wan import WanVAEConfig
from lightx2v.vae.wan22 import Wan22VAEConfig

CONFIGS = {
    "Wan2.1": WanVAEConfig(),
    "LightVAE": WanVAEConfig(24),
    "Wan2.2": Wan22VAEConfig(),
    "Wan2.2, narrow": Wan22VAEConfig(80, 128),
    "HunyuanVideo-1.5": HunyuanVAEConfig(),
    "HunyuanVideo-1.5, narrow": HunyuanVAEConfig((64, 128, 256, 512, 512)),
    "taew2_1": TAEConfig(),
    "taew2_2": TAEConfig("taew2_2"),
    "taew2_1, narrow": TAEConfig("taew2_1", (64, 64, 32, 16), 32),
}
HEIGHT, WIDTH, FRAMES = 480, 832, 57


@pytest.fixture
def bf16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_estimates_are_upper_and_near(bf16: None, name: str) -> None:
    info = VAEInfo(Path("vae"), CONFIGS[name])
    time, rows, columns = info.space.stride
    shape = (1, info.space.channels, (FRAMES - 1) // time + 1, HEIGHT // rows, WIDTH // columns)
    with FakeTensorMode():
        vae = info.network()
        # The last that it asks, whether the frames are finite, has no answer here.
        with Peak() as decoding, suppress(DataDependentOutputException):
            decode(vae, torch.empty(shape), clamp=False)
        with Peak() as encoding:
            encode(vae, torch.empty(1, 3, 9, HEIGHT, WIDTH))
    decoded = vae_decode_bytes(info, shape, torch.bfloat16)
    encoded = vae_encode_bytes(info, HEIGHT, WIDTH, torch.bfloat16)
    assert decoding.most < decoded < 1.1 * VAE_SLACK * decoding.most
    assert encoding.most < encoded < 1.15 * VAE_SLACK * encoding.most


def test_beside_the_video_length_costs_nothing() -> None:
    info = VAEInfo(Path("vae"), WanVAEConfig())
    short, long = ((1, 16, frames, 60, 104) for frames in (2, 200))
    assert vae_decode_bytes(info, short, torch.bfloat16, frames=False) == vae_decode_bytes(
        info, long, torch.bfloat16, frames=False
    )
    more = vae_decode_bytes(info, long, torch.bfloat16) - vae_decode_bytes(info, short, torch.bfloat16)
    assert more == 198 * 4 * 480 * 832 * 12
