"""What training assumes about inference, and the whole script in miniature."""

import math

import pytest
import torch

from demo import train
from demo.optim import Optimizer, Settings, orthogonalise, plateau
from demo.stages import t2v
from demo.stages.evaluate import load_folder
from demo.stages.export import export_t2v, export_vae, import_t2v
from demo.stages.lean import FORMS, make_lean
from demo.stages.pool import latent_coverage, pad_ids, tokenizer_of
from demo.stages.run import Run
from demo.stages.vae import fold_statistics, new_vae
from demo.tokenizer import Tokenizer
from lightx2v.latents import WAN21


@pytest.fixture
def run(tmp_path):
    return Run(device=torch.device("cpu"), state=tmp_path, out=tmp_path, deadline=math.inf, dry=True)


def difference(a, b):
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def test_training_sees_what_inference_sees(run, tmp_path):
    """32 rows of text with a weighted padding row, against the exported files, 512 rows and the engine's attention."""
    vocabulary = len(tokenizer_of(run))
    networks = t2v.new_networks(run, vocabulary)
    generator = torch.Generator().manual_seed(1)
    for name, weight in networks.named_parameters():
        if name.startswith("transformer"):
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
        weight.copy_(weight.half())
    export_t2v(run, dict(networks.named_parameters()), tmp_path)
    export_vae(new_vae(run.device, generator), tmp_path)
    loaded = load_folder(tmp_path, run.device, torch.float32)

    prompts = ["a red circle moves left over a black background", ""]
    ids = pad_ids(Tokenizer(tmp_path / "spiece.model").encode(prompts))
    context = t2v.encode_text(networks.encoder, ids, torch.float32)
    rows = torch.cat([loaded.encoder.encode(prompt) for prompt in prompts])
    latents = torch.randn(2, 16, 2, 4, 6, generator=generator)
    timestep = torch.tensor([900.0, 300.0])
    trained = networks.transformer(latents, timestep, context)
    used = loaded.transformer(latents, timestep, rows)
    assert difference(trained, used) < 1e-5
    cut = loaded.transformer(latents, timestep, rows[:, : context.shape[1]])
    assert difference(cut, used) > 0.05, "the padding rows matter, or this test shows nothing"


def test_export_and_import_are_inverse(run, tmp_path):
    networks = t2v.new_networks(run, len(tokenizer_of(run)))
    weights = {name: value.detach().half() for name, value in networks.named_parameters()}
    export_t2v(run, weights, tmp_path)
    again = import_t2v(tmp_path)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_weights_beyond_float16_are_refused(run, tmp_path):
    networks = t2v.new_networks(run, len(tokenizer_of(run)))
    weights = {name: value.detach() for name, value in networks.named_parameters()}
    weights["transformer.head.head.bias"] = torch.full_like(weights["transformer.head.head.bias"], 1e6)
    with pytest.raises(FloatingPointError, match=r"head\.head\.bias"):
        export_t2v(run, weights, tmp_path)
    assert not list(tmp_path.glob("diffusion*"))


