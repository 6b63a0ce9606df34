"""Several processes for one video, through a real server: two ranks on the CPU that talk over gloo."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dev.comfyui import PACK_NAME, find_comfyui
from dev.environment import REPOSITORY
from host.graphs import Graph, base, keep, node, our_sampler
from host.server import Server, start
from host.tiny_models import write_tiny_models

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="looks at processes in /proc"),
]
STEPS = 900  # which nobody waits for: the test ends them
CLOSE = {"rtol": 0, "atol": 1e-5}


def on_ranks(tiny_models, **changes) -> Graph:
    """A graph whose sampler runs on two ranks."""
    ranks = node("LightX2VParallel", devices="cpu, cpu", use="always")
    sampler = our_sampler(parallel=["ranks", 0], **changes)
    return keep({**base(tiny_models), "ranks": ranks, "sample": sampler}, "sample")


def workers(server: Server) -> dict[int, int]:
    """Rank -> process id of the workers below a server; those that ended and were not taken leave of count too."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text(encoding="utf-8", errors="replace")
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            parent = Path("/proc", fields["PPid"].strip(), "cmdline").read_text(encoding="utf-8", errors="replace")
            line = (folder / "cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
        except OSError:
            continue
        if f"{server.base}\0" in parent and any("lightx2v.parallel.worker" in word for word in line):
            found[int(line[line.index(str(REPOSITORY)) + 1])] = int(folder.name)
        elif f"{server.base}\0" in parent and fields["State"].split()[0] == "Z":
            found[-1 - len(found)] = int(folder.name)
    return found


def striking(server: Server, rank: int, sign: signal.Signals, at: list[float]) -> Callable[[float], None]:
    """Sends a signal to a rank in the step after the second, and notes when."""

    def strike(done: float) -> None:
        if done >= 2 and not at:
            at.append(time.monotonic())
            os.kill(workers(server)[rank], sign)

    return strike


@pytest.fixture(scope="module")
def expected(host, tiny_models) -> torch.Tensor:
    """What one process makes."""
    graph = keep({**base(tiny_models), "sample": our_sampler()}, "sample")
    return host.run(graph).expect().kept("keep_sample")["samples"]


def test_two_ranks_make_what_one_process_makes(host, tiny_models, expected) -> None:
    graph = on_ranks(tiny_models)
    graph["report"] = node("LightX2VReport", latent=["sample", 0])
    graph["loaded"] = node("FixtureLoadedModels", after=["sample", 0])
    host.post("/free", {"unload_models": True})
    result = host.run(graph).expect()
    torch.testing.assert_close(result.kept("keep_sample")["samples"], expected, **CLOSE)
    assert "processes: 2, on cpu, cpu" in result.text("report") and "parallel: cfg 2" in result.text("report")
    assert [done for name, done, _ in result.progress if name == "sample"][-6:] == [1, 2, 3, 4, 5, 6]
    assert len([each for each in result.previews if each.node == "sample"]) == 6
    assert "Ranks" in result.text("loaded") and "LoadedTransformer" not in result.text("loaded")
    pids = workers(host)
    assert set(pids) == {0, 1}

    host.run(on_ranks(tiny_models, steps=STEPS), interrupt_after=2).expect("interrupted")
    found = host.run(on_ranks(tiny_models)).expect().kept("keep_sample")["samples"]
    torch.testing.assert_close(found, expected, **CLOSE)
    assert workers(host) == pids, "they are kept from one video to the next, and when one is cancelled"


@pytest.mark.parametrize(("rank", "sign", "words"), [(1, signal.SIGKILL, "signal 9"), (0, signal.SIGSTOP, "no sign")])
def test_a_rank_that_is_lost_is_named(host, tiny_models, expected, rank, sign, words) -> None:
    at: list[float] = []
    graph = on_ranks(tiny_models, steps=STEPS, seed=sign)
    result = host.run(graph, on_progress=striking(host, rank, sign, at)).expect("error")
    assert time.monotonic() - at[0] < 30
    assert f"rank {rank} (cpu, process" in result.message and words in result.message
    assert "processes were ended, and start again with the next run" in result.message
    assert workers(host) == {}
    found = host.run(on_ranks(tiny_models)).expect().kept("keep_sample")["samples"]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_whether_they_are_worth_it_is_measured_once(host, tiny_models, expected) -> None:
    """Either way the video is right, and the report says what was found."""
    before, seen = len(host.log()), []
    for seed in (3, 31):
        graph = on_ranks(tiny_models, seed=seed)
        graph["ranks"]["inputs"]["use"] = "auto"
        graph["report"] = node("LightX2VReport", latent=["sample", 0])
        result = host.run(graph).expect()
        seen.append(result.kept("keep_sample")["samples"])
        line = next(line for line in result.text("report").splitlines() if line.startswith("parallel: 2 devices"))
        assert ("one does it" in line) == (workers(host) == {}) == ("processes: 2" not in result.text("report"))
    torch.testing.assert_close(seen[0], expected, **CLOSE)
    assert not torch.equal(*seen) and host.log()[before:].count("measuring a few blocks") == 1


def test_one_device_is_refused_in_words(host, tiny_models) -> None:
    for devices, words in (("cpu", "is one device; name two or more"), ("0, 1", "there is no GPU 0")):
        graph = on_ranks(tiny_models)
        graph["ranks"]["inputs"]["devices"] = devices
        assert words in host.run(graph).expect("error").message


def test_free_frees_what_every_rank_holds(host, tiny_models, expected) -> None:
    graph = on_ranks(tiny_models)
    host.run(graph).expect()
    pids = workers(host)
    host.post("/free", {"unload_models": True})
    held = {"ranks": graph["ranks"], "loaded": node("FixtureLoadedModels", after=["ranks", 0])}
    until = time.monotonic() + 30
    while "Ranks" in (freed := host.run(held).expect()).text("loaded"):
        assert time.monotonic() < until, "still in the books"
    assert "ranks" in freed.cached and workers(host) == pids, "the weights go, the processes stay"
    host.post("/free", {"unload_models": True, "free_memory": True})
    while workers(host):
        assert time.monotonic() < until, "still there"
        time.sleep(0.1)


def test_ranks_end_with_a_server_that_is_killed(tmp_path) -> None:
    root = find_comfyui()
    if root is None:
        pytest.skip("no ComfyUI")
    packs = {PACK_NAME: REPOSITORY, "fixture_pack": REPOSITORY / "tests" / "host" / "fixture_pack"}
    with start(root, tmp_path, packs, []) as server:
        graph = on_ranks(write_tiny_models(server.base / "models"), steps=STEPS)
        seen: dict[int, int] = {}

        def kill(done: float) -> None:
            if done >= 1 and not seen:
                seen.update(workers(server))
                os.kill(_parent(seen[0]), signal.SIGKILL)
                raise InterruptedError

        with pytest.raises(InterruptedError):
            server.run(graph, on_progress=kill, timeout_s=60)
        assert set(seen) == {0, 1}
        until = time.monotonic() + 10
        while alive := [pid for pid in seen.values() if Path("/proc", str(pid)).exists() and not _zombie(pid)]:
            assert time.monotonic() < until, f"{alive} outlive the server"
            time.sleep(0.05)


def _status(pid: int) -> dict[str, str]:
    lines = Path("/proc", str(pid), "status").read_text(encoding="utf-8").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _parent(pid: int) -> int:
    return int(_status(pid)["PPid"])


def _zombie(pid: int) -> bool:
    """Ended; whoever inherits the processes of a killed server has not noticed yet."""
    return _status(pid)["State"].split()[0] == "Z"
