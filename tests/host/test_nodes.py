"""The pack's own nodes in a real ComfyUI: what they declare, and how they run, cancel, free memory and fail."""

import json
import time

import av
import pytest
import torch

from host.graphs import base, keep, native_sampler, node, our_sampler, random_latent, text_to_video

pytestmark = pytest.mark.host

# id -> required inputs, optional inputs, outputs. Released ids and inputs stay for ever; new inputs are optional.
NODES = {
    "LightX2VLoadModel": ([], ["original_ckpt", "dtype", "quantized_ckpt", "lora", "quant"], ["LIGHTX2V_MODEL"]),
    "LightX2VLoadModelMoE": (
        [],
        [
            "high_noise_original_ckpt",
            "high_noise_quantized_ckpt",
            "low_noise_original_ckpt",
            "low_noise_quantized_ckpt",
            "dtype",
            "lora",
            "quant",
        ],
        ["LIGHTX2V_MODEL"],
    ),
    "LightX2VLoRA": (["lora_name", "strength", "expert"], ["lora"], ["LIGHTX2V_LORA"]),
    "LightX2VLoadTextEncoder": (["text_encoder"], ["text_encoder_2"], ["LIGHTX2V_TEXT_ENCODER"]),
    "LightX2VTextEncode": (["encoder", "text"], [], ["CONDITIONING"]),
    "LightX2VEmptyLatent": (["width", "height", "length", "family", "batch_size"], [], ["LATENT"]),
    "LightX2VLoadImageEncoder": (["image_encoder"], [], ["LIGHTX2V_IMAGE_ENCODER"]),
    "LightX2VImageEncode": (["encoder", "image", "crop"], ["resize"], ["CLIP_VISION_OUTPUT"]),
    "LightX2VImageToVideo": (
        ["positive", "negative", "vae", "width", "height", "length", "batch_size"],
        ["start_image", "end_image", "clip_vision_start_image", "clip_vision_end_image"],
        ["CONDITIONING", "CONDITIONING", "LATENT"],
    ),
    "LightX2VCache": (
        ["method", "threshold", "use_ret_steps", "max_skips", "retention_ratio", "figures"],
        [],
        ["LIGHTX2V_CACHE"],
    ),
    "LightX2VParallel": (["devices", "use"], ["ulysses", "ring", "cfg", "exchange"], ["LIGHTX2V_PARALLEL"]),
    "LightX2VSampler": (
        ["model", "positive", "latent", "seed", "steps", "cfg", "shift", "scheduler", "attention", "offload", "cache"],
        [
            *("negative", "start_at_step", "end_at_step", "add_noise", "denoising_step_list"),
            *("cfg_low", "boundary", "boundary_step", "cache_options", "vram_budget", "parallel"),
        ],
        ["LATENT"],
    ),
    "LightX2VLoadVAE": (["vae_name"], [], ["VAE"]),
    "LightX2VDecode": (["latent", "vae"], ["mode", "tile_size", "overlap", "tile_frames"], ["IMAGE", "LATENT"]),
    "LightX2VReport": (["latent"], [], ["STRING"]),
}


@pytest.fixture(scope="module")
def described(host, tiny_models) -> dict:
    return {name: info for name, info in host.get("/object_info").items() if name.startswith("LightX2V")}


def test_ids_inputs_and_outputs_are_the_released_ones(described) -> None:
    found = {
        name: (list(info["input"].get("required", {})), list(info["input"].get("optional", {})), info["output"])
        for name, info in described.items()
    }
    assert found == NODES
    assert all(info["category"].startswith("LightX2V/") and info["description"] for info in described.values())


def test_every_input_has_a_tooltip(described) -> None:
    for name, info in described.items():
        for kind, group in info["input"].items():
            for input_name, (_, *options) in group.items() if kind != "hidden" else ():
                tooltip = options[0].get("tooltip", "") if options else ""
                assert len(tooltip) > 15, f"{name}.{input_name} has no tooltip"


