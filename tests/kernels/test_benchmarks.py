"""The benchmarks measure what they say, and report no speed for a wrong result."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import kernels, transformer
from benchmarks.cases import Size, of_size
from benchmarks.timing import median_ms, report
from lightx2v_kernels import registry
from lightx2v_kernels.registry import Backend

CPU = torch.device("cpu")
TINY = {case.label + case.op: case for case in of_size(Size("tiny ", 1, 300, 256))}


@pytest.mark.parametrize("label", TINY)
def test_every_op_has_a_case_and_passes_its_gate(label: str) -> None:
    rows = kernels.measure(TINY[label], CPU, torch.float32)
    of_vaes = {"conv_input", "conv3d", "doubled_conv"}  # benchmarks.vae times them
    assert {case.op for case in TINY.values()} == set(registry.registries()) - of_vaes
    assert [row["backend"] for row in rows] == list(registry.names(TINY[label].op))
    assert all(row["gate"] == "passed" and row["ms"] > 0 and row["rate"] > 0 for row in rows)
    assert rows[-1]["ratio"] == 1


@pytest.mark.parametrize("last_query_only", [False, True])
def test_a_red_gate_has_no_speed(last_query_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = good(q, k, v)
        out[:, -1 if last_query_only else slice(None)] *= 1.1
        return out

    found = registry.registry("attention")
    good = found.op.reference
    found = found.register(Backend("attention", "bad", lambda: bad, rank=1))
    found = found.register(Backend("attention", "absent", lambda: bad, rank=2, package="no_such_package"))
    monkeypatch.setattr(registry, "registry", lambda op: found)
    wrong, absent, *_, reference = kernels.measure(TINY["tiny  selfattention"], CPU, torch.float32)
    assert wrong["gate"].startswith("wrong: ") and (wrong["ms"], wrong["rate"], wrong["ratio"]) == (None, None, None)
    assert absent["gate"].startswith("cannot run: package 'no_such_package'") and absent["ms"] is None
    assert reference["gate"] == "passed" and reference["ms"] > 0


def test_the_last_line_is_one_json_document_and_the_file_holds_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "cases", lambda device: list(TINY.values()))
    assert kernels.main(["--op", "rope", "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "out.json").read_text())
    assert {row["op"] for row in printed["results"]} == {"rope"} and printed["torch"] == torch.__version__
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text("before")
    with pytest.raises(TypeError):
        report({"value": object()}, tmp_path / "out.json")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]


def test_median_ms_is_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: next(clock) * 0.25)
    assert median_ms(lambda: None, CPU) == 250


def test_transformer_work_and_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wan 1.3B at 480p: 2 x 1.4e9 weights x 32760 tokens, and 30 layers of 4 x 32760^2 x 1536 for attention."""
    assert transformer.num_tokens(transformer.MODELS["wan-1.3b"]) == 32760
    assert transformer.flops(transformer.MODELS["wan-1.3b"]) == pytest.approx(2 * 1.4e9 * 32760 + 1.978e14, rel=0.05)
    tiny = transformer.MODELS["demo"]
    assert transformer.gate(tiny, "auto", CPU, torch.float32) is None
    broken = transformer.select(attention="reference", device=CPU, dtype=torch.float32, head_dim=128)
    object.__setattr__(broken, "rope", lambda x, cos, sin: x)
    monkeypatch.setattr(transformer, "select", lambda **_: broken)
    assert "relative error" in transformer.gate(tiny, "auto", CPU, torch.float32)


def test_a_refused_choice_is_one_line() -> None:
    with pytest.raises(SystemExit, match=r"--attention sage_attn2 --device cpu: 'sage_attn2' is an upstream name"):
        transformer.main(["--device", "cpu", "--attention", "sage_attn2"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match=r"--device cuda: PyTorch .* sees no GPU"):
            kernels.main(["--device", "cuda"])
