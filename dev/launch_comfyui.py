"""Start ComfyUI's main.py in this process: `python launch_comfyui.py COMFYUI_ROOT [ComfyUI arguments]`.

ComfyUI imports torchvision, and the wheel that package registries carry for Linux is linked to CUDA. Beside a CPU build of torch its
C++ operators cannot load, and importing it fails on the first operator it wants to annotate. No video node calls those operators, so
declaring them is enough.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys


def admit_torchvision() -> None:
    """Make `import torchvision` succeed where its C++ operators cannot load; do nothing where it already does."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    else:
        return
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = importlib.import_module("torch.library").Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # The operators live as long as the library object does.
    importlib.import_module("torchvision").__dict__["_declared_operators"] = library


def main() -> None:
    root = os.path.abspath(sys.argv[1])
    sys.argv = [os.path.join(root, "main.py"), *sys.argv[2:]]
    # ComfyUI must not find this folder, and must find its own `nodes`, `utils` and `app` first.
    sys.path[0] = root
    os.chdir(root)
    admit_torchvision()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