def test_pickers_list_only_what_fits(described, tiny_models, host) -> None:
    def options(name: str, widget: str) -> list[str]:
        inputs = described[name]["input"]
        kind, extra = {**inputs.get("required", {}), **inputs.get("optional", {})}[widget]
        return extra["options"] if kind == "COMBO" else kind

    stray = host.base / "models" / "diffusion_models" / "stray_vae.safetensors"
    stray.write_bytes((host.base / "models" / "vae" / tiny_models.vae).read_bytes())
    try:
        listed = host.get("/object_info/LightX2VLoadModel")["LightX2VLoadModel"]
        assert "stray_vae.safetensors" not in json.dumps(listed)
    finally:
        stray.unlink()
    assert tiny_models.diffusion_model in options("LightX2VLoadModel", "original_ckpt")
    assert tiny_models.text_encoder in options("LightX2VLoadTextEncoder", "text_encoder")
    assert tiny_models.vae in options("LightX2VLoadVAE", "vae_name")


def test_text_to_video(host, tiny_models) -> None:
    result = host.run(keep(text_to_video(tiny_models), "sample", "decode")).expect()
    assert result.kept("keep_sample")["samples"].shape == (1, 16, 5, 12, 16)
    assert result.kept("keep_decode").shape == (17, 96, 128, 3)
    assert result.kept("keep_decode").std() > 0.01
    (path,) = result.files("save", host.base)
    with av.open(str(path)) as video:
        assert len(list(video.decode(video=0))) == 17
    assert {("sample", step, 3) for step in (1, 2, 3)} <= set(result.progress)
    assert ("decode", 5, 5) in result.progress


def test_preview_is_several_frames(host, tiny_models) -> None:
    result = host.run(keep({**base(tiny_models), "sample": our_sampler(steps=2, seed=11)}, "sample")).expect()
    pictures = [preview.image for preview in result.previews if preview.node == "sample"]
    assert len(pictures) == 2
    assert all(picture.format == "PNG" and picture.n_frames == 5 for picture in pictures)


def test_a_second_run_reuses_every_node(host, tiny_models) -> None:
    graph = keep({**base(tiny_models), "sample": our_sampler(steps=2, seed=12)}, "sample")
    del graph["unet"], graph["native"]
    host.run(graph).expect()
    assert host.run(graph).expect().cached >= set(graph)


def test_cancel_within_a_run(host, tiny_models) -> None:
    graph = keep({**base(tiny_models), "sample": our_sampler(steps=900)}, "sample")
    result = host.run(graph, interrupt_after=2).expect("interrupted")
    assert result.progress[-1][1] < 900
    graph["sample"]["inputs"]["steps"] = 1
    host.run(graph).expect()


def test_free_unloads_and_the_next_run_is_the_same(host, tiny_models) -> None:
    graph = keep({**base(tiny_models), "sample": our_sampler(steps=2, seed=13)}, "sample")
    graph["loaded"] = node("FixtureLoadedModels", after=["sample", 0])
    first = host.run(graph).expect()
    assert "LoadedTransformer" in first.text("loaded")

    host.post("/free", {"unload_models": True})
    held = {"ours": graph["ours"], "loaded": node("FixtureLoadedModels", after=["ours", 0])}
    deadline = time.monotonic() + 20  # the server obeys between two graphs
    while "LoadedTransformer" in (freed := host.run(held).expect()).text("loaded"):
        assert time.monotonic() < deadline, "still loaded"
    assert "ours" in freed.cached, "the handle itself was kept: it gave its memory back, it was not merely dropped"

    host.post("/free", {"unload_models": True, "free_memory": True})
    while "ours" in (again := host.run(graph).expect()).cached:
        assert time.monotonic() < deadline, "still cached"
    assert torch.equal(again.kept("keep_sample")["samples"], first.kept("keep_sample")["samples"])


def test_every_attention_gives_the_same_picture(host, tiny_models) -> None:
    graph = base(tiny_models)
    for name in ("auto", "torch_sdpa", "reference"):
        graph[name] = our_sampler(attention=name)
    result = host.run(keep(graph, "auto", "torch_sdpa", "reference")).expect()
    expected = result.kept("keep_auto")["samples"]
    for name in ("torch_sdpa", "reference"):
        torch.testing.assert_close(result.kept(f"keep_{name}")["samples"], expected, rtol=0, atol=1e-4)


