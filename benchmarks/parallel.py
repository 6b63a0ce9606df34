"""Times one video's step on several GPUs against one: `torchrun --nproc_per_node 2 -m benchmarks.parallel --json FILE`.

A network of real size and random weights, in bf16 and in fp8: a guided step, which is two passes, by one process while
the others wait, and by all of them, shared out in every way that fits their number. In turns, `--rounds` times; the
ratio is that of the medians. On a CPU (gloo) a small network, to see that it works: its times say nothing.

Gate first: two blocks at full width and few tokens must be at most twice as wrong as one process is, against the same
weights in float64, by the rule of the kernels' tests, or that case has no time. An exchange in 8 bits may be 0.05 off.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.bench import packed
from lightx2v.bench.subjects import CONFIGS, Inputs, Subject, subject
from lightx2v.bench.timing import Times, machine, report, time_calls
from lightx2v.bench.weights import build, twin
from lightx2v.blocks import run_blocks
from lightx2v.config import EXCHANGES, Parallel
from lightx2v.guidance import CFG
from lightx2v.parallel.agreement import meet, on_first
from lightx2v.parallel.guidance import split
from lightx2v.parallel.mesh import Mesh, join, launched, own_device
from lightx2v.parallel.ring import mergeable
from lightx2v.parallel.sequence import shard
from lightx2v.parallel.ulysses import spread
from lightx2v.sampling import Denoiser, Step
from lightx2v_kernels import Kernels, references, select
from lightx2v_kernels.closeness import relative_error, why_too_far

WEIGHTS = ("bf16", "fp8")
STEP = Step(0, 50, 1.0, 0.98, 700.0)
SCALE = 5.0  # of guidance
LOSSY = 0.05  # relative error that an exchange in 8 bits may add to the result of two blocks
Row = dict[str, Any]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="wan2.1-14b" if cuda else "demo")
    parser.add_argument("--size", default="480p", help="480p or 720p")
    parser.add_argument("--attention", default="auto", help="auto, exact, or the name of an attention backend")
    parser.add_argument("--weights", nargs="*", choices=WEIGHTS, default=list(WEIGHTS), help="default: both")
    parser.add_argument("--exchange", choices=EXCHANGES, default="exact", help="how tokens travel")
    parser.add_argument("--rounds", type=int, default=4, help="calls of each")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result there too")
    return parser.parse_args(arguments)


def ways(size: int, heads: int, exchange: str) -> list[Parallel]:
    """How so many processes may share a guided step, what is expected to be fastest first."""
    found = [
        Parallel(n, size // n // cfg, cfg, exchange) for cfg in (2, 1) for n in (size // cfg, 1) if size % cfg == 0
    ]
    found += [Parallel(2, size // 2, 1, exchange)] if size > 2 and size % 2 == 0 else []
    return [each for each in dict.fromkeys(found) if each.size == size and heads % each.ulysses == 0]


@dataclass(frozen=True)
class Setting:
    """One network's weights on this process, with the kernels of one process."""

    subject: Subject
    device: torch.device
    dtype: torch.dtype
    attention: str
    network: nn.Module
    inputs: tuple[Inputs, Inputs]

    def kernels(self, mesh: Mesh | None) -> Kernels:
        where = self.device, self.dtype, self.subject.spec.head_dim
        merging = mergeable(self.attention, *where) if mesh is not None and mesh.ring.size > 1 else None
        name = self.attention if merging is None else merging.name
        alone = select(attention=name, device=self.device, dtype=self.dtype, head_dim=where[2])
        if mesh is None or mesh.sequence.size == 1:
            return alone
        return spread(alone, mesh, merging.partial() if merging and merging.partial else None)

    def step(self, mesh: Mesh | None) -> Callable[[], Tensor]:
        """A guided step by this process alone, or by all of a mesh."""
        network, walk = twin(self.subject, self.network, self.kernels(mesh)), shard(run_blocks, mesh)

        def velocity(latents: Tensor, timestep: float, asked: Any) -> Tensor:
            out: Tensor = network(latents, asked.timestep, asked.context, run=walk, **asked.more)
            return out.float()

        cond, uncond = self.inputs
        guidance: Denoiser = split(CFG(lambda step, branch: velocity, cond, uncond, SCALE), mesh)  # type: ignore[arg-type]

        @torch.inference_mode()
        def run() -> Tensor:
            return guidance(cond.latents, STEP)

        return run

    def truth(self) -> Tensor:
        """The same in float64 with the reference of every op; weights that are packed are restored."""
        with torch.device("meta"):
            other = self.subject.spec.build(self.subject.config, references())
        state = {name: tensor.double() for name, tensor in self.network.state_dict().items()}
        other.load_state_dict(state, assign=True)
        cond, uncond = (each.run(other.eval()) for each in self.inputs)
        return self.inputs[0].latents - STEP.sigma * (uncond + SCALE * (cond - uncond))


