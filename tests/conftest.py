"""What every test gets, and the two ways to a real ComfyUI: its networks in this process, or a server beside it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch

from dev.comfyui import PACK_NAME, demo_models, find_comfyui
from dev.environment import REPOSITORY
from dev.launch_comfyui import admit_torchvision

# Triton reads this when it is first imported, by whichever test: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What a server needs is imported with the first server: the kernels' tests run on machines that have none of it.
if TYPE_CHECKING:
    from host.server import Server
    from host.tiny_models import TinyModels

NO_COMFYUI = "no ComfyUI: set COMFYUI_PATH, or let `python dev.py test` fetch one into .host/"


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seed torch, and fill what torch.empty returns with NaN, so that an output left unwritten fails its test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def comfy() -> ModuleType:
    """ComfyUI's package `comfy`, on the CPU. After asking for it a test may `import comfy.ldm.wan.model` and the like.

    Never import ComfyUI's top-level modules (`nodes`, `server`, ...) in a test: here `nodes` is the pack's own folder.
    """
    root = find_comfyui()
    if root is None:
        pytest.skip(NO_COMFYUI)
    admit_torchvision()
    # Last on the path, so that nothing at its top level shadows a module of this repository.
    if str(root) not in sys.path:
        sys.path.append(str(root))
    # Before anything else of ComfyUI is imported: comfy.model_management picks its device on import.
    importlib.import_module("comfy.cli_args").args.cpu = True
    return importlib.import_module("comfy")


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running ComfyUI with this pack, the tests' own nodes and the demo models; one for all tests.

    On the CPU, unless LIGHTX2V_HOST_FLAGS holds other arguments for it, such as "--force-fp32 --fp32-vae" on a GPU.
    """
    root = find_comfyui()
    if root is None:
        pytest.skip(NO_COMFYUI)
    from host.server import start

    packs = {PACK_NAME: REPOSITORY, "fixture_pack": Path(__file__).parent / "host" / "fixture_pack"}
    flags = os.environ.get("LIGHTX2V_HOST_FLAGS", "--cpu").split()
    with start(root, tmp_path_factory.mktemp("comfyui"), packs, demo_models(), extra=flags, cpu=False) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_models(host: Server) -> TinyModels:
    """A Wan transformer, VAE and umT5 of random weights, a few MB in all, put where `host` finds them."""
    from host.tiny_models import write_tiny_models

    return write_tiny_models(host.base / "models")
