"""LoRAs that are not applied, or not wholly: what is reported, and what is refused in words."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightx2v.checkpoint import CheckpointError
from lightx2v.lora import (
    Lora,
    apply_loras,
    for_expert,
    is_lora,
)
from tiny_lora import (
    assert_same,
    factors,
    pair,
    state,
    tensors,
    transformer,
    write,
)

FILE = "a.safetensors"
ALPHA_KEY = "diffusion_model.blocks.0.self_attn.q.alpha"


Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.fixture
def model() -> nn.Module:
    return transformer()


def test_the_line_and_what_was_left_over(model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = tensors({"blocks.0.ffn.0": factors(model)["blocks.0.ffn.0"]}, "comfy")
    content |= {f"diffusion_model.blocks.{n}.cross_attn.k_img.lora_A": torch.zeros(4, 256) for n in (0, 1)}
    content |= {f"diffusion_model.blocks.{n}.cross_attn.k_img.lora_B": torch.zeros(256, 4) for n in (0, 1)}
    content["lora_te_text_model.lora_down.weight"] = torch.zeros(4, 8)
    content["diffusion_model.blocks.0.extra.weight"] = torch.zeros(4)
    content["diffusion_model.blocks.7.ffn.0.alpha"] = torch.tensor(1.0)
    with caplog.at_level(logging.INFO):
        applied = apply_loras(model, None, [Lora(write(tmp_path / FILE, content), 1.0)])
    line, warning = [record.getMessage() for record in caplog.records]
    assert line == "a.safetensors: 3 of 10 tensors applied (rank 4, scale 0.5 x strength 1)" == applied.lines()[0]
    assert warning.startswith("a.safetensors: 7 tensors not applied: ") and warning.endswith("; and 2 more")
    assert caplog.records[1].levelno == logging.WARNING
    (coverage,) = applied.coverage
    assert coverage.applied | set(coverage.skipped) == set(content) and not coverage.applied & set(coverage.skipped)
    assert coverage.skipped["lora_te_text_model.lora_down.weight"] == "changes a text encoder, not this model"
    assert coverage.skipped["diffusion_model.blocks.0.extra.weight"] == "is not a LoRA's tensor"
    assert coverage.skipped["diffusion_model.blocks.7.ffn.0.alpha"] == "scales a layer that is not in the file"
    reason = "names a layer that this model does not have"
    assert coverage.skipped["diffusion_model.blocks.1.cross_attn.k_img.lora_B"] == reason


def test_a_few_of_another_shape_are_left_out(model: nn.Module, tmp_path: Path) -> None:
    """A text-to-video LoRA on an image-to-video model: only the layer that reads the latents differs."""
    content = tensors(factors(model), "comfy")
    content["diffusion_model.patch_embedding.diff"] = torch.zeros(256, 36, 1, 2, 2)
    (coverage,) = apply_loras(model, None, [Lora(write(tmp_path / FILE, content))]).coverage
    assert coverage.skipped == {
        "diffusion_model.patch_embedding.diff": "is for 256 x 36 x 2 x 2, "
        "the model's 'patch_embedding.weight' is 256 x 16 x 1 x 2 x 2"
    }


def refuse(content: dict[str, Tensor], folder: Path, metadata: dict[str, str] | None = None) -> str:
    path = write(folder / FILE, content, metadata)
    model = transformer()
    before = state(model)
    with pytest.raises(CheckpointError) as caught:
        apply_loras(model, None, [Lora(path)])
    assert str(path) in str(caught.value)
    assert_same(model, before)
    return str(caught.value)


def test_another_width_names_both_shapes(tmp_path: Path) -> None:
    layer = "diffusion_model.blocks.0.self_attn.q"
    content = {f"{layer}.lora_down.weight": torch.zeros(8, 384), f"{layer}.lora_up.weight": torch.zeros(384, 8)}
    told = refuse({**content, "diffusion_model.blocks.0.self_attn.q.diff_b": torch.zeros(384)}, tmp_path)
    assert "made for another model" in told
    assert "'diffusion_model.blocks.0.self_attn.q.lora_up.weight' is for 384 x 384" in told
    assert "the model's 'blocks.0.self_attn.q.weight' is 256 x 256" in told


def test_more_layers_of_another_shape_than_fit(tmp_path: Path) -> None:
    """One layer happens to have a size of the model's; that does not make it this model's LoRA."""
    content = pair(4)
    for layer in ("k", "v"):
        content[f"diffusion_model.blocks.0.self_attn.{layer}.lora_A.weight"] = torch.zeros(4, 384)
        content[f"diffusion_model.blocks.0.self_attn.{layer}.lora_B.weight"] = torch.zeros(384, 4)
    assert "is for 384 x 384, the model's" in refuse(content, tmp_path)


def test_no_layer_of_the_model_names_both_shapes(tmp_path: Path) -> None:
    layer = "lora_unet_double_blocks_0_img_attn_q"
    content = {f"{layer}.lora_down.weight": torch.zeros(8, 2048), f"{layer}.lora_up.weight": torch.zeros(2048, 8)}
    told = refuse(content, tmp_path)
    assert "none of its 1 layers is in the model" in told and "is for 2048 x 2048" in told
    assert "the model has for example 'text_embedding.0.weight', 256 x 64" in told


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({f"{Q}.dora_scale": torch.ones(256)}, "holds DoRA layers ("),
        ({f"{Q}.lora_magnitude_vector": torch.ones(256)}, "holds DoRA layers ("),
        ({f"{Q}.lora_magnitude_vector.default.weight": torch.ones(256)}, "holds DoRA layers ("),
        ({f"{Q}.hada_w1_a": torch.ones(4, 4)}, "holds LoHa layers ("),
        ({f"{Q}.lokr_w1": torch.ones(4, 4)}, "holds LoKr layers ("),
        ({f"{Q}.a1.weight": torch.ones(4, 4)}, "holds GLoRA layers ("),
        ({f"{Q}.oft_blocks": torch.ones(4, 4)}, "holds OFT layers ("),
        ({f"{Q}.lora_mid.weight": torch.ones(4, 4, 1, 1)}, "holds Tucker layers ("),
        ({ALPHA_KEY: torch.tensor(float("nan"))}, r"q.alpha' is nan, expected a number"),
        ({ALPHA_KEY: torch.ones(2)}, "q.alpha' must be one number, is [2]"),
        ({f"{Q}.lora_A.other.weight": torch.ones(4, 256)}, "change the same layer; keep one adapter in a file"),
        ({"diffusion_model.blocks.0.self_attn.k.lora_up.weight": torch.ones(256, 4)}, "lacks its counterpart"),
        ({"diffusion_model.blocks.0.self_attn.k.lora_B.bias": torch.ones(256)}, "lacks its counterpart"),
        (
            {
                "diffusion_model.blocks.0.self_attn.k.lora_up.weight": torch.ones(256, 4),
                "diffusion_model.blocks.0.self_attn.k.lora_down.weight": torch.ones(5, 256),
            },
            "self_attn.k.lora_down.weight' [5, 256] are no factors of one matrix",
        ),
    ],
)
def test_files_that_cannot_be_applied_as_they_are(extra: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    assert words in refuse({**pair(4), **extra}, tmp_path)


def test_files_without_a_layer(tmp_path: Path) -> None:
    assert "changes only a text encoder" in refuse({"lora_te1_a.lora_down.weight": torch.ones(2, 2)}, tmp_path)
    whole = {name: tensor for name, tensor in transformer().state_dict().items()}
    assert "holds no LoRA tensors; it is" in refuse(whole, tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"lora_alpha": "much"}', '{"lora_alpha": 1, "alpha_pattern": {"(": 1}}'])
def test_damaged_settings(text: str, tmp_path: Path) -> None:
    told = refuse(pair(4), tmp_path, {"lora_adapter_metadata": text})
    assert "its metadata 'lora_adapter_metadata' is damaged" in told


def test_a_missing_file_is_named(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: no such file"):
        apply_loras(model, None, [Lora(tmp_path / "absent.safetensors")])


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "1", None, True])
def test_a_strength_that_is_no_number(strength: object) -> None:
    with pytest.raises(ValueError, match=r"a\.safetensors: LoRA strength must be a finite number"):
        Lora(Path(FILE), strength)  # type: ignore[arg-type]


def test_unknown_words() -> None:
    with pytest.raises(ValueError, match="expert='middle' is not one of both, high, low"):
        Lora(Path(FILE), expert="middle")
    with pytest.raises(ValueError, match="how='hook' is not one of auto, merge, branch"):
        apply_loras(nn.Linear(2, 2), None, [], "hook")


def test_is_lora(tmp_path: Path) -> None:
    assert is_lora(write(tmp_path / FILE, pair(4)))
    with pytest.raises(CheckpointError):
        is_lora(write(tmp_path / "model.safetensors", {"blocks.0.weight": torch.ones(1)}))


def test_each_expert_gets_its_own() -> None:
    both, high, low = (Lora(Path(f"{expert}.safetensors"), expert=expert) for expert in ("both", "high", "low"))
    assert for_expert([both, high, low], "high") == (both, high)
    assert for_expert([both, high, low], "low") == (both, low)
    assert for_expert([both], None) == (both,)
    with pytest.raises(ValueError, match=r"high\.safetensors: is set for the high-noise expert, but one network"):
        for_expert([both, high, low], None)


def test_a_name_that_says_the_other_expert(caplog: pytest.LogCaptureFixture) -> None:
    name = Path("wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors")
    assert for_expert([Lora(name, expert="high")], "low") == ()
    with pytest.raises(ValueError, match=r"is for the high-noise expert by its name.*set its expert to 'high'"):
        for_expert([Lora(name, expert="low")], "high")
    for_expert([Lora(name)], "high")
    for_expert([Lora(name)], None)
    assert not caplog.records
    for_expert([Lora(name)], "low")
    assert "goes to the low-noise one too; set its expert to 'high'" in caplog.text
