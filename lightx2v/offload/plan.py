"""What stays on the device and what passes through it, from bytes alone: pure functions, to be tested without a GPU."""

from dataclasses import dataclass, replace

from torch import nn

from lightx2v.offload.parts import filed_blocks, parts_of, spread
from lightx2v.offload.slab import ALIGNMENT

GB = 1e9
# Beside what PyTorch counts: workspaces of matrix kernels, and what an allocator of 2 MB pieces cannot fill.
RESERVE = 600_000_000
# Of RAM, beside the weights at rest: what other programs come to need, the VAE, finished frames.
RAM_RESERVE = 2_000_000_000
PIECES = 2  # of RAM, through which weights pass that are read from their file
LESS = 0.5  # of the tokens: what is advised where nothing tells how far memory was from enough


class DoesNotFitError(ValueError):
    """Not even one block at a time has room. share: of the tokens that would have."""

    def __init__(self, message: str, share: float = 0.0) -> None:
        super().__init__(message)
        self.share = share


@dataclass(frozen=True)
class Sizes:
    """Bytes of one transformer. rest: of what is no block's."""

    blocks: tuple[int, ...]
    rest: int

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.rest


def measure(network: nn.Module) -> Sizes:
    """Of a network as it is now; it may be on the meta device, before its weights are read."""
    blocks, beside = parts_of(network)
    return Sizes(tuple(_bytes(list(block.modules())) for block in blocks), _bytes(beside))


def _bytes(modules: list[nn.Module]) -> int:
    """As a slab lays them out."""
    tensors = {
        id(tensor): -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        for module in modules
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    }
    return sum(tensors.values())


@dataclass(frozen=True)
class Needs:
    """What one request has to have room for, in bytes.

    transformers: one, or the high- and the low-noise expert. activations: of one pass, with what caches keep.
    text_encoder, image_encoder: with what they compute with, as a whole and block by block. vae: weights. None and 0
    where there is none, or where nothing is known. kept: of prompt and images, from step to step; can be computed anew.
    waiting: of one pass of guidance while the other one computes a block; 0 where there are no two to walk together.
    """

    transformers: tuple[Sizes, ...]
    activations: int
    text_encoder: tuple[int, int] | None = None
    image_encoder: tuple[int, int] | None = None
    vae: int = 0
    kept: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class Machine:
    """What the device and the host have, in bytes.

    free_vram: on the device, counting what this plan may move away. pin_limit: of host memory, at most.
    link: bytes a second from host to device; None: not measured.
    """

    free_vram: int
    free_ram: int
    pin_limit: int
    link: float | None = None


