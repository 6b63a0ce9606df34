"""What the registry takes, refuses and says. Bad backends are injected as values, so there is nothing to undo."""

import copy
import logging
import re
import subprocess
import sys
import types
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import Tensor

import lightx2v_kernels
from lightx2v_kernels import UnsupportedBackendError, registry
from lightx2v_kernels.registry import Backend, Registry

CPU = torch.device("cpu")
HERE = (CPU, torch.float32, 128)


def attention_with(*backends: Backend) -> Registry:
    """The attention registry with more backends, and an op of its own, so that no cached verdict is met."""
    found = registry.registry("attention")
    return Registry(replace(found.op), (*found.backends, *backends))


def injected(fn: object, **limits: object) -> Backend:
    return Backend("attention", "injected", lambda: fn, **{"rank": 1, **limits})


def good(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def test_every_op_has_a_reference_that_auto_tries_last() -> None:
    assert {"attention", "rms_norm", "modulate", "rope", "norm_rope", "quantize"} <= set(registry.registries())
    for op in registry.registries():
        assert registry.names(op)[-1] == "reference"
        assert registry.select(op, "reference", *HERE).name == "reference"
    assert registry.choices("attention")[:3] == ("auto", "exact", registry.names("attention")[0])


def test_unknown_op_lists_the_known() -> None:
    with pytest.raises(UnsupportedBackendError, match=r"unknown op 'conv'; known: attention, .* or rope"):
        registry.names("conv")


def test_auto_takes_the_best_rank_that_is_capable() -> None:
    assert attention_with(injected(good)).select("auto", *HERE).name == "injected"
    assert attention_with(injected(good, rank=95)).select("auto", *HERE).name == "torch_sdpa"
    assert attention_with(injected(good, min_sm=(9, 0))).select("auto", *HERE).name == "torch_sdpa"


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda q, k, v: good(q, k, v) * 1.001, "relative error"),
        (lambda q, k, v: good(q / 1.01, k, v), "relative error"),
        (lambda q, k, v: good(q, k[:, :-1], v[:, :-1]), "relative error"),
        (lambda q, k, v: torch.empty_like(q), "not finite"),
        (lambda q, k, v: good(q, k, v).bfloat16(), "dtype torch.bfloat16, expected torch.float32"),
        (lambda q, k, v: good(q, k, v).transpose(1, 2), "shape"),
        (lambda q, k, v: good(q.contiguous(), k, v) if q.is_contiguous() else v, "relative error"),
        (lambda q, k, v: 1 / 0, "its self-test raised ZeroDivisionError: division by zero"),
        (lambda q, k, v: (good(q, k, v), None), "its self-test raised TypeError: an op returns a Tensor"),
        (lambda q, k, v: (good(q, k, v), v), "dtype torch.float32 and torch.float32, expected torch.float32"),
        (None, "its self-test raised TypeError"),
    ],
    ids=[
        "scaled",
        "wrong-scale",
        "last-key",
        "unwritten",
        "dtype",
        "layout",
        "strided-only",
        "raises",
        "no-tensor",
        "two-results",
        "no-function",
    ],
)
def test_auto_passes_over_a_backend_that_fails_its_self_test_and_a_named_one_raises(
    fn: object, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = attention_with(injected(fn))
    with caplog.at_level(logging.INFO, "lightx2v_kernels"):
        assert found.select("auto", *HERE).name == "torch_sdpa"
    assert "passed over: injected: its self-test" in caplog.text and reason in caplog.text
    with pytest.raises(UnsupportedBackendError, match=r"use auto, torch_sdpa or reference instead") as raised:
        found.select("injected", *HERE)
    assert reason in str(raised.value)


def test_a_package_whose_import_breaks_is_passed_over() -> None:
    def load() -> object:
        raise ImportError("libcudart.so.99: cannot open shared object file")

    found = attention_with(Backend("attention", "injected", load, rank=1))
    assert found.select("auto", *HERE).name == "torch_sdpa"
    with pytest.raises(UnsupportedBackendError, match="ImportError: libcudart"):
        found.select("injected", *HERE)


def test_a_full_gpu_is_not_a_verdict_on_the_kernel() -> None:
    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if tried.append(1) or len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return good(q, k, v)

    tried: list[int] = []
    found = attention_with(injected(full))
    with pytest.raises(torch.OutOfMemoryError):
        found.select("auto", *HERE)
    assert found.select("auto", *HERE).name == "injected"


def test_the_self_test_runs_and_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []
    found = attention_with(injected(lambda *qkv: calls.append(1) or good(*qkv)))
    with caplog.at_level(logging.INFO, "lightx2v_kernels"):
        for _ in range(3):
            found.select("auto", *HERE)
    assert len(calls) == len(found.op.examples(*HERE))
    assert [r.getMessage() for r in caplog.records] == ["attention: injected on cpu, float32, head_dim 128"]


def test_a_lossy_backend_runs_when_named_and_is_never_taken_by_auto() -> None:
    def lossy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return good(q, k, v) * 1.02

    found = attention_with(injected(lossy, max_error=0.05))
    assert found.select("injected", *HERE).name == "injected"
    assert found.select("auto", *HERE).name == "torch_sdpa"
    with pytest.raises(UnsupportedBackendError, match=r"above the 1.00e-02 that it declares"):
        attention_with(injected(lossy, max_error=0.01)).select("injected", *HERE)


def test_nothing_capable_names_every_reason() -> None:
    op = registry.registry("attention").op
    found = Registry(op, (injected(good, package="no_such_package"), replace(injected(good, min_sm=(9, 0)), name="b")))
    with pytest.raises(UnsupportedBackendError) as raised:
        found.select("auto", *HERE)
    assert str(raised.value) == (
        "no attention backend can run on cpu, float32, head_dim 128: "
        "b: needs an NVIDIA GPU (sm_90 or newer), got cpu; "
        "injected: package 'no_such_package' is not installed (pip install no_such_package)"
    )
    with pytest.raises(UnsupportedBackendError, match="none is registered"):
        Registry(op).select("auto", *HERE)


def test_a_named_backend_that_cannot_run_gives_all_its_reasons_at_once() -> None:
    backend = injected(
        good,
        package="no_such_package",
        fix="pip install no-such-package --no-build-isolation",
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16}),
        head_dims=frozenset({64, 96}),
    )
    with pytest.raises(UnsupportedBackendError) as raised:
        attention_with(backend).select("injected", *HERE)
    assert str(raised.value) == (
        "attention backend 'injected' cannot run on cpu, float32, head_dim 128: "
        "package 'no_such_package' is not installed (pip install no-such-package --no-build-isolation); "
        "needs a cuda device, got cpu; needs dtype bfloat16, got float32; needs head_dim 64 or 96, got 128; "
        "use auto, torch_sdpa or reference instead"
    )


