"""Where values stop being finite: a step is done again, and looked at after every block.

The sampler looks at each step's estimate once, which costs one reduction. Only when that is not finite is the step
done again with these walks, which wait for the device after every block.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.blocks import Block, Branch, RunBlocks, Unadded, Walks, added
from lightx2v.cache.turn import Turn
from lightx2v.finite import bad_weight, finite, how_many
from lightx2v.guidance import Conditioning
from lightx2v.parallel.agreement import first_said
from lightx2v.parallel.mesh import Mesh
from lightx2v.sampling import Denoiser, Step


class _Found(Exception):
    """Not an error of its own: carries the place out of the pass."""


def looking(turn: Turn, run: RunBlocks, mesh: Mesh | None = None) -> Walks:
    """A `CacheFactory` that caches nothing: walks that stop at the first block whose result is not finite.

    mesh: of several processes, each of which sees its own tokens; all stop where one finds something.
    """

    def stop_where(any_said: str | None) -> None:
        if (found := first_said(mesh, any_said)) is not None:
            raise _Found(found[1])

    def walks(step: int, branch: Branch) -> RunBlocks:
        of = f" of the {turn.expert}-noise expert" if turn.expert else ""

        def walk(blocks: Sequence[Block], tokens: Tensor, args: Any) -> Tensor:
            network, total = turn.network(), len(blocks)
            facts = f"{branch} pass{of}, attention backend {_attention(network)}, {str(tokens.dtype)[6:]}"
            stop_where(_before(tokens, args, facts))

            def looked_at(index: int, block: Block) -> Block:
                def call(tokens: Tensor | Unadded, args: Any) -> Tensor | Unadded:
                    out = block(tokens, args)
                    fine = finite(added(out))
                    place = f"first in block {index + 1} of {total} ({facts})"
                    stop_where(None if fine else f"{place}; {_advice(network, index, added(out))}")
                    return out

                return call

            return run([looked_at(index, block) for index, block in enumerate(blocks)], tokens, args)

        return walk

    return walks


def _before(tokens: Tensor, args: Any, facts: str) -> str | None:
    """What is not finite before the first block, in words; None if all is."""
    if not finite(tokens):
        return (
            f"before the blocks ({facts}): in the latents or images that were given, or in the weights that embed "
            "them; encode again, or load another file"
        )
    if (name := next((name for name, value in _tensors(args) if not finite(value)), None)) is not None:
        return (
            f"before the blocks ({facts}), in what they read as '{name}': in the text or image embedding, or in the "
            "weights that read it; encode again, or load another file"
        )
    return None


# What a model is given beside the latents: field of Conditioning -> in words.
GIVEN = {
    "context": "the text embedding",
    "image": "the image latents or their mask",
    "clip": "the image embedding",
    "glyphs": "the embedding of quoted text",
}


def check_given(latents: Tensor, mask: Tensor | None, cond: Conditioning, uncond: Conditioning | None) -> None:
    """Raise FloatingPointError, naming it, for anything that is not finite before the first step.

    One reduction for each tensor, once a request (benchmarks/watching.py times it).
    """
    for tensor, words in ((latents, "the latents to start from"), (mask, "the mask")):
        if tensor is not None and not finite(tensor):
            raise FloatingPointError(
                f"{words} held NaN or infinity in {how_many(tensor)} before sampling: encode again, or start from noise"
            )
    for prompt, given in (("positive", cond), ("negative", uncond)):
        for name, words in GIVEN.items() if given is not None else ():
            value = getattr(given, name)
            if value is not None and not finite(value):
                raise FloatingPointError(
                    f"{words} ('{name}') of the {prompt} conditioning held NaN or infinity in {how_many(value)} before "
                    "sampling: encode again; if they stay, the encoder's file is damaged: use another"
                )


def explain(again: Callable[[], Denoiser], cached: bool) -> Callable[[Tensor, Step], str]:
    """What `sample` asks when an estimate is not finite: where it began, and what to do.

    again: makes the request's denoiser anew, with the walks of `looking`. cached: whether it has a feature cache now.
    """

    def why(latents: Tensor, step: Step) -> str:
        if not finite(latents):
            return "in the latents that the step began with; encode them again"
        try:
            x0 = again()(latents, step)
        except _Found as found:
            return str(found)
        except RuntimeError as error:  # the device may be full, or out of order
            return f"and doing the step again to find where failed: {error}"
        if not finite(x0):
            return "after the blocks: in the head's weights or in guidance; load another file, or lower the guidance"
        if cached:
            return "and nowhere when the step is done again without the cache; lower its threshold or leave it off"
        return "and nowhere when the step is done again: a kernel's result differs from run to run; try attention exact"

    return why


def _advice(network: nn.Module, index: int, out: Tensor) -> str:
    if (name := _bad_weight(network, index)) is not None:
        return f"its {name} is not finite: the file, or a LoRA added to it, is damaged; load another"
    half = ", and bf16 instead of fp16 weights" if out.dtype == torch.float16 else ""
    return f"its weights are finite: try attention exact or torch_sdpa{half}"


def _bad_weight(network: nn.Module, index: int) -> str | None:
    lists = (module for module in network.children() if isinstance(module, nn.ModuleList))
    blocks = max(lists, key=len, default=nn.ModuleList())
    return bad_weight(blocks[index]) if index < len(blocks) else None


def _attention(network: nn.Module) -> str:
    kernels = getattr(network, "kernels", None)
    return kernels.names.get("attention", "unnamed") if kernels else "unknown"


def _tensors(args: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a family's block arguments, by the names of its fields."""
    for name in [field.name for field in fields(args)] if is_dataclass(args) else ():
        value = getattr(args, name)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, Tensor) and each.is_floating_point():
                yield name, each
