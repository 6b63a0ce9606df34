"""The command line: `python -m lightx2v generate | inspect | doctor`."""

import argparse
import logging
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lightx2v import __version__
from lightx2v.checkpoint import CheckpointError
from lightx2v.config import DTYPES, SCHEDULERS
from lightx2v.identify import recognise
from lightx2v_kernels import UnsupportedBackendError, registry


def generate(args: argparse.Namespace) -> None:
    """One video from a prompt."""
    from lightx2v.pipeline import LightX2VPipeline

    pipe = LightX2VPipeline(args.model_path, args.model_cls, args.task, device=args.device)
    pipe.create_generator(
        attn_mode=args.attn_mode,
        infer_steps=args.infer_steps,
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        guidance_scale=args.guidance_scale,
        sample_shift=args.sample_shift,
        fps=args.fps,
        scheduler=args.scheduler,
        dtype=args.dtype,
    )
    pipe.generate(args.seed, args.prompt, args.negative_prompt, args.save_result_path, progress=not args.quiet)
    print(f"{args.save_result_path}: {pipe.describe()}, seed {args.seed}, prompt: {args.prompt}")


def inspect(args: argparse.Namespace) -> None:
    """What a checkpoint is, from its header."""
    for path in args.path:
        found = recognise(path)
        print(f"{path}: {found.describe()}")
        told = {"kind": found.kind, "family": found.family, "task": found.task, "format": found.layout.format}
        if found.model is not None:
            told["variant"] = found.model.spec.name
        print("  " + ", ".join(f"{name} {value}" for name, value in told.items() if value))
        if found.model is not None:
            print(f"  {found.model.config}")
        for reason, names in _grouped(found.layout.unused).items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            print(f"  not needed: {names[0]}{more} ({reason})")


def _grouped(unused: Mapping[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in unused.items():
        grouped.setdefault(reason, []).append(name)
    return grouped


def doctor(args: argparse.Namespace) -> None:
    """What this machine has and which kernels can run on it."""
    print(f"lightx2v {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in ("torch", "triton", "transformers", "safetensors", "gguf", "einops", "av"):
        try:
            print(f"  {package:<13} {version(package)}")
        except PackageNotFoundError:
            print(f"  {package:<13} not installed")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"  device        {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}")
    print(f"attention backends for {device}, {str(dtype).removeprefix('torch.')}, head_dim 128:")
    for name in registry.names("attention"):
        try:
            registry.select("attention", name, device, dtype, 128)
            print(f"  {name:<13} can run")
        except UnsupportedBackendError as error:
            print(f"  {name:<13} cannot run: {error}")
    print(f"  auto takes    {registry.select('attention', 'auto', device, dtype, 128).name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightx2v", description="Video diffusion: Wan2.1 text-to-video.")
    parser.add_argument("--verbose", action="store_true", help="log what the engine decides")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("generate", help="make one video")
    command.set_defaults(run=generate)
    command.add_argument("--model_path", required=True, help="folder with transformer, text encoder and VAE")
    command.add_argument("--model_cls", default="wan2.1", help="wan2.1, or wan2.1_distill for 4-step models")
    command.add_argument("--task", default="t2v")
    command.add_argument("--prompt", required=True)
    command.add_argument("--negative_prompt", default="")
    command.add_argument("--seed", type=int, default=42)
    command.add_argument("--infer_steps", type=int, default=50)
    command.add_argument("--height", type=int, default=480, help="pixels, a multiple of 16")
    command.add_argument("--width", type=int, default=832, help="pixels, a multiple of 16")
    command.add_argument("--num_frames", type=int, default=81, help="4n + 1")
    command.add_argument("--guidance_scale", type=float, default=5.0, help="1 turns guidance off")
    command.add_argument("--sample_shift", type=float, default=5.0)
    command.add_argument("--fps", type=int, default=16)
    command.add_argument("--scheduler", choices=SCHEDULERS, default=None, help="default: the model class's own")
    command.add_argument("--attn_mode", default="auto", help="auto or a backend that `doctor` lists")
    command.add_argument("--dtype", choices=DTYPES, default="auto")
    command.add_argument("--device", default=None, help="cuda, cuda:1, cpu; default: cuda where there is one")
    command.add_argument("--save_result_path", default="lightx2v_gen_result.mp4", help="an .mp4")
    command.add_argument("--quiet", action="store_true", help="no progress bars")

    command = commands.add_parser("inspect", help="say what a checkpoint is")
    command.set_defaults(run=inspect)
    command.add_argument("path", nargs="+", type=Path)

    command = commands.add_parser("doctor", help="say what this machine can run")
    command.set_defaults(run=doctor)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after one line on stderr about what to do."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
    try:
        args.run(args)
    except (CheckpointError, UnsupportedBackendError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
