"""The benchmarks measure what they say, and report no speed for a wrong result."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import attention, kernels, tiles
from benchmarks.cases import of_size, tokenwise
from benchmarks.size import Size
from benchmarks.timing import report
from benchmarks.tokenwise import IN_8_BITS, IN_BF16, bytes_moved, forward_ms
from lightx2v_kernels import registry
from lightx2v_kernels.registry import Backend

CPU = torch.device("cpu")
TINY = {case.label + case.op: case for case in of_size(Size("tiny ", 1, 300, 256))}


@pytest.mark.parametrize("label", TINY)
def test_every_op_has_a_case_and_passes_its_gate(label: str) -> None:
    rows = kernels.measure(TINY[label], CPU, torch.float32)
    of_vaes = {"conv_input", "conv3d", "doubled_conv", "conv2d_relu"}  # benchmarks.vae times them
    assert {case.op for case in TINY.values()} == set(registry.registries()) - of_vaes
    assert [row["backend"] for row in rows] == list(registry.names(TINY[label].op))
    able = [row for row in rows if not row["gate"].startswith("cannot run: ")]
    assert len(able) >= 1 and all(row["gate"] == "passed" and row["ms"] > 0 and row["rate"] > 0 for row in able)
    assert rows[-1]["ratio"] == 1


def test_bytes_moved_counts_every_tensor_once() -> None:
    x, row, table = torch.zeros(1, 8, 64).bfloat16(), torch.zeros(64).bfloat16(), torch.zeros(1, 1, 64)
    tokens, scales = 8 * 64, 8 * 4
    assert bytes_moved("rms_norm", (x, row, 1e-6)) == 2 * 2 * tokens + 128
    assert bytes_moved("residual_layer_norm", (x, x, table, row, row, 1e-6)) == 4 * 2 * tokens + 256 + 256
    assert bytes_moved("quantize", (x, torch.int8)) == 3 * tokens + scales
    assert bytes_moved("residual_modulate_quantize", (x, x, None, table, table, 1e-6, torch.int8)) == (
        7 * tokens + scales + 512
    )


def test_one_forward_pass_is_its_layers_times_the_fastest_of_each_op() -> None:
    size = Size("s", 1, 8, 64, layers=3)
    rows = [{"op": op, "case": "s", "ms": 2.0} for op in IN_BF16]
    rows += [{"op": "modulate", "case": "s", "ms": 1.0}, {"op": "norm_rope", "case": "s", "ms": None}]
    assert forward_ms(rows, size) == {"bf16": 3 * (7 * 2.0 - 1.0)}
    rows += [{"op": op, "case": "s int8", "ms": 1.0} for op in IN_8_BITS if op.endswith("quantize")]
    assert forward_ms(rows, size)["int8"] == 3 * (4 * 2.0 + 6 * 1.0)
    assert "fp8" not in forward_ms(rows, size)


@pytest.mark.parametrize("op", ["modulate_quantize", "norm_rope", "gelu_quantize", "gated_residual"])
def test_every_tile_computes_the_op_and_the_rule_comes_back(op: str) -> None:
    pytest.importorskip("triton")
    size = Size("tiny", 1, 5, 256, 384)
    case = next(case for case in tokenwise(size) if case.op == op)
    args, ruled = case.make(CPU, torch.float32), tiles.candidates(op, size)[0]
    for tile in tiles.candidates(op, size):
        assert tiles.measure(case, tile, args)["gate"] == "passed"
    assert tiles.candidates(op, size)[0] == ruled and len(set(tiles.candidates(op, size))) > 2


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


def test_a_refused_choice_is_one_line() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match=r"--device cuda: PyTorch .* sees no GPU"):
            kernels.main(["--device", "cuda"])


def test_an_attention_kernel_that_hangs_or_dies_is_named_and_the_others_keep_their_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The children of benchmarks.attention, played by a script: `slow` never answers, `dead` ends the process."""
    script = (
        "import json, sys, time\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    print('@' + json.dumps({'name': name, 'state': 'starts'}), flush=True)\n"
        "    if name == 'slow': time.sleep(60)\n"
        "    if name == 'dead': sys.exit(3)\n"
        "    print('@' + json.dumps({'name': name, 'state': 'timed', 'ms': [2.0, 4.0]}), flush=True)\n"
    )
    real = subprocess.Popen

    def play(line: list[str], **options: object) -> subprocess.Popen:
        names = json.loads(line[-1])["names"]
        return real([sys.executable, "-c", script, json.dumps(names)], **options)

    monkeypatch.setattr(attention.subprocess, "Popen", play)
    monkeypatch.setattr(attention, "STEP_SECONDS", 1)
    rows: dict[str, dict] = {}
    plan = {"do": "time", "tokens": 8, "names": ["a", "slow", "dead", "b"], "rounds": 1}
    attention.listen(attention.parse(["--device", "cpu"]), plan, rows, time.monotonic() + 30)
    assert rows["slow"]["why"].startswith("hung or died") and "exit status 3" in rows["dead"]["why"]
    found = {row["name"]: row for row in attention.figures(rows, {"a": "exact", "b": "peer"}, 1000, 1)}
    assert found["a"]["ms"] == found["b"]["ms"] == 3.0 and found["slow"]["ms"] is None
    assert found["a"]["tflops"] == round(4 * 1000**2 * 128 / 3e9, 1)
