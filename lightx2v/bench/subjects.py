"""Networks and the videos they are timed at: real sizes, random inputs, and how much arithmetic one forward pass is."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightx2v.kept import Keep, anew
from lightx2v.models import ModelSpec, specs
from lightx2v.models.hunyuan_video_15.config import HunyuanConfig
from lightx2v.models.hunyuan_video_15.transformer import Conditioning
from lightx2v.models.wan.config import WanConfig
from lightx2v.shapes import LatentShape, VideoShape, num_tokens, snap, to_latent

TEXT_TOKENS = 512  # of every Wan
PROMPT_TOKENS = 256  # of HunyuanVideo-1.5: a long prompt, none of it padding
TIMESTEP = 700.0
SIZES = {"480p": (480, 832), "720p": (720, 1280), "demo": (128, 128)}  # height, width

WAN = WanConfig(
    hidden_size=1536,
    ffn_size=8960,
    num_layers=30,
    in_channels=16,
    out_channels=16,
    text_dim=4096,
    freq_dim=256,
    patch_size=(1, 2, 2),
)
# The published config.json of each; hunyuan-1.5: Tencent-Hunyuan/HunyuanVideo-1.5, transformer/480p_t2v.
CONFIGS: Mapping[str, WanConfig | HunyuanConfig] = {
    "wan2.1-14b": replace(WAN, hidden_size=5120, ffn_size=13824, num_layers=40),
    "wan2.1-1.3b": WAN,
    "wan2.2-ti2v-5b": replace(WAN, hidden_size=3072, ffn_size=14336, in_channels=48, out_channels=48),
    "hunyuan-1.5": HunyuanConfig(
        hidden_size=2048,
        ffn_size=8192,
        num_layers=54,
        refiner_layers=2,
        refiner_ffn_size=8192,
        in_channels=65,
        out_channels=32,
        text_dim=3584,
        glyph_dim=1472,
        glyph_size=2048,
        image_dim=1152,
        freq_dim=256,
        patch_size=(1, 1, 1),
    ),
    "demo": replace(WAN, hidden_size=256, ffn_size=896, num_layers=6),
}
SPECS = {
    "wan2.1-14b": "wan2.1_t2v_14b",
    "wan2.1-1.3b": "wan2.1_t2v_1.3b",
    "wan2.2-ti2v-5b": "wan2.2_ti2v_5b",
    "hunyuan-1.5": "hunyuan1.5",
    "demo": "wan2.1_t2v",
}
FRAMES = {"wan2.2-ti2v-5b": 121, "hunyuan-1.5": 121, "demo": 17}


@dataclass(frozen=True)
class Inputs:
    """Arguments of one forward pass: latents (1, C, T, H, W), timestep (1,) or (1, T), what is asked, and the rest."""

    latents: Tensor
    timestep: Tensor
    context: Any  # (1, S, text_dim), or HunyuanVideo-1.5's Conditioning
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def run(self, network: torch.nn.Module, keep: Keep = anew) -> Tensor:
        """The velocity (1, C, T, H, W). keep: the same for every call makes each but the first one of the middle of a
        request, whose first step has turned the prompt to keys and values."""
        out: Tensor = network(self.latents, self.timestep, self.context, keep=keep, **self.more)
        return out


@dataclass(frozen=True)
class Subject:
    """A network at one size of video.

    frame_times: every latent frame has a timestep of its own, as TI2V-5B is sent them.
    """

    name: str
    spec: ModelSpec
    config: Any
    video: VideoShape
    frame_times: bool = False

    @property
    def latents(self) -> LatentShape:
        return to_latent(self.video, self.spec.latents.stride)

    @property
    def tokens(self) -> int:
        """Of the video."""
        return num_tokens(self.latents, self.config.patch_size)

    def inputs(self, device: torch.device) -> Inputs:
        """Random, float32, the same for the same size."""
        generator = torch.Generator(device).manual_seed(1)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator)

        config, shape = self.config, self.latents
        latents = randn(1, config.out_channels, *shape)
        if isinstance(config, HunyuanConfig):
            asked = Conditioning(text=randn(1, PROMPT_TOKENS, config.text_dim))
            given = torch.zeros(1, config.in_channels - config.out_channels, *shape, device=device)
            return Inputs(latents, torch.full((1,), TIMESTEP, device=device), asked, {"image": given})
        times = torch.full((1, shape.t) if self.frame_times else (1,), TIMESTEP, device=device)
        if self.frame_times:
            times[:, 0] = 0  # the given first frame is clean
        return Inputs(latents, times, randn(1, TEXT_TOKENS, config.text_dim))

    def small(self, num_layers: int = 2) -> "Subject":
        """The same network at its full width, with few layers and about 200 tokens, to compare results at."""
        (_, sh, sw), (_, ph, pw) = self.spec.latents.stride, self.config.patch_size
        video = VideoShape(9, 6 * sh * ph, 10 * sw * pw)  # three different sizes, so that a swapped axis shows
        return replace(self, config=replace(self.config, num_layers=num_layers), video=video)

    def toy(self) -> "Subject":
        """The same kind of network, small enough to try everything out on a CPU."""
        narrow = {"hidden_size": 256, "ffn_size": 512, "text_dim": 64}
        if isinstance(self.config, HunyuanConfig):
            narrow |= {"ffn_size": 1024, "refiner_ffn_size": 1024, "glyph_dim": 64, "image_dim": 64}
        toy = self.small()
        return replace(toy, config=replace(toy.config, **narrow))

    def flops(self) -> float:
        """Of one forward pass, a multiply-add as two: the tokens through their matrices, and attention."""
        config, n = self.config, self.tokens
        d, f, layers = config.hidden_size, config.ffn_size, config.num_layers
        edges = 2.0 * n * d * (config.in_channels + config.out_channels) * config.patch_size[1] * config.patch_size[2]
        if isinstance(config, HunyuanConfig):
            both = n + PROMPT_TOKENS
            return layers * (2.0 * both * (4 * d * d + 2 * d * f) + 4.0 * both * both * d) + edges
        block = 2.0 * n * (6 * d * d + 2 * d * f) + 4.0 * TEXT_TOKENS * d * d + 4.0 * n * (n + TEXT_TOKENS) * d
        return layers * block + edges + 2.0 * TEXT_TOKENS * d * (config.text_dim + d)


def subject(name: str, size: str = "480p", num_frames: int | None = None) -> Subject:
    """name: of CONFIGS. size: of SIZES; demo has one size of its own. num_frames: default as the model was trained."""
    spec = next(spec for spec in specs() if spec.name == SPECS[name])
    height, width = SIZES["demo" if name == "demo" else size]
    asked = VideoShape(num_frames or FRAMES.get(name, 81), height, width)
    video, _ = snap(asked, spec.latents, spec.patch_size)
    return Subject(name, spec, CONFIGS[name], video, frame_times=spec.keeps_frames)
