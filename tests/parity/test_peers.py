"""The benchmarks' other implementations compute what the engine does on its weights, or are not timed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import h100, peers, plot
from closeness import relative_error
from lightx2v.bench import engine
from lightx2v.bench.command import Plan, run_plans
from lightx2v.bench.subjects import subject

CPU = torch.device("cpu")
TOY = Plan("wan2.1-1.3b", toy=True, rounds=1, profile=False)


def rows(plan: Plan) -> dict[str, dict[str, Any]]:
    (result,) = run_plans([plan], CPU, peers.PEERS, None)["results"]
    assert result["gate"] == "passed"
    return {row["name"]: row for row in result["rows"]}


def test_peers_agree_with_the_engine(comfy: object) -> None:
    """TI2V-5B: with a timestep for each latent frame, which each of the three lays out in its own way."""
    found = rows(replace(TOY, model="wan2.2-ti2v-5b", peers=("diffusers", "comfyui", "comfyui-fp8")))
    assert found["diffusers"]["error"] < 1e-4 and found["ComfyUI"]["error"] < 1e-4
    assert 1e-3 < found["ComfyUI, fp8"]["error"] < 0.2
    assert all(row["ms"] > 0 for row in found.values())


def test_a_peer_of_the_other_family_agrees() -> None:
    found = rows(replace(TOY, model="hunyuan-1.5", peers=("diffusers", "comfyui")))
    assert found["diffusers"]["error"] < 1e-4
    assert "only Wan is run" in found["ComfyUI"]["failed"]


@pytest.mark.parametrize("model", ["wan2.1-1.3b", "hunyuan-1.5"])
def test_a_peer_runs_in_the_type_of_a_gpu(model: str) -> None:
    """Where everything is in bfloat16, one argument in float32 stops a network."""
    setting = engine.prepare(subject(model, "480p", None).toy(), CPU, torch.bfloat16, "plain")
    ours, theirs = engine.entries(setting, ["none"], ["torch_sdpa"])[0].make(), peers.PEERS["diffusers"](setting).make()
    with torch.no_grad():
        found, expected = theirs.call(), ours.call()
    assert found.dtype == torch.bfloat16 and relative_error(found, expected) < 0.05


def test_a_peer_with_other_weights_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    swap = {"self_attn.q": "self_attn.k", "self_attn.k": "self_attn.q"}
    right = peers.to_diffusers

    def wrong(name: str) -> str:
        return right(next((name.replace(a, b) for a, b in swap.items() if f"{a}." in name), name))

    monkeypatch.setattr(peers, "to_diffusers", wrong)
    row = rows(replace(TOY, peers=("diffusers",)))["diffusers"]
    assert "ms" not in row and "is given the same weights and is" in row["failed"]


def test_the_parts_of_the_long_run_are_known() -> None:
    assert all(set(plan.peers) <= set(peers.PEERS) for plan in h100.PARTS.values())
    (plan,) = h100.plans(["14b-720p"], until=1.0, dry=True)
    assert plan.toy and plan.rounds == 1 and plan.until == 1.0
    assert {plan.rounds for plan in h100.plans([], until=1.0, rounds=2)} == {2}
    assert len(h100.plans([], until=1.0)) == len(h100.PARTS)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            h100.main(["--json", "out.json"])


def _results() -> dict[str, Any]:
    row = {"engine": "lightx2v", "quant": "none", "ms_min": 1900, "ms_max": 2100}
    timed = [
        row | {"name": "lightx2v fp8, auto", "quant": "fp8", "kernels": {"attention": "fast"}, "ms": 2000.0},
        row | {"name": "lightx2v fp8, fast", "quant": "fp8", "kernels": {"attention": "fast"}, "ms": 2001.0},
        row | {"name": "diffusers <3", "engine": "diffusers", "ms": 3000.0, "ms_max": 3100},
    ]
    size = {"width": 832, "height": 480, "num_frames": 81, "tflop": 1678.3}
    result = {"model": "wan2.1-14b", "size": "480p", "weights": "hot", **size}
    return {"gpu": "a GPU", "results": [result | {"rows": [*timed, {"name": "peer", "failed": "gone"}]}]}


def test_a_plot_shows_what_was_timed_once(tmp_path: Path) -> None:
    results, svg = tmp_path / "results.json", tmp_path / "plot.svg"
    results.write_text(json.dumps(_results()))
    assert plot.main([str(results), str(svg)]) == 0
    drawn = svg.read_text()
    assert drawn.index("LightX2V fp8, fast") < drawn.index("diffusers &lt;3") and drawn.count("<rect") == 2 + 2
    assert ">2.00 s<" in drawn and ">3.00 s<" in drawn and "2.00" not in drawn.replace(">2.00 s<", "", 1)
    assert "gone" not in drawn and "bf16's 797" in drawn
    assert plot.main([str(results), str(svg)]) == 0 and svg.read_text() == drawn
    with pytest.raises(SystemExit):
        plot.main([str(results), str(svg), "--size", "720p"])
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**_results(), "gpu": "another"}))
    assert plot.main([str(results), str(results), str(svg)]) == 0 and svg.read_text() == drawn
    with pytest.raises(SystemExit):
        plot.main([str(results), str(other), str(svg)])