@dataclass(frozen=True)
class Plan:
    """Where everything is while a request runs.

    resident, streamed: blocks of the larger transformer that stay on the device and that pass through it.
    prefetch: blocks that are copied ahead. together: both experts are on the device at once; else by turns.
    text_encoder, image_encoder: "visits" the device for its turn, "streams" through it block by block, or computes on
    the "cpu"; "" where there is none. vae: "stays" on the device, or "visits" it. tile: side of the tiles in which it
    decodes, pixels; 0: whole frames.
    weights: bytes of the transformers on the device. peak: bytes on the device at most, `RESERVE` included; budget:
    those that it had to keep within.
    paired: whether both passes of guidance compute with one copy of each block. passing: bytes that are copied in each
    pass, or then in each step. seconds: that this takes; None where the link was not measured.
    filed: blocks of the larger transformer that stay in their file, because RAM is too small. reading: bytes of them.
    kept: bytes for what steps compute alike of prompt and images; 0: each computes it anew.
    """

    resident: int
    streamed: int
    prefetch: int
    together: bool
    text_encoder: str
    image_encoder: str
    vae: str
    peak: int
    budget: int
    passing: int
    pinned: int
    ram: int
    free_ram: int
    seconds: float | None = None
    filed: int = 0
    reading: int = 0
    weights: int = 0
    tile: int = 0
    kept: int = 0
    paired: bool = False

    @property
    def beside_weights(self) -> int:
        """Bytes of the budget that are left for other stages."""
        return self.budget - RESERVE - (0 if self.ram else self.weights)

    def suits(self, filed: int) -> bool:
        """Whether networks serve that have so many blocks in their file: about as many, so that RAM which comes and
        goes does not let everything be read again."""
        if filed == self.filed or not (filed and self.filed and self.ram):
            return filed == self.filed
        missing = (self.filed - filed) * self.reading / self.filed
        return self.filed >= filed / 2 and missing <= RAM_RESERVE / 2

    @property
    def whole(self) -> bool:
        """Whether the transformers stay on the device: nothing rests in RAM, nothing is copied."""
        return not self.ram

    def line(self) -> str:
        """What a user wants to know, in one line."""
        count = self.resident + self.streamed
        if self.streamed:
            said = f"{self.resident} of {count} blocks stay on the GPU, {self.streamed} pass through it"
            said += ", once for both passes of guidance" if self.paired else ""
            said += f" ({self.passing / GB:.2f} GB a {'step' if self.paired else 'pass'}"
            said += f", {self.seconds:.2f} s of copying)" if self.seconds is not None else ")"
        else:
            said = f"all {count} blocks on the GPU"
            said += ", both experts" if self.together else ""
        words = [said, f"{self.peak / GB:.1f} of {self.budget / GB:.1f} GB"]
        for name, place in (("text encoder", self.text_encoder), ("image encoder", self.image_encoder)):
            words += [f"{name} on the CPU"] if place == "cpu" else []
            words += [f"{name} block by block"] if place == "streams" else []
        words += [f"{self.kept / GB:.2f} GB kept of prompt and images"] if self.kept else []
        words += ["VAE in RAM meanwhile"] if self.vae == "visits" else []
        words += [f"it decodes in tiles of {self.tile} pixels"] if self.tile else []
        words += [f"{self.ram / GB:.1f} GB in RAM, {self.pinned / GB:.1f} of it pinned"] if self.ram else []
        if self.filed:
            words.append(f"{self.filed} blocks are read from the file as they are needed ({self.reading / GB:.1f} GB)")
        if self.ram > self.free_ram:
            words.append(f"only {self.free_ram / GB:.1f} GB of RAM are free: the system may swap to disk")
        return "memory: " + "; ".join(words)


def plan(
    needs: Needs, machine: Machine, *, budget_gb: float = 0, least: bool = False, vae_offload: bool = False
) -> Plan:
    """The plan that keeps most on the device within its free memory, or within `budget_gb` of it (0: no other limit).

    least: take as little as possible instead, one block at a time and the next. vae_offload: the VAE makes way even
    where it need not.
    What is kept from step to step has the room that all else leaves: no block passes for it, nor is it the least.
    Both passes of guidance share each copy where a step then copies less, even if fewer blocks have room to stay, and
    reads no more from files; with `least`, only where blocks are read from files. How long a pass computes is not
    asked: copies that are hidden behind it stay hidden when there are fewer of them.
    One block is copied ahead, where there is room for two: a copy has the time of all blocks that stay between two
    that move to hide behind, and a third piece of memory hides nothing more; it serves better as a block that stays.
    Raises DoesNotFitError, with the least that is needed, and ValueError for a budget below 0.
    """
    if budget_gb < 0:
        raise ValueError(f"vram_budget_gb={budget_gb:g} must be 0 (all that is free) or more")
    budget = min(machine.free_vram, int(budget_gb * GB)) if budget_gb else machine.free_vram
    transformers = needs.transformers
    laid = _laid_out(needs, machine, budget, least)
    beside, weights, resident = laid.beside, laid.weights, laid.resident
    stays = needs.vae if not vae_offload and weights + needs.vae + beside <= budget else 0
    kept = 0 if least or weights + stays + needs.kept + beside > budget else needs.kept
    passing = _passing(transformers, resident)
    alone = laid.together or (len(transformers) == 1 and not passing)
    ram = 0 if alone else sum(sizes.total for sizes in transformers)
    filed = _filed(transformers, machine.free_ram - RAM_RESERVE, resident) if ram else 0
    away = _in_file(transformers, filed, resident)
    reading = sum(map(sum, away))
    ram += (PIECES * max(map(max, away)) if filed else 0) - reading
    return Plan(
        resident=resident,
        streamed=max(len(sizes.blocks) for sizes in transformers) - resident,
        prefetch=laid.prefetch,
        together=laid.together,
        text_encoder=_visitor(needs.text_encoder, budget),
        image_encoder=_visitor(needs.image_encoder, budget),
        vae="stays" if stays or (not needs.vae and not vae_offload) else "visits",
        peak=weights + stays + kept + beside,
        budget=budget,
        passing=passing,
        pinned=min(ram, machine.pin_limit),
        ram=ram,
        free_ram=machine.free_ram,
        seconds=passing / machine.link if machine.link else None,
        filed=filed,
        reading=reading,
        weights=weights,
        kept=kept,
        paired=laid.paired,
    )


