"""The benchmark of split VAEs: on the CPU with narrow ones, to see that it works; on GPUs as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from benchmarks import vae_split
from dev.environment import REPOSITORY
from lightx2v.config import Parallel
from lightx2v.parallel.mesh import join
from lightx2v.vae.wan import WanVAE, WanVAEConfig
from ranks import Ranks


def narrow(spoilt: bool) -> Any:
    mesh = join(Parallel(ulysses=2), torch.device("cpu"))
    model = replace(vae_split.MODELS["wan"], make=lambda: WanVAE(WanVAEConfig(8)))
    wrong = (lambda *args, **named: torch.zeros(1, 3, 9, 112, 96)) if spoilt else vae_split.decode_together
    with patch.dict(vae_split.MODELS, {"wan": model}), patch.object(vae_split, "decode_together", wrong):
        if spoilt:
            with torch.inference_mode():
                return vae_split.gate(mesh, "wan", vae_split.build(model, mesh.device, torch.float32))
        return vae_split.measure(mesh, "wan", "small", repeats=1)


def test_it_times_both_and_sees_what_is_wrong(two: Ranks) -> None:
    row, other = two.run(narrow, False)
    assert row["one_ms"] == other["one_ms"] and row["together_ms"] == other["together_ms"]
    assert row["processes"] == 2 and row["dtype"] == "float32" and row["ratio"] > 0
    said, nothing = two.run(narrow, True)
    assert "decode: " in said and "from one process" in said and nothing is None


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_two_gpus(tmp_path: Path) -> None:
    """NCCL, fused kernels, bfloat16 and float16: the gate is what is tested."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "benchmarks.vae_split"]
    line += ["--size", "small", "--repeats", "1", "--json", str(tmp_path / "rows.json")]
    subprocess.run(line, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=True, timeout=600)
    assert len(json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]) == 3
