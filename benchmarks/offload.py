"""Times blocks that pass through the GPU against blocks that stay: `python -m benchmarks.offload [--model wan2.1-14b]`.

Networks of real size and random weights, in bf16 and then in fp8. Of each, what matters most first, until its share of
`--seconds` is used up: all blocks resident; all streamed, one ahead; as the plan has it within `--budget` GB; streamed
at a size so small that nothing is left but copying, which gives GB/s; two ahead; a quarter, half and three quarters of
the blocks resident. Then blocks that only wait, of the bytes of a block of 14B in bf16 and in 8 bits: how near a pass
comes to the longer of computing and copying. Setting up (28 GB are made, moved to RAM and pinned) is not counted.

Gate first: a streamed pass gives the resident one's result bit for bit, or its time is not reported.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from lightx2v.bench import packed
from lightx2v.bench.subjects import CONFIGS, Inputs, Subject, subject
from lightx2v.bench.timing import machine, report
from lightx2v.bench.weights import build
from lightx2v.blocks import run_blocks
from lightx2v.offload.lane import link_rate
from lightx2v.offload.placing import PINNED_SHARE, ram_bytes
from lightx2v.offload.plan import GB, RESERVE, Machine, Needs, Plan, measure, plan
from lightx2v.offload.stream import BlockStream
from lightx2v_kernels import Kernels, select

# Bytes of one of 40 blocks of 14B.
BLOCK_BYTES = {"bf16": 707_000_000, "8 bits": 354_000_000}
SHARES = {"bf16": 0.6, "fp8": 0.3}  # of the seconds; what is left is for the blocks that wait
LATE = "left out: the seconds are used up"


@dataclass(frozen=True)
class Case:
    """How the blocks of one network are placed. small: at a size whose computing takes next to nothing."""

    name: str
    resident: int
    prefetch: int
    small: bool = False


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offload", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="wan2.1-14b" if cuda else "demo")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument("--attention", default="auto", help="auto, or the name of an attention backend")
    parser.add_argument("--weights", nargs="*", choices=tuple(SHARES), default=list(SHARES), help="default: both")
    parser.add_argument("--budget", type=float, default=8.0, help="GB of GPU memory for the planned case")
    parser.add_argument("--seconds", type=float, default=60, help="for all timing together, without the set-up")
    parser.add_argument("--waiting-blocks", type=int, default=6, help="of the last part; 0 leaves it out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result there too")
    return parser.parse_args(arguments)


def cases(count: int, planned: Plan, budget: float) -> list[Case]:
    """What matters most first."""
    stays = {"a quarter stays": count // 4, "half stay": count // 2, "three quarters stay": count - count // 4}
    return [
        Case("streamed, 1 ahead", 0, 1),
        Case(f"planned within {budget:g} GB", planned.resident, planned.prefetch),
        Case("streamed, 1 ahead, small", 0, 1, small=True),
        Case("streamed, 2 ahead", 0, 2),
        *(Case(name, resident, 1) for name, resident in stays.items()),
    ]


class Clock:
    """Mean ms of a pass, and the peak of memory beside what was there at first; until the seconds are used up."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.left = device, seconds
        self.before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def time(self, work: Callable[[], Any], truth: Tensor | None = None, most: int = 3) -> dict[str, Any]:
        """One pass that only has to be right, then `most` in a row, or as many as there is time for, at least one."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        found: list[Any] = []
        once = self._run(lambda: found.append(work()), 1)
        if truth is not None and not torch.equal(found.pop(), truth):
            return {"gate": "wrong: not what resident blocks give"}
        found.clear()
        count = max(1, min(most, int(self.left * 1000 / max(once, 1e-3))))
        ms = self._run(work, count) / count
        peak = torch.cuda.max_memory_allocated(self.device) - self.before if self.device.type == "cuda" else None
        return {
            "gate": "passed",
            "ms": round(ms, 3),
            "passes": count,
            "peak_gb": None if peak is None else round(peak / GB, 3),
        }

    def _run(self, work: Callable[[], Any], count: int) -> float:
        self._wait()
        began = time.perf_counter()
        for _ in range(count):
            work()
        self._wait()
        seconds = time.perf_counter() - began
        self.left -= seconds
        return seconds * 1000

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Passes:
    """One network, and what it is run with."""

    network: nn.Module
    large: Inputs
    small: Inputs

    def resident(self, *, small: bool) -> Tensor:
        return (self.small if small else self.large).run(self.network)

    def streamed(self, stream: BlockStream, *, small: bool) -> Tensor:
        given = self.small if small else self.large
        walk = stream.around(run_blocks, "")
        out: Tensor = stream.bring()(given.latents, given.timestep, given.context, run=walk, **given.more)
        return out


def measured(passes: Passes, clock: Clock, budget: float, link: float | None) -> dict[str, Any]:
    """Rows of one network whose weights are on the device, and the facts of its set-up."""
    truth = {small: passes.resident(small=small) for small in (False, True)}
    rows: list[dict[str, Any]] = [{"case": "resident", **clock.time(lambda: passes.resident(small=False))}]
    sizes, device = measure(passes.network), clock.device
    activations = max(0, int((rows[0]["peak_gb"] or 0) * GB) - sizes.total)
    ram, total = ram_bytes()
    planned = plan(Needs((sizes,), activations), Machine(int(budget * GB), ram + sizes.total, 0, link))
    began = time.perf_counter()
    stream = BlockStream({"": passes.network}, device, pin_limit=int(PINNED_SHARE * total))
    facts: dict[str, Any] = {"setup_s": round(time.perf_counter() - began, 1), "plan": planned.line()}
    facts |= {"pinned_gb": round(stream.pinned_bytes / GB, 2), "block_gb": round(max(sizes.blocks) / GB, 3)}
    for case in cases(len(sizes.blocks), planned, budget):
        rows.append(row(case, passes, stream, clock, truth[case.small]))
        if case.small and "ms" in rows[-1]:
            facts["h2d_gb_s"] = round(sum(sizes.blocks) / rows[-1]["ms"] / 1e6, 2)
        if "ms" in rows[-1] and not case.small:
            rows[-1]["over_resident"] = round(rows[-1]["ms"] / rows[0]["ms"], 4)
    stream.release()
    return {**facts, "weights_gb": round(sizes.total / GB, 2), "reserve_gb": RESERVE / GB, "rows": rows}


def row(case: Case, passes: Passes, stream: BlockStream, clock: Clock, truth: Tensor) -> dict[str, Any]:
    told = {"case": case.name, "resident": case.resident, "prefetch": case.prefetch}
    if clock.left <= 0:
        return {**told, "gate": LATE}
    with stream.open(case.resident, case.prefetch):
        return {**told, **clock.time(lambda: passes.streamed(stream, small=case.small), truth)}


def made(wanted: Subject, scheme: str, kernels: Kernels, device: torch.device, dtype: torch.dtype) -> Passes:
    network = build(wanted, kernels, device, dtype, "plain")
    if scheme == "fp8":
        packed.pack(wanted, network, scheme, kernels)
    return Passes(network, wanted.inputs(device), wanted.small().inputs(device))


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
    """Of the device's clock; 0 for a CPU."""
    if device.type != "cuda":
        return 0.0
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(10_000_000)
    start.record()
    torch.cuda._sleep(100_000_000)
    end.record()
    end.synchronize()
    return 100_000_000 / start.elapsed_time(end)


