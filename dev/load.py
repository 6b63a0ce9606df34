"""Long loads on a real ComfyUI server, as JSON: `python dev.py run -m dev.load --prompts 200 --clients 4`.

Prompts of mixed workflows from several clients, with repeats and cancels; then runs of the small trained model, queued
at once, whose LoRAs and sizes change. How each prompt ended, whether it made what it makes alone, and what the server's
memory did. The short form is tests/host/test_load.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dev.comfyui import PACK_NAME, demo_models, find_comfyui
from dev.environment import REPOSITORY

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
        with start(root, Path(folder), packs, demo_models()) as server:
            made: dict[str, dict[str, Any]] = {}
            if options.prompts:
                made["mixed"] = _mixed(server, models, options)
            if options.runs:
                made["runs"] = _runs(server, options)
    text = json.dumps(made, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0 if all(_fine(part) for part in made.values()) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dev.load", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=200, help="of mixed workflows; default: %(default)s")
    parser.add_argument("--clients", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=20, help="of the small trained model; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write there too")
    return parser.parse_args(arguments)


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


def _runs(server: Any, options: argparse.Namespace) -> dict[str, Any]:
    """20 runs in the queue at once, each of another size and LoRA than the one before."""
    from host.load import Job, account, demo, press, settled

    ended, foreign = press(server, [[Job(str(index), demo(index)) for index in range(options.runs)]])
    told = account(ended, {each.job.name: each.digest for each in ended}, foreign)
    in_order = sorted(ended, key=lambda each: each.order)
    for name, held in (("anonymous", [each.rss for each in in_order]), ("whole", [each.whole for each in in_order])):
        told[name] = {**settled(held), "each_mb": [round(each / 1e6, 1) for each in held]}
    return told


def _fine(part: dict[str, Any]) -> bool:
    return not (part["swapped"] or part["astray"] or part["not as asked"] or part["ended"].get("lost"))


if __name__ == "__main__":
    sys.exit(main())
