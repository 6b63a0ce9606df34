"""LightX2V's JSON files as arguments of the pipeline's methods; what each key means stands in config_keys.py."""

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightx2v import strict_json
from lightx2v.arguments import nearest
from lightx2v.config_keys import (
    CACHE_KEYS,
    CACHE_METHODS,
    DEAD,
    HUNYUAN,
    KEYS,
    LISTS,
    MODEL,
    NEAREST,
    NUMBERS,
    OBJECTS,
    ORIGINALS,
    QUANT_PATHS,
    QUANT_SWITCHES,
    QWEN_SCHEME,
    REFUSED,
    RENAMED,
    SCHEDULER_TYPES,
    SIDES,
    STALE,
    SWITCHES,
    TEXTS,
    UNDONE_BY,
    WHOLE,
)
from lightx2v.identify import CheckpointInfo
from lightx2v.messages import readable
from lightx2v.models.hunyuan_video_15.sizes import size_for_image
from lightx2v.parallel.sizes import IDLE, of_file
from lightx2v.quantized import format_of
from lightx2v_kernels import registry

__all__ = ["UNDONE_BY", "ConfigError", "Reading", "Told", "is_comment", "model_facts", "read_config", "read_told"]
log = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A key that cannot be honoured. key: which. reason: why, and what would be, without the file's name.
    absent: whether all that is wrong is a file that is not there."""

    def __init__(self, where: Path, key: str, reason: str, *, absent: bool = False) -> None:
        super().__init__(readable(f"{where}: {reason}"))
        self.key, self.reason, self.absent = key, readable(reason), absent


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
        settings = strict_json.read(path)
    except OSError as error:
        raise ValueError(f"config_json={str(path)!r} cannot be read: {error.strerror}; give a .json file") from error
    except ValueError as error:
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
        """Raises ConfigError for a key that is not known or is refused, with file, key and what would work."""
        settings = {key: value for key, value in self.settings.items() if not is_comment(key)}
        for key, value in settings.items():
            self._check(key, value)
        originals = {key: path for key in ORIGINALS if (path := self._path(key)) is not None}
        name = self.settings.get("transformer_model_name")
        if name and not self.settings.get("dit_original_ckpt") and not self.settings.get("dit_quantized"):
            originals["dit_original_ckpt"] = self._transformer(str(name))
        calls = {**self._quantize(), **self._offload(), **self._parallel()}
        calls |= {**self._lora(), **self._cache(), **self._vae()}
        unused = tuple(f"{named} ({why})" for _, named, why in self.unused())
        return Told(dict(self._generator()), originals, calls, unused)

    def _error(self, key: str, reason: str, *, absent: bool = False) -> ConfigError:
        return ConfigError(self.where, key, reason, absent=absent)

    def _check(self, key: str, value: Any) -> None:
        if key not in KEYS:
            raise self._error(key, f"{key!r} is no key of these files{nearest(key, KEYS)}")
        row = KEYS[key]
        if value is not None and (wanted := _wanted(key, value)):
            raise self._error(key, f"{key}={value!r}: expected {wanted}")
        if row.verdict == REFUSED and value:
            raise self._error(key, f"{key}={self.settings[key]!r}: {row.says}; remove {key} from the file")

    def unused(self) -> Iterator[tuple[str, str, str]]:
        """Of each key that changes nothing: the key, how to name it, and why."""
        for key, value in self.settings.items():
            if is_comment(key):
                continue
            row = KEYS[key]
            if row.verdict == DEAD:
                yield key, key, row.says
            elif row.verdict == MODEL and key in self.facts and value != self.facts[key]:
                yield key, f"{key}={value!r}", f"the checkpoint has {self.facts[key]!r}"
            elif key == "aspect_ratio" and self._proportions() is None:
                yield key, f"aspect_ratio={value!r}", "the size is told otherwise"
            elif key == "parallel" and value:
                yield from ((f"{key}.{name}", f"{key}.{name}", why) for name, why in IDLE.items() if name in value)
            elif key == "text_len" and value != 512:
                yield key, f"text_len={value!r}", "umT5 is read to 512 tokens"

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
            key = "transformer_model_name"
            raise self._error(key, f"{key}={name!r} is of HunyuanVideo-1.5: remove it")
        if Path(name).name != name:
            key = "transformer_model_name"
            raise self._error(key, f"{key}={name!r} is no name in the folder transformer, such as 480p_t2v")
        return self._path("transformer_model_name", f"transformer/{name}")  # type: ignore[return-value]

    def _proportions(self) -> tuple[int, int] | None:
        """(height, width) of a HunyuanVideo-1.5 video whose size is left to its transformer; None for others."""
        sized = any(self.settings.get(key) for key in ("target_height", "target_width"))
        if sized or not self.settings.get("transformer_model_name"):
            return None
        told = str(self.settings.get("aspect_ratio") or "16:9")
        given = re.fullmatch("([0-9]{1,4}):([0-9]{1,4})", told)
        width, height = map(int, given.groups()) if given else (0, 0)
        if not 0.05 <= height / max(width, 1) <= 20:
            raise self._error("aspect_ratio", f"aspect_ratio={told!r}: expected width:height, such as 16:9")
        return height, width

    def _attention(self) -> str | None:
        keys = ("self_attn_1_type", "cross_attn_1_type", "cross_attn_2_type", "attn_type")
        named = {key: STALE.get(self.settings[key], self.settings[key]) for key in keys if self.settings.get(key)}
        known, elsewhere = registry.choices("attention"), registry.registry("attention").elsewhere
        else_ = "or give attn_mode to create_generator, which wins over the file"
        for key, name in named.items():
            if name not in known:
                why = elsewhere.get(name, f"no attention of that name is registered here{nearest(name, known)}")
                raise self._error(key, f"{key}={self.settings[key]!r}: {why}; write one of {', '.join(known)}, {else_}")
        first = next(iter(named.values()), None)
        if other := next((key for key, name in named.items() if name != first), None):
            told = ", ".join(f"{key}={name!r}" for key, name in named.items())
            raise self._error(other, f"{told}: one attention computes all of them here; write the same name, {else_}")
        return first

    def _one_of(self, key: str, value: str, known: Mapping[str, str]) -> str:
        if value not in known:
            like = f"; the nearest is {NEAREST[value]!r}" if value in NEAREST else nearest(value, known)
            raise self._error(key, f"{key}={value!r} is not supported; known: {', '.join(known)}{like}")
        return known[value]

    def _path(self, key: str, value: object = None) -> Path | None:
        """The file or folder that is meant, which must exist; None for null and ""."""
        text = str(value if value is not None else self.settings.get(key) or "")
        if not text:
            return None
        if text.startswith(("/path/to", "/path to", "path/to", "path to")):
            asks = f"{key}={text!r} is a placeholder: write the real path, or remove {key}"
            raise self._error(key, asks, absent=True)
        tried = [Path(text), *(folder / text for folder in self.folders)]
        found = next((path for path in tried if _exists(path)), None)
        if found is None:
            named, places = readable(text, 200), readable(", ".join(map(str, tried)), 2000)
            raise self._error(key, f"{key}={named!r}: there is no such file; looked for {places}", absent=True)
        return found

    def _scheme(self, *keys: str) -> str | None:
        """The first of these that is told."""
        key = next((key for key in keys if self.settings.get(key)), None)
        if key is None:
            return None
        try:
            format_of(str(self.settings[key]))
        except ValueError as error:
            raise self._error(key, f"{key}: {error}") from None
        return str(self.settings[key])

    def _quantize(self) -> dict[str, Mapping[str, Any]]:
        switches = {name: False for name in QUANT_SWITCHES.values()}
        switches |= {name: True for key, name in QUANT_SWITCHES.items() if self.settings.get(key)}
        if not any(switches.values()):
            return {}
        on = {key.partition("_")[0] for key in QUANT_SWITCHES if self.settings.get(key)}
        on |= {"high", "low"} if "dit" in on else set()
        paths = {QUANT_PATHS[key]: self._path(key) for key in QUANT_PATHS if key.partition("_")[0] in on}
        schemes = {
            "quant_scheme": self._scheme("dit_quant_scheme"),
            "text_encoder_quant_scheme": self._scheme("t5_quant_scheme", QWEN_SCHEME),
            "image_encoder_quant_scheme": self._scheme("clip_quant_scheme"),
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

    def _parallel(self) -> dict[str, Mapping[str, Any]]:
        told = self.settings.get("parallel")
        if not told:
            return {}
        try:
            arguments = of_file(told)
        except ValueError as error:
            raise self._error("parallel", f"parallel={told!r}: {error}") from None
        sizes = (arguments.get(name, 1) for name in ("cfg_p_size", "seq_p_size"))
        return {"enable_parallel": arguments} if any(size > 1 for size in sizes) else {}

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


def is_comment(key: str) -> bool:
    """Whether a key of a file is its writer's own."""
    return key.lstrip("_").startswith(("comment", "//"))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is longer than the system allows, or a folder that may not be entered
        return False


def _wanted(key: str, value: object) -> str | None:
    """What the key's value must be, where this is none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in SWITCHES and value not in (True, False):
        return "true or false"
    if key in WHOLE and not (number and value == int(value)):  # type: ignore[call-overload]
        return "a whole number"
    if key in NUMBERS and not number:
        return "a number"
    if key in OBJECTS and value and not isinstance(value, dict):
        return "an object, {...}"
    if key in TEXTS and value and not isinstance(value, str):
        return "a text"
    if key == "lora_configs" and isinstance(value, list):
        if not all(isinstance(each, dict) and isinstance(each.get("path"), str) for each in value):
            return 'a list of objects, each with a "path"'
    return "a list" if key in LISTS and not isinstance(value, list) else None
