"""Imports point one way, nodes -> lightx2v -> lightx2v_kernels, and only nodes/ knows that there is a ComfyUI."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev.environment import REPOSITORY

# What each package may import of this repository; every other folder of it is out of reach.
MAY_IMPORT = {
    "nodes": {"lightx2v", "lightx2v_kernels"},
    "lightx2v": {"lightx2v", "lightx2v_kernels"},
    "lightx2v_kernels": {"lightx2v_kernels"},
}
OURS = {"nodes", "lightx2v", "lightx2v_kernels", "benchmarks", "demo", "dev", "tests", "host"}
COMFYUI = {"comfy", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras", "comfyui_version"}
COMFYUI |= {"execution", "folder_paths", "latent_preview", "main", "node_helpers", "server"}


def forbidden_imports(source: str, package: str, depth: int) -> Iterator[str]:
    """Yield what a module of `package`, `depth` folders below the package's own, must not import.

    `nodes` by that name is ComfyUI's nodes.py inside ComfyUI and our folder outside it, so nobody may say it.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            if package != "nodes":
                yield f"line {node.lineno}: relative import; the engine's own imports are absolute"
            elif node.level > depth + 1:
                yield f"line {node.lineno}: climbs out of nodes/, which makes a second copy of what it reaches"
            continue
        for name in _imported(node):
            top = name.split(".")[0]
            if top in OURS and top not in MAY_IMPORT[package]:
                yield f"line {node.lineno}: {package} must not import {name}"
            if top in COMFYUI and package != "nodes":
                yield f"line {node.lineno}: only nodes/ may import {name}"


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert files, f"{package}/ holds no Python"
    found = [
        f"{path.relative_to(REPOSITORY)} {complaint}"
        for path in files
        for complaint in forbidden_imports(
            path.read_text(encoding="utf-8"), package, len(path.relative_to(REPOSITORY / package).parts) - 1
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("package", "depth", "source"),
    [
        ("lightx2v_kernels", 0, "import lightx2v.sampling"),
        ("lightx2v_kernels", 0, "def late():\n    from lightx2v import sampling"),
        ("lightx2v", 0, "import nodes"),
        ("lightx2v", 0, "from demo.judge import judge"),
        ("lightx2v", 0, "import torch, comfy.utils"),
        ("lightx2v", 0, "import importlib\nimportlib.import_module('comfy.sd')"),
        ("lightx2v", 0, "from folder_paths import get_full_path"),
        ("lightx2v", 1, "from . import spec"),
        ("nodes", 0, "import nodes"),
        ("nodes", 0, "from ..lightx2v import sampling"),
        ("nodes", 1, "from ...lightx2v import sampling"),
        ("nodes", 0, "from dev import environment"),
    ],
)
def test_a_wrong_import_is_found(package, depth, source):
    assert list(forbidden_imports(source, package, depth))


@pytest.mark.parametrize(
    ("package", "depth", "source"),
    [
        ("nodes", 0, "import folder_paths\nfrom comfy_api.latest import io\nfrom lightx2v.config import Request"),
        ("nodes", 1, "from ..host import preview\nfrom . import load"),
        ("lightx2v", 0, "import torch\nfrom lightx2v.shapes import snap\nfrom lightx2v_kernels import select"),
        ("lightx2v_kernels", 1, "from lightx2v_kernels.registry import register"),
    ],
)
def test_a_right_import_is_left_alone(package, depth, source):
    assert not list(forbidden_imports(source, package, depth))


def _has_gluon() -> bool:
    """Triton's, since 3.4; the modules that need it are imported only where it is there."""
    return bool(importlib.util.find_spec("triton.experimental"))


def test_importing_the_engine_only_defines():
    """Every module of the engine imports without output, without ComfyUI, and leaves process-wide settings alone."""
    modules = [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for package in ("lightx2v", "lightx2v_kernels")
        for path in sorted((REPOSITORY / package).rglob("*.py"))
        if path.name != "__main__.py"
    ]
    if not _has_gluon():
        modules.remove("lightx2v_kernels.attention._hopper")
        modules.remove("lightx2v_kernels.conv3d._gluon")
    script = f"""
import importlib, os, sys, torch
def settings():
    return (
        dict(os.environ), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
        torch.initial_seed(),
        torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(),
    )
before = settings()
for name in {modules}:
    importlib.import_module(name)
assert settings() == before, [(a, b) for a, b in zip(before, settings()) if a != b]
host = sorted(name for name in sys.modules if name.split(".")[0] in {COMFYUI})
assert not host, host
"""
    line = [sys.executable, "-W", "error::DeprecationWarning:lightx2v", "-c", script]
    run = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr


def test_package_folders_are_packages():
    """A folder of modules without __init__.py would be left out of a built distribution."""
    missing = {
        str(path.parent.relative_to(REPOSITORY))
        for package in ("lightx2v", "lightx2v_kernels", "nodes")
        for path in (REPOSITORY / package).rglob("*.py")
        if not Path(path.parent, "__init__.py").exists()
    }
    assert not missing
