"""Pictures: what an image encoder sees in them, and a video's first and last frames, in ComfyUI's own CONDITIONING."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_management as mm
import comfy.sd
import node_helpers
import torch
from comfy_api.latest import io
from torch import Tensor

from lightx2v.checkpoint import CheckpointError, read_header
from lightx2v.frames import Encode, whole_clips
from lightx2v.latents import HUNYUAN15, WAN21, WAN22, LatentFormat
from lightx2v.models.hunyuan_video_15 import conditioning as hunyuan
from lightx2v.models.wan.conditioning import image_condition, image_latent
from lightx2v.offload.shortage import unless_lost
from lightx2v.shapes import VideoShape, snap, to_latent
from lightx2v.vae.loading import FullVAE
from lightx2v.vae.padded import encode_padded
from lightx2v.vision import clip, layout, siglip

from . import host
from .condition import PATCH, PATCHES
from .vae import EngineVAE

ImageEncoder = io.Custom("LIGHTX2V_IMAGE_ENCODER")
SPACES: dict[int, LatentFormat] = {space.channels: space for space in (WAN21, WAN22, HUNYUAN15)}
Conditioning = list[tuple[Tensor, dict[str, Any]]]


@dataclass(frozen=True)
class LoadedImageEncoder:
    encoder: clip.ImageEncoder | siglip.ImageEncoder
    handle: host.EngineHandle


class LightX2VLoadImageEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LightX2VLoadImageEncoder",
            display_name="Load Image Encoder (LightX2V)",
            category="LightX2V/loaders",
            description="Loads CLIP ViT-H/14, the image encoder of Wan2.1's image-to-video models, in Wan's own, "
            "ComfyUI's, transformers' or LightX2V's 8-bit layout, or SigLIP, that of HunyuanVideo-1.5. Wan2.2 needs "
            "none.",
            inputs=[
                io.Combo.Input(
                    "image_encoder",
                    options=host.files("clip_vision", _is_image_encoder),
                    tooltip="CLIP ViT-H/14 files of models/clip_vision, e.g. clip_vision_h.safetensors (1.3 GB) or "
                    "Wan's models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth (4.8 GB, of which 2.5 GB are read). "
                    "HunyuanVideo-1.5: sigclip_vision_patch14_384.safetensors (0.9 GB).",
                ),
            ],
            outputs=[ImageEncoder.Output("encoder", display_name="image encoder")],
        )

    @classmethod
    def fingerprint_inputs(cls, image_encoder: str, **_: Any) -> tuple[str, int, int]:
        return host.fingerprint("clip_vision", image_encoder)

    @classmethod
    def execute(cls, image_encoder: str) -> io.NodeOutput:
        device, resting = mm.text_encoder_device(), mm.text_encoder_offload_device()
        path = host.locate("clip_vision", image_encoder)
        encoder = siglip.load(path, device=resting) if _is_siglip(path) else clip.load(path, device=resting)
        handle = host.EngineHandle(host.Housed(encoder.model), device, resting)
        return io.NodeOutput(LoadedImageEncoder(encoder, handle))


class LightX2VImageEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LightX2VImageEncode",
            display_name="Image Encode (LightX2V)",
            category="LightX2V/conditioning",
            description="Shows a picture to the image encoder. The result also fits ComfyUI's own Wan and "
            "HunyuanVideo-1.5 nodes, and this pack's take that of CLIP Vision Encode.",
            inputs=[
                ImageEncoder.Input("encoder", tooltip="From Load Image Encoder (LightX2V)."),
                io.Image.Input(
                    "image",
                    tooltip="The first or last frame, of any size; CLIP sees 224 x 224 of it, SigLIP 384 x 384.",
                ),
                io.Combo.Input(
                    "crop",
                    options=list(clip.CROPS),
                    default="none",
                    tooltip="none: the whole picture, squeezed to a square of 224 pixels, as Wan does, or 384, as "
                    "HunyuanVideo-1.5 does. center: the middle square; of 832 x 480 it leaves out 42 %.",
                ),
                host.advanced(
                    io.Combo.Input(
                        "resize",
                        options=list(clip.RESIZES),
                        default="wan",
                        optional=True,
                        tooltip="wan: bicubic without a filter, as Wan's own program. comfyui: filtered and rounded to "
                        "8 bits, for the numbers of CLIP Vision Encode; SigLIP is always shown pictures so.",
                    )
                ),
            ],
            outputs=[io.ClipVisionOutput.Output("features", display_name="CLIP vision output")],
        )

    @classmethod
    def execute(cls, encoder: LoadedImageEncoder, image: Tensor, crop: str, resize: str = "wan") -> io.NodeOutput:
        eyes = encoder.encoder
        if isinstance(eyes, siglip.ImageEncoder):
            host.on_gpu(encoder.handle, siglip.activation_bytes(eyes.size, len(image)))
            found = eyes.features(image, crop=crop, on_block=host.progress())
        else:
            host.on_gpu(encoder.handle, clip.activation_bytes(eyes.size, len(image)))
            found = eyes.features(image, crop=crop, resize=resize, on_block=host.progress())
        return io.NodeOutput(
            _native_features(
                last_hidden_state=found.last,
                penultimate_hidden_states=found.penultimate,
                image_embeds=found.embedding,
                mm_projected=None,
            )
        )


class LightX2VImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LightX2VImageToVideo",
            display_name="Image To Video (LightX2V)",
            category="LightX2V/conditioning",
            description="Gives a video its first frame, its last frame or both. Writes what ComfyUI's own Wan and "
            "HunyuanVideo-1.5 nodes write, so that either side's samplers take it.",
            inputs=[*cls._main_inputs(), *cls._images()],
            outputs=[
                io.Conditioning.Output("positive_out", display_name="positive"),
                io.Conditioning.Output("negative_out", display_name="negative"),
                io.Latent.Output("latent", display_name="latent"),
            ],
        )

    @staticmethod
    def _main_inputs() -> list[io.Input]:
        side = "Pixels, a multiple of 16; of 32 for TI2V-5B. Pictures are cut to these proportions and resized."
        return [
            io.Conditioning.Input("positive", tooltip="What to show; from this pack's or ComfyUI's own text encode."),
            io.Conditioning.Input("negative", tooltip="What to avoid; the pictures are written into both."),
            io.Vae.Input(
                "vae",
                tooltip="The model's own: the Wan2.1 VAE (16 channels) for Wan2.1 and Wan2.2 A14B, the Wan2.2 VAE (48 "
                "channels) for TI2V-5B, the HunyuanVideo-1.5 VAE (32 channels). Which of them tells how pictures are "
                "given.",
            ),
            io.Int.Input("width", default=832, min=16, max=8192, step=16, tooltip=side),
            io.Int.Input("height", default=480, min=16, max=8192, step=16, tooltip=side),
            io.Int.Input(
                "length",
                default=81,
                min=1,
                max=4097,
                step=4,
                tooltip="Frames, 4n + 1: 81 frames are 5 seconds at Wan's 16 frames per second, 121 at "
                "HunyuanVideo-1.5's 24.",
            ),
            io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Videos made at once, usually 1."),
        ]

    @staticmethod
    def _images() -> list[io.Input]:
        return [
            io.Image.Input("start_image", optional=True, tooltip="The first frame; several are the first frames."),
            io.Image.Input(
                "end_image",
                optional=True,
                tooltip="The last frame; several are the last frames. For FLF2V and Wan2.2 I2V-A14B; not for TI2V-5B "
                "and HunyuanVideo-1.5.",
            ),
            io.ClipVisionOutput.Input(
                "clip_vision_start_image",
                optional=True,
                tooltip="Of the start image, 257 tokens, from Image Encode (LightX2V) or CLIP Vision Encode. Wan2.1 "
                "reads it, Wan2.2 does not. HunyuanVideo-1.5 reads 729 of SigLIP.",
            ),
            io.ClipVisionOutput.Input(
                "clip_vision_end_image",
                optional=True,
                tooltip="Of the end image, 257 tokens more; for Wan2.1 FLF2V.",
            ),
        ]

    @classmethod
    def execute(
        cls,
        positive: Conditioning,
        negative: Conditioning,
        vae: comfy.sd.VAE,
        width: int,
        height: int,
        length: int,
        batch_size: int,
        **images: Any,
    ) -> io.NodeOutput:
        space = _space(vae)
        video, note = snap(VideoShape(length, height, width), space, PATCHES.get(space, PATCH))
        if note:
            host.log.warning(note)
        start, end = images.get("start_image"), images.get("end_image")
        latent, written = _given(vae, video, space, batch_size, start, end)
        features = _joined(images.get("clip_vision_start_image"), images.get("clip_vision_end_image"))
        if features is not None:
            written["clip_vision_output"] = features
        positive, negative = (node_helpers.conditioning_set_values(given, written) for given in (positive, negative))
        return io.NodeOutput(positive, negative, latent)


def _space(vae: comfy.sd.VAE) -> LatentFormat:
    if vae.latent_channels not in SPACES:
        raise ValueError(
            f"this VAE has {vae.latent_channels} latent channels; Wan's have 16 (wan_2.1_vae.safetensors) or 48 "
            "(wan2.2_vae.safetensors, for TI2V-5B), HunyuanVideo-1.5's 32 (hunyuanvideo15_vae_fp16.safetensors): "
            "connect one of these"
        )
    return SPACES[vae.latent_channels]


def _given(
    vae: comfy.sd.VAE, video: VideoShape, space: LatentFormat, batch: int, start: Tensor | None, end: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """ComfyUI's LATENT, and what to write into a CONDITIONING, of a video with these first and last frames."""
    device = mm.intermediate_device()
    if space is WAN22:
        if end is not None:
            raise ValueError("TI2V-5B takes a start image only; disconnect end_image, or use Wan2.2 I2V-A14B")
        samples, kept = image_latent(_encode(vae), video, space, start, batch=batch)
        latent = {"samples": samples.to(device)}
        return latent if kept is None else {**latent, "noise_mask": kept.to(device)}, {}
    latent = {"samples": torch.zeros(batch, space.channels, *to_latent(video, space.stride), device=device)}
    if start is None and end is None:
        return latent, {}
    condition = hunyuan.image_condition if space is HUNYUAN15 else image_condition
    found = condition(_encode(vae), video, space, start=start, end=end)
    return latent, {
        "concat_latent_image": found.latents.to(device),
        "concat_mask": found.concat_mask.to(device),
    }


