"""Times blocks that are read from their file as they are needed: `python -m benchmarks.disk [--folder DIR]`.

Writes a checkpoint of random weights, one file a block or one file in all, runs passes with all its weights in RAM and
with those of all blocks left in the file, and removes it. Reported: anonymous memory of the process at most, against
the bytes of the model, seconds of a pass that finds the file in the page cache, and of one that does not, and seconds
of a step of both passes of guidance that does not, with blocks read for each of the passes and once for both.

Gate first: all give the same result bit for bit.
"""

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.offload_cases import Passes, Steps
from lightx2v.bench.subjects import CONFIGS, Inputs, Subject, subject
from lightx2v.bench.timing import machine, report
from lightx2v.config import Engine
from lightx2v.identify import CheckpointInfo, identify
from lightx2v.loading import load_transformer
from lightx2v.offload.disk import left_in_file
from lightx2v.offload.plan import GB
from lightx2v.offload.stream import BlockStream
from lightx2v_kernels import select

MODELS = tuple(name for name in CONFIGS if name.startswith(("wan", "demo")))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disk", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="wan2.1-1.3b")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument("--layout", choices=("block-split", "single"), default="block-split")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where to write the checkpoint; default: the system's for such files"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result there too")
    return parser.parse_args(arguments)


def write(wanted: Subject, folder: Path, layout: str) -> Path:
    """A checkpoint in bf16, block by block, so that it is never in memory as a whole unless it is one file."""
    kernels = select(device=torch.device("cpu"), dtype=torch.bfloat16, head_dim=wanted.spec.head_dim)
    with torch.device("meta"):
        network = wanted.spec.build(wanted.config, kernels)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        split = name.split(".")
        file = f"block_{split[1]}" if split[0] == "blocks" else "non_block"
        files.setdefault(file if layout == "block-split" else "wan", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in files.items():
        tensors = {name: _random(shapes[name], name, generator) for name in names}
        save_file(tensors, folder / f"{file}.safetensors")
    return folder if layout == "block-split" else folder / "wan.safetensors"


def _random(shape: torch.Size, name: str, generator: torch.Generator) -> Tensor:
    if len(shape) < 2:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.bfloat16)
    fan = shape[1:].numel()
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-(fan**-0.5), fan**-0.5, generator=generator)


class Memory:
    """Anonymous memory of this process, looked at a hundred times a second: what the page cache holds is not in it."""

    def __init__(self) -> None:
        self.peak = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        gc.collect()
        done, before = threading.Event(), anonymous()
        self.peak = 0

        def look() -> None:
            while not done.wait(0.01):
                self.peak = max(self.peak, anonymous() - before)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not say how much anonymous memory a process has; run it on Linux")


def forget(path: Path) -> None:
    """Ask the system to drop a checkpoint from the page cache."""
    for file in path.iterdir() if path.is_dir() else [path]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(info: CheckpointInfo, device: torch.device, given: Inputs, count: int, filed: int) -> dict[str, Any]:
    """Passes with `filed` blocks in their file."""
    memory = Memory()
    with memory.watched():
        left = load_transformer(
            info, Engine(dtype="bf16"), device, torch.device("cpu"), lambda network: left_in_file(network, filed)
        )
        stream, passes = BlockStream({"": left}, device, headers={"": info.header}), Passes(left, given)
        times = []
        with stream.open(0, 1):
            out = passes.streamed(stream).cpu()
            for cold in [True] * count + [False] * count:
                if cold:
                    forget(info.path)
                began = time.perf_counter()
                passes.streamed(stream).cpu()
                times.append(time.perf_counter() - began)
            steps = [_cold_step(Steps(left, given, paired), stream, info.path) for paired in (False, True)]
        host = stream.host_bytes
        stream.release()
    (turns, in_turn), (both, shared) = steps
    same = torch.equal(turns, both) and torch.equal(turns[: len(out)], out)
    found = {"out": out, "same": same, "peak": memory.peak, "host": host, "in turn": in_turn, "shared": shared}
    return {**found, "cold": times[:count], "warm": times[count:]}


def _cold_step(steps: Steps, stream: BlockStream, path: Path) -> tuple[Tensor, float]:
    forget(path)
    began = time.perf_counter()
    return steps.streamed(stream).cpu(), time.perf_counter() - began


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device, wanted = torch.device(options.device), subject(options.model)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        info = identify(write(wanted, Path(folder), options.layout))
        given, count = wanted.small().inputs(device), wanted.config.num_layers
        filed = run(info, device, given, options.passes, count)
        whole = run(info, device, given, options.passes, 0)
    size = info.header.nbytes
    right = torch.equal(filed["out"], whole["out"]) and filed["same"] and whole["same"]
    result: dict[str, Any] = {"model": options.model, "layout": options.layout, "model_gb": round(size / GB, 3)}
    result["gate"] = "passed" if right else "wrong: not what weights in RAM give"
    for name, each in (("in the file", filed), ("in RAM", whole)) if right else ():
        result[name] = {
            "anonymous_gb": round(each["peak"] / GB, 3),
            "host_gb": round(each["host"] / GB, 3),
            "cold_s": [round(seconds, 3) for seconds in each["cold"]],
            "warm_s": [round(seconds, 3) for seconds in each["warm"]],
            "cold_step_s": {how: round(each[how], 3) for how in ("in turn", "shared")},
        }
    Console(width=None if sys.stdout.isatty() else 140).print(result)
    report({"benchmark": "disk", **machine(device), **result}, options.json)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
