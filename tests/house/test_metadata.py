"""pyproject.toml keeps the registry's rules and says what the code really needs."""

from __future__ import annotations

import ast
import re
import sys

import pytest

from dev.environment import REPOSITORY
from pyproject import read_pyproject

# Where the name to install differs from the name to import.
DISTRIBUTION = {"PIL": "pillow"}
# Never dependencies: torch is whatever the machine has, the rest comes with ComfyUI or is probed for and optional.
NOT_DECLARED = {"torch", "triton", "lightx2v", "lightx2v_kernels"}
NOT_DECLARED |= {"comfy", "comfy_api", "comfy_execution", "folder_paths", "server", "latent_preview", "node_helpers"}


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return read_pyproject()


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~;\[ ]", line.lower(), maxsplit=1)[0] for line in requirements}


def listed(file: str) -> list[str]:
    lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def imported_at_top(source: str) -> set[str]:
    """Top-level packages that importing the module imports; what its functions import may be optional."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def imported_anywhere(source: str) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return set().union(*(imported_at_top(ast.unparse(node)) for node in nodes))


def sources() -> list[str]:
    folders = ("lightx2v", "lightx2v_kernels", "nodes")
    return [path.read_text(encoding="utf-8") for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]


def test_the_registry_accepts_the_project(pyproject):
    project, comfy = pyproject["project"], pyproject["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9._-]{0,98}", project["name"]) and "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"] == {"file": "LICENSE"} and (REPOSITORY / "LICENSE").is_file()
    assert project["urls"]["Repository"].startswith("https://")
    assert comfy["PublisherId"] and comfy["DisplayName"] == "LightX2V"
    assert comfy["requires-comfyui"] == ">=0.3.75"
    assert "web" not in comfy, "WEB_DIRECTORY already serves it; both would register its scripts twice"


def test_the_engine_states_the_same_version(pyproject):
    """ComfyUI runs the pack without installing it, so the engine cannot ask for its version and has to hold it."""
    engine = (REPOSITORY / "lightx2v" / "__init__.py").read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.*)"$', engine, re.MULTILINE) == [pyproject["project"]["version"]]


def test_requirements_txt_mirrors_the_dependencies(pyproject):
    assert listed("requirements.txt") == pyproject["project"]["dependencies"]


def test_dependencies_leave_torch_and_upper_bounds_to_the_user(pyproject):
    dependencies = pyproject["project"]["dependencies"]
    assert not names(dependencies) & {"torch", "torchvision", "torchaudio", "triton"}
    assert not [line for line in dependencies if re.search(r"[<~!]|==", line)]


def test_dependencies_are_what_the_code_imports(pyproject):
    declared = names(pyproject["project"]["dependencies"])
    ignored = NOT_DECLARED | set(sys.stdlib_module_names)

    def needed(found: set[str]) -> set[str]:
        return {DISTRIBUTION.get(name, name).lower() for name in found - ignored}

    at_top = needed(set().union(*map(imported_at_top, sources())))
    anywhere = needed(set().union(*map(imported_anywhere, sources())))
    assert at_top <= declared, f"imported but not declared: {sorted(at_top - declared)}"
    assert declared <= anywhere, f"declared but never imported: {sorted(declared - anywhere)}"


def test_imports_are_told_apart():
    source = "import a.b, c\nfrom d import e\nfrom . import f\ndef late():\n    import g\n"
    assert imported_at_top(source) == {"a", "c", "d"} and imported_anywhere(source) == {"a", "c", "d", "g"}


def test_the_development_environment_has_every_dependency(pyproject):
    assert names(pyproject["project"]["dependencies"]) <= names(listed("dev/requirements-engine.txt"))


def test_pre_commit_runs_the_ruff_of_the_tests():
    (pinned,) = (line for line in listed("dev/requirements-test.txt") if line.startswith("ruff=="))
    used = re.findall(r"ruff==[\d.]+", (REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert used and set(used) == {pinned}
