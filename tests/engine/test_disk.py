"""Weights that stay in their file: the same video, from every layout, while RAM holds a part of the model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightx2v.checkpoint import CheckpointError, read_header, read_into, read_tensors
from lightx2v.config import Engine
from lightx2v.identify import identify
from lightx2v.loading import load_transformer
from lightx2v.offload.disk import left_in_file
from lightx2v.offload.plan import GB, RAM_RESERVE, Machine, Needs, Sizes, plan
from lightx2v.offload.stream import BlockStream
from lightx2v.quant.packing import filling, quantise_weight
from tiny_cache import CPU
from tiny_pipeline import lora, pipeline, plan_of, video, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


def split(checkpoint: Path, into: Path) -> Path:
    """One file a block, in half precision."""
    into.mkdir()
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(checkpoint).items():
        parts = name.split(".")
        file = f"block_{parts[1]}" if parts[0] == "blocks" else "non_block"
        files.setdefault(file, {})[name] = tensor.to(torch.bfloat16)
    for file, tensors in files.items():
        save_file(tensors, into / f"{file}.safetensors")
    return into


def packed(checkpoint: Path, path: Path) -> Path:
    """The matrices of blocks in int8 with a scale a row, as LightX2V's files have them."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(checkpoint).items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            tensors[name], scale = quantise_weight(tensor, torch.int8, name)
            tensors[f"{name}_scale"] = scale[:, None].contiguous()
        else:
            tensors[name] = tensor
    save_file(tensors, path)
    return path


def passes(stream: BlockStream, resident: int, prefetch: int) -> list[Tensor]:
    """Three walks in a row over the blocks, as a network would do."""
    x, outputs = torch.randn(1, 24, 128, generator=torch.Generator().manual_seed(1)), []

    def run(blocks, tokens, args):
        for block in blocks:
            tokens = block(tokens, args)
        return tokens

    with stream.open(resident, prefetch), torch.inference_mode():
        for _ in range(3):
            network = stream.bring()
            calls = [lambda tokens, args, block=block: weigh(block, tokens) for block in network.blocks]
            outputs.append(stream.around(run, "")(calls, x, None))
    return outputs


