"""diffusers' group offload on the same weights: block by block, on a stream of its own, from pinned memory."""

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.offload_cases import Bench, Passes, measured, now, release
from benchmarks.peers import called, diffusers_wan, set_attention
from lightx2v.bench.engine import Setting
from lightx2v_kernels.closeness import relative_error

ATTENTION = ("_flash_3", "native")  # the first that can be had


def group_offload(bench: Bench, passes: Passes, truth: Tensor, found: dict[str, Any]) -> None:
    """passes: of a network whose weights are in RAM. truth: what the engine makes. found: is given the figures."""
    import diffusers

    release(bench.device)
    setting = Setting(bench.subject, bench.device, bench.dtype, passes.network, passes.given)
    theirs: Any = diffusers_wan(setting)
    found |= {"version": diffusers.__version__, "refused": {}}
    for attention in ATTENTION:
        try:
            set_attention(theirs, attention)
            found["attention"] = attention
            break
        except Exception as error:  # whatever a missing package is said with
            found["refused"][attention] = f"{type(error).__name__}: {error}"
    cuda = bench.device.type == "cuda"
    began = time.perf_counter()
    theirs.enable_group_offload(
        onload_device=bench.device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=cuda,
        non_blocking=cuda,
    )
    found["ready_s"] = round(now(bench.device) - began, 2)
    call = called(setting, theirs)
    found["error"] = round(float(relative_error(call().float().cpu(), truth.float().cpu())), 5)
    found |= measured(bench, call, None)
    del theirs, call
    release(bench.device)
