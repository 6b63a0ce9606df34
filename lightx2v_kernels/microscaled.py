"""NVFP4 and MXFP8 in PyTorch: numbers of 4 or 8 bits, and one scale for each 16 or 32 of them along a row.

NVFP4: value = code * block scale * unit. A code is e2m1 (sign, two bits of exponent, one of mantissa: 0, 0.5, 1, 1.5,
2, 3, 4, 6), two a byte; a block of 16 has a scale in e4m3; `unit` is one float32 for the whole tensor, its largest
magnitude / (448 * 6). Source: ModelTC/LightX2V, lightx2v_kernel/docs, nvfp4_quantization_basics.md.
MXFP8: value = e4m3 * block scale, where a block of 32 has a power of two, stored as its exponent plus 127 (e8m0).
Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.

Block scales lie as tensor cores read them: tiles of 128 rows by 4 blocks, 512 bytes each, in which the scale of row r
and block b is at byte r % 32 * 16 + r // 32 * 4 + b; tiles follow each other along the row first, and are filled up
with zeros. Source: NVIDIA, cuBLAS documentation, "1D Block Scaling Factors Layout"; LightX2V's
lightx2v_kernel/csrc/gemm/nvfp4_quant_kernels_sm120.cu and Comfy-Org/comfy-kitchen's float_utils.py (to_blocked) agree.

Everything is held as bytes (uint8): PyTorch before 2.8 has no dtypes for these.
"""

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lowest three bits; the fourth is the sign
LARGEST_E2M1, LARGEST_E4M3 = 6.0, 448.0
NVFP4_BLOCK, MXFP8_BLOCK = 16, 32
TILE_ROWS, TILE_BLOCKS = 128, 4
NOT_A_NUMBER = {"e4m3": 0x7F, "e8m0": 0xFF}  # the codes of a scale that are none; e4m3's sign aside


def scale_shape(rows: int, blocks: int) -> tuple[int, int]:
    """Rows and columns of the bytes that hold the scales of (rows, blocks): whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-blocks // TILE_BLOCKS) * TILE_BLOCKS


def tiled(scales: Tensor) -> Tensor:
    """scales (rows, blocks) uint8 -> the same in tiles, `scale_shape` uint8."""
    height, width = scale_shape(*scales.shape)
    whole = scales.new_zeros(height, width)
    whole[: scales.shape[0], : scales.shape[1]] = scales
    tiles = whole.view(height // TILE_ROWS, 4, 32, width // TILE_BLOCKS, TILE_BLOCKS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(height, width)


def untiled(scales: Tensor, rows: int, blocks: int) -> Tensor:
    """What `tiled` made -> (rows, blocks)."""
    height, width = scale_shape(rows, blocks)
    tiles = scales.reshape(height // TILE_ROWS, width // TILE_BLOCKS, 32, 4, TILE_BLOCKS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(height, width)[:rows, :blocks]


def from_e8m0(exponents: Tensor) -> Tensor:
    """Exponents plus 127, uint8 -> powers of two, float32; 255 is NaN."""
    found = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - 127)
    return found.masked_fill(exponents == NOT_A_NUMBER["e8m0"], torch.nan)


def restore_nvfp4(codes: Tensor, scales: Tensor, unit: Tensor, high_first: bool) -> Tensor:
    """codes (N, K / 2) uint8, scales in tiles uint8, unit (1,) float32 -> (N, K) float32.

    high_first: whether of two values the first is in the upper half of their byte (ComfyUI), or the lower (LightX2V).
    """
    rows, size = codes.shape[0], codes.shape[1] * 2
    halves = (codes >> 4, codes & 15) if high_first else (codes & 15, codes >> 4)
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    values = table[torch.stack(halves, 2).int()].view(rows, size // NVFP4_BLOCK, NVFP4_BLOCK)
    block = untiled(scales, rows, size // NVFP4_BLOCK).contiguous().view(torch.float8_e4m3fn).float() * unit.float()
    return (values * block.unsqueeze(2)).view(rows, size)


def restore_mxfp8(values: Tensor, scales: Tensor) -> Tensor:
    """values (N, K) e4m3 as uint8, scales in tiles uint8 -> (N, K) float32."""
    rows, size = values.shape
    blocks = values.view(torch.float8_e4m3fn).float().view(rows, size // MXFP8_BLOCK, MXFP8_BLOCK)
    return (blocks * from_e8m0(untiled(scales, rows, size // MXFP8_BLOCK)).unsqueeze(2)).view(rows, size)


def unit_of(largest: Tensor) -> Tensor:
    """The largest magnitude of a tensor, float32 -> NVFP4's unit (1,): block scales then reach up to 448."""
    return (largest / (LARGEST_E4M3 * LARGEST_E2M1)).reshape(1)


def quantise_nvfp4(x: Tensor, unit: Tensor, high_first: bool) -> tuple[Tensor, Tensor]:
    """x (N, K) finite floats, K a multiple of 16, and `unit_of` its largest -> codes (N, K / 2), scales (N, K / 16).

    Both uint8, the scales in rows. Each value goes to the nearest code, ties to the even one; a block's scale makes its
    largest value 6, rounded to e4m3, so that the largest may be cut by as much as that rounding.
    """
    blocks = x.float().unflatten(1, (-1, NVFP4_BLOCK))
    wanted = blocks.abs().amax(2) / LARGEST_E2M1
    scale = torch.where(unit > 0, wanted / unit, 0.0).clamp(max=LARGEST_E4M3).to(torch.float8_e4m3fn)
    exact = (scale.float() * unit).unsqueeze(2)
    codes = _e2m1(torch.where(exact > 0, blocks / exact, 0.0)).flatten(1)
    first, second = codes[:, 0::2], codes[:, 1::2]
    packed = first << 4 | second if high_first else second << 4 | first
    return packed, scale.view(torch.uint8)


def _e2m1(x: Tensor) -> Tensor:
    """The nearest codes: steps of 0.5 below 2, of 1 below 4, of 2 from there; even codes have even numbers of steps."""
    size = x.abs().clamp(max=LARGEST_E2M1)
    coarse = torch.where(size < 4, size.round() + 2, (size / 2).round() + 4)
    code = torch.where(size < 2, (size * 2).round(), coarse).clamp(max=7)
    return code.to(torch.uint8) | (x < 0).to(torch.uint8) << 3


def quantise_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, K) finite floats, K a multiple of 32 -> e4m3 values (N, K) and exponents (N, K / 32), both uint8, in rows.

    A block's scale is the least power of two with which no value exceeds 448, as LightX2V and comfy-kitchen round it.
    """
    blocks = x.float().unflatten(1, (-1, MXFP8_BLOCK))
    part, exponent = torch.frexp(blocks.abs().amax(2) / LARGEST_E4M3)
    exponent = torch.where(part > 0.5, exponent, exponent - 1).clamp(-127, 127)  # 0.5 * 2^e is 2^(e - 1) itself
    exponent = torch.where(part > 0, exponent, -127)
    values = torch.ldexp(blocks, -exponent.unsqueeze(2)).to(torch.float8_e4m3fn).flatten(1)
    return values.view(torch.uint8), (exponent + 127).to(torch.uint8)
