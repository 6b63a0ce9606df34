"""LoRAs in a real ComfyUI: what is listed, the same video as the native loader makes, and what stops a graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from host.graphs import Graph, base, keep, native_sampler, node, our_sampler
from host.tiny_models import transformer_shapes

pytestmark = pytest.mark.host
TOLERANCE = 1e-4


def pairs(hidden_size: int = 256, seed: int = 0) -> dict[str, Tensor]:
    """A pair for every matrix of the blocks of the tests' transformer, and its norms, as ComfyUI saves them."""
    generator = torch.Generator().manual_seed(seed)
    content: dict[str, Tensor] = {}
    for name, shape in transformer_shapes(hidden_size=hidden_size, ffn_size=hidden_size).items():
        layer = f"diffusion_model.{name.removesuffix('.weight')}"
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2:
            content[f"{layer}.lora_down.weight"] = torch.randn(8, shape[1], generator=generator) * shape[1] ** -0.5
            content[f"{layer}.lora_up.weight"] = torch.randn(shape[0], 8, generator=generator) * 0.3
            content[f"{layer}.alpha"] = torch.tensor(4)
        elif ".norm_" in name:
            content[f"{layer}.diff"] = torch.randn(shape, generator=generator) * 0.1
    return content


@pytest.fixture(scope="module")
def loras(host, tiny_models) -> Iterator[Path]:
    folder = host.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(pairs(), folder / "one.safetensors")
    save_file(pairs(seed=1), folder / "two.safetensors")
    save_file(pairs(hidden_size=384), folder / "wide.safetensors")
    save_file({"diffusion_model.blocks.0.ffn.0.dora_scale": torch.ones(4)}, folder / "dora.safetensors")
    (folder / "stray_vae.safetensors").write_bytes((host.base / "models" / "vae" / tiny_models.vae).read_bytes())
    yield folder
    for path in folder.iterdir():
        path.unlink()


def lora(name: str, strength: float = 1.0, expert: str = "both", **inputs: Any) -> dict[str, Any]:
    return node("LightX2VLoRA", lora_name=f"{name}.safetensors", strength=strength, expert=expert, **inputs)


def with_lora(models: Any, **nodes: dict[str, Any]) -> Graph:
    """The tests' graph whose own loader takes the node called "lora"."""
    graph = {**base(models), **nodes}
    graph["ours"]["inputs"]["lora"] = ["lora", 0]
    return graph


def test_only_loras_are_listed(host, loras: Path) -> None:
    kind, extra = host.get("/object_info/LightX2VLoRA")["LightX2VLoRA"]["input"]["required"]["lora_name"]
    listed = extra["options"] if kind == "COMBO" else kind
    mine = [name for name in listed if not name.startswith("lightx2v-demo/")]
    assert mine == ["one.safetensors", "two.safetensors", "wide.safetensors"]
    assert not [name for name in listed if name.endswith(("diffusion_pytorch_model.safetensors", "VAE.safetensors"))]


def test_a_stack_makes_the_video_that_the_native_loader_makes(host, tiny_models, loras: Path) -> None:
    graph = with_lora(
        tiny_models,
        lora=lora("two", -0.4, lora=["first", 0]),
        first=lora("one", 0.8),
        native_one=node("LoraLoaderModelOnly", model=["unet", 0], lora_name="one.safetensors", strength_model=0.8),
        native_two=node(
            "LoraLoaderModelOnly", model=["native_one", 0], lora_name="two.safetensors", strength_model=-0.4
        ),
        plain=node("LightX2VLoadModel", original_ckpt=tiny_models.diffusion_model, dtype="auto"),
    )
    graph["native"]["inputs"]["model"] = ["native_two", 0]
    graph |= {"theirs": native_sampler(), "mine": our_sampler(), "without": our_sampler(model=["plain", 0])}
    result = host.run(keep(graph, "theirs", "mine", "without")).expect()
    theirs, mine, without = (result.kept(f"keep_{name}")["samples"] for name in ("theirs", "mine", "without"))
    assert (mine - theirs).abs().max() < TOLERANCE
    assert (mine - without).abs().max() > 0.1
    total = len(pairs())
    assert f"one.safetensors: {total} of {total} tensors applied (rank 8, scale 0.5 x strength 0.8)" in host.log()


def test_each_expert_gets_its_own(host, tiny_models, loras: Path) -> None:
    """As two native samplers, each with its model and LoRA; shift 5 puts the first three of six steps above 0.875."""
    folder = host.base / "models" / "diffusion_models"
    experts = {role: folder / f"lora_test_{role}_noise.safetensors" for role in ("high", "low")}
    for path in experts.values():
        path.write_bytes((folder / tiny_models.diffusion_model).read_bytes())
    graph = base(tiny_models)
    names = {f"{role}_noise_original_ckpt": path.name for role, path in experts.items()}
    graph["ours"] = node("LightX2VLoadModelMoE", **names, lora=["low", 0])
    graph |= {"high": lora("one", 0.8, "high"), "low": lora("two", 0.5, "low", lora=["high", 0])}
    for role, file, strength in (("high", "one", 0.8), ("low", "two", 0.5)):
        inputs = {"lora_name": f"{file}.safetensors", "strength_model": strength}
        graph[f"native_{role}"] = node("LoraLoaderModelOnly", model=["native", 0], **inputs)
    graph["theirs_high"] = native_sampler(end=3, model=["native_high", 0])
    graph["theirs"] = native_sampler("theirs_high", start=3, model=["native_low", 0])
    graph["mine"], graph["passing"] = our_sampler(), our_sampler(offload="block")
    try:
        result = host.run(keep(graph, "theirs", "mine", "passing")).expect()
    finally:
        for path in experts.values():
            path.unlink()
    theirs, mine, passing = (result.kept(f"keep_{name}")["samples"] for name in ("theirs", "mine", "passing"))
    assert (mine - theirs).abs().max() < TOLERANCE
    assert torch.equal(passing, mine)


def test_another_strength_reads_nothing_again(host, tiny_models, loras: Path) -> None:
    """The weights wait for the loader that runs again, and no longer than until a graph runs that lacks it."""

    def made(strength: float, seed: int, **changes: Any) -> tuple[Tensor, int]:
        """Latents, and how often the checkpoint was read for them."""
        before = len(host.log())
        graph = with_lora(tiny_models, lora=lora("one", strength), out=our_sampler(seed=seed, **changes))
        found = host.run(keep(graph, "out")).expect().kept("keep_out")["samples"]
        return found, host.log()[before:].count(f"{tiny_models.diffusion_model}: Wan2.1 T2V")

    for changes in ({}, {"offload": "block"}, {"offload": "model"}):
        host.run(keep({"empty": base(tiny_models)["empty"]}, "empty")).expect()
        expected, reads = made(0.4, 31, **changes)
        assert reads <= 1, "none where Python collects the handle before only now"
        other, reads = made(1.0, 31, **changes)
        assert reads == 0 and not torch.equal(other, expected)
        found, reads = made(0.4, 31, **changes)
        assert reads == 0 and torch.equal(found, expected)


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        ({"lora": lora("wide")}, ["wide.safetensors: made for another model", "384 x 384", "256 x 256"]),
        ({"lora": lora("one", expert="high")}, ["one.safetensors", "high-noise expert", "expert 'both'"]),
    ],
)
def test_what_stops_a_graph(host, tiny_models, loras: Path, stack: dict[str, Any], words: list[str]) -> None:
    graph = {**with_lora(tiny_models, **stack), "out": our_sampler(steps=1, cfg=1.0)}
    message = host.run(keep(graph, "out")).expect("error").message
    assert all(word in message for word in words), message
