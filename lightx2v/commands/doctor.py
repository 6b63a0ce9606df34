"""`lightx2v doctor`: what this machine has and can run, and what model folders hold."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from lightx2v.capacity import Capacity, capacities
from lightx2v.doctor import NEEDED, BackendState, Machine, backends, machine, parts, place

GB = 1e9


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", nargs="*", type=Path, help="model folders to look through")
    command.add_argument("--all", action="store_true", help="every backend of every op, and every reason")
    command.add_argument("--json", action="store_true", help="one object")


def run(args: argparse.Namespace) -> int:
    """0; 1 where a package that is needed is missing. Raises CheckpointError for a path that is no folder."""
    found = machine()
    folders = {str(path): dict(parts(path)) for path in args.path}
    states, fitting = list(backends()), list(capacities(place()[0]))
    if args.json:
        models = [{**asdict(each), "here": each.here()} for each in fitting]
        report = {**asdict(found), "backends": [asdict(state) for state in states], "models": models}
        print(json.dumps({**report, "folders": folders}, indent=2))
    else:
        sections = [_summary(found), _models(fitting), _packages(found), _backends(states, args.all)]
        sections += [_folder(path, held) for path, held in folders.items()]
        print("\n\n".join("\n".join(section) for section in sections))
    return 1 if any(found.packages[name] is None for name in NEEDED) else 0


def _summary(found: Machine) -> Iterator[str]:
    """What a newcomer asks first."""
    yield (
        f"lightx2v {found.lightx2v}, Python {found.python}, {found.system}, {found.cores} cores, "
        f"{found.ram / GB:.1f} GB RAM ({found.free_ram / GB:.1f} free)"
    )
    for gpu in found.gpus:
        yield (
            f"  {gpu.device}: {gpu.name}, {gpu.total / GB:.1f} GB ({gpu.free / GB:.1f} free), compute capability "
            f"{gpu.capability}, driver for CUDA {found.driver}"
        )
    if not found.gpus:
        yield f"  no GPU: {found.why_cpu}. The small models in demo/models run on the CPU (docs/tutorial.md);"
        yield "  for the published ones a GPU is needed, with at least the memory that the table says."
    missing = [name for name in NEEDED if found.packages[name] is None]
    if missing:
        yield f"  missing: pip install {' '.join(missing)}"


def _packages(found: Machine) -> Iterator[str]:
    yield "packages"
    names = [(name, told or "not installed") for name, told in found.packages.items()]
    yield from _table([(name, told if name in NEEDED else f"{told} (optional)") for name, told in names])


def _backends(states: Sequence[BackendState], everything: bool) -> Iterator[str]:
    """Attention's backends with every reason why not, and those of other ops by name; with `everything` all alike."""
    device, dtype = place()
    ops = dict.fromkeys(state.op for state in states)
    full = [op for op in ops if everything or op == "attention"]
    for op in full:
        yield f"{op} backends for {device}, {str(dtype).removeprefix('torch.')}"
        yield from (_line(state) for state in states if state.op == op)
    if len(full) < len(ops):
        yield f"other backends for {device}, {str(dtype).removeprefix('torch.')} (every reason: doctor --all)"
        yield from _table([("op", "auto takes", "can run too", "cannot run here"), *_others(states, full)])


def _line(state: BackendState) -> str:
    lossy = "" if state.max_error is None else f", lossy: within {state.max_error:g} of fp32"
    says = f"cannot run: {state.why_not}" if state.why_not else f"can run, self-test {state.self_test}{lossy}"
    taken = f"  <- {', '.join(state.taken_by)}" if state.taken_by else ""
    return f"  {state.name:<15} {says}{taken}"


def _others(states: Sequence[BackendState], full: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for op in dict.fromkeys(state.op for state in states if state.op not in full):
        mine = [state for state in states if state.op == op]
        taken = [state.name for state in mine if "auto" in state.taken_by]
        able = [state.name for state in mine if not state.why_not and state.name not in taken]
        yield op, *(", ".join(names) or "-" for names in (taken, able, [state.name for state in mine if state.why_not]))


def _models(fitting: Sequence[Capacity]) -> Iterator[str]:
    yield "models, transformer in bf16 (8-bit files take about half of the weights)"
    head = ("model", "video", "least GPU memory", "all on the GPU", "RAM for weights", "here")
    rows = [
        (
            each.model,
            f"{each.width}x{each.height}, {each.num_frames} frames",
            f"{each.least / GB:.1f} GB",
            f"{each.whole / GB:.1f} GB",
            f"{each.ram / GB:.1f} GB",
            each.here(),
        )
        for each in fitting
    ]
    yield from _table([head, *rows])


def _folder(path: str, held: dict[str, str]) -> Iterator[str]:
    yield f"{path}:"
    yield from (f"  {part:<15} {what}" for part, what in held.items())


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield ("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))).rstrip()
