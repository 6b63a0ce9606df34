"""Times blocks that pass through the GPU against blocks that stay: `python -m benchmarks.offload [--model wan-14b]`.

Three parts, each within its share of `--seconds`:

- passes of a Wan transformer of real size and random weights in bf16: resident, then with so many of its blocks
  resident and the others streamed, 1 and 2 of them ahead; then as the plan has it within `--budget` GB;
- the same at a size so small that nothing is left but copying: GB/s;
- blocks that only wait, for every number of bytes that a block of 14B has in bf16 and in 8 bits, and several times of
  computing: how near a pass comes to the longer of computing and copying.

Gate first: a streamed pass gives the resident one's result bit for bit, or its time is not reported.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.transformer import MODELS, Model, build, inputs
from rich.console import Console
from torch import Tensor, nn

from benchmarks.timing import machine, report
from lightx2v.blocks import run_blocks
from lightx2v.models.wan.config import HEAD_DIM
from lightx2v.offload.lane import link_rate
from lightx2v.offload.placing import PINNED_SHARE, ram_bytes
from lightx2v.offload.plan import GB, RESERVE, Machine, Needs, measure, plan
from lightx2v.offload.stream import BlockStream
from lightx2v_kernels import select

SMALL = (1, 16, 16)  # latents whose computing takes next to nothing
# Bytes of one of 40 blocks of 14B.
BLOCK_BYTES = {"bf16": 707_000_000, "8 bit": 354_000_000}


@dataclass(frozen=True)
class Case:
    """How the blocks of one network are placed."""

    name: str
    resident: int
    prefetch: int


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offload", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="wan-14b" if cuda else "demo")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument("--attention", default="auto", help="auto, or the name of an attention backend")
    parser.add_argument("--budget", type=float, default=8.0, help="GB of GPU memory for the planned case")
    parser.add_argument("--seconds", type=float, default=240, help="for all timing together, without the set-up")
    parser.add_argument(
        "--fake-blocks", type=int, default=10, help="blocks of the part that only waits; 0 leaves it out"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result there too")
    return parser.parse_args(arguments)


def cases(count: int) -> list[Case]:
    """Everything streamed, 1 and 2 blocks ahead; then a quarter, half and three quarters that stay."""
    streamed = [Case(f"streamed, {ahead} ahead", 0, ahead) for ahead in (1, 2)]
    stays = {"a quarter stays": count // 4, "half stay": count // 2, "three quarters stay": count - count // 4}
    return streamed + [Case(name, resident, 1) for name, resident in stays.items()]


class Clock:
    """Mean ms of a pass, and the peak of memory beside what was there before."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.before = self._allocated()

    def time(self, work: Callable[[], Any]) -> dict[str, float]:
        """As many passes in a row as there is time for, at least 2, after one."""
        self._reset()
        once = self._run(work, 1)
        count = max(2, min(20, int(self.seconds * 1000 / max(once, 1e-3)) - 1))
        ms = self._run(work, count)
        return {"ms": round(ms / count, 3), "passes": count, "peak_gb": round(self._peak() / GB, 3)}

    def _run(self, work: Callable[[], Any], count: int) -> float:
        self._wait()
        began = time.perf_counter()
        for _ in range(count):
            work()
        self._wait()
        return (time.perf_counter() - began) * 1000

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _peak(self) -> int:
        if self.device.type != "cuda":
            return 0
        return torch.cuda.max_memory_allocated(self.device) - self.before


