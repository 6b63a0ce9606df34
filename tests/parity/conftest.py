"""ComfyUI's own networks, imported into the test process as something to agree with."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest

from dev.comfyui import find_comfyui
from dev.launch_comfyui import admit_torchvision


@pytest.fixture(scope="session")
def comfy() -> ModuleType:
    """The package `comfy`, on the CPU. After asking for it a test may `import comfy.ldm.wan.model` and the like.

    Never import ComfyUI's top-level modules (`nodes`, `server`, `execution`, ...) in a test: here `nodes` is the pack's own folder.
    """
    root = find_comfyui()
    if root is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH, or let `python dev.py test` fetch one into .host/")
    admit_torchvision()
    # Last on the path, so that nothing at its top level shadows a module of this repository.
    if str(root) not in sys.path:
        sys.path.append(str(root))
    # Before anything else of ComfyUI is imported: comfy.model_management picks its device on import.
    importlib.import_module("comfy.cli_args").args.cpu = True
    return importlib.import_module("comfy")
