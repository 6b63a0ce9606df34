"""Transformers whose blocks pass through the device while it computes.

Every weight rests in host memory, a block's in one piece (`Slab`), and is never written back. Some blocks have device
memory of their own while their network has its turn; the others take turns in a few pieces that they share, each
copied while the ones before it compute. The next pass's first blocks are copied while this one's last compute.

A block sees its copy because its modules' dictionaries of parameters and buffers are given views of that memory for the
call, and the host's views after it. The alternative, one skeleton block a piece that computes in place of the real one,
would need blocks of one structure (LoRA branches and packed layers differ), a way past whatever wraps a block, and a
second copy of what a block holds beside tensors. Changing some dictionary entries costs microseconds a block.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.blocks import Block, RunBlocks, Unadded
from lightx2v.checkpoint import Header
from lightx2v.offload.disk import Reader, filed, largest
from lightx2v.offload.lane import Buffer, Lane, pin
from lightx2v.offload.parts import parts_of, spread
from lightx2v.offload.slab import Slab, Views


@dataclass(frozen=True)
class _Host:
    """One network's weights at rest."""

    network: nn.Module
    rest: Slab  # what is no block's
    blocks: tuple[Slab, ...]

    @staticmethod
    def of(network: nn.Module, header: Header | None = None) -> "_Host":
        (blocks, beside), elsewhere = parts_of(network), filed(network, header)
        slabs = tuple(Slab(block.modules(), elsewhere) for block in blocks)
        return _Host(network, Slab(beside), slabs)

    @property
    def slabs(self) -> tuple[Slab, ...]:
        return (*self.blocks, self.rest)

    @property
    def nbytes(self) -> int:
        return sum(slab.kept for slab in self.slabs)


@dataclass(frozen=True)
class _Slot:
    """Shared device memory, and how each block's tensors lie in it."""

    buffer: Buffer
    views: Mapping[tuple[str, int], Views]


@dataclass(frozen=True)
class _Fetched:
    expert: str
    block: int
    slot: _Slot
    visits: int = 0  # how many passes have computed with it


