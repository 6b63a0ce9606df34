"""Many prompts of several clients at once on a real server: what became of each, and what the server's memory did."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from host.graphs import Graph, animated, base, native_sampler, node, our_sampler
from host.server import Server
from host.tiny_models import I2V, TinyModels, write_transformer

Reading = Callable[[], Mapping[str, int]]
TIMEOUT_S = 3600.0
ENDINGS = ("execution_success", "execution_error", "execution_interrupted")
I2V_FILE = "load_i2v.safetensors"
DEMO = "lightx2v-demo/"
SIZES = ((96, 96, 9), (128, 128, 17), (128, 96, 13), (64, 128, 17))  # the largest second: from there nothing may grow
LORAS = ("loras/wan_t2v_4steps_lora_rank16.safetensors", "loras/wan_t2v_night_lora_rank8.safetensors")


@dataclass(frozen=True)
class Job:
    """One prompt. name: of what it asks for: jobs of one name must all make the same.

    deed: "run"; "delete": taken out of the queue at once; "stop": interrupted when it has started.
    """

    name: str
    graph: Graph
    deed: str = "run"


@dataclass(frozen=True)
class Ended:
    """status: "success", "error", "interrupted", "deleted" or "lost". digest: of what it made."""

    job: Job
    status: str
    digest: str = ""
    rss: int = 0  # bytes of the server's RAM then, without pages of files
    message: str = ""
    order: float = 0.0  # when it was heard, in seconds
    whole: int = 0  # the same, with pages of files
    vram: Mapping[str, int] = field(default_factory=dict)  # what `press` was told to read then


@dataclass
class _Client:
    """One socket, and what it heard: how each prompt ended. foreign: messages about prompts of others."""

    jobs: Sequence[Job]
    read: Reading
    heard: dict[str, Ended] = field(default_factory=dict)
    ids: dict[str, Job] = field(default_factory=dict)
    foreign: int = 0


def rss(pid: int) -> tuple[int, int]:
    """Bytes of RAM that a process holds: without pages of files, and with them."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    held = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if "Rss" in line or "VmRSS" in line}
    return held["RssAnon"], held["VmRSS"]


def press(server: Server, clients: Sequence[Sequence[Job]], read: Reading = dict) -> tuple[list[Ended], int]:
    """Queue every client's jobs at once, in turns; returns how each ended, and how many messages went astray.

    read: reads the server's GPU memory when a prompt's end is heard.
    """
    return asyncio.run(asyncio.wait_for(_press(server, clients, read), TIMEOUT_S))


async def _press(server: Server, clients: Sequence[Sequence[Job]], read: Reading) -> tuple[list[Ended], int]:
    served = [_Client(jobs, read) for jobs in clients]
    await asyncio.gather(*(_serve(server, client) for client in served))
    async with aiohttp.ClientSession(server.url) as session:
        heard = {prompt for client in served for prompt in client.heard}
        while not heard <= (history := await _get(session, "/history")).keys():
            await asyncio.sleep(0.05)  # what has ended is told first and written down then
    ended = [_ended(prompt, job, client, history) for client in served for prompt, job in client.ids.items()]
    return ended, sum(client.foreign for client in served)


async def _serve(server: Server, client: _Client) -> None:
    name = uuid.uuid4().hex
    async with (
        aiohttp.ClientSession(server.url) as session,
        session.ws_connect(f"/ws?clientId={name}", max_msg_size=0) as socket,
    ):
        for job in client.jobs:
            async with session.post("/prompt", json={"prompt": job.graph, "client_id": name}) as answer:
                told = await answer.json()
                assert answer.status == 200, told
            client.ids[told["prompt_id"]] = job
            if job.deed == "delete":
                await session.post("/queue", json={"delete": [told["prompt_id"]]})
        while not await _all_ended(session, client):
            message = await socket.receive()
            if message.type == aiohttp.WSMsgType.TEXT:
                await _hear(server, session, client, json.loads(message.data))
            elif message.type != aiohttp.WSMsgType.BINARY:
                raise ConnectionError(f"the server closed the socket: {message}")


async def _hear(server: Server, session: aiohttp.ClientSession, client: _Client, event: Mapping[str, Any]) -> None:
    kind, data = event["type"], event["data"]
    prompt = data.get("prompt_id")
    if prompt is None:
        return
    if prompt not in client.ids:
        client.foreign += kind != "execution_interrupted"  # which the server tells everybody
        return
    if kind == "execution_start" and client.ids[prompt].deed == "stop":
        await session.post("/interrupt", json={"prompt_id": prompt})
    if kind in ENDINGS:
        said = str(data.get("exception_message", ""))
        anonymous, whole = rss(server.pid)
        status, now = kind.removeprefix("execution_"), time.monotonic()
        client.heard[prompt] = Ended(client.ids[prompt], status, "", anonymous, said, now, whole, client.read())


