"""A GPU that is really lost, in a process of its own: what is said, and that the process still ends by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dev.environment import REPOSITORY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LOSE = """
import sys, torch
import lightx2v_kernels.attention.reference as custom
from lightx2v import LightX2VPipeline
from lightx2v.offload.shortage import DeviceLostError

device, folder, offload = sys.argv[1:]
whole, calls = custom.attention, []

def attention(q, k, v):
    calls.append(1)
    if len(calls) == 6:
        if device == "cpu":
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        torch.zeros(4, device=device)[torch.tensor([9], device=device)]
        torch.cuda.synchronize()
    return whole(q, k, v)

custom.attention = attention
pipe = LightX2VPipeline(folder, device=device)
pipe.create_generator(attn_mode="reference", infer_steps=2, height=64, width=64, num_frames=5)
if offload != "none":
    pipe.enable_offload(True, offload, ram_budget_gb=0.0)
for attempt in range(2):
    try:
        pipe.generate(1, "a red circle", return_result_tensor=True, progress=False)
    except DeviceLostError as error:
        assert "device-side assert" in str(error) and "restart it" in str(error), error
        assert error.__context__ is None
        print("lost", attempt)
    if device == "cpu":
        break
"""


@pytest.mark.parametrize("offload", ["none", "model", "block"])
def test_a_lost_gpu_is_said_each_time_and_the_process_ends(offload: str) -> None:
    run = lose("cuda", offload)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["lost", "0", "lost", "1"], run.stderr[-3000:]


def lose(device: str, offload: str) -> subprocess.CompletedProcess[str]:
    folder = REPOSITORY / "demo" / "models" / "wan2.1_t2v"
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    line = [sys.executable, "-c", LOSE, device, str(folder), offload]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, cwd=Path(folder))
