"""What trains and what compiles: gradients through every backend, and one whole graph through torch.compile."""

from typing import Any

import pytest
import torch
from torch import Tensor

import lightx2v_kernels
from closeness import assert_close, assert_exact_enough
from lightx2v_kernels import registry
from lightx2v_kernels.quantized import Quantized, tensors

CPU = torch.device("cpu")
EVERY = [(op, name) for op in registry.registries() for name in registry.names(op)]
QUANTISING = [(op, name) for op, name in EVERY if op.endswith("quantize")]
PACKED = (
    "int8_linear",
    "fp8_linear",
    "gguf_linear",
    "nvfp4_linear",
    "mxfp8_linear",
)  # of numbers that cannot move by small steps
PAIRS = [pair for pair in EVERY if pair not in QUANTISING and pair[0] not in PACKED]


def gradients(fn: Any, args: tuple[Any, ...]) -> list[Tensor]:
    leaves = [a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    generator, loss = torch.Generator().manual_seed(0), torch.zeros(())
    for out in tensors(fn(*leaves)):
        loss = loss + (out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum()
    return list(torch.autograd.grad(loss, [a for a in leaves if isinstance(a, Tensor)]))


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_gradients_are_those_of_the_reference(op: str, name: str) -> None:
    found = registry.registry(op)
    backend = next(b for b in found.backends if b.name == name)
    if why := backend.why_not(CPU, torch.float32, 128):
        pytest.skip(f"{name}: {why}")
    for args in found.op.examples(CPU, torch.float32, 128):
        wide = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
        plain, truth = gradients(found.op.reference, args), gradients(found.op.reference, wide)
        for index, got in enumerate(gradients(backend.load(), args)):
            assert_close(f"gradient of tensor {index}", got, truth[index], plain[index])


@pytest.mark.parametrize(("op", "name"), QUANTISING)
def test_tokens_in_8_bits_have_no_gradient(op: str, name: str) -> None:
    """Rounding has none: what is quantised is cut off, so that a training run fails instead of learning nothing."""
    found = registry.registry(op)
    backend = next(b for b in found.backends if b.name == name)
    if why := backend.why_not(CPU, torch.float32, 128):
        pytest.skip(f"{name}: {why}")
    args = found.op.examples(CPU, torch.float32, 128)[0]
    result = backend.load()(*(a.requires_grad_() if isinstance(a, Tensor) else a for a in args))
    quantised = result if isinstance(result, Quantized) else result[-1]
    assert not quantised.values.requires_grad and not quantised.scale.requires_grad


@pytest.mark.parametrize("attention", ["auto", "reference"])
def test_a_block_of_all_ops_is_one_graph(attention: str) -> None:
    kernels = lightx2v_kernels.select(attention=attention, device=CPU, dtype=torch.float32, head_dim=128)

    def block(x: Tensor, table: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift, scale, gate = table.unbind(2)
        y = kernels.rms_norm(kernels.modulate(x, shift, scale, 1e-6), weight, 1e-6).unflatten(-1, (-1, 128))
        y = kernels.attention(kernels.rope(y, cos, sin), kernels.rope(y, cos, sin), y).flatten(2)
        return kernels.layer_norm(kernels.gated_residual(x, y, gate), weight, None, 1e-6)

    angles = torch.rand(17, 64)
    args = (torch.randn(2, 17, 256), torch.randn(2, 1, 3, 256), torch.ones(256), angles.cos(), angles.sin())
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(gradients(compiled, args), gradients(block, args), strict=True):
        assert_exact_enough(got, wanted)
