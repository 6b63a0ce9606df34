"""`lightx2v inspect`: what is printed of models, other files and bad ones."""

from pathlib import Path

import pytest
from sparse import lay_out

from lightx2v.__main__ import main


def test_a_quantised_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lay_out("comfyui_wan2.2_i2v_A14B_fp8_scaled", tmp_path / "models")
    assert main(["inspect", str(path)]) == 0
    first, second, numbers, third, *unused = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{path}: an expert of Wan2.2 I2V A14B (1095 tensors, fp8 weights (e4m3, a scale a tensor)")
    assert first.endswith("scale a tensor), 14,294.6 MB, high-noise expert by its name)")
    kind = "  kind transformer, family wan, task i2v, expert high, format comfyui, scheme fp8, layers 40"
    assert second == f"{kind}, variant wan2.2_i2v_a14b"
    assert numbers == "  14,288.9 million parameters, 14,294.6 MB"
    assert "hidden_size=5120" in third
    assert sorted(unused) == [
        "  not needed: scaled_fp8 (says that the fp8 weights have scales)",
        "  not needed: text_embedding.0.scale_input and 405 more "
        "(scales activations for fp8 arithmetic; dequantised weights do without)",
    ]


def test_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("lora_kijai_lightx2v_i2v_14B_rank64_bf16", "comfyui_hunyuan15_fp16", "taew2_1")
    paths = [str(lay_out(name, tmp_path / name)) for name in names]
    assert main(["inspect", *paths]) == 0
    lora, hunyuan, tae = capsys.readouterr().out.split(str(tmp_path))[1:]
    assert "a LoRA of Wan; not a whole model" in lora and "kind lora, family wan, task i2v" in lora
    assert "HunyuanVideo-1.5 (1793 tensors, fp16, 16,653.2 MB)" in hunyuan
    assert "kind transformer, family hunyuan1.5, task t2v, format comfyui" in hunyuan
    assert "layers 54, variant hunyuan1.5\n" in hunyuan
    assert "a tiny autoencoder of Wan2.1" in tae and "kind tae, family wan2.1" in tae


def test_a_bad_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    assert main(["inspect", str(path)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and f"error: {path}: truncated: the GGUF header ends" in told.err
