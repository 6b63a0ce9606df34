"""Where the device's time goes in one call: kernels by what they compute."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lightx2v.bench.timing import gpu_state

# Tried in this order, against the kernel's name in lower case. The first three name what a kernel does; a fused kernel
# that quantises what it has normed or activated counts as elementwise, as it is bound by the same memory traffic.
GROUPS: tuple[tuple[str, str], ...] = (
    ("elementwise", r"(modulate|layer_norm|gelu|norm_rope).*quant"),
    ("attention", r"flash|fmha|sdpa|attention|attn|softmax|sage|^attend"),
    ("quantise", r"quant|float8_copy|fp8_e4m3_copy|^average_turned|^inverse_rms"),
    (
        "gemm",
        r"^_by_(address|copy_engine)|^_multiply|^_restore|gemm|nvjet|cublas|cutlass|xmma|wgmma|scaled_linear|"
        r"scaled_mm|gguf_linear|splitk|dot_kernel|addmm|_mm\b",
    ),
    ("convolution", r"conv|winograd|cudnn"),
    (
        "elementwise",
        r"elementwise|vectorized|norm|modulate|residual|rope|gelu|silu|reduce|cat|copy|fill|triton_|index|arange|"
        r"layernorm|clamp|add|mul",
    ),
)
OTHER = "other"
SEEN = 16  # kernels that are listed by name, the longest first
MARKS = ("ProfilerStep", "## ")  # spans of the profiler and of torch.compile, which are no kernels


def group_of(kernel: str) -> str:
    """attention, gemm, quantise, elementwise (norms, modulation, residuals, rope and copies among it), ... or other."""
    name = kernel.lower()
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), OTHER)


def profiled(fn: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """One call: ms a group, their total, and the longest kernels by name, so that a name in the wrong group shows; on a
    GPU also its state while it is at work.

    On a CPU the groups are of PyTorch's operators.
    """
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        fn()
        if gpu:
            busy = gpu_state()
            torch.cuda.synchronize(device)
    names: dict[str, float] = {}
    for event in profiler.key_averages():
        if (event.device_type == DeviceType.CUDA) == gpu and not event.key.startswith(MARKS):
            spent = event.self_device_time_total if gpu else event.self_cpu_time_total
            names[event.key] = names.get(event.key, 0.0) + spent / 1000
    return summary(names) | ({"gpu": busy} if gpu else {})


def summary(names: Mapping[str, float]) -> dict[str, Any]:
    """names: kernel -> ms."""
    groups: dict[str, float] = {}
    for name, ms in names.items():
        groups[group_of(name)] = groups.get(group_of(name), 0.0) + ms
    longest = sorted(names.items(), key=lambda item: -item[1])[:SEEN]
    return {
        "groups_ms": {name: round(ms, 2) for name, ms in sorted(groups.items(), key=lambda item: -item[1])},
        "total_ms": round(sum(groups.values()), 2),
        "kernels_ms": {f"{group_of(name)}: {name[:110]}": round(ms, 2) for name, ms in longest},
    }
