"""LightX2VPipeline with images, two experts and LoRAs, on folders of small random weights."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_clip
import tiny_lora
from formats import sparse
from host.tiny_models import I2V, T2V, TI2V, Input, write_tiny_models, write_transformer
from lightx2v import LightX2VPipeline
from lightx2v.__main__ import main, parse_lora
from lightx2v.checkpoint import CheckpointError
from lightx2v.config import Engine
from lightx2v.identify import identify
from lightx2v.loading import load_transformer
from lightx2v.media import read_image
from lightx2v.models.wan.conditioning import image_latent
from lightx2v.shapes import VideoShape
from lightx2v.vae.padded import encode_padded
from tiny_vae import tiny_vae22

WIDTH, TOKENS = tiny_clip.SIZES.hidden_size, tiny_clip.SIZES.grid**2 + 1
SMALL = {"height": 32, "width": 48, "num_frames": 5, "infer_steps": 2, "resize_mode": "fixed_shape"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders and VAEs, by the names that they have in a model folder."""
    models, folder = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("shared")
    names = write_tiny_models(models)
    (models / "text_encoders" / names.text_encoder).rename(folder / "models_t5_umt5-xxl-enc.safetensors")
    (models / "vae" / names.vae).rename(folder / "Wan2.1_VAE.safetensors")
    save_file(tiny_vae22().state_dict(), folder / "Wan2.2_VAE.safetensors")
    clip = {name: tensor.contiguous() for name, tensor in tiny_clip.original(tiny_clip.state_dict()).items()}
    save_file(clip, folder / "models_clip_tiny.safetensors")
    return folder


def model_folder(shared: Path, path: Path, **transformers: Input) -> Path:
    """A model folder with the shared parts; transformers: file name without its end -> what it takes in."""
    path.mkdir(parents=True)
    for part in shared.iterdir():
        (path / part.name).hardlink_to(part)
    for seed, (name, takes) in enumerate(transformers.items(), start=1):
        write_transformer(path / f"{name}.safetensors", takes, seed=seed, num_layers=1)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two pictures, 90 wide and 60 high."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = (folder / "first é.png", folder / "last.jpg")
    for seed, path in enumerate(paths):
        pixels = tiny_clip.picture(60, 90, seed=seed)[0]
        Image.fromarray((pixels * 255).to(torch.uint8).numpy()).save(path)
    return paths


def made(pipe: LightX2VPipeline, **changes) -> Tensor:
    arguments = {"seed": 1, "prompt": "a red circle", "return_result_tensor": True, "progress": False, **changes}
    video = pipe.generate(**arguments)["video"]
    assert video is not None and video.std() > 0.01
    return video


def pipeline(folder: Path, model_cls: str, task: str, **changes) -> LightX2VPipeline:
    paths = {name: changes.pop(name) for name in list(changes) if name.endswith("ckpt")}
    pipe = LightX2VPipeline(folder, model_cls, task, **paths)
    pipe.create_generator(**{**SMALL, **changes})
    return pipe


def test_image_to_video_looks_at_the_image(shared: Path, pictures: tuple[Path, Path], tmp_path: Path) -> None:
    first, other = pictures
    takes = Input(channels=36, clip=WIDTH)
    pipe = pipeline(model_folder(shared, tmp_path / "m", diffusion_pytorch_model=takes), "wan2.1", "i2v")
    video = made(pipe, image_path=first)
    assert video.shape == (5, 32, 48, 3)
    assert torch.equal(made(pipe, image_path=str(first)), video)
    assert not torch.equal(made(pipe, image_path=other), video)
    assert not torch.equal(made(pipe, image_path=first, last_frame_path=other), video)


