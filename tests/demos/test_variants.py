"""Variants of the small models: what their training assumes, their files, and the whole script in miniature."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo import variants
from demo.grammar import Attributes, held_out_pairs, parse
from demo.judge import judge, score
from demo.optim import Optimizer, Settings
from demo.shipped import BASE as MODEL
from demo.stages import expert, fp8, i2v, lora, student, style
from demo.stages.base import keep_blocks, load_base, trainable
from demo.stages.export import import_vae
from demo.stages.pool import Pool
from demo.stages.run import Run
from demo.stages.t2v import Mixture, _noise_levels
from demo.stages.vae import load_vae
from demo.world import render, scene_of
from lightx2v.latents import WAN21
from lightx2v.sampling import Step
from lightx2v.solvers import euler


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    import_vae(Path(MODEL), folder)
    return Run(device=torch.device("cpu"), state=folder, out=folder, deadline=math.inf, dry=True)


@pytest.fixture(scope="module")
def base(run):
    return load_base(run, Path(MODEL))


@pytest.fixture(scope="module")
def drawn(run):
    """Two held-out clips as the world draws them, with what made them."""
    scene = scene_of([parse(prompt) for prompt, _ in held_out_pairs(2)])
    return scene, render(scene, torch.Generator().manual_seed(3))


def relative(a, b):
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def test_given_images_are_encoded_as_the_clip_that_they_begin(run, drawn):
    vae, frames = load_vae(run), drawn[1].frames
    images = i2v.encode_images(run, vae, frames, torch.tensor([False, True]))
    whole = WAN21.normalize(vae.posterior(frames)[0])
    assert relative(images.latents[:, :, 0].float(), whole[:, :, 0]) < 1e-3, "the VAE is causal"
    blank = frames.clone()
    blank[:, :, 1:] = 0
    alone = WAN21.normalize(vae.posterior(blank)[0])
    assert relative(images.latents[0].float(), alone[0]) < 1e-3
    assert relative(images.latents[1, :, -1].float(), alone[1, :, -1]) > 0.1, "the last image must be in there"


def test_the_condition_has_wans_order():
    images = i2v.Images(torch.full((2, 16, 5, 4, 4), 7.0), torch.tensor([False, True]))
    condition = images.condition()
    assert condition.shape == (2, 20, 5, 4, 4) and (condition[:, 4:] == 7).all()
    # Pixel frame by pixel frame: the first frame stands four times, then come the other sixteen.
    frames = condition[:, :4].transpose(1, 2).flatten(1, 2)[:, 3:, 0, 0]
    assert frames[0].tolist() == [1] + [0] * 16 and frames[1].tolist() == [1] + [0] * 15 + [1]


@torch.no_grad()
def test_new_channels_change_nothing_at_first(run, base):
    from dataclasses import replace

    config = replace(base.config, in_channels=36)
    wide = trainable(run, config, i2v.widened(base.weights))
    plain = trainable(run, base.config, base.weights)
    generator = torch.Generator().manual_seed(0)
    latents, extra = (torch.randn(1, n, 2, 4, 4, generator=generator) for n in (16, 20))
    context, timestep = torch.randn(1, 32, 4096, generator=generator), torch.tensor([700.0])
    assert relative(wide(torch.cat([latents, extra], 1), timestep, context), plain(latents, timestep, context)) < 1e-6


def test_noise_levels_keep_above_the_floor():
    levels = _noise_levels(4000, expert.MIXTURE, torch.Generator().manual_seed(0))
    assert expert.MIXTURE.floor < expert.BOUNDARY and levels.min() >= expert.MIXTURE.floor and levels.max() <= 1
    assert levels.min() < expert.BOUNDARY
    assert _noise_levels(4000, Mixture(), torch.Generator().manual_seed(0)).min() < 0.2


def test_the_pair_switches_at_the_boundary():
    velocity = expert.pair(lambda *_: "high", lambda *_: "low")
    assert [velocity(None, t, None) for t in (1000.0, 875.0, 874.9, 0.0)] == ["high", "high", "low", "low"]


def test_kept_blocks_keep_their_weights(base):
    config, weights = keep_blocks(base, [0, 3, 5])
    assert config.num_layers == 3
    for new, old in enumerate((0, 3, 5)):
        name = "self_attn.q.weight"
        assert torch.equal(weights[f"blocks.{new}.{name}"], base.weights[f"blocks.{old}.{name}"])
    assert torch.equal(weights["head.head.weight"], base.weights["head.head.weight"])


@pytest.mark.parametrize("layout", [fp8.to_lightx2v, fp8.to_comfy])
def test_8_bit_files_read_back(base, layout, tmp_path):
    path = tmp_path / "small.safetensors"
    tensors = layout(base.weights)
    assert fp8.write(tensors, path, {"format": "pt"}) == path.stat().st_size
    again = fp8.read_fp8(path)
    assert again.keys() == base.weights.keys() and [p.name for p in tmp_path.iterdir()] == [path.name]
    for name, value in base.weights.items():
        assert relative(again[name], value) < (0.04 if tensors[name].dtype == fp8.FP8 else 0.003), name


def test_8_bit_layouts_have_the_published_names(base):
    ours, comfy = fp8.to_lightx2v(base.weights), fp8.to_comfy(base.weights)
    assert ours["blocks.1.ffn.2.weight"].dtype == torch.float8_e4m3fn
    assert ours["blocks.1.ffn.2.weight_scale"].shape == (256, 1)
    assert {ours[n].dtype for n in ("text_embedding.0.weight", "blocks.0.modulation")} == {torch.bfloat16}
    assert comfy["text_embedding.0.weight"].dtype == comfy["head.head.weight"].dtype == torch.float8_e4m3fn
    assert comfy["head.head.scale_weight"].shape == comfy["head.head.scale_input"].shape == ()
    assert {comfy[n].dtype for n in ("patch_embedding.weight", "blocks.0.modulation")} == {torch.float16}
    assert comfy["scaled_fp8"].shape == (0,)


def test_numbers_beyond_the_layout_are_refused(tmp_path):
    with pytest.raises(FloatingPointError, match=r"'head\.modulation' does not fit"):
        fp8.write(fp8.to_comfy({"head.modulation": torch.full((1, 2, 4), 1e6)}), tmp_path / "a.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_factors_get_the_gradients_of_a_low_rank_product(run, base):
    """Against autograd through base + up @ down."""
    transformer = trainable(run, *keep_blocks(base, [0]))
    factors = lora.new_factors(transformer, 4, torch.Generator().manual_seed(0))
    for group in factors.groups:
        group.up.data.normal_(std=0.01, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    latents, context = torch.randn(1, 16, 1, 4, 4, generator=generator), torch.randn(1, 32, 4096, generator=generator)

    def loss(weights):
        made = torch.func.functional_call(transformer, weights, (latents, torch.tensor([500.0]), context))
        return made.square().mean()

    products = {}
    for group in factors.groups:
        merged = group.base + group.up @ group.down
        products |= {f"{layer}.weight": merged[i] for i, layer in enumerate(group.layers)}
    pairs = factors.named_parameters()
    expected = torch.autograd.grad(loss(products), [p for _, p in pairs])
    factors.merge()
    loss({}).backward()
    factors.pull()
    for (name, parameter), wanted in zip(pairs, expected, strict=True):
        assert relative(parameter.grad, wanted) < 1e-4, name


@pytest.mark.parametrize(("dialect", "first"), [(lora.to_comfy, "diffusion_model."), (lora.to_kohya, "lora_unet_")])
def test_lora_files_read_back(run, base, dialect, first, tmp_path):
    transformer = trainable(run, *keep_blocks(base, [0, 1]))
    factors = lora.new_factors(transformer, 4, torch.Generator().manual_seed(0))
    for group in factors.groups:
        group.up.data.normal_(std=0.01, generator=torch.Generator().manual_seed(1))
    optimizer = Optimizer(factors.named_parameters(), Settings(rate=1e-3, matrix_rate=0), lambda name, p: False)
    path = tmp_path / "lora.safetensors"
    fp8.write(dialect(factors, optimizer), path, {})
    assert len(load_file(path)) == 3 * 20 and all(name.startswith(first) for name in load_file(path))
    factors.merge()
    again = lora.merged({name: value for name, value in base.weights.items() if "blocks.2" not in name}, path)
    for name, weight in transformer.named_parameters():
        assert relative(again[name], weight.detach()) < 1e-3, name
        assert name.endswith("ffn.0.weight") <= (not torch.equal(again[name], base.weights[name]))


def test_a_lora_of_another_model_is_refused(tmp_path, base):
    path = tmp_path / "other.safetensors"
    layer = "diffusion_model.blocks.77.ffn.0"
    fp8.write({f"{layer}.lora_down.weight": torch.zeros(1, 2), f"{layer}.alpha": torch.tensor(1)}, path, {})
    with pytest.raises(ValueError, match=r"no weight for 'diffusion_model\.blocks\.77"):
        lora.merged(base.weights, path)


def test_the_teacher_visits_the_students_levels():
    assert student.LEVELS.sigmas == pytest.approx((1, 0.9375, 0.8333333, 0.625, 0))
    assert set(student.LEVELS.sigmas) <= set(student.TEACHER.sigmas) and len(student.TEACHER.timesteps) == 20


def test_following_the_students_targets_ends_where_the_teacher_ended():
    """Euler steps along the targets, from a state that is off the teacher's path."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, 1, 16, 1, 2, 2, generator=generator)
    own = states[:-1] + 0.1
    bank = student.Bank(torch.zeros(1, 1, 1), states, own, torch.zeros(1, 1, 1, 2, 2, dtype=torch.uint8))

    class Recorder:
        """Stands for a transformer and answers zero, so that the error is the target's square."""

        def __call__(self, latents, timestep, context):
            self.seen = latents, timestep
            return torch.zeros_like(latents)

    recorder = Recorder()
    for seed in range(12):
        _, error = student.student_loss(recorder, bank, 1, torch.Generator().manual_seed(seed))
        latents, timestep = recorder.seen
        level = min(range(4), key=lambda k: abs(student.LEVELS.timesteps[k] - float(timestep)))
        sigma, after = student.LEVELS.sigmas[level : level + 2]
        off = latents - states[level]
        target = (states[level] - states[level + 1]) / (sigma - after) + off / sigma
        assert float(error) == pytest.approx(float(target.square().mean()), rel=1e-4)
        x0 = latents - sigma * target
        arrived = euler(latents, x0, Step(level, 4, sigma, after, 1000 * sigma))
        assert relative(arrived, states[level + 1] + off * after / sigma) < 1e-4


