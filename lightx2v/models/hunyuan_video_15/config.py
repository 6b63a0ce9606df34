"""The sizes of a HunyuanVideo-1.5 transformer."""

from dataclasses import dataclass

HEAD_DIM = 128  # of every published one; the number of heads follows from the width
ROPE_CHANNELS = (16, 56, 56)  # of a head, for T, H and W: rope_dim_list of the published config.json
ROPE_THETA = 256.0  # rope_theta there


@dataclass(frozen=True)
class HunyuanConfig:
    """The shape of one HunyuanVideo-1.5 transformer. Field names follow the file's tensors, not a config.json."""

    hidden_size: int
    ffn_size: int
    num_layers: int
    refiner_layers: int  # blocks that the text goes through before it meets the video
    refiner_ffn_size: int
    in_channels: int  # noisy latents, latents of given frames, and the mask that says which are given
    out_channels: int
    text_dim: int  # of the language model's tokens
    glyph_dim: int  # of byT5's
    glyph_size: int  # inside the mapper that widens them
    image_dim: int  # of the image encoder's tokens
    freq_dim: int  # of the sinusoidal timestep embedding
    patch_size: tuple[int, int, int]  # (T, H, W)
    reads_step_end: bool = False  # step-distilled: the timestep that a step goes to is read too
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.hidden_size % HEAD_DIM:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of head_dim {HEAD_DIM}")

    @property
    def num_heads(self) -> int:
        return self.hidden_size // HEAD_DIM
