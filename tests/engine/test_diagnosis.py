"""Where values stop being finite is said: step, pass, block, attention backend, and what to try. No file is left."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightx2v.__main__ import main
from lightx2v.blocks import RunBlocks, Unadded, added
from lightx2v.cache.turn import Turn
from lightx2v.config import Sampling
from lightx2v.diagnosis import explain
from lightx2v.diffuse import Model, Start, diffuse
from lightx2v.guidance import Conditioning
from lightx2v.models import specs
from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v.offload import BlockStream
from lightx2v.sampling import Step
from lightx2v.vae.stream import decode
from lightx2v.vae.tiling import Tiling, decode_tiled
from lightx2v_kernels import select
from tiny_vae import tiny_vae
from tiny_wan import DIT, SMALL, pipeline, video, write_folder

CPU = torch.device("cpu")
T2V = next(spec for spec in specs() if spec.name == "wan2.1_t2v")
GUIDED = Sampling(seed=7, steps=3, cfg_scale=3.0, scheduler="euler")
PROMPTS = torch.randn(2, 1, 5, 32, generator=torch.Generator().manual_seed(3)).unbind(0)
NAN = float("nan")


@pytest.fixture
def network() -> WanTransformer:
    torch.manual_seed(0)
    config = WanConfig(128, 64, 3, 16, 16, 32, 64, (1, 2, 2))
    return WanTransformer(config, select(device=CPU, dtype=torch.float32, head_dim=128)).eval().requires_grad_(False)


def whole(network: nn.Module) -> Model:
    return Model(T2V, CPU, lambda: network)


def message(model: Model, sampling: Sampling = GUIDED, prompts: tuple[Tensor, ...] = PROMPTS, **options: object) -> str:
    cond, uncond = map(Conditioning, prompts)
    latents = options.pop("latents", torch.zeros(1, 16, 2, 4, 6))
    with pytest.raises(FloatingPointError) as raised:
        diffuse(model, Start(latents), sampling, cond, uncond, **options)
    return str(raised.value)


def breaks_after(network: nn.Module, calls: int) -> None:
    """The second block's result is infinite in every pass after so many."""
    seen: list[int] = []

    def hook(module: nn.Module, args: object, out: Unadded) -> Unadded | Tensor:
        seen.append(1)
        return added(out) * float("inf") if len(seen) > calls else out

    network.blocks[1].register_forward_hook(hook)


def test_a_damaged_weight_is_named_with_its_block(network: WanTransformer) -> None:
    network.blocks[1].ffn[2].weight[0, 0] = NAN
    assert message(whole(network)) == (
        "step 1 of 3 (sigma 1.0000) produced NaN or infinity, first in block 2 of 3 (cond pass, attention backend "
        "torch_sdpa, float32); its ffn.2.weight is not finite: the file, or a LoRA added to it, is damaged; load "
        "another"
    )


def test_values_that_grow_too_large_are_the_computations_fault(network: WanTransformer) -> None:
    breaks_after(network, 4)  # the third step's first pass
    said = message(whole(network))
    assert re.match(r"step 3 of 3 \(sigma 0\.\d+\) produced NaN or infinity, first in block 2 of 3 \(cond pass", said)
    assert said.endswith("; its weights are finite: try attention exact or torch_sdpa")


def test_float16_is_told_of_bfloat16(network: WanTransformer) -> None:
    kernels = select(device=CPU, dtype=torch.float16, head_dim=128, attention="reference")
    half = WanTransformer(network.config, kernels).eval().requires_grad_(False).half()
    half.load_state_dict(network.state_dict())
    breaks_after(half, 0)
    said = message(whole(half))
    assert "attention backend reference, float16" in said and said.endswith(", and bf16 instead of fp16 weights")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda n: n.patch_embedding.weight.fill_(NAN),
            "before the blocks (cond pass, attention backend torch_sdpa, fl",
        ),
        (lambda n: n.text_embedding[0].weight.fill_(NAN), "in what they read as 'context'"),
        (lambda n: n.time_projection[1].bias.fill_(NAN), "in what they read as 'modulation'"),
        (lambda n: n.head.head.weight.fill_(NAN), "after the blocks: in the head's weights"),
    ],
    ids=["patches", "text", "time", "head"],
)
def test_what_is_around_the_blocks_is_told_apart(
    network: WanTransformer, damage: Callable[[WanTransformer], object], words: str
) -> None:
    damage(network)
    assert words in message(whole(network))


