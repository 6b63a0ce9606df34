"""LightX2VPipeline: upstream's names in, `Engine` and `Request` out. It decides nothing itself."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightx2v.cache.calibration import Recorder
from lightx2v.cache.choice import choose, save
from lightx2v.cache.figures import given
from lightx2v.cache.turn import CacheFactory
from lightx2v.cache.walk import CacheReport
from lightx2v.config import Cache, Engine, Request, Sampling
from lightx2v.decoding import Decoding, VAERequest, choose_vaes, decode_video
from lightx2v.diffuse import Hooks, Start, diffuse, schedule_of
from lightx2v.experts import require_pair
from lightx2v.fitting import check_given, check_images, check_task
from lightx2v.folder import ModelFolder
from lightx2v.guidance import Conditioning
from lightx2v.identify import identify
from lightx2v.loading import choose_kernels
from lightx2v.lora import Lora
from lightx2v.media import read_image, require_mp4, save_mp4, to_frames
from lightx2v.models.wan.conditioning import Encode, image_condition, image_latent, to_model_input
from lightx2v.parts import Parts
from lightx2v.sampling import Step
from lightx2v.shapes import VideoShape, size_for_image, snap, to_latent
from lightx2v.vae.padded import encode_padded
from lightx2v.vae.tiling import Tiling

log = logging.getLogger(__name__)
CACHE_METHODS = {"none": "none", "nocaching": "none", "tea": "teacache", "mag": "magcache"}
RESIZE_MODES = (None, "fixed_shape")
EXPERT_NAMES = {"high_noise_model": "high", "low_noise_model": "low"}


@dataclass(frozen=True)
class ModelClass:
    """What upstream's name of a model class stands for."""

    tasks: tuple[str, ...]
    experts: bool = False  # two transformers
    distilled: bool = False  # few steps, of a fixed list


CLASSES = {
    "wan2.1": ModelClass(("t2v", "i2v", "flf2v")),
    "wan2.1_distill": ModelClass(("t2v", "i2v", "flf2v"), distilled=True),
    "wan2.2": ModelClass(("t2v", "i2v")),
    "wan2.2_moe": ModelClass(("t2v", "i2v", "flf2v"), experts=True),
    "wan2.2_moe_distill": ModelClass(("t2v", "i2v", "flf2v"), experts=True, distilled=True),
}


