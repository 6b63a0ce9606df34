"""Times our attention kernels against others: `python -m benchmarks.attention [--tune] [--json FILE] [--seconds N]`.

Gate first (some queries against fp32 attention over all keys), then the median of rounds that visit all in turn, so
that a GPU that slows down as it warms slows all alike. Everything runs in a child process: one that hangs or dies costs
its own time limit, and is left out of the next child's list. With --tune every cut of our kernels is tried at the first
length, and the best go on.
"""

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import machine, report

CALLS = 3  # of each variant in a round
FINALISTS = 4  # of each kind of ours that go on after the first round
STEP_SECONDS = 60  # that a child may be silent: compiling one variant and running it a few times
COMPILERS = 8


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu: a dry run in Triton's interpreter")
    parser.add_argument("--tune", action="store_true", help="try every cut of our kernels, not only those in use")
    parser.add_argument(
        "--kinds", nargs="+", default=["exact", "int8", "peer", "producer"], help="exact, int8, peer, producer"
    )
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens (default: 32760; on cpu: 50)")
    parser.add_argument("--heads", type=int, help="default: 40; on cpu: 1")
    parser.add_argument("--seconds", type=float, default=240, help="for everything (default: 240)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results there too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.lengths = options.lengths or ([32760] if options.device != "cpu" else [50])
    options.heads = options.heads or (40 if options.device != "cpu" else 1)
    return options


# ---- in the child ----------------------------------------------------------------------------------------------------


def say(**event: Any) -> None:
    print("@" + json.dumps(event), flush=True)


def gate(kind: str, out: Tensor, inputs: tuple[Tensor, ...], truth: Tensor, plain: Tensor) -> tuple[float, str]:
    from benchmarks.attention_variants import INT8_ERROR
    from lightx2v_kernels.closeness import relative_error, why_too_far

    found = out[:, rows(out.shape[1], out.device)]
    error = relative_error(found, truth)
    if kind == "exact":
        return error, why_too_far(found, truth, plain) or ""
    if kind == "int8" and not error <= INT8_ERROR:
        return error, f"relative error {error:.2e} is above {INT8_ERROR:.2e}"
    return error, "" if error < 0.1 else f"relative error {error:.2e}"


def rows(tokens: int, device: torch.device) -> Tensor:
    """Some fifty queries, the last one among them."""
    return torch.unique(torch.tensor([*range(0, tokens, max(1, tokens // 50)), tokens - 1])).to(device)


def yardsticks(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of those queries in fp32, and written out at the inputs' own dtype."""
    from lightx2v_kernels.attention.reference import attention, attention_plain

    q = q[:, rows(q.shape[1], q.device)]
    return attention(q.float(), k.float(), v.float()), attention_plain(q, k, v)


def timed(run: Callable[[], Any], device: torch.device, calls: int) -> list[float]:
    """Milliseconds of each call."""
    if device.type != "cuda":
        stamps = [time.perf_counter()]
        for _ in range(calls):
            run()
            stamps.append(time.perf_counter())
        return [1000 * (end - start) for start, end in pairwise(stamps)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in pairwise(marks)]


def tokens_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def child(options: argparse.Namespace) -> None:
    """Gate and time what the list on the command line names, and say everything as it comes."""
    from benchmarks import attention_variants as variants

    plan = json.loads(options.child)
    device = torch.device(options.device)
    dtype = tokens_of(device)
    offered = [*variants.candidates(device), *variants.tuned(device), *variants.peers(device, dtype)]
    known = {variant.name: variant for variant in offered}
    torch.manual_seed(0)
    inputs = tuple(
        torch.randn(1, plan["tokens"], options.heads, variants.HEAD_DIM, device=device).to(dtype) for _ in range(3)
    )
    if plan["do"] == "producer":
        for name, run in variants.producers(options.heads, plan["tokens"], device, dtype).items():
            say(name=name, state="starts")
            timed(run, device, CALLS)
            say(name=name, state="timed", ms=timed(run, device, 5 * CALLS))
        return
    truth, plain = yardsticks(*inputs)
    ready: dict[str, Callable[[], Tensor]] = {}
    for name in plan["names"]:
        say(name=name, state="starts")
        try:
            run = known[name].prepare(*inputs)
            error, wrong = gate(known[name].kind, run(), inputs, truth, plain)
        except Exception as problem:  # whatever a variant fails with, the others go on
            say(name=name, state="failed", why=f"{type(problem).__name__}: {problem}"[:300])
            continue
        say(name=name, state="wrong" if wrong else "right", error=error, why=wrong)
        if not wrong:
            ready[name] = run
    for _ in range(plan["rounds"]):
        for name, run in ready.items():
            say(name=name, state="starts")
            say(name=name, state="timed", ms=timed(run, device, CALLS))


# ---- in the parent ---------------------------------------------------------------------------------------------------


def listen(options: argparse.Namespace, plan: dict[str, Any], rows: dict[str, dict[str, Any]], until: float) -> None:
    """Run children until everything in the plan has been heard of, or the time is over."""
    names = list(plan["names"])
    while names and time.monotonic() < until:
        line = [sys.executable, "-m", "benchmarks.attention", "--device", options.device, "--heads", str(options.heads)]
        environment = dict(os.environ, TRITON_INTERPRET="1") if options.device == "cpu" else None
        process = subprocess.Popen(
            [*line, "--child", json.dumps({**plan, "names": names})], stdout=subprocess.PIPE, text=True, env=environment
        )
        stuck = _follow(process, rows, until)
        if process.poll() is None:
            process.kill()
        process.wait()
        if stuck is None:
            return
        rows.setdefault(stuck, {})["why"] = f"hung or died (exit status {process.returncode})"
        names.remove(stuck) if stuck in names else names.clear()


def _follow(process: subprocess.Popen, rows: dict[str, dict[str, Any]], until: float) -> str | None:
    """Take in what a child says. The variant it was at when it fell silent or died; None if it came to its end."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    at: str | None = None
    while True:
        try:
            line = lines.get(timeout=max(0.0, min(STEP_SECONDS, until - time.monotonic())))
        except queue.Empty:
            return at if time.monotonic() < until else None
        if line is None:
            return at if process.wait() else None
        if not line.startswith("@"):
            continue
        event = json.loads(line[1:])
        at = event["name"]
        row = rows.setdefault(at, {})
        if event["state"] == "timed":
            row.setdefault("times", []).extend(event["ms"])
        else:
            row |= {key: event[key] for key in ("error", "why") if key in event}


def compile_ahead(options: argparse.Namespace, names: list[str], until: float) -> None:
    """Fill Triton's cache by several processes at once, at a short length with the same remainder."""
    tokens = 1024 + min(options.lengths[0], options.lengths[0] % 128)
    parts = [names[i::COMPILERS] for i in range(COMPILERS)]
    plans = [{"do": "time", "tokens": tokens, "names": part, "rounds": 0} for part in parts if part]
    threads = [threading.Thread(target=listen, args=(options, plan, {}, until)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def kept(rows: dict[str, dict[str, Any]], kinds: dict[str, str]) -> list[str]:
    """The best of ours, and all peers."""
    found = []
    for kind in ("exact", "int8", "peer"):
        able = [name for name, row in rows.items() if kinds.get(name) == kind and row.get("times")]
        able.sort(key=lambda name: statistics.median(rows[name]["times"]))
        found += able if kind == "peer" else able[:FINALISTS]
    return found


def figures(rows: dict[str, dict[str, Any]], kinds: dict[str, str], tokens: int, heads: int) -> list[dict[str, Any]]:
    flops = 4.0 * tokens * tokens * heads * 128
    found = []
    for name, row in rows.items():
        ms = statistics.median(row["times"]) if row.get("times") else None
        rate = round(flops / ms / 1e9, 1) if ms and name in kinds else None
        found.append(
            {"tokens": tokens, "kind": kinds.get(name, "producer"), "name": name, "ms": ms and round(ms, 3)}
            | {"calls": len(row.get("times", ())), "tflops": rate, "error": row.get("error"), "why": row.get("why", "")}
        )
    return sorted(found, key=lambda row: (row["kind"], row["ms"] is None, row["ms"]))


def show(found: list[dict[str, Any]]) -> None:
    for row in found:
        ms = f"{row['ms']:9.3f} ms" if row["ms"] else "        -   "
        rate = f"{row['tflops']:7.1f} TFLOP/s" if row["tflops"] else " " * 15
        error = f"error {row['error']:.4f}" if row["error"] is not None else ""
        print(f"{row['tokens']:6} {row['name']:48} {ms} {rate} {error} {row['why']}", flush=True)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks import attention_variants as variants

    device, until = torch.device(options.device), time.monotonic() + options.seconds
    ours = variants.candidates(device) if options.tune else variants.tuned(device)
    chosen = [*ours, *variants.peers(device, tokens_of(device))]
    kinds = {variant.name: variant.kind for variant in chosen if variant.kind in options.kinds}
    names, found = list(kinds), []
    if device.type == "cuda" and options.tune:
        compile_ahead(options, [name for name in names if kinds[name] != "peer"], until)
    for tokens in options.lengths:
        rows: dict[str, dict[str, Any]] = {}
        if options.tune and tokens == options.lengths[0]:
            listen(options, {"do": "time", "tokens": tokens, "names": names, "rounds": 1}, rows, until)
            names = kept(rows, kinds)
        listen(options, {"do": "time", "tokens": tokens, "names": names, "rounds": 5}, rows, until)
        if "producer" in options.kinds:
            listen(options, {"do": "producer", "tokens": tokens, "names": ["producer"]}, rows, until)
        found += figures(rows, kinds, tokens, options.heads)
        show(found[-len(rows) :])
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.child:
        with torch.inference_mode():
            child(options)
        return 0
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    results = measure(options)
    report({"benchmark": "attention", **machine(torch.device(options.device)), "results": results}, options.json)
    return int(not any(row["ms"] for row in results))


if __name__ == "__main__":
    sys.exit(main())
