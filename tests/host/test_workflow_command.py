"""`lightx2v workflow` against a real ComfyUI: a graph that saves, and what the server refuses, in its own words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from lightx2v.__main__ import main

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
