"""Freed memory is the system's again after a stage."""

from __future__ import annotations

import ctypes
import platform
import sys

import pytest
import torch

from benchmarks.disk import anonymous
from lightx2v.heap import trim_heap
from lightx2v.report import Watch

MB = 1_000_000
ON_GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.mark.skipif(not ON_GLIBC, reason="only glibc keeps freed memory and can be asked for it")
def test_what_a_stage_freed_is_the_systems_again() -> None:
    watch = Watch(torch.device("cpu"))
    with watch.stage("sample"):
        # Every other piece is freed: glibc keeps pieces of this size that are not the end of the heap.
        pieces = [torch.ones(25_000) for _ in range(3000)]
        full, kept = anonymous(), pieces[1::2]
        del pieces
        assert anonymous() > full - 20 * MB, "freed, and not given back"
    assert anonymous() < full - 120 * MB
    assert len(kept) == 1500 and all(bool((piece == 1).all()) for piece in kept)


def test_it_says_whether_this_system_can_be_asked() -> None:
    assert trim_heap() == ON_GLIBC


def test_a_c_library_without_the_call_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not trim_heap()


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_other_systems_are_not_asked(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(name: None) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(ctypes, "CDLL", asked)
    assert not trim_heap()
