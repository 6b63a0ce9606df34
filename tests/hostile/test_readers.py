"""Hostile files through every reader: each is read, or refused with an error of ours that names it.

`python -m dev.fuzz` does the same for as long as it is told.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hostile.readers import READERS, Case, complaint, outcome
from lightx2v.checkpoint import CheckpointError

# The same inputs at every run, and no more than seconds: what is found is shrunk by hand, with the seed that is told.
SHORT = settings(
    max_examples=24,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


class Drawn:
    """Dice that hypothesis throws, so that it can look for the smallest case that fails."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def number(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))


def tried(name: str, case: Case, folder: Path) -> str:
    folder.mkdir()
    try:
        said, error = outcome(READERS[name], case.write(folder))
        assert said in ("read", "refused"), (said, error)
        return said
    finally:
        shutil.rmtree(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_hostile_files_are_refused_in_words(name: str, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    @SHORT
    @given(st.data())
    def test(data: st.DataObject) -> None:
        case = READERS[name].make(Drawn(data))
        seen[tried(name, case, tmp_path / str(seen.total()))] += 1

    test()
    assert seen["refused"] >= 5, seen


@pytest.mark.parametrize("name", READERS)
def test_the_files_that_they_are_made_from_are_read(name: str, tmp_path: Path) -> None:
    for index, case in enumerate(READERS[name].valid()):
        assert tried(name, case, tmp_path / str(index)) == "read"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("m.pth"), "KeyError is no error of ours"),
        (CheckpointError("damaged"), "does not name the file"),
        (RecursionError("m.pth"), "RecursionError is no error of ours"),
        (CheckpointError("m.pth: damaged"), ""),
    ],
)
def test_an_unclear_error_is_noticed(error: Exception, words: str) -> None:
    assert complaint(READERS["pth"], Path("/somewhere/m.pth"), error) == words
