"""`lightx2v bench`: what to time, from flags; a table for people, and one line of JSON or a file of it."""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lightx2v.bench import engine
from lightx2v.bench.packed import SCHEMES
from lightx2v.bench.race import Course, Entry, collect, race
from lightx2v.bench.subjects import CONFIGS, Subject, subject
from lightx2v.bench.timing import keep, machine, report
from lightx2v.bench.weights import WEIGHTS
from lightx2v_kernels import registry

RESERVE = 12 * 2**30  # bytes kept free for what a forward pass needs beside weights
# name -> entry of another implementation that reads a setting's own weights
Peers = Mapping[str, Callable[[engine.Setting], Entry]]
Kept = Callable[[], None]  # called when there is more to keep


@dataclass(frozen=True)
class Plan:
    """One race: a subject, and how the engine and others run it.

    seconds: after which nothing more of it is begun. until: clock (time.monotonic), likewise.
    """

    model: str
    size: str = "480p"
    num_frames: int | None = None
    weights: str = "hot"
    attention: tuple[str, ...] = ("auto",)
    quant: tuple[str, ...] = (engine.NONE,)
    peers: tuple[str, ...] = ()
    rounds: int = 5
    seconds: float = 600
    until: float = float("inf")
    profile: bool = True
    toy: bool = False  # the same kind of network, of toy size

    def facts(self) -> dict[str, Any]:
        """What was asked, for the report."""
        return {name: value for name, value in asdict(self).items() if name not in ("seconds", "until")}


@torch.no_grad()
def run_plan(plan: Plan, device: torch.device, peers: Peers, results: list[dict[str, Any]], kept: Kept) -> None:
    """Add one result to `results`, and to its rows as they come. What fails is in the result, in words."""
    until = min(plan.until, time.monotonic() + plan.seconds)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    which = subject(plan.model, plan.size, plan.num_frames)
    which = which.toy() if plan.toy else which
    result: dict[str, Any] = {**plan.facts(), **_facts(which), "dtype": str(dtype).removeprefix("torch."), "rows": []}
    results.append(result)
    try:
        wrong = engine.why_wrong(which, device, dtype, plan.weights)
        result["gate"] = f"wrong: {wrong}" if wrong else "passed"
        print(
            f"{plan.model} {plan.size}, {which.tokens} tokens, {plan.weights} weights: gate {result['gate']}",
            flush=True,
        )
        if wrong:
            result["failed"] = wrong
            return
        collect(device)
        setting = engine.prepare(which, device, dtype, plan.weights)
        room = torch.cuda.mem_get_info(device)[0] - RESERVE if device.type == "cuda" else None
        asked = engine.entries(setting, plan.quant, plan.attention) + [peers[name](setting) for name in plan.peers]
        course = Course(device, plan.rounds, until, room, plan.profile, lambda line: print("  " + line, flush=True))
        for row in race(asked, course, which.flops(), setting.drop):
            result["rows"].append(row)
            kept()
    except Exception as error:  # the other plans still run
        result["failed"] = f"{type(error).__name__}: {error}"[:600]
        print(result["failed"], flush=True)
    finally:
        kept()


def _facts(which: Subject) -> dict[str, Any]:
    video, config = which.video, which.config
    return {
        "height": video.height,
        "width": video.width,
        "num_frames": video.num_frames,
        "latents": list(which.latents),
        "tokens": which.tokens,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "frame_times": which.frame_times,
        "tflop": round(which.flops() / 1e12, 3),
    }


def run_plans(plans: list[Plan], device: torch.device, peers: Peers, file: Path | None, **facts: Any) -> dict[str, Any]:
    """All of them in one process; the file is written anew after every entry."""
    document: dict[str, Any] = {"benchmark": "forward", **machine(device), **facts, "results": []}

    def kept() -> None:
        if file is not None:
            keep(document, file)

    for plan in plans:
        if time.monotonic() > plan.until:
            print(f"{plan.model} {plan.size}: no time was left", flush=True)
            continue
        run_plan(plan, device, peers, document["results"], kept)
        collect(device)
    return document


def add_arguments(parser: argparse.ArgumentParser, peers: Peers | None = None) -> None:
    """The flags of `lightx2v bench`; with `peers` also which of them run beside the engine."""
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--model", choices=CONFIGS, default="wan2.1-1.3b" if cuda else "demo", help="default: %(default)s"
    )
    parser.add_argument("--size", choices=("480p", "720p"), default="480p", help="default: %(default)s; demo: 128x128")
    parser.add_argument("--frames", type=int, help="default: as the model was trained, 81 or 121; demo 17")
    backends = f"auto, exact, {engine.ALL} (that can run), {engine.LOSSY} (those in 8 bits), "
    backends += f"or of {', '.join(registry.names('attention'))}; default: auto"
    parser.add_argument("--attention", nargs="+", default=["auto"], metavar="NAME", help=backends)
    schemes = f"of {', '.join((engine.NONE, *SCHEMES))}; default: none"
    parser.add_argument("--quant", nargs="+", default=[engine.NONE], choices=(engine.NONE, *SCHEMES), help=schemes)
    parser.add_argument("--weights", choices=WEIGHTS, default="hot", help="hot: as power-hungry as real ones (default)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each; default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=600, help="after which nothing more is begun; default: %(default)s"
    )
    parser.add_argument("--no_profile", action="store_true", help="leave out where the time goes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results there too")
    if peers is not None:
        parser.add_argument(
            "--peers", nargs="+", default=[], choices=sorted(peers), help="run beside, on the same weights"
        )


def run(args: argparse.Namespace, peers: Peers | None = None) -> int:
    """Returns the exit status: 1 where anything failed."""
    plan = Plan(
        args.model,
        args.size,
        args.frames,
        args.weights,
        tuple(args.attention),
        tuple(args.quant),
        tuple(args.peers) if peers is not None else (),
        args.rounds,
        args.seconds,
        profile=not args.no_profile,
    )
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch {torch.__version__} sees no GPU; use --device cpu")
    document = run_plans([plan], device, peers or {}, args.json)
    for result in document["results"]:
        print("\n".join(table(result)), flush=True)
    report(document, None)
    return int(any("failed" in part for result in document["results"] for part in (result, *result["rows"])))


def table(result: Mapping[str, Any]) -> list[str]:
    """A line a row: time, rate, distance to the first one, memory, and where the time goes."""
    lines = [
        f"{result['model']} {result['width']}x{result['height']}, {result['num_frames']} frames: "
        f"{result['tokens']} tokens, {result['tflop']} TFLOP a forward pass, {result['weights']} weights"
    ]
    for row in result["rows"]:
        if "ms" not in row:
            lines.append(f"{row['name']:<44} {row['failed']}")
            continue
        groups = row.get("profile", {}).get("groups_ms", {})
        told = [
            f"{row['name']:<44}{row['ms']:>10.1f} ms ({row['ms_min']:.1f}-{row['ms_max']:.1f})",
            f"{row['tflops']:>7.1f} TFLOP/s",
            f"error {row['error']:.1e}",
            *([f"{row['peak_gib']:.1f} GiB"] if "peak_gib" in row else []),
            ", ".join(f"{name} {ms:.0f}" for name, ms in groups.items()),
        ]
        lines.append("  ".join(told))
    return lines
