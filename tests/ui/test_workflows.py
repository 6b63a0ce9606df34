"""Every workflow that comes with the pack opens on its page; those for the small models run and show their video."""

from __future__ import annotations

import pytest

from dev.environment import REPOSITORY
from host.stand_ins import STAND_INS

pytestmark = [pytest.mark.host, pytest.mark.ui]

WORKFLOWS = sorted(path for path in REPOSITORY.glob("workflows/*.json") if not path.name.endswith(".api.json"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_opens_runs_and_shows_its_video(canvas, path):
    canvas.load_workflow(path)
    assert not canvas.unknown_nodes()
    if path.stem in STAND_INS:  # it needs real files: tests/host runs its graph with others
        canvas.picture(path.stem)
        assert not canvas.page.exceptions
        return
    entry = canvas.queue()
    assert entry["status"]["status_str"] == "success", entry["status"]
    video = canvas.play_video()
    canvas.picture(path.stem)
    assert video["width"] > 0 and video["height"] > 0 and video["duration"] > 0
    assert not canvas.page.exceptions
