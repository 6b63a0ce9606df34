"""Commands that report: doctor, config, inspect's object; their words, their JSON, their exit status."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.shipped import BASE, I2V, NIGHT, T2V
from lightx2v import capacity
from lightx2v.__main__ import main
from lightx2v.commands import doctor as command
from lightx2v.doctor import GPU, Machine, backends, machine
from lightx2v.inspection import inspect_file
from lightx2v.offload.plan import Machine as Memory
from lightx2v_kernels.registry import registries

TAE = I2V.parent / "taew2_1_demo.safetensors"
FIELDS = (
    "path kind family task expert format scheme parameters bytes layers unconsumed missing notes variant".split()
)  # what scripts read: they are only added to


def asked(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_a_file_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, "inspect", str(I2V))
    assert list(found) == FIELDS
    assert (found["kind"], found["family"], found["task"], found["format"]) == ("transformer", "wan", "i2v", "comfyui")
    assert (found["scheme"], found["layers"], found["missing"], found["expert"]) == ("fp8", 5, [], None)
    assert "scaled_fp8" in found["unconsumed"] and 6e6 < found["parameters"] < 7e6
    assert found["bytes"] < I2V.stat().st_size
    files = [BASE / "Wan2.1_VAE.safetensors", TAE, NIGHT, BASE / "models_t5_umt5-xxl-enc.safetensors"]
    several = asked(capsys, "inspect", *map(str, files))
    assert [each["kind"] for each in several] == ["vae", "tae", "lora", "text_encoder"]
    assert several[2]["layers"] == 60 and several[2]["unconsumed"] == []
    assert all(each["missing"] is None for each in several), "not looked into"


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(T2V)
    gone = ["blocks.3.ffn.0.bias", "head.head.bias"]
    save_file({name: value for name, value in weights.items() if name not in gone}, tmp_path / "part.safetensors")
    found = asked(capsys, "inspect", str(tmp_path / "part.safetensors"))
    assert found["missing"] == gone and found["kind"] == "transformer"
    assert main(["inspect", str(tmp_path / "part.safetensors")]) == 0
    assert "missing: blocks.3.ffn.0.bias, head.head.bias: the file is incomplete" in capsys.readouterr().out
    assert inspect_file(T2V).missing == ()


def test_what_nobody_knows_is_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"\0" * 4)
    for name, words in (
        ("a", "of a model that is not known"),
        ("b", "does not start with a safetensors header"),
        ("c", "no such"),
    ):
        found = asked(capsys, "inspect", str(tmp_path / f"{name}.safetensors"), status=2)
        assert found["kind"] == "unknown" and words in found["notes"][0].lower()
    assert main(["inspect", str(T2V), str(tmp_path / "a.safetensors")]) == 2
    said = capsys.readouterr()
    assert "Wan2.1 T2V" in said.out and said.err.startswith("error: ")


SETTINGS = {"infer_steps": 2, "target_height": 32, "target_width": 48, "target_video_length": 5}


def written(folder: Path, **more: Any) -> str:
    path = folder / "settings.json"
    path.write_text(json.dumps({**SETTINGS, **more}), encoding="utf-8")
    return str(path)


def test_a_config_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, sample_guide_scale=6, num_layers=40, t5_cpu_offload=True, vae_cpu_offload=True)
    found = asked(capsys, "config", file, "--model_path", str(BASE), "--device", "cpu")
    assert found["verdict"] == "runs" and found["here"] is None
    assert found["arguments"]["create_generator"]["guidance_scale"] == 6
    assert found["engine"]["vae_offload"] is True and found["request"]["sampling"]["steps"] == 2
    assert {row["key"]: row["verdict"] for row in found["keys"]}["t5_cpu_offload"] == "dead"
    assert "the checkpoint has 6" in next(row["becomes"] for row in found["keys"] if row["key"] == "num_layers")
    assert main(["config", file, "--device", "cpu"]) == 0, "without a model too"
    said = capsys.readouterr().out
    assert "settings.json: runs" in said and "honoured  target_height = 32: create_generator(height=32)" in said


def test_a_config_that_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, parallel={"tensor_p_size": 2}, dit_original_ckpt="gone.safetensors", feature_caching="Ada")
    assert main(["config", file]) == 1
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith("settings.json: cannot run")
    assert [line.split()[0] for line in lines[:3]] == ["refused", "refused", "absent"]
    assert asked(capsys, "config", written(tmp_path, dit_original_ckpt="gone"), status=1)["verdict"] == "needs files"
    sparse = written(tmp_path, self_attn_1_type="flash_attn3")
    found = asked(capsys, "config", sparse, "--device", "cpu", status=1)
    assert found["verdict"] == "cannot run on this machine" and "'flash_attn3' cannot run on cpu" in found["here"]
    assert asked(capsys, "config", sparse, "--device", "cpu", "--attn_mode", "auto")["verdict"] == "runs"
    packed = written(tmp_path, dit_quantized=True, dit_quant_scheme="fp8-triton")
    found = asked(capsys, "config", packed, "--model_path", str(BASE), "--device", "cpu", status=1)
    assert found["verdict"] == "cannot run on this machine" and "backend 'triton' cannot run on cpu" in found["here"]
    assert main(["config", sparse, "--task", "v2v"]) == 1
    assert "task of wan2.1='v2v' is not supported" in capsys.readouterr().err


def test_the_doctor_reports_what_scripts_read(capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, "doctor", str(BASE))
    assert found["folders"][str(BASE)]["transformer"].startswith("diffusion_pytorch_model.safetensors: Wan2.1 T2V")
    assert {state["op"] for state in found["backends"]} == set(registries())
    for op in registries():
        mine = [state for state in found["backends"] if state["op"] == op]
        assert [state["name"] for state in mine if "auto" in state["taken_by"]] == [
            next(state["name"] for state in mine if state["self_test"] == "passed")
        ] or torch.cuda.is_available(), "the best that passed its test"
    assert found["packages"]["torch"] == torch.__version__ and found["ram"] > found["free_ram"] > 0
    sizes = {(model["model"], model["height"]): model for model in found["models"]}
    big = sizes["Wan2.1 14B", 480]
    assert 28e9 < big["ram"] < 29e9 and big["least"] < 10e9 < big["whole"]
    assert sizes["Wan2.2 A14B", 480]["ram"] == 2 * big["ram"]
    assert big["least"] < sizes["Wan2.1 14B", 720]["least"]


def test_the_doctor_tells_a_newcomer_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    states = list(backends())
    monkeypatch.setattr(command, "backends", lambda: states)
    there = replace(machine(), gpus=(), why_cpu="torch is built without CUDA")
    monkeypatch.setattr(command, "machine", lambda: there)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "no GPU: torch is built without CUDA. The small models in demo/models run on the CPU" in said
    assert "Wan2.1 14B        832x480, 81 frames" in said and "rope backends" not in said
    assert main(["doctor", "--all"]) == 0
    assert "rope backends" in capsys.readouterr().out
    incomplete = replace(there, packages={**there.packages, "av": None}, gpus=(GPU("cuda:0", "H", 8, 4, "9.0"),))
    monkeypatch.setattr(command, "machine", lambda: incomplete)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "missing: pip install av" in said and "compute capability 9.0" in said and "no GPU" not in said
    assert isinstance(there, Machine)


def test_capacity_is_the_plans() -> None:
    """A GPU of 12 GB streams what one of 80 GB holds."""
    asked = capacity.subject("wan2.1-14b", "480p")
    small = capacity._capacity("14B", asked, 1, Memory(int(12e9), int(64e9), int(32e9)))
    large = capacity._capacity("14B", asked, 1, Memory(int(80e9), int(64e9), int(32e9)))
    tiny = capacity._capacity("14B", asked, 1, Memory(int(4e9), int(64e9), int(32e9)))
    assert small.plan is not None and small.plan.streamed and small.here().startswith("yes, ")
    assert (large.here(), tiny.here()) == ("yes, whole", "no")
    assert tiny.least > 4e9 and small.least < 12e9 < small.whole < 80e9
