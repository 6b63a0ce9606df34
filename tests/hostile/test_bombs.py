"""Files that are small and ask for much: memory, time, other files, code. Each is refused before it gets any."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hostile import corpus
from hostile.tables import Entry, Table, gguf, pth
from lightx2v import strict_json
from lightx2v.checkpoint import CheckpointError, Header, read_header, read_tensors
from lightx2v.checkpoint.single import MAX_HEADER_BYTES
from lightx2v.comfyui import read_graph
from lightx2v.config_json import ConfigError, Reading
from lightx2v.identify import identify
from lightx2v.lora import read_lora
from lightx2v.media import read_image
from lightx2v.messages import readable
from lightx2v.text.tokenizer import find_tokenizer

SMALL = Table.of({"a": torch.ones(4, 4), "b": torch.ones(4)})


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def members() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(pth(SMALL))) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def long_list() -> bytes:
    """The record that ends an archive says that a list of 5 MB stands before it."""
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, 5 << 20, 0, 0)
    return bytes(5 << 20) + end


def long_wide_list() -> bytes:
    """The same in the records of archives beyond 4 GB, before an end that says it is short."""
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 5 << 20, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, 5 << 20, 1)
    return bytes(5 << 20) + record + locator + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, 60, 0, 0)


SHARED = torch.ones(4)
PICKLED: dict[str, tuple[Callable[[], bytes], str]] = {
    "packed": (lambda: zipped({**members(), "archive/data/0": bytes(1 << 26)}, zipfile.ZIP_DEFLATED), "entries of"),
    "packed a little": (lambda: zipped(members(), zipfile.ZIP_DEFLATED), r"entries of|is packed"),
    "long pickle": (
        lambda: zipped({"archive/data.pkl": b"]" * (9 << 20)}),
        r"'archive/data.pkl' is 9,437,184 bytes",
    ),
    "long list": (long_list, "its list of entries has 5,242,880 bytes"),
    "long wide list": (long_wide_list, "its list of entries has 5,242,880 bytes"),
    "code": (lambda: zipped({**members(), "archive/constants.pkl": b"."}), r"holds code \(TorchScript\)"),
    "one row again and again": (lambda: saved({"a": torch.ones(1).expand(10**6, 10**6)}), "is 4 bytes in the file"),
    "sparse": (lambda: saved({"a": torch.eye(3).to_sparse()}), "no plain tensor"),
    "quantised": (
        lambda: saved({"a": torch.quantize_per_tensor(SHARED, 1.0, 0, torch.qint8)}),
        "no plain tensor",
    ),
    "meta": (lambda: saved({"a": torch.ones(3, device="meta")}), "no plain tensor"),
    "complex": (lambda: saved({"a": torch.ones(3, dtype=torch.complex64)}), "no plain tensor"),
    "numbers for names": (lambda: saved({1: torch.ones(3)}), "under 1, which is no name"),
    "no archive": (lambda: b"\x80\x02}q\0." * 99, "cannot be read as a PyTorch file of plain tensors"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PICKLED)
def test_pytorch_files(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, words = PICKLED[case]
    (tmp_path / "m.pth").write_bytes(make())
    if case in ("packed", "long pickle", "long list", "long wide list", "code"):
        monkeypatch.setattr(torch, "load", lambda *args, **named: pytest.fail("unpacked it"))
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(tmp_path / "m.pth")
    assert str(tmp_path / "m.pth") in str(caught.value)


def test_weights_that_share_a_storage_and_views_are_read(tmp_path: Path) -> None:
    state = {"a": SHARED, "b": SHARED, "c": SHARED[1:], "d": torch.ones(3, 2).T, "e": torch.ones(0)}
    (tmp_path / "m.pth").write_bytes(saved({"state_dict": state}))
    found = dict(read_tensors(read_header(tmp_path / "m.pth")))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }


def header(text: str, data: bytes = b"") -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data


ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "long header": (header(" " * (MAX_HEADER_BYTES + 1)), "does not start with a safetensors header"),
    "twice": (header(f'{{"a":{ONE},"a":{ONE}}}', bytes(4)), "the key 'a' stands twice"),
    "deep": (header('{"a":' + "[" * 900 + "]" * 900 + "}"), "nested more than 64 deep"),
    "deeper": (header("[" * 200_000), "nested more than 64 deep"),
    "digits": (header(f'{{"a":{ONE.replace("[1]", "[" + "9" * 5000 + "]")}}}', bytes(4)), "header is damaged"),
    "product overflow": (header(f'{{"a":{ONE.replace("[1]", "[4294967296,4294967296]")}}}', bytes(4)), "needs"),
    "axis": (header(f'{{"a":{ONE.replace("[1]", "[1" + "0" * 400 + "]")}}}', bytes(4)), "impossible shape"),
    "many axes": (header(f'{{"a":{ONE.replace("[1]", "[" + "1," * 8 + "1]")}}}', bytes(4)), "impossible shape"),
    "true": (header(f'{{"a":{ONE.replace("[1]", "[true]")}}}', bytes(4)), "impossible shape"),
    "empty matrix": (header(f'{{"a":{ONE.replace("[1]", "[9999999999,0]").replace("4]", "0]")}}}'), "impossible shape"),
    "nan": (header('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)), "NaN is no number"),
    "escapes": (header(f'{{"\\u001b[2Jgone":{ONE}}}', bytes(4)), r"a tensor is named '\\x1b\[2Jgone'"),
    "half a character": (header(f'{{"\\ud800":{ONE}}}', bytes(4)), "half a character"),
    "long name": (header(f'{{"{"a" * 501}":{ONE}}}', bytes(4)), "a tensor is named 'aaa"),
    "lists without end": (header("[" + "[]," * 100_000 + "[]]"), "header is damaged"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors(case: str, tmp_path: Path) -> None:
    raw, words = SAFETENSORS[case]
    (tmp_path / "m.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(tmp_path / "m.safetensors")
    assert str(tmp_path / "m.safetensors") in str(caught.value) and len(str(caught.value)) < 4000


GGUF: dict[str, tuple[bytes, str]] = {
    "shared bytes": (gguf(SMALL, offsets={"b": 32}), "tensors 'a' and 'b' share bytes"),
    "alignment": (gguf(Table(SMALL.entries, {"general.alignment": "\u00b2"})), "alignment '\u00b2'"),
    "axes": (gguf(Table((Entry("a", "F32", (1,) * 9, bytes(4)),))), "has 9 axes"),
    "axis": (gguf(Table((Entry("a", "F32", (2**63, 2), bytes(4)),))), "impossible shape"),
}


@pytest.mark.parametrize("case", GGUF)
def test_gguf(case: str, tmp_path: Path) -> None:
    raw, words = GGUF[case]
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=words):
        read_header(tmp_path / "m.gguf")


@pytest.mark.parametrize("ending", ["safetensors", "gguf", "pth"])
def test_pipes_are_not_waited_for(ending: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"m.{ending}")
    with pytest.raises(CheckpointError, match="not a file"):
        read_header(tmp_path / f"m.{ending}")


def test_links_in_circles_and_names_without_end(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").symlink_to(tmp_path / "m.safetensors")
    for path in (tmp_path / "m.safetensors", tmp_path / ("a" * 5000), Path("a\0b.safetensors")):
        with pytest.raises(CheckpointError, match=r"no such file|cannot be looked for"):
            read_header(path)


@pytest.mark.parametrize("number", ["99999999999", "200"])
def test_blocks_that_no_network_has(number: str, tmp_path: Path) -> None:
    for name in ("non_block", f"block_{number}"):
        (tmp_path / f"{name}.safetensors").write_bytes(corpus.plain(SMALL))
    with pytest.raises(CheckpointError, match=f"named for block {number}"):
        read_header(tmp_path)
    table = corpus.transformers()[0]
    one = Entry(f"blocks.{number}.norm3.bias", "F32", (1,), bytes(4))
    (tmp_path / "m.safetensors").write_bytes(corpus.plain(Table((*table.entries, one))))
    with pytest.raises(CheckpointError, match=f"it names a block {number}"):
        identify(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        *("../m.safetensors", "/etc/m.safetensors", "..", "", ".", "a/b.safetensors", "m.pth", "a\0.safetensors"),
        *("a" * 300 + ".safetensors", "\x1b[2J.safetensors"),
    ],
)
def test_an_index_names_only_files_beside_it(name: str, tmp_path: Path) -> None:
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"outside its own folder|which is no \.safetensors file") as caught:
        read_header(index)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    table = corpus.transformers()[3]
    at = next(i for i, entry in enumerate(table.entries) if entry.name.endswith("weight_scale"))
    scale = table.entries[at]
    bad = Entry(scale.name, scale.kind, scale.shape, struct.pack("<f", value) + scale.raw[4:])
    path = tmp_path / "m.safetensors"
    path.write_bytes(corpus.plain(Table((*table.entries[:at], bad, *table.entries[at + 1 :]))))
    weight = scale.name.removesuffix("_scale")
    with pytest.raises(CheckpointError, match=f"the scale of '{weight}' is NaN or infinite"):
        dict(read_tensors(identify(path).header, [weight]))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)*b", ".*.*.*x", r"(a)\1", "a" * 400])
def test_patterns_that_take_hours(pattern: str, tmp_path: Path) -> None:
    settings = {**corpus.peft_settings(), "alpha_pattern": {pattern: 1}}
    table = Table(corpus.loras()[0].entries, {"lora_adapter_metadata": json.dumps(settings)})
    (tmp_path / "m.safetensors").write_bytes(corpus.plain(table))
    with pytest.raises(CheckpointError, match="is not a layer's name"):
        read_lora(tmp_path / "m.safetensors")


def test_patterns_of_layers_are_read(tmp_path: Path) -> None:
    settings = {**corpus.peft_settings(), "alpha_pattern": {r"^blocks\.\d+\.ffn\.0": 8, ".*self_attn.q": 2}}
    table = Table(corpus.loras()[0].entries, {"lora_adapter_metadata": json.dumps(settings)})
    (tmp_path / "m.safetensors").write_bytes(corpus.plain(table))
    scales = {name: layer.scale for name, layer in read_lora(tmp_path / "m.safetensors").layers.items()}
    assert scales == {"blocks.0.ffn.0": 4, "blocks.0.self_attn.q": 1, "head.head": 2}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"aspect_ratio": "\u00b2:1", "transformer_model_name": "480p_t2v"}, "expected width:height"),
        ({"aspect_ratio": "9999:1", "transformer_model_name": "480p_t2v"}, "expected width:height"),
        ({"transformer_model_name": "../../etc"}, "is no name in the folder transformer"),
        ({"attn_type": ["torch_sdpa"]}, "expected a text"),
        ({"feature_caching": {"a": 1}}, "expected a text"),
        ({"lora_configs": ["a.safetensors"]}, 'expected a list of objects, each with a "path"'),
        ({"vae_path": "a" * 5000}, "there is no such file"),
        ({"vae_path": "a\0b"}, "there is no such file"),
        ({"\x1b[2J": 1}, r"'\\x1b\[2J' is no key"),
    ],
)
def test_settings(settings: dict[str, object], words: str, tmp_path: Path) -> None:
    (tmp_path / "transformer" / "480p_t2v").mkdir(parents=True)
    with pytest.raises(ConfigError, match=words) as caught:
        Reading(tmp_path / "c.json", settings, folders=(tmp_path,)).translate()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 4000


GRAPHS = ('{"1": 2}', '{"1": "class_type"}', '{"": {}}', '{"1": {"class_type": 3}}', "[]", "{}")


@pytest.mark.parametrize("graph", [*GRAPHS, '{"1": {"class_type": "a", "inputs": 1}}'])
def test_workflows(graph: str, tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text(graph, encoding="utf-8")
    with pytest.raises(ValueError, match=r"w\.json is no workflow in API format"):
        read_graph(tmp_path / "w.json")


@pytest.mark.filterwarnings("ignore")  # Pillow's own, from 90 million pixels on
def test_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    raw = corpus.pictures()["a.png"]
    for damaged, words in (
        (raw[:16] + (40_000).to_bytes(4, "big") * 2 + raw[24:], "cannot be read as a picture"),
        (raw[:40], "cannot be read as a picture"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "cannot be read as a picture"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=words) as caught:
            read_image(path)
        assert str(path) in str(caught.value)
    huge = struct.pack(">II", 16_000, 9_000) + raw[24:29]
    path.write_bytes(raw[:16] + huge + struct.pack(">I", zlib.crc32(raw[12:16] + huge)) + raw[33:])
    with pytest.raises(ValueError, match="144,000,000 pixels, at most 134,217,728 are read"):
        read_image(path)


def test_a_tokenizer_that_panics_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tokenizer.json"
    told = {**corpus.tokenizer_json(), "normalizer": {"type": "Precompiled"}}
    path.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer\.json"):
        find_tokenizer(Header(path, {}, {}), path, 256)


def test_json_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b" " * (strict_json.MAX_BYTES + 1))
    with pytest.raises(ValueError, match="larger than 16 MB"):
        strict_json.read(path)
    os.mkfifo(tmp_path / "b.json")
    with pytest.raises(ValueError, match="not a file"):
        strict_json.read(tmp_path / "b.json")
    for text, words in ((b'"\xff"', "not UTF-8"), (b"1e999", "too large"), (b"-Infinity", "no number of JSON")):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=words):
            strict_json.read(path)
    assert strict_json.parse('{"a": [1, 2.5, "\u00fc\\ud83d\\ude00"]}') == {"a": [1, 2.5, "\u00fc\U0001f600"]}


def test_words_of_a_file_cannot_redraw_a_terminal() -> None:
    assert readable("a\x1b[2J\ud800\u202e\nb") == "a\\x1b[2J\\ud800\\u202e\nb"
    assert readable("plain \u00fc \u2013 text") == "plain \u00fc \u2013 text"
    assert len(readable("x" * 10**6)) < 3100
