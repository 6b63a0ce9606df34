"""The workflows that come with the pack, and whether a video of one is what its prompt and pictures ask for."""

from __future__ import annotations

import json
from typing import Any

from einops import rearrange
from torch import Tensor

from demo.grammar import parse
from demo.judge import describe, judge, score
from dev.comfyui import PICTURES
from dev.environment import REPOSITORY
from host.graphs import animated, node
from host.stand_ins import STAND_INS, Api
from lightx2v.media import read_image

FOLDER = REPOSITORY / "workflows"
NAMES = sorted(path.name.removesuffix(".api.json") for path in FOLDER.glob("*.api.json"))
JUDGED = [name for name in NAMES if name not in STAND_INS or STAND_INS[name].judged]
# Workflow, frame, the picture that it starts or ends on, and the least decibels between the two.
PICTURED = [
    ("wan_i2v", 0, "lightx2v_start.png", 30),
    ("wan_flf2v", 0, "lightx2v_start.png", 30),
    ("wan_flf2v", -1, "lightx2v_end.png", 27),
]


def read(name: str) -> tuple[dict[str, Any], Api]:
    """The page's format and the API's."""
    page, api = (json.loads((FOLDER / f"{name}{end}").read_text(encoding="utf-8")) for end in (".json", ".api.json"))
    return page, api


def the_prompt(api: Api) -> str:
    """The one text that reaches the positive input of every sampler."""
    texts = set()
    for each in api.values():
        if "positive" in each["inputs"]:
            source = api[each["inputs"]["positive"][0]]
            while "positive" in source["inputs"]:
                source = api[source["inputs"]["positive"][0]]
            texts.add(source["inputs"]["text"])
    (text,) = texts
    return text


def mistaken(name: str, frames: Tensor) -> str:
    """What the judge sees instead of what the workflow's prompt asks for; "" if that is there. frames: (F, H, W, 3) in
    0..1."""
    asked = parse(the_prompt(read(name)[1]))
    found = judge(rearrange(frames.float() * 2 - 1, "t h w c -> 1 c t h w"))
    (right,) = score(found, [asked]).everything.tolist()
    return "" if right else f"asked for {asked}, the judge saw {describe(found, 0)}"


def likeness(frames: Tensor, place: int, picture: str) -> float:
    """PSNR of one frame against a picture of workflows/images, in dB. frames: (F, H, W, 3) in 0..1."""
    error = (frames[place].float() - read_image(PICTURES / picture)[0]).square().mean()
    return float(-10 * error.log10())


def kept(api: Api) -> Api:
    """The graph, with an animated WebP in place of its mp4, and its frames carried out by the node `frames`."""
    graph = {key: each for key, each in api.items() if each["class_type"] not in ("CreateVideo", "SaveVideo")}
    (video,) = (each["inputs"] for each in api.values() if each["class_type"] == "CreateVideo")
    keep = node("FixtureKeep", value=video["images"])
    return {**graph, "save": animated(video["images"], video["fps"]), "frames": keep}
