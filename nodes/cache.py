"""Cache: which steps of the sampler may reuse earlier results, in detail."""

from comfy_api.latest import io

from lightx2v.cache.lookup import published
from lightx2v.config import Cache, one_of

from . import host

CacheOptions = io.Custom("LIGHTX2V_CACHE")  # a lightx2v.config.Cache
METHODS = ("teacache", "magcache")
OWN = "auto"


class LightX2VCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LightX2VCache",
            display_name="Cache (LightX2V)",
            category="LightX2V/sampling",
            description="Settings of TeaCache and MagCache, which skip steps that hardly change the result.",
            inputs=[
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="teacache: watches how the timestep's embedding changes. magcache: goes by how the "
                    "result's magnitude changed when the model was measured. Both are off at 8 steps or fewer.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.15,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Error that may add up before a step is computed again; 0 is off. TeaCache: 0.05 to "
                    "0.08 for Wan2.1 1.3B, 0.15 to 0.3 for 14B. MagCache: 0.06 to 0.24.",
                ),
                io.Boolean.Input(
                    "use_ret_steps",
                    default=False,
                    tooltip="TeaCache only: compute the first 5 steps and read the embedding as the blocks do. Has "
                    "coefficients of its own; thresholds of 0.2 to 0.26 are usual with it.",
                ),
                io.Int.Input(
                    "max_skips",
                    default=6,
                    min=0,
                    max=100,
                    tooltip="MagCache only: steps skipped in a row at most (K). 2 is careful, 6 fast.",
                ),
                io.Float.Input(
                    "retention_ratio",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="MagCache only: share of the steps that are computed at the start, where the scene is laid "
                    "out. 0.2 is 10 of 50 steps.",
                ),
                io.Combo.Input(
                    "figures",
                    options=[OWN, *published()],
                    default=OWN,
                    tooltip="What was measured of the model. auto: the .cache.json next to its file, else the "
                    "published ones that fit. Name one of the 5 for a file whose name does not say 480p or 720p.",
                ),
            ],
            outputs=[CacheOptions.Output("options", display_name="cache options")],
        )

    @classmethod
    def execute(
        cls,
        method: str,
        threshold: float,
        use_ret_steps: bool,
        max_skips: int,
        retention_ratio: float,
        figures: str,
    ) -> io.NodeOutput:
        one_of("figures", figures, (OWN, *published()))  # the library reads files by this name; a graph may not
        named = "" if figures == OWN else figures
        return io.NodeOutput(Cache(method, threshold, use_ret_steps, max_skips, retention_ratio, named))
