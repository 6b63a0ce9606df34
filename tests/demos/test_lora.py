"""The shipped style LoRA: the same in every dialect, merged or beside the weights, and it shows."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny_lora
from closeness import relative_error
from demo.shipped import NIGHT, SHIPPED, STUDENT, T2V
from demo.stages.style import darkness
from lightx2v import LightX2VPipeline
from lightx2v.config import Engine
from lightx2v.identify import identify
from lightx2v.loading import load_transformer
from lightx2v.lora import Lora, apply_loras

CPU = torch.device("cpu")
PROMPT = {"seed": 3, "prompt": "a red square moves right over a white background"}


def base() -> nn.Module:
    return load_transformer(identify(T2V), Engine(), CPU)


def pairs(model: nn.Module) -> tiny_lora.Factors:
    """The LoRA's factors by layer, scaled so that `tiny_lora.tensors` with alpha = rank / 2 gives the file's change."""
    file, found = load_file(NIGHT), {}
    for name, layer in model.named_modules():
        stem = f"lora_unet_{name.replace('.', '_')}"
        if isinstance(layer, nn.Linear) and f"{stem}.lora_down.weight" in file:
            down, up = file[f"{stem}.lora_down.weight"].float(), file[f"{stem}.lora_up.weight"].float()
            found[name] = (down, up * float(file[f"{stem}.alpha"]) / down.shape[0] * 2)
    return found


@pytest.fixture(scope="module")
def truth() -> dict[str, Tensor]:
    model = base()
    apply_loras(model, None, [Lora(NIGHT)], "merge")
    return tiny_lora.state(model)


@pytest.mark.parametrize("dialect", ["kohya", "peft", "diffusers", "comfy", "kijai", "lightx2v"])
def test_every_dialect_gives_the_same_weights(dialect: str, truth: dict[str, Tensor], tmp_path: Path) -> None:
    model = base()
    before, factors = tiny_lora.state(model), pairs(model)
    assert len(factors) == 60
    rank = next(iter(factors.values()))[0].shape[0]
    content = tiny_lora.tensors(factors, dialect, torch.tensor(rank / 2))
    apply_loras(model, None, [Lora(tiny_lora.write(tmp_path / f"{dialect}.safetensors", content))], "merge")
    for name, weight in model.state_dict().items():
        assert relative_error(weight, truth[name]) < 1e-6
        if name.removesuffix(".weight") in factors:
            assert relative_error(before[name], truth[name]) > 1e-3


def clip(pipe: LightX2VPipeline) -> Tensor:
    video = pipe.generate(**PROMPT, return_result_tensor=True, progress=False)["video"]
    assert video is not None
    return video


def test_merged_and_beside_the_weights_make_the_same_clip_and_it_is_dark() -> None:
    pipe = SHIPPED["night"].pipeline(infer_steps=8)
    merged = clip(pipe)
    pipe.enable_lora([{"path": NIGHT}], lora_dynamic_apply=True)
    beside = clip(pipe)
    pipe.switch_lora("")
    without = clip(pipe)
    assert (merged - beside).abs().max() < 2e-3
    dark, plain = (float(darkness(video.permute(3, 0, 1, 2)[None] * 2 - 1)) for video in (merged, without))
    assert dark > 0.8 and plain < 0.4
    pipe.switch_lora(NIGHT)
    assert torch.equal(clip(pipe), beside)


def test_the_student_is_four_passes() -> None:
    pipe = SHIPPED["4step"].pipeline()
    steps = []
    video = pipe.generate(
        **PROMPT, return_result_tensor=True, progress=False, on_step=lambda step, x0: steps.append(step.sigma)
    )["video"]
    assert video is not None and steps == pytest.approx([1.0, 0.9375, 0.83333, 0.625], abs=1e-5)
    assert STUDENT.stat().st_size < 1.3e6
