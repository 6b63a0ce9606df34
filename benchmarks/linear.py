"""Times packed linear layers and the tilings of their Triton kernels: `python -m benchmarks.linear [--seconds 240]`.

Wan 14B's shapes at 480p (32760 tokens) and for the text (512). Gate first: every 257th token against the formula in
fp64, by the rule of the tests, with the results of plain PyTorch at the type of the tokens as the yardstick. Yardsticks
in the same run: bf16 `F.linear`, and `torch._scaled_mm` with one scale a tensor. Two rounds over everything, because a
GPU slows down as it warms up. Stops when the seconds are over, most important first; says what it left out.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases_linear import MICROSCALED, PACKED, blocks_of, flops, microscaled, scaled
from benchmarks.timing import machine, median_ms, report
from lightx2v_kernels import registry
from lightx2v_kernels.closeness import relative_error, why_too_far
from lightx2v_kernels.linear.reference import plain_linear, scaled_linear
from lightx2v_kernels.microscaled import restore_mxfp8, restore_nvfp4

Timed = Callable[[], Tensor]


@dataclass
class Candidate:
    """One way to compute one layer. times: ms, one a round."""

    layer: str
    name: str
    run: Timed
    work: float
    gate: Callable[[Tensor], tuple[str, float | None]]
    row: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)


def shapes(device: torch.device) -> list[tuple[int, int, int]]:
    """(tokens, rows, size) of the layers that Wan 14B spends its time in; small ones on a CPU, to try this file."""
    if device.type == "cpu":
        return [(70, 96, 64), (40, 64, 96)]
    return [(32760, 5120, 5120), (32760, 13824, 5120), (32760, 5120, 13824), (512, 5120, 5120)]


def tilings(packed: torch.dtype, tokens: int, small: bool) -> Iterator[Any]:
    """The most promising first."""
    from lightx2v_kernels.linear import _triton

    tiling = partial(_triton.Tiling, group_m=8)
    if small:
        yield from (tiling(32, 32, 32, warps=4, stages=2, tma=tma) for tma in (False, True))
        return
    yield _triton.WIDE if tokens > 1024 else _triton.NARROW
    if tokens <= 1024:
        for m, n, k, stages in ((64, 128, 128, 4), (128, 128, 128, 3), (64, 64, 128, 5), (64, 256, 128, 3)):
            yield tiling(m, n, k, warps=4, stages=stages)
            yield tiling(m, n, k, warps=4, stages=stages, tma=True)
        return
    promotions = (0,) if packed == torch.int8 else (0, 128)
    for promote in promotions:
        width = 128 if promote else 256
        for tma, persistent in ((True, True), (True, False), (False, False)):
            for stages in (3, 4):
                yield tiling(128, width, 128, stages=stages, tma=tma, persistent=persistent, promote=promote)
        yield tiling(256, 128, 128, stages=3, tma=True, promote=promote)
        yield tiling(128, width, 64, stages=5, tma=True, promote=promote)
        yield tiling(128, 128, 128, warps=4, stages=4, tma=True, promote=promote)
        yield tiling(128, width, 128, stages=3, tma=True, group_m=16, promote=promote)


def gate_of(args: tuple[Any, ...]) -> Callable[[Tensor], tuple[str, float | None]]:
    """Judges results of an 8-bit layer: ("passed" or why not, relative error)."""
    values, scale, weight, weight_scale, bias, dtype = args
    rows = torch.unique(torch.tensor([*range(0, len(values), 257), len(values) - 1])).to(values.device)
    few = (values[rows], scale[rows], weight, weight_scale, bias)
    truth = scaled_linear(*(None if a is None else a.double() for a in few), dtype)
    plain = plain_linear(*few, dtype)

    def judge(out: Tensor) -> tuple[str, float | None]:
        wrong = why_too_far(out[rows], truth, plain)
        return (f"wrong: {wrong}" if wrong else "passed"), relative_error(out[rows], truth)

    return judge


def candidates(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Iterator[Candidate]:
    """Every backend and tiling of one layer, and the yardsticks."""
    tokens, rows, size = shape
    layer = f"{tokens}x{size}->{rows}"
    x, weight = (torch.randn(n, size, device=device, dtype=dtype) for n in (tokens, rows))
    bias = torch.randn(rows, device=device, dtype=dtype)
    plain = partial(F.linear, x, weight, bias)
    yield Candidate(layer, f"{str(dtype)[6:]} F.linear", plain, 2.0 * tokens * rows * size, lambda out: ("", None))
    for op, packed in PACKED.items():
        args = scaled(packed, tokens, rows, size, device, dtype)
        work, judge = flops(args), gate_of(args)
        for backend in registry.registry(op).ranked():
            if backend.name != "reference" and backend.why_not(device, dtype, 128) is None:
                yield Candidate(layer, f"{op} {backend.name}", partial(backend.load(), *args), work, judge)
        if packed == torch.float8_e4m3fn and device.type == "cuda":
            one, by = torch.ones((), device=device), args[2].t()
            whole = partial(torch._scaled_mm, args[0], by, one, one, args[4], None, dtype, True)
            yield Candidate(layer, "fp8 one scale a tensor", whole, work, lambda out: ("", None))
        yield from _tiled(layer, op, packed, args, judge)
    yield from gguf_candidates(layer, x, rows, bias)
    yield from microscaled_candidates(layer, x, rows)


def _tiled(layer: str, op: str, packed: torch.dtype, args: tuple[Any, ...], judge: Any) -> Iterator[Candidate]:
    from lightx2v_kernels.linear._triton import product

    values, scale, weight, weight_scale, bias, dtype = args
    flat = scale.flatten().contiguous()
    for tiling in dict.fromkeys(tilings(packed, len(values), values.device.type == "cpu")):
        run = partial(product, values, flat, weight, weight_scale, bias, dtype, tiling)
        yield Candidate(layer, f"{op} {tiling}", run, flops(args), judge)


def gguf_candidates(layer: str, x: Tensor, rows: int, bias: Tensor) -> Iterator[Candidate]:
    """Restoring alone, and with the product."""
    from lightx2v_kernels.linear._triton_gguf import gguf_linear, restored

    size = x.shape[1]
    for encoding in ("Q8_0", "Q4_K", "Q6_K", "Q5_0", "Q4_0", "Q5_K"):
        if size % 256 and encoding.endswith("_K"):
            continue
        blocks, truth = blocks_of(encoding, rows, size, x.device)
        alone = partial(restored, blocks, encoding, (rows, size), x.dtype)
        whole = partial(gguf_linear, x, blocks, encoding, (rows, size), bias)
        yield from _restoring(layer, f"gguf {encoding}", alone, whole, x, truth, bias)


def microscaled_candidates(layer: str, x: Tensor, rows: int) -> Iterator[Candidate]:
    """The same of NVFP4 and MXFP8; where it runs the product in the format too, judged by the error it declares."""
    from lightx2v_kernels.linear import _triton_microscaled as ours

    tokens, size = x.shape
    for op in MICROSCALED:
        given = microscaled(op, tokens, rows, size, x.device, x.dtype)
        args, bias = (x, *given[1:]), given[-1]
        if op == "nvfp4_linear":
            truth, alone = restore_nvfp4(*args[1:5]), partial(ours.restored_nvfp4, *args[1:5], x.dtype)
        else:
            truth, alone = restore_mxfp8(*args[1:3]), partial(ours.restored_mxfp8, *args[1:3], x.dtype)
        yield from _restoring(
            layer, op.removesuffix("_linear"), alone, partial(getattr(ours, op), *args), x, truth, bias
        )
        for backend in registry.registry(op).ranked():
            if backend.max_error is not None and backend.why_not(x.device, x.dtype, 128) is None:
                judge = partial(_declared, backend, x, truth, bias)
                yield Candidate(layer, f"{op} {backend.name}", partial(backend.load(), *args), flops(args), judge)


def _declared(
    backend: registry.Backend, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor
) -> tuple[str, float | None]:
    assert backend.max_error is not None
    found = relative_error(out[:64], x[:64].double() @ weight.double().T + bias.double())
    return ("passed" if found <= backend.max_error else f"wrong: above {backend.max_error}"), found


def _restoring(
    layer: str,
    name: str,
    alone: Callable[[], Tensor],
    whole: Callable[[], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Iterator[Candidate]:
    """weight: the values that the packed one stands for, float32."""

    def judge(out: Tensor) -> tuple[str, float | None]:
        few = x[: len(out)][:64]
        wide = few.double() @ weight.double().T + bias.double()
        wrong = why_too_far(out[:64], wide, F.linear(few, weight.to(few.dtype), bias))
        return (f"wrong: {wrong}" if wrong else "passed"), relative_error(out[:64], wide)

    def same(out: Tensor) -> tuple[str, float | None]:
        wrong = why_too_far(out, weight, weight.to(out.dtype))
        return (f"wrong: {wrong}" if wrong else "passed"), relative_error(out, weight)

    yield Candidate(layer, f"{name} restored", alone, 0.0, same)
    yield Candidate(layer, name, whole, 2.0 * x.numel() * len(weight), judge)


def measure(candidate: Candidate, device: torch.device) -> None:
    """One round more. What cannot run or is wrong gets a reason and no time."""
    if "gate" not in candidate.row:
        try:
            gate, error = candidate.gate(candidate.run())
        except Exception as error_raised:  # a tiling may ask for more shared memory than there is
            gate, error = f"cannot run: {type(error_raised).__name__}: {str(error_raised)[:200]}", None
        candidate.row |= {"layer": candidate.layer, "name": candidate.name, "gate": gate or "yardstick", "error": error}
    if candidate.row["gate"] in ("passed", "yardstick"):
        candidate.times.append(round(median_ms(candidate.run, device, budget_s=0.15), 4))
        best = min(candidate.times)
        rate = round(candidate.work / best / 1e9, 1) if candidate.work else None
        candidate.row |= {"ms": candidate.times, "tflops": rate}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240, help="stop after so many (default: 240)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--only", default="", help="candidates whose name holds this, e.g. int8 or gguf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results there too")
    return parser.parse_args(arguments)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device, end = torch.device(options.device), time.monotonic() + options.seconds
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16  # Triton's interpreter multiplies no bfloat16
    rows: list[dict[str, Any]] = []
    left_out = 0
    todo = shapes(device)
    for index, shape in enumerate(todo):
        torch.manual_seed(0)
        stop = time.monotonic() + (end - time.monotonic()) / (len(todo) - index)
        found = [c for c in candidates(shape, device, dtype) if options.only in c.name]
        for candidate in found * 2:
            if time.monotonic() > stop:
                break
            measure(candidate, device)
            if len(candidate.times) == 1 or "ms" not in candidate.row:
                print(candidate.row, file=sys.stderr, flush=True)
        left_out += sum(not candidate.row for candidate in found)
        rows += [candidate.row for candidate in found if candidate.row]
        del found
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report({"benchmark": "linear", **machine(device), "left_out": left_out, "results": rows}, options.json)
    return int(any(row["gate"].startswith("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