@torch.no_grad()
def test_folding_gives_wans_statistics_and_changes_no_picture():
    vae = new_vae(torch.device("cpu"), torch.Generator().manual_seed(0))
    clips = torch.rand(2, 3, 5, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    before, spread = vae.posterior(clips)
    picture = vae.reconstruct(before)
    values = before.transpose(0, 1).flatten(1)
    fold_statistics(vae, values.mean(1), values.std(1))
    after, spread_after = vae.posterior(clips)
    normal = WAN21.normalize(after).transpose(0, 1).flatten(1)
    assert normal.mean(1).abs().max() < 1e-3 and (normal.std(1) - 1).abs().max() < 1e-3
    assert difference(vae.reconstruct(after), picture) < 1e-4
    ratio = torch.exp(0.5 * (spread_after - spread)) / (torch.tensor(WAN21.std) / values.std(1)).view(1, -1, 1, 1, 1)
    assert (ratio - 1).abs().max() < 1e-4, "the posterior's noise must grow with the latents"


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_lean_forms_compute_the_same(form):
    vae = new_vae(torch.device("cpu"), torch.Generator().manual_seed(0))
    clips = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = vae.posterior(clips)[0]
    picture = vae.reconstruct(latents)
    make_lean(vae, {16: form, 32: form, 64: form})
    assert difference(vae.posterior(clips)[0], latents) < 1e-5
    assert difference(vae.reconstruct(latents), picture) < 1e-5
    with pytest.raises(ValueError, match="whole clips"):
        vae.posterior(clips, {})


def test_latent_coverage_keeps_time_and_place():
    coverage = torch.zeros(1, 17, 128, 128)
    coverage[0, 6, 40, 80] = 1  # frame 6 belongs to latent frame 2, pixel (40, 80) to cell (5, 10)
    cells = latent_coverage(coverage)
    assert cells.shape == (1, 5, 16, 16)
    assert cells.nonzero().tolist() == [[0, 2, y, x] for y in (4, 5, 6) for x in (9, 10, 11)]


def test_orthogonalise_and_schedule():
    for shape in ((2, 8, 32), (2, 32, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.6 and values.max() < 1.3
    assert plateau(0.5, warm=0.1, decay=0.4) == 1 and plateau(1.0, warm=0.1, decay=0.4) == 0.003
    assert plateau(0.05, warm=0.1, decay=0.4) == 0.5 and abs(plateau(0.8, warm=0.1, decay=0.4) - 0.5) < 1e-9


def test_optimizer_learns_and_resumes():
    def problem():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
        settings = Settings(rate=1e-2, matrix_rate=1e-1)
        return model, Optimizer(model.named_parameters(), settings, lambda name, p: p.ndim == 2 and p.shape[0] == 32)

    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    y = (x[:, :1] * x[:, 1:2]).sin()

    def train_steps(model, optimizer, count):
        for _ in range(count):
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step(1.0)
        return float(loss.detach())

    model, optimizer = problem()
    first = train_steps(model, optimizer, 1)
    train_steps(model, optimizer, 100)
    state = optimizer.state()
    other, resumed = problem()
    resumed.restore(state)
    last = train_steps(model, optimizer, 50)
    assert train_steps(other, resumed, 50) == pytest.approx(last, rel=1e-5)
    assert last < first / 10


def test_wide_inputs_do_not_learn_faster():
    """One step changes the output of a layer alike, whether it reads 64 channels or 4096."""
    changes = []
    for columns in (64, 4096):
        generator = torch.Generator().manual_seed(0)
        layer = torch.nn.Linear(columns, 64, bias=False)
        optimizer = Optimizer(layer.named_parameters(), Settings(rate=0, matrix_rate=1e-3), lambda name, p: True)
        x = torch.randn(32, columns, generator=generator)
        target = torch.randn(32, 64, generator=generator)
        before = layer(x).detach()
        (layer(x) * target).sum().backward()
        optimizer.step(1.0)
        changes.append(float((layer(x) - before).detach().norm()))
    assert 0.4 < changes[1] / changes[0] < 2.5


def test_the_whole_script_in_miniature(tmp_path):
    out = tmp_path / "out"
    common = ["--dry", "--device", "cpu", "--state", str(tmp_path / "state")]
    assert train.main([*common, "--out", str(out)]) == 0
    names = {"diffusion_pytorch_model.safetensors", "models_t5_umt5-xxl-enc.safetensors", "Wan2.1_VAE.safetensors"}
    assert names <= {path.name for path in out.iterdir()}
    assert (out / "google/umt5-xxl/spiece.model").stat().st_size > 0
    assert "100% of the transformer's training done" in (out / "log.txt").read_text()

    again = tmp_path / "again"
    arguments = ["--dry", "--device", "cpu", "--state", str(tmp_path / "other"), "--out", str(again), "--judge", "0"]
    assert train.main([*arguments, "--start", str(out)]) == 0
    before, after = import_t2v(out), import_t2v(again)
    assert before.keys() == after.keys()
    # One or two steps from there, where fresh weights would be somewhere else altogether.
    assert all(
        (before[name].float() - after[name].float()).norm() <= 0.2 * before[name].float().norm() + 0.2
        for name in before
        if name.endswith("weight")
    )
