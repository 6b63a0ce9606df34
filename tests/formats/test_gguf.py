"""GGUF: what the header says, blocks against the format's own definition, and how damaged files are refused."""

import struct
from pathlib import Path

import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize
from torch import Tensor

from lightx2v.checkpoint import CheckpointError, read_header, read_tensors
from lightx2v.checkpoint.gguf import BLOCKS
from lightx2v.quant import find_packed
from lightx2v_kernels.ggml import CHUNK, TYPES, restore


def half(raw: bytes) -> float:
    return struct.unpack("<e", raw)[0]


def q4_0(block: bytes) -> list[float]:
    """d, then 32 nibbles: the low ones are the first half (ggml-quants.c, dequantize_row_q4_0)."""
    d, codes = half(block[:2]), block[2:]
    return [d * ((c & 15) - 8) for c in codes] + [d * ((c >> 4) - 8) for c in codes]


def q8_0(block: bytes) -> list[float]:
    return [half(block[:2]) * code for code in struct.unpack("32b", block[2:])]


def q4_k(block: bytes) -> list[float]:
    """d, dmin, eight 6-bit scales and minima in 12 bytes, 256 nibbles (dequantize_row_q4_K)."""
    d, least, packed, codes = half(block[:2]), half(block[2:4]), block[4:16], block[16:]

    def scale_and_minimum(j: int) -> tuple[int, int]:
        if j < 4:
            return packed[j] & 63, packed[j + 4] & 63
        return (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4, (packed[j + 4] >> 4) | (packed[j] >> 6) << 4

    values = []
    for j in range(8):
        scale, minimum = scale_and_minimum(j)
        part = codes[32 * (j // 2) : 32 * (j // 2) + 32]
        values += [d * scale * (c >> 4 if j % 2 else c & 15) - least * minimum for c in part]
    return values


def q6_k(block: bytes) -> list[float]:
    """128 low nibbles, 64 bytes of upper bit pairs, 16 signed scales, d (dequantize_row_q6_K)."""
    low, high, scales, d = block[:128], block[128:192], struct.unpack("16b", block[192:208]), half(block[208:])
    values = [0.0] * 256
    for index in range(256):
        group, place = divmod(index, 128)
        quarter, column = divmod(place, 32)
        nibble = low[64 * group + 32 * (quarter % 2) + column] >> (4 * (quarter // 2)) & 15
        pair = high[32 * group + column] >> (2 * quarter) & 3
        values[index] = d * scales[index // 16] * ((nibble | pair << 4) - 32)
    return values


# Bytes at which a block holds float16 numbers, which random bytes must not make infinite.
HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}
DEFINITIONS = {"Q4_0": q4_0, "Q8_0": q8_0, "Q4_K": q4_k, "Q6_K": q6_k}


def random_blocks(encoding: str, count: int) -> list[bytes]:
    generator = torch.Generator().manual_seed(count)
    _, _, size = next(entry for entry in BLOCKS.values() if entry[0] == encoding)
    blocks = []
    for _ in range(count):
        block = bytearray(torch.randint(256, (size,), generator=generator, dtype=torch.uint8).tolist())
        for at in HALVES[encoding]:
            block[at : at + 2] = struct.pack("<e", float(torch.rand((), generator=generator)) / 64)
        blocks.append(bytes(block))
    return blocks


@pytest.mark.parametrize("encoding", DEFINITIONS)
def test_blocks_are_what_the_format_defines(encoding: str) -> None:
    blocks = random_blocks(encoding, 6)
    expected = torch.tensor([value for block in blocks for value in DEFINITIONS[encoding](block)], dtype=torch.float64)
    raw = torch.frombuffer(bytearray(b"".join(blocks)), dtype=torch.uint8)
    found = restore(raw, encoding, (2, len(expected) // 2))
    assert found.dtype == torch.float32 and expected.std() > 0.01
    torch.testing.assert_close(found.flatten().double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("number", BLOCKS)
def test_blocks_are_what_the_reference_package_makes_of_them(number: int) -> None:
    name, values, size = BLOCKS[number]
    assert GGMLQuantizationType(number).name == name
    assert GGML_QUANT_SIZES[GGMLQuantizationType(number)] == (values, size) and TYPES[name][0] == size
    blocks = torch.frombuffer(bytearray(b"".join(random_blocks(name, 40))), dtype=torch.uint8).view(4, -1)
    expected = torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType(number)))
    assert expected.std() > 0.01
    assert torch.equal(restore(blocks.flatten(), name, (4, 10 * values)), expected)


def test_large_tensors_are_restored_in_parts() -> None:
    codes = torch.randint(256, (CHUNK + 3, 34), dtype=torch.uint8)
    codes[:, :2] = torch.tensor([0.5]).half().view(torch.uint8)
    expected = codes[:, 2:].view(torch.int8).float() / 2
    assert torch.equal(restore(codes.flatten(), "Q8_0", (CHUNK + 3, 32)), expected)


def written(path: Path, alignment: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 64, generator=generator),
        "b": torch.randn(7, generator=generator).half(),
        "c": torch.arange(5, dtype=torch.int32),
    }
    writer = GGUFWriter(path, "wan")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name("a model")
    writer.add_array("words", ["one", "two"])
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_float32("ratio", 0.5)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("alignment", [None, 128])
def test_header_and_plain_tensors(tmp_path: Path, alignment: int | None) -> None:
    tensors = written(tmp_path / "m.gguf", alignment)
    header = read_header(tmp_path / "m.gguf")
    assert header.container == "gguf"
    assert header.metadata["general.architecture"] == "wan" and header.metadata["general.name"] == "a model"
    assert header.metadata["ratio"] == "0.5" and header.metadata["words"] == ""
    assert {name: info.shape for name, info in header.tensors.items()} == {
        k: tuple(t.shape) for k, t in tensors.items()
    }
    for name, tensor in read_tensors(header):
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype


def raw_gguf(
    *, version: int = 3, shape: tuple[int, ...] = (32,), kind: int = 8, offset: int = 0, twice: bool = False
) -> bytes:
    """One Q8_0 block of 34 bytes, or two entries for it."""
    entry = struct.pack("<Q", 1) + b"a" + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    head = b"GGUF" + struct.pack("<IQQ", version, 1 + twice, 0) + entry * (1 + twice)
    return head + bytes(-len(head) % 32) + bytes(64)


DAMAGE = {
    "magic": (b"GGML" + raw_gguf()[4:], "does not start as a GGUF file does"),
    "empty": (b"", "does not start as a GGUF file does"),
    "html": (b"<html>not found</html>", "does not start as a GGUF file does"),
    "magic alone": (b"GGUF", "truncated: the GGUF header ends"),
    "cut in the header": (raw_gguf()[:40], "truncated|announces"),
    "cut in the data": (raw_gguf()[:-40], r"truncated: tensor 'a' ends at byte \d+"),
    "version 1": (raw_gguf(version=1), "GGUF version 1 is not supported"),
    "big-endian": (raw_gguf(version=3 << 24), r"GGUF version \d+ is not supported"),
    "offset beyond the end": (raw_gguf(offset=2**40), "truncated: tensor 'a'"),
    "huge count": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(64), "announces 1152921504606846976 values"),
    "huge metadata": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(64), "announces"),
    "many axes": (raw_gguf(shape=(1,) * 9), "has 9 axes"),
    "half a block": (raw_gguf(shape=(33,)), r"'a' \[33\] is no whole number of Q8_0's blocks of 32"),
    "unknown type": (raw_gguf(kind=16), "has GGML type 16, which is not supported; known: F32, F16, BF16, Q4_0"),
    "twice": (raw_gguf(twice=True), "tensor 'a' is listed twice"),
    "huge shape": (raw_gguf(shape=(2**62, 2**62)), "impossible shape"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused_in_words(case: str, tmp_path: Path) -> None:
    content, message = DAMAGE[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_the_undamaged_file_reads(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_gguf())
    header = find_packed(read_header(path)).header
    ((name, tensor),) = read_tensors(header)
    assert name == "a" and torch.equal(tensor, torch.zeros(32))


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "whole.gguf")
    whole, path = (tmp_path / "whole.gguf").read_bytes(), tmp_path / "cut.gguf"
    data = max(sum(info.span or ()) for info in read_header(tmp_path / "whole.gguf").tensors.values())
    for size in [*range(0, 400, 7), data - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_header(path)


def test_every_flipped_byte_of_the_header_is_read_or_refused(tmp_path: Path) -> None:
    written(tmp_path / "whole.gguf")
    whole, path = (tmp_path / "whole.gguf").read_bytes(), tmp_path / "flipped.gguf"
    refused = 0
    for at in range(0, 440, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            read_header(path)
        except CheckpointError:
            refused += 1
    assert refused > 60
