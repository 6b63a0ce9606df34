"""GPU memory of a server, read from outside while it works and when it rests."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from host.load import settled
from host.server import Server

# ComfyUI collects garbage and empties PyTorch's cache when 10 s have passed since it last did (main.py, prompt_worker).
REST_S = 11.0


@dataclass(frozen=True)
class Vram:
    """Readings of one server. of: whose memory `used` is."""

    of: str
    server: Server
    used: Callable[[], int] | None

    def read(self) -> dict[str, int]:
        """Bytes. used: as `of` says; reserved: by PyTorch's allocator; active: what of these tensors hold."""
        (device,) = self.server.get("/system_stats")["devices"]
        reserved, free = device["torch_vram_total"], device["torch_vram_free"]
        used = device["vram_total"] - device["vram_free"] if self.used is None else self.used()
        return {"used": used, "reserved": reserved, "active": reserved - free}

    def at_rest(self, seconds: float = REST_S) -> dict[str, float]:
        """MB, once nothing has been queued or run for so long."""
        while any(self.server.get("/queue").values()):
            time.sleep(0.1)
        time.sleep(seconds)
        return {name: _mb(size) for name, size in self.read().items()}


def vram(server: Server, library: Any = None) -> Vram:
    """How to read the GPU memory of a server, which has started on the first GPU. library: NVML.

    The server's process where NVML tells it apart, which in a container it may not; else all that is used of the GPU;
    without NVML what ComfyUI counts, to which PyTorch's cache is free. RuntimeError if the server computes on the CPU.
    """
    (device,) = server.get("/system_stats")["devices"]
    if device["type"] == "cpu":
        raise RuntimeError(f"{device['name']}: ComfyUI found no GPU here; the end of its log:\n{server.log()[-2000:]}")
    try:
        nvml = _Nvml(library or ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"))
    except OSError:
        return Vram("all of the GPU but PyTorch's cache, by ComfyUI's count", server, None)
    if nvml.of_process(server.pid) is None:
        return Vram("all of the GPU, by NVML", server, nvml.of_gpu)
    return Vram("the server's process, by NVML", server, lambda: nvml.of_process(server.pid) or 0)


def summary(readings: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """Of each kind of reading: how it settled, and how far apart the most and the least are from the third run on."""
    told: dict[str, Any] = {}
    for name in readings[0]:
        held = [reading[name] for reading in readings]
        apart = _mb(max(held[2:]) - min(held[2:]))
        told[name] = {**settled(held), "apart_mb": apart, "each_mb": [_mb(each) for each in held]}
    return told


def rests(gpu: Vram, again: Callable[[], object], rest_s: float = REST_S) -> dict[str, Any]:
    """MB at rest now, after /free, after one more run, and after /free again."""
    freeing = {"unload_models": True, "free_memory": True}
    found = {"after_runs": gpu.at_rest(rest_s)}
    gpu.server.post("/free", freeing)
    found["freed"] = gpu.at_rest(min(rest_s, 2.0))
    again()
    found["after_one_more"] = gpu.at_rest(rest_s)
    gpu.server.post("/free", freeing)
    return {**found, "freed_again": gpu.at_rest(min(rest_s, 2.0))}


def _mb(size: int) -> float:
    return round(size / 1e6, 1)


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t, as the third version of its list has it."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class _Nvml:
    """The first GPU in NVIDIA's management library (NVML API reference, device queries). OSError if it fails."""

    def __init__(self, library: Any) -> None:
        self._library, self._device = library, ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(0), ctypes.byref(self._device))

    def of_gpu(self) -> int:
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", self._device, ctypes.byref(memory))
        return int(memory.used)

    def of_process(self, pid: int) -> int | None:
        """None where it is not listed, or its memory is not told (all bits set)."""
        count = ctypes.c_uint(64)
        listed = (_Process * count.value)()
        self._call("nvmlDeviceGetComputeRunningProcesses_v3", self._device, ctypes.byref(count), listed)
        found = [int(each.used) for each in listed[: count.value] if each.pid == pid]
        return found[0] if found and 0 < found[0] < 2**63 else None

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise OSError(f"{name} returned {status}")
