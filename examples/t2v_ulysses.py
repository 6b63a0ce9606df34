"""One text-to-video on as many GPUs as torchrun starts processes, with the small model that the repository carries.

    torchrun --nproc_per_node 2 examples/t2v_ulysses.py --prompt "a red circle moves to the right"

With a model of your own: --model_path /path/to/Wan2.1-T2V-14B --height 480 --width 832 --num_frames 81 --infer_steps 50
"""

import argparse
import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # runs from a clone, not installed

from lightx2v import LightX2VPipeline  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default=REPOSITORY / "demo" / "models" / "wan2.1_t2v")
    parser.add_argument("--prompt", default="a red circle moves to the right over a white background")
    parser.add_argument("--save_result_path", default="ulysses.mp4")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--num_frames", type=int, default=17)
    parser.add_argument("--infer_steps", type=int, default=20)
    parser.add_argument(
        "--cfg", action="store_true", help="both passes of guidance at once, on half of the processes each"
    )
    parser.add_argument("--kind", choices=("ulysses", "ring"), default="ulysses")
    args = parser.parse_args()

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    halves = 2 if args.cfg else 1
    pipe = LightX2VPipeline(args.model_path, model_cls="wan2.1", task="t2v")
    size = {"height": args.height, "width": args.width, "num_frames": args.num_frames}
    pipe.create_generator(infer_steps=args.infer_steps, guidance_scale=4.0, **size)
    pipe.enable_parallel(cfg_p_size=halves, seq_p_size=processes // halves, seq_p_attn_type=args.kind)
    pipe.generate(seed=42, prompt=args.prompt, negative_prompt="", save_result_path=args.save_result_path)
    if os.environ.get("RANK", "0") == "0":
        print(pipe.report.text())


if __name__ == "__main__":
    main()
