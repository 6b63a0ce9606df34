"""The parts of the benchmark of offload, each a function that fills its figures in as they come."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.disk import Memory, anonymous, forget
from benchmarks.offload_cases import (
    RIGHT,
    WRONG,
    Bench,
    Marks,
    Passes,
    Steps,
    beside,
    capped,
    latents_of,
    measured,
    now,
    on_gpu,
    release,
    streamed,
)
from lightx2v.bench.subjects import Subject, subject
from lightx2v.blocks import run_blocks
from lightx2v.checkpoint.writing import Entry, write_safetensors
from lightx2v.config import Engine
from lightx2v.identify import identify
from lightx2v.loading import load_transformer
from lightx2v.offload import Asked, DoesNotFitError, Placing
from lightx2v.offload.disk import left_in_file
from lightx2v.offload.lane import pin
from lightx2v.offload.plan import GB, RAM_RESERVE, Plan, measure
from lightx2v.offload.slab import PAGE, host_memory
from lightx2v.offload.stream import BlockStream

LATE = "left out: the seconds are used up"
SWITCHES = ("high", "high", "high", "low", "low", "low", "high", "high", "")
Found = dict[str, Any]


@dataclass
class Kept:
    """What one part leaves for the next: a network in RAM, what it gives, and how long it takes on the device."""

    passes: Passes
    truth: Tensor
    resident: Found


class Shelf:
    """By scheme: "" (bf16) and "fp8"."""

    def __init__(self) -> None:
        self.kept: dict[str, Kept] = {}

    def __getitem__(self, scheme: str) -> Kept:
        if scheme not in self.kept:
            raise RuntimeError(f"the part of {scheme or 'bf16'} weights has to run before this one")
        return self.kept[scheme]


def weights(bench: Bench, shelf: Shelf, found: Found, scheme: str = "") -> None:
    """All blocks on the device; then all of them pass through it, within the smallest cap."""
    release(bench.device)
    began = now(bench.device)
    passes = Passes(bench.made(scheme), bench.subject.inputs(bench.device))
    sizes = measure(passes.network)
    found |= {"made_s": round(now(bench.device) - began, 2), "weights_gb": round(sizes.total / GB, 2)}
    found |= {"block_gb": round(max(sizes.blocks) / GB, 3), "rest_gb": round(sizes.rest / GB, 3)}
    found["planned_activations_gb"] = round(bench.activations() / GB, 3)
    truth = passes.resident().cpu()
    found["resident"] = measured(bench, passes.resident, truth)
    began = now(bench.device)
    passes.network.to("cpu")
    found["to_ram_s"] = round(now(bench.device) - began, 2)
    release(bench.device)
    shelf.kept[scheme] = Kept(passes, truth, found["resident"])
    began = now(bench.device)
    stream = BlockStream({"": passes.network}, bench.device)
    found |= {"ready_s": round(now(bench.device) - began, 2), "pinned_gb": round(stream.pinned_bytes / GB, 2)}
    try:
        made = bench.plan([sizes], bench.caps[0] * GB, least=True)
        found["streamed"] = streamed(bench, passes, stream, made, bench.caps[0] * GB, truth)
        beside(found["streamed"], found["resident"])
        began = now(bench.device)
    finally:
        stream.release()
    found["unpinned_s"] = round(now(bench.device) - began, 2)


def fp8(bench: Bench, shelf: Shelf, found: Found) -> None:
    weights(bench, shelf, found, "fp8")


def caps(bench: Bench, shelf: Shelf, found: Found) -> None:
    """What *auto* plans within each cap, at both sizes."""
    kept = shelf["fp8"]
    network = kept.passes.network
    sizes, stream = measure(network), BlockStream({"": network}, bench.device)
    try:
        for size in bench.sizes:
            asked = replace(subject(bench.subject.name, size), config=bench.subject.config) if size else bench.subject
            passes = Passes(network, asked.inputs(bench.device))
            rows: list[Found] = []
            found[f"{asked.video.width}x{asked.video.height}"] = rows
            with stream.open(len(sizes.blocks)):
                rows.append({"cap_gb": None, **measured(bench, lambda p=passes: p.streamed(stream), None, 1)})  # type: ignore[misc]
                truth = passes.streamed(stream).cpu()
            for cap in bench.caps:
                rows.append(_within(bench, passes, stream, cap, truth, asked))
                beside(rows[-1], rows[0])
    finally:
        stream.release()


def _within(bench: Bench, passes: Passes, stream: BlockStream, cap: float, truth: Tensor, asked: Subject) -> Found:
    if time.perf_counter() > bench.until:
        return {"cap_gb": cap, "gate": LATE}
    try:
        made = bench.plan([measure(passes.network)], cap * GB, subject=asked)
        return streamed(bench, passes, stream, made, cap * GB, truth, count=1)
    except (DoesNotFitError, torch.OutOfMemoryError) as error:
        return {"cap_gb": cap, "failed": f"{type(error).__name__}: {error}".partition("\n")[0]}


def guidance(bench: Bench, shelf: Shelf, found: Found) -> None:
    """Steps of both passes of guidance, of short videos whose copies take longer than computing hides: all blocks pass
    through, copied for each pass and once for both; then what is planned within the smallest cap."""
    for scheme, kept in shelf.kept.items():
        network = kept.passes.network
        stream = BlockStream({"": network}, bench.device)
        try:
            for frames in bench.short:
                video = bench.subject.video._replace(num_frames=frames)
                asked = replace(bench.subject, video=video)
                rows = found[f"{scheme or 'bf16'}, {video.width}x{video.height}, {frames} frames"] = Found()
                _steps(bench, network, stream, asked, rows)
        finally:
            stream.release()
            release(bench.device)


def _steps(bench: Bench, network: torch.nn.Module, stream: BlockStream, asked: Subject, rows: Found) -> None:
    sizes, steps, cap = measure(network), Steps(network, asked.inputs(bench.device)), bench.caps[0] * GB
    waiting, budget = bench.waiting(asked), {"vram": cap, "subject": asked}
    rows |= {"tokens": asked.tokens, "planned_waiting_gb": round(waiting / GB, 3)}
    with stream.open(len(sizes.blocks)):
        truth = steps.streamed(stream).cpu()
        rows["resident"] = measured(bench, partial(steps.streamed, stream), truth)
    least = bench.plan([sizes], **budget, least=True)
    plans = {
        "in turn": least,
        "shared": replace(least, paired=True, peak=least.peak + waiting),
        "planned in turn": bench.plan([sizes], **budget),
        "planned": bench.plan([sizes], **budget, waiting=waiting),
    }
    for name, made in plans.items():
        if time.perf_counter() > bench.until:
            rows[name] = {"gate": LATE}
            continue
        rows[name] = streamed(bench, replace(steps, paired=made.paired), stream, made, cap, truth)
        rows[name]["copied_gb"] = round(made.passing * (1 if made.paired else 2) / GB, 6)
        beside(rows[name], rows["resident"])


def pair(bench: Bench, shelf: Shelf, found: Found, scheme: str = "fp8") -> None:
    """Two experts in RAM: passing block by block, and by turns as wholes; how long the pass after a switch takes."""
    kept = shelf[scheme]
    release(bench.device)
    other = Passes(bench.made(scheme, other=True), kept.passes.given)
    truths = {"high": kept.truth, "low": other.resident().cpu()}
    other.network.to("cpu")
    release(bench.device)
    began = now(bench.device)
    stream = BlockStream({"high": kept.passes.network, "low": other.network}, bench.device)
    found |= {"ready_s": round(now(bench.device) - began, 2), "pinned_gb": round(stream.pinned_bytes / GB, 2)}
    sizes = [measure(kept.passes.network), measure(other.network)]
    try:
        for name, cap, least in (("streamed", bench.caps[0], True), ("by turns", 0.0, False)):
            vram = cap * GB if cap else max(each.total for each in sizes) + bench.activations() + 2 * GB
            made = bench.plan(sizes, vram, least=least)
            found[name] = _switching(bench, kept.passes, stream, made, truths, cap * GB or None)
            beside(found[name], kept.resident)
    finally:
        stream.release()
        del other
        release(bench.device)


def pair_bf16(bench: Bench, shelf: Shelf, found: Found) -> None:
    pair(bench, shelf, found, "")


def _switching(
    bench: Bench, passes: Passes, stream: BlockStream, made: Plan, truths: dict[str, Tensor], cap: float | None
) -> Found:
    device, marks, right = bench.device, Marks(bench.device), []
    cuda = on_gpu(device)
    with capped(device, cap):
        base = torch.cuda.memory_allocated(device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        with stream.open(made.resident, made.prefetch):
            for name in ("high", "low"):
                right.append(torch.equal(passes.streamed(stream, name).cpu(), truths[name]))
            passes.streamed(stream, "high", "high")
            marks.mark()
            for name, following in pairwise(SWITCHES):
                passes.streamed(stream, name, following)
                marks.mark()
            each = marks.ms()
    switched = [index for index in range(1, len(each)) if SWITCHES[index] != SWITCHES[index - 1]]
    step = median(ms for index, ms in enumerate(each) if index not in switched)
    row: Found = {"plan": made.line(), "plan_gb": round(made.peak / GB, 3), "gate": RIGHT if all(right) else WRONG}
    row |= {"ms": step, "ms_each": each, "switch_s": [round((each[i] - step) / 1000, 3) for i in switched]}
    if cuda:
        row["peak_gb"] = round((torch.cuda.max_memory_allocated(device) - base) / GB, 3)
        row["reserved_gb"] = round(torch.cuda.max_memory_reserved(device) / GB, 3)
    return row


def peer(bench: Bench, shelf: Shelf, found: Found) -> None:
    """diffusers' group offload of the same weights."""
    from benchmarks.offload_peer import group_offload

    kept = shelf[""]
    group_offload(bench, kept.passes, kept.truth, found)


