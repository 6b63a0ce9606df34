"""Long loads on a real ComfyUI server, as JSON: `python dev.py run -m dev.load --prompts 200 --clients 4`.

Prompts of mixed workflows from several clients, with repeats and cancels; then runs of the small trained model, queued
at once, whose LoRAs and sizes change; with --workflows every workflow that comes with the pack. How each prompt ended,
whether it made what it makes alone, or what its prompt asks for, and what the server's memory did, with --gpu also the
GPU's. The short form is tests/host/test_load.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dev.comfyui import PACK_NAME, demo_models, find_comfyui
from dev.environment import REPOSITORY
from lightx2v.bench.timing import keep, machine

TESTS = REPOSITORY / "tests"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    sys.path.insert(0, str(TESTS))  # the harness is the tests' own
    from host.server import start
    from host.tiny_models import write_tiny_models

    root = find_comfyui()
    if root is None:
        raise SystemExit("no ComfyUI: set COMFYUI_PATH, or let `python dev.py test` fetch one into .host/")
    packs = {PACK_NAME: REPOSITORY, "fixture_pack": TESTS / "host" / "fixture_pack"}
    with tempfile.TemporaryDirectory() as folder:
        models = write_tiny_models(Path(folder) / "models")
        with start(root, Path(folder), packs, demo_models(), cpu=not options.gpu) as server:
            try:
                made = _loads(server, models, options)
            finally:
                if options.log is not None:
                    shutil.copyfile(server.log_path, options.log)
    print(json.dumps(made, indent=1))
    return 0 if all(_fine(part) for part in made.values()) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dev.load", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=200, help="of mixed workflows; default: %(default)s")
    parser.add_argument("--clients", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=20, help="of the small trained model; default: %(default)s")
    parser.add_argument("--workflows", action="store_true", help="run every workflow that comes with the pack, too")
    parser.add_argument("--gpu", action="store_true", help="on the first GPU, whose memory is watched; not on the CPU")
    parser.add_argument("--save", choices=("mp4", "webp"), default="mp4", help="of runs; default: %(default)s")
    parser.add_argument("--commit", help="of this tree, where git cannot be asked")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep what the server printed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write there too, after each part")
    return parser.parse_args(arguments)


def _loads(server: Any, models: Any, options: argparse.Namespace) -> dict[str, Any]:
    from host.vram import vram

    made: dict[str, dict[str, Any]] = {}
    gpu = vram(server) if options.gpu else None
    idle = gpu.at_rest(2.0) if gpu else {}

    def done(part: str, found: dict[str, Any]) -> None:
        made[part] = found
        if options.json is not None:
            keep(made, options.json)

    if options.prompts:
        done("mixed", _mixed(server, models, options))
    if options.runs:
        done("runs", _runs(server, options, gpu, idle))
    if options.workflows:
        from host.stand_ins import write_stand_ins

        write_stand_ins(server.base / "models")
        _workflows(server, gpu, lambda found: done("workflows", found))
    done("machine", _machine(server, options))
    return made


def _mixed(server: Any, models: Any, options: argparse.Namespace) -> dict[str, Any]:
    from host.load import account, alone, flatness, mixed, press

    clients = mixed(server, models, options.prompts, options.clients)
    expected = alone(server, [job for client in clients for job in client])
    began = time.monotonic()
    ended, foreign = press(server, clients)
    taken = time.monotonic() - began
    held = [each.rss for each in sorted(ended, key=lambda each: each.order) if each.rss]
    found: dict[str, Any] = {"clients": options.clients, "different": len(expected), "seconds": round(taken, 1)}
    found["each_tenth_mb"] = [round(each / 1e6, 1) for each in held[::10]]
    return {**account(ended, expected, foreign), **found, "memory": flatness(held, max(1, len(held) // 10))}


def _runs(server: Any, options: argparse.Namespace, gpu: Any, idle: Mapping[str, float]) -> dict[str, Any]:
    """20 runs in the queue at once, each of another size and LoRA than the one before."""
    from host.load import Job, account, demo, press, settled
    from host.vram import rests, summary

    began = time.monotonic()
    jobs = [Job(str(index), demo(index, options.save)) for index in range(options.runs)]
    ended, foreign = press(server, [jobs], gpu.read) if gpu else press(server, [jobs])
    told = account(ended, {each.job.name: each.digest for each in ended}, foreign)
    told |= {"saved as": options.save, "seconds": round(time.monotonic() - began, 1)}
    in_order = sorted(ended, key=lambda each: each.order)
    for name, held in (("anonymous", [each.rss for each in in_order]), ("whole", [each.whole for each in in_order])):
        told[name] = {**settled(held), "each_mb": [round(each / 1e6, 1) for each in held]}
    if gpu:
        once = demo(options.runs + 1, options.save)
        told["vram"] = {"whose": gpu.of, **summary([each.vram for each in in_order])}
        told["at_rest_mb"] = {"before": idle, **rests(gpu, lambda: server.run(once).expect())}
    return told


def _workflows(server: Any, gpu: Any, done: Any) -> None:
    from host.shipped import NAMES
    from host.stand_ins import STAND_INS

    found: dict[str, Any] = {}
    for name in NAMES:
        began = time.monotonic()
        found[name] = {"random weights": name in STAND_INS, **_workflow(server, name)}
        found[name]["seconds"] = round(time.monotonic() - began, 1)
        if gpu:
            found[name]["vram_mb"] = gpu.at_rest(0.0)
        done(found)


def _workflow(server: Any, name: str) -> dict[str, Any]:
    """How a workflow ended, and what is wrong with its video: nothing, where it is as its prompt and pictures say."""
    from host.shipped import JUDGED, PICTURED, kept, likeness, mistaken, read
    from host.stand_ins import runnable

    result = server.run(kept(runnable(name, read(name)[1])))
    if result.status != "success":
        return {"status": result.status, "wrong": result.message[:500]}
    frames = result.kept("frames")
    wrong = [mistaken(name, frames)] if name in JUDGED else []
    if not (frames.isfinite().all() and frames.std() > 0.004 and (frames[0] != frames[-1]).any()):
        wrong.append("a blank or frozen picture")
    found: dict[str, Any] = {"status": result.status, "frames": list(frames.shape), "judged": name in JUDGED}
    for workflow, place, picture, least in PICTURED:
        if workflow == name:
            found[f"db_{picture}"] = round(likeness(frames, place, picture), 1)
            wrong += [f"{picture} is not at frame {place}"] if found[f"db_{picture}"] < least else []
    return {**found, "wrong": "; ".join(filter(None, wrong))}


def _machine(server: Any, options: argparse.Namespace) -> dict[str, Any]:
    told = server.get("/system_stats")
    commit = options.commit
    if commit is None and (git := shutil.which("git")):
        asked = [git, "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    device = torch.device("cuda" if options.gpu else "cpu")
    comfyui = {"comfyui": told["system"]["comfyui_version"], "comfyui_device": told["devices"][0]["name"]}
    return {"commit": commit, **comfyui, **machine(device)}


def _fine(part: Mapping[str, Any]) -> bool:
    """Of the machine: always; of workflows: each ended well; of prompts: as asked."""
    if "prompts" not in part:
        return not any(isinstance(each, Mapping) and each.get("wrong") for each in part.values())
    return not (part["swapped"] or part["astray"] or part["not as asked"] or part["ended"].get("lost"))


if __name__ == "__main__":
    sys.exit(main())
