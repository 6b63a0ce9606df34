"""Clips side by side in one looping picture: `python -m demo.sheet --out docs/images/demo.webp`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from demo.grammar import parse
from demo.judge import judge, score
from lightx2v import LightX2VPipeline

MODEL = Path(__file__).parent / "models" / "wan2.1_t2v"
PAIRS = (
    ("a red circle moves right over a white background", 42),
    ("a blue triangle moves up over a gray background", 1),
    ("a yellow ring moves down left on a navy background", 1),
    ("a green square spins over vertical navy and black stripes", 3),
)
GAP = 8  # pixels between clips
FRAME_MS, LAST_MS = 80, 700


def main() -> None:
    """Make the clips, say what the judge makes of each, and write the picture."""
    parser = argparse.ArgumentParser(prog="python -m demo.sheet", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images/demo.webp"))
    args = parser.parse_args()
    pipe = LightX2VPipeline(MODEL)
    pipe.create_generator(infer_steps=20, height=128, width=128, num_frames=17, guidance_scale=4.0)
    clips = []
    for prompt, seed in PAIRS:
        clip = pipe.generate(seed, prompt, return_result_tensor=True)["video"]
        assert clip is not None
        found = score(judge(clip.permute(3, 0, 1, 2)[None] * 2 - 1), [parse(prompt)])
        print(f"{prompt} (seed {seed}): {'right' if bool(found.everything.all()) else 'wrong'}")
        clips.append(clip)
    border = torch.ones(clips[0].shape[0], clips[0].shape[1], GAP, 3)
    row = torch.cat([part for clip in clips for part in (clip, border)][:-1], dim=2)
    frames = [Image.fromarray(frame.numpy()) for frame in (row * 255).round().to(torch.uint8)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    frames[0].save(args.out, save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=80)
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
