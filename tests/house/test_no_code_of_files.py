"""Nothing that a file says is run: no eval, no pickle, no shell, and PyTorch's own files without code."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from dev.environment import REPOSITORY

ENGINE = ("lightx2v", "lightx2v_kernels", "nodes")
MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "pty"}
# Messages between this package's own processes, over a pipe that no other has.
OWN_PIPES = {"lightx2v/parallel/jobs.py: pickle"}
CALLS = {"eval", "exec", "compile", "__import__", "execfile", "input"}


def runs_code(source: str) -> Iterator[str]:
    """What of it can run what a file says, with the line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"{alias.name.split('.')[0]}, line {node.lineno}" for alias in node.names if _bad(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module and _bad(node.module):
            yield f"{node.module.split('.')[0]}, line {node.lineno}"
        elif isinstance(node, ast.Call):
            if said := _called(node):
                yield f"{said}, line {node.lineno}"


def _bad(module: str) -> bool:
    return module.split(".")[0] in MODULES


def _called(node: ast.Call) -> str:
    options = {keyword.arg: keyword.value for keyword in node.keywords}
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    whole = _dotted(node.func)
    if name in CALLS or whole in ("os.system", "os.popen", "builtins.eval", "builtins.exec"):
        return whole
    if whole in ("torch.load", "load_state_dict_from_file") and not _is(options.get("weights_only"), True):
        return f"{whole} without weights_only=True"
    for option in ("shell", "allow_pickle", "trust_remote_code"):
        if option in options and not _is(options[option], False):
            return f"{option} in {whole}"
    return f"{whole}, which runs the model's own code" if whole in ("torch.jit.load", "torch.hub.load") else ""


def _dotted(node: ast.expr) -> str:
    """ "torch.jit.load" of what is called by a path of names."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_the_engine_runs_nothing_that_a_file_says() -> None:
    found = []
    for path in sorted(path for package in ENGINE for path in (REPOSITORY / package).rglob("*.py")):
        name = path.relative_to(REPOSITORY).as_posix()
        found += [f"{name}: {what}" for what in runs_code(path.read_text(encoding="utf-8"))]
    assert {each.partition(",")[0] for each in found} == OWN_PIPES, found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def late():\n    from pickle import loads",
        "import yaml, json",
        "eval('1')",
        "x = __import__(name)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "torch.jit.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=trust)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
    ],
)
def test_what_would_run_code_is_found(source: str) -> None:
    assert list(runs_code(source))


@pytest.mark.parametrize(
    "source",
    ["network.eval()", "re.compile('a')", "torch.compile(f)", "torch.load(p, weights_only=True)", "import json, math"],
)
def test_what_does_not_is_not(source: str) -> None:
    assert not list(runs_code(source))
