"""Write locales/en/nodeDefs.json from the nodes, and say what locales/zh/nodeDefs.json lacks or has too much.

    python dev.py host                      # in another terminal: the nodes describe themselves
    python dev.py run -m dev.locales        # --info FILE takes a saved /object_info instead of the running ComfyUI

English is written in the nodes and only copied here; other languages are written by hand, beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dev.environment import REPOSITORY
from dev.workflows import Info, add_source, inputs_of, read_info

LOCALES = REPOSITORY / "locales"


def english(info: Info) -> dict[str, Any]:
    """What the page's nodeDefs.json holds for the nodes of this pack: names and tooltips."""
    return {name: _node(node) for name, node in sorted(info.items()) if name.startswith("LightX2V")}


def _node(node: Mapping[str, Any]) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for part in inputs_of(node):
        inputs[part.name] = {"name": part.name, "tooltip": part.options.get("tooltip", "")}
        if part.widget and part.control:
            inputs["control_after_generate"] = {"name": "control after generate"}
    outputs = {str(index): {"name": name} for index, name in enumerate(node["output_name"])}
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": inputs,
        "outputs": outputs,
    }


def keys(text: Any, path: str = "") -> set[str]:
    """The path of every text of a locale file, such as "LightX2VSampler.inputs.seed.tooltip"."""
    if isinstance(text, Mapping):
        return set().union(*(keys(value, f"{path}.{name}".lstrip(".")) for name, value in text.items()))
    return {path}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python dev.py run -m dev.locales", description=__doc__.splitlines()[0])
    add_source(parser)
    texts = english(read_info(parser.parse_args(arguments)))
    path = LOCALES / "en" / "nodeDefs.json"
    path.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    translated = keys(json.loads((LOCALES / "zh" / "nodeDefs.json").read_text(encoding="utf-8")))
    differences = [f"missing in zh: {key}" for key in sorted(keys(texts) - translated)]
    differences += [f"too much in zh: {key}" for key in sorted(translated - keys(texts))]
    print("\n".join([str(path), *differences]))
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
