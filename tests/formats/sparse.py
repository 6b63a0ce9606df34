"""Checkpoint files of the real names, shapes, dtypes and sizes that use no disk: a header, then a hole."""

import gzip
import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path

MANIFESTS = Path(__file__).parent / "manifests"
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I64": 8, "I32": 4, "F64": 8}
# GGML's number of a type, values in a block, bytes of a block.
GGML = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
}
COMFY_QUANT = b'{"format": "float8_e4m3fn"}'  # of every layer of the published files; a hole there would say nothing


def names() -> list[str]:
    return sorted(path.name.removesuffix(".json.gz") for path in MANIFESTS.glob("*.json.gz"))


def manifest(name: str) -> dict:
    return json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))


def write(tensors: Mapping[str, Mapping], path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of `tensors` (name -> dtype, shape) whose data is a hole of the right length."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end, said = 0, []
    for name, tensor in tensors.items():
        start, end = end, end + prod(tensor["shape"]) * BYTES[tensor["dtype"]]
        entries[name] = {"dtype": tensor["dtype"], "shape": tensor["shape"], "data_offsets": [start, end]}
        if name.endswith(".comfy_quant"):
            said.append(start)
    header = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in said:
            file.seek(8 + len(header) + start)
            file.write(COMFY_QUANT)
        file.truncate(8 + len(header) + end)
    return path


def write_gguf(tensors: Mapping[str, Mapping], path: Path, architecture: str = "wan") -> Path:
    """A GGUF file (version 3) of `tensors` whose data is a hole of the right length."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1)
    head += text("general.architecture") + struct.pack("<I", 8) + text(architecture)
    end = 0
    for name, tensor in tensors.items():
        number, values, size = GGML[tensor["dtype"]]
        shape = tensor["shape"][::-1]
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, end)
        end += -(-prod(shape) // values * size // 32) * 32
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(-(-len(head) // 32) * 32 + end)
    return path


def file_name(name: str) -> str:
    """What the manifest's checkpoint is called where it is published, as far as that tells anything."""
    content = manifest(name)
    stated = content.get("filename", "")
    if "weight_map" in content or not stated or stated.startswith("("):
        return "published.safetensors"
    chosen = stated.split("|")[0] if stated.split("|")[0].endswith((".pth", ".safetensors")) else stated
    chosen = chosen.replace("480p|720p", "480p").replace("{high,low}", "high").replace("<name>", "480p_t2v")
    return str(Path(chosen).with_suffix(".safetensors"))


def lay_out(name: str, folder: Path) -> Path:
    """The manifest's checkpoint as it is published: one file, or the folder of shards with their index."""
    content = manifest(name)
    tensors, weight_map = content["tensors"], content.get("weight_map")
    if name.startswith("gguf_"):
        return write_gguf(tensors, folder / "published.gguf")
    if not weight_map:
        return write(tensors, folder / file_name(name), content.get("safetensors_metadata"))
    return lay_out_split(tensors, weight_map, folder / content.get("subfolders", [name])[0])


def lay_out_split(tensors: Mapping[str, Mapping], weight_map: Mapping[str, str], folder: Path) -> Path:
    """Files as weight_map (tensor -> file) has them, with their index. Returns their folder."""
    for shard in set(weight_map.values()):
        write({k: tensors[k] for k in tensors if weight_map[k] == shard}, folder / shard)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
