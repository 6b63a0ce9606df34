"""Which LoRAs a user asks for: a tuple of `Lora`, applied in order (the order changes nothing but rounding)."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from lightx2v.config import one_of
from lightx2v.hints import expert_hint

log = logging.getLogger(__name__)
EXPERTS = ("both", "high", "low")


@dataclass(frozen=True)
class Lora:
    """One file of a stack. strength multiplies the file's own scale; 1 is as trained, 0 is off, negative inverts.

    expert: of a model that has two (Wan2.2 A14B), the one that gets it: the high-noise expert denoises the first
    steps, the low-noise expert the rest.
    """

    path: Path
    strength: float = 1.0
    expert: str = "both"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        one_of("expert", self.expert, EXPERTS)
        if isinstance(self.strength, bool) or not isinstance(self.strength, int | float) or not isfinite(self.strength):
            raise ValueError(f"{self.path}: LoRA strength must be a finite number such as 1.0, got {self.strength!r}")


def for_expert(loras: Sequence[Lora], expert: str | None) -> tuple[Lora, ...]:
    """The part of a stack that one network gets.

    expert: "high" or "low" of a model with two experts; None for a network that may be either or neither, where a LoRA
    that is meant for one expert raises ValueError: dropping it or applying it would both be a guess. So does a file
    that is for the other expert by its name.
    """
    for lora in loras:
        _check_name(lora, expert)
    if expert is None:
        if stray := next((lora for lora in loras if lora.expert != "both"), None):
            raise ValueError(
                f"{stray.path}: is set for the {stray.expert}-noise expert, but one network was loaded and its file "
                "does not say which expert it is; give it only the LoRAs that it is to have, with expert 'both'"
            )
        return tuple(loras)
    one_of("expert", expert, EXPERTS[1:])
    return tuple(lora for lora in loras if lora.expert in ("both", expert))


def _check_name(lora: Lora, expert: str | None) -> None:
    said = expert_hint(lora.path)
    if said is None or said == lora.expert:
        return
    if lora.expert != "both":
        raise ValueError(
            f"{lora.path}: is for the {said}-noise expert by its name, but is set for {lora.expert} noise; "
            f"set its expert to '{said}', or rename it if its name is wrong"
        )
    if expert not in (None, said):
        log.warning(
            "%s: is for the %s-noise expert by its name, but goes to the %s-noise one too; set its expert to '%s'",
            lora.path.name, said, expert, said,
        )  # fmt: skip
