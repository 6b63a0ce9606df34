"""Several clients' prompts at once: each ends once, as it was asked to, with what it makes alone."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from demo.grammar import parse
from dev.comfyui import PACK_NAME, demo_models, find_comfyui
from dev.environment import REPOSITORY
from dev.load import _fine, _workflow
from host.graphs import node
from host.load import Ended, Job, account, alone, demo, flatness, mixed, press, settled
from host.server import Server, start
from host.shipped import read
from host.tiny_models import TinyModels

pytestmark = pytest.mark.host


def test_prompts_of_several_clients_are_neither_lost_nor_swapped(host: Server, tiny_models: TinyModels) -> None:
    clients = mixed(host, tiny_models, prompts=24, clients=3)
    jobs = [job for each in clients for job in each]
    expected = alone(host, jobs)
    assert len(set(expected.values())) == len(expected) < sum(job.deed == "run" for job in jobs), "and some are twice"
    ended, foreign = press(host, clients)
    made = account(ended, expected, foreign)
    assert made["prompts"] == 24 and made["not as asked"] == [] and made["swapped"] == made["astray"] == 0
    assert made["ended"]["interrupted"] == made["asked to end"]["stop"] == 1
    assert made["ended"].get("deleted", 0) >= 1 and "lost" not in made["ended"] and "error" not in made["ended"]


def test_what_goes_wrong_would_be_counted() -> None:
    plain = Job("plain 0", {})
    ended = [Ended(plain, "success", "a"), Ended(plain, "success", "b"), Ended(plain, "lost")]
    made = account(ended, {"plain 0": "a"}, 2)
    assert made["swapped"] == 1 and made["astray"] == 2 and made["not as asked"] == ["plain 0: lost "]
    assert flatness([100, 90, 110, 100], 2)["growth"] == 0.1
    later = settled([90, 100, 130, 101, 104, 103])
    assert later["growth"] == 0.03 and later["growth_at_most"] == 0.3


def test_a_workflow_is_run_and_judged(host: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _workflow(host, "wan_t2v_4step_lora")
    assert found == {"status": "success", "frames": [17, 128, 128, 3], "judged": True, "wrong": ""}
    monkeypatch.setattr("host.shipped.parse", lambda prompt: parse(prompt.replace("yellow", "red")))
    found = _workflow(host, "wan_t2v_4step_lora")
    assert "the judge saw" in found["wrong"] and not _fine({"wan_t2v_4step_lora": found})
    monkeypatch.setattr("host.shipped.read", lambda name: (None, {**read(name)[1], "nothing": node("Nobody")}))
    found = _workflow(host, "wan_t2v_4step_lora")
    assert found["status"] == "rejected" and "Nobody" in found["wrong"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory and can be asked for it")
def test_the_memory_of_a_server_does_not_grow_from_run_to_run(tmp_path: Path) -> None:
    """Of a new one, as it comes: what a run has freed is the system's again, and little is kept of it."""
    root = find_comfyui()
    if root is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH")
    packs = {PACK_NAME: REPOSITORY, "fixture_pack": Path(__file__).parent / "fixture_pack"}
    graphs = [demo(index) for index in range(9)]
    graphs[-1]["kept"] = node("FixtureKeptFree", after=["decode", 0])
    with start(root, tmp_path, packs, demo_models()) as server:
        ended, _ = press(server, [[Job(str(index), graph) for index, graph in enumerate(graphs)]])
        (kept,) = [
            run["outputs"]["kept"]["text"][0] for run in server.get("/history").values() if "kept" in run["outputs"]
        ]
    assert [each.status for each in ended] == ["success"] * len(graphs)
    held = [each.rss for each in sorted(ended, key=lambda each: each.order)][:-1]
    assert settled(held)["growth"] < 0.03
    assert float(kept) < 40, "MB; without trim_heap 80 and more"
