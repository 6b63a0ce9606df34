"""The assert that all the others lean on goes red when it must."""

import pytest
import torch

from closeness import assert_close, assert_exact_enough, relative_error


@pytest.fixture
def truth() -> torch.Tensor:
    return torch.randn(64, 64, dtype=torch.float64)


def test_what_rounding_does_is_close(truth: torch.Tensor) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_close("x", truth.to(dtype), truth, truth.to(dtype))
    assert_close("bf16", truth.bfloat16(), truth.float(), truth.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_twice_the_error_of_plain_pytorch_passes_and_three_times_fails(dtype: torch.dtype) -> None:
    truth = torch.ones(1000, dtype=torch.float64)
    step = 16 * torch.finfo(dtype).eps  # exact in every dtype, and far above the rounding floor
    plain = (truth + step).to(dtype)
    assert_close("twice", (truth + 2 * step).to(dtype), truth, plain)
    with pytest.raises(AssertionError, match="thrice: relative error"):
        assert_close("thrice", (truth + 3 * step).to(dtype), truth, plain)


def test_one_wrong_element_fails_by_its_peak() -> None:
    truth = torch.ones(1_000_000, dtype=torch.float64)
    out = truth.bfloat16()
    out[123_456] += 0.25  # 2.5e-4 of the norm: under the floor of bf16, and plainly wrong
    with pytest.raises(AssertionError, match="peak error"):
        assert_close("x", out, truth, truth.bfloat16())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_fail(truth: torch.Tensor, value: float) -> None:
    out = truth.float()
    out[3, 5] = value
    with pytest.raises(AssertionError, match="1 of 4096 values are not finite"):
        assert_close("x", out, truth, truth.float())
    with pytest.raises(AssertionError, match="not finite"):
        assert_exact_enough(out, truth.float())
    with pytest.raises(AssertionError, match="not finite"):
        assert_exact_enough(out, out)


def test_a_nan_in_the_reference_does_not_pass_for_agreement(truth: torch.Tensor) -> None:
    out = truth.float()
    truth[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="relative error nan"):
        assert_close("x", out, truth, out)


def test_transposed_values_and_other_shapes_and_dtypes_fail(truth: torch.Tensor) -> None:
    out = truth.float()
    with pytest.raises(AssertionError, match="relative error"):
        assert_close("x", out.T, truth, out)
    with pytest.raises(AssertionError, match="shape"):
        assert_close("x", out.flatten(), truth, out)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close("x", out.bfloat16(), truth, out)
    with pytest.raises(AssertionError, match="relative error"):
        assert_exact_enough(out.T, out)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_exact_enough(out[:1], out)  # would broadcast


def test_a_reference_as_narrow_as_the_output_is_a_mistake_of_the_test(truth: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be float32 or float64, got torch.bfloat16"):
        assert_close("x", truth.bfloat16(), truth.bfloat16(), truth.bfloat16())


def test_the_figures_themselves() -> None:
    b = torch.tensor([3.0, 4.0])
    assert relative_error(b, b) == 0
    assert relative_error(b + torch.tensor([0.0, 0.5]), b) == pytest.approx(0.1)
    assert relative_error(b, torch.zeros(2)) == float("inf")
    assert_exact_enough(b * (1 + 5e-7), b)
    with pytest.raises(AssertionError, match=r"above 1.00e-06"):
        assert_exact_enough(b * (1 + 3e-6), b)
