"""LightX2VPipeline: upstream's names in, `Engine` and `Request` out. It decides nothing itself."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightx2v.config import Engine, Request, Sampling
from lightx2v.diffuse import Hooks, diffuse, schedule_of
from lightx2v.folder import open_folder
from lightx2v.guidance import Conditioning
from lightx2v.identify import identify
from lightx2v.loading import choose_kernels, load_transformer
from lightx2v.media import require_mp4, save_mp4, to_frames
from lightx2v.sampling import Step
from lightx2v.shapes import VideoShape, snap, to_latent
from lightx2v.text import umt5
from lightx2v.vae import wan as wan_vae

log = logging.getLogger(__name__)
MODEL_CLASSES = ("wan2.1", "wan2.1_distill")
TASKS = ("t2v",)
CPU = torch.device("cpu")


class LightX2VPipeline:
    """Prompt to video with a folder of Wan files.

        pipe = LightX2VPipeline(model_path="/path/to/Wan2.1-T2V-14B", model_cls="wan2.1", task="t2v")
        pipe.create_generator(infer_steps=50, height=480, width=832, num_frames=81)
        pipe.generate(seed=42, prompt="...", negative_prompt="", save_result_path="output.mp4")

    model_path: folder with the transformer, models_t5_*.pth and Wan2.1_VAE.pth (or .safetensors).
    dit_original_ckpt: transformer file or folder to use instead of model_path's.
    Weights are read at the first `generate` and kept. Raises CheckpointError at construction for a folder whose
    transformer is missing or another model.
    """

    def __init__(
        self,
        model_path: str | Path,
        model_cls: str = "wan2.1",
        task: str = "t2v",
        *,
        dit_original_ckpt: str | Path | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        _require("model_cls", model_cls, MODEL_CLASSES)
        _require("task", task, TASKS)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._folder = open_folder(model_path, dit_original_ckpt)
        self._info = identify(self._folder.transformer)
        self._engine = Engine()
        scheduler = "distilled" if model_cls == "wan2.1_distill" else "unipc"
        self._request = Request("", sampling=Sampling(scheduler=scheduler))
        self._text_encoder: umt5.UMT5 | None = None
        self._transformer: nn.Module | None = None
        self._vae: wan_vae.WanVAE | None = None

    def create_generator(
        self,
        attn_mode: str = "auto",
        infer_steps: int = 50,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        guidance_scale: float = 5.0,
        sample_shift: float = 5.0,
        fps: int = 16,
        denoising_step_list: tuple[int, ...] | list[int] = (1000, 750, 500, 250),
        *,
        scheduler: str | None = None,
        dtype: str = "auto",
    ) -> None:
        """Choose how to run and what size to make; may be called again to change it.

        attn_mode: "auto" or an attention backend's name. height, width: pixels. fps: of the file.
        scheduler: "unipc", "euler" or "distilled" (walks denoising_step_list); None keeps model_cls's own.
        dtype: "auto", "bf16", "fp16", "fp32".
        Raises UnsupportedBackendError, with every reason, for an attention that cannot run here.
        """
        engine = replace(self._engine, attention=attn_mode, dtype=dtype)
        choose_kernels(self._info, engine, self._device)  # raises now rather than after the text is encoded
        sampling = replace(
            self._request.sampling,
            steps=infer_steps,
            cfg_scale=float(guidance_scale),
            shift=float(sample_shift),
            denoising_step_list=tuple(denoising_step_list),
            scheduler=scheduler or self._request.sampling.scheduler,
        )
        spec = self._info.spec
        shape, note = snap(VideoShape(num_frames, height, width), spec.latents, spec.patch_size)
        if note:
            log.warning(note)
        self._set_engine(engine)
        self._request = replace(
            self._request,
            num_frames=shape.num_frames,
            height=shape.height,
            width=shape.width,
            fps=fps,
            sampling=sampling,
        )

    def enable_offload(self, cpu_offload: bool = False, offload_granularity: str = "block") -> None:
        """cpu_offload: the transformer waits on the CPU and is on the GPU only while it samples.

        offload_granularity: only "model" can be used yet; "block" and "phase" raise.
        """
        if cpu_offload and offload_granularity != "model":
            raise NotImplementedError(
                f"offload_granularity={offload_granularity!r} is not supported yet; use offload_granularity='model'"
            )
        self._set_engine(replace(self._engine, offload="model" if cpu_offload else "none"))

    def generate(
        self,
        seed: int = 42,
        prompt: str = "",
        negative_prompt: str = "",
        save_result_path: str | Path = "lightx2v_gen_result.mp4",
        *,
        return_result_tensor: bool = False,
        progress: bool = True,
        on_step: Callable[[Step, Tensor], None] | None = None,
    ) -> dict[str, Tensor | None]:
        """Make one video. Same seed, same video, on any machine to rounding.

        Returns {"video": None} after writing the file, or with return_result_tensor {"video": (F, H, W, 3) float32
        in [0, 1] on the CPU} and writes nothing. on_step sees (step, x0 in model space) and may raise to cancel.
        """
        request = replace(
            self._request,
            prompt=prompt,
            negative_prompt=negative_prompt,
            sampling=replace(self._request.sampling, seed=seed),
        )
        if not return_result_tensor:
            require_mp4(save_result_path, request.width, request.height)
        cond, uncond = self._encode(request)
        latents = self._sample(request, cond, uncond, _ticker(request.sampling, progress, on_step))
        frames = self._decode(latents, progress)
        if return_result_tensor:
            return {"video": frames}
        save_mp4(frames, save_result_path, request.fps, comment=f"prompt: {prompt}\nseed: {seed}")
        return {"video": None}

    def describe(self) -> str:
        """Model, size and steps of the next video, in one line."""
        request, sampling = self._request, self._request.sampling
        steps = len(schedule_of(sampling).timesteps)
        size = f"{request.width}x{request.height}, {request.num_frames} frames at {request.fps} fps"
        return f"{self._info.spec.title}, {size}, {steps} {sampling.scheduler} steps on {self._device}"

    def _set_engine(self, engine: Engine) -> None:
        if engine != self._engine:
            self._transformer = None
        self._engine = engine

    def _encode(self, request: Request) -> tuple[Conditioning, Conditioning | None]:
        if self._text_encoder is None:
            folder = self._folder
            self._text_encoder = umt5.load(folder.text_encoder, tokenizer=folder.tokenizer, dtype=None, device=CPU)
        encoder, network = self._text_encoder, cast(nn.Module, self._text_encoder.model)
        network.to(self._device)
        try:
            cond = Conditioning(encoder.encode(request.prompt))
            guided = request.sampling.cfg_scale != 1
            return cond, Conditioning(encoder.encode(request.negative_prompt)) if guided else None
        finally:
            network.to(CPU)

    def _sample(self, request: Request, cond: Conditioning, uncond: Conditioning | None, hooks: Hooks) -> Tensor:
        resident = CPU if self._engine.offload == "model" else self._device
        if self._transformer is None:
            self._transformer = load_transformer(self._info, self._engine, self._device, resident)
        spec = self._info.spec
        shape = to_latent(VideoShape(request.num_frames, request.height, request.width), spec.latents.stride)
        empty = torch.zeros(1, spec.latents.channels, *shape)
        self._transformer.to(self._device)
        try:
            return diffuse(self._transformer, empty, request.sampling, cond, uncond, space=spec.latents, hooks=hooks)
        finally:
            self._transformer.to(resident)

    def _decode(self, latents: Tensor, progress: bool) -> Tensor:
        if self._vae is None:
            dtype = torch.float32 if self._device.type == "cpu" else torch.bfloat16
            self._vae = wan_vae.load(self._folder.vae, dtype=dtype, device=self._device)
        with tqdm(desc="decode", unit="frame", disable=not progress, leave=False) as bar:

            def on_chunk(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return to_frames(wan_vae.decode(self._vae, latents.to(self._device), on_chunk=on_chunk).cpu())


def _require(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not supported yet; known: {', '.join(known)}")


def _ticker(sampling: Sampling, progress: bool, on_step: Callable[[Step, Tensor], None] | None) -> Hooks:
    """A progress bar over the steps, with time left, that also calls the caller's hook."""
    bar = tqdm(desc="sample", unit="step", disable=not progress)

    def tick(step: Step, x0: Tensor) -> None:
        bar.total = step.total
        bar.update()
        if step.index + 1 == step.total:
            bar.close()
        if on_step is not None:
            on_step(step, x0)

    return Hooks(on_step=tick)
