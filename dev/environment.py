"""The virtual environment in .venv, made and filled in layers the first time a command needs them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LISTS = Path(__file__).resolve().parent

_NETWORK_WORDS = ("NewConnectionError", "ConnectTimeout", "NameResolutionError", "Max retries exceeded", "ProxyError")


# Python packages that only ComfyUI sees: its launcher adds this folder to the path, nothing else does.
HOST_PACKAGES = REPOSITORY / ".host" / "packages"


@dataclass(frozen=True)
class Layer:
    """Packages that go in together.

    content: for whom and how much, told while it installs.
    folder: where to put them, without what they say they depend on; None is the environment itself.
    """

    name: str
    content: str
    requirements: str
    folder: Path | None = None

    def stamp(self) -> str:
        """Changes whenever the list, or the Python it is for, changes."""
        return hashlib.sha256((LISTS / self.requirements).read_bytes() + sys.version.encode()).hexdigest()


ENGINE = Layer("engine", "torch and what the engine needs", "requirements-engine.txt")
HOST = Layer("host", "what ComfyUI needs", "requirements-host.txt")
# Not in the environment, where transformers would find a torchvision that it cannot import beside a CPU build of torch.
PAGE = Layer("page", "ComfyUI's page, torchvision, torchaudio", "requirements-host-nodeps.txt", HOST_PACKAGES)
TEST = Layer("test", "pytest, ruff, mypy and libraries to compare with", "requirements-test.txt")


def prepare(*layers: Layer) -> Path:
    """Return the environment's Python, after installing those `layers` that are missing or out of date."""
    home = Path(os.environ.get("LIGHTX2V_VENV") or REPOSITORY / ".venv").resolve()
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        _make(home)
    for layer in layers:
        record = (layer.folder or home) / f"lightx2v-{layer.name}.stamp"
        if not record.exists() or record.read_text(encoding="utf-8") != layer.stamp():
            _install(python, layer)
            record.write_text(layer.stamp(), encoding="utf-8")
    return python


def _make(home: Path) -> None:
    if home.exists() and any(home.iterdir()) and not (home / "pyvenv.cfg").exists():
        raise SystemExit(
            f"{home} is not a virtual environment and not empty: remove it, or set LIGHTX2V_VENV elsewhere"
        )
    print(f"Making a virtual environment in {home} ...", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], capture_output=True, text=True)
    if made.returncode:
        # What is left of it has no pip, and would be taken for an environment next time.
        shutil.rmtree(home, ignore_errors=True)
        print(made.stdout + made.stderr, file=sys.stderr)
        version = f"python3.{sys.version_info.minor}"
        raise SystemExit(
            f"{sys.executable} could not make a virtual environment. On Debian and Ubuntu run "
            f"`apt-get install {version}-venv`; elsewhere use a Python that has the modules venv and ensurepip."
        )


def _install(python: Path, layer: Layer) -> None:
    print(f"Installing {layer.name}: {layer.content} (only this once) ...", flush=True)
    start = time.monotonic()
    into: tuple[str, ...] = ()
    if layer.folder:
        shutil.rmtree(layer.folder, ignore_errors=True)
        into = ("--no-deps", "--target", str(layer.folder))
    _pip(python, layer, *into, "-r", str(LISTS / layer.requirements))
    if layer.folder and sys.platform.startswith("linux"):
        # They look for a CUDA that may not be there. Without them torchaudio runs on Python alone.
        for library in layer.folder.glob("torchaudio/lib/*.so"):
            library.unlink()
    print(f"Installed {layer.name} in {time.monotonic() - start:.0f} s.", flush=True)


def _pip(python: Path, layer: Layer, *arguments: str) -> None:
    """Run `pip install`, on one changing line of a terminal; SystemExit with pip's last words if it fails."""
    log = REPOSITORY / ".cache" / f"pip-{layer.name}.log"
    log.parent.mkdir(exist_ok=True)
    line = [
        str(python),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-input",
        "--prefer-binary",
        *arguments,
    ]
    live = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns - 1
    with log.open("w", encoding="utf-8") as record:
        pip = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
        )
        assert pip.stdout is not None
        for text in pip.stdout:
            record.write(text)
            if live and text.strip():
                print("\r" + text.strip()[:width].ljust(width), end="", flush=True)
    if live:
        print("\r" + " " * width + "\r", end="", flush=True)
    if pip.wait():
        said = log.read_text(encoding="utf-8")
        print("\n".join(said.splitlines()[-15:]), file=sys.stderr)
        hint = "the network could not be reached; connect, or point pip at a mirror (PIP_INDEX_URL, PIP_FIND_LINKS)"
        cause = hint if any(word in said for word in _NETWORK_WORDS) else "pip's last lines are above"
        raise SystemExit(f"could not install {layer.requirements}: {cause}; its whole output is in {log}")
