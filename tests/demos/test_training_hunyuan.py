"""What the training of the small HunyuanVideo-1.5 assumes about inference, its files, and all of it in miniature."""

import math
from itertools import pairwise, product

import pytest
import torch
from safetensors.torch import load_file

from demo import train
from demo.grammar import BACKDROP_COLOURS, COLOURS, SHAPES, SIZES, STATIONARY, caption, training_attributes
from demo.stages import t2v15
from demo.stages.evaluate15 import load_folder
from demo.stages.export15 import EXACT, TEXT_ENCODER, TRANSFORMER, VAE, export_t2v, export_vae
from demo.stages.gguf import round_q4_0, to_q4_0
from demo.stages.lean import EDGE_FORMS, make_lean
from demo.stages.pool import latent_coverage
from demo.stages.run import Run
from demo.stages.vae15 import HUNYUAN15, WIDTHS
from lightx2v.checkpoint import assign, read_header
from lightx2v.guidance import Conditioning
from lightx2v.identify import identify
from lightx2v.text import hunyuan15
from lightx2v.vae.hunyuan15 import load
from lightx2v_kernels.ggml import restore

PROMPTS = [
    "a red circle moves left over a black background",
    "",
    "over a plain white background, a big cyan ring spins",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return Run(device=torch.device("cpu"), state=folder, out=folder, deadline=math.inf, dry=True)


@pytest.fixture(scope="module")
def exported(run):
    """Networks whose weights a file holds exactly, and their files."""
    networks, generator = t2v15.new_networks(run), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in networks.transformer.named_parameters():
            if weight.ndim == 1 or name.startswith("final_layer"):
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
            weight.copy_(weight.half())
        for weight in networks.encoder.parameters():
            weight.copy_(weight.half())
    round_q4_0(networks.rounded())
    weights = {f"transformer.{name}": value for name, value in networks.transformer.named_parameters()}
    export_t2v(run, {**weights, **dict(networks.named_parameters())}, run.out)
    vae = HUNYUAN15.empty()
    HUNYUAN15.start(vae, generator)
    export_vae(vae, run.out)
    return networks


def difference(a, b):
    return float((a - b).norm() / b.norm())


def test_captions_are_read_as_the_engine_reads_prompts(run):
    tokenizer = t2v15.tokenizer_of(run)
    captions = [caption(a) for a in training_attributes(40, seed=3)]
    rows = t2v15.chat_ids(tokenizer)([*captions, ""])
    for text, row in zip([*captions, ""], rows.tolist(), strict=True):
        ids, start = tokenizer.asked(text)
        assert row == ids[start:] + [t2v15.padding(tokenizer)] * (t2v15.TOKENS - len(ids) + start)
    with pytest.raises(ValueError, match=str(t2v15.TOKENS)):
        t2v15.chat_ids(tokenizer)(["red " * 40])


def test_the_longest_captions_fit(run):
    """The wordiest form of every part, of which one clip in some ten thousand has all."""
    subject = (
        "a video of a {size} {colour} {shape} that {motion} in front of a background of {way} {one} and {two} stripes."
    )
    words = [
        dict(zip(("size", "colour", "shape"), each, strict=True))
        for each in product(*map(spoken, (SIZES, COLOURS, SHAPES)))
    ]
    backdrops = [{"way": "horizontal", "one": one, "two": two} for one, two in pairwise(BACKDROP_COLOURS)]
    motions = [*spoken(STATIONARY), *(f"{verb} diagonally up and right" for verb in ("travels", "is moving"))]
    captions = [subject.format(**each, **backdrops[0], motion=motions[0]) for each in words]
    captions += [subject.format(**words[-1], **each, motion=motion) for each in backdrops for motion in motions]
    assert t2v15.chat_ids(t2v15.tokenizer_of(run))(captions).shape == (len(captions), t2v15.TOKENS)


def spoken(table):
    return [word for forms in table.values() for word in forms]


@torch.no_grad()
def test_training_sees_what_inference_sees(run, exported):
    """Padded prompts under a bias, against the exported files, prompt by prompt, in the engine's own modules."""
    ids = t2v15.chat_ids(t2v15.tokenizer_of(run))(PROMPTS)
    words, valid = t2v15.encode_text(exported, ids), ids != exported.empty[-1]
    generator = torch.Generator().manual_seed(2)
    latents, timestep = torch.randn(3, 32, 5, 8, 8, generator=generator), 700.0
    trained = t2v15.velocity(exported, latents, torch.full((3,), timestep), words, valid)
    loaded = load_folder(run.out, run.device, torch.float32)
    velocity = loaded.velocity(loaded.transformer)
    encoder = hunyuan15.load(run.out / TEXT_ENCODER, None)
    for index, prompt in enumerate(PROMPTS):
        context = encoder.condition(prompt).context
        assert difference(words[index : index + 1, : context.shape[1]], context) < 1e-5
        used = velocity(latents[index : index + 1], timestep, Conditioning(context))
        assert difference(trained[index : index + 1], used) < 1e-5
    other = velocity(latents[:1], timestep, Conditioning(encoder.condition(PROMPTS[2]).context))
    assert difference(trained[:1], other) > 1e-3, "the prompt matters, or this test shows nothing"


def test_the_gguf_file_holds_what_was_trained(run, exported):
    info = identify(run.out / TRANSFORMER)
    assert info.spec.name == "hunyuan1.5" and info.config == exported.transformer.config
    assert "double_blocks.0.img_attn_qkv.weight" in read_header(run.out / TRANSFORMER).tensors
    model, _, _ = t2v15.new_transformer(info.config, run.device, torch.Generator())
    assign(model, info.header, dtype=torch.float32, device=run.device)
    stored, exact = model.state_dict(), load_file(run.out / EXACT)
    assert stored.keys() == exact.keys()
    # float16 rounds the product of a code and its scale once more.
    assert all(torch.allclose(stored[name], exact[name].float(), rtol=1e-3, atol=1e-6) for name in exact)


def test_q4_0_is_ggmls(run):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(4))
    rounded = weight.clone()
    round_q4_0([rounded])
    blocks = torch.frombuffer(bytearray(to_q4_0(weight)), dtype=torch.uint8)
    assert torch.equal(restore(blocks, "Q4_0", (6, 64)), rounded)
    again = rounded.clone()
    round_q4_0([again])
    assert torch.equal(again, rounded) and 0.02 < difference(rounded, weight) < 0.12


