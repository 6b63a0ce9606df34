"""Try the pack with another Python and another PyTorch, in an environment of its own.

    python dev.py run -m dev.compat --python python3.10 --torch 2.6.0
    python dev.py run -m dev.compat --python python3.13 --torch 2.15.0 --keep -- tests/kernels -x
    python dev.py run -m dev.compat --installs COMFYUI/requirements.txt

It installs that PyTorch and requirements.txt with the newest releases that go with them, as a user would get them, and
runs the tests that need no ComfyUI, browser or GPU. A CUDA build of PyTorch takes 5 to 6 GB of disk while it runs.
--installs asks pip what requirements.txt would change where a ComfyUI's own requirements are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dev.commands import FAST
from dev.environment import REPOSITORY

ENVIRONMENTS = REPOSITORY / ".cache" / "compat"
REQUIREMENTS = REPOSITORY / "requirements.txt"
TESTED = ("pytest", "gguf", "diffusers", "peft", "accelerate", "rich", "numpy")  # what the tests themselves import
FOLDERS = ("tests/kernels", "tests/engine", "tests/formats")


def try_pair(python: str, torch: str, tests: Sequence[str], keep: bool) -> int:
    """Install and test one pair; the exit status of pytest. keep: leave the environment for another run."""
    home = ENVIRONMENTS / f"{Path(python).name}-torch{torch}"
    inside = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    try:
        if not inside.exists():
            subprocess.run([python, "-m", "venv", str(home)], check=True)
            wanted = [f"torch=={torch}", "-r", str(REQUIREMENTS), *TESTED]
            subprocess.run([str(inside), "-m", "pip", "install", "-q", "--prefer-binary", *wanted], check=True)
        versions = "import platform, torch; print('Python', platform.python_version(), 'torch', torch.__version__)"
        subprocess.run([str(inside), "-c", versions], check=True)
        line = [str(inside), "-m", "pytest", "-q", "-m", FAST, *(tests or FOLDERS)]
        return subprocess.run(line, cwd=REPOSITORY, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    finally:
        if not keep:
            shutil.rmtree(home, ignore_errors=True)


def resolved(*files: Path) -> dict[str, str]:
    """Package -> version that pip would install for these requirements in an empty environment. Installs nothing."""
    options = ["--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    names = [word for file in files for word in ("-r", str(file))]
    line = [sys.executable, "-m", "pip", "install", *options, *names]
    told = subprocess.run(line, stdout=subprocess.PIPE, check=True).stdout
    return {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in json.loads(told)["install"]}


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What is new or another version, in words."""
    return [
        f"{name} {before.get(name, 'not there')} -> {version}"
        for name, version in sorted(after.items())
        if before.get(name) != version
    ]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python dev.py run -m dev.compat", description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="default: this one")
    parser.add_argument("--torch", metavar="VERSION")
    parser.add_argument("--keep", action="store_true", help="leave the environment in .cache/compat")
    parser.add_argument("--installs", type=Path, metavar="FILE", help="requirements.txt of a ComfyUI")
    parser.add_argument("tests", nargs="*", help=f"for pytest; default: {' '.join(FOLDERS)}")
    options = parser.parse_args(arguments)
    if options.installs:
        found = changes(resolved(options.installs), resolved(options.installs, REQUIREMENTS))
        print("\n".join(found) or "nothing changes")
        return 0
    if not options.torch:
        parser.error("give --torch VERSION, or --installs FILE")
    return try_pair(options.python, options.torch, options.tests, options.keep)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
