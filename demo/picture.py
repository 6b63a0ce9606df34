"""Draw the first and the last frame of the clip that a prompt asks for: what image-to-video starts from and ends on.

python -m demo.picture --prompt "a green square moves right over a white background" --first start.png --last end.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from demo.grammar import GrammarError, parse
from demo.world import FPS, FRAMES, HEIGHT, WIDTH, render, scene_of


def draw_clip(prompt: str, seed: int = 0) -> Tensor:
    """The clip as the world draws it, (F, H, W, 3) uint8; the seed chooses place and size.

    Raises GrammarError for a prompt that the demo grammar cannot read.
    """
    clip = render(scene_of([parse(prompt)]), torch.Generator().manual_seed(seed)).frames[0]
    return ((clip.permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8)


def save_picture(frame: Tensor, path: Path) -> Path:
    """Write (H, W, 3) uint8 as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame.numpy()).save(path, format="PNG", optimize=True)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pictures that are asked for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.picture", description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", required=True, help="a sentence of the demo's grammar (docs/demo.md)")
    parser.add_argument("--seed", type=int, default=0, help="place and size; default: %(default)s")
    parser.add_argument("--first", type=Path, help=f"PNG of frame 1, {WIDTH}x{HEIGHT} pixels")
    parser.add_argument("--last", type=Path, help=f"PNG of frame {FRAMES}, {(FRAMES - 1) / FPS:g} s later")
    args = parser.parse_args(argv)
    try:
        clip = draw_clip(args.prompt, args.seed)
    except GrammarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path, frame in ((args.first, clip[0]), (args.last, clip[-1])):
        if path is not None:
            print(save_picture(frame, path))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