def test_the_autoencoders_file_holds_what_was_trained(run, exported):
    vae = HUNYUAN15.empty()
    HUNYUAN15.start(vae, torch.Generator().manual_seed(5))
    before = vae.state_dict()["decoder.mid.block_1.conv1.conv.weight"].clone()
    HUNYUAN15.round(vae)
    export_vae(vae, run.out)
    stored = load(run.out / VAE, dtype=torch.float32, device="cpu").state_dict()
    kept = vae.state_dict()
    name = "decoder.mid.block_1.conv1.conv.weight"
    assert torch.equal(stored[name], kept[name]) and 0.01 < difference(kept[name], before) < 0.05
    assert all(torch.equal(stored[each], kept[each].half().float()) for each in kept)


@torch.no_grad()
@pytest.mark.parametrize("form", EDGE_FORMS)
def test_lean_forms_compute_the_same(form):
    vae, generator = HUNYUAN15.empty(), torch.Generator().manual_seed(0)
    HUNYUAN15.start(vae, generator)
    clips = torch.rand(1, 3, 5, 32, 32, generator=generator) * 2 - 1
    latents = vae.posterior(clips)[0]
    picture = vae.reconstruct(latents)
    make_lean(vae, dict.fromkeys(WIDTHS, form))
    assert difference(vae.posterior(clips)[0], latents) < 1e-5
    assert difference(vae.reconstruct(latents), picture) < 1e-5
    with pytest.raises(ValueError, match="whole clips"):
        vae.posterior(clips, {})


def test_large_cells_hold_the_edge_themselves():
    coverage = torch.zeros(1, 17, 128, 128)
    coverage[0, 6, 40, 80] = 1  # frame 6 belongs to latent frame 2, pixel (40, 80) to cell (2, 5)
    assert latent_coverage(coverage, 16).nonzero().tolist() == [[0, 2, 2, 5]]


def test_the_whole_script_in_miniature(tmp_path):
    out = tmp_path / "out"
    arguments = ["--family", "hunyuan", "--dry", "--device", "cpu", "--state", str(tmp_path / "state")]
    assert train.main([*arguments, "--out", str(out)]) == 0
    assert all((out / name).stat().st_size > 0 for name in (TRANSFORMER, TEXT_ENCODER, VAE))
    assert "100% of the transformer's training done" in (out / "log.txt").read_text()
    with pytest.raises(ValueError, match="--start"):
        train.main([*arguments[:-1], str(tmp_path / "other"), "--out", str(out), "--start", str(out)])