def test_what_is_given_is_looked_at_before_the_first_step(network: WanTransformer) -> None:
    network.register_forward_pre_hook(lambda *args: pytest.fail("computed"))
    bad = PROMPTS[1].clone()
    bad[0, 0, :2] = NAN
    assert message(whole(network), prompts=(PROMPTS[0], bad)) == (
        "the text embedding ('context') of the negative conditioning held NaN or infinity in 2 of 160 values (float32) "
        "before sampling: encode again; if they stay, the encoder's file is damaged: use another"
    )
    assert "of the positive conditioning" in message(whole(network), prompts=(bad, PROMPTS[0]))
    latents = torch.zeros(1, 16, 2, 4, 6, dtype=torch.float16)
    latents[0, 3] = float("inf")
    assert message(whole(network), latents=latents).startswith(
        "the latents to start from held NaN or infinity in 48 of 768 values (float16) before sampling: encode again"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [("image", "the image latents or their mask"), ("clip", "the image embedding"), ("glyphs", "quoted text")],
)
def test_of_conditioning_the_part_is_named(network: WanTransformer, name: str, words: str) -> None:
    cond = replace(Conditioning(PROMPTS[0]), **{name: torch.full((1, 2, 3), NAN)})
    with pytest.raises(FloatingPointError, match=rf"{words} \('{name}'\) of the positive conditioning held NaN"):
        diffuse(whole(network), Start(torch.zeros(1, 16, 2, 4, 6)), replace(GUIDED, cfg_scale=1.0), cond, None)


def test_a_mask_of_nan_is_named(network: WanTransformer) -> None:
    start = Start(torch.zeros(1, 16, 2, 4, 6), mask=torch.full((4, 6), NAN))
    with pytest.raises(FloatingPointError, match=r"^the mask held NaN or infinity in 24 of 24 values"):
        diffuse(whole(network), start, GUIDED, *map(Conditioning, PROMPTS))


def test_latents_that_a_solver_breaks_are_no_networks_fault(network: WanTransformer) -> None:
    step = Step(1, 3, 0.5, 0.2, 500.0)
    why = explain(lambda: pytest.fail("did the step again"), cached=False)
    assert why(torch.full((1, 16, 2, 4, 6), NAN), step) == "in the latents that the step began with; encode them again"


def test_of_two_experts_the_one_at_fault_is_named(network: WanTransformer) -> None:
    torch.manual_seed(1)
    low = WanTransformer(network.config, network.kernels).eval().requires_grad_(False)
    low.blocks[2].ffn[0].bias.fill_(NAN)
    said = message(Model(T2V, CPU, lambda: network, lambda: low), replace(GUIDED, boundary=0.875, boundary_step=1))
    assert (
        said.startswith("step 2 of 3")
        and "first in block 3 of 3 (cond pass of the low-noise expert, " in said
        and "its ffn.0.bias is not" in said
    )


@pytest.mark.parametrize("resident", [0, 1, 3])
def test_blocks_that_pass_through_are_looked_at_too_and_go_home(network: WanTransformer, resident: int) -> None:
    network.blocks[1].ffn[2].weight[0, 0] = NAN
    stream = BlockStream({"": network}, CPU)
    with stream.open(resident):
        said = message(Model(T2V, CPU, stream.bring, around=stream.around))
    assert "first in block 2 of 3 (cond pass" in said and "its ffn.2.weight is not finite" in said
    assert stream.device_bytes == 0


def test_what_only_a_cache_breaks_is_the_caches_fault(network: WanTransformer) -> None:
    def cache(turn: Turn, run: RunBlocks) -> object:
        return lambda step, branch: lambda blocks, tokens, args: run(blocks, tokens, args) * (NAN if step == 1 else 1)

    said = message(whole(network), cache=cache)
    assert said.startswith("step 2 of 3") and "without the cache; lower its threshold or leave it off" in said