def ram(bench: Bench, shelf: Shelf, found: Found) -> None:
    """A file on the disk, and RAM of so many GB: what has no room is read as it is needed."""
    kept = shelf.kept.pop("fp8")
    for scheme in list(shelf.kept):
        shelf.kept.pop(scheme)  # no part after this one needs them, and their memory is not this part's
    path, given = bench.folder / "wan_fp8.safetensors", kept.passes.given
    began = now(bench.device)
    tensors = {name: _as_stored(name, tensor) for name, tensor in kept.passes.network.state_dict().items()}
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_safetensors(path, entries, tensors.items(), {})
    found |= {"file_gb": round(path.stat().st_size / GB, 2), "written_s": round(now(bench.device) - began, 2)}
    truth, resident = kept.truth, kept.resident
    del kept, tensors
    release(bench.device)
    base = anonymous()
    found["process_gb"] = round(base / GB, 3)
    try:
        for cap in bench.ram_caps:
            row: Found = {"ram_cap_gb": cap}
            found[f"{cap:g} GB"] = row
            if time.perf_counter() > bench.until:
                row["gate"] = LATE
                continue
            memory = Memory()
            with memory.watched():
                _from_file(bench, row, cap * GB - base, given, truth)
            row["anonymous_gb"] = round((base + memory.peak) / GB, 3)
            beside(row, resident)
            release(bench.device)
    finally:
        path.unlink()


