"""The benchmark of several processes: every way to share passes its gate, and a wrong one has no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import parallel as benchmark
from dev.environment import REPOSITORY
from lightx2v.bench.subjects import subject
from lightx2v.config import Parallel
from lightx2v.parallel import ulysses
from ranks import Ranks


def run(path: Path, wrong: bool) -> int:
    right = ulysses.to_tokens
    benchmark.subject = lambda name, size: subject(name).toy()  # in processes of the tests' own
    if wrong:  # the heads come back in another order
        ulysses.to_tokens = lambda y, sizes, line: right(y, sizes, line).flip(2)
    try:
        return benchmark.main(["--rounds", "1", "--weights", "bf16", "--json", str(path)])
    finally:
        ulysses.to_tokens = right


def test_every_way_to_share_is_timed_if_it_is_right(two: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert two.run(run, path, False) == [0, 0]
    rows = json.loads(path.read_text(encoding="utf-8"))["weights"]["bf16"]
    assert [row["case"] for row in rows] == ["one process", "cfg 2", "ulysses 2", "ring 2"]
    assert all(row["gate"] == "passed" and row["ms"] > 0 for row in rows) and all(row["ratio"] > 0 for row in rows[1:])
    assert two.run(run, path, True) == [1, 1]
    rows = json.loads(path.read_text(encoding="utf-8"))["weights"]["bf16"]
    assert rows[2]["gate"].startswith("wrong: relative error") and "ms" not in rows[2] and rows[3]["gate"] == "passed"


def test_ways_are_those_that_fit() -> None:
    assert benchmark.ways(2, 40, "exact") == [Parallel(cfg=2), Parallel(2), Parallel(1, 2)]
    assert benchmark.ways(4, 40, "fp8")[0] == Parallel(2, 1, 2, "fp8") and Parallel(2, 2) in benchmark.ways(
        4, 40, "exact"
    )
    assert all(each.ulysses != 8 for each in benchmark.ways(8, 12, "exact"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: NCCL connects no GPU with itself")
@pytest.mark.parametrize("more", [[], ["--exchange", "fp8"]])
def test_gpus_over_nccl(tmp_path: Path, more: list[str]) -> None:
    path, count = tmp_path / "out.json", min(4, torch.cuda.device_count()) // 2 * 2
    line: list[Any] = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    line += ["-m", "benchmarks.parallel", "--model", "wan2.1-1.3b", "--rounds", "1", "--json", path, *more]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ}, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(row["gate"] == "passed" for rows in json.loads(path.read_text())["weights"].values() for row in rows)
