"""One copy of a model's weights in main memory for all processes of a machine.

Weights that rest in RAM, or that a CPU computes with, would be there once for each process. So one process reads them,
with LoRAs on them, and lays every block and what is beside them into a piece of memory without a name, each as the slab
that offloading would make of it; the others build the same network and look at that memory. Nobody writes there
afterwards: other LoRAs are another copy, for which the weights are read again.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightx2v.checkpoint import Header
from lightx2v.lora.branch import Branch, branched, graft
from lightx2v.offload.disk import Filed
from lightx2v.offload.parts import parts_of
from lightx2v.offload.plan import Plan
from lightx2v.offload.slab import Layout, Slab, paged, rest_bytes
from lightx2v.parallel.agreement import meet, on_first, together
from lightx2v.parallel.mesh import Mesh

Networks = tuple[nn.Module, ...]
_Part = tuple[list[nn.Module], Mapping[int, Filed]]


@dataclass(frozen=True)
class _Laid:
    """One network in shared memory. branches: of LoRAs, by layer, without contents. left: weights that are in the file.
    at: its first byte."""

    layouts: tuple[Layout, ...]
    left: frozenset[str]
    branches: Mapping[str, Branch]
    at: int


@dataclass(frozen=True)
class _Published:
    """path: of the memory, as long as its owner keeps it open."""

    path: str
    nbytes: int
    networks: tuple[_Laid, ...]


def share_weights(
    mesh: Mesh, headers: Sequence[Header], read: Callable[[], Networks], build: Callable[[], Networks]
) -> Networks:
    """The networks of one model, on the CPU, over one copy of their weights.

    headers: of their files. read: called on rank 0, reads weights, all or but those that stay in the file.
    build: called on the others, gives the networks without contents. All processes must be on one machine.
    Raises on every rank what `read` raises, elsewhere as StoppedElsewhereError.
    """
    owned: list[tuple[Networks, int]] = []

    def publish() -> _Published:
        networks = read()
        owned.append((networks, os.memfd_create("lightx2v-weights")))
        return _lay(networks, headers, owned[0][1])

    try:
        published = on_first(mesh, publish)
        networks = owned[0][0] if owned else _look(build(), headers, published)
        meet(mesh)  # all have mapped it
    finally:
        for _, descriptor in owned:
            os.close(descriptor)
    return networks


def tightest(mesh: Mesh, make: Callable[[], Plan]) -> Plan:
    """Of the plans of all processes the one that leaves the least on its device: for one copy they need one plan.

    Raises on every process where it raises on one.
    """
    own: list[Plan] = []
    together(mesh, lambda: own.append(make()))
    plans: list[Plan] = [own[0]] * mesh.size
    dist.all_gather_object(plans, own[0], group=mesh.control)
    return min(plans, key=lambda plan: (plan.whole, plan.resident, -plan.filed, plan.kept))


def _lay(networks: Networks, headers: Sequence[Header], descriptor: int) -> _Published:
    left = [frozenset(name for name, weight in each.named_parameters() if weight.is_meta) for each in networks]
    each = [_parts(*three) for three in zip(networks, headers, left, strict=True)]
    sizes = [sum(paged(rest_bytes(*part)) for part in parts) for parts in each]
    os.ftruncate(descriptor, sum(sizes))
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    memory, laid, at = _map(path, sum(sizes)), [], 0
    for network, parts, names, size in zip(networks, each, left, sizes, strict=True):
        branches = {name: layer.lora.without_contents() for name, layer in branched(network)}
        laid.append(_Laid(_settle(parts, memory[at : at + size]), names, branches, at))
        at += size
    return _Published(path, sum(sizes), tuple(laid))


def _look(networks: Networks, headers: Sequence[Header], published: _Published) -> Networks:
    memory = _map(published.path, published.nbytes)
    for network, header, laid in zip(networks, headers, published.networks, strict=True):
        graft(network, laid.branches)
        if _settle(_parts(network, header, laid.left), memory[laid.at :]) != laid.layouts:
            raise RuntimeError(f"{header.path}: two processes laid it out differently; this is a bug, please report it")
    return networks


def _settle(parts: Sequence[_Part], memory: Tensor) -> tuple[Layout, ...]:
    """Let every part rest in a piece of that memory: copied there, or where it has no contents, found there."""
    layouts, at = [], 0
    for modules, elsewhere in parts:
        size = rest_bytes(modules, elsewhere)
        layouts.append(Slab(modules, elsewhere, memory[at : at + size]).layout)
        at += paged(size)
    return tuple(layouts)


def _parts(network: nn.Module, header: Header, left: Collection[str]) -> list[_Part]:
    """As offloading cuts a network into slabs."""
    blocks, beside = parts_of(network)
    elsewhere = {id(weight): Filed(header, name) for name, weight in network.named_parameters() if name in left}
    return [*((list(block.modules()), elsewhere) for block in blocks), (beside, {})]


def _map(path: str, nbytes: int) -> Tensor:
    with torch.inference_mode(False):  # it outlives the request that it is made in
        return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)
