"""What may change a video's bits on one machine: `python dev.py run -m dev.determinism`.

Clips of the small trained model, one setting changed at a time, beside the clip with none changed: whether all bits are
the same, the largest difference of a pixel (of 255) and the PSNR in dB. The table of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from dev.environment import REPOSITORY
from lightx2v import LightX2VPipeline
from lightx2v_kernels.registry import UnsupportedBackendError, names

DEMO = REPOSITORY / "demo" / "models" / "wan2.1_t2v"
PROMPT = "a red circle moves right over a navy background"
SIZE = {"height": 128, "width": 128, "num_frames": 17}
Setting = Callable[[LightX2VPipeline], None]


def _as_it_is(pipe: LightX2VPipeline) -> None:
    pass


def settings() -> dict[str, tuple[dict[str, Any], Setting]]:
    """Name -> arguments of create_generator, and what else is called."""
    return {
        "again, in the same process": ({}, _as_it_is),
        **{f"attention `{name}`": ({"attn_mode": name}, _as_it_is) for name in names("attention")},
        "offload `model`": ({}, lambda pipe: pipe.enable_offload(True, "model")),
        "offload `block`": ({}, lambda pipe: pipe.enable_offload(True, "block")),
        "offload from the file": ({}, lambda pipe: pipe.enable_offload(True, "block", ram_budget_gb=1e-6)),
        "decoded in tiles of 64 pixels": ({}, lambda pipe: pipe.enable_vae_tiling("tiled", 64, 32)),
        "compute type bf16": ({"dtype": "bf16"}, _as_it_is),
    }


def clip(steps: int, changed: dict[str, Any], also: Setting) -> Tensor:
    """(F, H, W, 3) in [0, 1]"""
    pipe = LightX2VPipeline(DEMO)
    pipe.create_generator(**{**SIZE, "infer_steps": steps, **changed})
    also(pipe)
    frames = pipe.generate(5, PROMPT, return_result_tensor=True, progress=False)["video"]
    assert frames is not None
    return frames


def line(name: str, found: Tensor, plain: Tensor) -> str:
    """A row of the table."""
    if torch.equal(found, plain):
        return f"| {name} | the same | | |"
    error = float((found - plain).square().mean())
    return f"| {name} | other | {float((found - plain).abs().max()) * 255:.2g} | {-10 * math.log10(error):.0f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.determinism", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    options = parser.parse_args(arguments)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    print(f"torch {torch.__version__} on {device}, {torch.get_num_threads()} threads, {options.steps} steps")
    print("| changed | bits | largest difference, of 255 | PSNR, dB |\n|---|---|---|---|")
    plain = clip(options.steps, {}, _as_it_is)
    for name, (changed, also) in settings().items():
        with suppress(UnsupportedBackendError):  # an attention that does not run here
            print(line(name, clip(options.steps, changed, also), plain), flush=True)
    threads = torch.get_num_threads()
    for number in {1, 2} - {threads}:
        torch.set_num_threads(number)
        print(line(f"{number} threads instead of {threads}", clip(options.steps, {}, _as_it_is), plain), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