def test_both_ways_to_see_the_image_count(shared: Path, pictures: tuple[Path, Path], tmp_path: Path) -> None:
    """The picture goes in beside the noise and through CLIP: without weights for one of them the other still shows."""
    takes = Input(channels=36, clip=WIDTH)
    folder = model_folder(shared, tmp_path / "m", diffusion_pytorch_model=takes)
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    patch, tokens = weights["patch_embedding.weight"].clone(), weights["blocks.0.cross_attn.v_img.weight"].clone()
    for kept, silent in (("channels", "blocks.0.cross_attn.v_img.weight"), ("clip", "patch_embedding.weight")):
        weights["patch_embedding.weight"], weights["blocks.0.cross_attn.v_img.weight"] = patch.clone(), tokens.clone()
        weights[silent][:, 16 if kept == "clip" else 0 :] = 0
        save_file(weights, path)
        pipe = pipeline(folder, "wan2.1", "i2v", guidance_scale=1)
        videos = [made(pipe, image_path=picture) for picture in pictures]
        assert not torch.equal(*videos), f"with {kept} alone"


def test_first_and_last_frame(shared: Path, pictures: tuple[Path, Path], tmp_path: Path) -> None:
    first, last = pictures
    takes = Input(channels=36, clip=WIDTH, positions=2 * TOKENS)
    pipe = pipeline(model_folder(shared, tmp_path / "m", diffusion_pytorch_model=takes), "wan2.1", "flf2v")
    video = made(pipe, image_path=first, last_frame_path=last)
    assert not torch.equal(made(pipe, image_path=last, last_frame_path=first), video)
    assert not torch.equal(made(pipe, image_path=first, last_frame_path=first), video)


def test_the_image_gives_the_proportions(shared: Path, pictures: tuple[Path, Path], tmp_path: Path) -> None:
    folder = model_folder(shared, tmp_path / "m", diffusion_pytorch_model=I2V)
    pipe = pipeline(folder, "wan2.1", "i2v", height=64, width=64, resize_mode=None, infer_steps=1, guidance_scale=1)
    assert made(pipe, image_path=pictures[0]).shape == (5, 48, 64, 3), "78 x 52 has the area and the proportions"
    assert "64x48, 5 frames" in pipe.describe(pictures[0]) and "64x64" in pipe.describe()


def test_a_picture_is_the_first_frame_of_ti2v(shared: Path, pictures: tuple[Path, Path], tmp_path: Path) -> None:
    folder = model_folder(shared, tmp_path / "m", diffusion_pytorch_model=TI2V)
    pipe = pipeline(folder, "wan2.2", "i2v", height=32, width=64, num_frames=9)
    seen: list[Tensor] = []
    video = made(pipe, image_path=pictures[0], on_step=lambda step, x0: seen.append(x0.clone()))
    assert video.shape == (9, 32, 64, 3)
    assert not torch.equal(made(pipe, image_path=pictures[1]), video)
    # 90 x 60 cut to 2:1, then resized: what the first latent frame must be, whatever the transformer says.
    space, vae = pipe._info.spec.latents, pipe._parts.vae()
    latents, mask = image_latent(
        lambda count, **given: encode_padded(vae, count, **given), VideoShape(9, 32, 64), space, read_image(pictures[0])
    )
    assert mask is not None and mask[:, :, 0].max() == 0 and mask[:, :, 1:].min() == 1
    for x0 in seen:
        torch.testing.assert_close(x0[:, :, :1], space.normalize(latents)[:, :, :1], rtol=0, atol=1e-4)
    text_only = pipeline(folder, "wan2.2", "t2v", height=32, width=64, num_frames=9)
    assert not torch.equal(made(text_only), video)


