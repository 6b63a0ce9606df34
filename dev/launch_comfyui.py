"""Start ComfyUI's main.py in this process: `python launch_comfyui.py COMFYUI_ROOT [ComfyUI arguments]`.

ComfyUI imports torchvision, and the wheel that package registries carry for Linux is linked to CUDA. Beside a CPU
build of torch its C++ operators cannot load, and importing it fails on the first operator it wants to annotate. No
video node calls those operators, so declaring them is enough.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from contextlib import suppress
from pathlib import Path

# The operators live as long as the library object that declared them.
_declared: list[object] = []


_REPOSITORY = Path(__file__).resolve().parent.parent
# As in dev/environment.py, which cannot be imported where this runs.
_PACKAGES = str(_REPOSITORY / ".host" / "packages")


def admit_torchvision() -> None:
    """Make `import torchvision` succeed: find the host's copy, and declare its C++ operators where they cannot load."""
    if _PACKAGES not in sys.path:
        # Last: a torchvision of the environment's own goes before this one.
        sys.path.append(_PACKAGES)
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
    import torch

    # ComfyUI gets the path it has without us: neither this folder nor, from PYTHONPATH, the pack's, whose entry has to
    # make the engine importable by itself.
    sys.path[:] = [root, *(entry for entry in sys.path[1:] if Path(entry).resolve() != _REPOSITORY)]
    os.chdir(root)
    admit_torchvision()
    if "--cpu" not in sys.argv and not torch.accelerator.is_available():
        sys.argv.append("--cpu")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
