"""The fixture `comfy` gives ComfyUI's networks without disturbing the repository's own names."""

from __future__ import annotations

import importlib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_networks_import_on_the_cpu(comfy):
    management = importlib.import_module("comfy.model_management")
    assert str(management.get_torch_device()) == "cpu"
    for name in (
        "comfy.ldm.wan.model",
        "comfy.ldm.wan.vae",
        "comfy.text_encoders.wan",
        "comfy.latent_formats",
        "comfy.sd",
    ):
        assert Path(importlib.import_module(name).__file__).is_relative_to(Path(comfy.__path__[0]))


def test_nodes_still_means_our_folder(comfy):
    importlib.import_module("comfy.sd")
    spec = importlib.util.find_spec("nodes")
    assert spec is not None and spec.submodule_search_locations is not None, "`nodes` resolved to ComfyUI's nodes.py"
    assert Path(next(iter(spec.submodule_search_locations))).resolve() == REPOSITORY / "nodes"
