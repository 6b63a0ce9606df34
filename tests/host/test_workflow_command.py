"""`lightx2v workflow` against a real ComfyUI: a graph that saves, and what the server refuses, in its own words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from dev.environment import REPOSITORY
from lightx2v.__main__ import main
from stub_comfyui import StubComfyUI

if TYPE_CHECKING:
    from host.server import Server

SAVED: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 16, "batch_size": 2, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "lightx2v/blue"}},
}
LOADED = {"class_type": "UNETLoader", "inputs": {"unet_name": "gone.safetensors", "weight_dtype": "default"}}
SAMPLED = {"class_type": "ModelSave", "inputs": {"model": ["3", 0], "filename_prefix": "x"}}


@pytest.mark.host
def test_a_real_server(host: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph, folder = tmp_path / "graph.api.json", tmp_path / "pictures"
    line = ["workflow", str(graph), "--server", host.url, "--output", str(folder)]
    graph.write_text(json.dumps(SAVED), encoding="utf-8")
    assert main(line) == 0
    fetched = [Path(text) for text in capsys.readouterr().out.split()]
    assert len(fetched) == 2 and all(path.parent == folder for path in fetched)
    with Image.open(fetched[0]) as picture:
        assert picture.size == (32, 16) and picture.convert("RGB").getpixel((0, 0)) == (0, 0, 255)
    graph.write_text(json.dumps({"3": LOADED, "4": SAMPLED}), encoding="utf-8")
    assert main(line) == 1
    assert "node 3 (UNETLoader): unet_name='gone.safetensors' is not on the server" in capsys.readouterr().err
    graph.write_text(json.dumps({**SAVED, "5": {"class_type": "NoSuchNode", "inputs": {}}}), encoding="utf-8")
    assert main(line) == 1
    said = capsys.readouterr().err
    assert "NoSuchNode" in said and "install the nodes that it names" in said


@pytest.mark.host
def test_what_a_dying_server_had_a_real_one_makes(host: Server, tmp_path: Path) -> None:
    """examples/queue_many_servers.py as people start it; the other server dies while it makes its first job."""
    stub = StubComfyUI(polls=1000)
    stub.on_ask = lambda path: stub.kill() if path == "/queue" else None
    graphs = []
    for name, colour in (("red", 0xFF0000), ("green", 0x00FF00), ("blue", 0x0000FF)):
        picture = {"class_type": "EmptyImage", "inputs": {**SAVED["1"]["inputs"], "color": colour, "batch_size": 1}}
        saved = {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "many/clip"}}
        graphs.append(tmp_path / f"{name}.api.json")
        graphs[-1].write_text(json.dumps({"1": saved, "2": picture}), encoding="utf-8")
    line = [sys.executable, "examples/queue_many_servers.py", "--servers", stub.url, host.url, "--patience", "1"]
    line += ["--output", str(tmp_path / "clips"), "--", *map(str, graphs)]
    done = subprocess.run(line, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True)
    assert done.returncode == 0 and "3 of 3 made" in done.stdout, done.stderr
    assert stub.dead and "cannot be reached" in done.stderr
    colours = {}
    for job in json.loads((tmp_path / "clips/summary.json").read_text(encoding="utf-8")):
        with Image.open(job["files"][0]) as picture:
            colours[job["job"]] = picture.convert("RGB").getpixel((0, 0))
        assert job["server"] == host.url
    assert colours == {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
