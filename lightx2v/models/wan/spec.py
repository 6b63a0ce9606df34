"""Wan checkpoints: what their headers look like and which network they mean."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from lightx2v.checkpoint import Header, block_numbers
from lightx2v.guidance import text_and_images
from lightx2v.latents import WAN21, WAN22, LatentFormat
from lightx2v.models import ImageInput, ModelSpec
from lightx2v.models.wan.caching import PUBLISHED, time_signal
from lightx2v.models.wan.conditioning import image_condition, to_model_input
from lightx2v.models.wan.config import HEAD_DIM, WanConfig
from lightx2v.models.wan.encoders import ENCODERS
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v_kernels import Kernels

BLOCK = re.compile(r"blocks\.(\d+)\.")


def read_config(header: Header) -> WanConfig:
    """Every size from the shapes of the tensors; call it on a header that `is_wan` accepts."""
    patch = header.tensors["patch_embedding.weight"].shape
    out = header.tensors["head.head.weight"].shape[0]
    patch_size = (patch[2], patch[3], patch[4])
    layers = block_numbers(header.path, header.tensors, BLOCK)
    return WanConfig(
        hidden_size=patch[0],
        ffn_size=header.tensors["blocks.0.ffn.0.weight"].shape[0],
        num_layers=max(layers) + 1,
        in_channels=patch[1],
        out_channels=out // (patch_size[0] * patch_size[1] * patch_size[2]),
        text_dim=header.tensors["text_embedding.0.weight"].shape[1],
        freq_dim=header.tensors["time_embedding.0.weight"].shape[1],
        patch_size=patch_size,
        image_dim=(header.shape("img_emb.proj.0.weight") or (0,))[0],
        image_positions=(header.shape("img_emb.emb_pos") or (0, 0))[1],
    )


# Modules of Wan's relatives, which share the rest of the layout but cannot be run as a plain Wan.
RELATIVES = ("vace_", "control_adapter.", "ref_conv.", "audio_", "casual_audio_", "face_", "motion_", "pose_", "cond_")


def is_wan(header: Header) -> bool:
    """The original key layout of any text- or image-to-video Wan diffusion transformer."""
    ranks = {
        "patch_embedding.weight": 5,
        "head.head.weight": 2,
        "head.modulation": 3,
        "blocks.0.ffn.0.weight": 2,
        "blocks.0.self_attn.norm_q.weight": 1,
        "text_embedding.0.weight": 2,
        "time_embedding.0.weight": 2,
    }
    fits = all(len(header.shape(name) or ()) == rank for name, rank in ranks.items())
    return fits and not any(name.startswith(RELATIVES) for name in header.tensors)


def _build(config: WanConfig, kernels: Kernels) -> nn.Module:
    return WanTransformer(config, kernels)


def keep_float32(name: str) -> bool:
    """Timestep path, modulation and affine norms are small and sensitive; Wan and diffusers keep them in float32."""
    timestep_path = name.startswith(("time_embedding.", "time_projection.")) or name.endswith("modulation")
    return timestep_path or ".norm3." in name or name.startswith(("img_emb.proj.0.", "img_emb.proj.4."))


def quantises(name: str) -> bool:
    """The layers that see every token: 13.9 of 14.3 billion parameters. Embeddings, timestep path, head and modulation
    stay, as in LightX2V's own quantised files."""
    return bool(re.fullmatch(r"blocks\.\d+\.((self|cross)_attn\.(q|k|v|o|k_img|v_img)|ffn\.[02])", name))


@dataclass(frozen=True)
class _Kind:
    """Variants that differ in size alone: their input, and what else their specs say."""

    name: str
    task: str
    title: str
    latents: LatentFormat
    image_channels: int = 0
    clip: bool = False
    positions: bool = False
    sizes: Mapping[tuple[int, int], tuple[str, str]] = field(default_factory=dict)  # (width, layers): suffix, title
    boundary: float | None = None

    def describes(self, header: Header) -> bool:
        """Whether the header is of this kind, of whatever size."""
        if not is_wan(header):
            return False
        config, channels = read_config(header), self.latents.channels
        return (
            (config.in_channels, config.out_channels) == (channels + self.image_channels, channels)
            and bool(config.image_dim) == self.clip
            and bool(config.image_positions) == self.positions
        )

    def specs(self) -> tuple[ModelSpec, ...]:
        """One for each published size, one for all others."""
        published = tuple(self._spec(size, *names) for size, names in self.sizes.items())
        return (*published, self._spec(None, "", self.title))

    def _spec(self, size: tuple[int, int] | None, suffix: str, title: str) -> ModelSpec:
        def matches(header: Header) -> bool:
            if not self.describes(header):
                return False
            config = read_config(header)
            found = (config.hidden_size, config.num_layers)
            return found not in self.sizes if size is None else found == size

        return ModelSpec(
            name=self.name + suffix,
            title=title,
            family="wan",
            task=self.task,
            matches=matches,
            config=read_config,
            build=_build,
            keep_float32=keep_float32,
            quantises=quantises,
            head_dim=HEAD_DIM,
            latents=self.latents,
            patch_size=(1, 2, 2),
            encoders=ENCODERS,
            arguments=text_and_images,
            image_input=ImageInput(image_condition, to_model_input) if self.image_channels else None,
            reads_clip=self.clip,
            keeps_frames=self.task == "ti2v",
            fps=24 if self.task == "ti2v" else 16,
            boundary=self.boundary,
            time_signal=time_signal,
            figures=PUBLISHED.get(self.name + suffix, {}),
        )


MASK_AND_IMAGE = 4 + WAN21.channels  # one mask channel for each of a latent frame's four frames, and image latents
BIG = (5120, 40)
KINDS = (
    _Kind(
        "wan2.1_t2v",
        "t2v",
        "Wan2.1 T2V",
        WAN21,
        sizes={
            (1536, 30): ("_1.3b", "Wan2.1 T2V 1.3B"),
            # One layout, three models: only the file's name can tell them apart, and who loads a pair of them.
            BIG: ("_14b", "Wan2.1 T2V 14B or an expert of Wan2.2 T2V A14B"),
        },
        boundary=0.875,
    ),
    _Kind(
        "wan2.1_i2v",
        "i2v",
        "Wan2.1 I2V",
        WAN21,
        image_channels=MASK_AND_IMAGE,
        clip=True,
        sizes={BIG: ("_14b", "Wan2.1 I2V 14B")},
    ),
    _Kind(
        "wan2.1_flf2v",
        "flf2v",
        "Wan2.1 FLF2V",
        WAN21,
        image_channels=MASK_AND_IMAGE,
        clip=True,
        positions=True,
        sizes={BIG: ("_14b", "Wan2.1 FLF2V 14B")},
    ),
    _Kind(
        "wan2.2_i2v",
        "i2v",
        "Wan2.2 I2V expert",
        WAN21,
        image_channels=MASK_AND_IMAGE,
        sizes={BIG: ("_a14b", "an expert of Wan2.2 I2V A14B")},
        boundary=0.9,
    ),
    _Kind(
        "wan2.2_ti2v",
        "ti2v",
        "Wan2.2 TI2V",
        WAN22,
        sizes={(3072, 30): ("_5b", "Wan2.2 TI2V 5B")},
    ),
)
SPECS = tuple(spec for kind in KINDS for spec in kind.specs())