@dataclass(frozen=True)
class _Laid:
    """What of the transformers is on the device, and `beside` it, in bytes; the rest as in `Plan`."""

    resident: int
    prefetch: int
    weights: int
    beside: int
    together: bool = False
    paired: bool = False


def _laid_out(needs: Needs, machine: Machine, budget: int, least: bool) -> _Laid:
    """The most that fits the budget; raises DoesNotFitError."""
    transformers, beside = needs.transformers, needs.activations + RESERVE
    sums, count = [sizes.total for sizes in transformers], max(len(sizes.blocks) for sizes in transformers)
    if len(transformers) > 1 and not least and sum(sums) + beside <= budget:
        return _Laid(count, 0, sum(sums), beside, together=True)
    if not least and max(sums) + beside <= budget:
        return _Laid(count, 0, max(sums), beside)
    alone = _Laid(*_streaming(transformers, budget - beside, least), beside)
    if alone.weights + beside > budget:
        share = (budget - alone.weights - RESERVE) / max(needs.activations, 1)
        raise DoesNotFitError(_too_small(alone.weights, needs.activations, budget), min(share, 1))
    if not needs.waiting:
        return alone
    beside += needs.waiting
    paired = _Laid(*_streaming(transformers, budget - beside, least), beside, paired=True)
    fits = paired.weights + beside <= budget and paired.prefetch >= alone.prefetch
    return paired if fits and _spares(transformers, machine, alone, paired, least) else alone


def _spares(transformers: tuple[Sizes, ...], machine: Machine, alone: _Laid, paired: _Laid, least: bool) -> bool:
    """Whether a step of two passes moves less with one copy of each block for both."""
    room = machine.free_ram - RAM_RESERVE
    once, twice = (_reading(transformers, room, each.resident) for each in (paired, alone))
    copies = _passing(transformers, paired.resident) < 2 * _passing(transformers, alone.resident)
    return copies and once <= 2 * twice and (twice > 0 or not least)


