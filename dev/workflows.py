"""Write workflows/<name>.json, which people open, from workflows/<name>.api.json, which says what runs.

    python dev.py host                        # in another terminal: the nodes describe themselves
    python dev.py run -m dev.workflows        # --info FILE takes a saved /object_info instead of the running ComfyUI

The API file holds nodes, links, values and titles; workflows/<name>.md holds the text of the note; the nodes'
description says which inputs are sockets and which are widgets; GROUPS below says where a node goes. A widget that an
API file leaves out, because the node has got it since or it is a default, is entered there with its default.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dev.environment import REPOSITORY

WORKFLOWS = REPOSITORY / "workflows"


@dataclass(frozen=True)
class Group:
    """A column of nodes; the columns that a workflow has are numbered. width: of each node in it, pixels."""

    title: str
    width: int
    colour: str
    types: frozenset[str]


LOADERS = ("LightX2VLoadModel", "LightX2VLoadModelMoE", "LightX2VLoRA", "LightX2VLoadTextEncoder", "LightX2VLoadVAE")
IMAGE_LOADERS = ("LightX2VLoadImageEncoder",)
NATIVE_LOADERS = ("UNETLoader", "CLIPLoader", "VAELoader")
SAMPLERS = ("LightX2VEmptyLatent", "LightX2VImageToVideo", "LightX2VCache", "LightX2VParallel", "LightX2VSampler")
NATIVE_SAMPLERS = ("ModelSamplingSD3", "KSamplerAdvanced")
GROUPS = (
    Group("Load", 410, "#3f789e", frozenset({*LOADERS, *IMAGE_LOADERS, *NATIVE_LOADERS})),
    Group("Prompt", 320, "#88a", frozenset({"LightX2VTextEncode", "CLIPTextEncode"})),
    Group("Pictures", 320, "#a8a", frozenset({"LoadImage", "LightX2VImageEncode"})),
    Group("Sample", 280, "#8a8", frozenset({*SAMPLERS, *NATIVE_SAMPLERS})),
    Group("Decode and save", 340, "#a88", frozenset({"LightX2VDecode", "LightX2VReport", "CreateVideo", "SaveVideo"})),
)
NOTE_WIDTH, NOTE_HEIGHT = 350, 740
# Pixels beyond what a node's slots and widgets take: lines of text, the preview, the video's player.
EXTRA_HEIGHT = {
    "LightX2VTextEncode": 120,
    "CLIPTextEncode": 120,
    "LoadImage": 240,
    "LightX2VReport": 200,
    "LightX2VSampler": 240,
    "KSamplerAdvanced": 240,
    "SaveVideo": 360,
}

# How ComfyUI draws: the title stands above a node's position, a slot and a widget have a row each.
TITLE, SLOT, WIDGET, MARGIN = 30, 20, 24, 14
GAP = 20
# Between the nodes of a column: the page's newer way to draw ("Nodes 2.0") gives every node a row more.
BETWEEN = 60

WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
Info = Mapping[str, Mapping[str, Any]]
Api = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Input:
    """One input of a node as /object_info describes it."""

    name: str
    type: str
    optional: bool
    options: Mapping[str, Any]

    @property
    def widget(self) -> bool:
        return self.type in WIDGET_TYPES and not self.options.get("forceInput")

    @property
    def control(self) -> bool:
        """Whether the page adds a second widget, which says what becomes of a seed after a run."""
        return bool(self.options.get("control_after_generate", self.name in ("seed", "noise_seed")))

    def default(self) -> Any:
        return self.options.get("default", next(iter(self.options.get("options", ())), ""))


def inputs_of(info: Mapping[str, Any]) -> list[Input]:
    """A node's inputs in the page's order: sockets first, then widgets."""
    found = []
    for part in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(part, {}).items():
            given = dict(options[0]) if options else {}
            if isinstance(kind, list):  # an older way to say COMBO
                kind, given = "COMBO", {"options": kind, **given}
            found.append(Input(name, kind, part == "optional", given))
    return sorted(found, key=lambda entry: entry.widget)


def is_link(value: Any) -> bool:
    """[node id, output] rather than a value."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def workflow(api: Api, note: str, info: Info, pack: str) -> dict[str, Any]:
    """The workflow in the page's format (litegraph 0.4).

    note: Markdown. pack: the registry's name of this pack, by which the page offers it to those who lack it.
    Raises ValueError, naming the node, for a type that ComfyUI or GROUPS does not know and for an unknown input.
    """
    nodes = {name: _node(name, entry, info, pack) for name, entry in api.items()}
    links = _connect(api, nodes)
    groups = _arrange(nodes)
    text = {"id": max(node["id"] for node in nodes.values()) + 1, "type": "MarkdownNote", "pos": [0, TITLE]}
    text |= {"size": [NOTE_WIDTH, NOTE_HEIGHT], "flags": {}, "order": 0, "mode": 0, "inputs": [], "outputs": []}
    text |= {"title": "Read me", "properties": {}, "widgets_values": [note], "color": "#432", "bgcolor": "#653"}
    return {
        "revision": 0,
        "last_node_id": text["id"],
        "last_link_id": len(links),
        "nodes": [text, *nodes.values()],
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _node(name: str, entry: Mapping[str, Any], info: Info, pack: str) -> dict[str, Any]:
    kind, given = entry["class_type"], entry["inputs"]
    if kind not in info:
        raise ValueError(f"node {name}: ComfyUI has no node '{kind}'; start one that has it, or correct the type")
    described = inputs_of(info[kind])
    if unknown := set(given) - {entry.name for entry in described}:
        raise ValueError(f"node {name} ({kind}) has no input {', '.join(sorted(unknown))}")
    values: list[Any] = []
    for part in (part for part in described if part.widget):
        value = given.get(part.name, part.default())
        values += [part.default() if is_link(value) else value, *(["fixed"] if part.control else [])]
    ours = info[kind]["python_module"].startswith("custom_nodes.")
    outputs = zip(info[kind]["output_name"], info[kind]["output"], strict=True)
    return {
        "id": int(name),
        "type": kind,
        "pos": [0, 0],
        "size": [0, 0],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [_socket(part) for part in described],
        "outputs": [{"name": label, "type": output, "links": []} for label, output in outputs],
        "title": entry["_meta"]["title"],
        "properties": {"Node name for S&R": kind, "cnr_id": pack if ours else "comfy-core"},
        "widgets_values": values,
    }


def _socket(part: Input) -> dict[str, Any]:
    optional = {"shape": 7} if part.optional else {}
    widget = {"widget": {"name": part.name}} if part.widget else {}
    return {"name": part.name, "type": part.type, "link": None, **optional, **widget}


def _connect(api: Api, nodes: Mapping[str, dict[str, Any]]) -> list[list[Any]]:
    """Enter every link at both of its ends; returns the list of them."""
    links: list[list[Any]] = []
    for name, target in nodes.items():
        for slot, socket in enumerate(target["inputs"]):
            value = api[name]["inputs"].get(socket["name"])
            if is_link(value):
                source, output = nodes[value[0]], value[1]
                socket["link"] = len(links) + 1
                source["outputs"][output]["links"].append(socket["link"])
                kind = source["outputs"][output]["type"]
                links.append([socket["link"], source["id"], output, target["id"], slot, kind])
    for order, node in enumerate(nodes.values(), start=1):
        node["order"] = order
    return links


def _height(node: Mapping[str, Any]) -> int:
    slots = max(sum("widget" not in socket for socket in node["inputs"]), len(node["outputs"]))
    widgets = len(node["widgets_values"])
    return SLOT * slots + (WIDGET * widgets + MARGIN if widgets else 6) + EXTRA_HEIGHT.get(node["type"], 0)


def _arrange(nodes: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Place every node in its group's column, right of the note; returns the groups that are not empty."""
    if lost := {node["type"] for node in nodes.values()} - frozenset().union(*(group.types for group in GROUPS)):
        raise ValueError(f"{', '.join(sorted(lost))}: in no group of dev/workflows.py; add it to GROUPS")
    groups: list[dict[str, Any]] = []
    left = NOTE_WIDTH + 2 * GAP
    for group in GROUPS:
        members = [node for node in nodes.values() if node["type"] in group.types]
        if not members:
            continue
        below = 0
        for node in members:
            node["pos"] = [left + GAP, below + TITLE]
            node["size"] = [group.width, _height(node)]
            below += TITLE + node["size"][1] + BETWEEN
        box = [left, -2 * TITLE, group.width + 2 * GAP, below - BETWEEN + 2 * TITLE + 2 * GAP]
        title = f"{len(groups) + 1} {group.title}"
        groups.append({"title": title, "bounding": box, "color": group.colour, "font_size": 24, "flags": {}})
        left += box[2] + GAP
    tallest = max(group["bounding"][3] for group in groups)
    return [{**group, "bounding": [*group["bounding"][:3], tallest]} for group in groups]


def complete(api: Api, info: Info) -> dict[str, Any]:
    """The API file with every widget of its nodes, in the page's order; what was left out has its default."""
    full = {}
    for name, entry in api.items():
        given = dict(entry["inputs"])
        for part in inputs_of(info.get(entry["class_type"], {"input": {}})):
            if part.widget:
                given.setdefault(part.name, part.default())
        full[name] = {**entry, "inputs": given}
    return full


def api_text(api: Api) -> str:
    """JSON with a line for each value, link and title."""
    text = json.dumps(api, indent=2, ensure_ascii=False)
    link = re.sub(r'\[\s+("[^"\n]*"),\s+(\d+)\s+\]', r"[\1, \2]", text)
    return re.sub(r'\{\s+("title": "(?:[^"\\]|\\.)*")\s+\}', r"{\1}", link) + "\n"


def write(name: str, info: Info, folder: Path = WORKFLOWS) -> Path:
    """Write folder/<name>.json from the two files beside it, of which the API file is completed if it lacks widgets."""
    source = folder / f"{name}.api.json"
    given = json.loads(source.read_text(encoding="utf-8"))
    note = (folder / f"{name}.md").read_text(encoding="utf-8").strip()
    pyproject = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    (pack,) = re.findall(r'^name = "(.+)"$', pyproject, re.MULTILINE)
    api = complete(given, info)
    page = json.dumps(workflow(api, note, info, pack), indent=1, ensure_ascii=False) + "\n"
    if api != given:
        _replace(source, api_text(api))
    return _replace(folder / f"{name}.json", page)


def _replace(path: Path, text: str) -> Path:
    fresh = path.with_suffix(".tmp")
    fresh.write_text(text, encoding="utf-8")
    return fresh.replace(path)


def add_source(parser: argparse.ArgumentParser) -> None:
    """The arguments that `read_info` reads."""
    parser.add_argument("--url", default="http://127.0.0.1:8188", help="a running ComfyUI (default: %(default)s)")
    parser.add_argument("--info", type=Path, help="a saved answer of its /object_info, used instead")


def read_info(options: argparse.Namespace) -> Info:
    """The nodes' description; SystemExit with what to do if nobody answers."""
    try:
        if options.info:
            return json.loads(options.info.read_text(encoding="utf-8"))
        with urllib.request.urlopen(f"{options.url}/object_info", timeout=60) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        source = options.info or options.url
        raise SystemExit(f"{source}: {error}; `python dev.py host` starts a ComfyUI to ask") from error


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python dev.py run -m dev.workflows", description=__doc__.splitlines()[0])
    add_source(parser)
    info = read_info(parser.parse_args(arguments))
    try:
        for path in sorted(WORKFLOWS.glob("*.api.json")):
            print(write(path.name.removesuffix(".api.json"), info))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
