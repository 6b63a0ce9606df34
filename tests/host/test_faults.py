"""What goes wrong in the middle of a prompt in a real ComfyUI, at every stage; and the prompt after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dev.comfyui import PACK_NAME, find_comfyui
from dev.environment import REPOSITORY
from host.client import Result
from host.graphs import Graph, base, keep, node, our_sampler, text_to_video
from host.server import Server, start
from host.tiny_models import TinyModels, write_tiny_models, write_transformer

pytestmark = pytest.mark.host
PACKS = {PACK_NAME: REPOSITORY, "fixture_pack": REPOSITORY / "tests" / "host" / "fixture_pack"}
SIZE = {"width": 48, "height": 32, "length": 9}
# Place, call, and a word among its arguments.
STAGES: dict[str, tuple[str, int, str]] = {
    "reading the text encoder": ("lightx2v.checkpoint.weights:_put", 3, "encoder.block"),
    "encoding": ("lightx2v.text.resting:Widened.forward", 1, ""),
    "reading the transformer": ("lightx2v.checkpoint.weights:_put", 20, "blocks."),
    "sampling": ("lightx2v.models.wan.transformer:WanBlock.forward", 3, ""),
    "decoding": ("lightx2v.vae.wan:WanVAE.reconstruct", 0, ""),
    "saving": ("comfy_api.latest._input_impl.video_types:VideoFromComponents.save_to", 0, ""),
}
ENDS = {"cancel": "interrupted", "fail": "error", "lose": "error"}
CASES = [
    *(("cancel", stage) for stage in STAGES),
    *(("fail", stage) for stage in ("reading the text encoder", "reading the transformer", "saving")),
    *(("lose", stage) for stage in ("encoding", "sampling", "decoding")),
]


def graph_of(models: TinyModels) -> Graph:
    graph = text_to_video(models, steps=2)
    del graph["unet"], graph["native"]
    graph["empty"]["inputs"].update(SIZE)
    graph["save"]["inputs"]["filename_prefix"] = "faults/clip"
    return keep(graph, "sample", "decode")


def trap(host: Server, stage: str, deed: str) -> None:
    """Everything is forgotten, and the next prompt runs into it."""
    place, call, about = STAGES[stage]
    host.post("/free", {"unload_models": True, "free_memory": True})  # obeyed before the prompt after the next
    host.run({"trap": node("FixtureTripwire", place=place, deed=deed, call=call, about=about)}).expect()


def same(result: Result, other: Result) -> bool:
    latents = [each.kept("keep_sample")["samples"] for each in (result, other)]
    frames = [each.kept("keep_decode") for each in (result, other)]
    return torch.equal(*latents) and torch.equal(*frames)


def files(host: Server) -> set[Path]:
    return {path for path in (host.base / "output").rglob("*") if path.is_file() and path.parent.name != "kept"}


@pytest.fixture(scope="module")
def expected(host: Server, tiny_models: TinyModels) -> Result:
    return host.run(graph_of(tiny_models)).expect()


@pytest.mark.parametrize(("deed", "stage"), CASES, ids=[" while ".join(case) for case in CASES])
def test_a_prompt_that_ends_early_and_the_next(
    host: Server, tiny_models: TinyModels, expected: Result, deed: str, stage: str
) -> None:
    before = files(host)
    trap(host, stage, deed)
    result = host.run(graph_of(tiny_models))
    late = stage == "saving" and deed == "cancel"  # nothing asks any longer: the video is saved
    result.expect("success" if late else ENDS[deed])
    made = files(host) - before
    assert len(made) == late and not [path for path in files(host) if path.suffix == ".part"]
    if deed == "lose":
        assert "the GPU stopped working (CUDA error: unspecified launch failure)" in result.message
        assert "restart it (ComfyUI" in result.message
    held = host.run({"loaded": node("FixtureLoadedModels")}).expect().text("loaded")
    if stage == "reading the transformer":
        assert "LoadedTransformer" not in held, "half of a model is on no device"
    assert same(host.run(graph_of(tiny_models)).expect(), expected)
    assert len(files(host) - before - made) == 1


@pytest.mark.parametrize("deed", ENDS)
def test_blocks_that_passed_when_it_ended_early(host: Server, tiny_models: TinyModels, deed: str) -> None:
    """From RAM and from the file: nothing stays on the device, and the next prompt is the same."""
    graph = base(tiny_models)
    del graph["unet"], graph["native"]
    graph["empty"]["inputs"].update(SIZE)
    graph["free"] = node("FixtureFreeRam", latent_in=["empty", 0], megabytes=100)
    graph["sample"] = our_sampler("free", steps=2, offload="block")
    graph = keep(graph, "sample")
    try:
        truth = host.run(graph).expect().kept("keep_sample")["samples"]
        trap(host, "sampling", deed)
        host.run(graph).expect(ENDS[deed])
        held = host.run({"loaded": node("FixtureLoadedModels")}).expect().text("loaded")
        assert '"bytes": ' not in held.replace('"bytes": 0', "")
        assert torch.equal(host.run(graph).expect().kept("keep_sample")["samples"], truth)
    finally:
        back = node("FixtureFreeRam", latent_in=["empty", 0], megabytes=-1)
        host.run(keep({"empty": graph["empty"], "back": back}, "back")).expect()


@pytest.mark.parametrize("megabytes", [-1, 100], ids=["whole", "from the file"])
def test_a_model_file_that_is_replaced_or_goes(host: Server, tiny_models: TinyModels, megabytes: int) -> None:
    folder = host.base / "models" / "diffusion_models"
    file, other = folder / "changing.safetensors", folder / "constant.safetensors"
    graph = base(tiny_models)
    del graph["unet"], graph["native"]
    graph["empty"]["inputs"].update(SIZE)
    graph["free"] = node("FixtureFreeRam", latent_in=["empty", 0], megabytes=megabytes)
    graph["sample"] = our_sampler("free", steps=1, offload="auto" if megabytes < 0 else "block")
    graph = keep(graph, "sample")

    def video(name: str) -> torch.Tensor:
        graph["ours"]["inputs"]["original_ckpt"] = name
        return host.run(graph).expect().kept("keep_sample")["samples"]

    try:
        write_transformer(file, seed=1)
        write_transformer(other, seed=2)
        before = video(file.name)
        write_transformer(file, seed=2)  # of the same size
        after = video(file.name)
        assert torch.equal(after, video(other.name)) and not torch.equal(after, before)
        graph["ours"]["inputs"]["original_ckpt"] = file.name
        file.write_bytes(file.read_bytes()[:-1000])
        assert f"{file.name}" in host.run(graph).message
        file.unlink()
        assert f"{file.name}" in host.run(graph).message
        other.rename(file)
        assert torch.equal(video(file.name), after), "it is back"
    finally:
        file.unlink(missing_ok=True)
        other.unlink(missing_ok=True)
        back = node("FixtureFreeRam", latent_in=["empty", 0], megabytes=-1)
        host.run(keep({"empty": graph["empty"], "back": back}, "back")).expect()


def test_a_killed_server_leaves_no_half_file_and_a_new_one_makes_the_same(expected: Result, tmp_path: Path) -> None:
    """Two more processes, bit for bit what the first made: nothing of a video depends on what ran before it."""
    root = find_comfyui()
    assert root is not None
    models = write_tiny_models(tmp_path / "models")
    with start(root, tmp_path, PACKS, []) as server:
        trap(server, "sampling", "die")
        with pytest.raises(ConnectionError):
            server.run(graph_of(models))
        left = [path for path in tmp_path.rglob("*") if path.suffix in (".mp4", ".part") or ".part" in path.name]
        assert left == []
    with start(root, tmp_path, PACKS, []) as server:
        result = server.run(graph_of(models)).expect()
        assert same(result, expected)
        assert [path.name for path in files(server)] == ["clip_00001_.mp4"]