def tighter(needs: Needs, machine: Machine, failed: Plan) -> Plan:
    """The plan for a second try where memory ran out with `failed`: the VAE makes way, nothing is kept from step to
    step, neither pass of guidance waits for the other, and half of what blocks took is given back, 1 GB at least.

    Raises DoesNotFitError where `failed` had no more than one block at a time there.
    """
    needs = replace(needs, kept=0, waiting=0)
    free = min(machine.free_vram, failed.peak - max(failed.weights // 2, int(GB)))
    try:
        return plan(needs, replace(machine, free_vram=free), vae_offload=True)
    except DoesNotFitError:
        pass
    try:
        return plan(
            needs, replace(machine, free_vram=min(machine.free_vram, failed.peak - 1)), least=True, vae_offload=True
        )
    except DoesNotFitError:
        if machine.free_vram < failed.peak:
            raise  # others have taken what was free: the numbers are right
    raise DoesNotFitError(
        f"GPU memory ran out with one block at a time on the GPU and {failed.peak / GB:.1f} GB planned", LESS
    )


def _streaming(transformers: tuple[Sizes, ...], room: int, least: bool) -> tuple[int, int, int]:
    """(blocks that stay, blocks copied ahead, bytes on the device), of what fits or is nearest to it."""
    count = max(len(sizes.blocks) for sizes in transformers)
    if least:
        weights = {prefetch: streamed_bytes(transformers, 0, prefetch) for prefetch in (1, 0)}
        prefetch = 1 if weights[1] <= room else 0
        return 0, prefetch, weights[prefetch]
    for resident in range(count - 1, -1, -1):
        if (weights_now := streamed_bytes(transformers, resident, 1)) <= room:
            return resident, 1, weights_now
    return 0, 0, streamed_bytes(transformers, 0, 0)


def streamed_bytes(transformers: tuple[Sizes, ...], resident: int, prefetch: int) -> int:
    """Device memory that `BlockStream.open` takes."""
    stays: list[list[int]] = []
    moves: list[int] = []
    most = 0
    for sizes in transformers:
        moving = spread(len(sizes.blocks), max(0, len(sizes.blocks) - resident))
        stays.append([size for index, size in enumerate(sizes.blocks) if index not in moving])
        moves += [sizes.blocks[index] for index in moving]
        most = max(most, len(moving))
    own = sum(max(each[i] for each in stays if i < len(each)) for i in range(max(map(len, stays))))
    shared = min(prefetch + 1, most) * max(moves, default=0)
    return max(sizes.rest for sizes in transformers) + own + shared


def _filed(transformers: tuple[Sizes, ...], room: int, resident: int) -> int:
    """Blocks that stay in their file: the fewest with which the others go into so much RAM, or all."""
    count = max(len(sizes.blocks) for sizes in transformers)
    total = sum(sizes.total for sizes in transformers)
    for filed in range(count + 1):
        away = _in_file(transformers, filed, resident)
        if total - sum(map(sum, away)) + (PIECES * max(map(max, away)) if filed else 0) <= room:
            return filed
    return count


def _in_file(transformers: tuple[Sizes, ...], filed: int, resident: int) -> list[list[int]]:
    """Bytes of each block that stays in its file, of each transformer."""
    counts = [len(sizes.blocks) for sizes in transformers]
    chosen = [filed_blocks(count, min(filed, count), resident) for count in counts]
    return [[sizes.blocks[i] for i in each] or [0] for sizes, each in zip(transformers, chosen, strict=True)]


def _reading(transformers: tuple[Sizes, ...], room: int, resident: int) -> int:
    """Bytes that a pass reads from files, where so much RAM has room for weights: of blocks that pass through."""
    filed = _filed(transformers, room, resident)
    found = []
    for sizes in transformers:
        count = len(sizes.blocks)
        moving = spread(count, max(0, count - resident))
        left = filed_blocks(count, min(filed, count), resident)
        found.append(sum(sizes.blocks[index] for index in left if index in moving))
    return max(found)


def _passing(transformers: tuple[Sizes, ...], resident: int) -> int:
    moving = (spread(len(sizes.blocks), max(0, len(sizes.blocks) - resident)) for sizes in transformers)
    pairs = zip(transformers, moving, strict=True)
    return max(sum(sizes.blocks[index] for index in indices) for sizes, indices in pairs)


def has_room(nbytes: int, free: int, budget_gb: float = 0) -> bool:
    """Whether so much, with `RESERVE`, goes into what is free, and into a budget if there is one."""
    return nbytes + RESERVE <= (min(free, int(budget_gb * GB)) if budget_gb else free)


def _visitor(needed: tuple[int, int] | None, budget: int) -> str:
    if needed is None:
        return ""
    whole, least = needed
    return "visits" if has_room(whole, budget) else "streams" if has_room(least, budget) else "cpu"


def _too_small(weights: int, activations: int, budget: int) -> str:
    least = weights + activations + RESERVE
    return (
        f"{least / GB:.1f} GB of GPU memory are needed at least ({weights / GB:.1f} for one block and what is no "
        f"block's, {activations / GB:.1f} to compute this size), {budget / GB:.1f} GB may be used: make the video "
        "smaller or shorter, raise vram_budget, or close what else uses the GPU"
    )
