"""Everything that docs/benchmarks.md shows, on one GPU, in one process: `python -m benchmarks.h100 --json FILE`.

The parts run in the order of their worth, and the file is whole after every one of their heats, so that a run which is
cut short is still of use. `--only 14b 5b` takes some of them, `--dry` runs all of them at toy size on any machine.

What is timed of ours is a step in the middle of a request: keys and values of the text are the request's, made by its
first step. diffusers and ComfyUI compute them in every step, and do so here.
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
    # Exact: our kernel and FlashAttention-3, beside diffusers compiled with FlashAttention-3, and ComfyUI.
    "14b": Plan(
        "wan2.1-14b",
        attention=("triton", "flash_attn3"),
        peers=("diffusers-fa3-compile", "comfyui"),
        rounds=4,
        seconds=130,
        profile=False,
    ),
    # Of these, ours and the fastest peer, over more rounds.
    "14b-exact": Plan(
        "wan2.1-14b",
        attention=("triton",),
        peers=("diffusers-fa3-compile",),
        rounds=6,
        seconds=120,
        profile=False,
    ),
    # In 8 bits, layers and attention.
    "14b-8bit": Plan(
        "wan2.1-14b",
        attention=("triton_int8", "flash_attn3_fp8"),
        quant=("fp8", "int8"),
        peers=("diffusers-fa3-fp8-compile", "comfyui-fp8"),
        rounds=4,
        seconds=170,
        profile=False,
    ),
    "5b": Plan(
        "wan2.2-ti2v-5b",
        size="720p",
        attention=("triton", "triton_int8"),
        quant=("none", "fp8"),
        peers=("diffusers-fa3", "comfyui"),
        rounds=4,
        seconds=110,
        profile=False,
    ),
    # Every attention backend on bf16 and fp8 weights, with where the time goes.
    "14b-all": Plan("wan2.1-14b", attention=(ALL,), quant=("none", "fp8"), peers=("diffusers",), seconds=300),
    "1.3b": Plan("wan2.1-1.3b", attention=(ALL,), quant=("none", "fp8"), peers=("diffusers", "comfyui"), seconds=70),
    "14b-720p": Plan(
        "wan2.1-14b",
        size="720p",
        attention=("triton", "triton_int8"),
        quant=("none", "fp8"),
        peers=("comfyui",),
        rounds=2,
        seconds=180,
        profile=False,
    ),
    "hunyuan": Plan(
        "hunyuan-1.5",
        attention=("triton", "triton_int8"),
        quant=("none", "fp8"),
        peers=("diffusers",),
        rounds=3,
        seconds=110,
        profile=False,
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
    chosen = [PARTS[name] for name in only or PARTS]
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
