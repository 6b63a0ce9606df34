"""Patches of latents as tokens: what the convolution of the checkpoints gives, and where it has to lie."""

import pytest
import torch
from torch import nn

from closeness import assert_close
from lightx2v.tokens import patch_tokens


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 1), (2, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_over_patches_is_the_convolution(patch: tuple[int, int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv3d(5, 24, patch, patch).to(dtype).requires_grad_(False)
    x = torch.randn(2, 5, 4, 6, 8, generator=generator).to(dtype)
    found = patch_tokens(conv, x.transpose(3, 4).contiguous().transpose(3, 4))
    assert found.is_contiguous(), "blocks read whole rows"
    plain = conv(x).flatten(2).transpose(1, 2)
    wide = conv.double()(x.double()).flatten(2).transpose(1, 2)
    assert_close(f"patches {patch}", found, wide, plain)
