"""The models whose shapes are timed."""

from dataclasses import dataclass

HEAD_DIM = 128


@dataclass(frozen=True)
class Size:
    """Tokens of one forward pass, and the width of the model that runs it.

    runs: timesteps a sample, each of a run of its tokens.
    """

    name: str
    batch: int
    tokens: int
    hidden_size: int
    ffn_size: int = 1024
    layers: int = 1
    runs: int = 1

    @property
    def num_heads(self) -> int:
        return self.hidden_size // HEAD_DIM


# 480p is 832 x 480 x 81 frames: 21 x 30 x 52 tokens; 720p is 1280 x 720 x 81: 21 x 45 x 80. TI2V 5B is 1280 x 704 x 121
# at 31 latent frames of 22 x 40 tokens, each with a timestep. "demo" is the clip of the pack's own small model.
CUDA_SIZES = (
    Size("wan-1.3b-480p", 1, 32760, 1536, 8960, 30),
    Size("wan-14b-480p", 1, 32760, 5120, 13824, 40),
)
CUDA_TOKENWISE_SIZES = (
    *CUDA_SIZES,
    Size("wan-14b-720p", 1, 75600, 5120, 13824, 40),
    Size("ti2v-5b-720p", 1, 27280, 3072, 14336, 30, runs=31),
)
CPU_SIZES = (
    Size("demo", 1, 320, 256, 896, 6),
    Size("demo-long", 2, 1560, 256, 896, 6),
    Size("wan-1.3b-short", 1, 1560, 1536, 8960, 30),
)
