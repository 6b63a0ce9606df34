"""Start ComfyUI's main.py in this process: `python launch_comfyui.py COMFYUI_ROOT [ComfyUI arguments]`.

ComfyUI imports torchvision, and the wheel that package registries carry for Linux is linked to CUDA. Beside a CPU
build of torch its C++ operators cannot load, and importing it fails on the first operator it wants to annotate. No
video node calls those operators, so declaring them is enough.

Beside a CUDA build of torch nothing of this is needed, and torch must not be imported here: ComfyUI chooses PyTorch's
allocator by a variable of the environment, which torch reads once, as it is imported. Set later, it ends the process.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

# The operators live as long as the library object that declared them.
_declared: list[object] = []


_REPOSITORY = Path(__file__).resolve().parent.parent
# As in dev/environment.py, which cannot be imported where this runs.
_PACKAGES = str(_REPOSITORY / ".host" / "packages")


def offer_packages() -> None:
    """Let the host find its own packages, after those of the environment."""
    if _PACKAGES not in sys.path:
        sys.path.append(_PACKAGES)


def built_for_gpu() -> bool:
    """Whether this torch is built for CUDA or ROCm, by its version.py: it is not imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None, "ComfyUI needs PyTorch"
    built = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return bool(built.get("cuda") or built.get("hip"))


def gpu_found() -> bool:
    """Whether torch finds a GPU; unless it is imported already another process looks."""
    if "torch" in sys.modules:
        return bool(sys.modules["torch"].accelerator.is_available())
    look = "import sys, torch; sys.exit(not torch.accelerator.is_available())"
    return subprocess.run([sys.executable, "-c", look]).returncode == 0


def admit_torchvision() -> None:
    """Make `import torchvision` succeed: find the host's copy, and declare its C++ operators where they cannot load."""
    offer_packages()
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or _declared:
        return
    import torch

    # The same file that torchvision loads; loading it twice is harmless, declaring its operators twice is not.
    extensions = [path for place in spec.submodule_search_locations for path in Path(place).glob("_C*.*")]
    with suppress(OSError):
        if extensions:
            torch.ops.load_library(str(extensions[0]))
            return
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)


def main() -> None:
    root = os.path.abspath(sys.argv[1])
    sys.argv = [os.path.join(root, "main.py"), *sys.argv[2:]]
    # ComfyUI gets the path it has without us: neither this folder nor, from PYTHONPATH, the pack's, whose entry has to
    # make the engine importable by itself.
    sys.path[:] = [root, *(entry for entry in sys.path[1:] if Path(entry).resolve() != _REPOSITORY)]
    os.chdir(root)
    offer_packages()
    if not built_for_gpu():
        admit_torchvision()
    if "--cpu" not in sys.argv and not gpu_found():
        sys.argv.append("--cpu")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