async def _all_ended(session: aiohttp.ClientSession, client: _Client) -> bool:
    """What was taken out of the queue in time is never heard of again."""
    silent = [prompt for prompt in client.ids if prompt not in client.heard]
    if any(client.ids[prompt].deed != "delete" for prompt in silent):
        return False
    queue = await _get(session, "/queue") if silent else {}
    waiting = {item[1] for items in queue.values() for item in items}
    done = await _get(session, "/history") if silent else {}
    return not any(prompt in waiting or prompt in done for prompt in silent)


async def _get(session: aiohttp.ClientSession, path: str) -> Any:
    async with session.get(path) as answer:
        return await answer.json()


def _ended(prompt: str, job: Job, client: _Client, history: Mapping[str, Any]) -> Ended:
    if prompt not in client.heard:
        return Ended(job, "deleted" if job.deed == "delete" and prompt not in history else "lost")
    shown = history.get(prompt, {}).get("outputs", {}).get("digest", {}).get("text", ())
    return replace(client.heard[prompt], digest="".join(shown))


def alone(server: Server, jobs: Sequence[Job]) -> dict[str, str]:
    """What each name makes when nothing else is asked of the server."""
    found: dict[str, str] = {}
    for job in jobs:
        if job.name not in found and job.deed == "run":
            found[job.name] = server.run(job.graph).expect().text("digest")
    server.post("/free", {"unload_models": True, "free_memory": True})
    return found


def account(ended: Sequence[Ended], expected: Mapping[str, str], foreign: int) -> dict[str, Any]:
    """The sums that must come out: every prompt once, each with what it makes alone."""
    runs = [each for each in ended if each.status == "success"]
    wrong = [each for each in ended if each.job.deed == "run" and each.status != "success"]
    return {
        "prompts": len(ended),
        "ended": dict(Counter(each.status for each in ended)),
        "asked to end": dict(Counter(each.job.deed for each in ended)),
        "swapped": sum(each.digest != expected.get(each.job.name) for each in runs if each.job.deed != "stop"),
        "astray": foreign,
        "not as asked": [f"{each.job.name}: {each.status} {each.message}" for each in wrong],
    }


def flatness(held: Sequence[int], first: int) -> dict[str, float]:
    """MB of memory in the first prompts and at the end, and by which share the most later exceeds the most before."""
    before, after = max(held[:first]), max(held[first:])
    numbers = {"first_mb": before / 1e6, "last_mb": held[-1] / 1e6, "most_mb": max(held) / 1e6}
    return {**{name: round(number, 1) for name, number in numbers.items()}, "growth": round(after / before - 1, 4)}


def settled(held: Sequence[int]) -> dict[str, float]:
    """MB of memory after the second prompt, after the last (the median of three) and at most from there on, and by
    which shares these two exceed the second."""
    second, last, most = held[1], median(held[-3:]), max(held[2:])
    numbers = {"second_mb": second / 1e6, "last_mb": last / 1e6, "most_mb": most / 1e6}
    shares = {"growth": round(last / second - 1, 4), "growth_at_most": round(most / second - 1, 4)}
    return {**{name: round(number, 1) for name, number in numbers.items()}, **shares}


# What is asked for ----------------------------------------------------------------------------------------------------


def _small(models: TinyModels, seed: int, size: tuple[int, int, int] = (32, 32, 5), **changes: Any) -> Graph:
    graph = base(models)
    for native in ("unet", "native"):
        del graph[native]
    width, height, length = size
    graph["empty"]["inputs"].update(width=width, height=height, length=length)
    graph["sample"] = our_sampler(**{"seed": seed, "steps": 1, **changes})
    graph["digest"] = node("FixtureDigest", value=["sample", 0])
    return graph


def _text(models: TinyModels, seed: int) -> Graph:
    """Prompt to mp4."""
    graph = _small(models, seed)
    graph["text"] = node("LightX2VLoadTextEncoder", text_encoder=models.text_encoder)
    for name, text in (("positive", f"{seed} red circles"), ("negative", "")):
        graph[name] = node("LightX2VTextEncode", encoder=["text", 0], text=text)
    graph["vae"] = node("LightX2VLoadVAE", vae_name=models.vae)
    graph["decode"] = node("LightX2VDecode", latent=["sample", 0], vae=["vae", 0])
    graph["video"] = node("CreateVideo", images=["decode", 0], fps=16.0)
    graph["save"] = node("SaveVideo", video=["video", 0], filename_prefix="load/a", format="mp4", codec="h264")
    graph["digest"] = node("FixtureDigest", value=["decode", 0])
    return graph


