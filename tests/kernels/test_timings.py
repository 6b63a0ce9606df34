"""Which backend is taken where speed is measured. A clock stands in for the GPU's; everything else is as it runs."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels import registry, timings
from lightx2v_kernels.attention import rotary_arguments
from lightx2v_kernels.registry import Backend, Registry
from lightx2v_kernels.timings import Timings, Workload

CPU = torch.device("cpu")
HERE = (CPU, torch.float32, 128)


def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def off(error: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention and noise of that relative size."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = right(q, k, v)
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return out + error * noise * out.norm() / noise.norm()

    return attention


class Clock:
    """Stands in for CUDA events: a call of a backend takes the milliseconds that its name ends with."""

    def __init__(self) -> None:
        self.last, self.calls = "", 0

    def backend(self, name: str, fn: Callable[..., Tensor] = right, **more: Any) -> Backend:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.last = name
            return fn(q, k, v)

        return Backend("attention", name, lambda: attention, **{"rank": 50, **more})

    def milliseconds(self, call: Callable[[], object]) -> float:
        call()
        self.calls += 1
        return float(self.last.split("_")[1])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setenv("LIGHTX2V_CACHE", str(tmp_path))
    monkeypatch.setattr(timings, "_cuda_ms", made.milliseconds)
    monkeypatch.setattr(timings, "facts_of", lambda device, **more: {"gpu": "a GPU", **more})
    yield made
    registry._fastest.cache_clear()


def small(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 64, 2, head_dim, generator=generator, dtype=dtype) for _ in range(3))


def of(*backends: Backend, rows: Callable[[Tensor], Tensor] = lambda x: x[:, ::8]) -> Registry:
    return Registry(registry.registry("attention").op, backends, {"self": Workload(small, rows)})


def taken(found: Registry, name: str = "auto") -> str:
    registry._fastest.cache_clear()  # as in another process
    return registry._fastest(found, name, *HERE, "self").name


def test_the_fastest_is_taken_and_its_line_tells_all(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    found = of(
        clock.backend("a_3"),
        clock.backend("b_2"),
        clock.backend("wrong_1", lambda q, k, v: right(q, k[:, :-1], v[:, :-1])),
        clock.backend("absent_1", package="no_such_package"),
        clock.backend("breaks_1", lambda q, k, v: 1 / 0),
        clock.backend("last_1", rank=1000),
    )
    with caplog.at_level(logging.INFO, "lightx2v_kernels"):
        assert taken(found) == "b_2"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("attention (self): b_2 takes 2 ms on cpu, float32, head_dim 128; a_3 3 (passed over: ")
    for told in ("wrong_1: its self-test failed: rel", "breaks_1: its self-test raised Zero"):
        assert told in line
    assert line.endswith("; not installed: absent_1)")
    assert "last_1" not in line


@pytest.mark.parametrize(
    ("lossy", "error", "expected"),
    [
        ("lossy_8.9", 0.02, "lossy_8.9"),  # saves 11 %
        ("lossy_9.1", 0.02, "exact_10"),  # saves 9 %
        ("lossy_1", 0.06, "exact_10"),  # a cosine of 0.9982
        ("lossy_1", 0.2, "exact_10"),  # more than it declares
    ],
)
def test_a_lossy_one_must_be_close_and_worth_it(clock: Clock, lossy: str, error: float, expected: str) -> None:
    found = of(clock.backend("exact_10"), clock.backend(lossy, off(error), max_error=0.1))
    assert taken(found) == expected
    assert taken(found, "exact") == "exact_10"


def test_a_lossy_one_that_auto_passes_over_runs_when_named(clock: Clock) -> None:
    found = of(clock.backend("exact_10"), clock.backend("lossy_1", off(0.06), max_error=0.1))
    assert found.select("lossy_1", *HERE).name == "lossy_1"


def test_one_that_is_wrong_at_length_alone_is_passed_over(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    def short_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return right(q, k, v) * (1.01 if q.shape[1] == 64 else 1)

    with caplog.at_level(logging.INFO, "lightx2v_kernels"):
        assert taken(of(clock.backend("a_1", short_only), clock.backend("b_2"))) == "b_2"
    assert "a_1: at (1, 64, 2, 128): relative error" in caplog.text


def test_naming_one_of_several_variants_takes_the_fastest_of_them(clock: Clock) -> None:
    family = clock.backend("family_3", variants=("x_2", "y_4"))
    assert taken(of(family, clock.backend("x_2"), clock.backend("y_4"), clock.backend("z_1")), "family_3") == "x_2"
    assert registry.registry("attention").candidates("torch_sdpa")[0].name == "torch_sdpa"
    assert {each.name for each in registry.registry("attention").candidates("torch_sdpa")[1:]} == {
        *("torch_flash", "torch_cudnn", "torch_efficient"),
    }


def test_self_attention_is_timed_as_a_model_calls_it(clock: Clock) -> None:
    """From projections: one with a rotary attention of its own by that, the others after the norm and the turn."""
    attention = registry.registry("attention")
    load = attention.workloads["self"]
    few = replace(load, arguments=lambda device, dtype, dim: rotary_arguments(device, dtype, 512, 2, dim))

    def rotary(right: bool) -> Callable[..., Any]:
        def attend(*args: Any) -> Tensor:
            clock.last = "own_1"
            return attention.rotary.reference(*args) if right else attention.rotary.reference(args[1], *args[1:])

        return lambda: attend

    plain, own = clock.backend("plain_2"), clock.backend("own_3", rotary=rotary(True))
    found = replace(attention, backends=(plain, own), workloads={"self": few})
    assert taken(found) == "own_3", "its own takes 1 ms"
    wrong = replace(own, rotary=rotary(False))
    assert taken(replace(found, backends=(plain, wrong))) == "plain_2"
    with pytest.raises(
        registry.UnsupportedBackendError, match=r"'own_3' cannot run .* self-test failed: relative error"
    ):
        replace(found, backends=(plain, wrong), workloads={}).select("own_3", *HERE)


def test_where_nothing_is_timed_the_last_resort_is_taken(clock: Clock) -> None:
    assert taken(of(clock.backend("last_1", rank=1000), clock.backend("a_1", package="no_such_package"))) == "last_1"


def test_another_process_does_not_measure_again(clock: Clock, tmp_path: Path) -> None:
    found = of(clock.backend("a_3"), clock.backend("b_2"))
    assert taken(found) == "b_2"
    (path,) = tmp_path.rglob("*.*")
    assert path.suffix == ".json" and json.loads(path.read_text())["ms"] == {"a_3": 3, "b_2": 2}
    measured = clock.calls
    assert taken(found) == "b_2" and clock.calls == measured
    assert taken(of(*found.backends, clock.backend("c_1"))) == "c_1", "another set of packages is another file"
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_what_is_remembered_must_still_pass_its_self_test(clock: Clock, tmp_path: Path) -> None:
    assert taken(of(clock.backend("a_3"), clock.backend("b_2"))) == "b_2"
    assert taken(of(clock.backend("a_3"), clock.backend("b_2", lambda q, k, v: right(q, k, v) * 1.01))) == "a_3"
    (path,) = tmp_path.rglob("*.json")
    assert list(json.loads(path.read_text())["ms"]) == ["a_3"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"facts": {}, "ms": {}, "passed_over": {}}'])
def test_a_broken_file_is_ignored_with_one_line(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    found = of(clock.backend("a_3"), clock.backend("b_2"))
    taken(found)
    (path,) = tmp_path.rglob("*.json")
    path.write_text(content)
    with caplog.at_level(logging.INFO, "lightx2v_kernels.timings"):
        assert taken(found) == "b_2"
    (line,) = [record.getMessage() for record in caplog.records if record.name.endswith("timings")]
    assert line.startswith("remembered timings cannot be used and are measured again: ")
    assert json.loads(path.read_text())["ms"] == {"a_3": 3, "b_2": 2}


def test_a_directory_that_cannot_be_written_costs_a_line_of_log(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTX2V_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO, "lightx2v_kernels.timings"):
        assert taken(of(clock.backend("a_3"))) == "a_3"
    assert "timings are not remembered: " in caplog.text


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTX2V_CACHE", str(tmp_path))
    timings.write({"gpu": "x"}, Timings({"a": 1.0}))
    assert timings.read({"gpu": "x"}) == Timings({"a": 1.0})
    with pytest.raises(TypeError):
        timings.write({"gpu": "x"}, Timings({"a": object()}))  # type: ignore[dict-item]
    assert timings.read({"gpu": "x"}) == Timings({"a": 1.0}) and timings.read({"gpu": "y"}) is None
    assert [path.suffix for path in tmp_path.rglob("*.*")] == [".json"]


def test_a_full_gpu_leaves_it_to_the_ranks_and_is_not_remembered(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Tensor, ...]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = of(clock.backend("a_3", rank=1), clock.backend("b_2", rank=2))
    found = replace(found, workloads={"self": Workload(full, lambda x: x)})
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(registry, "_indexed", lambda device: device)
    monkeypatch.setattr(registry, "_place", lambda *place: "a GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(registry, "self_test", lambda *args: None)
    with caplog.at_level(logging.INFO, "lightx2v_kernels"):
        assert found.select("auto", cuda, torch.float32, 128).name == "a_3"
    assert "attention: speed is not measured, the ranks decide: CUDA out of memory" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_turns_are_fair_to_all_and_the_median_counts() -> None:
    drift = iter([*([1.0] * 30), *(1, 2), *(1, 2), *(100, 200), *(1, 2), *(1, 2)])  # the first 30 ms are warming up
    found = timings.measure(
        {"a": lambda x: x, "b": lambda x: x}, (torch.ones(1),), lambda name, out: None, lambda call: next(drift)
    )
    assert found == Timings({"a": 1, "b": 2})


def test_a_slow_gpu_is_not_asked_five_times() -> None:
    asked: list[float] = []
    timings.measure({"a": lambda x: x}, (torch.ones(1),), lambda name, out: None, lambda call: asked.append(1) or 400.0)
    assert len(asked) == 3  # one to warm up, then until a second is over


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"LIGHTX2V_CACHE": "/named"}, "/named"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/lightx2v"),
        ("linux", {}, "/home/me/.cache/lightx2v"),
        ("darwin", {}, "/home/me/Library/Caches/lightx2v"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/lightx2v/cache"),
        ("win32", {}, "/home/me/AppData/Local/lightx2v/cache"),
    ],
)
def test_the_directory_is_the_users_own(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LIGHTX2V_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(timings.sys, "platform", platform)
    monkeypatch.setattr(timings.Path, "home", lambda: Path("/home/me"))
    assert timings.directory() == Path(expected)


def test_what_is_timed_is_as_long_as_it_says() -> None:
    found = registry.registry("attention").workloads
    keys = {name: load.inner(*load.arguments(CPU, torch.bfloat16, 8))[1].shape for name, load in found.items()}
    assert keys == {"self": (1, 16384, 8, 8), "cross": (1, 512, 8, 8)}
    assert found["self"].rows(torch.empty(1, 16384, 8, 8)).shape == (1, 64, 8, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
@pytest.mark.parametrize("name", ["auto", "exact", "torch_sdpa"])
@pytest.mark.parametrize("workload", ["self", "cross"])
def test_on_a_gpu(name: str, workload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTX2V_CACHE", str(tmp_path))
    registry._fastest.cache_clear()
    place = (torch.device("cuda"), torch.bfloat16, 128)
    best = registry.select("attention", name, *place, workload)
    (path,) = tmp_path.rglob("*.json")
    held = json.loads(path.read_text())
    assert {"torch_flash", "torch_cudnn", "torch_efficient"} <= held["ms"].keys()
    assert best.name in held["ms"] and held["facts"]["gpu"] == torch.cuda.get_device_name()
    if name != "auto":
        assert held["ms"][best.name] == min(held["ms"].values())
    monkeypatch.setattr(timings, "measure", lambda *args: pytest.fail("measured again"))
    registry._fastest.cache_clear()
    assert registry.select("attention", name, *place, workload) is best
