"""LightX2VPipeline: upstream's names in, `Engine` and `Request` out. It decides nothing itself."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightx2v.arguments import cache_of, checked, filled, lora_of, require
from lightx2v.cache import choice
from lightx2v.cache.calibration import Recorder
from lightx2v.cache.figures import given
from lightx2v.cache.turn import CacheFactory
from lightx2v.cache.walk import CacheReport
from lightx2v.checkpoint import CheckpointError
from lightx2v.classes import Pick, model_class
from lightx2v.config import Engine, Request, Sampling
from lightx2v.config_json import UNDONE_BY, read_told
from lightx2v.config_keys import ORIGINALS
from lightx2v.decoding import Decoding, VAERequest, choose_vaes
from lightx2v.diffuse import Hooks, Model, diffuse
from lightx2v.folder import ModelFolder
from lightx2v.identify import CheckpointInfo
from lightx2v.loading import require_kernels
from lightx2v.lora import Lora
from lightx2v.media import read_image
from lightx2v.models import encoders_of
from lightx2v.offload import Asked, Plan, budgeted, offloaded, rows_of
from lightx2v.parallel.agreement import on_first, only_on_first
from lightx2v.parallel.mesh import join, own_device
from lightx2v.parallel.sizes import named
from lightx2v.parts import Parts
from lightx2v.quantized import Quantize, quantised_image_encoder, quantised_text_encoder
from lightx2v.report import Report, Watch
from lightx2v.request import Call, Changes, Generated, described, guided, in_words, sized_for, snapped
from lightx2v.sampling import Step
from lightx2v.stages import Encoded, decode, prepare, save, ticker

log = logging.getLogger(__name__)


class LightX2VPipeline:
    """Prompt, and images, to video with a folder of Wan or HunyuanVideo-1.5 files.

        pipe = LightX2VPipeline(model_path="/path/to/Wan2.1-T2V-14B", model_cls="wan2.1", task="t2v")
        pipe.create_generator(infer_steps=50, height=480, width=832, num_frames=81)
        pipe.generate(seed=42, prompt="...", negative_prompt="", save_result_path="output.mp4")

    model_path: folder with the transformer or two experts, encoders and VAE (docs/models.md).
    model_cls: "wan2.1", "wan2.2" (TI2V-5B), "wan2.2_moe" (A14B), "hunyuan_video_1.5"; of few steps: "wan2.1_distill",
        "wan2.2_moe_distill", "hunyuan_video_1.5_distill". task: "t2v", "i2v" or "flf2v" (first and last frame).
    dit_original_ckpt, high_noise_original_ckpt, low_noise_original_ckpt: files or folders to use instead of
        model_path's. transformer_model_name: of several of HunyuanVideo-1.5, such as "480p_t2v".
    support_tasks: other tasks of model_cls that `generate` may be asked for with the same model.
    Weights are read at the first `generate` and kept. Raises CheckpointError at construction for a transformer of
    another model; one that is missing may still be named by `enable_quantize` or a config file.
    """

    @checked
    def __init__(
        self,
        model_path: str | Path,
        model_cls: str = "wan2.1",
        task: str = "t2v",
        *,
        dit_original_ckpt: str | Path | None = None,
        low_noise_original_ckpt: str | Path | None = None,
        high_noise_original_ckpt: str | Path | None = None,
        transformer_model_name: str | None = None,
        support_tasks: Sequence[str] = (),
        device: str | torch.device | None = None,
    ) -> None:
        tasks = (task, *support_tasks)
        self._class, self._task, self._folder = model_class(model_cls, tasks), task, ModelFolder(Path(model_path))
        originals = zip(ORIGINALS, (dit_original_ckpt, high_noise_original_ckpt, low_noise_original_ckpt), strict=True)
        self._originals = {name: Path(path) for name, path in originals if path}
        self._pick = Pick(self._folder, model_cls, self._class, tasks, self._originals, transformer_model_name)
        self._asked: set[str] = set()  # methods that the caller called: a config file does not undo them
        self._by_file: tuple[str, ...] = ()  # methods that the last config file called
        self._infos: tuple[CheckpointInfo, ...] = ()  # none while the transformer is missing
        self._missing: CheckpointError | None = None
        self._cache: CacheFactory | None = None
        self._choose_cache: Callable[[Sequence[CheckpointInfo]], CacheFactory | None] = lambda infos: None
        self.cache_reports: tuple[CacheReport, ...] = ()  # of the last video, one a network
        self.memory_plan: Plan | None = None  # of the last video, where one was made
        self.report = Report()  # of the last video: what ran, how long, in how much memory
        self._parts, self._decoding = Parts(self._folder, (), own_device(device)), Decoding()
        self._vaes = VAERequest(False, False, None, None)
        self._engine, self._loras, self._lora_how = Engine(offload="auto"), tuple[Lora, ...](), "auto"
        self._resize_mode: str | None = None
        self._request = Request("", sampling=Sampling(scheduler=self._class.scheduler))
        self._use(self._pick)

    @checked
    @filled
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
        config_json: str | Path | None = None,
    ) -> None:
        """Choose how to run and what size to make; may be called again to change it.

        config_json: one of LightX2V's JSON files, instead of defaults (docs/config-json.md): it sets offload, LoRAs and
        the like too, but for methods that were called for that; arguments given here win over it.

        attn_mode: "auto", "exact" or an attention backend's name (docs/kernels.md). height, width: pixels; with a start
        image their product is the area and the image gives the proportions, unless resize_mode is "fixed_shape".
        fps: of the file; None: the model's. guidance_scale: one, or two for the high- and the low-noise expert.
        boundary: noise level at which the experts change; None: the model's own. boundary_step_index: or the number of
        steps of the high-noise one; None: 2 for a distilled pair.
        scheduler: "unipc", "euler" or "distilled" (walks denoising_step_list); None: model_cls's own. dtype: "auto",
        "bf16", "fp16", "fp32". Raises UnsupportedBackendError, with reasons, for an attention that cannot run here.
        """
        if resize_mode not in (None, "fixed_shape"):
            raise ValueError(f"resize_mode={resize_mode!r} is not supported yet; known: None, 'fixed_shape'")
        engine = replace(self._engine, attention=attn_mode, dtype=dtype)
        require_kernels(self._infos or (self._info,), engine, self._parts.device)  # raises before text is encoded
        if boundary_step_index is None and boundary is None and self._class.experts and self._class.distilled:
            boundary_step_index = 2
        sampling = replace(
            guided(self._request.sampling, guidance_scale),
            steps=infer_steps,
            boundary=boundary,
            boundary_step=boundary_step_index if self._class.experts else None,
            shift=float(sample_shift),
            denoising_step_list=tuple(denoising_step_list),
            scheduler=scheduler or self._request.sampling.scheduler,
        )
        size = {"num_frames": num_frames, "height": height, "width": width, "fps": fps or self._info.spec.fps}
        request = snapped(replace(self._request, **size, sampling=sampling), self._info.spec)  # type: ignore[arg-type]
        self._set_engine(engine)
        self._resize_mode, self._request = resize_mode, request

    @checked
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
        if self._infos:
            self._parts.use_vaes(choose_vaes(self._folder, self._info.spec.latents, wanted))
        self._vaes = wanted
        self._asked.add("enable_lightvae")

    @checked
    def enable_vae_tiling(self, mode: str = "tiled", tile_size: int | None = None, overlap: int = 64) -> None:
        """Decode in tiles of so many pixels (256): "tiled" always, "full" never, "auto" if need be, of any size."""
        self._decoding = Decoding.of(mode, tile_size, overlap)
        self._asked.add("enable_vae_tiling")

    @checked
    def enable_offload(
        self,
        cpu_offload: bool = False,
        offload_granularity: str = "block",
        text_encoder_offload: bool = False,
        image_encoder_offload: bool = False,
        vae_offload: bool = False,
        *,
        vram_budget_gb: float = 0.0,
        ram_budget_gb: float = 0.0,
    ) -> None:
        """Where weights wait; every choice is explained in docs/memory.md. Without this call: "auto"."""
        engine = offloaded(self._engine, cpu_offload, offload_granularity)
        budgets = {"vram_budget_gb": vram_budget_gb, "ram_budget_gb": ram_budget_gb}
        self._set_engine(budgeted(replace(engine, vae_offload=vae_offload), **budgets))
        self._asked.add("enable_offload")

    @checked
    def enable_quantize(
        self,
        dit_quantized: bool = False,
        text_encoder_quantized: bool = False,
        image_encoder_quantized: bool = False,
        dit_quantized_ckpt: str | Path | None = None,
        low_noise_quantized_ckpt: str | Path | None = None,
        high_noise_quantized_ckpt: str | Path | None = None,
        text_encoder_quantized_ckpt: str | Path | None = None,
        image_encoder_quantized_ckpt: str | Path | None = None,
        quant_scheme: str = "fp8",
        text_encoder_quant_scheme: str | None = None,
        image_encoder_quant_scheme: str | None = None,
    ) -> None:
        """Use quantised files from the next video on; all switches off: the plain ones again.

        ..._ckpt: files or folders; None looks through model_path, and what is nowhere is quantised as it is read.
        quant_scheme: "fp8", "int8", or with a kernel, "fp8-triton"; "none" restores. Raises CheckpointError for a file
        missing or not quantised, ValueError for an unknown scheme, UnsupportedBackendError where it cannot run.
        """
        switches = (dit_quantized, text_encoder_quantized, image_encoder_quantized)
        dits = (dit_quantized_ckpt, low_noise_quantized_ckpt, high_noise_quantized_ckpt)
        others = (text_encoder_quantized_ckpt or None, image_encoder_quantized_ckpt or None)
        schemes = (text_encoder_quant_scheme, image_encoder_quant_scheme)
        wanted = Quantize(*switches, *dits, *others, quant_scheme, *schemes)
        pick, of = replace(self._pick, quantize=wanted), encoders_of(self._class.family)
        image = quantised_image_encoder(self._folder, wanted, pick.find()[0], of)
        text = quantised_text_encoder(self._folder, wanted, of)
        self._use(pick)
        self._parts.use_encoders(text, image)
        self._asked.add("enable_quantize")

    @checked
    def enable_parallel(
        self,
        cfg_p_size: int = 1,
        seq_p_size: int = 1,
        seq_p_attn_type: str = "ulysses",
        *,
        ulysses_p_size: int | None = None,
        exchange: str = "exact",
    ) -> None:
        """One video on several GPUs, by as many processes that torchrun starts (docs/parallel.md).

        cfg_p_size: 2 computes both passes of guidance at once. seq_p_size: processes that share the tokens of a pass;
        seq_p_attn_type: by "ulysses" or "ring"; ulysses_p_size: or so many by ulysses and the rest by ring.
        exchange: "fp8" sends queries, keys and values in 8 bits. Every process calls this and `generate`; the arguments
        of rank 0 count, and it has the video. Raises ValueError for sizes that do not fit the processes or the heads.
        """
        parallel = named(cfg_p_size, seq_p_size, seq_p_attn_type, ulysses_p_size, exchange)
        engine = replace(self._engine, parallel=parallel)
        require_kernels(self._infos, engine, self._parts.device)
        if parallel != self._engine.parallel:
            self._parts.use_mesh(join(parallel, self._parts.device) if parallel.size > 1 else None)
        self._set_engine(engine)
        self._asked.add("enable_parallel")

    @checked
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
        thresholds = {"teacache": teacache_thresh, "magcache": magcache_thresh}
        cache = cache_of(cache_method, thresholds, use_ret_steps, magcache_K, magcache_retention_ratio, figures)
        told = given(coefficients, magcache_ratios)

        def chosen(infos: Sequence[CheckpointInfo]) -> CacheFactory | None:
            return Recorder() if magcache_calibration else choice.choose(cache, infos, self._note, told)

        self._cache = chosen(self._infos) if self._infos else None
        self._choose_cache = chosen
        self._asked.add("enable_cache")

    @checked
    def calibrate(self, prompts: Sequence[str], seed: int = 42, negative_prompt: str = "", **images: Any) -> list[Path]:
        """Measure the model for its caches: a whole video for each prompt at the settings of `create_generator`.

        images: image_path and last_frame_path, for models that take them; progress.
        Returns the files written, one next to each transformer.
        """
        before, self._cache = self._cache, (recorder := Recorder())
        try:
            for index, prompt in enumerate(prompts):
                self.generate(seed + index, prompt, negative_prompt, return_result_tensor=True, **images)
            return on_first(self._parts.mesh, lambda: choice.save(recorder, self._infos, self._request))
        finally:
            self._cache = before

    @checked
    def enable_lora(self, lora_configs: Sequence[Mapping[str, object]], lora_dynamic_apply: bool = False) -> None:
        """Use LoRAs: [{"path": ..., "strength": 1.0, "name": "high_noise_model"}, ...].

        strength: 1 as trained; may be left out. name: of a model with two experts, "high_noise_model" or
        "low_noise_model"; left out, both get it.
        lora_dynamic_apply: compute beside the weights instead of adding to them: changes of strength are instant, each
        step is a little slower. Raises CheckpointError, from headers alone, for a file missing or of another model.
        """
        loras = tuple(lora_of(config) for config in lora_configs)
        self._parts.check_loras(loras)
        self._loras = loras
        self._asked.add("enable_lora")
        self._lora_how = "branch" if lora_dynamic_apply else "auto"

    @checked
    def switch_lora(self, lora_path: str | Path, strength: float = 1.0) -> None:
        """Use this LoRA instead of all others from the next video on; "" uses none."""
        loras = (Lora(Path(lora_path), strength),) if str(lora_path) else ()
        self._parts.check_loras(loras)
        self._loras = loras
        self._asked.add("enable_lora")

    @checked
    def generate(
        self,
        seed: int = 42,
        prompt: str = "",
        negative_prompt: str = "",
        save_result_path: str | Path = "lightx2v_gen_result.mp4",
        *,
        task: str | None = None,
        image_path: str | Path | None = None,
        last_frame_path: str | Path | None = None,
        return_result_tensor: bool = False,
        infer_steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        target_shape: Sequence[int] = (),
        num_frames: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        sample_shift: float | None = None,
        fps: int | None = None,
        progress: bool = True,
        on_step: Callable[[Step, Tensor], None] | None = None,
    ) -> Generated:
        """Make one video. Same seed, same video, on any machine to rounding.

        task: one of support_tasks; None: the constructor's. image_path, last_frame_path: pictures of the first and of
        the last frame, for models that take them.
        infer_steps to fps: for this video alone, in place of what create_generator said; target_shape: [height, width].
        Returns `Generated`: {"video": None, "metadata": {...}} after writing the file, or with return_result_tensor
        {"video": (F, H, W, 3) float32 in [0, 1] on the CPU, ...} and writes nothing. on_step sees (step, x0 in model
        space) and may raise to cancel.
        Raises CheckpointError, before any weight is read, for a missing image or one that the model cannot use, and
        ValueError where the images are not those of the task.
        """
        require("task", task or self._task, self._pick.tasks)
        changes = Changes(infer_steps, height, width, num_frames, guidance_scale, sample_shift, fps)
        fixed, images = self._resize_mode == "fixed_shape", (image_path, last_frame_path)
        called = Call(task or self._task, prompt, negative_prompt, seed, images, changes.shaped(target_shape), fixed)
        target, watch = None if return_result_tensor else save_result_path, Watch(self._parts.device)
        with watch.stage("encode"):
            request, encoded = prepare(self._parts, self._info, called, self._request, target)
        with watch.stage("sample") as lines:
            latents = self._sample(request, encoded, lambda: ticker(progress, on_step, self._parts.mesh))
            lines += self._parts.said(self.cache_reports)
        with watch.stage("decode"):
            frames = decode(self._parts, latents, self._decoding, progress)
        model = {"model": self._info.spec.title, "model_cls": self._pick.model_cls, "task": called.task}
        metadata = {**model, **described(request)}
        if target is not None:
            with watch.stage("save"):
                save(self._parts, frames, target, request.fps, metadata)
        self.report = Report(tuple(watch.stages))
        return {"video": frames if target is None else None, "metadata": {**metadata, "seconds": watch.seconds}}

    @checked
    def describe(self, image_path: str | Path | None = None) -> str:
        """Model, size and steps of the next video, in one line. image_path: the picture that it is to start from."""
        request = self._request
        if image_path is not None and self._resize_mode != "fixed_shape":
            request = sized_for(read_image(image_path), request, self._info.spec)
        return f"{self._info.spec.title}, {in_words(request)} on {self._parts.device}"

    def _set_engine(self, engine: Engine) -> None:
        self._parts.use_engine(engine)
        self._engine = engine

    @property
    def _info(self) -> CheckpointInfo:
        if self._missing is not None:
            raise self._missing
        return self._infos[0]

    def _use(self, pick: Pick) -> None:
        """These checkpoints from now on; what depends on them is chosen again. Changes nothing where it raises."""
        infos, missing = pick.find()
        engine = pick.quantize.engine(self._engine, infos)
        require_kernels(infos if engine != self._engine else (), engine, self._parts.device)
        before, cache, vaes = self._infos, self._cache, None
        if [info.path for info in infos] != [info.path for info in before]:
            self._parts.use_transformers(infos)
            try:
                self._parts.check_loras(self._loras)
                cache = self._choose_cache(infos) if infos else None
                vaes = choose_vaes(self._folder, infos[0].spec.latents, self._vaes) if infos else None
            except Exception:
                self._parts.use_transformers(before)
                raise
        if vaes is not None:
            self._parts.use_vaes(vaes)
        self._pick, self._infos, self._missing, self._cache = pick, infos, missing, cache
        self._set_engine(engine)

    def _read_file(self, path: str | Path | None, given: Mapping[str, object]) -> Mapping[str, Any]:
        """Do what a config file asks for; returns the arguments of create_generator that it holds, or are usual."""
        if path is None:
            return self._pick.usual(self._infos, given)
        told = read_told(path, self._folder.path, self._infos, given)
        asked, originals = frozenset(self._asked), {**told.originals, **self._originals}
        if not told.calls.get("enable_quantize", {}).get("dit_quantized"):
            self._use(replace(self._pick, originals=originals))
        calls = {**{name: UNDONE_BY.get(name, {}) for name in self._by_file}, **told.calls}
        try:
            for name, arguments in calls.items():
                if name not in asked:
                    getattr(self, name)(**arguments)
        finally:
            self._asked, self._by_file = set(asked), tuple(told.calls)
        return {**self._pick.usual(self._infos, {**told.generator, **given}), **told.generator}

    def _sample(self, request: Request, encoded: Encoded, hooks: Callable[[], Hooks]) -> Tensor:
        cond, uncond, begin = encoded
        asked = Asked(begin.latents.shape, self._cache is not None, self._loras, rows_of(cond, uncond))

        def work(model: Model) -> Tensor:
            self.cache_reports, self.memory_plan = (), self._parts.plan
            return diffuse(model, begin, request.sampling, cond, uncond, hooks=hooks(), cache=self._cache)

        recorder = self._cache if isinstance(self._cache, Recorder) else None
        if recorder is not None and self._engine.parallel.cfg > 1:
            raise ValueError("a calibration compares both passes of guidance on one process: leave cfg_p_size at 1")
        latents = self._parts.sampled(self._engine, self._loras, self._lora_how, asked, work)
        if recorder is not None:
            only_on_first(self._parts.mesh, lambda: choice.save(recorder, self._infos, request))
        return latents

    def _note(self, report: CacheReport) -> None:
        self.cache_reports = (*self.cache_reports, report)
