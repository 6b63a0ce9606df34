"""The benchmark of the VAEs: its gate sees a wrong kernel, and its figures are those of the published decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import frames, text, vae, vae_peers
from lightx2v.vae import layers
from lightx2v.vae.fused import FrameKernels
from lightx2v.vae.wan import WanVAE, WanVAEConfig
from lightx2v_kernels.conv2d_relu.reference import conv2d_relu
from lightx2v_kernels.conv3d.reference import conv3d
from lightx2v_kernels.conv_input.reference import conv_input
from lightx2v_kernels.doubled_conv.reference import doubled_conv

CPU = torch.device("cpu")
TINY = vae.Model(lambda: WanVAE(WanVAEConfig(8)), (torch.bfloat16,), (1, 2))


def test_a_wrong_layer_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "GATE", (16, 24, 5))
    network = vae.build(TINY, CPU, torch.float32)
    assert vae.gate(TINY, network, CPU) is None
    broken = FrameKernels(lambda *args: conv_input(*args) * 1.01, conv3d, doubled_conv, conv2d_relu)
    monkeypatch.setattr(layers, "frame_kernels", lambda x, weight: broken)
    assert (vae.gate(TINY, network, CPU) or "").startswith("decode: relative error")


def test_the_whole_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(vae, "GATE", (16, 24, 5))
    monkeypatch.setitem(vae.SIZES, "small", (16, 24, 5))
    monkeypatch.setitem(vae.MODELS, "wan", TINY)
    monkeypatch.setattr(frames, "LAYERS", ((16, 16, (3, 3, 3), 1, 2, 1), (16, 8, frames.DOUBLED, 2, 1, 1)))
    monkeypatch.setattr(vae_peers, "diffusers", missing)
    monkeypatch.setattr(vae_peers, "comfy", missing)
    monkeypatch.setattr(vae, "measure_text", lambda device, left: [{"what": "text", "ms": 1.0}])
    out = tmp_path / "vae.json"
    assert vae.main(["--device", "cpu", "--size", "small", "--only", "wan,layers,peers,umt5", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document == json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, peers = document["results"][:-2], document["results"][-2:]
    assert len(ours) == 5 and all(row["gate"] == "passed" and row["ms"] > 0 for row in ours)
    assert all("not installed" in row["note"] and row["ms"] is None for row in peers)
    assert [row["op"] for row in document["layers"]] == ["conv_input", "conv3d", "doubled_conv"]
    assert all(row["ms"] > 0 for row in document["layers"])


def missing() -> vae_peers.Peer:
    raise ImportError("not installed")


def test_nothing_is_begun_after_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "GATE", (16, 24, 5))
    monkeypatch.setitem(vae.SIZES, "small", (16, 24, 5))
    monkeypatch.setitem(vae.MODELS, "wan", TINY)
    rows = vae.measure("wan", vae.parse(["--size", "small"]), CPU, lambda: 0.0)
    assert all(row["ms"] is None and row["note"] == "left out: no time" for row in rows)


def test_plain_is_pytorch_s_own_and_ends() -> None:
    before = layers.frame_kernels
    with vae.plain():
        assert layers.frame_kernels is not before
    assert layers.frame_kernels is before


def test_the_layers_are_those_of_the_decoder() -> None:
    """275 TFLOP at 480p and 81 frames, by bench.md's count, which is of 3x3 convolutions after doubling."""
    height, width, _ = vae.SIZES["480p"]
    total = 0.0
    for channels, out, kernel, divisor, count, uses in frames.LAYERS:
        layer = frames.Layer(channels, out, kernel, count, height // divisor, width // divisor)
        total += uses * layer.flops
    assert 20 * total == pytest.approx(275e12, rel=0.05)


def test_text_rows() -> None:
    rows = text.measure(CPU, lambda: 1.0)
    assert [row["tokens"] for row in rows] == [32, 32, 128, 128, 512, 512]
    assert all(row["ms"] > 0 for row in rows) and rows[0]["relative error"] == "0.0e+00"
