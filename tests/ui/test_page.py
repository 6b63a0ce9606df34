"""ComfyUI's page works with the pack in it: it opens, runs a graph of ComfyUI's own nodes, shows its video."""

from __future__ import annotations

import pytest
from PIL import Image

from host.test_harness import native_graph

pytestmark = [pytest.mark.host, pytest.mark.ui]


def test_the_page_opens_without_errors(canvas):
    assert not canvas.page.exceptions
    path = canvas.picture("page")
    assert Image.open(path).size == (1600, 1000)


def test_a_graph_runs_and_its_video_plays(canvas, tiny_models):
    canvas.load_graph(native_graph(tiny_models))
    assert not canvas.unknown_nodes()
    entry = canvas.queue()
    assert entry["status"]["status_str"] == "success", entry["status"]
    video = canvas.play_video()
    canvas.picture("native")
    assert (video["width"], video["height"]) == (128, 96)
    assert 0.9 < video["duration"] < 1.2, "17 frames at 16 a second"
    assert not canvas.page.exceptions


def test_what_goes_wrong_on_the_page_is_noticed(canvas):
    canvas.page.evaluate("setTimeout(() => { throw new Error('planted') }, 0)")
    canvas.page.evaluate("new Promise(done => setTimeout(done, 200))")
    assert any("planted" in text for text in canvas.page.exceptions)
    with pytest.raises(AssertionError, match="nothing_here"):
        canvas.page.evaluate("nothing_here()")
    with pytest.raises(AssertionError, match="not within"):
        canvas.page.wait_for("false", timeout_s=0.3)
