"""The frames as a clip without a past, so that the kernels of clips serve."""

from torch import Tensor

from lightx2v_kernels.conv3d._triton import conv3d
from lightx2v_kernels.conv_input._triton import conv_input


def conv2d_relu(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """See the contract in `__init__`."""
    clip, beside = (None if a is None else a.permute(1, 0, 2, 3)[None] for a in (x, residual))
    assert clip is not None
    padded = conv_input(clip, None, (weight.shape[2] // 2, weight.shape[3] // 2), False, 1)
    return conv3d(padded, None, weight[:, :, None], bias, beside, True)[0].permute(1, 0, 2, 3)
