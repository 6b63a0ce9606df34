"""Times every capable backend of every op: `python -m benchmarks.kernels [--op X] [--device cpu|cuda] [--json FILE]`.

Gate first, then median ms, GB/s or TFLOP/s, and the ratio to the reference in the same run (above 1 is faster). At the
end, what the tokenwise ops add up to in one forward pass, with linear layers in bfloat16 and in 8 bits. Exits with 1 if
a gate is red.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import Case, cases
from benchmarks.size import CPU_SIZES, CUDA_TOKENWISE_SIZES, HEAD_DIM
from benchmarks.timing import machine, median_ms, report
from benchmarks.tokenwise import forward_ms
from lightx2v_kernels import registry

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCALE = {"GB/s": 1e9, "TFLOP/s": 1e12}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=sorted(registry.registries()), help="one op only (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="of the tokens (default: bfloat16 on cuda, float32 on cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results there too")
    return parser.parse_args(arguments)


def measure(case: Case, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row a backend, the reference last. One that cannot run, is wrong or does not fit has a reason and no time."""
    torch.manual_seed(0)
    args = case.make(device, dtype)
    rows = []
    for backend in registry.registry(case.op).ranked():
        row: dict[str, Any] = {"op": case.op, "case": case.label, "backend": backend.name, "shape": list(args[0].shape)}
        row |= {"unit": case.unit, "ms": None, "rate": None, "ratio": None}
        rows.append(row)
        if why := backend.why_not(device, dtype, HEAD_DIM):
            row["gate"] = f"cannot run: {why}"
            continue
        try:
            wrong = case.gate(backend, args)
            row["gate"] = f"wrong: {wrong}" if wrong else "passed"
            if not wrong:
                row["ms"] = round(median_ms(partial(backend.load(), *args), device), 4)
                row["rate"] = round(case.work(args) / row["ms"] * 1e3 / SCALE[case.unit], 4)
        except torch.OutOfMemoryError:
            row["gate"] = "cannot run: out of memory at this size"
    reference_ms = rows[-1]["ms"]
    for row in rows:
        if row["ms"] and reference_ms:
            row["ratio"] = round(reference_ms / row["ms"], 2)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("op", "case", "backend", "gate")
    for title in ("ms", "rate", "vs reference"):
        shown.add_column(title, justify="right")
    for row in rows:
        ms, rate = ("-", "-") if row["ms"] is None else (f"{row['ms']:.3f}", f"{row['rate']:.3g} {row['unit']}")
        ratio = f"{row['ratio']:.2f}x" if row["ratio"] else "-"
        shown.add_row(row["op"], row["case"], row["backend"], row["gate"], ms, rate, ratio)
    return shown


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: PyTorch {torch.__version__} sees no GPU; use --device cpu")
    dtype = DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    console = Console(width=None if sys.stdout.isatty() else 140)
    rows: list[dict[str, Any]] = []
    for case in cases(device):
        if options.op in (None, case.op):
            rows += measure(case, device, dtype)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    console.print(table(rows))
    sizes = CUDA_TOKENWISE_SIZES if device.type == "cuda" else CPU_SIZES
    forward = {size.name: total for size in sizes if (total := forward_ms(rows, size))}
    for name, paths in forward.items():
        listed = ", ".join(f"{path} {ms} ms" for path, ms in paths.items())
        console.print(f"{name}: norms, modulation, RoPE, residuals and quantisation of one forward pass: {listed}")
    document = {"benchmark": "kernels", **machine(device), "dtype": str(dtype)[6:], "results": rows}
    report(document | {"tokenwise_forward_ms": forward}, options.json)
    return int(any(row["gate"].startswith("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
