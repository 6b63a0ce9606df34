"""HunyuanVideo-1.5 on a CUDA device: the whole way with small models, and one pass at its real size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from closeness import relative_error
from lightx2v.latents import HUNYUAN15
from lightx2v.memory import TEXT_ENCODER_ACTIVATION_BYTES, transformer_activation_bytes
from lightx2v.models.hunyuan_video_15.config import HunyuanConfig
from lightx2v.models.hunyuan_video_15.transformer import Conditioning, HunyuanTransformer
from lightx2v.text import qwen
from lightx2v.text.resting import Widened
from lightx2v_kernels import select
from tiny_hunyuan_folder import pipeline, video, write_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# As published: 8.3 B parameters.
PUBLISHED = HunyuanConfig(2048, 8192, 54, 2, 8192, 65, 32, 3584, 1472, 2048, 1152, 256, (1, 1, 1))
QWEN_7B = qwen.Sizes(152064, 3584, 28, 4, 18944, 28)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("hunyuan"))


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_video_is_the_cpus(folder: Path, tmp_path: Path, task: str) -> None:
    """fp32 but for the VAE, which is bf16 on a GPU; and whole, passing through and visiting the GPU it is the same."""
    Image.effect_noise((60, 40), 80).convert("RGB").save(tmp_path / "first.png")
    given = {"prompt": 'a red cat says "MEOW"', **({"image_path": tmp_path / "first.png"} if task == "i2v" else {})}
    truth = video(pipeline(folder, task=task, dtype="fp32"), **given)
    found = {}
    for way in ("auto", "block", "model"):
        pipe = pipeline(folder, task=task, dtype="fp32", device="cuda")
        if way != "auto":
            pipe.enable_offload(cpu_offload=True, offload_granularity=way, vae_offload=True)
        found[way] = video(pipe, **given)
    assert relative_error(found["auto"], truth) < 0.05
    assert torch.equal(found["block"], found["auto"]) and torch.equal(found["model"], found["auto"])


def test_a_pass_of_the_published_size_fits_its_estimate() -> None:
    """848 x 480, 121 frames, bf16: 31 latent frames of 30 x 53 tokens."""
    kernels = select(device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=128)
    with torch.device("cuda"):
        model = HunyuanTransformer(PUBLISHED, kernels).to(torch.bfloat16).eval().requires_grad_(False)
        asked = Conditioning(
            torch.randn(1, 300, 3584), glyphs=torch.randn(1, 40, 1472), image=torch.randn(1, 729, 1152)
        )
        latents = torch.randn(1, 65, 31, 30, 53)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    assert not model(latents, torch.tensor([800.0], device="cuda"), asked).isnan().any()
    info = SimpleNamespace(config=PUBLISHED, spec=SimpleNamespace(patch_size=(1, 1, 1), latents=HUNYUAN15))
    estimate = transformer_activation_bytes(info, (1, 32, 31, 30, 53), torch.bfloat16)  # type: ignore[arg-type]
    used = torch.cuda.max_memory_allocated() - held
    assert used <= estimate, f"{used / 1e9:.2f} GB, estimated {estimate / 1e9:.2f}"


def test_the_language_model_of_the_published_size_fits_its_estimate() -> None:
    model = qwen.empty(QWEN_7B)
    model.to_empty(device="cuda").to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.rotary_emb = type(model.rotary_emb)(config=model.config).cuda()
    for index, block in enumerate(model.layers):
        model.layers[index] = Widened(block)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with torch.no_grad():
        given = model.embed_tokens(torch.randint(150000, (1, 1108), device="cuda")).float()
        assert model(inputs_embeds=given, use_cache=False).last_hidden_state.isfinite().all()
    used = torch.cuda.max_memory_allocated() - held
    assert used <= TEXT_ENCODER_ACTIVATION_BYTES, f"{used / 1e9:.2f} GB"