def waiting(count: int, clock: Clock, link: float | None) -> list[dict[str, Any]]:
    """Passes over blocks that compute for less time than their copy takes, as long, and longer."""
    rows: list[dict[str, Any]] = []
    device, per_ms = clock.device, ticks_per_ms(clock.device)
    tokens = torch.zeros(1, device=device)
    for kind, full in BLOCK_BYTES.items():
        nbytes = full if device.type == "cuda" else full // 1000
        copying = nbytes / link * 1000 if link else 0.0
        for computing in (5.0, round(copying, 1), 60.0):
            if clock.left <= 0:
                rows.append({"bytes": kind, "computing_ms": computing, "gate": LATE})
                continue
            network = nn.Module()
            network.blocks = nn.ModuleList(Waiting(nbytes, int(computing * per_ms)) for _ in range(count))
            stream = BlockStream({"": network}, device)

            def work(stream: BlockStream = stream) -> Any:
                blocks = list(stream.bring().blocks)  # type: ignore[arg-type]
                return stream.around(run_blocks, "")(blocks, tokens, None)

            with stream.open(0, 1):
                took = clock.time(work)
            stream.release()
            ideal = count * max(computing if per_ms else 0.0, copying)
            over = round(took["ms"] / ideal, 3) if ideal else None
            rows.append({"bytes": kind, "computing_ms": computing, **took, "over_ideal": over})
    return rows


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device, wanted = torch.device(options.device), subject(options.model)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kernels = select(attention=options.attention, device=device, dtype=dtype, head_dim=wanted.spec.head_dim)
    link = link_rate(device)
    result: dict[str, Any] = {"model": wanted.name, "tokens": wanted.tokens, "kernels": dict(kernels.names)}
    result["link_gb_s"] = round(link / GB, 2) if link else None
    for scheme in options.weights:
        clock = Clock(device, options.seconds * SHARES[scheme])
        result[scheme] = measured(made(wanted, scheme, kernels, device, dtype), clock, options.budget, link)
    if options.waiting_blocks:
        rest = options.seconds * (1 - sum(SHARES.values()))
        result["waiting"] = waiting(options.waiting_blocks, Clock(device, rest), link)
    Console(width=None if sys.stdout.isatty() else 140).print(result)
    report({"benchmark": "offload", **machine(device), **result}, options.json)
    rows = [row for scheme in options.weights for row in result[scheme]["rows"]]
    return int(any(row["gate"].startswith("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
