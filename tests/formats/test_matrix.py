"""Every variant in every layout: what comes out of the file is what went in, and draws the same."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from writers import WRITERS, Writer

from lightx2v.config import Engine
from lightx2v.identify import identify
from lightx2v.loading import load_transformer
from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v_kernels import select

CPU = torch.device("cpu")
KERNELS = select(device=CPU, dtype=torch.float32, head_dim=128)


@dataclass(frozen=True)
class Variant:
    name: str
    in_channels: int
    out_channels: int
    image_dim: int = 0
    image_positions: int = 0


VARIANTS = {
    "t2v": Variant("wan2.1_t2v", 16, 16),
    "i2v_36_channels": Variant("wan2.2_i2v", 36, 16),
    "i2v_clip": Variant("wan2.1_i2v", 36, 16, image_dim=32),
    "flf2v": Variant("wan2.1_flf2v", 36, 16, image_dim=32, image_positions=6),
    "ti2v": Variant("wan2.2_ti2v", 48, 48),
}


def config(variant: Variant) -> WanConfig:
    return WanConfig(
        hidden_size=256,
        ffn_size=320,
        num_layers=2,
        in_channels=variant.in_channels,
        out_channels=variant.out_channels,
        text_dim=64,
        freq_dim=32,
        patch_size=(1, 2, 2),
        image_dim=variant.image_dim,
        image_positions=variant.image_positions,
    )


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, variant in VARIANTS.items():
        generator = torch.Generator().manual_seed(len(found))
        with torch.device("meta"):
            shapes = {key: t.shape for key, t in WanTransformer(config(variant), KERNELS).state_dict().items()}
        found[name] = {key: torch.randn(shape, generator=generator) / 8 for key, shape in shapes.items()}
    return found


def drawn(network: nn.Module, variant: Variant) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    further = {}
    if variant.image_dim:
        further["clip"] = torch.randn(1, 6, variant.image_dim, generator=generator)
    with torch.no_grad():
        return network(
            torch.randn(1, variant.in_channels, 2, 4, 4, generator=generator),
            torch.tensor([500.0]),
            torch.randn(1, 5, 64, generator=generator),
            **further,
        )


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
@pytest.mark.parametrize("name", VARIANTS)
def test_what_went_in_comes_out(name: str, writer: Writer, states: dict, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    path, expected = writer(states[name], tmp_path / "models")
    info = identify(path)
    assert (info.spec.name, (info.format, info.scheme)) == (variant.name, WRITERS[writer])
    assert info.quantised == (info.scheme in ("fp8", "int8", "gguf"))
    network = load_transformer(info, Engine(dtype="fp32"), CPU)
    loaded = network.state_dict()
    assert loaded.keys() == expected.keys()
    for key, tensor in expected.items():
        assert loaded[key].dtype == torch.float32 and torch.equal(loaded[key], tensor), key
    reference = WanTransformer(config(variant), KERNELS)
    reference.load_state_dict(expected)
    assert torch.equal(drawn(network, variant), drawn(reference, variant))


def test_the_layouts_are_not_all_the_same(states: dict, tmp_path: Path) -> None:
    """Quantised weights differ from the original ones, by no more than a row's or tensor's step."""
    state = states["t2v"]
    for writer, (_, scheme) in WRITERS.items():
        if scheme in ("fp8", "int8", "gguf"):
            _, expected = writer(state, tmp_path / writer.__name__)
            key = "blocks.1.ffn.0.weight"
            error = (expected[key] - state[key]).abs().max() / state[key].abs().max()
            assert 0 < error < 0.13, writer.__name__


def test_compute_dtype_of_quantised_files(states: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = next(writer for writer in WRITERS if writer.__name__ == "lightx2v_fp8")
    path, expected = writer(states["t2v"], tmp_path / "models")
    with caplog.at_level("INFO"):
        network = load_transformer(identify(path), Engine(dtype="bf16"), CPU)
    assert "fp8 weights (e4m3, a scale a row)" in caplog.text
    found = network.get_parameter("blocks.0.ffn.0.weight")
    assert torch.equal(found, expected["blocks.0.ffn.0.weight"].bfloat16())
    assert network.get_parameter("blocks.0.norm3.weight").dtype == torch.float32
