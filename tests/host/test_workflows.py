"""Every workflow that comes with the pack: what people open says the same as what the API queue runs, and it runs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from torch import Tensor

from dev.comfyui import PICTURES
from dev.environment import REPOSITORY
from dev.workflows import api_text, complete, workflow, write
from host.shipped import FOLDER, JUDGED, NAMES, PICTURED, likeness, mistaken, read
from host.stand_ins import STAND_INS, runnable, write_stand_ins

NOTES = ("Note", "MarkdownNote")
# What the page puts after a seed; no input of the node.
SEEDS, AFTER_A_RUN = ("seed", "noise_seed"), ("fixed", "increment", "decrement", "randomize")

every_workflow = pytest.mark.parametrize("name", NAMES)


def as_api(page: dict[str, Any]) -> dict[str, Any]:
    """What the page would queue: each node's type and title, its links and its widgets' values."""
    links = {link[0]: link for link in page["links"]}
    assert len(links) == len(page["links"])
    graph = {}
    for node in page["nodes"]:
        if node["type"] in NOTES:
            continue
        values, inputs = iter(node["widgets_values"]), {}
        for slot, socket in enumerate(node["inputs"]):
            if "widget" in socket:
                inputs[socket["name"]] = next(values)
                if socket["name"] in SEEDS:
                    assert next(values) in AFTER_A_RUN
            if socket["link"] is not None:
                _, source, output, target, target_slot, kind = links.pop(socket["link"])
                assert (target, target_slot, kind) == (node["id"], slot, socket["type"])
                inputs[socket["name"]] = [str(source), output]
        assert not list(values), f"{node['title']} has more values than widgets"
        graph[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": node["title"]},
        }
    assert not links, "links that lead nowhere"
    return graph


def test_there_are_workflows() -> None:
    assert "wan_t2v" in NAMES
    opened = {path.stem for path in FOLDER.glob("*.json") if not path.name.endswith(".api.json")}
    assert opened == set(NAMES) == {path.stem for path in FOLDER.glob("*.md")}


def test_every_workflow_is_listed_and_shown() -> None:
    document = (REPOSITORY / "docs" / "workflows.md").read_text("utf-8")
    shown = re.findall(r"^!\[.+\]\(images/workflows/(\w+)\.webp\)$", document, re.M)
    assert sorted(shown) == NAMES
    assert all((REPOSITORY / "docs" / f"images/workflows/{name}.webp").stat().st_size < 60_000 for name in shown)
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (yes|no)\b", document, re.M)
    assert dict(rows) == {name: "no" if name in STAND_INS else "yes" for name in NAMES}


@every_workflow
def test_both_formats_say_the_same(name: str) -> None:
    page, api = read(name)
    assert page["version"] == 0.4
    assert as_api(page) == api
    outgoing = {link for node in page["nodes"] for output in node["outputs"] for link in output["links"]}
    assert outgoing == {link[0] for link in page["links"]}
    assert page["last_node_id"] == max(node["id"] for node in page["nodes"])
    assert page["last_link_id"] == max(link[0] for link in page["links"])


@every_workflow
def test_nodes_are_titled_grouped_and_apart(name: str) -> None:
    page, _ = read(name)
    titles = [node["title"] for node in page["nodes"]]
    assert all(titles) and len(set(titles)) == len(titles)
    boxes = {node["title"]: (*node["pos"], *node["size"]) for node in page["nodes"]}
    # The title bar stands 30 pixels above the position.
    boxes = {title: (x, y - 30, width, height + 30) for title, (x, y, width, height) in boxes.items()}
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        apart = any(a[i] + a[i + 2] <= b[i] or b[i] + b[i + 2] <= a[i] for i in (0, 1))
        assert apart, f"{one} and {other} overlap"
    notes = [node for node in page["nodes"] if node["type"] in NOTES]
    assert notes and all(len(note["widgets_values"][0]) > 100 for note in notes)
    for node in page["nodes"]:
        x, y, width, height = boxes[node["title"]]
        holders = [
            group["title"]
            for group in page["groups"]
            for left, top, wide, high in [group["bounding"]]
            if left <= x and top <= y and x + width <= left + wide and y + height <= top + high
        ]
        assert len(holders) == (node["type"] not in NOTES), f"{node['title']} is in {holders}"


@pytest.mark.host
@every_workflow
def test_it_is_up_to_date(host, name: str, tmp_path: Path) -> None:
    """`python dev.py run -m dev.workflows` would write the same again, as far as this pack's own nodes go."""
    for end in (".api.json", ".md"):
        (tmp_path / f"{name}{end}").write_bytes((FOLDER / f"{name}{end}").read_bytes())
    fresh = json.loads(write(name, host.get("/object_info"), tmp_path).read_text(encoding="utf-8"))
    page, api = read(name)
    completed = json.loads((tmp_path / f"{name}.api.json").read_text(encoding="utf-8"))
    assert completed.keys() == api.keys()

    # A newer host's own nodes have inputs that the oldest one does not.
    for key, node in api.items():
        assert not node["class_type"].startswith("LightX2V") or completed[key] == node

    def ours(workflow: dict[str, Any]) -> list[dict[str, Any]]:
        mine = [node for node in workflow["nodes"] if node["type"].startswith("LightX2V") or node["type"] in NOTES]
        return [{**node, "pos": None} for node in mine]  # which those inputs move

    assert ours(fresh) == ours(page)


