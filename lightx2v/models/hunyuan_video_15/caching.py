"""What feature caches know of HunyuanVideo-1.5: how it embeds a timestep, and what was measured of published files."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from lightx2v.cache.figures import Figures


def time_signal(network: nn.Module, timesteps: Tensor, projected: bool) -> Tensor:
    """(N,) -> (N, D), or projected (N, 2 D), float32: the embedding of each timestep, alone or as the head modulates by
    it: every block has a projection of its own. A step's end, which distilled models read too, is left out.

    LightX2V compares the tokens themselves instead, which its published TeaCache figures belong to: they are not these.
    """
    weight = network.get_parameter("time_in.mlp.0.weight")
    time = F.silu(network.get_submodule("time_in")(timesteps.to(weight.device)).float())
    if projected:
        head = network.get_parameter("final_layer.linear.weight")
        time = network.get_submodule("final_layer.adaLN_modulation")(time.to(head.dtype))
    return time.float()


# LightX2V configs/hunyuan_video_15/cache/hy_15_i2v_480p_magcache.json.
I2V_480P = Figures(
    "HunyuanVideo-1.5 480p I2V, published",
    mag=(
        1.0, 1.01562, 1.00781, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0,
        1.0, 0.99609, 1.0, 0.99609, 1.0, 0.99609, 1.0, 0.99609, 0.99609, 0.99609,
        0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609,
        0.99609, 0.99219, 0.99219, 0.99219, 0.98828, 0.98828, 0.98828, 0.98828, 0.98438, 0.98438,
        0.98047, 0.98047, 0.97656, 0.97266, 0.96484, 0.95703, 0.94922, 0.92969, 0.91016, 0.88672,
    ),
    mag_uncond=(
        1.0, 1.02344, 1.00781, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0,
        1.0, 0.99609, 1.0, 0.99609, 1.0, 0.99609, 1.0, 0.99609, 0.99609, 0.99609,
        0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609,
        0.99609, 0.99219, 0.99219, 0.99219, 0.99219, 0.98828, 0.98828, 0.98828, 0.98438, 0.98438,
        0.98047, 0.98047, 0.97656, 0.97266, 0.96484, 0.95703, 0.94922, 0.93359, 0.91016, 0.88672,
    ),
    steps=50,
    shift=5.0,
)  # fmt: skip
# What a checkpoint's name says -> figures; its layout tells nothing.
PUBLISHED: Mapping[str, Figures] = {"480p_i2v": I2V_480P}
