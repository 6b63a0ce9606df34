"""Which models fit which GPU, from sizes alone: no checkpoint is needed."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lightx2v.bench.subjects import SIZES, Subject, subject
from lightx2v.checkpoint import Header
from lightx2v.identify import CheckpointInfo
from lightx2v.memory import transformer_activation_bytes
from lightx2v.offload.placing import ram_bytes
from lightx2v.offload.plan import RESERVE, DoesNotFitError, Machine, Needs, Plan, Sizes, measure, plan
from lightx2v_kernels import references

# Name in bench/subjects.py, what people call it, and how many transformers it has.
MODELS = (
    ("wan2.1-1.3b", "Wan2.1 1.3B", 1),
    ("wan2.1-14b", "Wan2.1 14B", 1),
    ("wan2.1-14b", "Wan2.2 A14B", 2),
    ("wan2.2-ti2v-5b", "Wan2.2 TI2V-5B", 1),
    ("hunyuan-1.5", "HunyuanVideo-1.5", 1),
)
UNLIMITED = Machine(sys.maxsize, sys.maxsize, sys.maxsize)


@dataclass(frozen=True)
class Capacity:
    """One model at one size of video, its transformer in bf16; bytes.

    least: of GPU memory, with one block there at a time. whole: with all that computes at once there. ram: of the
    weights at rest, where they do not stay on the GPU. plan: what this machine would do; None without a GPU, or where
    nothing helps.
    """

    model: str
    width: int
    height: int
    num_frames: int
    least: int
    whole: int
    ram: int
    plan: Plan | None = None

    def here(self) -> str:
        """What this machine would do, in a few words."""
        if self.plan is None:
            return "no"
        if not self.plan.streamed:
            return "yes, whole"
        return f"yes, {self.plan.streamed} of {self.plan.streamed + self.plan.resident} blocks pass through"


def capacities(device: torch.device) -> Iterator[Capacity]:
    """Every published model at its sizes, for a GPU as free as it is now."""
    machine = None
    if device.type == "cuda":
        free, ram = torch.cuda.mem_get_info(device)[0], ram_bytes()[0]
        machine = Machine(free, ram, ram)
    for name, title, count in MODELS:
        for size in SIZES:
            if size != "demo" and not (name == "wan2.2-ti2v-5b" and size == "480p"):
                yield _capacity(title, subject(name, size), count, machine)


def _capacity(title: str, asked: Subject, count: int, machine: Machine | None) -> Capacity:
    info = CheckpointInfo(Path(asked.name), Header(Path(asked.name), {}, {}), asked.spec, asked.config, torch.bfloat16)
    shape = (1, asked.spec.latents.channels, *asked.latents)
    activations = transformer_activation_bytes(info, shape, torch.bfloat16, fused=True)  # as on a GPU with Triton
    needs = Needs((_sizes(asked),) * count, activations)
    found = None
    if machine is not None:
        try:
            found = plan(needs, machine)
        except DoesNotFitError:
            found = None
    total = needs.transformers[0].total
    return Capacity(
        model=title,
        width=asked.video.width,
        height=asked.video.height,
        num_frames=asked.video.num_frames,
        least=plan(needs, UNLIMITED, least=True).peak,
        whole=total + needs.activations + RESERVE,
        ram=count * total,
        plan=found,
    )


def _sizes(asked: Subject) -> Sizes:
    """Of the network, from one block of it."""
    config = replace(asked.config, num_layers=1)
    with torch.device("meta"):
        network = asked.spec.build(config, references()).to(torch.bfloat16)
    one = measure(network)
    return Sizes(one.blocks * asked.config.num_layers, one.rest)