def prepared(subject: Subject, device: torch.device, attention: str) -> Setting:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kernels = select(attention="exact", device=device, dtype=dtype, head_dim=subject.spec.head_dim)
    network, cond = build(subject, kernels, device, dtype, "hot"), subject.inputs(device)
    uncond = Inputs(cond.latents, cond.timestep, subject.inputs(device).context, cond.more)
    if isinstance(uncond.context, Tensor):
        uncond.context.neg_()
    return Setting(subject, device, dtype, attention, network, (cond, uncond))


def in_fp8(setting: Setting) -> Setting:
    """With the linear layers of the blocks in fp8."""
    network = twin(setting.subject, setting.network, setting.kernels(None))
    packed.pack(setting.subject, network, "fp8", setting.kernels(None))
    return Setting(setting.subject, setting.device, setting.dtype, setting.attention, network, setting.inputs)


def gates(small: Setting, truth: Tensor, meshes: Sequence[Mesh]) -> list[str | None]:
    """Of each mesh why its step is wrong, None where it is not."""
    alone, found = small.step(None)(), list[str | None]()
    for mesh in meshes:
        out = small.step(mesh)()
        if mesh.parallel.exchange == "exact":
            found.append(why_too_far(out, truth, alone))
        else:
            error = relative_error(out, alone)
            found.append(None if error < LOSSY else f"{error:.3f} off one process, above {LOSSY}")
    return found


@dataclass
class Race:
    """Steps that are timed in turns."""

    mesh: Mesh  # any of all processes
    steps: dict[str, Callable[[], Tensor]]
    calls: dict[str, list[float]] = field(default_factory=dict)

    def run(self, rounds: int) -> None:
        for name, step in self.steps.items():  # warms up
            self._timed(name, step)
        for _ in range(rounds):
            for name, step in self.steps.items():
                self.calls.setdefault(name, []).append(self._timed(name, step))

    def _timed(self, name: str, step: Callable[[], Tensor]) -> float:
        meet(self.mesh)
        if name == ONE and not self.mesh.first:
            return 0.0
        return time_calls(step, self.mesh.device, 1)[0]


ONE = "one process"


def rows(setting: Setting, small: Setting, truth: Tensor, meshes: Sequence[Mesh], rounds: int) -> list[Row]:
    """A row for one process, and one for each way to share, of one kind of weights."""
    verdicts = gates(small, truth, meshes)
    alone = setting.step(None)
    sharing = {mesh.parallel.describe(): setting.step(mesh) for mesh in meshes}
    wrong = {mesh.parallel.describe(): why for mesh, why in zip(meshes, verdicts, strict=True) if why}
    wrong = on_first(meshes[0], lambda: wrong)  # one verdict for all, or some would wait for the others
    right = {name: step for name, step in sharing.items() if name not in wrong}
    race = Race(meshes[0], {ONE: alone, **right})
    race.run(rounds)
    times = {name: Times(tuple(calls)).row() for name, calls in race.calls.items()}
    made = [{"case": ONE, "gate": "passed", **times[ONE]}]
    exact = alone()
    for name in sharing:
        if name in wrong:
            made.append({"case": name, "gate": f"wrong: {wrong[name]}"})
            continue
        error = relative_error(right[name](), exact)
        ratio = round(times[ONE]["ms"] / times[name]["ms"], 3) if times[name]["ms"] else None
        made.append({"case": name, "gate": "passed", **times[name], "ratio": ratio, "error": error})
    return made


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where a gate failed."""
    args, launch = parse(arguments), launched()
    if launch is None or launch.size < 2:
        raise SystemExit("start several processes: torchrun --nproc_per_node 2 -m benchmarks.parallel")
    device, timed = own_device(args.device), subject(args.model, args.size)
    meshes = [join(each, device) for each in ways(launch.size, timed.config.num_heads, args.exchange)]
    small = prepared(timed.small(), device, args.attention)
    truth, setting, found = small.truth(), prepared(timed, device, args.attention), dict[str, list[Row]]()
    for weights in args.weights:
        if weights == "fp8":
            small, setting = in_fp8(small), in_fp8(setting)
            gc.collect()
        found[weights] = rows(setting, small, truth, meshes, args.rounds)
    facts = {"model": args.model, "size": str(timed.video), "tokens": timed.tokens, "processes": launch.size}
    if meshes[0].first:
        report({"benchmark": "parallel", **facts, "machine": machine(device), "weights": found}, args.json)
    meet(meshes[0])
    return int(any(row["gate"] != "passed" for each in found.values() for row in each))


if __name__ == "__main__":
    sys.exit(main())
