"""Make the demo checkpoints from nothing: autoencoder -> latent pool -> transformer and text encoder -> files -> judge.

    python -m demo.train --state /tmp/state --out out/demo      # goes on where a call with that state stopped
    python -m demo.train --dry                                  # everything in miniature on a CPU, under a minute

Meant for one large GPU; the shipped files took about 20 minutes of one H100. The same seed draws the same clips and
captions, but stages end by the clock, so weights are alike and not identical between runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from demo.families import FAMILIES, Family, Judged
from demo.stages.pool import Pool, grow_pool, load_pool
from demo.stages.run import Run, start_run
from demo.stages.vae import load_vae, train_vae


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo.train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, default="wan", help="default: %(default)s")
    parser.add_argument("--state", type=Path, help="folder of resumable state (default: a temporary one)")
    parser.add_argument("--start", type=Path, help="folder of exported checkpoints to begin with instead of nothing")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the checkpoints and results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-seconds", type=float, default=150)
    parser.add_argument("--pool-seconds", type=float, default=45, help="for each call that grows the pool")
    parser.add_argument("--clips", type=int, default=20_000, help="clips that the pool should hold")
    parser.add_argument("--t2v-seconds", type=float, default=900, help="of all calls together")
    parser.add_argument("--call-seconds", type=float, default=10_000, help="save and stop after this long")
    parser.add_argument("--judge", type=int, default=200, help="held-out pairs to judge at the end, 0 for none")
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0], help="cfg scales to judge at")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help="everything in miniature")
    return parser.parse_args(argv)


def _start_warm_up(args: argparse.Namespace, run: Run) -> subprocess.Popen | None:
    """Compile the transformer in a second process while the autoencoder trains."""
    if not run.compile or (run.state / "t2v.pt").exists():
        return None
    command = [sys.executable, "-m", "demo.train", "--warm", "--family", args.family, "--device", args.device]
    return subprocess.Popen([*command, "--state", str(run.state), "--out", str(run.out)])


def _pool(args: argparse.Namespace, run: Run, family: Family) -> tuple[Any, Pool]:
    """The autoencoder and the latents, made if they are not there yet."""
    vae = load_vae(run, family.autoencoder) or train_vae(run, args.vae_seconds, family.autoencoder)
    family.export_vae(vae, run.out)
    pool = load_pool(run)
    if pool is None or len(pool) < args.clips:
        pool = grow_pool(run, vae, pool, args.clips, args.pool_seconds, to_ids=family.to_ids(run))
    return vae, pool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that are not done yet; returns the exit status."""
    args = _arguments(argv)
    if args.dry:
        args.vae_seconds, args.pool_seconds, args.t2v_seconds, args.clips = 1.0, 2.0, 1.0, 8
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    run, family = start_run(args), FAMILIES[args.family]
    family.prepare(run, args.start)
    if args.warm:
        family.warm_up(run)
        return 0
    run.log(f"torch {torch.__version__} on {torch.cuda.get_device_name() if run.device.type == 'cuda' else 'cpu'}")
    helper = _start_warm_up(args, run)
    vae, pool = _pool(args, run, family)
    if helper is not None and helper.wait() != 0:
        raise RuntimeError("compiling the transformer failed (see above); --no-compile does without")
    weights, progress = family.train(run, pool, args.t2v_seconds, args.start)
    family.export(run, weights, vae, run.out)
    if args.judge:
        judged = Judged(1, 2, args.guidance) if args.dry else Judged(args.judge, 20, args.guidance)
        family.judge(run, f"t2v_{progress:.2f}", judged)
    run.log(f"{progress:.0%} of the transformer's training done")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
