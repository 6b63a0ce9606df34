"""How many tokens one program of a Triton kernel takes, and with how many threads: fixed rules, nothing is tuned at run
time. `python -m benchmarks.tiles` times the alternatives."""

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Tile:
    """rows: tokens a program. warps: of 32 threads. registers: most that a thread may take; None: no limit."""

    rows: int
    warps: int
    registers: int | None = None


def count(length: int, block: int) -> int:
    """Blocks that cover `length`. Plain Python: triton.cdiv costs a launch 5 us."""
    return -(-length // block)


@cache
def norm(width: int, quantised: bool) -> Tile:
    """Of the norms: whole rows in registers, at most 64 values a thread.

    Single long rows need few registers, so that many programs share an SM. Where the maximum of a row is needed too,
    every value is kept in fp32: then two rows share one reading of the tables, and 128 registers leave room for two
    programs.
    """
    block = power_of_two(width)
    if quantised:
        rows = max(2, 8192 // block)
        return Tile(rows, _warps(rows * block, 2048), 128)
    rows = max(1, 4096 // block)
    return Tile(rows, _warps(rows * block, 2048))


@cache
def quantize(width: int) -> Tile:
    """Of the rounding of whole rows: 32 values a thread."""
    block = power_of_two(width)
    rows = max(1, 4096 // block)
    return Tile(rows, _warps(rows * block, 1024))


@cache
def norm_rope(heads: int, head_dim: int) -> Tile:
    """Of the norm and rotary embedding of whole tokens: 64 values a thread."""
    block = power_of_two(heads) * power_of_two(head_dim)
    rows = max(1, 8192 // block)
    return Tile(rows, _warps(rows * block, 2048))


@cache
def residual(width: int) -> Tile:
    """Of the gated residual, which walks a row in blocks of 1024 columns."""
    return Tile(4, 4)


def power_of_two(size: int) -> int:
    """The smallest power of two that holds `size`."""
    return 1 << max(0, size - 1).bit_length()


def _warps(values: int, per_warp: int) -> int:
    return min(16, max(4, values // per_warp))
