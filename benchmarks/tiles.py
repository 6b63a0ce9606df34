"""Times the Triton kernels of the tokenwise ops under other tiles: `python -m benchmarks.tiles [--op X] [--size NAME]`.

Needs a GPU. One line an op and tile, the fastest first, with the tile that `lightx2v_kernels.tiles` would take marked;
what does not compile or is wrong has a reason and no time. The last line is one JSON document.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import Case, tokenwise
from benchmarks.size import CUDA_TOKENWISE_SIZES, HEAD_DIM, Size
from benchmarks.timing import machine, median_ms, report
from lightx2v_kernels import TOKENWISE, registry, tiles
from lightx2v_kernels.tiles import Tile

SIZES = {size.name: size for size in CUDA_TOKENWISE_SIZES}
# Rows and warps, where a thread holds this many values of a row: beyond, the compiler would have to spill.
SHAPES = ((1, 4), (1, 8), (1, 16), (2, 4), (2, 8), (2, 16), (4, 4), (4, 8), (4, 16), (8, 4), (8, 8), (16, 4), (32, 4))
VALUES = (8, 128)
# Values a thread holds in fp32 until their maximum is known -> registers that let one more program share an SM.
LIMITS = {32: 80, 64: 128}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    ops = [op for op in TOKENWISE if "triton" in registry.names(op)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=ops, action="append", help="one op only, may be repeated (default: all)")
    parser.add_argument("--size", choices=SIZES, default="wan-14b-480p", help="of the tokens (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results there too")
    options = parser.parse_args(arguments)
    options.op = options.op or ops
    return options


def width(op: str, size: Size) -> int:
    """Values that one program holds for each row: what a tile must be cut for."""
    if op == "gated_residual":
        return 1024
    if op == "norm_rope":
        return tiles.power_of_two(size.num_heads) * HEAD_DIM
    return tiles.power_of_two(size.ffn_size if op == "gelu_quantize" else size.hidden_size)


def candidates(op: str, size: Size) -> list[Tile]:
    """The one that the rule gives, and others worth a try at this width."""
    block = width(op, size)
    found = [tiles.residual(size.hidden_size) if op == "gated_residual" else tiles.whole_rows(block)]
    for rows, warps in SHAPES:
        values = rows * block / (32 * warps)
        if VALUES[0] <= values <= VALUES[1]:
            found.append(Tile(rows, warps))
            if op.endswith("quantize") and values in LIMITS:
                found.append(Tile(rows, warps, LIMITS[int(values)]))
    return list(dict.fromkeys(found))


@contextmanager
def forced(tile: Tile) -> Iterator[None]:
    """Every kernel runs with this tile."""
    rules = tiles.whole_rows, tiles.residual
    tiles.whole_rows = tiles.residual = lambda _: tile  # type: ignore[assignment]
    try:
        yield
    finally:
        tiles.whole_rows, tiles.residual = rules


def measure(case: Case, tile: Tile, args: tuple[Any, ...]) -> dict[str, Any]:
    backend = next(b for b in registry.registry(case.op).backends if b.name == "triton")
    row: dict[str, Any] = {"op": case.op, "case": case.label, "tile": vars(tile), "ms": None, "rate": None}
    with forced(tile):
        try:
            wrong = case.gate(backend, args)
            if not wrong:
                row["ms"] = round(median_ms(partial(backend.load(), *args), args[0].device, budget_s=0.1), 4)
                row["rate"] = round(case.work(args) / row["ms"] / 1e6, 1)
            row["gate"] = f"wrong: {wrong}" if wrong else "passed"
        except Exception as error:  # too many registers or too little shared memory: the next tile may fit
            row["gate"] = f"{type(error).__name__}: {error}"[:120]
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("op", "case", "rows", "warps", "registers", "rule", "gate")
    for title in ("ms", "GB/s"):
        shown.add_column(title, justify="right")
    for row in rows:
        tile, ruled = row["tile"], "*" if row["ruled"] else ""
        limits = (str(tile["rows"]), str(tile["warps"]), str(tile["registers"] or "-"), ruled)
        shown.add_row(row["op"], row["case"], *limits, row["gate"], str(row["ms"] or "-"), str(row["rate"] or "-"))
    return shown


@torch.inference_mode()
def main(arguments_: list[str] | None = None) -> int:
    options = parse(arguments_)
    if not torch.cuda.is_available():
        raise SystemExit(f"PyTorch {torch.__version__} sees no GPU: tiles are timed on one")
    device, size = torch.device("cuda"), SIZES[options.size]
    rows: list[dict[str, Any]] = []
    for case in tokenwise(size):
        if case.op in options.op and not case.label.endswith("int8"):  # the same tile as fp8
            torch.manual_seed(0)
            args = case.make(device, torch.bfloat16)
            tried = candidates(case.op, size)
            found = [measure(case, tile, args) | {"ruled": tile == tried[0]} for tile in tried]
            rows += sorted(found, key=lambda row: row["ms"] or float("inf"))
            torch.cuda.empty_cache()
    Console(width=None if sys.stdout.isatty() else 140).print(table(rows))
    report({"benchmark": "tiles", **machine(device), "results": rows}, options.json)
    return int(any(row["gate"].startswith("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
