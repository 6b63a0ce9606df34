"""ComfyUI's page in a headless Chromium."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dev.browser import find_browser
from dev.environment import REPOSITORY
from host.server import Server
from ui.chromium import Page, launch

PICTURES = REPOSITORY / "out" / "ui"


@dataclass(frozen=True)
class Canvas:
    """ComfyUI's page, ready to use."""

    page: Page
    host: Server

    def load_workflow(self, path: Path) -> None:
        """Open a workflow as a person would have saved it."""
        self.page.evaluate(f"app.loadGraphData({path.read_text(encoding='utf-8')})")
        self._arrange()

    def load_graph(self, graph: Mapping[str, Any]) -> None:
        """Open an API-format graph; the page lays out the nodes itself."""
        self.page.evaluate(f"app.loadApiJson({json.dumps(graph)}, 'graph')")
        self._arrange()

    def _arrange(self) -> None:
        self.page.wait_for("app.graph._nodes.length > 0")
        # What is out of sight is not drawn, and its video not loaded.
        self.page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        # Far away, the page leaves out texts.
        self.page.evaluate("(app.canvas.min_font_size_for_lod = 0, app.graph.setDirtyCanvas(true, true))")

    def node_types(self) -> list[str]:
        """What is on the canvas."""
        return self.page.evaluate("app.graph._nodes.map(node => node.type)")

    def unknown_nodes(self) -> list[str]:
        """Types on the canvas that the server does not offer, which the page shows as red boxes."""
        known = set(self.host.get("/object_info")) | {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
        return [name for name in self.node_types() if name not in known]

    def queue(self, timeout_s: float = 300) -> Mapping[str, Any]:
        """Press Run and wait; returns the server's account: {"outputs": ..., "status": {"status_str", "messages"}}."""
        before = set(self.host.get("/history"))
        self.page.evaluate("app.queuePrompt(0)")
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if new := {key: entry for key, entry in self.host.get("/history").items() if key not in before}:
                (entry,) = new.values()
                return entry
            # Asking the page now and then also takes in what it reports.
            self.page.evaluate("1")
            time.sleep(0.1)
        raise AssertionError(f"the queued workflow did not end within {timeout_s} s")

    def play_video(self) -> Mapping[str, float]:
        """Wait for a video on the page that plays; returns its {width, height, duration}."""
        self.page.wait_for("[...document.querySelectorAll('video')].some(video => video.readyState >= 2)")
        self.page.evaluate(
            "window.shown = [...document.querySelectorAll('video')].find(video => video.readyState >= 2)"
        )
        self.page.evaluate("(async () => { shown.muted = true; shown.loop = true; await shown.play() })()")
        start = self.page.evaluate("shown.currentTime")
        self.page.wait_for(f"shown.currentTime !== {start}", timeout_s=10)
        size = "({width: shown.videoWidth, height: shown.videoHeight, duration: shown.duration})"
        return self.page.evaluate(size)

    def picture(self, name: str) -> Path:
        """Save what the page looks like as out/ui/NAME.png."""
        path = PICTURES / f"{name}.png"
        self.page.screenshot(path)
        return path


@contextmanager
def open_canvas(host: Server, profile: Path) -> Iterator[Canvas]:
    """A fresh browser with ComfyUI's page open and an empty canvas; skips where there is no browser."""
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium: install one (`apt-get install chromium`), or set CHROMIUM_PATH")
    with launch(executable, profile) as page:
        page.open(host.url)
        page.wait_for("window.app?.graph && window.app?.extensionManager && true")
        page.evaluate("app.graph.clear()")
        yield Canvas(page, host)


@pytest.fixture
def canvas(host: Server, tmp_path: Path) -> Iterator[Canvas]:
    """A browser for one test."""
    with open_canvas(host, tmp_path) as canvas:
        yield canvas
