"""The pack's own __init__.py, loaded as ComfyUI loads it: under a name made of its path, with no folder on sys.path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dev.environment import REPOSITORY

LOAD = """
import importlib.util, sys
def load(path):
    name = path.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, path + "/__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""


@pytest.fixture
def pack(tmp_path) -> Path:
    """The real __init__.py over an engine and nodes of a few words."""
    return make_pack(tmp_path / "custom_nodes" / "ComfyUI-LightX2V")


def make_pack(home: Path) -> Path:
    files = {
        "lightx2v_kernels/__init__.py": "",
        "lightx2v_kernels/registry.py": "BACKENDS = {}",
        "lightx2v/__init__.py": "from lightx2v.sampling import sample",
        "lightx2v/sampling.py": "from lightx2v_kernels.registry import BACKENDS as sample",
        "nodes/__init__.py": "from .load import comfy_entrypoint",
        "nodes/load.py": "import lightx2v\nasync def comfy_entrypoint(): return lightx2v",
    }
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text, encoding="utf-8")
    shutil.copy(REPOSITORY / "__init__.py", home)
    return home


def run(script: str, cwd: Path) -> str:
    """Run `script` after LOAD in a fresh Python whose folder is `cwd`; returns what it printed, errors last."""
    line = [sys.executable, "-c", LOAD + textwrap.dedent(script)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, env=environment)
    return done.stdout + "".join(done.stderr.splitlines(keepends=True)[-1:])


def test_exposes_two_names_and_nothing_else(pack, tmp_path):
    (tmp_path / "nodes.py").write_text("COMFYUI = True", encoding="utf-8")
    script = f"""
    before, path = set(sys.modules), list(sys.path)
    module = load({str(pack)!r})
    import lightx2v, lightx2v_kernels.registry, nodes
    assert nodes.COMFYUI and sys.path == path
    assert lightx2v.sample is lightx2v_kernels.registry.BACKENDS
    new = {{name.split(".")[0] for name in set(sys.modules) - before if "ComfyUI-LightX2V" not in name}}
    assert {{"lightx2v", "lightx2v_kernels"}} <= new and not {{"tests", "dev", "demo"}} & new, new
    print(module.WEB_DIRECTORY, module.comfy_entrypoint.__name__)
    """
    assert run(script, tmp_path) == "./web comfy_entrypoint\n"


def test_the_same_copy_may_load_twice(pack, tmp_path):
    other = tmp_path / "linked"
    other.symlink_to(pack, target_is_directory=True)
    script = f"""
    load({str(pack)!r})
    import lightx2v
    load({str(other)!r})
    print(sys.modules["lightx2v"] is lightx2v)
    """
    assert run(script, tmp_path) == "True\n"


def test_an_installed_copy_of_this_very_folder_is_used(pack, tmp_path):
    script = f"""
    sys.path.append({str(pack)!r})
    load({str(pack)!r})
    import lightx2v
    print(lightx2v.__file__)
    """
    assert Path(run(script, tmp_path).strip()) == pack / "lightx2v" / "__init__.py"


@pytest.mark.parametrize("already_imported", [False, True])
def test_another_copy_is_named(pack, tmp_path, already_imported):
    installed = tmp_path / "site-packages"
    (installed / "lightx2v").mkdir(parents=True)
    (installed / "lightx2v" / "__init__.py").touch()
    script = f"""
    sys.path.append({str(installed)!r})
    if {already_imported}:
        import lightx2v
    load({str(pack)!r})
    """
    told = run(script, tmp_path)
    assert told.startswith("ImportError: 'lightx2v' is already provided by ") and str(installed) in told
    assert "pip uninstall lightx2v" in told and str(pack) in told


def test_a_second_clone_is_named(pack, tmp_path):
    second = make_pack(tmp_path / "custom_nodes" / "second")
    told = run(f"load({str(pack)!r})\nload({str(second)!r})", tmp_path)
    assert told.startswith("ImportError: 'lightx2v_kernels' is already provided by ") and str(second) in told


def test_a_plain_folder_of_that_name_does_not_count(pack, tmp_path):
    (tmp_path / "lightx2v").mkdir()
    script = f"""
    load({str(pack)!r})
    import lightx2v
    print(lightx2v.__file__)
    """
    assert Path(run(script, tmp_path).strip()) == pack / "lightx2v" / "__init__.py"


def test_an_engine_that_fails_leaves_no_trace(pack, tmp_path):
    (pack / "lightx2v" / "sampling.py").write_text("raise RuntimeError('no torch')", encoding="utf-8")
    script = f"""
    try:
        load({str(pack)!r})
    except RuntimeError as error:
        print(error, "lightx2v" in sys.modules)
    """
    assert run(script, tmp_path) == "no torch False\n"


def test_a_missing_engine_is_named(pack, tmp_path):
    shutil.rmtree(pack / "lightx2v")
    told = run(f"load({str(pack)!r})", tmp_path)
    assert str(pack / "lightx2v") in told and "install the node pack again" in told
