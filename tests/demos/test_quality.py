"""What 8 bits cost: the figures, and the command on one clip."""

import json
from pathlib import Path

import pytest
import torch

from demo import quality
from demo.quality import Variant, decibels, variants

CPU = torch.device("cpu")


def test_decibels_are_of_frames_in_0_to_1() -> None:
    exact = torch.zeros(2, 3, 5, 8, 8)
    clips = exact.clone()
    clips[0] += 0.2  # 0.1 of the range: 20 dB
    assert decibels(clips, exact).tolist() == pytest.approx([20, 100], abs=1e-4)


def test_variants_are_read_and_refused() -> None:
    assert variants(["fp8:torch_sdpa"], CPU) == [Variant("fp32", "fp8", "torch_sdpa")]
    assert [variant.name for variant in variants([], CPU)][:2] == ["fp8, torch_sdpa", "int8, torch_sdpa"]
    for word in ("fp9:torch_sdpa", "fp8"):
        with pytest.raises(ValueError, match=f"--variants {word}: a variant is QUANT:ATTENTION, QUANT of"):
            variants([word], CPU)


def test_the_command_compares_with_the_exact_clips(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kept = tmp_path / "out.json"
    words = ["--count", "1", "--steps", "1", "--device", "cpu", "--json", str(kept), "--variants"]
    assert quality.main([*words, "int8:torch_sdpa", "none:no_such_attention"]) == 1
    exact, packed, failed = json.loads(kept.read_text())["results"]
    assert exact["psnr_least"] == 100
    assert 20 < packed["psnr_least"] < 80
    assert "unknown attention backend 'no_such_attention'" in failed["failed"]
    assert len(capsys.readouterr().out.splitlines()) == 3
