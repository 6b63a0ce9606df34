"""Checkpoint files of the real names, shapes, dtypes and sizes that use no disk: a header, then a hole."""

import gzip
import json
from math import prod
from pathlib import Path

MANIFESTS = Path(__file__).parent / "manifests"
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I64": 8, "I32": 4, "F64": 8}


def manifest(name: str) -> dict:
    return json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))


def write(tensors: dict[str, dict], path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of `tensors` (name -> dtype, shape) whose data is a hole of the right length."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + prod(tensor["shape"]) * BYTES[tensor["dtype"]]
        entries[name] = {"dtype": tensor["dtype"], "shape": tensor["shape"], "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path


def lay_out(name: str, folder: Path) -> Path:
    """The manifest's checkpoint as it is published: one file, or shards with their index. Returns its folder."""
    content = manifest(name)
    tensors, weight_map = content["tensors"], content.get("weight_map")
    if not weight_map:
        write(tensors, folder / content.get("filename", f"{name}.safetensors"), content.get("safetensors_metadata"))
        return folder
    for shard in set(weight_map.values()):
        write({k: tensors[k] for k in tensors if weight_map[k] == shard}, folder / shard)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
