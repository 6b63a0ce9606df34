"""Checkpoints of several files: shards, an index, LightX2V's one file a block, diffusers' folders."""

import re
from dataclasses import replace
from pathlib import Path

from lightx2v import strict_json
from lightx2v.checkpoint.header import MAX_BLOCKS, CheckpointError, Header, merged
from lightx2v.checkpoint.single import safetensors_header

SHARD = re.compile(r"^(?P<stem>.+)-(?P<index>\d{5})-of-(?P<total>\d{5})\.safetensors$")
BLOCK = re.compile(r"^block_(\d+)\.safetensors$")
NON_BLOCK = "non_block.safetensors"
PUBLISHED = "diffusion_pytorch_model"  # a transformer in Wan's and in diffusers' repositories
INDEX = ".safetensors.index.json"
# Transformers below the root of a published repository: diffusers', and Wan2.2's own.
SUBFOLDERS = ("transformer", "transformer_2", "high_noise_model", "low_noise_model")


def folder_header(folder: Path) -> Header:
    """The one checkpoint of a folder; raises CheckpointError where there is none, several or half of one."""
    indices = sorted(folder.glob(f"*{INDEX}"))
    if len(indices) == 1:
        return replace(indexed_header(indices[0]), path=folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return _below(folder)
    if any(file.name == NON_BLOCK or BLOCK.match(file.name) for file in files):
        return _block_split_header(folder, files)
    if (named := folder / f"{PUBLISHED}.safetensors") in files and not indices:
        return replace(safetensors_header(named), path=folder)
    shard = SHARD.match(files[0].name)
    if shard and all((m := SHARD.match(f.name)) and m["stem"] == shard["stem"] for f in files):
        return replace(shards_header(files[0], shard), path=folder)
    if len(files) > 1 or len(indices) > 1:
        names = ", ".join(f.name for f in files[:6]) + (" ..." if len(files) > 6 else "")
        raise CheckpointError(f"{folder}: holds several checkpoints ({names}); give the path of one file")
    return replace(safetensors_header(files[0]), path=folder)


def _below(folder: Path) -> Header:
    found = [name for name in SUBFOLDERS if (folder / name).is_dir()]
    if len(found) == 1:
        return folder_header(folder / found[0])
    if found:
        raise CheckpointError(f"{folder}: holds several models ({', '.join(found)}); give the folder of one of them")
    raise CheckpointError(f"{folder}: holds no .safetensors file; give the checkpoint's file or its folder")


def indexed_files(index: Path) -> tuple[str, ...]:
    """Names of the files in which a *.safetensors.index.json finds its tensors, all in its own folder."""
    return tuple(sorted(set(_weight_map(index).values())))


def index_of(file: Path) -> Path | None:
    """The index beside a file that says the file is one of several."""
    for index in sorted(file.parent.glob(f"*{INDEX}")):
        try:
            names = indexed_files(index)
        except CheckpointError:  # of whatever else lies here; a part of it alone still lacks tensors and is refused
            continue
        if len(names) > 1 and file.name in names:
            return index
    return None


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = strict_json.read(index)["weight_map"]
        names = [Path(name).name == name for name in weight_map.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({error!r}); download the file again") from error
    if not all(names):
        raise CheckpointError(f"{index}: names a file outside its own folder; download the index again")
    if others := [name for name in weight_map.values() if not _usual(name)]:
        raise CheckpointError(
            f"{index}: names {others[0][:100]!r}, which is no .safetensors file; download the index again"
        )
    return weight_map


def _usual(name: str) -> bool:
    """A name that can be that of a part; longer ones and those with a NUL no system can look for."""
    return name.endswith(".safetensors") and len(name.encode()) <= 255 and name.isprintable()


def indexed_header(index: Path) -> Header:
    """The files that a *.safetensors.index.json names."""
    weight_map, names = _weight_map(index), indexed_files(index)
    _require_files(index, [index.parent / name for name in names])
    container = "block-split" if NON_BLOCK in names else "sharded"
    header = merged(index, (safetensors_header(index.parent / name) for name in names), container)
    if lost := sorted(set(weight_map) - set(header.tensors)):
        raise CheckpointError(
            f"{index}: {len(lost)} tensors are not in its files, first '{lost[0]}'; download it again"
        )
    return header


def shards_header(path: Path, shard: re.Match[str]) -> Header:
    """All files of the set that one shard, matched by SHARD, belongs to."""
    total = int(shard["total"])
    files = [path.parent / f"{shard['stem']}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    _require_files(path, files)
    return merged(path, (safetensors_header(file) for file in files), "sharded")


def _block_split_header(folder: Path, files: list[Path]) -> Header:
    strange = [f.name for f in files if f.name != NON_BLOCK and not BLOCK.match(f.name)]
    if strange:
        raise CheckpointError(
            f"{folder}: mixes two layouts: one file a block ({NON_BLOCK}), and {', '.join(strange[:6])}; "
            "keep one of them in the folder"
        )
    blocks = [int(match[1]) for file in files if (match := BLOCK.match(file.name))]
    if max(blocks, default=0) >= MAX_BLOCKS:
        raise CheckpointError(f"{folder}: a file is named for block {max(blocks)}, networks have some 40; remove it")
    count = max(_layers_by_config(folder), max(blocks, default=-1) + 1)
    _require_files(folder / NON_BLOCK, [folder / NON_BLOCK, *(folder / f"block_{i}.safetensors" for i in range(count))])
    return merged(folder, map(safetensors_header, files), "block-split")


def _layers_by_config(folder: Path) -> int:
    """num_layers of the folder's config.json: without it nobody notices that the last blocks are missing."""
    config = folder / "config.json"
    if not config.is_file():
        return 0
    try:
        layers = strict_json.read(config).get("num_layers", 0)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{config}: not a model's config.json ({error!r}); download the file again") from error
    return layers if isinstance(layers, int) and 0 <= layers < MAX_BLOCKS else 0


def _require_files(path: Path, files: list[Path]) -> None:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        shown = ", ".join(missing[:6]) + (" ..." if len(missing) > 6 else "")
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(files)} shards are missing from {path.parent}: {shown}; "
            "download them into the same folder"
        )
