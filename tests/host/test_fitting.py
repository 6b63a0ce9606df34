"""What does not fit together is said in words, file and fix, before a weight is read: the files are of the real size
and have nothing but a header, so reading them would give a black picture at best and take minutes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from formats import sparse
from host.graphs import Graph, base, keep, node, our_sampler, random_latent

pytestmark = pytest.mark.host
I2V, T2V = "real_size/wan2.1_i2v_14B.safetensors", "real_size/wan2.1_t2v_14B.safetensors"


@pytest.fixture(scope="module", autouse=True)
def real_size(host) -> Iterator[Path]:
    folder = host.base / "models" / "diffusion_models"
    files = {
        folder / I2V: sparse.manifest("lightx2v_wan2.1_i2v_14B_distill_bf16"),
        folder / T2V: sparse.manifest("lightx2v_wan2.1_t2v_14B_distill_bf16"),
    }
    for path, manifest in files.items():
        sparse.write(manifest["tensors"], path)
        assert path.stat().st_size > 25e9
    yield folder
    for path in files:
        path.unlink()
    (folder / "real_size").rmdir()


def graph(tiny_models, model: str, **changes) -> Graph:
    """Sample with a model of the real size; the tiny VAE encodes what a start image becomes."""
    return {
        **base(tiny_models),
        "ours": node("LightX2VLoadModel", original_ckpt=model, dtype="auto"),
        "sample": our_sampler(**changes),
    }


def with_image(tiny_models, model: str) -> Graph:
    images = {
        "vae": node("LightX2VLoadVAE", vae_name=tiny_models.vae),
        "picture": node("FixturePicture", seed=1, frames=1, height=96, width=128),
        "start": node(
            "LightX2VImageToVideo",
            positive=["positive", 0],
            negative=["negative", 0],
            vae=["vae", 0],
            start_image=["picture", 0],
            width=128,
            height=96,
            length=17,
            batch_size=1,
        ),
    }
    links = {"positive": ["start", 0], "negative": ["start", 1], "latent": "start"}
    sampler = our_sampler(positive=links["positive"], negative=links["negative"])
    sampler["inputs"]["latent"] = ["start", 2]
    return {**graph(tiny_models, model), **images, "sample": sampler}


def test_an_image_model_without_an_image(host, tiny_models) -> None:
    message = host.run(keep(graph(tiny_models, I2V), "sample")).expect("error").message
    assert I2V in message and "Wan2.1 I2V 14B" in message and "connect Image To Video" in message


def test_a_text_model_with_an_image(host, tiny_models) -> None:
    message = host.run(keep(with_image(tiny_models, T2V), "sample")).expect("error").message
    assert T2V in message and "text alone" in message and "use an image-to-video model" in message


def test_a_14b_model_with_latents_of_the_wan22_vae(host, tiny_models) -> None:
    latent = random_latent()
    latent["inputs"]["channels"] = 48
    message = host.run(keep({**graph(tiny_models, T2V), "empty": latent}, "sample")).expect("error").message
    assert T2V in message and "given ones have 48: use the Wan2.1 VAE" in message