def test_a_result_that_does_not_come_twice_and_a_device_that_fails_are_said(network: WanTransformer) -> None:
    passes: list[int] = []

    def once(module: nn.Module, args: object, out: Unadded) -> Tensor:
        passes.append(1)
        if len(passes) == 4 and fails:
            raise RuntimeError("CUDA error: out of order")
        return added(out) * (NAN if len(passes) == 1 else 1)

    network.blocks[0].register_forward_hook(once)
    fails = False
    assert "differs from run to run; try attention exact" in message(whole(network))
    passes.clear()
    fails = True
    assert message(whole(network)).endswith("to find where failed: CUDA error: out of order")


def test_a_finite_run_is_looked_at_once_a_step(network: WanTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Tensor] = []
    isfinite = Tensor.isfinite
    monkeypatch.setattr(Tensor, "isfinite", lambda x: looks.append(x) or isfinite(x))
    diffuse(whole(network), Start(torch.zeros(1, 16, 2, 4, 6)), GUIDED, *map(Conditioning, PROMPTS))
    assert len(looks) == 3 + 3  # each step's estimate; before, the latents and two prompts


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Wan folder, one weight of whose second block is NaN."""
    folder = write_folder(tmp_path_factory.mktemp("damaged"))
    weights = load_file(folder / DIT)
    weights["blocks.1.cross_attn.o.weight"][0, 0] = NAN
    save_file(weights, folder / DIT)
    return folder


WORDS = r"step 1 of 2 .*first in block 2 of \d+ \(cond pass, attention backend reference, float32\); its cross_attn\.o"


def test_the_pipeline_leaves_no_file(damaged: Path, tmp_path: Path) -> None:
    pipe = pipeline(damaged, attn_mode="reference")
    with pytest.raises(FloatingPointError, match=WORDS):
        pipe.generate(seed=1, prompt="a", save_result_path=tmp_path / "a.mp4", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_leaves_no_file(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["generate", "--model_path", str(damaged), "--prompt", "a", "--save_result_path", str(tmp_path / "a.mp4")]
    line += ["--attn_mode", "reference", "--quiet"]
    for name, value in SMALL.items():
        line += [f"--{name}", str(value)]
    assert main(line) == 1
    assert re.search(WORDS, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_sound_folder_makes_a_video(sound: Path) -> None:
    video(pipeline(sound, attn_mode="reference"))


def test_frames_that_are_not_finite_are_the_vaes_fault() -> None:
    vae = tiny_vae()
    raw = torch.randn(1, 16, 3, 4, 4)
    assert decode(vae, raw).isfinite().all()
    broken = raw.clone()
    broken[0, 0, 1, 2, 2] = NAN
    said = r"^decoding gave NaN or infinity from frame 2 of 9 on \(WanVAE, float32\): the latents held them"
    with pytest.raises(FloatingPointError, match=said):
        decode(vae, broken, chunk=1)
    vae.decoder.head[0].gamma.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"frame 1 of 9 on .*: its decoder\.head\.0\.gamma is not"):
        decode(vae, raw)
    with pytest.raises(FloatingPointError, match=r"decoder\.head\.0\.gamma"):
        decode_tiled(lambda part: decode(vae, part, clamp=False), raw, vae.space.stride, Tiling(32, 16))


def test_infinities_are_seen_before_they_are_clamped_to_white() -> None:
    vae = tiny_vae()
    vae.decoder.head[2].bias.fill_(3e38)
    vae.decoder.head[2].weight.mul_(1e38)
    with pytest.raises(FloatingPointError, match="its weights are finite: their type is too narrow"):
        decode(vae, 50 * torch.randn(1, 16, 1, 4, 4))


def test_a_black_video_is_not_saved(sound: Path, tmp_path: Path) -> None:
    weights = load_file(sound / "Wan2.1_VAE.safetensors")
    weights["decoder.conv1.bias"][0] = NAN
    save_file(weights, sound / "Wan2.1_VAE.safetensors")
    with pytest.raises(FloatingPointError, match=r"its decoder\.conv1\.bias is not finite"):
        pipeline(sound).generate(seed=1, prompt="a", save_result_path=tmp_path / "a.mp4", progress=False)
    assert not (tmp_path / "a.mp4").exists()


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_folder(tmp_path)