class _Visit:
    """A context that two hooks of a block enter and leave."""

    def __init__(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._context = context
        self._open = ExitStack()

    def begin(self, *_: Any) -> None:
        self._open.enter_context(self._context())

    def end(self, *_: Any) -> None:
        self._open.close()


class BlockStream:
    """One network, or the experts of one model that share the device memory.

    networks: by the name of the expert ("" where there is one), weights read, each with its `blocks`. Constructing
        moves all their weights to host memory; to change them, do so while closed, and construct a new one where
        tensors were replaced.
    pin_limit: bytes to pin at most; None: everything.
    lane: where copies run; None: as the device has it.
    headers: by the same names, of the files in which weights were left (`disk.py`).
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        device: torch.device,
        *,
        pin_limit: int | None = None,
        lane: Lane | None = None,
        headers: Mapping[str, Header] | None = None,
    ) -> None:
        self.device = device
        self._lane = Lane(device) if lane is None else lane
        self._hosts = {name: _Host.of(network, (headers or {}).get(name)) for name, network in networks.items()}
        slabs = [slab for host in self._hosts.values() for slab in host.slabs]
        self._reader = Reader(device, most, pin_limit) if (most := largest(slabs)) else None
        if pin_limit is not None and self._reader is not None:
            pin_limit = max(0, pin_limit - self._reader.nbytes)
        self._pins = pin((slab.host for slab in slabs), device, pin_limit)
        self._moving: dict[str, tuple[int, ...]] = {}
        self._rest: Buffer | None = None
        self._own: list[Buffer] = []
        self._idle: deque[_Slot] = deque()
        self._coming: deque[_Fetched] = deque()
        self._here: str | None = None  # whose turn it is
        self._walks = 0  # that are under way: passes that walk together visit each block before it goes

    @property
    def pinned_bytes(self) -> int:
        return self._pins.nbytes

    def release(self) -> None:
        """Pin nothing any longer: the weights stay, and may be given to another stream."""
        self._pins.release()
        if self._reader is not None:
            self._reader.release()

    @property
    def host_bytes(self) -> int:
        """Of all weights at rest in RAM, and of what passes through it."""
        staging = self._reader.nbytes if self._reader is not None else 0
        return sum(host.nbytes for host in self._hosts.values()) + staging

    @property
    def device_bytes(self) -> int:
        """Of the device memory that is held now; 0 while closed."""
        fetched = [each.slot for each in self._coming]
        buffers = [*self._own, *(slot.buffer for slot in (*self._idle, *fetched))]
        return sum(buffer.memory.numel() for buffer in buffers + ([self._rest] if self._rest else []))

    @contextmanager
    def open(self, resident: int, prefetch: int = 1) -> Iterator[None]:
        """Device memory is held within; after it, and whatever happened, every weight is the host's.

        resident: blocks of the network whose turn it is that stay on the device. prefetch: blocks that are copied ahead
        of the one that computes; 0 copies each when it is needed.
        Raises ValueError for a number below 0, RuntimeError while it is open already.
        """
        if resident < 0 or prefetch < 0:
            raise ValueError(f"resident={resident} and prefetch={prefetch} must be 0 or more blocks")
        if self._rest is not None:
            raise RuntimeError("these weights are streamed already; leave that first")
        try:
            self._allocate(resident, prefetch)
            yield
        finally:
            self._close()

    def _allocate(self, resident: int, prefetch: int) -> None:
        hosts = self._hosts.values()
        self._rest = self._lane.buffer(max(host.rest.nbytes for host in hosts))
        stays: dict[str, list[Slab]] = {}
        moves: list[int] = []
        for name, host in self._hosts.items():
            count = len(host.blocks)
            self._moving[name] = spread(count, max(0, count - resident))
            stays[name] = [slab for index, slab in enumerate(host.blocks) if index not in self._moving[name]]
            moves += [host.blocks[index].nbytes for index in self._moving[name]]
        for position in range(max(map(len, stays.values()))):
            sizes = [slabs[position].nbytes for slabs in stays.values() if position < len(slabs)]
            self._own.append(self._lane.buffer(max(sizes)))
        for _ in range(min(prefetch + 1, max(map(len, self._moving.values())))):
            self._idle.append(self._slot(max(moves)))

    def _slot(self, nbytes: int) -> _Slot:
        buffer = self._lane.buffer(nbytes)
        views = {
            (name, index): host.blocks[index].views(buffer.memory)
            for name, host in self._hosts.items()
            for index in self._moving[name]
        }
        return _Slot(buffer, views)

    def _close(self) -> None:
        self._leave()
        try:
            if self._reader is not None:
                self._reader.drain()
            self._lane.drain()
        finally:  # a device that is lost drains nothing
            self._rest = None
            self._own, self._moving = [], {}
            self._idle.clear()
            self._coming.clear()

    def bring(self, expert: str = "") -> nn.Module:
        """The network, with all that is no block's, and the blocks that stay, on the device or on their way there."""
        if self._rest is None:
            raise RuntimeError("these weights are at rest; open the stream before the network is used")
        if self._here != expert:
            self._leave()
            self._enter(self._rest, expert)
        return self._hosts[expert].network

    def _enter(self, memory: Buffer, expert: str) -> None:
        self._here, host = expert, self._hosts[expert]
        own = iter(self._own)
        for slab, buffer in [
            (host.rest, memory),
            *((host.blocks[index], next(own)) for index in self._staying(expert)),
        ]:
            buffer.release()  # the other network's turn ends here
            self._fill(buffer, slab)
            slab.point(slab.views(buffer.memory))
        memory.use()

    def _fill(self, buffer: Buffer, slab: Slab) -> None:
        if slab.kept:
            buffer.fill(slab.host)
        if slab.kept < slab.nbytes:
            assert self._reader is not None
            self._reader.start(buffer, slab)

    def _staying(self, expert: str) -> list[int]:
        return [index for index in range(len(self._hosts[expert].blocks)) if index not in self._moving[expert]]

    def _leave(self) -> None:
        if self._here is not None:
            for slab in self._hosts[self._here].slabs:
                slab.point_home()
        self._here = None

    def around(self, run: RunBlocks, following: str | None) -> RunBlocks:
        """A walk over the blocks of the network whose turn it is, each on the device for its call.

        Goes around everything else that walks: caches and cancelling see blocks as before, and a pass that runs none
        of them copies nothing. Of a walk that begins within another one, both visit each block before the next takes
        its place. following: the expert of the next pass, whose first blocks are fetched during this one's last; None:
        there is none, or nobody knows.
        """

        def walk(blocks: Sequence[Block], tokens: Tensor, args: Any) -> Tensor:
            expert = self._here
            if expert is None or len(blocks) != len(self._hosts[expert].blocks):
                raise RuntimeError(f"{len(blocks)} blocks are walked whose network was not brought to the device")
            own = dict(zip(self._staying(expert), self._own, strict=False))
            staged = [
                self._staying_block(block, own[index])
                if index in own
                else self._moving_block(block, expert, index, following)
                for index, block in enumerate(blocks)
            ]
            self._walks += 1
            try:
                return run(staged, tokens, args)
            finally:
                self._walks -= 1

        return walk

    @contextmanager
    def hooked(self, expert: str = "") -> Iterator[None]:
        """The same for a network that calls its blocks itself, while the stream is open."""
        network, own = self.bring(expert), dict(zip(self._staying(expert), self._own, strict=False))
        with ExitStack() as hooks:
            for index, block in enumerate(parts_of(network)[0]):
                visit = _Visit(partial(self._visiting, expert, index, None)) if index not in own else None
                before = (lambda *_, buffer=own[index]: buffer.use()) if visit is None else visit.begin
                hooks.callback(block.register_forward_pre_hook(before).remove)
                if visit is not None:
                    hooks.callback(block.register_forward_hook(visit.end, always_call=True).remove)
            yield

    def _staying_block(self, block: Block, buffer: Buffer) -> Block:
        def call(tokens: Tensor | Unadded, args: Any) -> Tensor | Unadded:
            buffer.use()
            return block(tokens, args)

        return call

    def _moving_block(self, block: Block, expert: str, index: int, following: str | None) -> Block:
        def call(tokens: Tensor | Unadded, args: Any) -> Tensor | Unadded:
            with self._visiting(expert, index, following):
                return block(tokens, args)

        return call

    @contextmanager
    def _visiting(self, expert: str, index: int, following: str | None) -> Iterator[None]:
        if not self._coming or (self._coming[0].expert, self._coming[0].block) != (expert, index):
            # the first pass of all, one after an exception, or one that nobody foresaw
            for fetched in self._coming:
                if fetched.visits:
                    fetched.slot.buffer.release()
                self._idle.append(fetched.slot)
            self._coming.clear()
            self._fetch(expert, index)
        fetched = self._coming.popleft()
        fetched = replace(fetched, visits=fetched.visits + 1)
        self._fetch_ahead(fetched, following)
        slot, slab = fetched.slot, self._hosts[expert].blocks[index]
        slot.buffer.use()
        slab.point(slot.views[expert, index])
        awaited = False
        try:
            yield
            awaited = fetched.visits < self._walks
        finally:
            slab.point_home()
            if awaited:
                self._coming.appendleft(fetched)
            else:
                slot.buffer.release()
                self._idle.append(slot)
        self._fetch_ahead(fetched, following)

    def _fetch(self, expert: str, index: int) -> None:
        slot = self._idle.popleft()
        self._fill(slot.buffer, self._hosts[expert].blocks[index])
        self._coming.append(_Fetched(expert, index, slot))

    def _fetch_ahead(self, last: _Fetched, following: str | None) -> None:
        """Fill every idle slot with what comes after `last` and after all that was fetched since."""
        while self._idle:
            last = self._coming[-1] if self._coming else last
            order = self._moving[last.expert]
            position = order.index(last.block) + 1
            if position < len(order):
                coming = last.expert, order[position]
            elif following is not None and self._moving.get(following):
                coming = following, self._moving[following][0]
            else:
                return
            if any(coming == (fetched.expert, fetched.block) for fetched in self._coming):
                return  # a whole pass is on its way; nobody knows of the one after it
            self._fetch(*coming)
