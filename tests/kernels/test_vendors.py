"""The optional attention packages, by stand-ins of their functions: what each is called with, and what comes back.

A stand-in has the true signature (read from the package's source), computes with PyTorch, and keeps its arguments.
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from closeness import assert_exact_enough, relative_error
from lightx2v_kernels import machine, registry
from lightx2v_kernels.registry import Backend

CPU = torch.device("cpu")
Calls = list[dict[str, Any]]


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """(B, L, H, D) as all of them but SageAttention 3."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


def flash_attn2(calls: Calls) -> Callable[..., Any]:
    """flash-attn 2.8.4, flash_attn/flash_attn_interface.py"""

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert dropout_p == 0 and not causal and not return_attn_probs
        calls.append({"q": q, "k": k, "v": v})
        return sdpa(q, k, v, softmax_scale).contiguous()

    return flash_attn_func


def flash_attn3(calls: Calls, returns_pair: bool = False) -> Callable[..., Any]:
    """flash-attention's hopper/flash_attn_interface.py, and fa3-fwd 0.0.3"""

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        assert not causal and qv is None and not return_attn_probs
        calls.append({"q": q, "k": k, "v": v})
        if q.dtype == torch.float8_e4m3fn:
            scales = (q_descale, k_descale, v_descale)
            assert all(s.shape == (q.shape[0], k.shape[2]) and s.dtype == torch.float32 for s in scales)
            q, k, v = (x.float() * s[:, None, :, None] for x, s in zip((q, k, v), scales, strict=True))
            out = sdpa(q, k, v, softmax_scale).bfloat16().contiguous()
        else:
            out = sdpa(q, k, v, softmax_scale).contiguous()
        return (out, out.new_zeros(1)) if returns_pair else out

    return flash_attn_func


def flash_attn4(calls: Calls) -> Callable[..., Any]:
    """flash-attn-4 4.0.0b36, flash_attn/cute/interface.py"""

    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):  # fmt: skip
        assert qv is None and not causal
        calls.append({"q": q, "k": k, "v": v})
        return sdpa(q, k, v, softmax_scale).contiguous(), None

    return flash_attn_func


def sage_attn(calls: Calls) -> Callable[..., Any]:
    """sageattention 1.0.6, core.py: smooths k in place"""

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
        assert tensor_layout == "NHD" and not is_causal and not kwargs
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        calls.append({"q": q, "k": k, "v": v, "smooth_k": smooth_k})
        if smooth_k:
            k -= k.mean(dim=1, keepdim=True)
        return sdpa(q, k, v, sm_scale).contiguous()

    return sageattn


def sage_attn2(calls: Calls) -> Callable[..., Any]:
    """sageattention 2.2.0, core.py"""

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
        assert tensor_layout == "NHD" and not is_causal and not return_lse and not kwargs
        calls.append({"q": q, "k": k, "v": v, "by": "sageattn"})
        return sdpa(q, k, v, sm_scale).contiguous()

    return sageattn


def sage_attn2_sm90(calls: Calls) -> Callable[..., Any]:
    def sageattn_qk_int8_pv_fp8_cuda_sm90(
        q, k, v, tensor_layout="HND", is_causal=False, qk_quant_gran="per_thread", sm_scale=None,
        pv_accum_dtype="fp32+fp32", smooth_k=True, return_lse=False, **kwargs,
    ):  # fmt: skip
        assert tensor_layout == "NHD" and not is_causal and not return_lse and not kwargs
        assert qk_quant_gran in ("per_warp", "per_thread") and pv_accum_dtype == "fp32+fp32" and smooth_k
        calls.append({"q": q, "k": k, "v": v, "by": "sm90"})
        return sdpa(q, k, v, sm_scale).contiguous()

    return sageattn_qk_int8_pv_fp8_cuda_sm90


def sage_attn3(calls: Calls) -> Callable[..., Any]:
    """SageAttention's sageattention3_blackwell/sageattn3/api.py: (B, H, L, D), smooths k in place"""

    def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
        assert attn_mask is None and not is_causal and not kwargs
        calls.append({"q": q.transpose(1, 2), "v": v.transpose(1, 2)})
        k -= k.mean(dim=-2, keepdim=True)
        return F.scaled_dot_product_attention(q, k, v).contiguous()

    return sageattn3_blackwell


