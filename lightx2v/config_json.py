"""LightX2V's JSON files: what each key means here, and a file as arguments of the pipeline's methods.

`TABLE` has a verdict for every key that LightX2V's own files or its code know; docs/config-json.md shows it.
"""

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightx2v.arguments import nearest
from lightx2v.identify import CheckpointInfo
from lightx2v.models.hunyuan_video_15.sizes import size_for_image
from lightx2v_kernels import registry

log = logging.getLogger(__name__)
HONOURED, MODEL, DEAD, REFUSED = "honoured", "model", "dead", "refused"
# What the verdicts mean.
VERDICTS = {
    HONOURED: "does what it says",
    MODEL: "the checkpoint's header decides; a warning where the file says something else",
    DEAD: "accepted, changes nothing, and is named in the one warning of the file",
    REFUSED: "an error, unless it is switched off (false, null, 0, empty)",
}


@dataclass(frozen=True)
class Row:
    """keys: separated by blanks; `block.key` is inside a block. says: what it becomes, or why it becomes nothing."""

    keys: str
    verdict: str
    says: str


SPARSE = "setting of a sparse attention, which is not there"
OFFLOADED = "encoders wait in RAM between their turns, whatever this says"
TABLE = (
    Row("infer_steps", HONOURED, "infer_steps of create_generator; a distilled model's steps are denoising_step_list"),
    Row("target_height target_width", HONOURED, "height, width"),
    Row("target_video_length", HONOURED, "num_frames"),
    Row("sample_guide_scale", HONOURED, "guidance_scale: one number, or those of the high- and low-noise expert"),
    Row("enable_cfg", HONOURED, "false: guidance_scale 1"),
    Row("sample_shift fps boundary boundary_step_index denoising_step_list resize_mode", HONOURED, "by that name"),
    Row("scheduler_type", HONOURED, "WanStepDistillScheduler: scheduler distilled; WanScheduler: unipc"),
    Row("self_attn_1_type", HONOURED, "attn_mode; sage_attn and sage_attn2_k_int8_v_fp8 mean sage_attn2"),
    Row("cross_attn_1_type cross_attn_2_type", HONOURED, "one attention computes all: the name must be the same"),
    Row("dit_original_ckpt high_noise_original_ckpt low_noise_original_ckpt", HONOURED, "as in LightX2VPipeline"),
    Row("dit_quantized dit_quantized_ckpt", HONOURED, "enable_quantize"),
    Row("high_noise_quantized_ckpt low_noise_quantized_ckpt", HONOURED, "enable_quantize"),
    Row(
        "dit_quant_scheme",
        HONOURED,
        "quant_scheme of enable_quantize: a kernel that it names runs or raises; fp8 takes the best",
    ),
    Row("t5_quantized t5_quantized_ckpt t5_quant_scheme", HONOURED, "enable_quantize, text_encoder_..."),
    Row("clip_quantized clip_quantized_ckpt clip_quant_scheme", HONOURED, "enable_quantize, image_encoder_..."),
    Row("cpu_offload offload_granularity vae_cpu_offload", HONOURED, "enable_offload"),
    Row("lora_configs lora_dynamic_apply", HONOURED, "enable_lora"),
    Row("feature_caching", HONOURED, "enable_cache: Tea, Mag, NoCaching; other methods are refused"),
    Row("coefficients teacache_thresh use_ret_steps", HONOURED, "enable_cache"),
    Row("magcache_K magcache_thresh magcache_retention_ratio", HONOURED, "enable_cache"),
    Row("magcache_ratios magcache_calibration", HONOURED, "enable_cache"),
    Row("use_lightvae use_tae vae_path tae_path", HONOURED, "enable_lightvae"),
    Row("use_tiling_vae", HONOURED, "true: enable_vae_tiling; false: whole frames where they fit"),
    Row("in_dim out_dim dim ffn_dim num_heads num_layers freq_dim eps model_type", MODEL, "the network"),
    Row("num_channels_latents vae_stride text_len use_image_encoder patch_size", MODEL, "latents and encoders"),
    Row("parallel", REFUSED, "several GPUs are not supported yet; sizes of 1 are accepted"),
    Row("changing_resolution", REFUSED, "steps at another resolution are not supported; use a cache for speed"),
    Row("enable_dynamic_cfg", REFUSED, "models that read their guidance as an input are not supported"),
    Row("video_frame_interpolation", REFUSED, "frames are not interpolated; interpolate the saved video"),
    Row("video_super_resolution", REFUSED, "videos are not enlarged; enlarge the saved video"),
    Row("disagg_mode", REFUSED, "all stages run in one process"),
    Row("use_prompt_enhancer", REFUSED, "prompts are taken as they are; write the longer prompt yourself"),
    Row("do_mm_calib", REFUSED, "linear layers are not calibrated"),
    Row("lightvae_pruning_rate lightvae_encoder_vae_pth lightvae_encoder_path", REFUSED, "MG-LightVAE cannot be read"),
    Row("transformer_model_name", HONOURED, "of HunyuanVideo-1.5: which of the folder's transformers; 480p or 720p"),
    Row("attn_type", HONOURED, "of HunyuanVideo-1.5: attn_mode"),
    Row("aspect_ratio", HONOURED, "of HunyuanVideo-1.5: height and width at the size of its transformer"),
    Row("qwen25vl_quantized qwen25vl_quantized_ckpt qwen25vl_quant_scheme", HONOURED, "text_encoder_... as of t5"),
    Row("qwen25vl_cpu_offload siglip_cpu_offload byt5_cpu_offload", DEAD, OFFLOADED),
    Row("t5_cpu_offload clip_cpu_offload", DEAD, OFFLOADED),
    Row("offload_ratio vae_offload_cache clean_cuda_cache num_disk_workers", DEAD, "memory is planned here"),
    Row("lazy_load unload_modules", DEAD, "weights that RAM cannot hold are read from the file as needed, by plan"),
    Row("t5_lazy_load empty_cache_min_free_gib empty_cache_min_reclaimable_gib", DEAD, "memory is planned here"),
    Row("rope_type rope_chunk rope_chunk_size rotary_chunk", DEAD, "kernels are chosen by themselves"),
    Row("rms_norm_type layer_norm_type modulate_type", DEAD, "kernels are chosen by themselves"),
    Row("tp_mm_type tp_rms_norm_type mxfp8_fuse_enable", DEAD, "kernels are chosen by themselves"),
    Row("nvfp4_ffn_split_n_workaround", DEAD, "kernels are chosen by themselves"),
    Row("clip_attn_type", DEAD, "the image encoder has its own attention"),
    Row("vae_dtype vae_weight_dtype", DEAD, "float32 on a CPU, bfloat16 on a GPU"),
    Row("vae_name vae_type need_scaled", DEAD, "told from the VAE's file"),
    Row("use_stream_vae", DEAD, "the VAE always works chunk by chunk"),
    Row("use_bfloat16", DEAD, "dtype of create_generator decides"),
    Row("t5_original_ckpt t5_tokenizer_path clip_original_ckpt", DEAD, "found in model_path"),
    Row("use_compile", DEAD, "nothing is compiled; the video is the same"),
    Row("enable_reuse", DEAD, "each video encodes its own prompt; the video is the same"),
    Row("max_area resolution fixed_area align_single_card_shape", DEAD, "target_height and target_width decide"),
    Row("cfg_scale", DEAD, "of enable_dynamic_cfg"),
    Row("changing_resolution_steps resolution_rate", DEAD, "of changing_resolution"),
    Row("downsample_factor residual_diff_threshold", DEAD, "of caches that are not there"),
    Row("sub_servers", DEAD, "no other server is asked"),
    Row("disagg_config rdma_buffer_slot_size clip_embed_dim", DEAD, "of disagg_mode"),
    Row("seq_parallel cfg_parallel", DEAD, "of parallel"),
    Row("seed image_path model_path model_cls task", DEAD, "give it to LightX2VPipeline or generate"),
    Row("sparge sparge_ckpt draft_attn_sparsity_ratio", DEAD, SPARSE),
    Row("dynamic_sparse_attn_setting general_sparse_attn_setting nbhd_attn_setting", DEAD, SPARSE),
    Row("rainfusion_attn_setting sol_attn_setting sparge_attn_setting", DEAD, SPARSE),
    Row("spas_flash_attn4_setting spas_sage_attn2_setting spas_sage_attn3_setting", DEAD, SPARSE),
    Row("radial_attn_setting svg_attn_setting svg2_attn_setting", DEAD, SPARSE),
)
KEYS = {key: row for row in TABLE for key in row.keys.split()}
# Attention names of LightX2V whose kernels have another name here, or had another one there.
STALE = {"sage_attn": "sage_attn2", "sage_attn2_k_int8_v_fp8": "sage_attn2", "spas_sage_attn": "spas_sage_attn2"}
RENAMED = {
    "infer_steps": "infer_steps",
    "target_height": "height",
    "target_width": "width",
    "target_video_length": "num_frames",
    "sample_shift": "sample_shift",
    "fps": "fps",
    "boundary": "boundary",
    "boundary_step_index": "boundary_step_index",
    "denoising_step_list": "denoising_step_list",
    "resize_mode": "resize_mode",
}
SCHEDULER_TYPES = {"WanStepDistillScheduler": "distilled", "WanScheduler": "unipc"}
CACHE_METHODS = {"Tea": "Tea", "Mag": "Mag", "NoCaching": "None"}
CACHE_KEYS = (
    *("coefficients", "teacache_thresh", "use_ret_steps"),
    *("magcache_calibration", "magcache_K", "magcache_thresh", "magcache_retention_ratio", "magcache_ratios"),
)
QUANT_PATHS = {
    "dit_quantized_ckpt": "dit_quantized_ckpt",
    "high_noise_quantized_ckpt": "high_noise_quantized_ckpt",
    "low_noise_quantized_ckpt": "low_noise_quantized_ckpt",
    "t5_quantized_ckpt": "text_encoder_quantized_ckpt",
    "clip_quantized_ckpt": "image_encoder_quantized_ckpt",
    "qwen25vl_quantized_ckpt": "text_encoder_quantized_ckpt",
}
QUANT_SWITCHES = {
    "dit_quantized": "dit_quantized",
    "t5_quantized": "text_encoder_quantized",
    "clip_quantized": "image_encoder_quantized",
    "qwen25vl_quantized": "text_encoder_quantized",
}
# What undoes a method that a file called, where the next file says nothing about it; {} where its defaults do.
UNDONE_BY: Mapping[str, Mapping[str, Any]] = {
    "enable_offload": {"offload_granularity": "auto"},
    "enable_lora": {"lora_configs": ()},
    "enable_cache": {"cache_method": "None"},
    "enable_vae_tiling": {"mode": "auto"},
}
SWITCHES = frozenset(
    "enable_cfg cpu_offload vae_cpu_offload dit_quantized t5_quantized clip_quantized qwen25vl_quantized use_lightvae "
    "use_tae use_tiling_vae use_ret_steps magcache_calibration lora_dynamic_apply".split()
)
WHOLE = frozenset(
    "infer_steps target_height target_width target_video_length fps boundary_step_index magcache_K".split()
)
NUMBERS = WHOLE | frozenset("sample_shift boundary teacache_thresh magcache_thresh magcache_retention_ratio".split())
LISTS = frozenset("denoising_step_list lora_configs coefficients magcache_ratios".split())
HUNYUAN = "hunyuan1.5"
SIDES = {"480p": 640, "720p": 960}  # pixels of the square that such a HunyuanVideo-1.5 was trained on
QWEN_SCHEME = "qwen25vl_quant_scheme"
ORIGINALS = ("dit_original_ckpt", "high_noise_original_ckpt", "low_noise_original_ckpt")


