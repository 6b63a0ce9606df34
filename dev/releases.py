"""Keep what workflows saved with this version rely on, for the tests of every later one: tests/host/released/<version>.

    python dev.py host                        # in another terminal: the nodes describe themselves
    python dev.py run -m dev.releases         # --info FILE takes a saved /object_info instead of the running ComfyUI

Run once, at a release. What is kept is never edited: where a test says that a node no longer keeps it, mend the node.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dev.environment import REPOSITORY
from dev.workflows import WORKFLOWS, Info, add_source, inputs_of, read_info
from lightx2v import __version__

FILES = (".safetensors", ".gguf", ".pth", ".pt", "/")
RELEASED = REPOSITORY / "tests" / "host" / "released"


def promises(info: Info) -> dict[str, Any]:
    """What a saved workflow names of each node of this pack: inputs in the page's order, and outputs."""
    return {name: _node(node) for name, node in sorted(info.items()) if name.startswith("LightX2V")}


def _node(node: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {}
    for entry in inputs_of(node):
        known = {key: entry.options[key] for key in ("default", "min", "max") if key in entry.options}
        inputs[entry.name] = {"type": entry.type, "optional": entry.optional, "widget": entry.widget, **known}
        # Files are the machine's, not the pack's.
        options = [name for name in entry.options.get("options", []) if not str(name).endswith(FILES)]
        if options:
            inputs[entry.name]["options"] = options
    return {"inputs": inputs, "outputs": list(node["output"])}


def broken(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a workflow saved with nodes `then` would miss in nodes `now`, both of `promises`, in words."""
    gone = [f"{name}: the node is gone" for name in then if name not in now]
    return gone + [f"{name}: {text}" for name in then if name in now for text in _broken(then[name], now[name])]


def _broken(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for name, old in then["inputs"].items():
        new = now["inputs"].get(name)
        if new is None or new["type"] != old["type"]:
            found.append(f"input {name} is gone, or no longer {old['type']}")
            continue
        if old["optional"] and new.get("default") != old.get("default"):
            found.append(f"{name}: the default was {old.get('default')}; files that leave it out rely on that")
        if lost := set(old.get("options", [])) - set(new.get("options", [])):
            found.append(f"{name}: no longer offers {', '.join(sorted(lost))}")
        if new.get("min", 0) > old.get("min", 0) or new.get("max", 0) < old.get("max", 0):
            found.append(f"{name}: its range became smaller")
    found += [
        f"{name}: has to be given; inputs are only added as optional ones"
        for name, new in now["inputs"].items()
        if not new["optional"] and then["inputs"].get(name, {"optional": True})["optional"]
    ]
    old_widgets, new_widgets = (
        [name for name, entry in node["inputs"].items() if entry["widget"]] for node in (then, now)
    )
    # The page saves the values of a node's widgets as a list without names.
    if new_widgets[: len(old_widgets)] != old_widgets:
        found.append(f"widgets were {', '.join(old_widgets)}: later ones go behind these")
    if now["outputs"][: len(then["outputs"])] != then["outputs"]:
        found.append(f"outputs were {', '.join(then['outputs'])}: later ones go behind these")
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python dev.py run -m dev.releases", description=__doc__.splitlines()[0])
    add_source(parser)
    kept = promises(read_info(parser.parse_args(arguments)))
    folder = RELEASED / __version__
    if (folder / "nodes.json").exists():
        raise SystemExit(f"{folder} is there already, and what is kept is never edited: raise the version first")
    folder.mkdir(parents=True, exist_ok=True)
    for path in WORKFLOWS.glob("*.api.json"):
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    (folder / "nodes.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(f"{folder}: {len(kept)} nodes and every workflow")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
