"""HunyuanVideo-1.5 end to end through the library: folders, tasks, guidance, what wraps it, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import tiny_encoders15
from closeness import relative_error
from formats.test_hunyuan_layouts import packed_fp8
from lightx2v import LightX2VPipeline
from lightx2v.checkpoint import CheckpointError
from lightx2v.config import Sampling
from lightx2v.diffuse import Model, Start, diffuse
from lightx2v.doctor import parts
from lightx2v.frames import whole_clips
from lightx2v.guidance import Conditioning
from lightx2v.latents import HUNYUAN15
from lightx2v.models import specs
from lightx2v.models.hunyuan_video_15.conditioning import arguments, image_condition, to_model_input
from lightx2v.models.hunyuan_video_15.sizes import size_for_image
from lightx2v.shapes import VideoShape
from tiny_hunyuan import make_tiny
from tiny_hunyuan_folder import FITTING, pipeline, video, write, write_folder

QUOTED = 'a red cat says "MEOW"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("hunyuan"))


@pytest.fixture(scope="module")
def made(folder) -> torch.Tensor:
    return video(pipeline(folder))


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "first.png"
    Image.effect_noise((60, 40), 80).convert("RGB").save(path)
    return path


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target, copy_function=shutil.os.link))


def test_seed_prompt_and_quotes_show(folder, made) -> None:
    pipe = pipeline(folder)
    assert made.shape == (5, 32, 48, 3)
    for change in ({"seed": 2}, {"prompt": QUOTED}, {"negative_prompt": "blurred"}, {"negative_prompt": 'a "sign"'}):
        assert (video(pipe, **change) - made).abs().max() > 0.01, change
    assert torch.equal(video(pipe), made), "after other seeds and prompts the first one is the first one again"


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_other_folders_draw_the_same(layout: str, made, tmp_path) -> None:
    assert relative_error(video(pipeline(write_folder(tmp_path, layout))), made) < 1e-5


def test_pictures(folder, made, picture, tmp_path, caplog) -> None:
    pipe = LightX2VPipeline(folder, "hunyuan_video_1.5", "t2v", support_tasks=["i2v"], device="cpu")
    pipe.create_generator(height=32, width=48, num_frames=5, infer_steps=2, resize_mode="fixed_shape")
    assert torch.equal(video(pipe), made)
    assert "its name says" not in caplog.text
    started = video(pipe, task="i2v", image_path=picture)
    assert "480p_t2v: its name says t2v, and an image is given" in caplog.text
    assert (started - made).abs().max() > 0.01
    Image.effect_noise((60, 40), 20).convert("RGB").save(tmp_path / "other.png")
    assert (video(pipe, task="i2v", image_path=tmp_path / "other.png") - started).abs().max() > 0.01
    with pytest.raises(CheckpointError, match="can start from an image but not end on one"):
        video(pipe, task="i2v", image_path=picture, last_frame_path=picture)


def test_the_image_encoder_sees_the_picture_as_it_is_cut(folder, tmp_path) -> None:
    """What is cut off at both sides for a square video changes nothing."""
    pixels = numpy.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=numpy.uint8)
    videos = []
    for index in range(2):
        pixels[:, :16], pixels[:, 48:] = 60 * index, 200 * index
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        pipe = pipeline(folder, task="i2v", width=32, resize_mode="fixed_shape")
        videos.append(video(pipe, image_path=tmp_path / f"{index}.png"))
    assert torch.equal(*videos)


def test_a_distilled_one_reads_where_each_step_goes(folder, tmp_path) -> None:
    config = replace(FITTING, reads_step_end=True)
    target = write_folder(tmp_path, "comfyui", config)
    settings = {"guidance_scale": 1, "denoising_step_list": [1000, 750, 500, 250]}
    pipe = pipeline(target, "hunyuan_video_1.5_distill", **settings)
    four = video(pipe)
    pipe.create_generator(height=32, width=48, num_frames=5, **{**settings, "denoising_step_list": [1000, 500]})
    assert (video(pipe) - four).abs().max() > 0.01
    plain = pipeline(folder, "hunyuan_video_1.5_distill", **settings)
    assert video(plain).shape == four.shape, "a model distilled without that input walks the same list"


@pytest.mark.parametrize("granularity", ["block", "model"])
def test_offloaded_is_the_same(folder, made, granularity: str) -> None:
    pipe = LightX2VPipeline(folder, "hunyuan_video_1.5", "t2v", device="cpu")
    pipe.enable_offload(cpu_offload=True, offload_granularity=granularity, vae_offload=True)
    pipe.create_generator(height=32, width=48, num_frames=5, infer_steps=2)
    assert torch.equal(video(pipe), made)


def test_quantised_files(folder, made, tmp_path) -> None:
    fp8 = torch.float8_e4m3fn
    state = tiny_encoders15.qwen_state()
    packed = {}
    for name, tensor in state.items():
        if "_proj.weight" in name:
            scale = tensor.abs().amax(1, keepdim=True) / 448
            packed |= {name: (tensor / scale).to(fp8), f"{name}_scale": scale}
        elif not name.startswith("visual."):
            packed[name] = tensor.half()
    path = tmp_path / "hy15_qwen25vl_llm_encoder_fp8_e4m3_lightx2v.safetensors"
    write(packed, path)
    dit = tmp_path / "hy15_480p_t2v_fp8_e4m3_lightx2v.safetensors"
    write(packed_fp8(make_tiny(FITTING).state_dict(), rows=True), dit)
    pipe = pipeline(folder)
    pipe.enable_quantize(
        quant_scheme="fp8",
        dit_quantized=True,
        dit_quantized_ckpt=dit,
        text_encoder_quantized=True,
        image_encoder_quantized=False,
        text_encoder_quantized_ckpt=path,
    )
    found = video(pipe)
    assert pipe._info.path == dit
    assert 1e-5 < relative_error(found, made) < 0.5
    model = pipe._parts.text_encoder().model
    assert {p.dtype for name, p in model.named_parameters() if "q_proj.weight" in name} == {fp8}, "they rest packed"


def test_what_is_missing_is_said(folder, tmp_path) -> None:
    for part, words in (
        ("text_encoder/llm/vocab.json", "no tokenizer of Qwen2.5-VL found"),
        ("text_encoder/llm/model.safetensors", "text_encoder"),
        ("text_encoder/Glyph-SDXL-v2", "quotes text, which needs byT5"),
        ("vae", "no VAE here"),
    ):
        broken = copied(folder, tmp_path / part.replace("/", "_"))
        found = broken / part
        found.unlink() if found.is_file() else shutil.rmtree(found)
        with pytest.raises(ValueError, match=words):
            video(pipeline(broken), prompt=QUOTED)
    alone = copied(folder, tmp_path / "no_glyphs")
    shutil.rmtree(alone / "text_encoder/Glyph-SDXL-v2")
    video(pipeline(alone))  # nothing is quoted
    with pytest.raises(CheckpointError, match="transformer_model_name='720p_t2v' is not here; found 480p_t2v"):
        LightX2VPipeline(folder, "hunyuan_video_1.5", transformer_model_name="720p_t2v")
    with pytest.raises(ValueError, match=r"model_cls is hunyuan_video_1\.5 or hunyuan_video"):
        LightX2VPipeline(folder, "wan2.1", dit_original_ckpt=folder / "transformer/480p_t2v")


def test_several_transformers_in_one_folder(folder, tmp_path) -> None:
    root = copied(folder, tmp_path / "several")
    for name in ("480p_i2v", "720p_t2v"):
        shutil.copytree(root / "transformer/480p_t2v", root / "transformer" / name)
    with pytest.raises(CheckpointError, match="holds 480p_i2v, 480p_t2v, 720p_t2v: give transformer_model_name"):
        LightX2VPipeline(root, "hunyuan_video_1.5", "t2v")
    assert LightX2VPipeline(root, "hunyuan_video_1.5", "i2v")._info.path.name == "480p_i2v"
    chosen = LightX2VPipeline(root, "hunyuan_video_1.5", "t2v", transformer_model_name="720p_t2v")
    assert chosen._info.path.name == "720p_t2v"


def test_input_channels() -> None:
    """32 of the given frames, zeros behind them, then 1 where one is given."""
    shape, size = (2, 32, 3, 2, 3), VideoShape(9, 32, 48)
    assert not to_model_input(None, None, HUNYUAN15, shape).any()
    assert to_model_input(None, None, HUNYUAN15, shape).shape == (2, 33, 3, 2, 3)

    def encode(frames: torch.Tensor) -> torch.Tensor:
        return torch.ones(1, 32, (frames.shape[2] - 1) // 4 + 1, 2, 3)

    for count, cells in ((1, 1), (4, 1), (5, 2), (30, 3)):
        given = image_condition(whole_clips(encode), size, HUNYUAN15, start=torch.rand(count, 20, 30, 3))
        read = to_model_input(given.latents, given.concat_mask, HUNYUAN15, shape)
        assert torch.allclose(read[:, :32, :cells], torch.tensor(1.03682)) and not read[:, :32, cells:].any()
        assert (read[:, 32, :cells] == 1).all() and not read[:, 32, cells:].any()
    asked = arguments(Conditioning(torch.zeros(2, 4, 8), glyphs=torch.ones(2, 3, 5)), 250.0, reads_step_end=True)
    assert asked["step_end"].tolist() == [250.0, 250.0] and asked["context"].glyphs.shape == (2, 3, 5)
    assert arguments(Conditioning(torch.zeros(1, 4, 8)), 250.0)["step_end"] is None


def test_what_is_usual_where_nothing_is_said(folder, tmp_path) -> None:
    def request(name: str = "480p_t2v", task: str = "t2v", **given: object):
        target = tmp_path / name
        if not target.exists():
            copied(folder, target)
            (target / "transformer/480p_t2v").rename(target / "transformer" / name)
        pipe = LightX2VPipeline(target, "hunyuan_video_1.5", task)
        pipe.create_generator(**given)
        asked = pipe._request
        return asked.num_frames, asked.fps, asked.sampling.cfg_scale, asked.sampling.shift, asked.sampling.scheduler

    assert request() == (121, 24, 6.0, 5.0, "euler")
    assert request(height=720, width=1280) == (121, 24, 6.0, 9.0, "euler")
    assert request("720p_i2v", "i2v", height=720, width=1280)[3] == 7.0
    assert request("480p_t2v_distilled")[2:4] == (1.0, 5.0)
    assert request(guidance_scale=4, num_frames=81, sample_shift=3, fps=16) == (81, 16, 4.0, 3.0, "euler")


@pytest.mark.parametrize("image", [(480, 640), (1080, 1920), (1000, 1000), (1600, 900), (300, 2000), (3000, 200)])
@pytest.mark.parametrize("side", [640, 960])
def test_sizes_are_diffusers_buckets(image: tuple[int, int], side: int) -> None:
    from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

    expected = HunyuanVideo15ImageProcessor().calculate_default_height_width(*image, side)
    assert size_for_image(side**2, image) == tuple(expected)


class Told(torch.nn.Module):
    """In place of a transformer: notes what it is asked, and sees no change to make."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[float, float, torch.Tensor | None]] = []

    def forward(self, latents, timestep, context, run, *, keep, image, step_end):
        self.asked.append((float(timestep), float(step_end), context.glyphs))
        return torch.zeros_like(latents)


