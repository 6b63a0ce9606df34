"""Workflows saved with every released version still run: released/<version>/ is kept as it was, and never edited."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dev.releases import RELEASED, broken, promises
from host.stand_ins import RELEASED_STAND_INS, SIZE, runnable, write_stand_ins

FILES = sorted(RELEASED.glob("*/*.api.json"))
every_file = pytest.mark.parametrize("path", FILES, ids=[f"{file.parent.name}-{file.stem[:-4]}" for file in FILES])


@pytest.fixture(scope="module")
def stand_ins(host, tiny_models) -> None:
    write_stand_ins(host.base / "models")


def test_something_is_kept() -> None:
    versions = sorted(path.parent.name for path in RELEASED.glob("*/nodes.json"))
    assert "0.1.0" in versions and all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions)
    assert {path.parent.name for path in FILES} == set(versions) and len(FILES) >= 11


@pytest.mark.host
@every_file
def test_it_still_runs(host, stand_ins, path: Path) -> None:
    """As it was saved, with no input added; only smaller, and in two steps where the steps are free."""
    saved_as = json.loads(path.read_text(encoding="utf-8"))
    graph = runnable(path.name.removesuffix(".api.json"), saved_as, RELEASED_STAND_INS)
    for node in graph.values():
        inputs = node["inputs"]
        if "length" in inputs:
            inputs.update({**SIZE, "length": 5})
        if "steps" in inputs and "start_at_step" not in inputs and inputs.get("scheduler") != "distilled":
            inputs["steps"] = 2
    (saved,) = (key for key, node in graph.items() if node["class_type"] == "SaveVideo")
    (video,) = host.run(graph).expect().files(saved, host.base)
    assert video.stat().st_size > 500


@pytest.mark.host
@pytest.mark.parametrize("path", sorted(RELEASED.glob("*/nodes.json")), ids=lambda path: path.parent.name)
def test_nodes_keep_what_saved_workflows_rely_on(host, path: Path) -> None:
    then = json.loads(path.read_text(encoding="utf-8"))
    assert broken(then, promises(host.get("/object_info"))) == []


def described() -> dict:
    widgets = {
        "steps": ["INT", {"default": 4, "min": 1, "max": 100}],
        "mode": ["COMBO", {"options": ["a", "b"], "default": "a"}],
    }
    inputs = {"required": {"model": ["MODEL", {}]}, "optional": widgets}
    return {"LightX2VSampler": {"input": inputs, "output": ["LATENT"]}}


def test_what_may_change_and_what_may_not() -> None:
    then = promises(described())
    assert then["LightX2VSampler"]["inputs"]["mode"]["options"] == ["a", "b"]

    def after(change: str, value: object, group: str = "optional") -> list[str]:
        now = described()
        inputs = now["LightX2VSampler"]["input"][group]
        inputs[change] = value
        if value is None:
            del inputs[change]
        return broken(then, promises(now))

    assert after("late", ["INT", {"default": 0}]) == [] == after("more", ["MASK", {}])
    assert after("steps", ["INT", {"default": 4, "min": 0, "max": 200}]) == []
    wrong = {
        "gone": after("steps", None),
        "no longer INT": after("steps", ["FLOAT", {"default": 4}]),
        "default was 4": after("steps", ["INT", {"default": 5, "min": 1, "max": 100}]),
        "smaller": after("steps", ["INT", {"default": 4, "min": 2, "max": 100}]),
        "no longer offers b": after("mode", ["COMBO", {"options": ["a"], "default": "a"}]),
        "has to be given": after("new", ["INT", {}], "required"),
        "later ones go behind": after("new", ["INT", {}], "required"),
    }
    for words, said in wrong.items():
        assert any(words in text for text in said), (words, said)
    assert broken(then, {}) == ["LightX2VSampler: the node is gone"]
    assert (
        "outputs were LATENT"
        in broken(then, promises({"LightX2VSampler": {**described()["LightX2VSampler"], "output": []}}))[0]
    )
