"""ComfyUI's way in: make the engine importable under its own names, then hand over the nodes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# Resolved, because the pack is often a link in custom_nodes.
ROOT = Path(__file__).resolve().parent


def _expose(name: str) -> None:
    """Make `import {name}` mean this pack's copy.

    The pack's root never goes on sys.path: its `nodes` and `tests` would then be found in place of ComfyUI's.
    Raises ImportError if the name already belongs to another copy, since two engines under one name would mix.
    """
    home = ROOT / name
    if name in sys.modules:
        origin = getattr(sys.modules[name], "__file__", None)
    else:
        found = importlib.util.find_spec(name)
        # None for a plain folder of that name, which any package of that name outranks.
        origin = found.origin if found else None
    if origin and Path(origin).resolve().parent != home:
        raise ImportError(
            f"'{name}' is already provided by {origin}, so this pack cannot use its own copy in {home}. "
            f"If that is an installed package, run `pip uninstall {name}`; if it is another node pack, disable one of "
            "the two."
        )
    if name in sys.modules or origin:
        return
    spec = importlib.util.spec_from_file_location(name, home / "__init__.py", submodule_search_locations=[str(home)])
    if spec is None or spec.loader is None or not (home / "__init__.py").is_file():
        raise ImportError(f"{home} is missing or incomplete: install the node pack again")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


for _name in ("lightx2v_kernels", "lightx2v"):
    _expose(_name)

from .nodes import comfy_entrypoint  # noqa: E402

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
