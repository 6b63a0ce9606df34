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
DEMO = "lightx2v-demo/"
SIZES = ((96, 96, 9), (128, 128, 17), (128, 96, 13), (64, 128, 17))  # the largest second: from there nothing may grow
LORAS = ("loras/wan_t2v_4steps_lora_rank16.safetensors", "loras/wan_t2v_night_lora_rank8.safetensors")

# glibc otherwise learns from the first large pieces that are freed to keep such pieces for later: up to 64 MB for each
# thread that ever allocated (mallopt(3), M_MMAP_THRESHOLD), which hides what the program itself holds.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


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
        variables = {} if options.lazy else GIVES_BACK
        with start(root, Path(folder), packs, demo_models(), variables=variables) as server:
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
    parser.add_argument("--lazy", action="store_true", help="let the C library keep freed memory, as it usually does")
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
    from host.load import Job, account, flatness, press

    jobs = [Job(str(index), _demo_graph(index)) for index in range(options.runs)]
    ended, foreign = press(server, [jobs])
    held = [each.rss for each in sorted(ended, key=lambda each: each.order)]
    told = account(ended, {each.job.name: each.digest for each in ended}, foreign)
    told["each_mb"] = [round(each / 1e6, 1) for each in held]
    return {**told, "memory": flatness(held, min(2, len(held) - 1))}


def _demo_graph(index: int) -> dict[str, Any]:
    from host.graphs import node, our_sampler

    width, height, length = SIZES[index % len(SIZES)]
    lora = LORAS[index % 3 % 2]
    graph = {
        "lora": node("LightX2VLoRA", lora_name=DEMO + lora, strength=1.0 - index / 100, expert="both"),
        "model": node("LightX2VLoadModel", original_ckpt=f"{DEMO}wan2.1_t2v/diffusion_pytorch_model.safetensors"),
        "text": node("LightX2VLoadTextEncoder", text_encoder=f"{DEMO}wan2.1_t2v/models_t5_umt5-xxl-enc.safetensors"),
        "vae": node("LightX2VLoadVAE", vae_name=f"{DEMO}wan2.1_t2v/Wan2.1_VAE.safetensors"),
        "positive": node(
            "LightX2VTextEncode", encoder=["text", 0], text="a red circle moves right over a navy background"
        ),
        "negative": node("LightX2VTextEncode", encoder=["text", 0], text=""),
        "empty": node("LightX2VEmptyLatent", width=width, height=height, length=length, family="wan2.1", batch_size=1),
        "sample": our_sampler(model=["model", 0], seed=index, steps=4),
        "decode": node("LightX2VDecode", latent=["sample", 0], vae=["vae", 0]),
        "video": node("CreateVideo", images=["decode", 0], fps=16.0),
        "save": node("SaveVideo", video=["video", 0], filename_prefix="load/demo", format="mp4", codec="h264"),
        "digest": node("FixtureDigest", value=["decode", 0]),
    }
    graph["model"]["inputs"]["lora"] = ["lora", 0]
    return graph


def _fine(part: dict[str, Any]) -> bool:
    return not (part["swapped"] or part["astray"] or part["not as asked"] or part["ended"].get("lost"))


if __name__ == "__main__":
    sys.exit(main())