def test_each_step_of_a_distilled_model_is_told_its_end_and_each_pass_its_glyphs() -> None:
    (spec,) = (spec for spec in specs() if spec.name == "hunyuan1.5_step_distilled")
    network, glyphs = Told(), torch.ones(1, 2, 3)
    sampling = Sampling(scheduler="distilled", shift=5.0, cfg_scale=2.0)
    cond, uncond = (Conditioning(torch.zeros(1, 4, 8), torch.zeros(1, 33, 1, 2, 2), None, glyphs * n) for n in (1, 2))
    model = Model(spec, torch.device("cpu"), lambda: network)
    diffuse(model, Start(torch.zeros(1, 32, 1, 2, 2)), sampling, cond, uncond)
    levels = [1000.0, 937.5, 2500 / 3, 625.0, 0.0]
    for index, (timestep, end, seen) in enumerate(network.asked):
        assert (timestep, end) == pytest.approx((levels[index // 2], levels[index // 2 + 1]))
        assert torch.equal(seen, glyphs * (1 + index % 2))
    assert len(network.asked) == 8


def test_caches(folder) -> None:
    pipe = pipeline(folder, infer_steps=10, num_frames=1, guidance_scale=1)
    every = video(pipe)
    with pytest.raises(ValueError, match="is published as 480p_i2v, and the name does not say which this is"):
        pipe.enable_cache("Mag")
    files = pipe.calibrate(["a red cat"], progress=False)
    try:
        for method, given in (("Tea", {"teacache_thresh": 5.0}), ("Mag", {"magcache_thresh": 5.0})):
            pipe.enable_cache(method, **given)
            found = video(pipe)
            assert sum(report.saved for report in pipe.cache_reports) > 0
            assert 0 < relative_error(found, every) < 1
            pipe.enable_cache(method, **dict.fromkeys(given, 0.0))
            assert torch.equal(video(pipe), every), "a threshold of 0 is off"
    finally:
        for file in files:
            file.unlink()


def test_loras_go_on_and_come_off(folder, made, tmp_path) -> None:
    """ComfyUI's names, q, k and v in one; merged and beside the weights."""
    generator = torch.Generator().manual_seed(7)
    size, pairs = FITTING.hidden_size, {}
    for layer, rows in (("img_attn.qkv", 3 * size), ("txt_mlp.0", FITTING.ffn_size)):
        name = f"diffusion_model.double_blocks.0.{layer}"
        pairs[f"{name}.lora_down.weight"] = torch.randn(4, size, generator=generator) / 4
        pairs[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator)
    write(pairs, tmp_path / "lora.safetensors")
    pipe = pipeline(folder)
    pipe.enable_lora([{"path": tmp_path / "lora.safetensors", "strength": 1.0}])
    merged = video(pipe)
    assert (merged - made).abs().max() > 0.01
    pipe.enable_lora([{"path": tmp_path / "lora.safetensors"}], lora_dynamic_apply=True)
    assert relative_error(video(pipe), merged) < 1e-4
    pipe.switch_lora("")
    assert torch.equal(video(pipe), made)


def test_without_siglip_there_are_no_pictures(folder, picture, tmp_path) -> None:
    blind = copied(folder, tmp_path / "blind")
    shutil.rmtree(blind / "vision_encoder")
    with pytest.raises(CheckpointError, match="no image encoder here; looked for vision_encoder/siglip/image_encoder"):
        video(pipeline(blind, task="i2v"), image_path=picture)


def test_doctor_names_the_parts(folder) -> None:
    told = dict(parts(folder))
    assert "transformer/480p_t2v: HunyuanVideo-1.5 (" in told["transformer"]
    places = {
        "text encoder": "text_encoder/llm",
        "glyph encoder": "Glyph-SDXL-v2",
        "image encoder": "vision_encoder/siglip",
        "VAE": "vae:",
    }
    assert all(place in told[part] for part, place in places.items())