def weigh(block: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Something that depends on every bit of a block's weights."""
    total = sum(parameter.double().mul(1 + index).sum() for index, parameter in enumerate(block.parameters()))
    return tokens * 0.5 + total.float()


@pytest.mark.parametrize("layout", ["single", "block-split", "other type", "int8 on the way", "int8"])
@pytest.mark.parametrize(("resident", "prefetch"), [(0, 1), (1, 1), (0, 0), (2, 1)])
def test_what_is_read_from_the_file_is_what_was_in_ram(
    checkpoint: Path, tmp_path: Path, layout: str, resident: int, prefetch: int
) -> None:
    path = split(checkpoint, tmp_path / "split") if layout in ("block-split", "other type") else checkpoint
    path = packed(checkpoint, tmp_path / "wan2.1_t2v_int8.safetensors") if layout == "int8" else path
    quant = "int8" if layout.startswith("int8") else "auto"
    info, engine = identify(path), Engine(dtype="bf16" if layout == "block-split" else "fp32", quant=quant)
    whole = BlockStream({"": load_transformer(info, engine, CPU)}, CPU)
    expected = passes(whole, resident, prefetch)
    for count in (1, 2):
        network = load_transformer(info, engine, CPU, left=lambda network, count=count: left_in_file(network, count))
        left = [name for name, parameter in network.named_parameters() if parameter.is_meta]
        nbytes = sum(parameter.nbytes for parameter in network.parameters() if parameter.is_meta)
        assert left and all(name.endswith(".weight") for name in left)
        stream = BlockStream({"": network}, CPU, headers={"": filling(network, info.header, CPU)})
        for _ in range(2):
            found = passes(stream, resident, prefetch)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert [name for name, parameter in network.named_parameters() if parameter.is_meta] == left
        rest = stream.host_bytes - 2 * max(slab.nbytes - slab.kept for slab in stream._hosts[""].blocks)
        assert rest == whole.host_bytes - nbytes and nbytes > 100_000 * count
        stream.release()


def test_a_pipeline_with_little_ram_makes_the_same_video(folder: Path, tmp_path: Path) -> None:
    pipe = pipeline(folder)
    configs = [{"path": str(lora(folder, tmp_path / "lora.safetensors")), "strength": 0.5}]
    pipe.enable_lora(configs, lora_dynamic_apply=True)
    expected = video(pipe)
    pipe.enable_offload(True, ram_budget_gb=1e-6)
    pipe.enable_lora(configs)  # would be merged, were all weights in RAM
    assert torch.equal(video(pipe), expected)
    made = plan_of(pipe)
    assert made.filed == 2 and "2 blocks are read from the file as they are needed" in made.line()
    (network,) = pipe._parts._transformers
    assert network.blocks[1].ffn[0].weight.is_meta and torch.equal(video(pipe), expected)
    assert pipe._parts._transformers[0] is network, "nothing is loaded again"
    pipe.enable_offload(True)
    pipe.enable_lora(configs, lora_dynamic_apply=True)
    assert torch.equal(video(pipe), expected) and not plan_of(pipe).filed
    with pytest.raises(ValueError, match="ram_budget_gb=-1"):
        pipe.enable_offload(True, ram_budget_gb=-1)
    with pytest.raises(ValueError, match="ram_budget_gb=4 changes nothing for whole models"):
        pipe.enable_offload(True, "model", ram_budget_gb=4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"], ids=["as it lies", "converted"])
def test_a_file_that_is_gone_cut_or_replaced_is_said(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    copy, away = tmp_path / "wan2.1_t2v.safetensors", tmp_path / "away"
    copy.write_bytes(checkpoint.read_bytes())
    info = identify(copy)
    network = load_transformer(info, Engine(dtype=dtype), CPU, left=lambda network: left_in_file(network, 2))
    stream = BlockStream({"": network}, CPU, headers={"": info.header})
    expected = passes(stream, 0, 1)
    copy.rename(away)
    with pytest.raises(CheckpointError, match="is gone since the model was loaded; put it back"):
        passes(stream, 0, 1)
    copy.write_bytes(checkpoint.read_bytes())  # of the same size, and perhaps of another training
    with pytest.raises(CheckpointError, match=r"wan2\.1_t2v\.safetensors: has changed since the model was loaded"):
        passes(stream, 0, 1)
    with copy.open("r+b") as file:
        file.truncate(copy.stat().st_size // 8)
    with pytest.raises(CheckpointError, match="has changed"):
        passes(stream, 0, 1)
    away.replace(copy)
    found = passes(stream, 0, 1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "it goes on once the file is back"


def test_a_file_that_is_cut_while_it_is_read_ends_no_process(checkpoint: Path, tmp_path: Path) -> None:
    """Of a mapped one the next look would be a SIGBUS."""
    copy = tmp_path / "wan2.1_t2v.safetensors"
    copy.write_bytes(checkpoint.read_bytes())
    reading = read_tensors(read_header(copy))
    next(reading)
    with copy.open("r+b") as file:
        file.truncate(copy.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="ends within"):
        for _, tensor in reading:
            tensor.sum()


def test_a_file_that_is_written_to_while_it_is_read_is_said(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "wan2.1_t2v.safetensors"
    copy.write_bytes(checkpoint.read_bytes())
    reading = read_tensors(read_header(copy))
    next(reading)
    with copy.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"1234")
    with pytest.raises(CheckpointError, match="has changed"):
        list(reading)


def test_reading_into_memory_converts_where_it_must(checkpoint: Path) -> None:
    header = read_header(checkpoint)
    name = "blocks.0.ffn.0.weight"
    truth = load_file(checkpoint)[name]
    for dtype in (torch.float32, torch.bfloat16):
        target = torch.full(truth.shape, float("nan"), dtype=dtype)
        read_into(header, name, target)
        assert torch.equal(target, truth.to(dtype))


BLOCKS = Sizes((int(GB),) * 40, int(GB))


@pytest.mark.parametrize(("free", "filed"), [(60, 0), (43, 0), (42, 3), (33, 12), (20, 25), (5, 40), (1, 40)])
def test_as_few_blocks_stay_in_the_file_as_ram_allows(free: int, filed: int) -> None:
    needs, machine = Needs((BLOCKS,), int(GB)), Machine(8 * int(GB), free * int(GB), 0)
    made = plan(needs, machine)
    assert made.filed == filed and made.reading == filed * int(GB)
    assert made.ram == 41 * GB - made.reading + (2 * GB if filed else 0)
    assert filed == 40 or made.ram <= free * GB - RAM_RESERVE
    assert ("read from the file" in made.line()) == bool(filed)
    assert not plan(needs, replace(machine, free_vram=100 * int(GB))).filed, "a whole model needs no RAM"


def test_ram_that_comes_and_goes_lets_nothing_be_read_again() -> None:
    made = plan(Needs((BLOCKS,), int(GB)), Machine(8 * int(GB), 33 * int(GB), 0))
    assert made.filed == 12 and [filed for filed in range(41) if made.suits(filed)] == list(range(11, 25))
    assert [filed for filed in range(41) if replace(made, filed=0, reading=0).suits(filed)] == [0]
