"""The ComfyUI nodes: the only part of the pack that knows ComfyUI. No tensor maths and no loop over steps here."""

from comfy_api.latest import ComfyExtension, io

from .cache import LightX2VCache
from .condition import LightX2VEmptyLatent, LightX2VTextEncode
from .decode import LightX2VDecode
from .image import LightX2VImageEncode, LightX2VImageToVideo, LightX2VLoadImageEncoder
from .load import LightX2VLoadModel, LightX2VLoadModelMoE, LightX2VLoadTextEncoder
from .lora import LightX2VLoRA
from .parallel import LightX2VParallel
from .report import LightX2VReport
from .sample import LightX2VSampler
from .vae import LightX2VLoadVAE


class LightX2VExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LightX2VLoadModel,
            LightX2VLoadModelMoE,
            LightX2VLoRA,
            LightX2VLoadTextEncoder,
            LightX2VTextEncode,
            LightX2VLoadImageEncoder,
            LightX2VImageEncode,
            LightX2VImageToVideo,
            LightX2VEmptyLatent,
            LightX2VCache,
            LightX2VParallel,
            LightX2VSampler,
            LightX2VLoadVAE,
            LightX2VDecode,
            LightX2VReport,
        ]


async def comfy_entrypoint() -> LightX2VExtension:
    return LightX2VExtension()
