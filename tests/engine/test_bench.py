"""`lightx2v bench`: what it times is right, what fails is said, and what it reports is what it measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightx2v.__main__ import main
from lightx2v.bench import engine, race
from lightx2v.bench.command import Plan, run_plans, table
from lightx2v.bench.packed import quantise_q4_k
from lightx2v.bench.profile import group_of, summary
from lightx2v.bench.race import Contestant, Course, Entry, heats
from lightx2v.bench.subjects import CONFIGS, subject
from lightx2v.bench.timing import median_ms
from lightx2v.bench.weights import build, twin, weight_bytes
from lightx2v_kernels import references, select
from lightx2v_kernels.ggml import restore

CPU = torch.device("cpu")
TOY = Plan("wan2.1-1.3b", toy=True, rounds=2)


def prepare(name: str, kind: str = "hot") -> engine.Setting:
    return engine.prepare(subject(name).toy(), CPU, torch.float32, kind)


def silent(**changes: Any) -> Course:
    return replace(Course(CPU, rounds=2, profile=False, say=lambda line: None), **changes)


def entry(name: str, value: float, **more: Any) -> Entry:
    return Entry(name, lambda: Contestant(lambda: torch.full((2,), value)), **more)


def run(entries: list[Entry], **changes: Any) -> list[race.Row]:
    return list(race.race(entries, silent(**changes), 1e9, more_dropped.append))


more_dropped: list[str] = []


def test_sizes_and_work_are_the_published_ones() -> None:
    """1678 TFLOP and 32760 tokens: one forward pass of Wan2.1 14B at 832 x 480 x 81, see docs/benchmarks.md."""
    assert subject("wan2.1-14b").tokens == 32760
    assert subject("wan2.1-14b").flops() == pytest.approx(1678.3e12, rel=1e-3)
    assert subject("wan2.1-14b", "720p").tokens == 75600
    five = subject("wan2.2-ti2v-5b", "720p")
    assert (five.video.height, five.video.num_frames, five.tokens) == (704, 121, 27280)
    assert five.frame_times and five.inputs(CPU).timestep.shape == (1, 31)
    assert subject("hunyuan-1.5").tokens == 31 * 30 * 52


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_subject_runs_and_is_right(name: str) -> None:
    toy = subject(name).toy()
    assert engine.why_wrong(toy, CPU, torch.float32, "hot") is None
    setting = prepare(name)
    out = setting.inputs.run(setting.network)
    assert out.shape == setting.inputs.latents.shape and 0.1 < out.std() < 10


@torch.no_grad()
def test_a_wrong_kernel_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = select(attention="torch_sdpa", device=CPU, dtype=torch.float32, head_dim=128)
    broken = replace(broken, modulate=lambda x, shift, scale, eps: broken.rms_norm(x, torch.ones(x.shape[-1]), eps))
    monkeypatch.setattr(engine, "select", lambda **_: broken)
    document = run_plans([TOY], CPU, {}, None)
    (result,) = document["results"]
    assert result["gate"].startswith("wrong: relative error") and result["rows"] == []


@torch.no_grad()
def test_hot_weights_keep_tokens_apart_and_attention_uneven() -> None:
    """What plain weights do not: their tokens grow alike."""
    likeness = {}
    for kind in ("hot", "plain"):
        which = subject("wan2.1-1.3b").toy()
        which = replace(which, config=replace(which.config, num_layers=8))
        network = build(which, references(), CPU, torch.float32, kind)
        seen: list[torch.Tensor] = []
        network.head.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
        which.inputs(CPU).run(network)
        tokens = torch.nn.functional.normalize(seen[0], dim=-1)
        likeness[kind] = float((tokens @ tokens.T).mean())
    assert likeness["hot"] < 0.5 * likeness["plain"]


@torch.no_grad()
def test_twins_share_weights_and_results() -> None:
    setting = prepare("demo")
    other = twin(setting.subject, setting.network, setting.kernels("reference"))
    assert other.blocks[0].ffn[0].weight.data_ptr() == setting.network.blocks[0].ffn[0].weight.data_ptr()
    assert torch.allclose(setting.inputs.run(other), setting.inputs.run(setting.network), atol=1e-4)
    assert weight_bytes(setting.network) == sum(p.numel() * p.element_size() for p in setting.network.parameters())


def test_all_are_timed_and_compared_with_the_first() -> None:
    rows = run([entry("a", 1.0), entry("b", 1.5), entry("c", 1.0)])
    assert [row["name"] for row in rows] == ["a", "b", "c"]
    assert [row["error"] for row in rows] == [0, 0.5, 0]
    assert all(row["rounds"] == 2 and row["ms_min"] <= row["ms"] <= row["ms_max"] for row in rows)


def test_what_fails_is_a_row_with_its_reason_and_the_others_run() -> None:
    calls = iter([None, RuntimeError("later")])

    def sometimes() -> torch.Tensor:
        if error := next(calls):
            raise error
        return torch.ones(2)

    def absent() -> Contestant:
        raise ModuleNotFoundError("no module named 'peer'")

    entries = [entry("a", 1.0), Entry("late", lambda: Contestant(sometimes)), Entry("absent", absent)]
    rows = {row["name"]: row for row in run([*entries, entry("nan", float("nan")), entry("z", 1.0)])}
    assert rows["absent"]["failed"] == "ModuleNotFoundError: no module named 'peer'"
    assert rows["late"]["failed"] == "RuntimeError: later" and "ms" not in rows["late"]
    assert "2 of 2 values are not finite" in rows["nan"]["failed"]
    assert "ms" in rows["a"] and "ms" in rows["z"]


def test_what_does_not_fit_at_once_is_timed_beside_the_first_again() -> None:
    more_dropped.clear()
    packed = [entry("x", 1.0, holds="fp8", extra_bytes=6), entry("y", 1.0, holds="fp8", extra_bytes=6)]
    others = [entry("b", 1.0), *packed, entry("i", 1.0, holds="int8", extra_bytes=6)]
    assert [[e.name for e in heat] for heat in heats(others, 10)] == [["b", "x", "y"], ["i"]]
    rows = run([entry("a", 1.0), *others], room=10)
    assert [row["name"] for row in rows] == ["a", "b", "x", "y", "a", "i"]
    assert [row.get("again", False) for row in rows] == [False, False, False, False, True, False]
    assert more_dropped == ["fp8", "int8"]


def test_nothing_is_begun_after_the_time() -> None:
    rows = run([entry("a", 1.0), entry("b", 1.0)], until=0.0)
    assert [row["failed"] for row in rows] == ["no time was left"] and "ms" not in rows[0]


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x128", "attention"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...>>>", "attention"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "gemm"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<GemmUniversal...>>", "gemm"),
        ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<...>>", "elementwise"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>", "elementwise"),
        ("_modulate_quantize_kernel", "elementwise"),
        ("_quantize_rows", "quantise"),
        ("_norm_rope", "elementwise"),
        ("attend", "attention"),
        ("_by_copy_engine", "gemm"),
        ("_multiply", "gemm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<MulFunctor>>", "elementwise"),
        ("quantize_turned", "quantise"),
        ("Memset (Device)", "other"),
    ],
)
def test_kernels_are_told_apart(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_a_profile_adds_up() -> None:
    found = summary({"flash_fwd": 3.0, "nvjet_a": 2.0, "nvjet_b": 1.0})
    assert found["groups_ms"] == {"attention": 3, "gemm": 3} and found["total_ms"] == 6
    assert next(iter(found["kernels_ms"])) == "attention: flash_fwd"


def test_the_command_prints_a_table_and_keeps_its_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kept = tmp_path / "out.json"
    words = ["--rounds", "2", "--attention", "reference", "--device", "cpu", "--json", str(kept)]
    assert main(["bench", "--model", "demo", *words]) == 0
    said = capsys.readouterr().out.splitlines()
    document = json.loads(said[-1])
    assert document == json.loads(kept.read_text()) and list(tmp_path.iterdir()) == [kept]
    (result,) = document["results"]
    first, second = result["rows"]
    assert result["gate"] == "passed" and document["torch"] == torch.__version__
    assert (first["attention"], second["attention"]) == ("torch_sdpa", "reference")
    assert second["error"] < 1e-4 and first["profile"]["groups_ms"]["gemm"] > 0
    assert any(line.startswith("lightx2v float32, reference") and "TFLOP/s" in line for line in said)


def test_a_refused_choice_is_said_and_fails(capsys: pytest.CaptureFixture) -> None:
    assert (
        main(["bench", "--model", "demo", "--rounds", "1", "--no_profile", "--device", "cpu", "--attention", "x"]) == 1
    )
    assert "unknown attention backend 'x'" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert main(["bench", "--device", "cuda"]) == 1
        assert "sees no GPU" in capsys.readouterr().err


def test_a_table_has_a_line_for_what_failed() -> None:
    result = {"model": "m", "width": 1, "height": 1, "num_frames": 1, "tokens": 1, "tflop": 1, "weights": "hot"}
    assert table({**result, "rows": [{"name": "peer", "failed": "gone"}]})[1].split() == ["peer", "gone"]


def test_median_ms_is_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("lightx2v.bench.timing.time.perf_counter", lambda: next(clock) * 0.25)
    assert median_ms(lambda: None, CPU) == 250


@torch.no_grad()
@pytest.mark.parametrize(
    ("scheme", "least", "most"),
    [("fp8", 1e-3, 0.1), ("int8", 1e-3, 0.05), ("gguf-q4_k", 1e-2, 0.2), ("nvfp4", 1e-2, 0.3), ("mxfp8", 1e-3, 0.1)],
)
def test_packed_weights_are_near_and_their_own(scheme: str, least: float, most: float) -> None:
    document = run_plans([replace(TOY, quant=(scheme,), rounds=1)], CPU, {}, None)
    first, packed = document["results"][0]["rows"]
    assert least < packed["error"] < most and packed["kernels"]["linear"] == "reference"
    assert packed["weights_gib"] < first["weights_gib"]


def test_q4_k_is_what_the_reader_reads() -> None:
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1, :256] = 0, 3.0
    blocks = quantise_q4_k(weight)
    read = restore(blocks, "Q4_K", (6, 512))
    assert blocks.numel() == 12 * 144 and read[0].abs().max() == 0
    assert (read - weight).abs().max() < 0.35 and (read - weight).norm() / weight.norm() < 0.1
