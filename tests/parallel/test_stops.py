"""What stops one process stops all of them, and none waits for another: NaN, cancelling, errors of rank 0."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demo.shipped import BASE, SHIPPED
from dev.environment import REPOSITORY
from lightx2v.__main__ import main
from lightx2v.blocks import Unadded, added
from lightx2v.cache.calibration import Recorder
from lightx2v.config import Parallel, Sampling
from lightx2v.diffuse import Hooks, Model, Start, diffuse
from lightx2v.parallel.mesh import join
from lightx2v.parallel.ring import mergeable
from lightx2v.parallel.ulysses import spread
from lightx2v_kernels import select
from ranks import Ranks
from tiny_cache import COND, CPU, T2V, UNCOND, wan

GUIDED = Sampling(seed=7, steps=3, cfg_scale=3.0, scheduler="euler")


def over(parallel: Parallel) -> tuple[Model, Any]:
    """A small model over all processes, and its network."""
    mesh = join(parallel, CPU)
    merging = mergeable("exact", CPU, torch.float32, 128).partial
    kernels = select(attention="exact", device=CPU, dtype=torch.float32, head_dim=128)
    network = wan(kernels=spread(kernels, mesh, merging() if merging else None))
    return Model(T2V, CPU, lambda: network, mesh=mesh), network


def outcome(model: Model, **options: Any) -> str:
    try:
        diffuse(model, Start(torch.zeros(1, 16, 3, 6, 10)), GUIDED, COND, UNCOND, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def not_finite(parallel: Parallel) -> str:
    """Some of the tokens of rank 1 become infinite in the second block, in every pass."""
    model, network = over(parallel)
    rank = model.mesh.rank if model.mesh else 0

    def spoil(module: Any, args: Any, out: Unadded) -> Tensor:
        return added(out).index_fill(1, torch.tensor([2]), float("inf")) if rank == 1 else added(out)

    network.blocks[1].register_forward_hook(spoil)
    return outcome(model)


def cancelled(parallel: Parallel, where: str) -> str:
    """Rank 1 cancels in the second step, or before the fifth block."""
    model, _ = over(parallel)
    seen: list[int] = []

    def cancel(*ignored: object) -> None:
        seen.append(1)
        if model.mesh and model.mesh.rank == 1 and len(seen) == (2 if where == "on_step" else 5):
            raise InterruptedError("enough")

    return outcome(model, hooks=Hooks(**{where: cancel})) + f" after {len(seen)}"


def test_not_a_number_in_one_part_is_found_by_all(two: Ranks) -> None:
    for parallel in (Parallel(ring=2), Parallel(cfg=2)):
        first, second = two.run(not_finite, parallel)
        assert first == second and first.startswith("FloatingPointError: step 1 of 3")
        assert "first in block 2 of 2 (" + ("cond" if parallel.ring > 1 else "uncond") + " pass" in first


def test_who_cancels_cancels_all_at_the_same_place(two: Ranks) -> None:
    for where, count in (("on_step", 2), ("on_block", 5)):
        for parallel in (Parallel(ring=2), Parallel(cfg=2)):
            other, own = two.run(cancelled, parallel, where)
            assert own == f"InterruptedError: enough after {count}"
            assert other == f"StoppedElsewhereError: process 1 of this video stopped: enough after {count}"


def refused(folder: Path) -> list[str]:
    pipe = SHIPPED["t2v"].pipeline(height=48, width=80, num_frames=9, infer_steps=8)
    pipe.enable_parallel(cfg_p_size=2)
    said = []
    for asked in (
        {"save_result_path": folder / "x.avi"},
        {"save_result_path": folder / "y.mp4", "image_path": "gone.png"},
    ):
        try:
            pipe.generate(progress=False, **asked)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    pipe._cache = Recorder()
    try:
        pipe.generate(progress=False, return_result_tensor=True)
    except ValueError as error:
        said.append(str(error))
    try:
        pipe.enable_parallel(seq_p_size=4)
    except ValueError as error:
        said.append(str(error))
    assert pipe._engine.parallel == Parallel(cfg=2), "what cannot be changes nothing"
    return said


def test_what_rank_0_cannot_do_all_are_told(two: Ranks, tmp_path: Path) -> None:
    first, second = two.run(refused, tmp_path)
    assert len(first) == len(second) == 4 and not list(tmp_path.iterdir())
    for own, told in zip(first[:2], second[:2], strict=True):
        assert told == f"StoppedElsewhereError: process 0 of this video stopped: {own.partition(': ')[2]}"
    assert first[2] == second[2] and "leave cfg_p_size at 1" in first[2]
    assert "ulysses=4 cannot share the" in first[3]


SMALL = ("--height", "48", "--width", "80", "--num_frames", "9", "--infer_steps", "2")


def told(*flags: str) -> tuple[int, str, str]:
    """Exit status and what the command line prints."""
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        status = main(["generate", "--model_path", str(BASE), "--prompt", "a red circle", "--quiet", *SMALL, *flags])
    return status, said.getvalue(), complained.getvalue()


def test_rank_0_speaks_for_the_command_line(two: Ranks, tmp_path: Path) -> None:
    path, settings = tmp_path / "a.mp4", tmp_path / "settings.json"
    settings.write_text(json.dumps({"parallel": {"cfg_p_size": 2}}), encoding="utf-8")
    for flags, words in ((("--ulysses", "2"), "ulysses 2"), (("--config_json", str(settings)), "cfg 2")):
        (status, said, _), (other, nothing, _) = two.run(told, *flags, "--save_result_path", str(path))
        assert (status, other, nothing) == (0, 0, "") and f"parallel: {words}" in said
        assert path.stat().st_size > 500
        path.unlink()
    asked = (*SMALL, "--save_result_path", str(path))
    for (status, _, complained), rank in zip(two.run(told, *asked), (0, 1), strict=True):
        assert status == 1 and complained.startswith(f"process {rank}: error: 2 processes were started and none was")
    (status, _, complained), (other, _, nothing) = two.run(told, "--ring", "2", "--image_path", "gone.png", *asked)
    assert (status, other, nothing) == (1, 1, "") and "process 0: error:" in complained, "who stopped says why"
    (status, _, complained), _ = two.run(told, "--exchange", "fp8")
    assert status == 1 and "--exchange fp8 without several processes" in complained
    assert not path.exists()


def test_torchrun_runs_the_example(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line += ["examples/t2v_ulysses.py", *SMALL, "--save_result_path", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size > 500 and done.stdout.count("parallel: ulysses 2") == 1, "rank 0 alone speaks"
