"""The sizes of a Wan transformer."""

from dataclasses import dataclass

HEAD_DIM = 128  # of every published Wan; the number of heads follows from the width


@dataclass(frozen=True)
class WanConfig:
    """The shape of one Wan transformer. Field names follow the file's tensors, not a config.json."""

    hidden_size: int
    ffn_size: int
    num_layers: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int  # of the sinusoidal timestep embedding
    patch_size: tuple[int, int, int]  # (T, H, W)
    eps: float = 1e-6
    image_dim: int = 0  # width of the CLIP image tokens that cross-attention reads too; 0: none
    image_positions: int = 0  # learnt positions of the image tokens (first-last-frame models); 0: none

    def __post_init__(self) -> None:
        if self.hidden_size % HEAD_DIM:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of head_dim {HEAD_DIM}")

    @property
    def num_heads(self) -> int:
        return self.hidden_size // HEAD_DIM
