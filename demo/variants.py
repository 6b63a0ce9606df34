"""Fine-tune variants of an exported text-to-video folder: image-to-video, four-step student, high-noise expert, style.

    python -m demo.variants --start demo/models/wan2.1_t2v --state /tmp/variants --out out/variants
    python -m demo.variants --only student,style --state /tmp/variants --out out/variants
    python -m demo.variants --dry                       # everything in miniature on a CPU, about a minute

Meant for one large GPU, with about 8 minutes of it. Every variant is written, then judged, as soon as it is trained; if
one fails the next is made all the same, but the exit status is 1 then. Blocks are dropped from the two transformers so
that all small models together stay small: 5 of 6 in ComfyUI's layout are 6.7 MB, 4 of 6 in LightX2V's 7.4 MB.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from demo.stages import expert, i2v, student, style
from demo.stages.base import Base, load_base, warm_up
from demo.stages.evaluate import Loaded, evaluate, load_folder
from demo.stages.export import import_vae
from demo.stages.pool import Pool, as_drawn, grow_pool, load_pool
from demo.stages.run import Run, start_run
from demo.stages.vae import load_vae
from lightx2v.vae.wan import WanVAE

VARIANTS = ("i2v", "student", "expert", "lora")  # the most useful first, should time run out
FILES = {"i2v": i2v.FILE, "expert": expert.FILE, "student": student.FILE, "lora": style.FILE}
RESERVE = 20.0  # seconds before the deadline in which no further variant is begun
COMPILE_SECONDS = 150.0  # after the clips are drawn; longer means that something hangs


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    if not names or not set(names) <= set(VARIANTS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of: {', '.join(VARIANTS)}")
    return names


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo.variants", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--start", type=Path, default=Path("demo/models/wan2.1_t2v"), help="exported folder")
    parser.add_argument("--state", type=Path, help="folder of resumable state (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path("out/variants"), help="folder of the files and results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=_names, default=VARIANTS, help=f"some of {','.join(VARIANTS)}, in this order")
    parser.add_argument("--clips", type=int, default=12_000, help="clips that the pool should hold")
    parser.add_argument("--pool-seconds", type=float, default=60)
    parser.add_argument("--i2v-seconds", type=float, default=180)
    parser.add_argument("--expert-seconds", type=float, default=60)
    parser.add_argument("--student-seconds", type=float, default=115)
    parser.add_argument("--lora-seconds", type=float, default=35)
    parser.add_argument("--call-seconds", type=float, default=10_000, help="stop training after this long")
    parser.add_argument("--judge", type=int, default=100, help="held-out pairs to judge each variant on")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help="everything in miniature")
    return parser.parse_args(argv)


def _start_warm_up(args: argparse.Namespace, run: Run) -> subprocess.Popen | None:
    """Compile a block in a second process while the clips are drawn."""
    if not run.compile:
        return None
    command = [sys.executable, "-m", "demo.variants", "--warm", "--start", str(args.start)]
    return subprocess.Popen([*command, "--state", str(run.state), "--out", str(run.out), "--device", args.device])


def _ended_well(helper: subprocess.Popen) -> bool:
    try:
        return helper.wait(COMPILE_SECONDS) == 0
    except subprocess.TimeoutExpired:
        helper.kill()
        helper.wait()
        return False


def _pool(args: argparse.Namespace, run: Run, vae: WanVAE) -> tuple[Pool, i2v.Images | None]:
    """Clips and, for image-to-video, their images: those of an earlier call if there are enough."""
    pool, images = load_pool(run), i2v.load_images(run)
    shown = "i2v" in args.only
    if pool is not None and (not shown or (images is not None and len(images) == len(pool))):
        return pool, images
    watcher = i2v.Watcher(run, vae, [])
    pool = grow_pool(run, vae, None, args.clips, args.pool_seconds, look=watcher if shown else as_drawn)
    if not shown:
        return pool, None
    images = watcher.images()
    i2v.save_images(run, images)
    return pool, images


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the variants are made from and judged with."""

    base: Base
    vae: WanVAE
    pool: Pool
    images: i2v.Images | None
    loaded: Loaded


