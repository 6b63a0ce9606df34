"""Every attention backend against attention written out in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from closeness import assert_backend, assert_exact_enough
from lightx2v_kernels import registry

OP = registry.registry("attention")
LENGTHS = [(1, 1), (33, 33), (63, 63), (1000, 1000), (1, 33), (63, 512), (1000, 7)]  # queries, keys


def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.double() for x in (q, k, v))
    weights = torch.einsum("blhd,bshd->bhls", q, k).div(q.shape[-1] ** 0.5).exp()
    return torch.einsum("bhls,bshd,bhl->blhd", weights, v, 1 / weights.sum(-1))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As one would write it at the inputs' own dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v).transpose(1, 2)


def test_the_yardsticks_are_attention() -> None:
    """The truth here against PyTorch's, and the op's own yardstick against the truth."""
    qkv = torch.randn(3, 2, 33, 2, 128, dtype=torch.float64).unbind(0)
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)
    for yardstick in (truth, plain, OP.op.plain, OP.op.reference):
        assert_exact_enough(yardstick(*qkv), wanted, 1e-13)


def backend_or_skip(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> registry.Backend:
    backend = next(b for b in OP.backends if b.name == name)
    if why := backend.why_not(device, dtype, head_dim):
        pytest.skip(f"{name}: {why}")
    # A package may be built for less than it declares (fa3-fwd has no float16); what is PyTorch's or ours may not.
    if backend.package and (why := registry.self_test(OP.op, backend, device, dtype, head_dim)):
        pytest.skip(f"{name}: {why}")
    return backend


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("name", OP.names())
def test_lengths(name: str, queries: int, keys: int, device: torch.device, dtype: torch.dtype) -> None:
    backend = backend_or_skip(name, device, dtype, 128)
    q = 2 * torch.randn(2, queries, 2, 128)
    k, v = torch.randn(2, 2, keys, 2, 128)
    args = tuple(x.to(device, dtype) for x in (q, k, v))
    assert_backend(backend, args, truth(*args), plain(*args))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", OP.names())
def test_strided_inputs(name: str, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
    """Slices of a fused (B, L, 3, H, D) projection, then of a (B, L, H, 3, D) one, then heads-first memory."""
    backend = backend_or_skip(name, device, dtype, head_dim)
    for args in (
        torch.randn(2, 63, 3, 4, head_dim).to(device, dtype).unbind(2),
        torch.randn(2, 63, 4, 3, head_dim).to(device, dtype).unbind(3),
        tuple(torch.randn(2, 4, 63, head_dim).to(device, dtype).transpose(1, 2) for _ in range(3)),
    ):
        assert not args[0].is_contiguous()
        assert_backend(backend, args, truth(*args), plain(*args))


@pytest.mark.parametrize("name", OP.names())
def test_scores_too_large_for_a_bare_exponential(name: str, device: torch.device) -> None:
    """Scores of +-1000: a softmax that does not subtract the row maximum is inf / inf."""
    backend = backend_or_skip(name, device, torch.float32, 128)
    q = torch.full((1, 2, 1, 128), 10.0)
    k = torch.stack([torch.full((1, 1, 128), 8.84), torch.full((1, 1, 128), -8.84)], dim=1)
    v = torch.randn(1, 2, 1, 128)
    out = backend.load()(q.to(device), k.to(device), v.to(device)).cpu()
    assert_exact_enough(out, v[:, :1].expand(1, 2, 1, 128))
