"""What a pass of a Wan transformer takes beside its weights, counted on tensors without contents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from benchmarks.offload_cases import info_of, latents_of
from counting import Peak
from lightx2v.bench import packed
from lightx2v.bench.subjects import PROMPT_TOKENS, TEXT_TOKENS, Subject, subject
from lightx2v.blocks import RunBlocks, run_blocks
from lightx2v.memory import FUSED, fused_by, transformer_activation_bytes, waiting_bytes
from lightx2v.paired import Paired
from lightx2v.quant.feeding import PIECE, WHOLE, in_pieces, piece_of
from lightx2v.quant.linear import ScaledLinear
from lightx2v_kernels import TOKENWISE, Kernels, Quantized, references, registry, rotary_attention
from lightx2v_kernels.linear_gelu import torch_steps


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


def attend_int8(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    held = torch.empty_like(q, dtype=torch.int8), torch.empty_like(k, dtype=torch.int8)
    return torch.empty_like(v) if all(each.ndim for each in held) else v


def kernels(int8: bool) -> Kernels:
    """What Triton's ops allocate, and nothing that computes."""
    pytest.importorskip("triton", reason="Triton is not installed")
    ours = {
        op: backend.load() for op in TOKENWISE for backend in registry.registry(op).backends if backend.name == "triton"
    }
    rotary = attend_int8 if int8 else rotary_attention(attend, ours["norm_rope"])
    # of what a GPU may choose for this, the one that takes more
    ours["linear_gelu"] = torch_steps.linear_gelu
    made = references(**ours, attention=attend, cross_attention=attend, rotary_attention=rotary)
    return replace(made, names={op: "triton" for op in ours})


def multiply(values: Tensor, scale: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return torch.empty(*values.shape[:-1], weight.shape[0], dtype=torch.bfloat16)


def counted(asked: Subject, int8: bool, fp8: bool, *, paired: bool = False) -> int:
    """Bytes of one pass at most, or of two that walk together."""
    chosen = kernels(int8)
    more: dict[str, Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        network = asked.spec.build(asked.config, chosen)
        for parameter in network.parameters():
            parameter.data = parameter.data.bfloat16()
        assert fused_by(network)
        for name, layer in packed.packable(asked, network, "fp8").items() if fp8 else ():
            network.set_submodule(name, ScaledLinear(layer, torch.float8_e4m3fn, multiply, chosen.quantize))
        given = asked.inputs(torch.device("cpu"))
        if asked.config.image_dim:
            more["clip"] = torch.empty(1, 257, asked.config.image_dim)
        return most_of(lambda run: network(given.latents, given.timestep, given.context, run, **more), paired)


def most_of(forward: Callable[[RunBlocks], Tensor], paired: bool) -> int:
    with Peak() as peak:
        if paired:
            pair = Paired(run_blocks)
            pair.both(lambda: forward(pair), lambda: forward(pair))
        else:
            forward(run_blocks)
    return peak.most


@pytest.mark.parametrize("size", ["480p", "720p"])
@pytest.mark.parametrize("model", ["wan2.1-14b", "wan2.1-1.3b", "wan2.2-ti2v-5b"])
def test_the_estimate_is_upper_and_near(model: str, size: str) -> None:
    asked = subject(model, size)
    asked = replace(asked, config=replace(asked.config, num_layers=2))
    bf16 = torch.bfloat16
    estimate = transformer_activation_bytes(info_of(asked, bf16), latents_of(asked), bf16, fused=True)
    most = max(counted(asked, int8, fp8) for int8 in (False, True) for fp8 in (False, True))
    assert most < estimate < 1.1 * most
    assert estimate < transformer_activation_bytes(info_of(asked, bf16), latents_of(asked), bf16)


@pytest.mark.parametrize("size", ["480p", "720p"])
@pytest.mark.parametrize("model", ["wan2.1-14b", "wan2.1-1.3b", "wan2.2-ti2v-5b"])
def test_a_pass_that_waits_takes_what_is_planned_for_it(model: str, size: str) -> None:
    asked, bf16 = subject(model, size), torch.bfloat16
    asked = replace(asked, config=replace(asked.config, num_layers=3))
    planned = waiting_bytes(info_of(asked, bf16), latents_of(asked), TEXT_TOKENS, bf16)
    more = counted(asked, True, True, paired=True) - counted(asked, True, True)
    assert 0.85 * planned < more < planned


def test_a_pass_of_hunyuan_that_waits() -> None:
    asked, bf16 = subject("hunyuan-1.5", "480p"), torch.bfloat16
    asked = replace(asked, config=replace(asked.config, num_layers=3))
    planned = waiting_bytes(info_of(asked, bf16), latents_of(asked), PROMPT_TOKENS, bf16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        network = asked.spec.build(asked.config, references(attention=attend))
        for parameter in network.parameters():
            parameter.data = parameter.data.bfloat16()
        given = asked.inputs(torch.device("cpu"))
        alone, both = (
            most_of(lambda run: network(given.latents, given.timestep, given.context, run, **given.more), paired)
            for paired in (False, True)
        )
    assert 0.5 * planned < both - alone < planned


def test_with_an_image_too() -> None:
    asked = subject("wan2.1-14b", "720p")
    asked = replace(asked, config=replace(asked.config, num_layers=2, image_dim=1280))
    bf16 = torch.bfloat16
    estimate = transformer_activation_bytes(info_of(asked, bf16), latents_of(asked), bf16, fused=True)
    assert counted(asked, True, False) < estimate < 1.15 * counted(asked, True, False)


def test_other_kernels_are_told_apart() -> None:
    network = torch.nn.Module()
    assert not fused_by(network)
    network.kernels = replace(references(), names={op: "triton" for op in FUSED})  # type: ignore[assignment]
    assert fused_by(network)
    network.kernels = replace(references(), names={op: "triton" for op in FUSED[1:]})  # type: ignore[assignment]
    assert not fused_by(network)


@pytest.mark.parametrize("batch", [1, 3])
def test_pieces_give_what_the_whole_gives(batch: int) -> None:
    length = WHOLE // batch + 5
    tokens = torch.arange(batch * length * 2.0).view(batch, length, 2)
    seen: list[int] = []

    def feed(each: Any) -> Tensor:
        dense = each.values * each.scale if isinstance(each, Quantized) else each
        seen.append(dense.shape[0] * dense.shape[1])
        return torch.cat([dense, dense + 1], 2)

    expected = feed(tokens)
    feeds: Callable[[Any], Tensor] = feed
    assert torch.equal(in_pieces(feeds, tokens), expected)
    packed_tokens = Quantized(tokens, torch.full((batch, length, 1), 1.0))
    assert torch.equal(in_pieces(feeds, packed_tokens), expected)
    assert max(seen[1:]) <= PIECE and sum(seen[1:]) == 2 * seen[0]
    assert piece_of(WHOLE) == WHOLE and piece_of(WHOLE + 1) == PIECE
