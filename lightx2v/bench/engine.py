"""The engine's own contestants: schemes of weights times attention backends, all on the same random weights.

What is timed is a step in the middle of a request: keys and values of the prompt are the request's, made by the first
call, as `diffuse` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightx2v.bench.packed import pack, packed_bytes
from lightx2v.bench.race import Contestant, Entry
from lightx2v.bench.subjects import Inputs, Subject
from lightx2v.bench.weights import build, twin, weight_bytes
from lightx2v.kept import Kept
from lightx2v_kernels import Kernels, references, registry, select
from lightx2v_kernels.closeness import why_too_far

NONE = "none"  # the scheme of weights that are not packed
ALL, LOSSY = "all", "lossy"  # of the attention backends that can run
BASELINE = "torch_sdpa"  # attention that is exact and runs everywhere: the first entry of every race has it


@dataclass(frozen=True)
class Setting:
    """What every contestant of a race shares. network: its weights are the ones that all read."""

    subject: Subject
    device: torch.device
    dtype: torch.dtype
    network: nn.Module
    inputs: Inputs
    packed: dict[str, nn.Module] = field(default_factory=dict)
    linear: dict[str, str] = field(default_factory=dict)  # scheme -> backend that multiplies

    def kernels(self, attention: str) -> Kernels:
        """Raises UnsupportedBackendError with the reasons."""
        return select(attention=attention, device=self.device, dtype=self.dtype, head_dim=self.subject.spec.head_dim)

    def drop(self, scheme: str) -> None:
        """Give the weights of a scheme back."""
        self.packed.pop(scheme, None)


def prepare(subject: Subject, device: torch.device, dtype: torch.dtype, kind: str) -> Setting:
    """Weights of a kind of weights.WEIGHTS, and inputs."""
    kernels = select(attention=BASELINE, device=device, dtype=dtype, head_dim=subject.spec.head_dim)
    network = build(subject, kernels, device, dtype, kind)
    return Setting(subject, device, dtype, network, subject.inputs(device))


def small_setting(setting: Setting) -> Setting:
    """Two blocks of the same width in float32, at few tokens, with hot weights: where wrong weights show most."""
    return prepare(setting.subject.small(), setting.device, torch.float32, "hot")


def entries(setting: Setting, schemes: Sequence[str], attention: Sequence[str]) -> list[Entry]:
    """What the others are compared with, then an entry for every scheme with every attention backend.

    attention: names of backends, "auto", ALL, LOSSY.
    """
    names = backends(attention, setting.device, setting.dtype, setting.subject.spec.head_dim)
    pairs = [(NONE, BASELINE)] + [(scheme, name) for scheme in schemes for name in names]
    return [_entry(setting, *pair) for pair in dict.fromkeys(pairs)]


def backends(asked: Sequence[str], device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Names of attention backends, in the order of the registry where ALL or LOSSY stands for them."""
    able = registry.registry("attention")
    fits = able.refusals(device, dtype, head_dim)
    lossy = {backend.name for backend in able.backends if backend.max_error is not None}
    # The reference holds the whole score matrix: at the length of a video it fits no memory.
    capable = [name for name, why_not in fits.items() if why_not is None and name != "reference"]
    names: list[str] = []
    for name in asked:
        names += capable if name == ALL else [n for n in capable if n in lossy] if name == LOSSY else [name]
    return list(dict.fromkeys(names))


def _entry(setting: Setting, scheme: str, attention: str) -> Entry:
    stored = str(setting.dtype).removeprefix("torch.") if scheme == NONE else scheme
    packed = scheme != NONE
    return Entry(
        name=f"lightx2v {stored}, {attention}",
        make=lambda: _contestant(setting, scheme, attention),
        lossy=packed,
        holds=scheme if packed else "",
        extra_bytes=packed_bytes(setting.subject, setting.network, scheme) if packed else 0,
        facts={"engine": "lightx2v", "quant": scheme, "attention": attention},
    )


def _contestant(setting: Setting, scheme: str, attention: str) -> Contestant:
    kernels = setting.kernels(attention)
    network, chosen = setting.network, dict(kernels.names)
    if scheme != NONE:
        if scheme not in setting.packed:
            network = twin(setting.subject, network, kernels)
            setting.linear[scheme] = pack(setting.subject, network, scheme, kernels)
            setting.packed[scheme] = network
        network = setting.packed[scheme]
        chosen["linear"] = setting.linear[scheme]
    network = twin(setting.subject, network, kernels)
    keep = Kept()
    return Contestant(lambda: setting.inputs.run(network, keep), weight_bytes(network), {"kernels": chosen})


def why_wrong(subject: Subject, device: torch.device, dtype: torch.dtype, kind: str) -> str | None:
    """Two blocks at few tokens against the same weights on the references in fp64; None if they agree, else why not."""
    small = subject.small()
    chosen = select(attention=BASELINE, device=device, dtype=dtype, head_dim=subject.spec.head_dim)
    network, inputs = build(small, chosen, device, dtype, kind), small.inputs(device)
    weights = network.state_dict()
    plain = references()

    def run(wide: bool) -> Tensor:
        with torch.device("meta"):
            other = small.spec.build(small.config, plain)
        other.load_state_dict({name: t.double() if wide else t for name, t in weights.items()}, assign=True)
        return inputs.run(other.eval())

    return why_too_far(inputs.run(network), run(wide=True), run(wide=False))
