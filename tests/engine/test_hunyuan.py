"""What wraps a transformer wraps HunyuanVideo-1.5's too: blocks that pass through, LoRAs, a file's own weights back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from closeness import relative_error
from lightx2v.blocks import RunBlocks, run_blocks
from lightx2v.config import Engine
from lightx2v.identify import identify
from lightx2v.loading import load_transformer
from lightx2v.lora import Lora, apply_loras, remove_loras
from lightx2v.models.hunyuan_video_15.transformer import Conditioning
from lightx2v.offload.stream import BlockStream
from tiny_hunyuan import CONFIG, make_tiny, to_merged

CPU = torch.device("cpu")


def drawn(network: nn.Module, run: RunBlocks = run_blocks) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    asked = Conditioning(
        torch.randn(2, 6, CONFIG.text_dim, generator=generator),
        text_mask=torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
        image=torch.randn(2, 4, CONFIG.image_dim, generator=generator),
    )
    with torch.no_grad():
        return network(torch.randn(2, 65, 2, 4, 4, generator=generator), torch.tensor([900.0, 30.0]), asked, run)


@pytest.mark.parametrize("resident", range(CONFIG.num_layers + 1))
def test_streamed_equals_resident(resident: int) -> None:
    expected = drawn(make_tiny())
    stream = BlockStream({"": make_tiny()}, CPU)
    with stream.open(resident, 1):
        assert torch.equal(drawn(stream.bring(), stream.around(run_blocks, None)), expected)


def fused_lora(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Rank 4 in ComfyUI's names, q, k and v one layer: the file, and the change of each weight of ours."""
    generator, found, changes = torch.Generator().manual_seed(5), {}, {}
    for owner, ours in (
        ("double_blocks.0.img_attn.qkv", [f"double_blocks.0.img_attn_{part}" for part in "qkv"]),
        ("double_blocks.2.txt_mlp.0", ["double_blocks.2.txt_mlp.fc1"]),
        (
            "txt_in.individual_token_refiner.blocks.1.self_attn.qkv",
            ["txt_in.individual_token_refiner.blocks.1.self_attn_qkv"],
        ),
    ):
        rows = sum(make_tiny().get_parameter(f"{name}.weight").shape[0] for name in ours)
        down, up = torch.randn(4, 256, generator=generator) / 16, torch.randn(rows, 4, generator=generator) / 2
        found |= {f"diffusion_model.{owner}.lora_down.weight": down, f"diffusion_model.{owner}.lora_up.weight": up}
        changes |= dict(zip((f"{name}.weight" for name in ours), (up @ down).chunk(len(ours)), strict=True))
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "lora.safetensors")
    return folder / "lora.safetensors", changes


@pytest.mark.parametrize("how", ["merge", "branch"])
def test_loras_land_on_cut_layers_and_come_off(how: str, tmp_path: Path) -> None:
    path, changes = fused_lora(tmp_path)
    truth, plain = make_tiny(), drawn(make_tiny())
    for name, change in changes.items():
        truth.get_parameter(name).add_(0.8 * change)
    merged = {name: tensor.contiguous() for name, tensor in to_merged(make_tiny().state_dict()).items()}
    save_file(merged, tmp_path / "m.safetensors")
    info = identify(tmp_path / "m.safetensors")
    network = load_transformer(info, Engine(dtype="fp32"), CPU)
    applied = apply_loras(network, info, (Lora(path, 0.8),), how)
    assert relative_error(drawn(network), drawn(truth)) < 2e-6
    assert relative_error(drawn(network), plain) > 1e-2
    remove_loras(network, applied)
    assert torch.equal(drawn(network), plain)
    for name, tensor in make_tiny().state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name