def _encode(vae: comfy.sd.VAE) -> Encode:
    """This pack's VAEs leave out what repeats itself between the pictures; others encode every grey frame."""
    # ComfyUI's VAE objects take frames (F, H, W, 3) in [0, 1].
    whole = whole_clips(lambda frames: vae.encode(frames[0].permute(1, 2, 3, 0) * 0.5 + 0.5))
    network = vae.first_stage_model.network if isinstance(vae, EngineVAE) else None
    if not isinstance(network, FullVAE):
        return whole

    def padded(num_frames: int, *, start: Tensor | None, end: Tensor | None) -> Tensor:
        height, width = next(frames.shape[3:] for frames in (start, end) if frames is not None)
        host.on_gpu(vae.patcher, vae.memory_used_encode((1, 3, num_frames, height, width), vae.vae_dtype))
        try:
            on_chunk = host.progress()
            return unless_lost(lambda: encode_padded(network, num_frames, start=start, end=end, on_chunk=on_chunk))
        except mm.OOM_EXCEPTION:
            host.log.warning("Too little GPU memory to encode %d frames at once; ComfyUI tries tiles", num_frames)
        return whole(num_frames, start=start, end=end)

    return padded


def _joined(start: Any, end: Any) -> Any:
    """The features of both pictures as FLF2V reads them, one after the other; or those that there are."""
    if start is None or end is None:
        return start if end is None else end
    states = [features.penultimate_hidden_states for features in (start, end)]
    return _native_features(penultimate_hidden_states=torch.cat(states, dim=-2))


def _native_features(**parts: Tensor | None) -> comfy.clip_vision.Output:
    features = comfy.clip_vision.Output()
    for name, part in parts.items():
        features[name] = None if part is None else part.to(mm.intermediate_device())
    return features


def _is_siglip(path: Path) -> bool:
    try:
        siglip.open_encoder(path)
    except CheckpointError:
        return False
    return True


def _is_image_encoder(path: Path) -> bool:
    if not _is_siglip(path):
        layout.sizes(read_header(path))
    return True
