"""Which devices are asked for, and how that many share one video."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightx2v.config import EXCHANGES, Parallel, one_of

ALL = "all"
CPUS = ("cpu", "cpu")  # what "all" is on a machine without a GPU: to try it
USES = ("auto", "always")


@dataclass(frozen=True)
class Shared:
    """What is asked of several devices; sizes of 0 are chosen to fit.

    devices: "all", or numbers of GPUs as PyTorch counts them, "0, 1"; "cpu, cpu" is two processes on the CPU.
    ulysses, ring, cfg, exchange: see `Parallel`. use: "auto" takes them where a measurement says that they are worth
        it, "always" in any case.
    """

    devices: str = ALL
    ulysses: int = 0
    ring: int = 0
    cfg: int = 0
    exchange: str = "exact"
    use: str = "auto"

    def __post_init__(self) -> None:
        for name in ("ulysses", "ring", "cfg"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 (chosen to fit) or a number of processes")
        one_of("exchange", self.exchange, EXCHANGES)
        one_of("use", self.use, USES)


def devices_of(named: str, gpus: int) -> tuple[str, ...]:
    """ "all" or "0, 1" -> ("cuda:0", "cuda:1"). gpus: how many there are.

    Raises ValueError for a GPU that is not there or is named twice, and for words that are none of these.
    """
    if named.strip().lower() == ALL:
        return tuple(f"cuda:{index}" for index in range(gpus)) or CPUS
    words = [word.strip().lower() for word in named.split(",")]
    if all(word == "cpu" for word in words):
        return tuple(words)
    numbers = [word.removeprefix("cuda:") for word in words]
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"devices={named!r}: write all, numbers of GPUs such as 0, 1, or cpu, cpu to try it without")
    found = [int(number) for number in numbers]
    if missing := [number for number in found if number >= gpus]:
        there = f"0 to {gpus - 1}" if gpus else "none"
        raise ValueError(f"devices={named!r}: there is no GPU {missing[0]}; there are {there}")
    if len(set(found)) < len(found):
        raise ValueError(f"devices={named!r} names a GPU twice; each process needs one of its own")
    return tuple(f"cuda:{number}" for number in found)


def share(shared: Shared, count: int, heads: int, guided: bool) -> Parallel:
    """How `count` processes share one video of a model with so many attention heads.

    What is left to choose: guidance's two passes at the same time first, which exchange least; then Ulysses as far as
    heads divide; a ring for the rest. Raises ValueError where the sizes asked for do not come to `count`.
    """
    if not guided and shared.cfg > 1:
        raise ValueError(
            f"cfg={shared.cfg} shares guidance's two passes, and without guidance there is one: set it to 0"
        )
    shared = shared if guided else replace(shared, cfg=1)
    for cfg in _sizes(shared.cfg, [2, 1]):
        for ulysses in _sizes(shared.ulysses, range(count, 0, -1)):
            ring = shared.ring or count // (cfg * ulysses)
            if cfg * ulysses * ring == count and heads % ulysses == 0:
                return Parallel(ulysses, ring, cfg, shared.exchange)
    asked = ", ".join(f"{name} {getattr(shared, name) or 'any'}" for name in ("ulysses", "ring", "cfg"))
    raise ValueError(
        f"{asked} do not come to {count} devices for a model of {heads} heads, which ulysses must divide; a size of 0 "
        "is chosen to fit"
    )


def _sizes(asked: int, choices: Sequence[int]) -> Sequence[int]:
    return [asked] if asked else choices