class LightX2VPipeline:
    """Prompt, and images, to video with a folder of Wan files.

        pipe = LightX2VPipeline(model_path="/path/to/Wan2.1-T2V-14B", model_cls="wan2.1", task="t2v")
        pipe.create_generator(infer_steps=50, height=480, width=832, num_frames=81)
        pipe.generate(seed=42, prompt="...", negative_prompt="", save_result_path="output.mp4")

    model_path: folder with the transformer or two experts, models_t5_*.pth, the VAE and, for Wan2.1 image-to-video,
        models_clip_*.pth (or .safetensors, or a diffusers folder).
    model_cls: "wan2.1", "wan2.2" (TI2V-5B), "wan2.2_moe" (A14B), and "wan2.1_distill", "wan2.2_moe_distill" for models
        of few steps. task: "t2v", "i2v" or "flf2v" (first and last frame).
    dit_original_ckpt, high_noise_original_ckpt, low_noise_original_ckpt: files or folders to use instead of
        model_path's.
    Weights are read at the first `generate` and kept. Raises CheckpointError at construction for a folder whose
    transformers are missing or of another model.
    """

    def __init__(
        self,
        model_path: str | Path,
        model_cls: str = "wan2.1",
        task: str = "t2v",
        *,
        dit_original_ckpt: str | Path | None = None,
        low_noise_original_ckpt: str | Path | None = None,
        high_noise_original_ckpt: str | Path | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        _require("model_cls", model_cls, tuple(CLASSES))
        self._class = CLASSES[model_cls]
        _require(f"task of {model_cls}", task, self._class.tasks)
        folder = ModelFolder(Path(model_path))
        paths: tuple[Path, ...]
        if self._class.experts:
            paths = (
                Path(high_noise_original_ckpt) if high_noise_original_ckpt else folder.expert("high"),
                Path(low_noise_original_ckpt) if low_noise_original_ckpt else folder.expert("low"),
            )
        else:
            paths = (Path(dit_original_ckpt) if dit_original_ckpt else folder.transformer(),)
        infos = tuple(identify(path) for path in paths)
        for info in infos:
            check_task(info, task)
            if (info.spec.task == "ti2v") != (model_cls == "wan2.2"):
                right = "'wan2.2'" if info.spec.task == "ti2v" else "'wan2.1' or 'wan2.2_moe'"
                raise ValueError(f"{info.path}: this is {info.spec.title}: model_cls is {right}, not {model_cls!r}")
        if len(infos) == 2:
            require_pair(*infos)
        self._infos, self._info, self._task = infos, infos[0], task
        self._cache: CacheFactory | None = None
        self.cache_reports: tuple[CacheReport, ...] = ()  # of the last video, one a network
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._folder, self._parts, self._decoding = folder, Parts(folder, infos, chosen), Decoding()
        self._engine, self._loras, self._lora_how = Engine(), tuple[Lora, ...](), "auto"
        self._resize_mode: str | None = None
        scheduler = "distilled" if self._class.distilled else "unipc"
        self._request = Request("", sampling=Sampling(scheduler=scheduler))

    def create_generator(
        self,
        attn_mode: str = "auto",
        infer_steps: int = 50,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        guidance_scale: float | Sequence[float] = 5.0,
        sample_shift: float = 5.0,
        fps: int | None = None,
        denoising_step_list: Sequence[int] = (1000, 750, 500, 250),
        *,
        boundary: float | None = None,
        boundary_step_index: int | None = None,
        resize_mode: str | None = None,
        scheduler: str | None = None,
        dtype: str = "auto",
    ) -> None:
        """Choose how to run and what size to make; may be called again to change it.

        attn_mode: "auto" or an attention backend's name. height, width: pixels; with a start image their product is the
        area and the image gives the proportions, unless resize_mode is "fixed_shape". fps: of the file; None: 24 for
        TI2V-5B, 16 for the others.
        guidance_scale: one, or two for the high- and the low-noise expert.
        boundary: noise level at which the experts change; None: the model's own. boundary_step_index: or the number of
        steps of the high-noise one; None: 2 for a distilled pair.
        scheduler: "unipc", "euler" or "distilled" (walks denoising_step_list); None keeps model_cls's own.
        dtype: "auto", "bf16", "fp16", "fp32".
        Raises UnsupportedBackendError, with every reason, for an attention that cannot run here.
        """
        if resize_mode not in RESIZE_MODES:
            raise ValueError(f"resize_mode={resize_mode!r} is not supported yet; known: None, 'fixed_shape'")
        engine = replace(self._engine, attention=attn_mode, dtype=dtype)
        choose_kernels(self._info, engine, self._parts.device)  # raises now rather than after the text is encoded
        high, low = _two_scales(guidance_scale)
        if boundary_step_index is None and boundary is None and self._class.experts and self._class.distilled:
            boundary_step_index = 2
        sampling = replace(
            self._request.sampling,
            steps=infer_steps,
            cfg_scale=high,
            cfg_low=low,
            boundary=boundary,
            boundary_step=boundary_step_index if self._class.experts else None,
            shift=float(sample_shift),
            denoising_step_list=tuple(denoising_step_list),
            scheduler=scheduler or self._request.sampling.scheduler,
        )
        shape = self._snapped(VideoShape(num_frames, height, width))
        self._set_engine(engine)
        self._resize_mode = resize_mode
        self._request = replace(
            self._request,
            num_frames=shape.num_frames,
            height=shape.height,
            width=shape.width,
            fps=fps or (24 if self._info.spec.task == "ti2v" else 16),
            sampling=sampling,
        )

    def enable_lightvae(
        self,
        use_lightvae: bool = False,
        use_tae: bool = False,
        vae_path: str | Path | None = None,
        tae_path: str | Path | None = None,
    ) -> None:
        """Other VAEs than the folder's, from the next video on; all options at their default: the folder's again.

        vae_path: a VAE or LightVAE, whichever it is; with use_lightvae and no path, lightvaew2_1 of the folder.
        use_tae: decode with the tiny autoencoder tae_path, or that of the folder; images are still encoded by the VAE.
        Raises CheckpointError, before weights are read, for a file that is missing, damaged or of other latents.
        """
        wanted = VAERequest(use_lightvae, use_tae, vae_path, tae_path)
        self._parts.use_vaes(choose_vaes(self._folder, self._info.spec.latents, wanted))

    def enable_vae_tiling(self, mode: str = "tiled", tile_size: int = 256, overlap: int = 64) -> None:
        """Decode in tiles of so many pixels: "tiled" always, "full" never, "auto", as it is at first, if need be."""
        self._decoding = Decoding(mode, Tiling(tile_size, overlap))

    def enable_offload(self, cpu_offload: bool = False, offload_granularity: str = "block") -> None:
        """cpu_offload: the transformer waits on the CPU and is on the GPU only while it samples.

        offload_granularity: only "model" can be used yet; "block" and "phase" raise.
        """
        if cpu_offload and offload_granularity != "model":
            raise NotImplementedError(
                f"offload_granularity={offload_granularity!r} is not supported yet; use offload_granularity='model'"
            )
        self._set_engine(replace(self._engine, offload="model" if cpu_offload else "none"))

    def enable_cache(
        self,
        cache_method: str = "Tea",
        coefficients: Sequence[Sequence[float]] | Sequence[float] = (),
        teacache_thresh: float = 0.15,
        use_ret_steps: bool = False,
        magcache_calibration: bool = False,
        magcache_K: int = 6,
        magcache_thresh: float = 0.24,
        magcache_retention_ratio: float = 0.2,
        magcache_ratios: Sequence[Sequence[float]] | Sequence[float] = (),
        *,
        figures: str | Path = "",
    ) -> None:
        """Reuse results between steps: cache_method "Tea" or "Mag"; "None" computes all again.

        coefficients, magcache_ratios: see `lightx2v.cache.figures.given`; empty: the checkpoint's, or `figures`: the
        name of published ones, or a .cache.json. The thresholds are errors that may add up; 0 is off.
        magcache_calibration: skip nothing, measure, and write a .cache.json next to the checkpoint after each video.
        Raises ValueError for a checkpoint whose figures nobody has.
        """
        _require("cache_method", cache_method.lower(), tuple(CACHE_METHODS))
        method = CACHE_METHODS[cache_method.lower()]
        threshold = teacache_thresh if method == "teacache" else magcache_thresh
        cache = Cache(method, threshold, use_ret_steps, magcache_K, magcache_retention_ratio, str(figures))
        told = given(coefficients, magcache_ratios)
        self._cache = Recorder() if magcache_calibration else choose(cache, self._infos, self._note, told)

    def calibrate(self, prompts: Sequence[str], seed: int = 42, negative_prompt: str = "", **images: Any) -> list[Path]:
        """Measure the model for its caches: a whole video for each prompt at the settings of `create_generator`.

        images: image_path and last_frame_path, for models that take them; progress.
        Returns the files written, one next to each transformer.
        """
        before, self._cache = self._cache, Recorder()
        try:
            for index, prompt in enumerate(prompts):
                self.generate(seed + index, prompt, negative_prompt, return_result_tensor=True, **images)
            return save(self._cache, self._infos, self._request)
        finally:
            self._cache = before

    def enable_lora(self, lora_configs: Sequence[Mapping[str, object]], lora_dynamic_apply: bool = False) -> None:
        """Use LoRAs: [{"path": ..., "strength": 1.0, "name": "high_noise_model"}, ...].

        strength: 1 as trained; may be left out. name: of a model with two experts, "high_noise_model" or
        "low_noise_model"; left out, both get it.
        lora_dynamic_apply: compute beside the weights instead of adding to them: changes of strength are instant, each
        step is a little slower.
        Raises CheckpointError, from headers alone, for a file that is missing or for another model.
        """
        loras = tuple(_lora(config) for config in lora_configs)
        self._parts.check_loras(loras)
        self._loras = loras
        self._lora_how = "branch" if lora_dynamic_apply else "auto"

    def switch_lora(self, lora_path: str | Path, strength: float = 1.0) -> None:
        """Use this LoRA instead of all others from the next video on; "" uses none."""
        loras = (Lora(Path(lora_path), strength),) if str(lora_path) else ()
        self._parts.check_loras(loras)
        self._loras = loras

    def generate(
        self,
        seed: int = 42,
        prompt: str = "",
        negative_prompt: str = "",
        save_result_path: str | Path = "lightx2v_gen_result.mp4",
        *,
        image_path: str | Path | None = None,
        last_frame_path: str | Path | None = None,
        return_result_tensor: bool = False,
        progress: bool = True,
        on_step: Callable[[Step, Tensor], None] | None = None,
    ) -> dict[str, Tensor | None]:
        """Make one video. Same seed, same video, on any machine to rounding.

        image_path, last_frame_path: pictures of the first and of the last frame, for models that take them.
        Returns {"video": None} after writing the file, or with return_result_tensor {"video": (F, H, W, 3) float32
        in [0, 1] on the CPU} and writes nothing. on_step sees (step, x0 in model space) and may raise to cancel.
        Raises CheckpointError, before any weight is read, for a missing image or one that the model cannot use, and
        ValueError where the images are not those of the task.
        """
        given = {"start": image_path is not None, "end": last_frame_path is not None}
        check_images(self._info, **given)
        check_given(self._task, **given)
        start, end = (None if path is None else read_image(path) for path in (image_path, last_frame_path))
        request = replace(
            self._request,
            prompt=prompt,
            negative_prompt=negative_prompt,
            sampling=replace(self._request.sampling, seed=seed),
        )
        request = self._sized(request, start if start is not None else end)
        if not return_result_tensor:
            require_mp4(save_result_path, request.width, request.height)
        cond, uncond, begin = self._encode(request, start, end)
        latents = self._sample(request, cond, uncond, begin, _ticker(request.sampling, progress, on_step))
        frames = self._decode(latents, progress)
        if return_result_tensor:
            return {"video": frames}
        save_mp4(frames, save_result_path, request.fps, comment=f"prompt: {prompt}\nseed: {seed}")
        return {"video": None}

    def describe(self, image_path: str | Path | None = None) -> str:
        """Model, size and steps of the next video, in one line. image_path: the picture that it is to start from."""
        request = self._sized(self._request, None if image_path is None else read_image(image_path))
        sampling = request.sampling
        steps = len(schedule_of(sampling).timesteps)
        size = f"{request.width}x{request.height}, {request.num_frames} frames at {request.fps} fps"
        return f"{self._info.spec.title}, {size}, {steps} {sampling.scheduler} steps on {self._parts.device}"

    def _set_engine(self, engine: Engine) -> None:
        if engine != self._engine:
            self._parts.forget_transformers()
        self._engine = engine

    def _snapped(self, video: VideoShape) -> VideoShape:
        spec = self._info.spec
        shape, note = snap(video, spec.latents, spec.patch_size)
        if note:
            log.warning(note)
        return shape

    def _sized(self, request: Request, image: Tensor | None) -> Request:
        """The request at the size that its image asks for."""
        if image is None or self._resize_mode == "fixed_shape":
            return request
        spec, area = self._info.spec, request.height * request.width
        height, width = size_for_image(area, (image.shape[1], image.shape[2]), spec.latents, spec.patch_size)
        return replace(request, height=height, width=width)

    def _encode(
        self, request: Request, start: Tensor | None, end: Tensor | None
    ) -> tuple[Conditioning, Conditioning | None, Start]:
        """Text and images to conditioning, and to the latents that sampling begins with."""
        parts, spec, guided = self._parts, self._info.spec, request.sampling.guided
        with parts.visiting(parts.text_encoder().model):
            context = parts.text_encoder().encode(request.prompt)
            negative = parts.text_encoder().encode(request.negative_prompt) if guided else None
        video = VideoShape(request.num_frames, request.height, request.width)
        begin = Start(torch.zeros(1, spec.latents.channels, *to_latent(video, spec.latents.stride)))
        image = clip = None
        given = [picture for picture in (start, end) if picture is not None]
        if spec.reads_clip:
            with parts.visiting(parts.image_encoder().model):
                clip = torch.cat([parts.image_encoder().encode(picture) for picture in given], 1).cpu()
        if spec.image_channels:
            known = image_condition(self._padded(), video, spec.latents, start=start, end=end)
            image = to_model_input(known.latents.cpu(), known.concat_mask.cpu(), spec.latents, begin.latents.shape)
        elif spec.keeps_frames and start is not None:
            begin = Start(*image_latent(self._padded(), video, spec.latents, start))
        uncond = None if negative is None else Conditioning(negative, image, clip)
        return Conditioning(context, image, clip), uncond, begin

    def _padded(self) -> Encode:
        vae = self._parts.vae()

        def encode(num_frames: int, *, start: Tensor | None, end: Tensor | None) -> Tensor:
            first, last = (None if frames is None else frames.to(self._parts.device) for frames in (start, end))
            return encode_padded(vae, num_frames, start=first, end=last)

        return encode

    def _sample(
        self, request: Request, cond: Conditioning, uncond: Conditioning | None, begin: Start, hooks: Hooks
    ) -> Tensor:
        self.cache_reports = ()
        with self._parts.model(self._engine, self._loras, self._lora_how) as model:
            latents = diffuse(model, begin, request.sampling, cond, uncond, hooks=hooks, cache=self._cache)
        if isinstance(self._cache, Recorder):
            save(self._cache, self._infos, request)
        return latents

    def _note(self, report: CacheReport) -> None:
        self.cache_reports = (*self.cache_reports, report)

    def _decode(self, latents: Tensor, progress: bool) -> Tensor:
        info, vae = self._parts.decoder()
        free = self._parts.free_bytes()
        return to_frames(decode_video(info, vae, latents, self._decoding, free=free, progress=progress))


def _require(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not supported yet; known: {', '.join(known)}")


def _two_scales(given: float | Sequence[float]) -> tuple[float, float | None]:
    if isinstance(given, int | float):
        return float(given), None
    if len(given) != 2:
        raise ValueError(f"guidance_scale={given!r}: give one number, or two for the high- and the low-noise expert")
    return float(given[0]), float(given[1])


def _lora(config: Mapping[str, object]) -> Lora:
    unknown = set(config) - {"path", "strength", "name"}
    name = config.get("name")
    if "path" not in config or unknown or (name is not None and name not in EXPERT_NAMES):
        raise ValueError(
            f"LoRA {dict(config)!r}: expected path, and perhaps strength and name ({' or '.join(EXPERT_NAMES)})"
        )
    expert = "both" if name is None else EXPERT_NAMES[str(name)]
    return Lora(Path(str(config["path"])), config.get("strength", 1.0), expert)  # type: ignore[arg-type]


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