def _picture(models: TinyModels, seed: int) -> Graph:
    graph = _small(models, seed)
    graph["ours"]["inputs"]["original_ckpt"] = I2V_FILE
    graph["vae"] = node("LightX2VLoadVAE", vae_name=models.vae)
    graph["picture"] = node("FixturePicture", seed=seed, frames=1, height=32, width=32)
    given = {"positive": ["positive", 0], "negative": ["negative", 0], "vae": ["vae", 0], "batch_size": 1}
    size = {"width": 32, "height": 32, "length": 5}
    graph["i2v"] = node("LightX2VImageToVideo", **given, **size, start_image=["picture", 0])
    graph["sample"]["inputs"].update(positive=["i2v", 0], negative=["i2v", 1], latent=["i2v", 2])
    return graph


def _native(models: TinyModels, seed: int) -> Graph:
    """The same file in ComfyUI's own sampler."""
    graph = base(models)
    del graph["ours"]
    graph["empty"]["inputs"].update(width=32, height=32, length=5)
    graph["sample"] = native_sampler(noise_seed=seed, steps=1)
    graph["digest"] = node("FixtureDigest", value=["sample", 0])
    return graph


KINDS: Mapping[str, Callable[[TinyModels, int], Graph]] = {
    "text": _text,
    "picture": _picture,
    "native": _native,
    "plain": _small,
    "wide": lambda models, seed: _small(models, seed, (64, 32, 9), steps=2, scheduler="unipc"),
    "block": lambda models, seed: _small(models, seed, offload="block"),
    "model": lambda models, seed: _small(models, seed, offload="model", attention="reference"),
}


def mixed(server: Server, models: TinyModels, prompts: int, clients: int, seed: int = 0) -> list[list[Job]]:
    """So many prompts, dealt to clients: of each kind in turn, a quarter of them repeated; one in ten is taken back
    before it runs, one in twenty while it runs."""
    write_transformer(server.base / "models" / "diffusion_models" / I2V_FILE, I2V, seed=7)
    draw = random.Random(seed)
    jobs = []
    for index, kind in enumerate(islice(cycle(KINDS), prompts)):
        number = draw.randrange(index + 1) if index % 4 == 3 else index
        kind = list(KINDS)[number % len(KINDS)] if index % 4 == 3 else kind
        jobs.append(Job(f"{kind} {number}", KINDS[kind](models, number)))
    for index in range(7, prompts, 10):
        jobs[index] = Job(jobs[index].name, jobs[index].graph, "delete")
    for index in range(4, prompts, 20):
        jobs[index] = Job(f"stopped {index}", _small(models, 10_000 + index, steps=900), "stop")
    return [jobs[start::clients] for start in range(clients)]


def demo(index: int, save: str = "mp4") -> Graph:
    """Prompt to video by the small trained model: of another size, LoRA, strength and seed than the one before."""
    width, height, length = SIZES[index % len(SIZES)]
    wan = f"{DEMO}wan2.1_t2v/"
    graph = {
        "model": node("LightX2VLoadModel", original_ckpt=f"{wan}diffusion_pytorch_model.safetensors"),
        "text": node("LightX2VLoadTextEncoder", text_encoder=f"{wan}models_t5_umt5-xxl-enc.safetensors"),
        "vae": node("LightX2VLoadVAE", vae_name=f"{wan}Wan2.1_VAE.safetensors"),
        "positive": node(
            "LightX2VTextEncode", encoder=["text", 0], text="a red circle moves right over a navy background"
        ),
        "negative": node("LightX2VTextEncode", encoder=["text", 0], text=""),
        "empty": node("LightX2VEmptyLatent", width=width, height=height, length=length, family="wan2.1", batch_size=1),
        "sample": our_sampler(model=["model", 0], seed=index, steps=4),
        "decode": node("LightX2VDecode", latent=["sample", 0], vae=["vae", 0]),
        "digest": node("FixtureDigest", value=["decode", 0]),
        **_saved(save),
    }
    if index % 5 != 4:  # and every fifth wears none
        lora = LORAS[index % 3 % 2]
        graph["lora"] = node("LightX2VLoRA", lora_name=DEMO + lora, strength=1.0 - index / 100, expert="both")
        graph["model"]["inputs"]["lora"] = ["lora", 0]
    return graph


def _saved(save: str) -> Graph:
    if save == "webp":
        return {"save": animated(["decode", 0])}
    return {
        "video": node("CreateVideo", images=["decode", 0], fps=16.0),
        "save": node("SaveVideo", video=["video", 0], filename_prefix="load/demo", format="mp4", codec="h264"),
    }
