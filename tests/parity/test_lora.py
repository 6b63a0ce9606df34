"""LoRAs against ComfyUI's own loader on its own Wan, and against PEFT on diffusers' where PEFT is installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from closeness import relative_error
from lightx2v.lora import Lora, apply_loras
from tiny_lora import CONFIG, diffusers_name, factors, tensors, transformer, write

TOLERANCE = 1e-6
STRENGTH = 0.7
# Those that ComfyUI maps onto Wan; it has no names of diffusers for it.
COMFYUI = ("kohya", "wan_fun", "comfy", "kijai", "diffsynth")


class Host(nn.Module):
    """As much of ComfyUI's model object as its LoRA loader looks at."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = network
        self.model_config = SimpleNamespace(unet_config={})


@pytest.fixture
def comfyui(comfy: object) -> Host:
    """ComfyUI's own Wan with our weights."""
    import comfy.ldm.wan.model
    import comfy.ops

    network = comfy.ldm.wan.model.WanModel(
        dim=CONFIG.hidden_size,
        ffn_dim=CONFIG.ffn_size,
        num_heads=CONFIG.num_heads,
        num_layers=CONFIG.num_layers,
        text_dim=CONFIG.text_dim,
        freq_dim=CONFIG.freq_dim,
        operations=comfy.ops.manual_cast,
        dtype=torch.float32,
        device="cpu",
    ).eval()
    network.load_state_dict(transformer().state_dict())
    return Host(network.requires_grad_(False))


def through_comfyui(host: Host, path: Path, strength: float) -> dict[str, Tensor]:
    """The weights after LoraLoaderModelOnly's way: load_lora_for_models, then every patch applied."""
    import comfy.model_patcher
    import comfy.sd

    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(host, cpu, cpu)
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, load_file(path), strength, 0.0)
    assert patched.patches
    for key in list(patched.patches):
        patched.patch_weight_to_device(key)
    return dict(patched.model.diffusion_model.state_dict())


def assert_same_weights(ours: nn.Module, theirs: dict[str, Tensor]) -> None:
    plain = transformer().state_dict()
    changed = 0
    for name, tensor in ours.state_dict().items():
        assert relative_error(tensor, theirs[name]) < TOLERANCE, name
        difference = relative_error(tensor, plain[name])
        changed += difference > 1e-3
    assert changed


@pytest.mark.parametrize("dialect", COMFYUI)
def test_a_dialect_as_comfyui_reads_it(dialect: str, comfyui: Host, tmp_path: Path) -> None:
    model = transformer()
    path = write(tmp_path / "a.safetensors", tensors(factors(model), dialect))
    apply_loras(model, None, [Lora(path, STRENGTH)])
    assert_same_weights(model, through_comfyui(comfyui, path, STRENGTH))


@pytest.mark.parametrize("alpha", [torch.tensor(8), torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor(3.0)])
def test_alphas_of_every_type(alpha: Tensor, comfyui: Host, tmp_path: Path) -> None:
    model = transformer()
    path = write(tmp_path / "a.safetensors", tensors(factors(model, rank=64), "comfy", alpha))
    apply_loras(model, None, [Lora(path, -STRENGTH)])
    assert_same_weights(model, through_comfyui(comfyui, path, -STRENGTH))


def test_whole_differences_beside_pairs(comfyui: Host, tmp_path: Path) -> None:
    """Kijai's files: factors for matrices, diff for norms and modulation, diff_b for every bias."""
    model = transformer()
    content = tensors(factors(model), "kijai")
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias":
            content[f"diffusion_model.{owner}.diff_b"] = 0.1 * torch.randn(parameter.shape)
        elif leaf == "weight" and parameter.ndim != 2:
            content[f"diffusion_model.{owner}.diff"] = 0.1 * torch.randn(parameter.shape)
        elif leaf == "modulation":
            content[f"diffusion_model.{name}.diff"] = 0.1 * torch.randn(parameter.shape)
    path = write(tmp_path / "a.safetensors", content)
    applied = apply_loras(model, None, [Lora(path, STRENGTH)])
    assert not applied.coverage[0].skipped
    theirs = through_comfyui(comfyui, path, STRENGTH)
    assert_same_weights(model, theirs)
    plain = transformer().state_dict()
    assert not [name for name, tensor in model.state_dict().items() if torch.equal(tensor, plain[name])]


def test_a_pair_of_convolutions(comfyui: Host, tmp_path: Path) -> None:
    model = transformer()
    key = "diffusion_model.patch_embedding.lora_"
    content = {f"{key}down.weight": torch.randn(4, 16, 1, 2, 2), f"{key}up.weight": torch.randn(256, 4, 1, 1, 1)}
    path = write(tmp_path / "a.safetensors", content)
    apply_loras(model, None, [Lora(path, STRENGTH)])
    assert_same_weights(model, through_comfyui(comfyui, path, STRENGTH))


def save(network: nn.Module, writer: str, folder: Path) -> Path:
    """The adapter of a diffusers transformer, in a file as `writer` writes it."""
    from diffusers import WanPipeline
    from peft import get_peft_model_state_dict

    if writer == "diffusers' model":
        network.save_lora_adapter(folder)
        return folder / "pytorch_lora_weights.safetensors"
    if writer == "diffusers' pipeline":
        WanPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(network),
            transformer_lora_adapter_metadata=network.peft_config["default"].to_dict(),
        )
        return folder / "pytorch_lora_weights.safetensors"
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("writer", ["diffusers' model", "diffusers' pipeline", "peft"])
def test_a_file_that_peft_wrote(writer: str, use_rslora: bool, tmp_path: Path) -> None:
    """Made there, saved there with its settings, read here: the same video."""
    peft = pytest.importorskip("peft")
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel(
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=128,
        text_dim=CONFIG.text_dim,
        freq_dim=CONFIG.freq_dim,
        ffn_dim=CONFIG.ffn_size,
        num_layers=CONFIG.num_layers,
    ).eval()
    theirs.load_state_dict({diffusers_name(name): tensor for name, tensor in transformer().state_dict().items()})
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=use_rslora,
        alpha_pattern={"attn1.to_q": 3},
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_out", "time_proj"],
    )
    if writer == "peft":
        theirs = peft.get_peft_model(theirs, config)
    else:
        theirs.add_adapter(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    path = save(theirs, writer, tmp_path)
    inputs = torch.randn(1, 16, 2, 4, 6), torch.tensor([1.0]), torch.randn(1, 5, CONFIG.text_dim)
    with torch.no_grad():
        expected = theirs(*inputs, return_dict=False)[0]
        plain = transformer()(*inputs)
    for how in ("merge", "branch"):
        ours = transformer()
        applied = apply_loras(ours, None, [Lora(path)], how)
        assert not applied.coverage[0].skipped
        with torch.no_grad():
            assert relative_error(ours(*inputs), expected) < TOLERANCE
    assert relative_error(plain, expected) > 1e-2
