"""Headers and streaming: what is read, and how bad files are refused before any weight is."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightx2v.checkpoint import CheckpointError, assign, read_header, read_tensors


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "0.weight": torch.randn(4, 3, generator=generator),
        "0.bias": torch.randn(4, generator=generator),
        "1.weight": torch.randn(2, 4, generator=generator),
        "1.bias": torch.randn(2, generator=generator),
    }


def empty_model() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def sharded(folder: Path, index: bool) -> Path:
    first, second = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"
    tensors = state()
    parts = {first: ["0.weight", "0.bias"], second: ["1.weight", "1.bias"]}
    for name, members in parts.items():
        save_file({member: tensors[member] for member in members}, folder / name)
    if index:
        weight_map = {member: name for name, members in parts.items() for member in members}
        (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder / first


def assert_loads(path: Path, **options) -> nn.Module:
    model = empty_model()
    assign(model, read_header(path), **options)
    for name, tensor in state().items():
        torch.testing.assert_close(model.get_parameter(name).float(), tensor, rtol=1e-2, atol=1e-2)
    return model


def test_single_file(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "m.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "m.safetensors")
    assert header.shape("0.weight") == (4, 3)
    assert header.tensors["0.weight"].dtype == torch.float32
    assert header.metadata == {"format": "pt"}
    assert_loads(tmp_path / "m.safetensors")


@pytest.mark.parametrize("index", [True, False])
def test_sharded_from_any_of_its_paths(tmp_path: Path, index: bool) -> None:
    shard = sharded(tmp_path, index)
    assert_loads(tmp_path)
    assert_loads(shard)
    assert_loads(tmp_path / "m-00002-of-00002.safetensors")
    if index:
        assert_loads(tmp_path / "m.safetensors.index.json")


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_pickled_tensors(tmp_path: Path, wrapper: str | None) -> None:
    torch.save({wrapper: state()} if wrapper else state(), tmp_path / "m.pth")
    assert_loads(tmp_path / "m.pth")


def test_dtype_rule_and_device(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "m.safetensors")
    rule = lambda name: torch.float32 if name.endswith("bias") else torch.bfloat16  # noqa: E731
    model = assert_loads(tmp_path / "m.safetensors", dtype=rule)
    assert model.get_parameter("0.weight").dtype == torch.bfloat16
    assert model.get_parameter("0.bias").dtype == torch.float32
    assert not model.get_parameter("0.bias").requires_grad


def test_loaded_weights_do_not_hold_the_file(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "m.safetensors")
    model = assert_loads(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").write_bytes(b"\0" * 4096)
    torch.testing.assert_close(model.get_parameter("0.weight"), state()["0.weight"])


def test_prefix_is_stripped_from_names_only(tmp_path: Path) -> None:
    save_file({f"model.diffusion_model.{name}": t for name, t in state().items()}, tmp_path / "m.safetensors")
    header = read_header(tmp_path / "m.safetensors").without_prefix("other.", "model.diffusion_model.")
    assert set(header.tensors) == set(state())
    assert {name for name, _ in read_tensors(header)} == set(state())


def rewrite_header(path: Path, change) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def set_field(field: str, value):
    return lambda entries: entries["0.weight"].__setitem__(field, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), r"truncated: the header describes \d+ bytes, the file has \d+"),
        (lambda p: p.write_bytes(p.read_bytes()[:40]), "truncated: the header alone needs"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "damaged: the header describes"),
        (lambda p: p.write_bytes(b""), "does not start with a safetensors header"),
        (lambda p: p.write_bytes(b"<html>not found</html>" * 9), "does not start with a safetensors header"),
        (lambda p: p.write_bytes((2**40).to_bytes(8, "little") + b"{}"), "does not start with a safetensors header"),
        (lambda p: p.write_bytes((9).to_bytes(8, "little") + b"[1, 2, 3]"), "header is damaged"),
        (lambda p: rewrite_header(p, set_field("dtype", "F4")), "dtype F4, which is not supported"),
        (lambda p: rewrite_header(p, set_field("shape", [4, -3])), "impossible shape"),
        (lambda p: rewrite_header(p, set_field("shape", [4, 4])), r"needs 64 bytes, has 48"),
        (lambda p: rewrite_header(p, set_field("data_offsets", [0])), "header is damaged"),
        (
            lambda p: rewrite_header(p, set_field("data_offsets", [0, 48])),
            r"tensor '\S+' begins at byte \d+, the one before",
        ),
        (lambda p: rewrite_header(p, lambda e: e.__setitem__("0.weight", 7)), "header is damaged"),
    ],
)
def test_damaged_files_are_refused_by_header(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "m.safetensors"
    save_file(state(), path)
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("index", [True, False])
def test_missing_shard(tmp_path: Path, index: bool) -> None:
    shard = sharded(tmp_path, index)
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    for path in (tmp_path, shard):
        with pytest.raises(CheckpointError, match=r"1 of 2 shards are missing.*m-00002-of-00002.safetensors"):
            read_header(path)


def test_index_cannot_leave_its_folder(tmp_path: Path) -> None:
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/m.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its own folder"):
        read_header(index)


def test_folder_with_two_checkpoints(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file(state(), tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"several checkpoints \(a.safetensors, b.safetensors\)"):
        read_header(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.safetensors", "no such file"), ("m.gguf", "GGUF"), ("m.bin", "not a checkpoint"), (".", "holds no")],
)
def test_not_a_checkpoint(tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / name
    if name.startswith("m"):
        path.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


class Hostile:
    def __reduce__(self):
        return (print, ("code ran",))


def test_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.pth").write_bytes(pickle.dumps({"a": Hostile()}))
    torch.save({"a": Hostile()}, tmp_path / "n.pth")
    for name in ("m.pth", "n.pth"):
        with pytest.raises(CheckpointError, match="damaged or holds code"):
            read_header(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out


def test_wrong_tensors_are_refused_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        "missing": ({k: v for k, v in state().items() if k != "1.bias"}, "1 of 4 tensors are missing, first '1.bias'"),
        "extra": ({**state(), "x": torch.zeros(1)}, "1 tensors have no place in the model, first 'x'"),
        "shape": ({**state(), "1.bias": torch.zeros(3)}, r"'1.bias' is \[3\], the model expects \[2\]"),
    }
    monkeypatch.setattr("lightx2v.checkpoint.weights.read_tensors", lambda *a, **k: pytest.fail("read weights"))
    for name, (tensors, message) in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=message):
            assign(empty_model(), read_header(tmp_path / f"{name}.safetensors"))