@pytest.mark.parametrize(
    ("low", "high", "sm", "reason"),
    [
        ((9, 0), (9, 0), (9, 0), None),
        ((9, 0), (9, 0), (10, 0), "needs sm_90, this GPU is sm_100"),
        ((8, 0), (8, 9), (9, 0), "needs sm_80 to sm_89, this GPU is sm_90"),
        ((8, 0), None, (7, 5), "needs sm_80 or newer, this GPU is sm_75"),
        ((8, 0), None, (12, 0), None),
        (None, (8, 9), (9, 0), "needs sm_89 or older, this GPU is sm_90"),
    ],
)
def test_compute_capability(
    low: tuple[int, int] | None,
    high: tuple[int, int] | None,
    sm: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: sm)
    monkeypatch.setattr(torch.version, "hip", None)
    assert injected(good, min_sm=low, max_sm=high).why_not(torch.device("cuda", 0), torch.float32, 128) == reason


def test_refused_dtypes_and_absent_gpus_are_named() -> None:
    with pytest.raises(UnsupportedBackendError, match=r"needs dtype bfloat16, float16 or float32, got float64"):
        registry.select("attention", "torch_sdpa", CPU, torch.float64, 128)
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedBackendError, match=r"PyTorch .* sees no GPU; use device 'cpu'"):
            registry.select("attention", "auto", torch.device("cuda"), torch.float32, 128)


def test_unknown_names_and_names_of_upstream() -> None:
    with pytest.raises(
        UnsupportedBackendError, match=r"^unknown attention backend 'sdpa'; known: auto, exact, .*torch_sdpa.* or refer"
    ):
        registry.select("attention", "sdpa", *HERE)
    for name, (why, nearest) in {
        "radial_attn": ("a sparse attention", "auto"),
        "spas_sage_attn3": ("a sparse attention", "sage_attn3"),
        "npu_flash_attn": ("for hardware", "torch_sdpa"),
        "ring": ("several GPUs", "auto"),
        "sage_attn2_k_int8_v_fp8": ("its kernels are those of", "sage_attn2"),
    }.items():
        wanted = rf"^attention backend '{name}': .*{why}.*'{nearest}'.*; known: auto, exact, .* or reference$"
        with pytest.raises(UnsupportedBackendError, match=wanted):
            registry.select("attention", name, *HERE)


