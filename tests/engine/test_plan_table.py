"""Plans of real models at real sizes for real machines: cards of 8 to 80 GB, RAM of 16 to 128 GB, from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import pytest
import torch

from benchmarks.offload_cases import info_of, latents_of
from lightx2v.bench import packed
from lightx2v.bench.subjects import subject
from lightx2v.memory import transformer_activation_bytes
from lightx2v.offload.plan import GB, RAM_RESERVE, DoesNotFitError, Machine, Needs, Plan, Sizes, measure, plan
from lightx2v_kernels import references

BF16 = torch.bfloat16
CARDS, RAMS, SIZES = (8, 10, 12, 16, 24, 32, 48, 80), (16, 32, 64, 128), ("480p", "720p")
# Name -> network, how many of them, what its blocks are packed in.
MODELS = {
    "1.3B": ("wan2.1-1.3b", 1, ""),
    "14B": ("wan2.1-14b", 1, ""),
    "14B fp8": ("wan2.1-14b", 1, "fp8"),
    "A14B": ("wan2.1-14b", 2, ""),
    "A14B fp8": ("wan2.1-14b", 2, "fp8"),
    "5B": ("wan2.2-ti2v-5b", 1, ""),
    "Hunyuan": ("hunyuan-1.5", 1, ""),
    "Hunyuan fp8": ("hunyuan-1.5", 1, "fp8"),
}


@cache
def sizes(name: str, scheme: str) -> Sizes:
    """Of a network, from one block of it."""
    asked = subject(name)
    with torch.device("meta"):
        network = asked.spec.build(replace(asked.config, num_layers=1), references()).to(BF16)
    one = measure(network)
    layers = packed.packable(asked, network, scheme).items() if scheme else ()
    # a byte less for each weight, four more for each row's scale
    saved = sum(layer.weight.numel() - 4 * layer.out_features for name, layer in layers if "blocks." in name)
    return Sizes(tuple(block - saved for block in one.blocks) * asked.config.num_layers, one.rest)


@cache
def needs(model: str, size: str) -> Needs:
    name, count, scheme = MODELS[model]
    asked = subject(name, size)
    activations = transformer_activation_bytes(info_of(asked, BF16), latents_of(asked), BF16, fused=True)
    return Needs((sizes(name, scheme),) * count, activations)


@dataclass(frozen=True)
class Place:
    """A machine: GB of the card that are free, and of RAM."""

    card: float
    ram: float

    def plan(self, model: str, size: str) -> Plan:
        return plan(needs(model, size), Machine(int(self.card * GB), int(self.ram * GB), int(0.9 * self.ram * GB)))

    def said(self, model: str, size: str) -> str:
        """In a few words: "25 of 40 stay, 3 in the file"."""
        try:
            made = self.plan(model, size)
        except DoesNotFitError:
            return "no"
        count = made.resident + made.streamed
        if not made.streamed:
            words = "both" if made.together else "whole" if made.whole else "by turns"
        else:
            words = f"{made.resident} of {count}" + (", one at a time" if not made.prefetch else "")
        return words + (f", {made.filed} in the file" if made.filed else "")


TABLE = [
    # card, RAM, model, 480p, 720p
    (8, 16, "14B fp8", "9 of 40, 4 in the file", "1 of 40, 4 in the file"),
    (8, 32, "1.3B", "whole", "whole"),
    (8, 32, "14B", "3 of 40", "0 of 40, one at a time"),
    (8, 32, "14B fp8", "9 of 40", "1 of 40"),
    (8, 64, "A14B fp8", "9 of 40", "1 of 40"),
    (8, 32, "5B", "17 of 30", "13 of 30"),
    (8, 32, "Hunyuan", "8 of 54", "no"),
    (12, 16, "A14B", "9 of 40, 32 in the file", "5 of 40, 32 in the file"),
    (12, 32, "14B", "9 of 40", "5 of 40"),
    (12, 32, "14B fp8", "20 of 40", "12 of 40"),
    (16, 32, "14B fp8", "32 of 40", "24 of 40"),
    (16, 64, "A14B", "15 of 40", "11 of 40"),
    (16, 32, "5B", "whole", "whole"),
    (24, 16, "14B", "26 of 40, 23 in the file", "22 of 40, 23 in the file"),
    (24, 32, "14B fp8", "whole", "whole"),
    (24, 64, "A14B", "26 of 40", "22 of 40"),
    (24, 64, "A14B fp8", "by turns", "by turns"),
    (24, 32, "Hunyuan", "whole", "44 of 54"),
    (32, 64, "14B", "37 of 40", "33 of 40"),
    (48, 64, "14B", "whole", "whole"),
    (48, 64, "A14B", "by turns", "by turns"),
    (48, 16, "A14B fp8", "both", "both"),
    (80, 128, "A14B", "both", "both"),
    (80, 16, "Hunyuan fp8", "whole", "whole"),
]


@pytest.mark.parametrize(("card", "ram", "model", "small", "large"), TABLE)
def test_a_plan_for_each_machine(card: float, ram: float, model: str, small: str, large: str) -> None:
    place = Place(card, ram)
    assert (place.said(model, "480p"), place.said(model, "720p")) == (small, large)


@pytest.mark.parametrize(("model", "size"), product(MODELS, SIZES))
def test_every_machine_keeps_its_limits_and_more_of_it_never_hurts(model: str, size: str) -> None:
    plans: dict[tuple[float, float], Plan] = {}
    for card, ram in product(CARDS, RAMS):
        if Place(card, ram).said(model, size) == "no":
            assert card < 12 and model.startswith("Hunyuan") and size == "720p", "all else fits 8 GB"
            continue
        made = plans[card, ram] = Place(card, ram).plan(model, size)
        assert made.peak <= card * GB and made.pinned <= 0.9 * ram * GB
        assert made.ram <= ram * GB - RAM_RESERVE, "every model goes into 16 GB of RAM, with the rest in its file"
        assert not made.filed or made.ram
    for card, ram in plans:
        made, more = plans[card, ram], [plans.get((card, 2 * ram)), plans.get((2 * card, ram))]
        for other in filter(None, more):
            assert other.resident >= made.resident and other.filed <= made.filed and other.passing <= made.passing
