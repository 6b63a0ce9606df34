"""Each reader with the hostile files that it is given, and what counts as a clear error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from host.tiny_models import train_tokenizer
from hostile import corpus
from hostile.mutators import Dice, damage, damage_json, damage_table, damage_zip, json_bytes, one_in, pick, written
from hostile.tables import Table, gguf, object_text, pth, safetensors, safetensors_header
from lightx2v.cache.lookup import figures_path, fingerprint, read_figures
from lightx2v.checkpoint import CheckpointError, Header
from lightx2v.comfyui import read_graph
from lightx2v.config import Engine
from lightx2v.config_json import ConfigError, Reading, read_config
from lightx2v.config_keys import KEYS
from lightx2v.config_survey import survey
from lightx2v.identify import identify, recognise
from lightx2v.inspection import inspected
from lightx2v.loading import load_transformer
from lightx2v.lora import Lora, apply_loras, check_loras, read_lora
from lightx2v.media import read_image
from lightx2v.preview import read_colours
from lightx2v.text import byt5, qwen, umt5
from lightx2v.text.tokenizer import find_tokenizer
from lightx2v.vae.loading import identify_vae, load_vae
from lightx2v.vision import clip, siglip

CPU = torch.device("cpu")
LONG = 6000  # characters; of a message that someone is to read


@dataclass(frozen=True)
class Case:
    """Files of one folder, of which `target` is read."""

    files: Mapping[str, bytes]
    target: str

    def write(self, folder: Path) -> Path:
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder / self.target


@dataclass(frozen=True)
class Reader:
    """make: a hostile case. valid: files as they should be. read: all that is done with such a file before it runs."""

    make: Callable[[Dice], Case]
    valid: Callable[[], tuple[Case, ...]]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...] = (CheckpointError,)
    memory: int = 1 << 30  # bytes of addresses that it may take, beside what is there before the first file


def complaint(reader: Reader, path: Path, error: BaseException) -> str:
    """What is wrong with an error; "" for a clear one: of a type of ours, one that names the file, short, printable."""
    if type(error) not in reader.errors:
        return f"{type(error).__name__} is no error of ours"
    said = str(error)
    if path.name not in said and path.parent.name not in said:
        return "does not name the file"
    if len(said) > LONG:
        return f"has {len(said)} characters"
    if bad := [character for character in said if not (character.isprintable() or character == "\n")]:
        return f"holds the character {bad[0]!r}"
    return ""


def outcome(reader: Reader, path: Path) -> tuple[str, BaseException | None]:
    """("read", "refused" or a complaint, the error)."""
    try:
        reader.read(path)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a library's own panic is none of Exception
        return complaint(reader, path, error) or "refused", error
    return "read", None


# ---- checkpoints


def _safetensors(dice: Dice, table: Table) -> bytes:
    kind = dice.number(0, 3)
    if kind > 0:
        table = damage_table(dice, table)
    header: Any = dict(safetensors_header(table))
    if kind == 1 or len(header) < len(table.entries) + bool(table.metadata):
        return safetensors(object_text(safetensors_header(table)).encode(), table)
    if kind == 3 or kind == 0:
        header = damage_json(dice, header)
    raw = safetensors(written(header).encode(), table)
    return damage(dice, raw) if kind == 0 and one_in(dice, 2) else raw


def _gguf(dice: Dice, table: Table) -> bytes:
    if not one_in(dice, 4):
        table = damage_table(dice, table)
    if one_in(dice, 3):
        key = pick(dice, ("general.alignment", "general.architecture", "comfy.gguf.orig_shape.patch_embedding.weight"))
        values: tuple[Any, ...] = (0, 1, 3, 2**31, "\u00b2", "x" * 9, [0, 5], [1] * 70, [2**30] * 4, b"\x09\0\0\0" * 40)
        table = replace(table, metadata={**table.metadata, key: pick(dice, values)})
    names = [entry.name for entry in table.entries] or [""]
    offsets = {pick(dice, names): pick(dice, (0, 1, 32, 2**40, 2**63, 2**64 - 1))} if one_in(dice, 4) else {}
    raw = gguf(table, pick(dice, (2, 3, 3, 3, 3, 1)), offsets)
    return damage(dice, raw) if one_in(dice, 3) else raw


def _pth(dice: Dice, table: Table) -> bytes:
    if one_in(dice, 2):
        table = damage_table(dice, table)
    raw = pth(table)
    kind = dice.number(0, 3)
    return damage_zip(dice, raw) if kind > 1 else damage(dice, raw) if kind == 1 else raw


def _open_model(path: Path) -> None:
    found = recognise(path)
    inspected(found)
    if found.model is not None:
        read_colours(found.model.header, 16)
        fingerprint(found.model)
        quantise = found.model.spec.family == "wan" and path.stat().st_size % 4 == 0  # some of them
        load_transformer(found.model, Engine(quant="int8" if quantise else "auto"), CPU)


def _load_vae(path: Path) -> None:
    load_vae(identify_vae(path), dtype=torch.float32, device=CPU)


def _encoder15(path: Path) -> None:
    recognise(path)
    {"byt5": byt5.load, "siglip": siglip.load, "qwen": qwen.open_encoder}[path.stem](path)


def _tokenizer(dice: Dice) -> Case:
    if one_in(dice, 2):
        return Case({"spiece.model": damage(dice, train_tokenizer())}, "spiece.model")
    return Case({"tokenizer.json": json_bytes(dice, corpus.tokenizer_json())}, "tokenizer.json")


def _valid_tokenizers() -> tuple[Case, ...]:
    told = {"tokenizer.json": written(corpus.tokenizer_json()).encode(), "spiece.model": train_tokenizer()}
    return tuple(Case({name: raw}, name) for name, raw in told.items())


def _read_tokenizer(path: Path) -> None:
    find_tokenizer(Header(path, {}, {}), path, 256).encode("a red circle, moves <extra_id_0> to \u7ea2 the right")


@cache
def _valid_model(folder: Path) -> Any:
    path = folder / "m.safetensors"
    path.write_bytes(corpus.plain(corpus.transformers()[0]))
    return identify(path)


def _apply_lora(path: Path) -> None:
    read_lora(path)
    info = _valid_model(_scratch())
    check_loras((Lora(path),), info)
    apply_loras(load_transformer(info, Engine(), CPU), info, (Lora(path),), "merge")


@cache
def _scratch() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp(prefix="hostile-"))


def _of_tables(
    tables: Callable[[], Mapping[str, Table]],
    write: Callable[[Dice, Table], bytes],
    exact: Callable[[Table], bytes],
    read: Callable[[Path], object],
) -> Reader:
    def make(dice: Dice) -> Case:
        name = pick(dice, list(tables()))
        return Case({name: write(dice, tables()[name])}, name)

    return Reader(make, lambda: tuple(Case({name: exact(table)}, name) for name, table in tables().items()), read)


def _numbered(tables: Callable[[], tuple[Table, ...]], ending: str) -> Callable[[], Mapping[str, Table]]:
    return lambda: {f"m{index}{ending}": table for index, table in enumerate(tables())}


# ---- what lies beside checkpoints

INDEX = "m.safetensors.index.json"


def _index(dice: Dice) -> Case:
    files, index = corpus.halves()
    raw = json_bytes(dice, index)
    return Case({**files, INDEX: raw}, INDEX)


def _valid_index() -> tuple[Case, ...]:
    files, index = corpus.halves()
    return (Case({**files, INDEX: written(index).encode()}, INDEX),)


def _folder_config(dice: Dice) -> Case:
    return Case({**corpus.blocks(), "config.json": json_bytes(dice, {"num_layers": 1, "dim": 128})}, "config.json")


def _valid_folder() -> tuple[Case, ...]:
    return (Case({**corpus.blocks(), "config.json": b'{"num_layers": 1}'}, "config.json"),)


def _read_folder(path: Path) -> None:
    _open_model(path.parent)


SETTINGS = "adapter_config.json"


def _peft(dice: Dice) -> Case:
    adapter = {"adapter_model.safetensors": corpus.plain(replace(corpus.loras()[0], metadata={}))}
    return Case({**adapter, SETTINGS: json_bytes(dice, corpus.peft_settings())}, SETTINGS)


def _valid_peft() -> tuple[Case, ...]:
    adapter = {"adapter_model.safetensors": corpus.plain(replace(corpus.loras()[0], metadata={}))}
    return (Case({**adapter, SETTINGS: written(corpus.peft_settings()).encode()}, SETTINGS),)


# ---- JSON


def _json_reader(name: str, value: dict[str, Any], read: Callable[[Path], object], *errors: type[Exception]) -> Reader:
    return Reader(
        lambda dice: Case({name: json_bytes(dice, value)}, name),
        lambda: (Case({name: written(value).encode()}, name),),
        read,
        errors,
    )


CONFIG_ERRORS = (ConfigError, ValueError)


def _with_files(config: bytes) -> Case:
    """With what the settings name."""
    return Case({"c.json": config, "a.safetensors": b"", "transformer/720p_t2v/x": b""}, "c.json")


def _config(dice: Dice) -> Case:
    return _with_files(json_bytes(dice, corpus.CONFIG, tuple(KEYS)))


def _read_config(path: Path) -> None:
    reading = Reading(path, read_config(path), folders=(path.parent,))
    survey(reading)
    reading.translate()


def _read_figures(path: Path) -> None:
    info = _valid_model(_scratch())
    assert figures_path(info.path).name == "m.cache.json"
    read_figures(path, info, strict=False)


def _picture(dice: Dice) -> Case:
    name = pick(dice, list(corpus.pictures()))
    return Case({name: damage(dice, corpus.pictures()[name])}, name)


def _valid_pictures() -> tuple[Case, ...]:
    return tuple(Case({name: raw}, name) for name, raw in corpus.pictures().items())


READERS: dict[str, Reader] = {
    "picture": Reader(_picture, _valid_pictures, read_image, (ValueError,), memory=4 << 30),
    "safetensors": _of_tables(_numbered(corpus.transformers, ".safetensors"), _safetensors, corpus.plain, _open_model),
    "gguf": _of_tables(lambda: {"m.gguf": corpus.gguf_transformer()}, _gguf, gguf, _open_model),
    "pth": _of_tables(_numbered(lambda: corpus.transformers()[:1], ".pth"), _pth, pth, _open_model),
    "vae": _of_tables(corpus.vaes, _safetensors, corpus.plain, _load_vae),
    "text": _of_tables(_numbered(corpus.text_encoders, ".safetensors"), _safetensors, corpus.plain, umt5.load),
    "image": _of_tables(_numbered(corpus.image_encoders, ".safetensors"), _safetensors, corpus.plain, clip.load),
    "encoders15": _of_tables(corpus.encoders15, _safetensors, corpus.plain, _encoder15),
    "tokenizer": Reader(_tokenizer, _valid_tokenizers, _read_tokenizer),
    "lora": _of_tables(_numbered(corpus.loras, ".safetensors"), _safetensors, corpus.plain, _apply_lora),
    "index": Reader(_index, _valid_index, _open_model),
    "folder": Reader(_folder_config, _valid_folder, _read_folder),
    "peft": Reader(_peft, _valid_peft, lambda path: _apply_lora(path.parent)),
    "config": Reader(_config, lambda: (_with_files(written(corpus.CONFIG).encode()),), _read_config, CONFIG_ERRORS),
    "figures": _json_reader("m.cache.json", corpus.FIGURES, _read_figures, ValueError),
    "workflow": _json_reader("w.api.json", corpus.GRAPH, read_graph, ValueError),
}
