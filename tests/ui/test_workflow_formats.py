"""The page reads each workflow that comes with the pack as it is meant: it would queue what the API file says."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from dev.environment import REPOSITORY
from ui.conftest import Canvas, open_canvas

pytestmark = [pytest.mark.host, pytest.mark.ui]

NAMES = sorted(path.name.removesuffix(".api.json") for path in REPOSITORY.glob("workflows/*.api.json"))


@pytest.fixture(scope="module")
def canvas(host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Canvas]:
    """One browser for all: nothing is run here, so nothing of one workflow is left for the next."""
    with open_canvas(host, tmp_path_factory.mktemp("browser")) as canvas:
        yield canvas


@pytest.mark.parametrize("name", NAMES)
def test_the_page_queues_what_the_api_file_says(canvas, name: str) -> None:
    canvas.load_workflow(REPOSITORY / "workflows" / f"{name}.json")
    queued = canvas.page.evaluate("app.graphToPrompt()")["output"]
    api = json.loads((REPOSITORY / "workflows" / f"{name}.api.json").read_text(encoding="utf-8"))
    assert {key: (node["class_type"], node["inputs"]) for key, node in queued.items()} == {
        key: (node["class_type"], node["inputs"]) for key, node in api.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_page_keeps_every_size(canvas, name: str) -> None:
    """A node that is too small for its widgets would be grown by the page, over its neighbour."""
    path = REPOSITORY / "workflows" / f"{name}.json"
    canvas.load_workflow(path)
    drawn = {node["id"]: node["size"] for node in canvas.page.evaluate("app.graph.serialize()")["nodes"]}
    written = {node["id"]: node["size"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
    assert drawn == written