@dataclass(frozen=True)
class Told:
    """What a file asks for. generator: arguments of create_generator. originals: checkpoints by their argument's name.
    calls: method of the pipeline -> its arguments. unused: one entry a key that changes nothing, in words."""

    generator: Mapping[str, Any] = field(default_factory=dict)
    originals: Mapping[str, Path] = field(default_factory=dict)
    calls: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def read_config(path: str | Path) -> dict[str, Any]:
    """The file's settings. Raises ValueError for a file that is missing, no JSON or no JSON object."""
    path = Path(path)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config_json={str(path)!r} cannot be read: {error.strerror}; give a .json file") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; correct the file") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a JSON {type(settings).__name__}; expected an object of settings, {{...}}")
    return settings


def model_facts(info: CheckpointInfo) -> dict[str, Any]:
    """What a checkpoint says of itself, under the keys that a file may hold."""
    spec, config = info.spec, info.config
    own = {
        "in_dim": "in_channels",
        "out_dim": "out_channels",
        "dim": "hidden_size",
        "ffn_dim": "ffn_size",
        "num_heads": "num_heads",
        "num_layers": "num_layers",
        "freq_dim": "freq_dim",
        "eps": "eps",
    }
    facts = {key: getattr(config, name) for key, name in own.items() if hasattr(config, name)}
    facts |= {"num_channels_latents": spec.latents.channels, "vae_stride": list(spec.latents.stride)}
    facts |= {"patch_size": list(spec.patch_size), "use_image_encoder": spec.reads_clip}
    return {**facts, "family": spec.family}


