"""Several clients' prompts at once: each ends once, as it was asked to, with what it makes alone."""

from __future__ import annotations

import pytest

from host.load import Ended, Job, account, alone, flatness, mixed, press
from host.server import Server
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
