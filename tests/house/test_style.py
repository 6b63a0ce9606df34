"""House rules that a formatter does not keep: sizes, what the registry refuses, words that must not appear."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dev.environment import REPOSITORY

MAX_LINES = 450
# Package hosts are an affair of whoever installs; put together here so that this file does not name them either.
HOSTS = re.compile(r"\b(?:pypi|pythonhosted|npmjs|debian)\.(?:org|com)\b|\bdownload\.pytorch\.org\b")


def repository_files() -> list[Path]:
    """Every file that git tracks or would add, less those that are gone from the disk."""
    line = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    run = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout")
    return [REPOSITORY / name for name in run.stdout.split("\0") if name and (REPOSITORY / name).is_file()]


def overlong(files: list[Path], limit: int) -> dict[str, int]:
    sizes = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files if path.suffix == ".py"}
    return {name: lines for name, lines in sizes.items() if lines > limit}


def test_python_files_stay_short():
    found = overlong(repository_files(), MAX_LINES)
    assert not found, f"over {MAX_LINES} lines, split by purpose: {found}"


def test_a_long_file_is_found(tmp_path):
    (tmp_path / "long.py").write_text("x = 1\n" * 6, encoding="utf-8")
    assert overlong([tmp_path / "long.py"], 5) == {str(tmp_path / "long.py"): 6}


def test_no_package_host_is_named():
    found = []
    for path in repository_files():
        if path == Path(__file__) or b"\0" in (data := path.read_bytes()):
            continue
        found += [
            f"{path.relative_to(REPOSITORY)}: {match[0]}" for match in HOSTS.finditer(data.decode(errors="replace"))
        ]
    assert not found, found


def test_a_package_host_is_found():
    assert HOSTS.search("pip install --index-url https://py" + "pi.org/simple") and not HOSTS.search("from PyPI")


@pytest.mark.parametrize(
    ("code", "source"),
    [
        ("S102", "exec('1')\n"),
        ("S301", "import pickle\npickle.loads(b'')\n"),
        ("S307", "eval('1')\n"),
        ("S602", "import subprocess\nsubprocess.run('a', shell=True)\n"),
        ("E702", "a = 1; b = 2\n"),
        ("F821", "print(undefined_name)\n"),
    ],
)
def test_ruff_refuses(code, source):
    """With the repository's own settings, for a file of the engine."""
    line = [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", "lightx2v/probe.py", "-"]
    run = subprocess.run(line, cwd=REPOSITORY, input=source, capture_output=True, text=True)
    assert run.returncode == 1 and code in run.stdout, run.stdout + run.stderr