def test_objects_are_found_in_latents():
    """Learnt from 40 clips, tried on 8 others, where no single channel tells an object from its backdrop."""
    generator = torch.Generator().manual_seed(0)
    there = torch.rand(48, 5, 4, 4, generator=generator) < 0.4
    latents = 0.3 * torch.randn(48, 16, 5, 4, 4, generator=generator)
    sign = (torch.rand(48, 1, 1, 1, generator=generator) < 0.5).float() * 2 - 1
    latents[:, 0] += torch.where(there, 2 * sign, 0.0)
    ids = torch.zeros(48, 1, 1, dtype=torch.int16)
    pool = Pool(latents.half(), there.to(torch.uint8) * 255, ids)
    finder = student.fit_finder(Pool(pool.latents[:40], pool.coverage[:40], ids[:40]), generator)
    found = finder(pool.latents[40:])
    assert found.shape == (8, 1, 5, 4, 4) and found.dtype == torch.uint8
    assert ((found[:, 0] > 127) == there[40:]).float().mean() > 0.9


def test_night_is_dark_and_keeps_the_object():
    white = Attributes("circle", "red", "left", "plain", ("white",))
    attributes = [white, *(parse(prompt) for prompt, _ in held_out_pairs(24))]
    scene = scene_of(attributes)
    clips = render(scene, torch.Generator().manual_seed(5))
    night = style.by_night(scene, clips)
    assert night.frames.min() >= -1 and night.frames.max() <= 1
    rates = score(judge(night.frames), attributes).rates()
    assert rates["colour"] == rates["motion"] == 1 and rates["shape"] > 0.97, rates
    by_day, dark = style.darkness(clips.frames), style.darkness(night.frames)
    assert dark.min() > 0.8 and (dark >= by_day - 0.03).all()
    assert by_day[0] < 0.1