def passing(stream: BlockStream, args: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    return lambda: stream.bring()(*args, stream.around(run_blocks, ""))


def real(model: Model, options: argparse.Namespace, device: torch.device, link: float | None) -> dict[str, Any]:
    """The first two parts."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kernels = select(attention=options.attention, device=device, dtype=dtype, head_dim=HEAD_DIM)
    found = cases(model.config.num_layers)
    share = options.seconds * 0.8 / (len(found) + 4)
    args, clock = inputs(model, device), Clock(device, share)
    network = build(model.config, kernels, device, dtype)
    truth = network(*args)
    rows = [{"case": "resident", "gate": "passed", **clock.time(lambda: network(*args))}]
    activations = int((rows[0]["peak_gb"] - measure(network).total / GB) * GB)
    small = inputs(replace(model, latents=SMALL), device)
    rows.append({"case": "resident, small", "gate": "passed", **clock.time(lambda: network(*small))})
    began, free = time.perf_counter(), torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else sys.maxsize
    stream = BlockStream({"": network}, device, pin_limit=int(PINNED_SHARE * ram_bytes()[1]))
    setup = time.perf_counter() - began
    room = Machine(min(int(options.budget * GB), free), ram_bytes()[0], 0, link)
    planned = plan(Needs((measure(network),), max(0, activations)), room)
    found.append(Case(f"planned within {options.budget:g} GB", planned.resident, planned.prefetch))
    for case in found:
        with stream.open(case.resident, case.prefetch):
            work = passing(stream, args)
            rows.append(row(case, torch.equal(work(), truth), clock, work))
    truth = None  # type: ignore[assignment]
    with stream.open(0, 1):
        expected = passing(stream, small)()
        work = passing(stream, small)
        rows.append(row(Case("streamed, small", 0, 1), torch.equal(work(), expected), clock, work))
    copied = sum(measure(network).blocks)
    rate = copied / rows[-1]["ms"] / 1e6 if rows[-1].get("ms") else None
    facts = {"setup_s": round(setup, 1), "pinned_gb": round(stream.pinned_bytes / GB, 2), "plan": planned.line()}
    return {**facts, "reserve_gb": RESERVE / GB, "streamed_gb": copied / GB, "achieved_gb_s": rate, "rows": rows}


def row(case: Case, right: bool, clock: Clock, work: Callable[[], Any]) -> dict[str, Any]:
    told = {"case": case.name, "resident": case.resident, "prefetch": case.prefetch}
    if not right:
        return {**told, "gate": "wrong: not what the resident blocks give"}
    return {**told, "gate": "passed", **clock.time(work)}


class Waiting(nn.Module):
    """A block of so many bytes that keeps the device busy for so many ticks of its clock, and nothing else."""

    def __init__(self, nbytes: int, ticks: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(nbytes, dtype=torch.uint8))
        self._ticks = ticks

    def forward(self, tokens: Tensor, args: Any) -> Tensor:
        if tokens.device.type == "cuda":
            torch.cuda._sleep(self._ticks)
        return tokens


def ticks_per_ms(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(10_000_000)
    start.record()
    torch.cuda._sleep(100_000_000)
    end.record()
    end.synchronize()
    return 100_000_000 / start.elapsed_time(end)


def waiting(options: argparse.Namespace, device: torch.device, link: float | None) -> list[dict[str, Any]]:
    """The third part."""
    rows: list[dict[str, Any]] = []
    per_ms, clock = ticks_per_ms(device), Clock(device, options.seconds * 0.2 / 12)
    for kind, nbytes in BLOCK_BYTES.items():
        nbytes = nbytes if device.type == "cuda" else nbytes // 1000
        for computing in (5, 20, 75):
            network = nn.Module()
            network.blocks = nn.ModuleList(Waiting(nbytes, int(computing * per_ms)) for _ in range(options.fake_blocks))
            stream = BlockStream({"": network}, device)
            for prefetch in (1, 2):
                with stream.open(0, prefetch):
                    tokens = torch.zeros(1, device=device)

                    def work(stream: BlockStream = stream, tokens: Tensor = tokens) -> Any:
                        blocks = list(stream.bring().blocks)  # type: ignore[arg-type]
                        return stream.around(run_blocks, "")(blocks, tokens, None)

                    took = clock.time(work)
                copying = nbytes / link * 1000 if link else 0.0
                ideal = options.fake_blocks * max(computing if per_ms else 0, copying)
                rows.append({"bytes": kind, "computing_ms": computing, "prefetch": prefetch, **took})
                rows[-1]["over_ideal"] = round(took["ms"] / ideal, 3) if ideal else None
            stream.release()
    return rows


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    link = link_rate(device)
    result: dict[str, Any] = {"model": options.model, "link_gb_s": round(link / GB, 2) if link else None}
    result |= real(MODELS[options.model], options, device, link)
    result["waiting"] = waiting(options, device, link) if options.fake_blocks else []
    Console(width=None if sys.stdout.isatty() else 140).print(result)
    report({"benchmark": "offload", **machine(device), **result}, options.json)
    return int(any(row["gate"] != "passed" for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
