"""Everything that docs/benchmarks.md shows, on one GPU, in one process: `python -m benchmarks.h100 --json FILE`.

The parts run in the order of their worth, and the file is whole after every one of their heats, so that a run which is
cut short is still of use. `--only 14b 5b` takes some of them, `--dry` runs all of them at toy size on any machine.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.peers import PEERS
from lightx2v.bench.command import Plan, run_plans, table
from lightx2v.bench.engine import ALL, LOSSY

# seconds: what each takes on an H100 at most, with the time to build weights and to compile.
PARTS = {
    # The whole comparison in brief, for when time on a GPU is short; not among the parts that run by default.
    "brief": Plan(
        "wan2.1-14b",
        attention=("auto", "flash_attn3", LOSSY),
        quant=("none", "fp8"),
        peers=("diffusers", "diffusers-fa3", "comfyui"),
        seconds=280,
    ),
    # Every attention backend on bf16 weights, and the others as they are by default and with FlashAttention-3.
    "14b": Plan("wan2.1-14b", attention=(ALL,), peers=("diffusers", "diffusers-fa3", "comfyui"), seconds=240),
    "14b-fp8": Plan("wan2.1-14b", attention=(ALL,), quant=("fp8",), peers=("comfyui-fp8",), seconds=190),
    "5b": Plan(
        "wan2.2-ti2v-5b",
        size="720p",
        attention=("auto", LOSSY),
        quant=("none", "fp8"),
        peers=("diffusers", "diffusers-fa3", "comfyui"),
        seconds=110,
    ),
    "14b-compiled": Plan(
        "wan2.1-14b",
        attention=("auto",),
        peers=("diffusers-fa3-compile", "diffusers-fa3-fp8-compile"),
        seconds=150,
    ),
    "14b-int8": Plan("wan2.1-14b", attention=("auto", LOSSY), quant=("int8",), seconds=90),
    "1.3b": Plan("wan2.1-1.3b", attention=(ALL,), quant=("none", "fp8"), peers=("diffusers", "comfyui"), seconds=70),
    "14b-720p": Plan(
        "wan2.1-14b",
        size="720p",
        attention=("auto", LOSSY),
        quant=("none", "fp8"),
        peers=("diffusers", "comfyui"),
        rounds=3,
        seconds=240,
    ),
    "hunyuan": Plan(
        "hunyuan-1.5", attention=("auto", LOSSY), quant=("none", "fp8"), peers=("diffusers",), rounds=3, seconds=150
    ),
    "14b-gguf": Plan("wan2.1-14b", quant=("gguf-q8_0", "gguf-q4_k"), seconds=60),
    # For comparison with figures that were taken on plain weights.
    "14b-plain": Plan(
        "wan2.1-14b",
        weights="plain",
        attention=("auto", LOSSY),
        quant=("none", "fp8"),
        peers=("diffusers", "comfyui"),
        rounds=3,
        seconds=120,
        profile=False,
    ),
}


def plans(only: list[str], until: float, dry: bool = False, rounds: int | None = None) -> list[Plan]:
    """The parts asked for; in a dry run at toy size. until: clock, after which none begins. rounds: None: their own."""
    chosen = [PARTS[name] for name in only or [name for name in PARTS if name != "brief"]]
    rounds = 1 if dry else rounds
    return [replace(plan, until=until, toy=dry, rounds=rounds or plan.rounds) for plan in chosen]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.h100", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], choices=PARTS)
    parser.add_argument("--seconds", type=float, default=540, help="of all parts; default: %(default)s")
    parser.add_argument("--rounds", type=int, help="calls of each; default: 5, of the longest 3")
    parser.add_argument("--no_profile", action="store_true", help="leave out where the time goes")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    parser.add_argument("--dry", action="store_true", help="all parts at toy size, on a CPU too")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.dry:
        parser.error(f"PyTorch {torch.__version__} sees no GPU: --dry runs all parts at toy size")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    chosen = plans(args.only, time.monotonic() + args.seconds, args.dry, args.rounds)
    if args.no_profile:
        chosen = [replace(plan, profile=False) for plan in chosen]
    command = "python -m benchmarks.h100 " + " ".join(sys.argv[1:] if arguments is None else arguments)
    document = run_plans(chosen, device, PEERS, args.json, command=command)
    for result in document["results"]:
        print("\n".join(table(result)), flush=True)
    print(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