def modules(name: str, calls: Calls) -> dict[str, dict[str, Any]]:
    """What a package of that backend puts into sys.modules: module -> its functions."""
    return {
        "flash_attn2": {"flash_attn": {"flash_attn_func": flash_attn2(calls)}},
        "flash_attn3": {"flash_attn_interface": {"flash_attn_func": flash_attn3(calls)}},
        "flash_attn3_fp8": {"flash_attn_interface": {"flash_attn_func": flash_attn3(calls)}},
        "flash_attn4": {"flash_attn": {}, "flash_attn.cute": {"flash_attn_func": flash_attn4(calls)}},
        "sage_attn": {"sageattention": {"sageattn": sage_attn(calls)}},
        "sage_attn2": {
            "sageattention": {
                "sageattn": sage_attn2(calls),
                "sageattn_qk_int8_pv_fp8_cuda_sm90": sage_attn2_sm90(calls),
            }
        },
        "sage_attn3": {"sageattn3": {"sageattn3_blackwell": sage_attn3(calls)}},
    }[name]


NAMES = ("flash_attn2", "flash_attn3", "flash_attn3_fp8", "flash_attn4", "sage_attn", "sage_attn2", "sage_attn3")
BACKENDS = {backend.name: backend for backend in registry.registry("attention").backends}


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Calls]]:
    """Puts stand-ins of a backend's package in the place of the real one."""

    def stand_in(name: str, sm: tuple[int, int] = (9, 0), made: dict[str, dict[str, Any]] | None = None) -> Calls:
        calls: Calls = []
        for module, functions in (made or modules(name, calls)).items():
            found = types.ModuleType(module)
            vars(found).update(functions)
            monkeypatch.setitem(sys.modules, module, found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: sm)
        for name in NAMES:
            BACKENDS[name].load.cache_clear()  # type: ignore[attr-defined]
        return calls

    yield stand_in
    for name in NAMES:
        BACKENDS[name].load.cache_clear()  # type: ignore[attr-defined]


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Slices of one projection, two samples, keys with a mean."""
    q, k, v = torch.randn(2, 33, 3, 4, 64).to(dtype).unbind(2)
    return 2 * q, k + 1, v


@pytest.mark.parametrize("name", NAMES)
def test_every_package_is_called_as_it_wants_to_be(name: str, stood_in: Callable[..., Calls]) -> None:
    calls, args = stood_in(name), inputs(torch.bfloat16)
    before = [x.clone() for x in args]
    out = BACKENDS[name].load()(*args)
    truth = sdpa(*(x.double() for x in args))
    assert len(calls) == 1 and out.dtype == torch.bfloat16 and out.is_contiguous()
    assert out.shape == truth.shape and relative_error(out, truth) < (0.08 if name == "flash_attn3_fp8" else 0.01)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True)), "wrote into its inputs"
    if name != "flash_attn3_fp8":
        for key, given in zip("qkv", args, strict=True):
            if key in calls[0] and (name, key) != ("sage_attn", "k"):
                assert calls[0][key].data_ptr() == given.data_ptr(), f"copied {key}"


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_and_a_gradient(name: str, stood_in: Callable[..., Calls]) -> None:
    stood_in(name)
    attention = BACKENDS[name].load()
    args = inputs(torch.float32)
    compiled = torch.compile(lambda q, k, v: attention(q + 1, k, v) * 2, backend="aot_eager", fullgraph=True)
    limit = 0.08 if name == "flash_attn3_fp8" else 1e-5
    assert_exact_enough(compiled(*args), 2 * sdpa(args[0] + 1, *args[1:]), limit)
    leaves = [x.clone().requires_grad_() for x in args]
    wanted = torch.autograd.grad(sdpa(*leaves).square().sum(), leaves)
    found = torch.autograd.grad(attention(*leaves).square().sum(), leaves)
    for a, b in zip(found, wanted, strict=True):
        assert_exact_enough(a, b, 0.2 if name == "flash_attn3_fp8" else 1e-5)


def test_sage_attn_smooths_the_keys_itself(stood_in: Callable[..., Calls]) -> None:
    calls = stood_in("sage_attn")
    BACKENDS["sage_attn"].load()(*inputs(torch.float32))
    assert calls[0]["smooth_k"] is False and calls[0]["k"].mean(1).abs().max() < 1e-6


@pytest.mark.parametrize(("sm", "by"), [((9, 0), "sm90"), ((8, 9), "sageattn"), ((12, 0), "sageattn")])
def test_sage_attn2_names_its_kernel_on_hopper_alone(
    sm: tuple[int, int], by: str, stood_in: Callable[..., Calls]
) -> None:
    calls = stood_in("sage_attn2", sm)
    BACKENDS["sage_attn2"].load()(*inputs(torch.bfloat16))
    assert calls[0]["by"] == by


@pytest.mark.parametrize("module", ["flash_attn_interface", "fa3_fwd_interface"])
@pytest.mark.parametrize("pair", [False, True], ids=["tensor", "pair"])
def test_flash_attn3_is_the_build_or_the_wheel(module: str, pair: bool, stood_in: Callable[..., Calls]) -> None:
    calls: Calls = []
    stood_in("flash_attn3", made={module: {"flash_attn_func": flash_attn3(calls, pair)}})
    args = inputs(torch.float32)
    assert_exact_enough(BACKENDS["flash_attn3"].load()(*args), sdpa(*args), 1e-5)
    assert BACKENDS["flash_attn3"].why_not(CPU, torch.bfloat16, 128).startswith("needs a cuda device")


def test_a_wheel_that_lacks_something_of_its_own_says_so(
    stood_in: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    stood_in("flash_attn3", made={})

    def broken(name: str) -> None:
        raise ModuleNotFoundError("No module named 'einops'", name="einops")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="einops"):
        BACKENDS["flash_attn3"].load()


def test_heads_of_zeros_survive_fp8() -> None:
    from lightx2v_kernels.attention.flash_attn3 import quantised

    x = torch.randn(2, 5, 3, 16)
    x[:, :, 1] = 0
    values, scale = quantised(x)
    assert scale.shape == (2, 3) and values.shape == x.shape
    restored = values.float() * scale[:, None, :, None]
    assert restored[:, :, 1].abs().max() == 0 and relative_error(restored, x) < 0.04


@pytest.mark.parametrize(
    ("name", "installed", "reason"),
    [
        ("sage_attn", {"sageattention": "1.0.6"}, None),
        ("sage_attn", {"sageattention": "2.2.0"}, "needs sageattention 1.x, 2.2.0 is installed"),
        ("sage_attn2", {"sageattention": "1.0.6"}, "needs sageattention 2.x, 1.0.6 is installed"),
        ("sage_attn2", {"sageattention": "2.2.0+cu130torch2.11"}, None),
        ("sage_attn2", {}, "nothing that is installed is called 'sageattention'"),
        ("flash_attn2", {"flash-attn-4": "4.0.0b36"}, "nothing that is installed is called 'flash-attn'"),
        ("flash_attn4", {"flash-attn-4": "4.0.0b36"}, None),
        ("flash_attn4", {"flash-attn": "2.8.3"}, "nothing that is installed is called 'flash-attn-4'"),
    ],
)
def test_packages_that_share_an_import_name_are_told_apart(
    name: str, installed: dict[str, str], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(distribution: str) -> str:
        if distribution not in installed:
            raise machine.PackageNotFoundError(distribution)
        return installed[distribution]

    monkeypatch.setattr(machine, "version", version)
    monkeypatch.setitem(sys.modules, BACKENDS[name].package, types.ModuleType("stand_in"))
    why = BACKENDS[name].why_not(CPU, torch.bfloat16, 128)
    assert why.startswith(f"{reason} (" if reason and "needs" in reason else reason or "needs a cuda device")


def test_lossy_packages_declare_their_error_and_all_say_what_installs_them() -> None:
    lossy = {name for name in NAMES if BACKENDS[name].max_error is not None}
    assert lossy == {"flash_attn3_fp8", "sage_attn", "sage_attn2", "sage_attn3"}
    for name in NAMES:
        backend: Backend = BACKENDS[name]
        assert backend.package and backend.fix and backend.min_sm and backend.devices == {"cuda"}


@pytest.mark.parametrize("name", ["torch_flash", "torch_cudnn", "torch_efficient"])
def test_pytorchs_kernels_are_given_what_their_operators_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU runs them; here the arguments are held against PyTorch's own schemas, on tensors without data."""
    q, k, v = (torch.empty(2, length, 4, 64, device="meta", dtype=torch.bfloat16) for length in (33, 7, 7))
    out = BACKENDS[name].load()(q, k, v)
    assert out.shape == q.shape and out.dtype == q.dtype
