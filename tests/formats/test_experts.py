"""Two files as the experts of Wan2.2 A14B: which pairs are taken, and what is said of the others."""

from pathlib import Path

import pytest
from sparse import manifest, write

from host.tiny_models import write_transformer
from lightx2v.checkpoint import CheckpointError
from lightx2v.experts import require_pair
from lightx2v.identify import CheckpointInfo, identify

T2V, I2V = "lightx2v_wan2.2_t2v_A14B_distill_bf16", "lightx2v_wan2.2_i2v_A14B_distill_bf16"
FP8 = "lightx2v_wan2.2_t2v_A14B_fp8"


def info(folder: Path, name: str, layout: str = T2V) -> CheckpointInfo:
    return identify(write(manifest(layout)["tensors"], folder / "models" / f"{name}.safetensors"))


@pytest.mark.parametrize(
    ("high", "low"), [("high_noise", "low_noise"), ("a", "b"), ("high_noise", "b"), ("a", "LowNoise")]
)
@pytest.mark.parametrize("layout", [T2V, FP8])
def test_pairs(high: str, low: str, layout: str, tmp_path: Path) -> None:
    require_pair(info(tmp_path, high), info(tmp_path, low, layout))


def test_experts_may_differ_in_depth(tmp_path: Path) -> None:
    deep, shallow = (
        identify(write_transformer(tmp_path / f"{name}.safetensors", num_layers=depth))
        for name, depth in (("high_noise", 3), ("low_noise", 2))
    )
    require_pair(deep, shallow)


@pytest.mark.parametrize(
    ("high", "low", "words"),
    [
        (("low_noise", T2V), ("high_noise", T2V), "swapped by their names: low_noise.safetensors is picked for high"),
        (("high_noise", T2V), ("high_noise_2", T2V), "both high-noise experts by their names; pick the low-noise file"),
        (("low_noise", T2V), ("low_noise_2", T2V), "both low-noise experts by their names; pick the high-noise file"),
        (("low_noise", T2V), ("b", T2V), "a low-noise expert by its name, but is picked for high"),
        (("a", T2V), ("high_noise", T2V), "a high-noise expert by its name, but is picked for low"),
        (("a", T2V), ("a", T2V), "picked as both experts"),
        (("high_noise", T2V), ("low_noise", I2V), "they differ in task or size"),
        (("high_noise", T2V), ("low_noise", "wan2.1_t2v_1.3B"), "they differ in task or size"),
        (("high_noise", "wan2.2_ti2v_5B"), ("low_noise", T2V), "Wan2.2 TI2V 5B, a model of its own; load it with"),
        (("high_noise", I2V), ("low_noise", "wan2.1_i2v_14B"), "picked as the low-noise expert, but is Wan2.1 I2V 14B"),
    ],
)  # fmt: skip
def test_others_are_refused_in_words(high: tuple[str, str], low: tuple[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        require_pair(info(tmp_path, *high), info(tmp_path, *low))