def test_every_name_of_lightx2v_is_here_or_is_answered() -> None:
    """Its registered names (lightx2v/common/ops/attn, lightx2v_platform/ops/attn) and those of its config files."""
    theirs = (
        "aiter_attn draft_attn dreamzero_cross_fa dreamzero_fa2 dynamic_sparse_attn flash_attn2 flash_attn3 "
        "flash_attn4 flash_attn_enflame_gcu flash_attn_hygon_dcu flex_attn general_sparse_attn iluvatar_flash_attn "
        "intel_xpu_cute_attn intel_xpu_flash_attn metax_sage_attn2 mlu_flash_attn mlu_sage_attn nbhd_attn "
        "nbhd_attn_flashinfer npu_flash_attn radial_attn rainfusion_attn ring sage_attn sage_attn2 "
        "sage_attn2_k_int8_v_fp8 sage_attn3 sol_attn sparge_attn spas_flash_attn4 spas_sage_attn spas_sage_attn2 "
        "spas_sage_attn3 svg2_attn svg_attn swiftvr_mfswa torch_sdpa ulysses ulysses-4090"
    )
    found = registry.registry("attention")
    assert set(theirs.split()) - set(found.names()) == set(found.elsewhere)
    named = {name for why in found.elsewhere.values() for name in re.findall(r"'([^']+)'", why)}
    assert named <= set(found.choices()), "what is recommended instead exists"


def test_a_name_is_registered_once_and_for_its_op() -> None:
    found = registry.registry("attention")
    more = found.register(injected(good))
    assert more.names()[0] == "injected" and "injected" not in found.names()
    with pytest.raises(ValueError, match=r"attention backend 'injected' is registered twice"):
        more.register(injected(good))
    with pytest.raises(ValueError, match="'auto' is registered twice"):
        found.register(replace(injected(good), name="auto"))
    with pytest.raises(ValueError, match="backend 'injected' is for op 'rope', not for 'attention'"):
        found.register(replace(injected(good), op="rope"))
    with pytest.raises(FrozenInstanceError):
        found.backends = ()


def test_refusals_tell_for_every_backend_without_running_any() -> None:
    found = attention_with(injected(lambda *_: pytest.fail("ran"), head_dims=frozenset({64})))
    refusals = found.refusals(*HERE)
    assert refusals["injected"] == "needs head_dim 64, got 128"
    assert [name for name, why in refusals.items() if why is None] == ["torch_sdpa", "reference"]


def test_packages_are_probed_and_never_imported(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vendor_kernels.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert injected(good, package="vendor_kernels").why_not(*HERE) is None
    monkeypatch.setitem(sys.modules, "shadowed", None)  # how an import is forbidden
    assert "not installed" in injected(good, package="shadowed").why_not(*HERE)
    monkeypatch.setitem(sys.modules, "spec_less", types.ModuleType("spec_less"))  # find_spec would raise on this one
    assert injected(good, package="spec_less").why_not(*HERE) is None


def test_import_does_nothing_but_define() -> None:
    """No backend file, no optional package and no device is touched until something is selected."""
    code = (
        f"ALONE = {['backend', 'closeness', 'machine', 'quantized', 'registry', 'timings']}\n"
        "import sys, torch, lightx2v_kernels as k\n"
        "loaded = [m for m in sys.modules if m.startswith('lightx2v_kernels.')]\n"
        "assert set(loaded) == {f'lightx2v_kernels.{name}' for name in ALONE}, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
        "k.select(device=torch.device('cpu'), dtype=torch.float32, head_dim=128)\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=registry.__file__.rsplit("/lightx2v_kernels", 1)[0])


def test_selection_leaves_the_random_state_alone_and_ignores_default_devices() -> None:
    before = torch.get_rng_state()
    with torch.device("meta"), torch.inference_mode():
        attention_with().select("auto", *HERE)
    assert torch.equal(before, torch.get_rng_state())


def test_kernels() -> None:
    kernels = lightx2v_kernels.select(device=CPU, dtype=torch.float32, head_dim=128)
    of_vaes = {"conv_input", "conv3d", "doubled_conv", "conv2d_relu"}
    of_others = {"int8_linear", "fp8_linear", "gguf_linear", "nvfp4_linear", "mxfp8_linear"} | of_vaes
    assert set(kernels.names) == ({*registry.registries()} | {"cross_attention"}) - of_others
    for op, name in kernels.names.items():
        assert getattr(kernels, op) is registry.select(op.removeprefix("cross_"), name, *HERE).load()
    named = lightx2v_kernels.select(attention="reference", device=CPU, dtype=torch.float32, head_dim=128)
    assert named.names == {**kernels.names, "attention": "reference"}, "cross-attention is chosen by itself"
    assert copy.deepcopy(named) == named != kernels and hash(named) != hash(kernels)
    with pytest.raises(UnsupportedBackendError, match=r"'flash_attn3' cannot run on cpu.* package 'flash_attn_int"):
        lightx2v_kernels.select(attention="flash_attn3", device=CPU, dtype=torch.float32, head_dim=128)
