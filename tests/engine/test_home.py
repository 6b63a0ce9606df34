"""Whole networks that rest in RAM: leaving a device copies nothing, and one copy of the weights is all there is."""

import pytest
import torch
from torch import nn

from lightx2v.offload import BlockStream, Home


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 4)


ELSEWHERE = torch.device("meta")  # a device whose copies have no contents: nothing could be written back from there


def addresses(network: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in network.parameters()]


def test_what_visits_a_device_is_a_copy() -> None:
    network = Network().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    home = Home(network)
    at_home = addresses(network)
    for _ in range(2):
        home.copy_to(ELSEWHERE)
        assert all(parameter.is_meta for parameter in network.parameters())
        home.leave()
        assert addresses(network) == at_home
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    network.head.bias.add_(1)
    home.copy_to(ELSEWHERE)
    home.leave()
    assert torch.equal(network.head.bias, before["head.bias"] + 1), "changed in place while at home"


def test_a_stream_takes_over_the_same_memory() -> None:
    network = Network().requires_grad_(False)
    Home(network)
    at_home = addresses(network)
    BlockStream({"": network}, torch.device("cpu"))
    assert addresses(network) == at_home
    Home(network)
    assert addresses(network) == at_home


def test_a_device_without_room_leaves_everything_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network().requires_grad_(False)
    home = Home(network)
    at_home, calls = addresses(network), []

    def full(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        calls.append(device)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")
        return torch.empty_like(tensor, device=device)

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        home.copy_to(ELSEWHERE)
    assert addresses(network) == at_home