def _train(args: argparse.Namespace, run: Run, parts: Parts) -> Mapping[str, Callable[[], None]]:
    """For each variant what trains it and writes its file."""
    base, pool, images = parts.base, parts.pool, parts.images

    def train_i2v() -> None:
        assert images is not None  # `_pool` makes them wherever i2v is asked for
        i2v.train_i2v(run, base, pool, images, args.i2v_seconds)

    return {
        "i2v": train_i2v,
        "expert": lambda: expert.train_expert(run, base, pool, args.expert_seconds),
        "student": lambda: student.train_student(run, base, pool, args.student_seconds),
        "lora": lambda: style.train_style(run, base, parts.vae, args.lora_seconds),
    }


def _judge(args: argparse.Namespace, run: Run, parts: Parts) -> Mapping[str, Callable[[], None]]:
    """For each variant what judges its file."""
    base, loaded = parts.base, parts.loaded
    count, steps = (1, 2) if args.dry else (args.judge, 20)

    def judge_i2v() -> None:
        i2v.evaluate_i2v(run, base, loaded, count, steps, (4.0,) if args.dry else (1.0, 2.5, 4.0))
        i2v.evaluate_i2v(run, base, loaded, (count + 1) // 2, steps, (2.5,), last=True)

    return {
        "i2v": judge_i2v,
        "expert": lambda: expert.evaluate_expert(run, base, loaded, count, steps),
        "student": lambda: student.evaluate_student(run, base, loaded, count),
        "lora": lambda: style.evaluate_style(run, base, loaded, (count + 1) // 2, steps),
    }


def _attempt(run: Run, name: str, work: Callable[[], None]) -> bool:
    """Whether it ended without an error; an error is logged."""
    try:
        work()
    except Exception:  # whatever it is, the variants after this one can still be made
        run.log(f"{name} failed\n{traceback.format_exc()}")
        return False
    finally:
        # A captured step holds its activations: without this the next one would find no memory.
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _make(args: argparse.Namespace, run: Run, parts: Parts) -> list[str]:
    """Train and judge what was asked for; returns the names of what failed or was left out."""
    failed, training, judging = [], _train(args, run, parts), _judge(args, run, parts)
    for name in args.only:
        if run.left() < RESERVE:
            run.log(f"{name} left out: {run.left():.0f} s are left")
            failed.append(name)
        elif not _attempt(run, name, training[name]):
            failed.append(name)
        elif not _attempt(run, f"judging {name}", judging[name]):
            failed.append(f"judging {name}")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Make the variants; returns the exit status."""
    args = _arguments(argv)
    if args.dry:
        args.pool_seconds, args.clips = 30.0, 2
        args.i2v_seconds = args.expert_seconds = args.student_seconds = args.lora_seconds = 0.5
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    run = start_run(args)
    if not args.warm:
        import_vae(args.start, run.state)
    base = load_base(run, args.start)
    if args.warm:
        warm_up(run, base)
        return 0
    run.log(f"torch {torch.__version__} on {torch.cuda.get_device_name() if run.device.type == 'cuda' else 'cpu'}")
    helper = _start_warm_up(args, run)
    vae = load_vae(run)
    assert vae is not None  # imported above
    pool, images = _pool(args, run, vae)
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    loaded = dataclasses.replace(load_folder(args.start, run.device, dtype), vae=vae)
    _attempt(run, "judging the base", lambda: _judge_base(args, run, loaded))
    if helper is not None and not _ended_well(helper):
        run.log("compiling failed (see above): going on without, slower")
        run = dataclasses.replace(run, compile=False)
    failed = _make(args, run, Parts(base, vae, pool, images, loaded))
    sizes = {name: (run.out / FILES[name]).stat().st_size for name in args.only if (run.out / FILES[name]).exists()}
    run.report("variant_bytes", {**sizes, "sum": sum(sizes.values())})
    if failed:
        run.log(f"failed: {', '.join(failed)}")
    return int(bool(failed))


def _judge_base(args: argparse.Namespace, run: Run, loaded: Loaded) -> None:
    evaluate(run, loaded, "base_cfg4", count=1 if args.dry else args.judge, steps=2 if args.dry else 20)


if __name__ == "__main__":
    raise SystemExit(main())