def test_the_whole_script_in_miniature(tmp_path):
    out, state = tmp_path / "out", tmp_path / "state"
    common = ["--dry", "--device", "cpu", "--state", str(state), "--out", str(out)]
    assert variants.main(common) == 0, (out / "log.txt").read_text()
    assert {path.name for path in out.glob("*.safetensors")} == set(variants.FILES.values())
    results = json.loads((out / "results.json").read_text())
    told = {"i2v_cfg4", "flf2v_cfg2.5", "expert_pair_cfg4", "student_4steps", "style_on", "style_off", "base_cfg4"}
    assert told <= results.keys()
    assert all(results[f"{name}_train"]["steps"] > 0 for name in ("i2v", "expert", "student", "style"))
    patch = load_file(out / i2v.FILE)["patch_embedding.weight"]
    assert patch.shape[1] == 36 and patch[:, 16:].any()
    base_set = sum(path.stat().st_size for path in Path(MODEL).rglob("*") if path.is_file())
    assert base_set + results["variant_bytes"]["sum"] < 44e6


def test_a_failing_variant_does_not_stop_the_next(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no luck today")

    monkeypatch.setattr(expert, "train_expert", fail)
    monkeypatch.setattr(student, "train_student", fail)
    monkeypatch.setattr(style, "evaluate_style", fail)
    common = ["--dry", "--device", "cpu", "--state", str(tmp_path), "--out", str(tmp_path)]
    assert variants.main([*common, "--only", "expert,lora,student"]) == 1
    log = (tmp_path / "log.txt").read_text()
    assert "no luck today" in log and "failed: expert, judging lora, student" in log
    assert (tmp_path / style.FILE).exists() and not (tmp_path / expert.FILE).exists()


def test_unknown_variants_are_refused(capsys):
    with pytest.raises(SystemExit):
        variants.main(["--only", "i2v,vace"])
    assert "is not a list of: i2v, student, expert, lora" in capsys.readouterr().err