@dataclass(frozen=True)
class Reading:
    """One file being translated.

    where: its path, for messages. facts: see `model_facts`; empty where no checkpoint is known yet.
    folders: where relative paths may start. given: arguments of create_generator that the caller gives: the file's own
    are not looked at.
    """

    where: Path
    settings: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    folders: Sequence[Path] = ()
    given: Collection[str] = ()

    def translate(self) -> Told:
        """Raises ValueError for a key that is not known or is refused, naming the file, the key and what would work."""
        settings = {key: value for key, value in self.settings.items() if not _is_comment(key)}
        for key, value in settings.items():
            self._check(key, value)
        originals = {key: path for key in ORIGINALS if (path := self._path(key)) is not None}
        if name := self.settings.get("transformer_model_name"):
            originals.setdefault("dit_original_ckpt", self._transformer(str(name)))
        calls = {**self._quantize(), **self._offload(), **self._lora(), **self._cache(), **self._vae()}
        return Told(dict(self._generator()), originals, calls, tuple(self._unused()))

    def _check(self, key: str, value: Any) -> None:
        if key not in KEYS:
            raise ValueError(f"{self.where}: {key!r} is no key of these files{nearest(key, KEYS)}")
        row = KEYS[key]
        if value is not None and (wanted := _wanted(key, value)):
            raise ValueError(f"{self.where}: {key}={value!r}: expected {wanted}")
        if key == "parallel" and isinstance(value, dict):
            value = [name for name, size in value.items() if name.endswith("p_size") and size != 1]
        if row.verdict == REFUSED and value:
            raise ValueError(f"{self.where}: {key}={self.settings[key]!r}: {row.says}; remove {key} from the file")

    def _unused(self) -> Iterator[str]:
        for key, value in self.settings.items():
            if _is_comment(key):
                continue
            row = KEYS[key]
            if row.verdict == DEAD:
                yield f"{key} ({row.says})"
            elif row.verdict == MODEL and key in self.facts and value != self.facts[key]:
                yield f"{key}={value!r} (the checkpoint has {self.facts[key]!r})"
            elif key == "aspect_ratio" and self._proportions() is None:
                yield f"aspect_ratio={value!r} (the size is told otherwise)"
            elif key == "text_len" and value != 512:
                yield f"text_len={value!r} (umT5 is read to 512 tokens)"

    def _generator(self) -> Iterator[tuple[str, Any]]:
        for key, name in RENAMED.items():
            if self.settings.get(key) is not None:
                yield name, int(self.settings[key]) if key in WHOLE else self.settings[key]
        if self.settings.get("enable_cfg") is False:
            yield "guidance_scale", 1.0
        elif self.settings.get("sample_guide_scale") is not None:
            yield "guidance_scale", self.settings["sample_guide_scale"]
        if scheduler := self.settings.get("scheduler_type"):
            yield "scheduler", self._one_of("scheduler_type", scheduler, SCHEDULER_TYPES)
        if ratio := self._proportions():
            side = SIDES["720p" if "720p" in str(self.settings.get("transformer_model_name")) else "480p"]
            yield from zip(("height", "width"), size_for_image(side**2, ratio), strict=True)
        if "attn_mode" not in self.given and (attention := self._attention()):
            yield "attn_mode", attention

    def _transformer(self, name: str) -> Path:
        if self.facts.get("family", HUNYUAN) != HUNYUAN:
            raise ValueError(f"{self.where}: transformer_model_name={name!r} is of HunyuanVideo-1.5: remove it")
        return self._path("transformer_model_name", f"transformer/{name}")  # type: ignore[return-value]

    def _proportions(self) -> tuple[int, int] | None:
        """(height, width) of a HunyuanVideo-1.5 video whose size is left to its transformer; None for others."""
        sized = any(self.settings.get(key) for key in ("target_height", "target_width"))
        if sized or not self.settings.get("transformer_model_name"):
            return None
        told = str(self.settings.get("aspect_ratio") or "16:9")
        width, _, height = told.partition(":")
        if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
            raise ValueError(f"{self.where}: aspect_ratio={told!r}: expected width:height, such as 16:9")
        return int(height), int(width)

    def _attention(self) -> str | None:
        keys = ("self_attn_1_type", "cross_attn_1_type", "cross_attn_2_type", "attn_type")
        named = {key: STALE.get(self.settings[key], self.settings[key]) for key in keys if self.settings.get(key)}
        known, elsewhere = registry.choices("attention"), registry.registry("attention").elsewhere
        else_ = "or give attn_mode to create_generator, which wins over the file"
        for key, name in named.items():
            if name not in known:
                why = elsewhere.get(name, f"no attention of that name is registered here{nearest(name, known)}")
                raise ValueError(
                    f"{self.where}: {key}={self.settings[key]!r}: {why}; write one of {', '.join(known)}, {else_}"
                )
        if len(set(named.values())) > 1:
            raise ValueError(
                f"{self.where}: {', '.join(f'{key}={name!r}' for key, name in named.items())}: one attention computes "
                f"all of them here; write the same name, {else_}"
            )
        return next(iter(named.values()), None)

    def _one_of(self, key: str, value: str, known: Mapping[str, str]) -> str:
        if value not in known:
            raise ValueError(
                f"{self.where}: {key}={value!r} is not supported; known: {', '.join(known)}{nearest(value, known)}"
            )
        return known[value]

    def _path(self, key: str, value: object = None) -> Path | None:
        """The file or folder that is meant, which must exist; None for null and ""."""
        text = str(value if value is not None else self.settings.get(key) or "")
        if not text:
            return None
        if text.startswith(("/path/to", "/path to", "path/to", "path to")):
            raise ValueError(f"{self.where}: {key}={text!r} is a placeholder: write the real path, or remove {key}")
        tried = [Path(text), *(folder / text for folder in self.folders)]
        found = next((path for path in tried if path.exists()), None)
        if found is None:
            places = ", ".join(str(path) for path in tried)
            raise ValueError(f"{self.where}: {key}={text!r}: there is no such file; looked for {places}")
        return found

    def _quantize(self) -> dict[str, Mapping[str, Any]]:
        switches = {name: False for name in QUANT_SWITCHES.values()}
        switches |= {name: True for key, name in QUANT_SWITCHES.items() if self.settings.get(key)}
        if not any(switches.values()):
            return {}
        on = {key.partition("_")[0] for key in QUANT_SWITCHES if self.settings.get(key)}
        on |= {"high", "low"} if "dit" in on else set()
        paths = {QUANT_PATHS[key]: self._path(key) for key in QUANT_PATHS if key.partition("_")[0] in on}
        schemes = {
            "quant_scheme": self.settings.get("dit_quant_scheme"),
            "text_encoder_quant_scheme": self.settings.get("t5_quant_scheme") or self.settings.get(QWEN_SCHEME),
            "image_encoder_quant_scheme": self.settings.get("clip_quant_scheme"),
        }
        return {
            "enable_quantize": {**switches, **paths, **{name: scheme for name, scheme in schemes.items() if scheme}}
        }

    def _offload(self) -> dict[str, Mapping[str, Any]]:
        if not {"cpu_offload", "vae_cpu_offload"} & self.settings.keys():
            return {}
        # A file that says nothing of the transformer leaves it to the plan.
        usual = "block" if "cpu_offload" in self.settings else "auto"
        how = {
            "cpu_offload": bool(self.settings.get("cpu_offload", True)),
            "offload_granularity": self.settings.get("offload_granularity") or usual,
            "vae_offload": bool(self.settings.get("vae_cpu_offload")),
        }
        return {"enable_offload": how}

    def _lora(self) -> dict[str, Mapping[str, Any]]:
        configs = self.settings.get("lora_configs")
        if not configs:
            return {}
        found = [{**config, "path": self._path("lora_configs", config.get("path", ""))} for config in configs]
        dynamic = bool(self.settings.get("lora_dynamic_apply"))
        return {"enable_lora": {"lora_configs": found, "lora_dynamic_apply": dynamic}}

    def _cache(self) -> dict[str, Mapping[str, Any]]:
        method = self.settings.get("feature_caching")
        if not method:
            return {}
        told = {key: self.settings[key] for key in CACHE_KEYS if self.settings.get(key) is not None}
        return {"enable_cache": {"cache_method": self._one_of("feature_caching", method, CACHE_METHODS), **told}}

    def _vae(self) -> dict[str, Mapping[str, Any]]:
        calls: dict[str, Mapping[str, Any]] = {}
        if self.settings.get("use_lightvae") or self.settings.get("use_tae") or self.settings.get("vae_path"):
            calls["enable_lightvae"] = {
                "use_lightvae": bool(self.settings.get("use_lightvae")),
                "use_tae": bool(self.settings.get("use_tae")),
                "vae_path": self._path("vae_path"),
                "tae_path": self._path("tae_path") if self.settings.get("use_tae") else None,
            }
        if "use_tiling_vae" in self.settings:
            calls["enable_vae_tiling"] = {"mode": "tiled" if self.settings["use_tiling_vae"] else "auto"}
        return calls


def read_told(path: str | Path, model_path: Path, infos: Sequence[CheckpointInfo], given: Collection[str] = ()) -> Told:
    """A file for a model, with one warning for all keys that change nothing. Errors: see `Reading.translate`.

    Relative paths in the file start at the working folder, at model_path or its parent, or beside the file.
    """
    where, facts = Path(path), model_facts(infos[0]) if infos else {}
    folders = (model_path, model_path.parent, where.parent)
    told = Reading(where, read_config(where), facts, folders, given).translate()
    if told.unused:
        log.warning("%s: without effect: %s", where, "; ".join(told.unused))
    return told


def _is_comment(key: str) -> bool:
    return key.lstrip("_").startswith(("comment", "//"))


def _wanted(key: str, value: object) -> str | None:
    """What the key's value must be, where this is none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in SWITCHES and value not in (True, False):
        return "true or false"
    if key in WHOLE and not (number and value == int(value)):  # type: ignore[call-overload]
        return "a whole number"
    if key in NUMBERS and not number:
        return "a number"
    return "a list" if key in LISTS and not isinstance(value, list) else None
