"""The small models that the pack carries, and how each is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.world import FPS, FRAMES, HEIGHT, WIDTH
from lightx2v import LightX2VPipeline

MODELS = Path(__file__).parent / "models"
BASE = MODELS / "wan2.1_t2v"
HUNYUAN = MODELS / "hunyuan_video_15"
T2V = BASE / "diffusion_pytorch_model.safetensors"
I2V = MODELS / "variants" / "wan_i2v_fp8_scaled.safetensors"
HIGH_NOISE = MODELS / "variants" / "wan_t2v_high_noise_fp8_e4m3.safetensors"
STUDENT = MODELS / "loras" / "wan_t2v_4steps_lora_rank16.safetensors"
NIGHT = MODELS / "loras" / "wan_t2v_night_lora_rank8.safetensors"


@dataclass(frozen=True)
class Shipped:
    """One of them: arguments of LightX2VPipeline and of create_generator, and its LoRA."""

    model: Mapping[str, Any] = field(default_factory=dict)
    generator: Mapping[str, Any] = field(default_factory=dict)
    lora: Path | None = None
    folder: Path = BASE

    def pipeline(self, model_path: Path | None = None, **changes: Any) -> LightX2VPipeline:
        """Ready to generate; `changes` are arguments of create_generator."""
        pipe = LightX2VPipeline(model_path or self.folder, **self.model)
        size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "fps": FPS, "infer_steps": 20}
        pipe.create_generator(**{**size, "guidance_scale": 4.0, **self.generator, **changes})
        if self.lora is not None:
            pipe.enable_lora([{"path": self.lora}])
        return pipe


# Guidance of the image model: the picture says most of what the prompt does, and more guidance costs the first frame.
SHIPPED: Mapping[str, Shipped] = {
    "t2v": Shipped(),
    "i2v": Shipped({"task": "i2v", "dit_original_ckpt": I2V}, {"guidance_scale": 2.5}),
    "flf2v": Shipped({"task": "flf2v", "dit_original_ckpt": I2V}, {"guidance_scale": 2.5}),
    "moe": Shipped(
        {"model_cls": "wan2.2_moe", "high_noise_original_ckpt": HIGH_NOISE, "low_noise_original_ckpt": T2V},
        {"boundary": 0.875},
    ),
    "4step": Shipped({"model_cls": "wan2.1_distill"}, {"guidance_scale": 1.0}, STUDENT),
    "night": Shipped(lora=NIGHT),
    "hunyuan": Shipped(
        {"model_cls": "hunyuan_video_1.5", "task": "t2v"},
        {"sample_shift": 5.0},
        folder=HUNYUAN,
    ),
}
