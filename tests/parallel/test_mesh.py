"""The mesh: which ranks work together, and that all of them know when one stops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightx2v.config import Engine, Parallel, Sampling
from lightx2v.diffuse import _warn
from lightx2v.parallel.agreement import StoppedElsewhereError, first_said, meet, on_first, only_on_first, together
from lightx2v.parallel.mesh import Line, Mesh, join, launched, own_device
from ranks import Ranks

CPU = torch.device("cpu")


def lines(parallel: Parallel) -> tuple[Any, ...]:
    mesh = join(parallel, CPU)
    return mesh.rank, mesh.ulysses.ranks, mesh.ring.ranks, mesh.cfg.ranks, mesh.sequence.ranks, mesh.sequence.place


def test_ulysses_neighbours_are_adjacent_and_guidance_takes_halves(four: Ranks) -> None:
    assert four.run(lines, Parallel(ulysses=2, cfg=2)) == [
        (0, (0, 1), (0,), (0, 2), (0, 1), 0),
        (1, (0, 1), (1,), (1, 3), (0, 1), 1),
        (2, (2, 3), (2,), (0, 2), (2, 3), 0),
        (3, (2, 3), (3,), (1, 3), (2, 3), 1),
    ]
    assert four.run(lines, Parallel(ulysses=2, ring=2)) == [
        (0, (0, 1), (0, 2), (0,), (0, 1, 2, 3), 0),
        (1, (0, 1), (1, 3), (1,), (0, 1, 2, 3), 1),
        (2, (2, 3), (0, 2), (2,), (0, 1, 2, 3), 2),
        (3, (2, 3), (1, 3), (3,), (0, 1, 2, 3), 3),
    ]


def words_of_raise(work: Any, *args: Any) -> str:
    try:
        work(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def agreements() -> list[Any]:
    mesh = join(Parallel(ulysses=4), CPU)
    meet(mesh)

    def stop(rank: int) -> None:
        if mesh.rank == rank:
            raise ValueError("no such picture")

    return [
        on_first(mesh, lambda: (mesh.rank, torch.ones(2))),
        only_on_first(mesh, lambda: "frames"),
        words_of_raise(on_first, mesh, lambda: stop(0)),
        words_of_raise(only_on_first, mesh, lambda: stop(0)),
        words_of_raise(together, mesh, lambda: stop(2)),
        words_of_raise(together, mesh, lambda: None),
        first_said(mesh, f"rank {mesh.rank}" if mesh.rank % 2 else None),
        words_of_raise(join, Parallel(ring=2), CPU),
    ]


def test_what_one_does_alone_all_know(four: Ranks) -> None:
    for rank, said in enumerate(four.run(agreements)):
        value, frames, given, alone, cancelled, fine, first, wrong = said
        own, elsewhere = (
            "ValueError: no such picture",
            "StoppedElsewhereError: process {} of this video stopped: no such",
        )
        assert value[0] == 0 and torch.equal(value[1], torch.ones(2))
        assert frames == ("frames" if rank == 0 else None)
        for told, at in ((given, 0), (alone, 0), (cancelled, 2)):
            assert told.startswith(own if rank == at else elsewhere.format(at))
        assert fine == "went on" and first == (1, "rank 1")
        assert "ring 2 takes 2 processes, but 4 were started" in wrong and "whose product is 4" in wrong


def test_one_process_alone_is_told_to_use_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"ulysses 2 x cfg 2 takes 4 .* torchrun --nproc_per_node 4"):
        join(Parallel(ulysses=2, cfg=2), CPU)
    assert on_first(None, lambda: 1) == only_on_first(None, lambda: 1) == 1
    assert first_said(None, None) is None and StoppedElsewhereError(3, "x").rank == 3


def test_each_process_takes_the_gpu_of_its_place_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of its number among all, which is larger on a second machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched() is None and own_device() == torch.device("cuda")
    for name, value in (("RANK", 3), ("WORLD_SIZE", 4), ("LOCAL_RANK", 1)):
        monkeypatch.setenv(name, str(value))
    assert own_device() == own_device("cuda") == torch.device("cuda", 1)
    assert own_device("cuda:0") == torch.device("cuda", 0) and own_device("cpu") == CPU
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"process 2 of this machine has no GPU: there are 2; start one process a GPU"):
        own_device()


def test_halves_without_guidance_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    def warned(rank: int, **sampling: float) -> bool:
        caplog.clear()
        mesh = Mesh(Parallel(2, 1, 2), rank, CPU, *[Line((0, 1), 0)] * 5, control=None)  # type: ignore[arg-type]
        _warn(Sampling(**sampling), 50, mesh)  # type: ignore[arg-type]
        return "both halves of the 4 processes compute the same; share tokens with all" in caplog.text

    assert warned(0, cfg_scale=1) and not warned(1, cfg_scale=1)
    assert not warned(0, cfg_scale=5) and not warned(0, cfg_scale=1, cfg_low=3)


def test_sizes_are_checked() -> None:
    assert Parallel(4, 2, 2).size == 16 and Parallel(4, 2, 2).sequence == 8
    assert Parallel().describe() == "one device" and Parallel(2, exchange="fp8").describe() == "ulysses 2, fp8 exchange"
    assert replace(Engine(), parallel=Parallel(2)) != Engine()
    for wrong, says in (({"ulysses": 0}, "ulysses=0"), ({"cfg": 3}, "1 .off. or 2"), ({"exchange": "fp4"}, "exact")):
        with pytest.raises(ValueError, match=says):
            Parallel(**wrong)  # type: ignore[arg-type]