def test_offload_changes_nothing_but_memory(host, tiny_models) -> None:
    ways = {
        "a": our_sampler(),
        "b": our_sampler(offload="model"),
        "c": our_sampler(offload="block"),
        "d": our_sampler(offload="block", attention="reference"),
        "e": our_sampler(attention="reference"),
    }
    result = host.run(keep({**base(tiny_models), **ways}, *ways)).expect()
    samples = {name: result.kept(f"keep_{name}")["samples"] for name in ways}
    assert all(torch.equal(samples[name], samples["a"]) for name in "bc")
    assert torch.equal(samples["d"], samples["e"])
    log = host.log()
    assert "memory: 0 of" in log and "pass through it" in log


def test_a_plain_model_multiplies_in_8_bits_if_asked(host, tiny_models) -> None:
    """Resident or passing through, with another attention too: the loader's choice stays."""
    loader = node("LightX2VLoadModel", original_ckpt=tiny_models.diffusion_model, quant="int8")
    ways = {
        "plain": our_sampler(),
        "packed": our_sampler(model=["eight", 0]),
        "passing": our_sampler(model=["eight", 0], offload="block"),
        "other": our_sampler(model=["eight", 0], attention="reference"),
        "otherpassing": our_sampler(model=["eight", 0], attention="reference", offload="block"),
    }
    result = host.run(keep({**base(tiny_models), "eight": loader, **ways}, *ways)).expect()
    samples = {name: result.kept(f"keep_{name}")["samples"] for name in ways}
    difference = (samples["packed"] - samples["plain"]).norm() / samples["plain"].norm()
    assert 1e-4 < difference < 0.1
    assert torch.equal(samples["passing"], samples["packed"])
    assert torch.equal(samples["otherpassing"], samples["other"])
    assert "in int8" in host.log() and "int8_linear: reference on cpu" in host.log()


def test_nothing_stays_on_the_device_of_blocks_that_passed(host, tiny_models) -> None:
    host.post("/free", {"unload_models": True})  # what earlier tests left
    graph = keep({**base(tiny_models), "sample": our_sampler(steps=2, seed=17, offload="block")}, "sample")
    graph["loaded"] = node("FixtureLoadedModels", after=["sample", 0])
    first = host.run(graph).expect()
    assert '"bytes": ' not in first.text("loaded").replace('"bytes": 0', "")
    graph["sample"] = our_sampler(steps=2, seed=17)
    whole = host.run(graph).expect()
    assert '"bytes": ' in whole.text("loaded").replace('"bytes": 0', ""), "as a whole it stays, and the host knows"
    assert torch.equal(whole.kept("keep_sample")["samples"], first.kept("keep_sample")["samples"])
    host.post("/free", {"unload_models": True})
    graph["sample"] = our_sampler(steps=2, seed=17, offload="block", vram_budget=0.62)
    again = host.run(graph).expect()
    assert torch.equal(again.kept("keep_sample")["samples"], first.kept("keep_sample")["samples"])


def test_cancel_while_blocks_pass(host, tiny_models) -> None:
    graph = keep({**base(tiny_models), "sample": our_sampler(steps=900, offload="block")}, "sample")
    host.run(graph, interrupt_after=2).expect("interrupted")
    one = {**base(tiny_models), "a": our_sampler(steps=1, offload="block"), "b": our_sampler(steps=1)}
    result = host.run(keep(one, "a", "b")).expect()
    assert torch.equal(result.kept("keep_a")["samples"], result.kept("keep_b")["samples"])


def test_a_memory_budget_is_kept_or_refused_in_words(host, tiny_models) -> None:
    graph = {**base(tiny_models), "a": our_sampler(), "b": our_sampler(vram_budget=0.7, offload="auto")}
    graph["c"] = our_sampler(vram_budget=0.7, offload="block")  # all of it fits
    result = host.run(keep(graph, "a", "b", "c")).expect()
    assert torch.equal(result.kept("keep_a")["samples"], result.kept("keep_b")["samples"])
    assert torch.equal(result.kept("keep_a")["samples"], result.kept("keep_c")["samples"])
    graph = keep({**base(tiny_models), "d": our_sampler(vram_budget=0.3)}, "d")
    assert "0.6 GB of GPU memory are needed at least" in host.run(graph).message


