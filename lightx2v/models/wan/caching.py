"""What feature caches know of Wan: how it embeds a timestep, and what was measured of the published checkpoints."""

from collections.abc import Mapping

from torch import Tensor, nn

from lightx2v.cache.figures import Figures
from lightx2v.tokens import sinusoidal


def time_signal(network: nn.Module, timesteps: Tensor, projected: bool) -> Tensor:
    """(N,) -> (N, D), or projected (N, 6 D), float32: the one thing that TeaCache compares for Wan.

    Of frames that are kept clean, at timestep 0, nothing changes: they are left out.
    """
    weight = network.get_parameter("time_embedding.0.weight")
    channels = sinusoidal(timesteps[:, None].to(weight.device), weight.shape[1])
    time = network.get_submodule("time_embedding")(channels.to(weight.dtype))
    return (network.get_submodule("time_projection")(time) if projected else time).float().flatten(1)


# TeaCache: TeaCache4Wan2.1 teacache_generate.py; TI2V 5B: LightX2V configs/caching. MagCache: LightX2V configs/caching,
# which are MagCache4Wan2.1's. Nobody publishes TeaCache figures of Wan2.2 A14B.
T2V_1_3B = Figures(
    "Wan2.1 T2V 1.3B, published",
    tea=(2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    tea_projected=(-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
    mag=(
        1.0, 1.0124, 1.00166, 0.99791, 0.99682, 0.99634, 0.99567, 0.99416, 0.99578, 0.9957,
        0.99511, 0.99535, 0.99552, 0.99541, 0.9954, 0.99489, 0.99518, 0.99484, 0.99481, 0.99415,
        0.99419, 0.99396, 0.99388, 0.99349, 0.99309, 0.9927, 0.99228, 0.99171, 0.99137, 0.99068,
        0.99005, 0.98944, 0.98849, 0.98758, 0.98644, 0.98504, 0.9836, 0.98202, 0.97977, 0.97717,
        0.9741, 0.97003, 0.96538, 0.9593, 0.95086, 0.94013, 0.92402, 0.90241, 0.86821, 0.81838,
    ),
    mag_uncond=(
        1.0, 1.02213, 1.0041, 1.00061, 0.99762, 0.99685, 0.99586, 0.99422, 0.99575, 0.99563,
        0.99506, 0.99531, 0.99549, 0.99539, 0.99536, 0.99485, 0.99514, 0.99478, 0.99479, 0.99413,
        0.99416, 0.99393, 0.99386, 0.99349, 0.99304, 0.9927, 0.99226, 0.9917, 0.99135, 0.99063,
        0.99003, 0.98942, 0.98849, 0.98757, 0.98643, 0.98503, 0.98359, 0.98201, 0.97978, 0.97718,
        0.97411, 0.97002, 0.96541, 0.95933, 0.95089, 0.94019, 0.92414, 0.9026, 0.86868, 0.81939,
    ),
    steps=50,
    # 0.05 to 0.08: ComfyUI-WanVideoWrapper's WanVideoTeaCache node; 0.12: LightX2V configs/caching/magcache.
    usual={"teacache": 0.08, "magcache": 0.12},
)  # fmt: skip
T2V_14B = Figures(
    "Wan2.1 T2V 14B, published",
    tea=(-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    tea_projected=(-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
)
I2V_480P = Figures(
    "Wan2.1 I2V 14B 480P, published",
    tea=(-302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289),
    tea_projected=(257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977),
    mag=(
        1.0, 0.98783, 0.97559, 0.98311, 0.98202, 0.9888, 0.98762, 0.98957, 0.99052, 0.99383,
        0.98857, 0.99065, 0.98845, 0.99057, 0.98957, 0.98601, 0.98823, 0.98756, 0.98808, 0.98721,
        0.98571, 0.98543, 0.98157, 0.98411, 0.97952, 0.98149, 0.9774, 0.97825, 0.97355, 0.97085,
        0.97056, 0.96588, 0.96113, 0.9567, 0.94961, 0.93973, 0.93217, 0.91878, 0.90955, 0.92617,
    ),
    mag_uncond=(
        1.0, 0.98993, 0.97593, 0.98319, 0.98225, 0.98878, 0.98759, 0.98971, 0.99043, 0.99384,
        0.9886, 0.99068, 0.98847, 0.99057, 0.98961, 0.9861, 0.98823, 0.98759, 0.98814, 0.98724,
        0.98572, 0.98544, 0.98165, 0.98413, 0.97953, 0.9815, 0.97742, 0.97826, 0.97361, 0.97087,
        0.97055, 0.96587, 0.96124, 0.95681, 0.94969, 0.93988, 0.93224, 0.91896, 0.90954, 0.92616,
    ),
    steps=40,
)  # fmt: skip
I2V_720P = Figures(
    "Wan2.1 I2V 14B 720P, published",
    tea=(-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    tea_projected=(8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401),
)
TI2V_5B = Figures(
    "Wan2.2 TI2V 5B, published",
    tea=(157472.669, -115702.395, 31076.1669, -3831.16651, 221.608777, -4.81179567),
)
# Variant -> figures; where one layout is several checkpoints, the key is what their names say.
PUBLISHED: Mapping[str, Mapping[str, Figures]] = {
    "wan2.1_t2v_1.3b": {"": T2V_1_3B},
    "wan2.1_t2v_14b": {"": T2V_14B},
    "wan2.1_i2v_14b": {"480p": I2V_480P, "720p": I2V_720P},
    "wan2.2_ti2v_5b": {"": TI2V_5B},
}
