"""What goes wrong in the middle of a video: a key, an error, a lost GPU, at every stage; and the video after it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightx2v_kernels.attention.reference as custom
from lightx2v import LightX2VPipeline, media
from lightx2v.checkpoint import CheckpointError, weights
from lightx2v.lora import merging
from lightx2v.models.wan.transformer import Unadded, WanBlock
from lightx2v.offload.lane import Lane
from lightx2v.offload.shortage import DeviceLostError, lost
from lightx2v.text.resting import Widened
from lightx2v.vae.wan import WanVAE
from tiny_pipeline import SMALL, lora, write_folder

GONE = "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported"
OFFLOADS: dict[str, dict[str, Any]] = {
    "none": {},
    "model": {"cpu_offload": True, "offload_granularity": "model"},
    "block": {"cpu_offload": True},
    "disk": {"cpu_offload": True, "ram_budget_gb": 1e-6},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def loras(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [{"path": str(lora(folder, tmp_path_factory.mktemp("loras") / "lora.safetensors"))}]


def pipeline(folder: Path, offload: str = "none") -> LightX2VPipeline:
    pipe = LightX2VPipeline(folder)
    pipe.create_generator(**SMALL, attn_mode="reference")
    pipe.enable_offload(**OFFLOADS[offload])
    return pipe


def video(pipe: LightX2VPipeline, seed: int = 1) -> Tensor:
    frames = pipe.generate(seed, "a red circle", return_result_tensor=True, progress=False)["video"]
    assert frames is not None
    return frames


@pytest.fixture(scope="module")
def expected(folder: Path) -> Tensor:
    return video(pipeline(folder))


@pytest.fixture(scope="module")
def with_lora(folder: Path, loras: list[dict[str, Any]], expected: Tensor) -> Tensor:
    pipe = pipeline(folder)
    pipe.enable_lora(loras)
    made = video(pipe)
    assert not torch.equal(made, expected)
    return made


class Tripwire:
    """Raises at one call of a function, counted from 0 among the calls that count, and lets all others through."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        owner: object,
        name: str,
        error: Callable[[], BaseException],
        at: int = 0,
        counts: Callable[..., bool] = lambda *_: True,
    ) -> None:
        self.calls, self.at, self.seen = 0, at, list[weakref.ref[Tensor]]()
        whole = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if counts(*args):
                self.calls += 1
                if self.calls == self.at + 1:
                    self.seen += [weakref.ref(tensor) for each in args for tensor in tensors_of(each)]
                    raise error()
            return whole(*args, **kwargs)

        patch.setattr(owner, name, call)

    @property
    def hit(self) -> bool:
        return self.calls > self.at


def tensors_of(argument: object) -> list[Tensor]:
    """Itself, or those that a block was passed by the block before."""
    parts = argument._parts[0] if isinstance(argument, Unadded) else (argument,)
    return [part for part in parts if isinstance(part, Tensor)]


def named(word: str) -> Callable[..., bool]:
    return lambda module, name, tensor: word in name