def test_four_distilled_steps(host, tiny_models) -> None:
    graph = base(tiny_models)
    graph["list"] = our_sampler(scheduler="distilled", cfg=1.0, steps=50)
    graph["native_four"] = native_sampler(steps=4, cfg=1.0)
    result = host.run(keep(graph, "list", "native_four")).expect()
    ours, native = (result.kept(f"keep_{name}")["samples"] for name in ("list", "native_four"))
    torch.testing.assert_close(ours, native, rtol=0, atol=1e-4)
    assert ("list", 4, 4) in result.progress


def test_sizes_are_snapped(host) -> None:
    graph = {"empty": node("LightX2VEmptyLatent", width=720, height=536, length=80, family="wan2.1", batch_size=2)}
    latent = host.run(keep(graph, "empty")).expect().kept("keep_empty")
    assert latent["samples"].shape == (2, 16, 21, 66, 90)
    assert "made 720x528, 81 frames" in host.log()


BAD = {
    "no negative": ({"negative": None}, "cfg is 5, which needs the negative input"),
    "unknown attention": ({"attention": "warp_drive"}, "warp_drive"),
    "too many steps": ({"steps": 5000}, "steps"),
    "start past the end": ({"start_at_step": 9}, "start_step 9 is past the last of 6 steps"),
    "unknown offload": ({"offload": "moon"}, "moon"),
    "unknown cache": ({"cache": "some"}, "some"),
    "unknown scheduler": ({"scheduler": "heun"}, "heun"),
    "bad list": ({"scheduler": "distilled", "denoising_step_list": "1000, x"}, "write whole numbers"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_is_said_in_words(host, tiny_models, case: str) -> None:
    changes, words = BAD[case]
    sampler = our_sampler(**changes)
    sampler["inputs"] = {name: value for name, value in sampler["inputs"].items() if value is not None}
    result = host.run(keep({**base(tiny_models), "sample": sampler}, "sample"))
    assert result.status in ("rejected", "error")
    assert words in result.message


def test_wrong_latents_are_said_in_words(host, tiny_models) -> None:
    latent = random_latent()
    latent["inputs"]["channels"] = 48
    graph = {**base(tiny_models), "empty": latent, "sample": our_sampler()}
    assert (
        "whose latents have 16 channels; the given ones have 48: use the Wan2.1 VAE"
        in host.run(keep(graph, "sample")).expect("error").message
    )


def test_conditioning_that_would_be_ignored_is_refused(host, tiny_models) -> None:
    graph = base(tiny_models)
    graph["ranged"] = node("ConditioningSetTimestepRange", conditioning=["positive", 0], start=0.0, end=0.5)
    graph["both"] = node("ConditioningCombine", conditioning_1=["positive", 0], conditioning_2=["negative", 0])
    for name, words in (("ranged", "start_percent, end_percent"), ("both", "holds 2 prompts")):
        graph["sample"] = our_sampler(positive=[name, 0])
        assert words in host.run(keep(graph, "sample")).expect("error").message


def test_a_truncated_file_is_named(host, tiny_models) -> None:
    folder = host.base / "models" / "diffusion_models"
    whole = (folder / tiny_models.diffusion_model).read_bytes()
    cut = folder / "cut.safetensors"
    cut.write_bytes(whole)
    graph = {**base(tiny_models), "sample": our_sampler(steps=1, cfg=1.0)}
    graph["ours"]["inputs"]["original_ckpt"] = "cut.safetensors"
    try:
        host.run(keep(graph, "sample")).expect()  # listed while it is whole
        cut.write_bytes(whole[:-100])
        message = host.run(keep(graph, "sample")).message
        assert "cut.safetensors" in message
    finally:
        cut.unlink()