@pytest.fixture(scope="module")
def experts(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(shared, tmp_path_factory.mktemp("moe") / "m", high_noise_model=T2V, low_noise_model=T2V)


def test_each_expert_has_its_steps(experts: Path) -> None:
    alone = [
        made(pipeline(experts, "wan2.1", "t2v", dit_original_ckpt=experts / f"{role}_noise_model.safetensors"))
        for role in ("high", "low")
    ]
    pipe = pipeline(experts, "wan2.2_moe", "t2v")
    both = made(pipe)
    assert not torch.equal(both, alone[0]) and not torch.equal(both, alone[1])
    pipe.create_generator(**SMALL, boundary=0.0)
    torch.testing.assert_close(made(pipe), alone[0], rtol=0, atol=1e-5)
    pipe.create_generator(**SMALL, boundary=1.0)
    torch.testing.assert_close(made(pipe), alone[1], rtol=0, atol=1e-5)
    pipe.create_generator(**SMALL, boundary=1.0, boundary_step_index=1)
    torch.testing.assert_close(made(pipe), both, rtol=0, atol=1e-5)
    pipe.create_generator(**SMALL, guidance_scale=(5, 3))
    assert not torch.equal(made(pipe), both)
    swapped = {"high_noise_original_ckpt": experts / "renamed.safetensors"}
    swapped["high_noise_original_ckpt"].write_bytes((experts / "low_noise_model.safetensors").read_bytes())
    same = pipeline(experts, "wan2.2_moe", "t2v", **swapped)
    torch.testing.assert_close(made(same), alone[1], rtol=0, atol=1e-5)


def test_a_distilled_pair_changes_after_two_steps(experts: Path) -> None:
    levels = {"guidance_scale": 1, "sample_shift": 1}  # 1, 0.75, 0.5, 0.25: only one is above the boundary
    pipe = pipeline(experts, "wan2.2_moe_distill", "t2v", **levels)
    plain = made(pipe)
    pipe.create_generator(**SMALL, **levels, boundary_step_index=2)
    assert torch.equal(made(pipe), plain)
    pipe.create_generator(**SMALL, **levels, boundary=0.875)
    assert not torch.equal(made(pipe), plain)


def write_lora(path: Path, transformer: Path, seed: int = 1) -> Path:
    """A LoRA for every linear layer of that transformer, in Kijai's dialect."""
    cpu = torch.device("cpu")
    module = load_transformer(identify(transformer), Engine(), cpu, cpu)
    return tiny_lora.write(path, tiny_lora.tensors(tiny_lora.factors(module, seed=seed), "kijai"))


@pytest.fixture(scope="module")
def lora(experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("loras") / "style.safetensors", experts / "high_noise_model.safetensors")


def test_a_lora_is_the_same_merged_and_beside_the_weights(experts: Path, lora: Path) -> None:
    pipe = pipeline(experts, "wan2.1", "t2v", dit_original_ckpt=experts / "high_noise_model.safetensors")
    without = made(pipe)
    pipe.enable_lora([{"path": lora, "strength": 0.8}])
    merged = made(pipe)
    assert (merged - without).abs().max() > 0.01
    pipe.enable_lora([{"path": str(lora), "strength": 0.8}], lora_dynamic_apply=True)
    torch.testing.assert_close(made(pipe), merged, rtol=0, atol=1e-3)
    pipe.switch_lora(lora, 0.4)
    assert (made(pipe) - merged).abs().max() > 0.005
    pipe.switch_lora("")
    assert torch.equal(made(pipe), without)


def test_a_lora_for_one_expert(experts: Path, lora: Path) -> None:
    pipe = pipeline(experts, "wan2.2_moe", "t2v")
    videos = [made(pipe)]
    for names in (["high_noise_model"], ["low_noise_model"], ["high_noise_model", "low_noise_model"]):
        pipe.enable_lora([{"path": lora, "name": name} for name in names])
        videos.append(made(pipe))
    for index, one in enumerate(videos):
        assert not any(torch.equal(one, other) for other in videos[index + 1 :])
    pipe.enable_lora([{"path": lora}])
    assert torch.equal(made(pipe), videos[-1])


NO_IMAGE = "starts from an image, and none is given"


@pytest.mark.parametrize(
    ("model_cls", "task", "takes", "given", "words"),
    [
        ("wan2.1", "i2v", I2V, (), NO_IMAGE),
        ("wan2.1", "i2v", Input(channels=36, clip=WIDTH), (), NO_IMAGE),
        ("wan2.1", "t2v", T2V, ("image_path",), "makes videos from text alone"),
        ("wan2.2", "i2v", TI2V, (), "task i2v starts from an image: give image_path"),
        ("wan2.2", "t2v", TI2V, ("image_path",), "image_path with task t2v"),
        ("wan2.2", "i2v", TI2V, ("image_path", "last_frame_path"), "can start from an image but not end on one"),
        ("wan2.1", "flf2v", I2V, ("image_path",), "task flf2v ends on an image: give last_frame_path"),
        ("wan2.1", "i2v", I2V, ("last_frame_path",), "task i2v starts from an image"),
        ("wan2.1", "i2v", I2V, ("missing",), "nowhere.png: no such picture"),
        ("wan2.1", "i2v", I2V, ("text",), "cannot be read as a picture"),
    ],
)
def test_wrong_images_are_said_before_weights_are_read(
    shared: Path, pictures, tmp_path: Path, model_cls: str, task: str, takes: Input, given: tuple, words: str
) -> None:
    pipe = pipeline(model_folder(shared, tmp_path / "m", diffusion_pytorch_model=takes), model_cls, task)
    text = tmp_path / "picture.png"
    text.write_text("not one")
    named = {"missing": {"image_path": tmp_path / "nowhere.png"}, "text": {"image_path": text}}
    images: dict[str, Path] = {}
    for name in given:
        images |= named.get(name, {name: pictures[0]})
    shutil.rmtree(tmp_path / "m")  # whoever read a weight now would say that the folder is gone
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        pipe.generate(prompt="a", progress=False, return_result_tensor=True, **images)
    right = {"t2v": (), "i2v": ("image_path",), "flf2v": ("image_path", "last_frame_path")}[task]
    with pytest.raises(CheckpointError, match="no text encoder here"):
        pipe.generate(prompt="a", progress=False, return_result_tensor=True, **{name: pictures[0] for name in right})


def test_experts_are_checked_from_headers_of_the_real_size(tmp_path: Path) -> None:
    tensors = sparse.manifest("lightx2v_wan2.2_i2v_A14B_distill_bf16")["tensors"]
    high, low = (
        sparse.write(tensors, tmp_path / f"wan2.2_i2v_A14b_{role}_noise.safetensors") for role in ("high", "low")
    )
    (tmp_path / "empty").mkdir()

    def load(first: Path, second: Path, task: str = "i2v") -> LightX2VPipeline:
        paths = {"high_noise_original_ckpt": first, "low_noise_original_ckpt": second}
        return LightX2VPipeline(tmp_path / "empty", "wan2.2_moe", task, **paths)

    load(high, low)
    with pytest.raises(CheckpointError, match="the experts are swapped by their names"):
        load(low, high)
    with pytest.raises(CheckpointError, match="picked as both experts"):
        load(high, high)
    with pytest.raises(CheckpointError, match="which does i2v and flf2v, not t2v"):
        load(high, low, "t2v")
    other = write_transformer(tmp_path / "other.safetensors", T2V, num_layers=1)
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        load(high, other)
    with pytest.raises(CheckpointError, match="no high-noise expert here; looked for high_noise_model"):
        LightX2VPipeline(tmp_path / "empty", "wan2.2_moe", "i2v").create_generator()


def test_loras_are_refused_before_weights_are_read(experts: Path, lora: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    path = tmp_path / "m" / "diffusion_pytorch_model.safetensors"
    path.hardlink_to(experts / "high_noise_model.safetensors")
    pipe = pipeline(tmp_path / "m", "wan2.1", "t2v")
    stranger = tiny_lora.write(tmp_path / "wide.safetensors", {
        f"diffusion_model.blocks.0.self_attn.q.lora_{part}.weight": torch.zeros(shape)
        for part, shape in (("A", (4, 512)), ("B", (512, 4)))
    })  # fmt: skip
    path.unlink()
    for config, words in (
        ({"path": tmp_path / "gone.safetensors"}, r"gone\.safetensors"),
        ({"path": stranger}, r"wide\.safetensors.*512"),
        ({"path": lora, "name": "high_noise_model"}, "is set for the high-noise expert, but one network was loaded"),
        ({"path": lora, "name": "middle"}, "expected path, and perhaps strength and name"),
        ({"path": lora, "strength": float("nan")}, "finite number"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe.enable_lora([config])
    with pytest.raises(ValueError, match=r"wide\.safetensors"):
        pipe.switch_lora(stranger)
    pipe.enable_lora([{"path": lora}])


def test_lora_argument(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    colon = tmp_path / "a:1:high"
    for file in (path, colon):
        file.touch()
    assert parse_lora(str(path)) == {"path": str(path)}
    assert parse_lora(f"{path}:0.5") == {"path": str(path), "strength": 0.5}
    assert parse_lora(f"{path}:-1:low") == {"path": str(path), "strength": -1.0, "name": "low_noise_model"}
    assert parse_lora(f"{path}:high") == {"path": str(path), "name": "high_noise_model"}
    assert parse_lora(str(colon)) == {"path": str(colon)}
    for text, there in ((f"{path}:strong", f"{path}:strong"), (f"{path}:1:middle", "middle"), ("nowhere:1", "nowhere")):
        with pytest.raises(ValueError, match=r"write PATH, PATH:STRENGTH or PATH:STRENGTH:high") as caught:
            parse_lora(text)
        assert there in str(caught.value)


@pytest.mark.parametrize("text", [r"C:\loras\x.safetensors", "C:/loras/x.safetensors", "C:x.safetensors", "C:7"])
def test_a_drive_letter_stays_in_the_path(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(text).parent.mkdir(parents=True, exist_ok=True)
    Path(text).touch()
    assert parse_lora(text) == {"path": text}
    assert parse_lora(f"{text}:0.5:high") == {"path": text, "strength": 0.5, "name": "high_noise_model"}
    Path(text).unlink()
    for gone in (text, f"{text}:0.5"):
        with pytest.raises(ValueError, match=re.escape(f"there is no file {text};")):
            parse_lora(gone)


def test_command_line(
    shared: Path, experts: Path, lora: Path, pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.mp4"
    size = ["--height=64", "--width=64", "--num_frames=5", "--infer_steps=2", "--prompt=a red circle", "--quiet"]
    size.append(f"--save_result_path={out}")
    folder = model_folder(shared, tmp_path / "m", diffusion_pytorch_model=I2V)
    image = ["generate", f"--model_path={folder}", "--task=i2v", *size]
    assert main([*image, f"--image_path={pictures[0]}", f"--last_frame_path={pictures[1]}"]) == 0
    assert "Wan2.2 I2V expert, 64x48, 5 frames" in capsys.readouterr().out and out.is_file()
    assert main([*image, f"--image_path={pictures[0]}", "--resize_mode=fixed_shape"]) == 0
    assert "64x64" in capsys.readouterr().out
    assert main(image) == 1
    assert NO_IMAGE in capsys.readouterr().err
    assert main([*image, f"--image_path={tmp_path / 'gone.png'}"]) == 1
    assert "gone.png: no such picture" in capsys.readouterr().err

    pair = ["generate", f"--model_path={tmp_path / 'm'}", "--model_cls=wan2.2_moe", *size]
    pair += [f"--{role}_noise_original_ckpt={experts / f'{role}_noise_model.safetensors'}" for role in ("high", "low")]
    pair += ["--guidance_scale", "4", "3", "--boundary=0.9", "--lora", f"{lora}:0.5:high", "--lora", f"{lora}::"]
    assert main(pair) == 1
    assert "there is no file" in capsys.readouterr().err
    pair[-1] = f"{lora}:1:low"
    assert main(pair) == 0
    assert "64x64, 5 frames at 16 fps, 2 unipc steps" in capsys.readouterr().out
    assert main([*pair, "--guidance_scale", "4", "3", "2"]) == 1
    assert "give one number, or two" in capsys.readouterr().err
    assert main([*pair, "--scheduler=distilled", "--denoising_step_list=1000,500,250", "--boundary_step_index=1"]) == 0
    assert "3 distilled steps" in capsys.readouterr().out
