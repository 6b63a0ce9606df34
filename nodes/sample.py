"""The sampler node: ComfyUI's conditioning and latents in, ComfyUI's latents out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management as mm
from comfy_api.latest import io
from torch import Tensor

from lightx2v.cache.choice import choose
from lightx2v.cache.walk import CacheReport
from lightx2v.config import CACHES, SCHEDULERS, Cache, Engine, Sampling, one_of
from lightx2v.diffuse import Hooks, Model, Start, diffuse, fit_empty, fit_mask
from lightx2v.fitting import check_images, check_latents
from lightx2v.guidance import Conditioning
from lightx2v.identify import CheckpointInfo
from lightx2v.offload import rows_of
from lightx2v.offload.shortage import says_if_lost
from lightx2v.parallel.jobs import Job
from lightx2v.preview import read_colours
from lightx2v.report import Watch
from lightx2v.schedules import parse_step_list
from lightx2v_kernels.registry import choices

from . import host
from .cache import CacheOptions
from .load import LoadedExperts, LoadedTransformer
from .offload import OFFLOADS, said, sampled
from .parallel import ParallelOptions, Ranks, engine_of, loras_of
from .report import KEY, so_far

LAST_STEP = 10000
STEP_LIST = ", ".join(map(str, Sampling().denoising_step_list))
NOT_SUPPORTED = (
    *("area", "mask", "hooks", "control", "start_percent", "end_percent"),
    *("concat_mask_index", "reference_latents", "time_dim_concat", "vace_frames", "audio_embed", "camera_conditions"),
)


class LightX2VSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LightX2VSampler",
            display_name="Sampler (LightX2V)",
            category="LightX2V/sampling",
            description="Denoises a video latent. Hands over to and from KSampler (Advanced) at any step.",
            inputs=[*cls._main_inputs(), *cls._run_inputs(), *cls._optional_inputs()],
            outputs=[io.Latent.Output("samples", display_name="latent")],
        )

    @staticmethod
    def _main_inputs() -> list[io.Input]:
        return [
            host.Model.Input("model", tooltip="From Load Model (LightX2V)."),
            io.Conditioning.Input("positive", tooltip="What to show; from this pack's or ComfyUI's own text encode."),
            io.Latent.Input("latent", tooltip="An empty video, or latents to go on from."),
            io.Int.Input(
                "seed",
                default=0,
                min=0,
                max=2**64 - 1,
                control_after_generate=True,
                tooltip="Start of the noise. The same seed gives the same noise as in KSampler.",
            ),
            io.Int.Input(
                "steps",
                default=50,
                min=1,
                max=1000,
                tooltip="Wan: 20 to 50. HunyuanVideo-1.5: 50. A 4-step distilled model: 4.",
            ),
            io.Float.Input(
                "cfg",
                default=5.0,
                min=1.0,
                max=30.0,
                step=0.1,
                tooltip="How strongly to follow the prompt. Wan2.1 T2V: 5 for 14B, 6 for 1.3B. HunyuanVideo-1.5: 6. "
                "1: no guidance.",
            ),
            io.Float.Input(
                "shift",
                default=5.0,
                min=0.1,
                max=100.0,
                step=0.1,
                tooltip="Above 1 spends more steps on coarse structure. Wan2.1 T2V: 5 for 14B, 8 to 12 for 1.3B. "
                "HunyuanVideo-1.5: 5, at 720p 9 (T2V) or 7 (I2V).",
            ),
            io.Combo.Input(
                "scheduler",
                options=list(SCHEDULERS),
                default="unipc",
                tooltip="unipc: Wan's own, order 2. euler: HunyuanVideo-1.5's, as KSampler's with the simple "
                "scheduler. distilled: the levels of denoising_step_list, for 4-step models.",
            ),
        ]

    @staticmethod
    def _run_inputs() -> list[io.Input]:
        return [
            io.Combo.Input(
                "attention",
                options=list(choices("attention")),
                default="auto",
                tooltip="auto: the fastest that is right on this GPU, measured once; 8-bit ones where they save 10 % "
                "or more of the time and keep a cosine of 0.999 to fp32. exact: the fastest that rounds no more than "
                "PyTorch. A named one runs or says why not.",
            ),
            io.Combo.Input(
                "offload",
                options=list(OFFLOADS),
                default="auto",
                tooltip="auto: stays on the GPU until ComfyUI needs the room; where it does not fit, some blocks pass "
                "through. model: back to RAM after sampling (frees 28.6 GB for Wan 14B in bf16). block: rests in RAM "
                "and passes through the GPU, 1.9 GB of it at a time.",
            ),
            io.Combo.Input(
                "cache",
                options=list(CACHES),
                default="none",
                tooltip="Reuse of results between steps, at the usual threshold: 0.15 for teacache, 0.24 for magcache; "
                "Wan2.1 1.3B 0.08 and 0.12. none computes all of them: 2 passes a step with cfg above 1.",
            ),
        ]

    @staticmethod
    def _optional_inputs() -> list[io.Input]:
        return [
            io.Conditioning.Input("negative", optional=True, tooltip="What to avoid; needed when cfg is above 1."),
            host.advanced(
                io.Int.Input(
                    "start_at_step",
                    default=0,
                    min=0,
                    max=LAST_STEP,
                    optional=True,
                    tooltip="First step to run, counted from 0. Above 0 the latent is not regenerated completely.",
                )
            ),
            host.advanced(
                io.Int.Input(
                    "end_at_step",
                    default=LAST_STEP,
                    min=1,
                    max=LAST_STEP,
                    optional=True,
                    tooltip="Stop before this step and leave the remaining noise in; 10000 runs to the end.",
                )
            ),
            host.advanced(
                io.Boolean.Input(
                    "add_noise",
                    default=True,
                    optional=True,
                    tooltip="Off when the latent still carries the noise of another sampler that stopped early.",
                )
            ),
            host.advanced(
                io.String.Input(
                    "denoising_step_list",
                    default=STEP_LIST,
                    optional=True,
                    tooltip="Levels for the distilled scheduler, in thousandths before the shift; replaces steps.",
                )
            ),
            *LightX2VSampler._expert_inputs(),
            CacheOptions.Input(
                "cache_options",
                optional=True,
                tooltip="From Cache (LightX2V): method, threshold (0.15) and the rest, in place of the cache widget.",
            ),
            host.advanced(
                io.Float.Input(
                    "vram_budget",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    optional=True,
                    tooltip="GB of GPU memory that offload auto and block may take: 8 keeps to 8 GB. 0: auto takes "
                    "what is free, block as little as can be.",
                )
            ),
            ParallelOptions.Input(
                "parallel",
                optional=True,
                tooltip="From Parallel (LightX2V): 2 or more GPUs for this video. Nothing connected: one.",
            ),
        ]

    @staticmethod
    def _expert_inputs() -> list[io.Input]:
        return [
            host.advanced(
                io.Float.Input(
                    "cfg_low",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    optional=True,
                    tooltip="cfg of the low-noise expert, for models that have two. 0: the same as cfg. "
                    "Wan2.2 T2V A14B: cfg 4, cfg_low 3.",
                )
            ),
            host.advanced(
                io.Float.Input(
                    "boundary",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    optional=True,
                    tooltip="Noise level below which the low-noise expert takes over. 0: the model's own, 0.875 for "
                    "Wan2.2 T2V, 0.9 for I2V.",
                )
            ),
            host.advanced(
                io.Int.Input(
                    "boundary_step",
                    default=0,
                    min=0,
                    max=LAST_STEP,
                    optional=True,
                    tooltip="Steps of the high-noise expert, instead of the boundary: 2 for 4-step models. 0: off.",
                )
            ),
        ]

    @classmethod
    @says_if_lost
    def execute(
        cls,
        model: LoadedTransformer | LoadedExperts,
        positive: list,
        latent: dict[str, Any],
        negative: list | None = None,
        cache_options: Cache | None = None,
        parallel: Ranks | None = None,
        **widgets: Any,
    ) -> io.NodeOutput:
        sampling, engine = _sampling(widgets), _engine(widgets)
        if sampling.guided and negative is None:
            raise ValueError(
                f"cfg is {sampling.cfg_scale:g}, which needs the negative input; connect it or set cfg to 1"
            )
        experts = (model.high, model.low) if isinstance(model, LoadedExperts) else (model,)
        info, samples = experts[0].info, latent["samples"]
        check_latents(info, samples)
        check_images(info, start=_given(positive, "concat_latent_image"), end=False)
        settings = cache_options or Cache(widgets["cache"])
        cond = _conditioning(positive, "positive", info, latent)
        uncond = None if negative is None else _conditioning(negative, "negative", info, latent)
        start = Start(samples, latent.get("noise_mask"), latent.get("batch_index"))
        picture = host.picture_of(info.spec.latents, read_colours(info.header, info.spec.latents.channels))
        watch = Watch(experts[0].load_device)
        with watch.stage("sample") as lines:
            asked = _Asked(experts, engine, start, sampling, (cond, uncond), settings, picture)
            out, said = asked.here() if parallel is None else asked.by(parallel)
            lines += said
        passed_on = {key: value for key, value in latent.items() if key != "downscale_ratio_spacial"}
        made = {"samples": out.to(mm.intermediate_device()), KEY: so_far(latent).then(*watch.stages)}
        return io.NodeOutput({**passed_on, **made})


@dataclass(frozen=True)
class _Asked:
    """One pass of the sampler."""

    experts: Sequence[LoadedTransformer]
    engine: Engine
    start: Start
    sampling: Sampling
    conds: tuple[Conditioning, Conditioning | None]
    cache: Cache
    picture: Callable[[Tensor], Tensor]

    def _hooks(self) -> Hooks:
        return Hooks(host.step_progress(self.sampling.steps, self.picture), host.cancel_point)

    def here(self) -> tuple[Tensor, list[str]]:
        """Latents and lines for the report, made in this process."""
        caches: list[CacheReport] = []
        cache = choose(self.cache, [expert.info for expert in self.experts], caches.append)

        def work(ready: Model) -> Tensor:
            caches.clear()
            return diffuse(ready, self.start, self.sampling, *self.conds, hooks=self._hooks(), cache=cache)

        cond, uncond = self.conds
        rows = rows_of(cond, uncond if self.sampling.guided else None)
        out, plan = sampled(self.experts, self.engine, self.start.latents, cache is not None, work, rows)
        return out, said(self.experts, self.engine, plan, caches)

    def by(self, ranks: Ranks) -> tuple[Tensor, list[str]]:
        """The same by worker processes, where they are worth it."""
        engine = engine_of(self.experts, self.engine, ranks.layout(self.experts, self.sampling.guided))
        paths = tuple(expert.info.path for expert in self.experts)
        job = Job(paths, engine, loras_of(self.experts), self.start, self.sampling, *self.conds, self.cache)
        job = replace(job, pin_limit=host.pin_limit())
        worth, lines = ranks.worth(self.experts, job)
        if worth:
            out, said = ranks.sampled(self.experts, replace(job, previews=host.shows_previews()), self._hooks())
        else:
            out, said = self.here()
        return out, [*lines, *said]


def _engine(widgets: dict[str, Any]) -> Engine:
    one_of("offload", widgets["offload"], OFFLOADS)  # hosts before 0.4 do not check combos of this schema
    budget = widgets.get("vram_budget", 0.0)
    return Engine(attention=widgets["attention"], offload=widgets["offload"], vram_budget_gb=budget)


def _sampling(widgets: dict[str, Any]) -> Sampling:
    one_of("cache", widgets["cache"], CACHES)
    end = widgets.get("end_at_step", LAST_STEP)
    return Sampling(
        seed=widgets["seed"],
        steps=widgets["steps"],
        cfg_scale=widgets["cfg"],
        cfg_low=widgets.get("cfg_low") or None,
        boundary=widgets.get("boundary") or None,
        boundary_step=widgets.get("boundary_step") or None,
        shift=widgets["shift"],
        scheduler=widgets["scheduler"],
        denoising_step_list=parse_step_list(widgets.get("denoising_step_list", STEP_LIST)),
        start_step=widgets.get("start_at_step", 0),
        end_step=None if end >= LAST_STEP else end,
        add_noise=widgets.get("add_noise", True),
    )


def _given(native: list, key: str) -> bool:
    return any(extras.get(key) is not None for _, extras in native)


def _conditioning(native: list, socket: str, info: CheckpointInfo, latent: dict[str, Any]) -> Conditioning:
    """ComfyUI's [[tensor (1, L, D), extras]] as the engine's; refuses what would be ignored."""
    if len(native) != 1:
        raise ValueError(f"{socket} holds {len(native)} prompts; combined and scheduled prompts are not supported yet")
    context, extras = native[0]
    if found := [key for key in NOT_SUPPORTED if extras.get(key) is not None]:
        raise ValueError(
            f"{socket} carries {', '.join(found)}, which this sampler does not support yet; remove that node"
        )
    spec, image, clip = info.spec, None, None
    given = extras.get("concat_latent_image")
    if spec.image_input is not None:
        shape = fit_empty(latent["samples"], spec.latents).shape
        mask = extras.get("concat_mask")
        if mask is None and latent.get("noise_mask") is not None:
            mask = fit_mask(latent["noise_mask"], shape)
        if given is not None:
            check_latents(info, given)
        image = spec.image_input.channels(given, mask, spec.latents, shape)
    if spec.reads_clip:
        if (output := extras.get("clip_vision_output")) is not None:
            clip = getattr(output, spec.image_states).float()
        elif spec.task or given is not None:
            host.log.warning("%s: %s has no clip_vision_output, which it was trained with", info.path.name, socket)
    glyphs = extras.get("conditioning_byt5small")
    return Conditioning(context, image, clip, None if glyphs is None else glyphs.float(), extras.get("attention_mask"))
