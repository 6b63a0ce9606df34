"""VAEs whose frames are split over ranks: each rank has some rows of every picture, and the result is that of one rank.

The networks are the same. A layer that reads rows beside its own is given its neighbours' and what it makes of them is
cut off again; attention is given the keys and values of all ranks. So sizes need not divide, nothing overlaps, and what
layers remember of earlier frames stays where it is.
"""

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightx2v.latents import LatentFormat
from lightx2v.parallel.mesh import Line
from lightx2v.parallel.rows import Rows
from lightx2v.vae import stream
from lightx2v.vae.layers import CausalConv3d, Encoder, Everywhere, Reach, State
from lightx2v.vae.loading import VAE
from lightx2v.vae.tae import TinyVAE

Network = TypeVar("Network", bound=nn.Module)


class SplitVAE:
    """A VAE on all ranks of a line, which call it together with the same whole pictures or latents.

    Takes a VAE's place in lightx2v.vae.stream.encode and lightx2v.vae.padded.encode_padded, which return whole latents
    on every rank; `decode` below takes that of lightx2v.vae.stream.decode. Weights are shared with the VAE. Tiny
    autoencoders, and pictures of fewer rows of latents than there are ranks, are not split: the first rank decodes
    them, and each rank encodes.
    """

    def __init__(self, vae: VAE, line: Line) -> None:
        self.first = line.place == 0  # whether this rank gets the frames
        self.network: Any = vae
        self._rows = Rows(Line((line.ranks[line.place],), 0))
        if not isinstance(vae, TinyVAE):
            self.network, self._rows = _sharing_weights(vae), Rows(line)
            _connect(self.network, self._rows)

    @property
    def space(self) -> LatentFormat:
        space: LatentFormat = self.network.space
        return space

    @property
    def first_chunk(self) -> int:
        first: int = self.network.first_chunk
        return first

    def at_once(self, height: int, width: int) -> int:
        frames: int = self.network.at_once(height, width)
        return frames

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(self.network.parameters())

    def to_latents(self, frames: Tensor, state: State | None = None) -> Tensor:
        """Whole raw latents of whole frames, as the VAE's own."""
        self._share_out(frames)
        return self._rows.joined(self.network.to_latents(self._rows.own(frames), state), 3)

    def reconstruct(self, raw: Tensor, state: State | None = None) -> Tensor:
        """Whole frames of whole raw latents on the first rank, as the VAE's own; (B, 3, 0, ...) on the others."""
        self._rows.share_out(raw.shape[3])
        if not self.first and not self._rows.shared:
            return raw.new_empty(raw.shape[0], 3, 0, 0, 0)
        frames: Tensor = self.network.reconstruct(self._rows.own(raw), state)
        whole = self._rows.joined_on_first(frames, 3)
        return frames[:, :, :0] if whole is None else whole

    def most_rows(self, cells: int) -> int:
        """Rows of latents that a rank works on at most, of a picture of `cells`, with what it reads of others."""
        self._rows.share_out(cells)
        return min(cells, -(-cells // self._rows.line.size) + 2) if self._rows.shared else cells

    # What lightx2v.vae.padded runs of Wan's VAEs stage by stage, on own rows between `prepare` and `moments`.

    @property
    def encoder(self) -> Encoder:
        encoder: Encoder = self.network.encoder
        return encoder

    @property
    def conv2(self) -> CausalConv3d:
        conv: CausalConv3d = self.network.conv2
        return conv

    def prepare(self, frames: Tensor) -> Tensor:
        """What the encoder's first stage reads of whole frames, own rows of it."""
        self._share_out(frames)
        prepared: Tensor = self.network.prepare(self._rows.own(frames))
        return prepared

    def moments(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Whole mean and log-variance of own rows of what the encoder's last stage gives."""
        mean, log_variance = self.network.moments(hidden)
        return self._rows.joined(mean, 3), self._rows.joined(log_variance, 3)

    def _share_out(self, frames: Tensor) -> None:
        self._rows.share_out(frames.shape[3] // self.space.stride[1])


def decode(
    vae: SplitVAE,
    raw: Tensor,
    *,
    chunk: int | None = None,
    on_chunk: stream.OnChunk | None = None,
    out: Tensor | None = None,
    clamp: bool = True,
) -> Tensor | None:
    """lightx2v.vae.stream.decode on all ranks together: its frames on the first, chunk by chunk; None on the others.

    on_chunk and `chunk` must be alike on all ranks; `out` counts on the first, which alone looks at the frames: what
    `stream.decode` raises of them is raised there.
    """
    if vae.first:
        return stream.decode(vae, raw, chunk=chunk, on_chunk=on_chunk, out=out, clamp=clamp)
    state: State = {}
    chunk = vae.at_once(*raw.shape[3:]) if chunk is None else chunk
    device, total = next(vae.parameters()).device, raw.shape[2]
    with torch.inference_mode():
        for start in range(0, total, chunk):
            stop = min(start + chunk, total)
            vae.reconstruct(raw[:, :, start:stop].to(device), state)
            if on_chunk is not None:
                on_chunk(stop, total)
    return None


def _sharing_weights(vae: Network) -> Network:
    """The same network in modules of its own, whose hooks and states are not the VAE's."""
    return copy.deepcopy(vae, {id(tensor): tensor for tensor in (*vae.parameters(), *vae.buffers())})


def _connect(network: nn.Module, rows: Rows) -> None:
    """Let each layer that states a reach, and attention, ask for what other ranks have.

    Raises TypeError for a convolution that reads other rows without anything around it having said so.
    """
    known: set[nn.Module] = set()
    for layer in network.modules():
        reach = getattr(layer, "reach", None)
        if isinstance(layer, Everywhere):
            layer.register_forward_hook(lambda _, args, positions: rows.joined(positions, -2))
        elif isinstance(reach, Reach):
            known.update(layer.modules())
            if reach.above or reach.below:
                _extend(layer, reach, rows)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d) and layer.kernel_size[-2] > 1 and layer not in known:
            raise TypeError(f"{name} reads {layer.kernel_size[-2]} rows and no layer around it states its reach")


def _extend(layer: nn.Module, reach: Reach, rows: Rows) -> None:
    def before(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, *rest = args
        if (residual := named.get("residual")) is not None:
            named = {**named, "residual": rows.pad(residual, reach)}
        return (rows.extend(x, reach), *rest), named

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(lambda _, args, y: rows.trim(y, reach))
