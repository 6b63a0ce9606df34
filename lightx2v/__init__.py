"""Video diffusion engine: Wan2.1 text-to-video. `from lightx2v import LightX2VPipeline` is the front door."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightx2v.pipeline import LightX2VPipeline

__all__ = ["LightX2VPipeline", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # The pipeline pulls in every stage; ComfyUI nodes import single rooms and should not pay for it.
    if name == "LightX2VPipeline":
        from lightx2v.pipeline import LightX2VPipeline

        return LightX2VPipeline
    raise AttributeError(f"module 'lightx2v' has no attribute '{name}'")
