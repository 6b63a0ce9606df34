"""Times what it costs to look for NaN and infinity: `python -m benchmarks.watching [--device cuda] [--file FILE]`.

At 832x480 and 81 frames: the look at each step's estimate, and how much of a step that is, where the step is two passes
of Wan2.1 14B in bf16 of `--pass-ms` (docs/benchmarks.md); the look at what a request is given, once; and the sums over
decoded frames, once, as a share of the decode of `--decode-ms`. On a CPU the defaults are an H100's and the shares
mean nothing; the times do.
"""

import argparse
import sys
from pathlib import Path

import torch

from lightx2v.bench.timing import machine, median_ms, report
from lightx2v.diagnosis import check_given
from lightx2v.guidance import Conditioning

LATENTS = (1, 16, 21, 60, 104)
TEXT = (1, 512, 4096)
CHUNK = (1, 3, 4, 480, 832)  # the frames of one latent frame
PASS_MS, DECODE_MS = 2452.0, 691.0  # benchmarks/results/h100-forward-14b-kept.json, h100-vae-480p.json


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pass-ms", type=float, default=PASS_MS)
    parser.add_argument("--decode-ms", type=float, default=DECODE_MS)
    parser.add_argument("--file", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    latents, chunk = torch.randn(LATENTS, device=device), torch.randn(CHUNK, device=device).to(torch.bfloat16)
    cond, uncond = (Conditioning(torch.randn(TEXT)) for _ in range(2))
    each = median_ms(lambda: bool(latents.isfinite().all()), device)
    given = median_ms(lambda: check_given(latents.cpu(), None, cond, uncond), torch.device("cpu"))
    frames = LATENTS[2] * median_ms(lambda: chunk.sum(dtype=torch.float32), device)
    rows = {
        "each step": {"ms": round(each, 4), "percent": round(100 * each / (2 * options.pass_ms), 4)},
        "once before": {"ms": round(given, 4), "percent of 50 steps": round(given / options.pass_ms, 4)},
        "frames": {"ms": round(frames, 4), "percent of decode": round(100 * frames / options.decode_ms, 4)},
    }
    for name, row in rows.items():
        print(name, row)
    report({"benchmark": "watching", "machine": machine(device), "rows": rows}, options.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
