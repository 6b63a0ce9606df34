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
def whole_rows(width: int) -> Tile:
    """Of kernels that keep rows in registers from their statistics to their result: 64 values a thread, or 4 warps.

    Rows of 1024 to 8192 take 4 warps of 8 values a load: 1024 at a time, of which the usual widths (1536, 3072, 5120)
    are multiples or halves, so that the padding to a power of two costs nothing. What is the same for all tokens is
    read again for each, out of the first cache.
    """
    block = power_of_two(width)
    rows = max(1, 4096 // block)
    return Tile(rows, min(16, max(4, rows * block // 2048)))


@cache
def residual(width: int) -> Tile:
    """Of the gated residual, which walks a row in blocks of 1024 columns."""
    return Tile(4, 4)


def power_of_two(size: int) -> int:
    """The smallest power of two that holds `size`."""
    return 1 << max(0, size - 1).bit_length()