STAGES: dict[str, tuple[object, str, int, Callable[..., bool]]] = {
    "reading the text encoder": (weights, "_put", 3, named("encoder.block.")),
    "encoding": (Widened, "forward", 1, lambda *_: True),
    "reading the transformer": (weights, "_put", 20, named("blocks.")),
    "merging a LoRA": (merging, "add", 1, lambda *_: True),
    "sampling": (WanBlock, "forward", 3, lambda *_: True),
    "reading the VAE": (weights, "_put", 2, named("decoder.")),
    "decoding": (WanVAE, "reconstruct", 0, lambda *_: True),
}


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_at_every_stage_leaves_a_pipeline_that_works(
    stage: str,
    folder: Path,
    loras: list[dict[str, Any]],
    with_lora: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also what it had read half is read again, and no weight keeps a part of a LoRA."""
    owner, name, at, counts = STAGES[stage]
    pipe, target = pipeline(folder), tmp_path / "clip.mp4"
    pipe.enable_lora(loras)
    with monkeypatch.context() as patch:
        wire = Tripwire(patch, owner, name, KeyboardInterrupt, at, counts)
        with pytest.raises(KeyboardInterrupt):
            pipe.generate(1, "a red circle", save_result_path=target, progress=False)
        assert wire.hit and not list(tmp_path.iterdir())
    assert torch.equal(video(pipe), with_lora)


def test_ctrl_c_while_saving_leaves_no_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, target = pipeline(folder), tmp_path / "clip.mp4"
    found: list[str] = []

    def interrupted(frames: Tensor, path: Path, *how: Any) -> None:
        whole(frames, path, *how)
        found.extend(path.name for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    whole = media.WRITERS[".mp4"]
    with monkeypatch.context() as patch:
        patch.setitem(media.WRITERS, ".mp4", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipe.generate(1, "a red circle", save_result_path=target, progress=False)
    assert len(found) == 1 and found[0].endswith(".part") and not list(tmp_path.iterdir())
    pipe.generate(1, "a red circle", save_result_path=target, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_ctrl_c_between_two_loras_leaves_neither_half(
    folder: Path, loras: list[dict[str, Any]], with_lora: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is off by then and the second half on; the next video has what is asked for, whichever that is."""
    pipe = pipeline(folder)
    pipe.enable_lora(loras)
    assert torch.equal(video(pipe), with_lora)
    with monkeypatch.context() as patch:
        wire = Tripwire(patch, merging, "add", KeyboardInterrupt, 1)
        pipe.switch_lora(loras[0]["path"], 0.5)
        with pytest.raises(KeyboardInterrupt):
            video(pipe)
        assert wire.hit
    pipe.enable_lora(loras)
    assert torch.equal(video(pipe), with_lora)


ERRORS: dict[str, Callable[[], BaseException]] = {
    "an error": lambda: RuntimeError("the custom kernel cannot"),
    "a key": KeyboardInterrupt,
    "a lost GPU": lambda: torch.AcceleratorError(GONE),
}


def at_rest(pipe: LightX2VPipeline) -> bool:
    """No weight is where a stream put it, and nothing is held for weights that pass."""
    (network,) = pipe._parts._transformers
    stream = pipe._parts._placing._stream
    homes = stream is None or all(
        tensor is home
        for slab in stream._hosts[""].slabs
        for entry, home in zip(slab._entries, slab._home, strict=True)
        for holder, name in entry.holders
        for tensor in [holder[name]]
    )
    return homes and pipe._parts._placing.device_bytes == 0 and isinstance(network, nn.Module)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("kind", ERRORS)
def test_an_attention_that_raises_and_the_next_video(
    kind: str, offload: str, folder: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        wire = Tripwire(patch, custom, "attention", ERRORS[kind], 5)
        pipe = pipeline(folder, offload)
        error = ERRORS[kind]()
        with pytest.raises(DeviceLostError if kind == "a lost GPU" else type(error)) as caught:
            video(pipe)
        assert wire.hit and at_rest(pipe)
    if kind == "a lost GPU":
        assert "unspecified launch failure" in str(caught.value) and "restart it" in str(caught.value)
        assert "asynchronously" not in str(caught.value)
    assert torch.equal(video(pipe), expected)


def test_a_lost_gpu_is_said_at_every_stage_and_holds_no_tensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What hangs on to an error, as ComfyUI's history and a debugger do, must not hang on to its frames' tensors."""
    for stage in ("encoding", "sampling", "decoding"):
        owner, name, at, counts = STAGES[stage]
        pipe = pipeline(folder, "block")
        with monkeypatch.context() as patch:
            wire = Tripwire(patch, owner, name, lambda: torch.AcceleratorError(GONE), at, counts)
            with pytest.raises(DeviceLostError) as caught:
                video(pipe)
        gc.collect()
        assert wire.seen and all(each() is None for each in wire.seen), stage
        assert caught.value.__context__ is None and caught.value.__cause__ is None


def test_a_stream_closes_on_a_device_that_is_lost(
    folder: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There every further call fails too, those that clean up included."""

    def fails(self: Lane) -> None:
        raise torch.AcceleratorError(GONE)

    pipe = pipeline(folder, "block")
    with monkeypatch.context() as patch:
        patch.setattr(Lane, "drain", fails)
        with pytest.raises(DeviceLostError):
            video(pipe)
        assert at_rest(pipe)
    assert torch.equal(video(pipe), expected)


@pytest.mark.parametrize(
    ("said", "is_lost"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("CUDA error: out of memory", False),
        ("CUDA error: invalid argument", False),
        ("CUDA error: no kernel image is available for execution on the device", False),
        ("unknown error", False),
    ],
)
def test_other_errors_of_a_gpu_ask_for_no_restart(said: str, is_lost: bool) -> None:
    assert lost(RuntimeError(said)) is is_lost and not lost(ValueError(said))


def test_a_model_file_that_goes_before_it_is_read(folder: Path, expected: Tensor, tmp_path: Path) -> None:
    """The pipeline knows it by its header; what is read must be that file."""
    own, away = tmp_path / "wan2.1_t2v.safetensors", tmp_path / "away"
    own.write_bytes((folder / "diffusion_pytorch_model.safetensors").read_bytes())
    pipe = LightX2VPipeline(folder, dit_original_ckpt=own)
    pipe.create_generator(**SMALL, attn_mode="reference")
    own.rename(away)
    with pytest.raises(CheckpointError, match=r"wan2\.1_t2v\.safetensors: is gone since the model was loaded"):
        video(pipe)
    own.write_bytes(away.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"wan2\.1_t2v\.safetensors: has changed since the model was loaded"):
        video(pipe)
    away.replace(own)
    assert torch.equal(video(pipe), expected)
    own.unlink()
    assert torch.equal(video(pipe), expected), "what was read once needs no file"