@pytest.fixture(scope="module")
def videos(host, tiny_models) -> Callable[[str], Tensor]:
    """workflow's name -> what it saved, (F, H, W, 3) uint8; every workflow runs once."""
    write_stand_ins(host.base / "models")

    @cache
    def run(name: str) -> Tensor:
        api = runnable(name, read(name)[1])
        (saved,) = (key for key, node in api.items() if node["class_type"] == "SaveVideo")
        (path,) = host.run(api).expect().files(saved, host.base)
        assert path.suffix == ".mp4"
        with av.open(str(path)) as video:
            return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in video.decode(video=0)])

    return run


@pytest.mark.host
@every_workflow
def test_it_runs_and_saves_its_video(videos, name: str) -> None:
    sizes = {
        tuple(node["inputs"][field] for field in ("length", "height", "width"))
        for node in runnable(name, read(name)[1]).values()
        if "length" in node["inputs"]
    }
    frames = videos(name)
    assert {tuple(frames.shape[:3])} == sizes
    assert frames.float().std() > 1 and (frames[0] != frames[-1]).any(), "a blank or frozen picture"


@pytest.mark.host
@pytest.mark.parametrize("name", JUDGED)
def test_it_shows_what_its_prompt_asks_for(videos, name: str) -> None:
    """The small models are what a workflow comes with, so the video that people see first must be right."""
    assert not mistaken(name, videos(name) / 255)


@pytest.mark.host
@pytest.mark.parametrize(("name", "place", "picture", "decibels"), PICTURED)
def test_it_starts_and_ends_on_its_pictures(videos, name: str, place: int, picture: str, decibels: float) -> None:
    assert likeness(videos(name) / 255, place, picture) > decibels


def test_every_picture_is_there_and_small() -> None:
    shown = {
        node["inputs"]["image"]
        for name in NAMES
        for node in read(name)[1].values()
        if node["class_type"] == "LoadImage"
    }
    assert shown == {path.name for path in PICTURES.iterdir()}
    assert all(path.stat().st_size < 20_000 for path in PICTURES.iterdir())


@pytest.fixture
def described() -> dict[str, Any]:
    """/object_info of three nodes: a loader, a sampler with a seed, and one that saves."""
    return {
        "LightX2VLoadModel": {
            "input": {"required": {"file": [["a", "b"], {}]}},
            "output": ["M"],
            "output_name": ["model"],
            "python_module": "custom_nodes.pack",
        },
        "LightX2VSampler": {
            "input": {
                "required": {
                    "seed": ["INT", {"default": 7, "control_after_generate": True}],
                    "model": ["M", {}],
                    "cfg": ["FLOAT", {"default": 5.0}],
                },
                "optional": {"mode": ["COMBO", {"options": ["x", "y"]}], "extra": ["M", {}]},
            },
            "output": ["V"],
            "output_name": ["video"],
            "python_module": "custom_nodes.pack",
        },
        "SaveVideo": {
            "input": {"required": {"video": ["V", {}], "width": ["INT", {"default": 3}]}},
            "output": [],
            "output_name": [],
            "python_module": "comfy_extras.nodes_video",
        },
    }


def graph() -> dict[str, Any]:
    return {
        "1": {"class_type": "LightX2VLoadModel", "inputs": {"file": "b"}, "_meta": {"title": "one"}},
        "2": {"class_type": "LightX2VSampler", "inputs": {"model": ["1", 0], "cfg": 2.0}, "_meta": {"title": "two"}},
        "5": {"class_type": "SaveVideo", "inputs": {"video": ["2", 0], "width": ["1", 0]}, "_meta": {"title": "three"}},
    }


def test_sockets_come_before_widgets_and_seeds_have_two(described) -> None:
    page = workflow(graph(), "a note", described, "pack-name")
    note, load, sample, save = page["nodes"]
    assert note["type"] == "MarkdownNote" and note["widgets_values"] == ["a note"] and note["id"] == 6
    assert [socket["name"] for socket in sample["inputs"]] == ["model", "extra", "seed", "cfg", "mode"]
    assert sample["widgets_values"] == [7, "fixed", 2.0, "x"]
    assert load["widgets_values"] == ["b"] and load["outputs"][0]["links"] == [1, 3]
    assert page["links"] == [[1, 1, 0, 2, 0, "M"], [2, 2, 0, 5, 0, "V"], [3, 1, 0, 5, 1, "M"]]
    assert save["widgets_values"] == [3], "a widget that a link replaces keeps a value of its own"
    assert [node["properties"].get("cnr_id") for node in page["nodes"]] == [
        None,
        "pack-name",
        "pack-name",
        "comfy-core",
    ]


def test_what_no_node_knows_is_named(described) -> None:
    wrong_type, wrong_input, no_group = graph(), graph(), graph()
    wrong_type["1"]["class_type"] = "Nobody"
    wrong_input["2"]["inputs"]["cgf"] = 1
    described["Elsewhere"] = described["LightX2VLoadModel"]
    no_group["1"]["class_type"] = "Elsewhere"
    for api, words in ((wrong_type, "Nobody"), (wrong_input, "cgf"), (no_group, "Elsewhere: in no group")):
        with pytest.raises(ValueError, match=words):
            workflow(api, "a note", described, "pack-name")


def test_what_an_api_file_leaves_out_has_its_default(described) -> None:
    full = complete(graph(), described)
    assert full["2"]["inputs"] == {"model": ["1", 0], "cfg": 2.0, "seed": 7, "mode": "x"}
    assert full["5"]["inputs"] == graph()["5"]["inputs"], "a link stays"
    text = api_text(full)
    assert json.loads(text) == full
    assert '      "model": ["1", 0],\n' in text and '    "_meta": {"title": "two"}\n' in text
