"""A picture whose rows are shared out to ranks: what a layer reads of the neighbours' rows, and all rows put together.

Rows travel from rank to rank, uneven numbers of them, with torch.distributed's batched sends and receives.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightx2v.parallel.mesh import Line
from lightx2v.vae.layers import Reach

Parcel = tuple[int, Tensor]
"""Place on the line, and what goes there or comes from there."""


class Rows:
    """The rows of one picture size on a line of ranks, in order: the first rank has the top of the picture."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self._cells: tuple[int, ...] = ()  # rows of latents of each rank; () while every rank has all

    @property
    def shared(self) -> bool:
        """Whether every rank has but its own rows. Pictures of fewer rows of latents than there are ranks are not."""
        return bool(self._cells)

    def share_out(self, cells: int) -> None:
        """From now on pictures are `cells` rows of latents high: as even shares as there are."""
        share, more = divmod(cells, self.line.size)
        even = tuple(share + (place < more) for place in range(self.line.size))
        self._cells = even if share and self.line.size > 1 else ()

    def own(self, picture: Tensor) -> Tensor:
        """This rank's rows of a whole picture (B, C, t, H, W)."""
        if not self.shared:
            return picture
        ends = [0, *accumulate(self._cells)]
        scale = picture.shape[3] // ends[-1]
        return picture[:, :, :, ends[self.line.place] * scale : ends[self.line.place + 1] * scale]

    def extend(self, x: Tensor, reach: Reach) -> Tensor:
        """Own rows x (B, C, t, h, W) between those of the neighbours that a layer reads, in channels-last memory.

        Beyond the picture's top and bottom there are none: there a layer does what it does at any picture's edge.
        """
        above, below = self._beside(reach)
        if not self.shared:
            return x
        if x.requires_grad:
            raise ValueError("a VAE that is split over ranks has no gradients: train with the VAE itself")
        rows, place = x.movedim(1, -1), self.line.place  # (B, t, h, W, C)
        height = rows.shape[2]
        sent: list[Parcel] = []
        if place > 0 and reach.below:
            sent.append((place - 1, rows[:, :, : reach.below]))
        if place + 1 < self.line.size and reach.above:
            sent.append((place + 1, rows[:, :, height - reach.above :]))
        upper, lower = (_room(rows, 2, count) for count in (above, below))
        received = [parcel for parcel in ((place - 1, upper), (place + 1, lower)) if parcel[1].numel()]
        arrive = self._start(sent, received)
        whole = _room(rows, 2, above + height + below)
        whole[:, :, above : above + height] = rows
        arrive()
        whole[:, :, :above] = upper
        whole[:, :, above + height :] = lower
        return whole.movedim(-1, 1)

    def pad(self, x: Tensor, reach: Reach) -> Tensor:
        """The same size as `extend` gives, with zeros in place of the neighbours' rows."""
        above, below = self._beside(reach)
        rows = F.pad(x.movedim(1, -1), (0, 0, 0, 0, above, below)) if above or below else x.movedim(1, -1)
        return rows.movedim(-1, 1)

    def trim(self, y: Tensor, reach: Reach) -> Tensor:
        """What a layer made of own rows, of all that it made of extended ones."""
        above, below = (int(count * reach.scale) for count in self._beside(reach))
        return y[:, :, :, above : y.shape[3] - below] if above or below else y

    def joined(self, x: Tensor, dim: int) -> Tensor:
        """What all ranks have along `dim`, in order of rank, on each of them."""
        if not self.shared:
            return x
        others = [place for place in range(self.line.size) if place != self.line.place]
        rooms = {place: self._room_of(place, x, dim) for place in others}
        self._start([(place, x) for place in others], list(rooms.items()))()
        rooms[self.line.place] = x
        return torch.cat([rooms[place] for place in range(self.line.size)], dim)

    def joined_on_first(self, x: Tensor, dim: int) -> Tensor | None:
        """The same on the first rank alone; None on the others."""
        if not self.shared:
            return x if self.line.place == 0 else None
        if self.line.place:
            self._start([(0, x)], [])()
            return None
        rooms = {place: self._room_of(place, x, dim) for place in range(1, self.line.size)}
        self._start([], list(rooms.items()))()
        return torch.cat([x, *rooms.values()], dim)

    def _beside(self, reach: Reach) -> tuple[int, int]:
        """How many rows above and below its own this rank gets."""
        first, last = self.line.place == 0, self.line.place + 1 == self.line.size
        return (0, 0) if not self.shared else (0 if first else reach.above, 0 if last else reach.below)

    def _room_of(self, place: int, own: Tensor, dim: int) -> Tensor:
        """For what that rank has along `dim` where this one has `own`."""
        return _room(own, dim, own.shape[dim] // self._cells[self.line.place] * self._cells[place])

    def _start(self, sent: Sequence[Parcel], received: Sequence[Parcel]) -> Callable[[], None]:
        """Let parcels travel; what it returns waits for them, and keeps what is sent alive until then."""
        ranks, group = self.line.ranks, self.line.group
        ops = [dist.P2POp(dist.isend, what.contiguous(), ranks[place], group) for place, what in sent]
        ops += [dist.P2POp(dist.irecv, room, ranks[place], group) for place, room in received]
        works: list[dist.Work] = dist.batch_isend_irecv(ops) if ops else []

        def arrive() -> None:
            for work in works:
                work.wait()
            ops.clear()

        return arrive


def _room(like: Tensor, dim: int, size: int) -> Tensor:
    shape = list(like.shape)
    shape[dim] = size
    return like.new_empty(shape)
