"""Attention over tokens that lie on several processes, which pass their keys and values on in a ring.

Liu et al. 2023, arXiv:2310.01889: every process keeps its queries, and attends to one process's keys after the other,
while the next are on their way. What each part gives is merged by the logarithm of its softmax's denominator, as in
FlashAttention (arXiv:2205.14135, section 3.1), in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from lightx2v.parallel.mesh import Mesh
from lightx2v.parallel.wire import Wire
from lightx2v_kernels import UnsupportedBackendError, registry
from lightx2v_kernels.backend import Backend

# q (B, L, H, D), k and v (B, S, H, D) -> (B, L, H, D), and log sum exp of each query's scores (B, H, L) float32
Partial = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def mergeable(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The attention backend for a ring, of those that give the logarithm; "auto" and "exact" take the best of them.

    Raises UnsupportedBackendError for one that does not, with those that do.
    """
    every = registry.registry("attention")
    able = replace(every, backends=tuple(backend for backend in every.backends if backend.partial))
    if name in every.names() and name not in able.names():
        raise UnsupportedBackendError(
            f"attention backend '{name}' cannot be merged in a ring: it does not tell its softmax's denominator; use "
            f"{', '.join(able.choices())}, or ulysses, which runs any"
        )
    return able.select(name, device, dtype, head_dim)


def ring(partial: Partial, mesh: Mesh, wire: Wire) -> Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]:
    """Attention of q (B, L, H, D) to the k and v of every place of the ring. sizes: the tokens at each place."""
    line = mesh.ring

    def attend(q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[int]) -> Tensor:
        held = wire.empty(k, (sizes[line.place], k.shape[0], 2, k.shape[2]))
        wire.write(held[:, :, 0].transpose(0, 1), k)
        wire.write(held[:, :, 1].transpose(0, 1), v)
        out, total = torch.empty(0), torch.empty(0)
        for step in range(line.size):
            place = (line.place - step) % line.size
            coming, arriving = held, []
            if step + 1 < line.size:
                coming = held.new_empty(sizes[place - 1], *held.shape[1:])
                arriving = _pass_on(held, coming, mesh)
            if step:
                k, v = (x.transpose(0, 1) for x in wire.read(held, q.dtype).unbind(2))
            part, lse = partial(q, k, v)
            out, total = merged(out, total, part, lse) if step else (part.float(), lse)
            for work in arriving:
                work.wait()
            held = coming
        return out.to(q.dtype)

    return attend


def _pass_on(held: Tensor, coming: Tensor, mesh: Mesh) -> "list[dist.Work]":
    line = mesh.ring
    sends = dist.P2POp(dist.isend, held, line.neighbour(1), line.group)
    receives = dist.P2POp(dist.irecv, coming, line.neighbour(-1), line.group)
    return dist.batch_isend_irecv([sends, receives])


def merged(out: Tensor, total: Tensor, part: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys from that to each: out (B, L, H, D) float32 and total (B, H, L) of the first."""
    both = torch.logaddexp(total, lse)
    old, new = ((x - both).exp().transpose(1, 2)[..., None] for x in (total, lse))
    return out * old + part * new, both
