"""What the model loaders list, load and refuse, in a real ComfyUI."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.writers import block_split, gguf_q8_0, lightx2v_fp8, one_shard_of_two
from host.graphs import Graph, base, keep, node, our_sampler

pytestmark = pytest.mark.host

NAME = "picked"


@pytest.fixture(scope="module")
def folder(host, tiny_models) -> Iterator[Path]:
    """The tiny transformer below models/diffusion_models once more, in several layouts."""
    models = host.base / "models" / "diffusion_models"
    state = load_file(models / tiny_models.diffusion_model)
    for writer in (block_split, lightx2v_fp8, gguf_q8_0, one_shard_of_two):
        writer(state, models / NAME / writer.__name__)
    (models / NAME / "block_split").rename(models / NAME / "one_file_a_block")
    for noise in ("high", "low"):
        shutil.copy(models / tiny_models.diffusion_model, models / NAME / f"wan2.2_{noise}_noise.safetensors")
    shutil.copy(models / tiny_models.diffusion_model, models / NAME / "wan2.2_high_noise_again.safetensors")
    yield models / NAME
    shutil.rmtree(models / NAME)


def options(host, name: str, widget: str) -> list[str]:
    _, extra = host.get(f"/object_info/{name}")[name]["input"]["optional"][widget]
    return [option for option in extra["options"] if option.startswith((NAME, "none"))]


PLAIN = [
    f"{NAME}/one_file_a_block/",
    f"{NAME}/one_shard_of_two/m-00001-of-00002.safetensors",
    *(f"{NAME}/wan2.2_{name}.safetensors" for name in ("high_noise", "high_noise_again", "low_noise")),
    "none",
]
QUANTISED = [f"{NAME}/gguf_q8_0/m-Q8_0.gguf", f"{NAME}/lightx2v_fp8/m.safetensors", "none"]


def test_each_picker_lists_what_fits(host, folder) -> None:
    for name, widgets in {
        "LightX2VLoadModel": ("original_ckpt", "quantized_ckpt"),
        "LightX2VLoadModelMoE": ("high_noise_original_ckpt", "high_noise_quantized_ckpt"),
    }.items():
        for widget, expected in zip(widgets, (PLAIN, QUANTISED), strict=True):
            assert sorted(options(host, name, widget)) == sorted(expected)


def test_a_new_file_is_listed_and_a_changed_one_is_asked_again(host, folder) -> None:
    new = folder / "new.safetensors"
    new.write_bytes((folder / "wan2.2_low_noise.safetensors").read_bytes())
    try:
        assert f"{NAME}/new.safetensors" in options(host, "LightX2VLoadModel", "original_ckpt")
        new.write_bytes(b"\0" * 100)
        assert f"{NAME}/new.safetensors" not in options(host, "LightX2VLoadModel", "original_ckpt")
    finally:
        new.unlink()


def test_a_set_is_listed_once_its_last_shard_is_there(host, folder) -> None:
    first, second = (f"{NAME}/one_shard_of_two/m-0000{index}-of-00002.safetensors" for index in (1, 2))
    shard, aside = folder.parent / second, folder.parent / "aside"
    shard.rename(aside)
    assert first not in options(host, "LightX2VLoadModel", "original_ckpt")
    aside.rename(shard)
    assert first in options(host, "LightX2VLoadModel", "original_ckpt")


def sampled(models, **picked: str) -> Graph:
    graph = {**base(models), "sample": our_sampler(steps=1, cfg=1.0)}
    graph["ours"] = node("LightX2VLoadModel", **picked)
    return keep(graph, "sample")


def test_a_folder_and_a_shard_draw_as_the_single_file(host, tiny_models, folder) -> None:
    expected = host.run(sampled(tiny_models, original_ckpt=tiny_models.diffusion_model)).expect()
    for name in PLAIN[:2]:
        found = host.run(sampled(tiny_models, original_ckpt=name)).expect()
        assert torch.equal(found.kept("keep_sample")["samples"], expected.kept("keep_sample")["samples"])


def test_quantised_files_draw_nearly_as_the_original(host, tiny_models, folder) -> None:
    whole = host.run(sampled(tiny_models, original_ckpt=tiny_models.diffusion_model)).expect()
    expected = whole.kept("keep_sample")["samples"]
    for name, limit in zip(QUANTISED[:2], (0.02, 0.06), strict=True):
        graph = sampled(tiny_models, original_ckpt="none", dtype="auto", quantized_ckpt=name)
        found = host.run(graph).expect().kept("keep_sample")["samples"]
        assert 0 < (found - expected).norm() / expected.norm() < limit, name
    assert "weights (Q8_0)" in host.log()


def test_exactly_one_file_must_be_picked(host, tiny_models, folder) -> None:
    neither = host.run(sampled(tiny_models, original_ckpt="none", quantized_ckpt="none")).expect("error")
    assert "original_ckpt and quantized_ckpt are both none; pick a file in one of them" in neither.message
    both = {"original_ckpt": tiny_models.diffusion_model, "quantized_ckpt": QUANTISED[0]}
    message = host.run(sampled(tiny_models, **both)).expect("error").message
    assert QUANTISED[0] in message and "set one of them to none" in message


HIGH, AGAIN, LOW = (f"{NAME}/wan2.2_{name}.safetensors" for name in ("high_noise", "high_noise_again", "low_noise"))
MISTAKES = {
    "swapped": (LOW, HIGH, "the experts are swapped by their names"),
    "two of a kind": (HIGH, AGAIN, "both high-noise experts by their names"),
    "one file twice": (HIGH, HIGH, "picked as both experts"),
    "one missing": (HIGH, "none", "low_noise_original_ckpt and low_noise_quantized_ckpt are both none"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_experts_that_are_no_pair_are_refused(host, tiny_models, folder, case: str) -> None:
    high, low, words = MISTAKES[case]
    graph = {**base(tiny_models), "sample": our_sampler(steps=1, cfg=1.0)}
    graph["ours"] = node("LightX2VLoadModelMoE", high_noise_original_ckpt=high, low_noise_original_ckpt=low)
    assert words in host.run(keep(graph, "sample")).expect("error").message


def experts(models, **picked: str) -> Graph:
    graph = {**base(models), "sample": our_sampler(steps=3, cfg=1.0)}
    graph["ours"] = node("LightX2VLoadModelMoE", **picked)
    return keep(graph, "sample")


def test_two_experts_of_the_same_weights_draw_as_one_model(host, tiny_models, folder) -> None:
    graph = keep({**base(tiny_models), "sample": our_sampler(steps=3, cfg=1.0)}, "sample")
    expected = host.run(graph).expect().kept("keep_sample")["samples"]
    pair = {"high_noise_original_ckpt": HIGH, "low_noise_original_ckpt": LOW}
    assert torch.equal(host.run(experts(tiny_models, **pair)).expect().kept("keep_sample")["samples"], expected)
    mixed = {"high_noise_original_ckpt": HIGH, "low_noise_quantized_ckpt": QUANTISED[0]}
    found = host.run(experts(tiny_models, **mixed)).expect().kept("keep_sample")["samples"]
    assert 0 < (found - expected).norm() / expected.norm() < 0.02


def test_an_fp8_text_encoder_encodes_as_what_it_stands_for(host, tiny_models) -> None:
    folder = host.base / "models" / "text_encoders"
    original = load_file(folder / tiny_models.text_encoder)
    packed, widened = dict(original), dict(original)
    for name in [name for name in original if name.startswith("blocks.") and ".attn." in name]:
        scale = original[name].abs().amax(dim=1, keepdim=True) / 448
        packed[name], packed[f"{name}_scale"] = (original[name] / scale).to(torch.float8_e4m3fn), scale
        widened[name] = packed[name].float() * scale
    files = {"plain": tiny_models.text_encoder, "packed": "tiny_fp8.safetensors", "widened": "tiny_widened.safetensors"}
    save_file(packed, folder / files["packed"])
    save_file(widened, folder / files["widened"])
    graph = {}
    for kind, file in files.items():
        graph[f"load_{kind}"] = node("LightX2VLoadTextEncoder", text_encoder=file)
        graph[kind] = node("LightX2VTextEncode", encoder=[f"load_{kind}", 0], text="a red circle moves right")
    result = host.run(keep(graph, *files)).expect()
    found = {kind: result.kept(f"keep_{kind}")[0][0] for kind in files}
    assert torch.equal(found["packed"], found["widened"]) and not torch.equal(found["packed"], found["plain"])