def _as_stored(name: str, tensor: Tensor) -> Tensor:
    """A scale a row is (N, 1) in LightX2V's files."""
    return tensor[:, None] if name.endswith("weight_scale") else tensor


def _from_file(bench: Bench, row: Found, room: float, given: Any, truth: Tensor) -> None:
    began = now(bench.device)
    info, cpu = identify(bench.folder / "wan_fp8.safetensors"), torch.device("cpu")
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[bench.dtype]
    scheme = "fp8" if bench.device.type == "cpu" else "auto"
    engine = Engine(dtype=dtype, attention=bench.attention, quant=scheme, offload="block")
    engine = replace(engine, ram_budget_gb=max(0.001, (room - RAM_RESERVE) / GB))
    placing = Placing(bench.device)
    made = placing.plan(engine, [info], [], Asked(latents_of(bench.subject), free=int(bench.caps[0] * GB)))
    left = partial(left_in_file, count=made.filed, resident=made.resident)
    network = load_transformer(info, engine, bench.device, cpu, left)
    with capped(bench.device, bench.caps[0] * GB), placing.placed([network], [], made, [info]) as (bringers, around):
        row |= {"plan": made.line(), "ready_s": round(now(bench.device) - began, 2)}
        walk: Any = around(run_blocks, "")

        def work() -> Tensor:
            out: Tensor = bringers[0]()(given.latents, given.timestep, given.context, run=walk, **given.more)
            return out

        row |= measured(bench, work, truth, 2)
        if made.filed:
            forget(info.path)
            row["cold_s"] = measured(bench, work, truth, 0)["first_s"]
    placing.forget()


def pinning(bench: Bench, shelf: Shelf, found: Found) -> None:
    """Seconds a GB to touch fresh memory and to pin it: by one thread and by several, in small pages and large ones."""
    size = int(bench.pin_gb * GB) // 16
    for name, threads, large in (("1 thread, small", 1, False), ("8, small", 8, False), ("8, large", 8, True)):
        with torch.inference_mode(False):  # threads are not in it
            pieces = [host_memory(size) if large else _small_pages(size) for _ in range(16)]
        began = now(bench.device)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda piece: piece.fill_(1), pieces))
            touched = now(bench.device)
            pins = list(pool.map(lambda piece: pin([piece], bench.device), pieces))
        ended = now(bench.device)
        for each in pins:
            each.release()
        total = sum(piece.numel() for piece in pieces) / GB
        found[name] = {
            "touch_s_gb": round((touched - began) / total, 3),
            "pin_s_gb": round((ended - touched) / total, 3),
            "unpin_s_gb": round((now(bench.device) - ended) / total, 3),
        }


def _small_pages(nbytes: int) -> Tensor:
    raw = torch.empty(nbytes + PAGE, dtype=torch.uint8)
    start = -raw.data_ptr() % PAGE
    return raw[start : start + nbytes]
