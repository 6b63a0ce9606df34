"""Two processes over one copy of a model's weights: the same network, and half the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from host.tiny_models import transformer_shapes
from lightx2v.blocks import run_blocks
from lightx2v.checkpoint import CheckpointError
from lightx2v.config import Engine, Parallel
from lightx2v.heap import trim_heap
from lightx2v.identify import identify
from lightx2v.loading import build_transformer, fill
from lightx2v.lora import Lora, apply_loras
from lightx2v.offload.disk import left_in_file
from lightx2v.offload.stream import BlockStream
from lightx2v.parallel.mesh import join
from lightx2v.parallel.shared import share_weights
from ranks import Ranks
from tiny_lora import factors, tensors

CPU = torch.device("cpu")
TWO = Parallel(ulysses=2)
DEMO = Path(__file__).resolve().parents[2] / "demo" / "models"

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="needs Linux's /proc and memfd")


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def shared(path: Path, engine: Engine, loras: Sequence[Lora], how: str, left: int) -> nn.Module:
    info = identify(path)

    def read() -> tuple[nn.Module, ...]:
        network = build_transformer(info, engine, CPU)
        names = left_in_file(network, left)
        fill(network, info, CPU, only=lambda name: name not in names)
        apply_loras(network, info, loras, how)
        return (network,)

    return share_weights(join(TWO, CPU), [info.header], read, lambda: (build_transformer(info, engine, CPU),))[0]


def pass_of(path: Path, engine: Engine, loras: Sequence[Lora] = (), how: str = "auto", left: int = 0) -> torch.Tensor:
    """What one pass of a network makes whose blocks are streamed from the one copy."""
    network = shared(path, engine, loras, how, left)
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, 2, 8, 8, generator=generator), torch.randn(1, 5, 4096, generator=generator)
    stream = BlockStream({"": network}, CPU, headers={"": identify(path).header})
    with torch.inference_mode(), stream.open(0):
        made = stream.bring()(latents, torch.tensor([500.0]), text, run=stream.around(run_blocks, None))
    stream.release()
    return made


T2V = DEMO / "wan2.1_t2v" / "diffusion_pytorch_model.safetensors"
LORA = DEMO / "loras" / "wan_t2v_night_lora_rank8.safetensors"
EIGHT = DEMO / "variants" / "wan_t2v_high_noise_fp8_e4m3.safetensors"
CASES = {
    "plain": (T2V, Engine()),
    "int8": (T2V, Engine(quant="int8")),
    "merged": (T2V, Engine(), [Lora(LORA)], "merge"),
    "beside": (T2V, Engine(quant="int8"), [Lora(LORA)], "branch"),
    "an fp8 file": (EIGHT, Engine(), [Lora(LORA)], "auto"),
    "half in the file": (T2V, Engine(dtype="fp16"), [Lora(LORA)], "branch", 4),
}


@pytest.mark.parametrize("case", CASES)
def test_both_see_the_network_that_one_has_read(two: Ranks, case: str) -> None:
    path, engine, *more = CASES[case]
    first, second = two.run(pass_of, path, engine, *more)
    assert first.isfinite().all() and torch.equal(first, second)
    network, info = build_transformer(identify(path), engine, CPU), identify(path)
    fill(network, info, CPU)
    apply_loras(network, info, *more[:2] if more else [()])
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, 2, 8, 8, generator=generator), torch.randn(1, 5, 4096, generator=generator)
    with torch.inference_mode():
        torch.testing.assert_close(first, network(latents, torch.tensor([500.0]), text), rtol=1e-5, atol=1e-5)


def held_bytes() -> int:
    """This process's share of its memory: what n processes map counts a n-th in each of them."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def memory_of(path: Path) -> tuple[int, int]:
    """Bytes of the weights, and what they added to this process; also as a stream of blocks."""
    mesh = join(TWO, CPU)
    trim_heap()
    before = held_bytes()
    network = shared(path, Engine(), (), "auto", 0)
    stream = BlockStream({"": network}, CPU)
    trim_heap()
    torch.distributed.barrier(mesh.control)
    added = held_bytes() - before
    torch.distributed.barrier(mesh.control)
    stream.release()
    return sum(weight.nbytes for weight in network.parameters()), added


def test_two_processes_take_the_memory_of_one(two: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    shapes = transformer_shapes(hidden_size=1024, ffn_size=4096, num_layers=4)
    save_file({name: torch.full(shape, 0.01, dtype=torch.float16) for name, shape in shapes.items()}, path)
    two.run(memory_of, T2V)  # what a process takes once: modules, self-tests of kernels
    (weights, first), (_, second) = two.run(memory_of, path)
    assert weights > 250e6
    assert first + second < 1.15 * weights, f"{first / 1e6:.0f} + {second / 1e6:.0f} MB for {weights / 1e6:.0f} MB"


def test_a_bad_file_is_an_error_in_both(two: Ranks, tmp_path: Path) -> None:
    save_file(tensors(factors(nn.ModuleDict({"other": nn.Linear(8, 8)})), "kijai"), tmp_path / "other.safetensors")
    found = two.run(refusal_of_lora, tmp_path / "other.safetensors")
    assert found[0].startswith(CheckpointError.__name__)
    assert found[1].startswith("StoppedElsewhereError: process 0 of this video stopped")


def refusal_of_lora(path: Path) -> str:
    try:
        shared(T2V, Engine(), [Lora(path)], "auto", 0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
