"""Loaders. Each picker lists only the files that fit it, told from their headers."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import torch
from comfy_api.latest import io
from torch import Tensor, nn

from lightx2v.checkpoint import CheckpointError
from lightx2v.config import DTYPES, QUANTS, Engine
from lightx2v.experts import require_pair
from lightx2v.identify import CheckpointInfo, identify
from lightx2v.loading import build_transformer, compute_dtype, fill, with_attention
from lightx2v.lora import Applied, Lora, check_loras, for_expert
from lightx2v.memory import fused_by, transformer_activation_bytes
from lightx2v.models import TextEncoder
from lightx2v.offload import Home, Placing, Plan
from lightx2v.offload.disk import left_in_file
from lightx2v.text import byt5, hunyuan15, qwen, umt5
from lightx2v.text.chat import tokenizer_in

from . import host
from .lora import LoraStack
from .weights import Waiting, Weights

MODELS, TEXT_ENCODERS = "diffusion_models", "text_encoders"
UMT5, QWEN, BYT5 = "umT5", "Qwen2.5-VL", "byT5"
NONE = "none"
WAITING = Waiting()  # like the host's own list of what is loaded, one for all graphs
EXPERTS = tuple((f"{role}_original_ckpt", f"{role}_quantized_ckpt") for role in ("high_noise", "low_noise"))


class LoadedTransformer(host.EngineHandle):
    """A transformer in the host's books, with what its file said about itself.

    Its weights are read when they are first needed, straight to where they are needed: a request that does not fit the
    model is refused before that, and encoders run while it is not there yet. Where a handle for the same file has just
    gone, this one takes its weights over, with other LoRAs.
    """

    def __init__(self, info: CheckpointInfo, engine: Engine, loras: tuple[Lora, ...], name: str = "") -> None:
        device = mm.get_torch_device()
        key = (*host.version(info.path), engine.dtype, engine.quant, str(device))
        self.held = WAITING.take(key) or Weights(key, engine, build_transformer(info, engine, device), Placing(device))
        super().__init__(host.Housed(self.held.network), device, mm.unet_offload_device())
        self.info, self.loras = info, loras
        WAITING.follow(self, self.held, name)

    @property
    def engine(self) -> Engine:
        return self.held.engine

    @property
    def placing(self) -> Placing:
        return self.held.placing

    @placing.setter
    def placing(self, shared: Placing) -> None:
        self.held.placing = shared

    @property
    def applied(self) -> Applied | None:
        """None: the weights are not read yet, or still have other LoRAs."""
        applied = self.held.applied
        return applied if applied is not None and applied.loras == self.loras else None

    def read(self, plan: Plan | None = None) -> None:
        """Read the weights, unless they were: to RAM as far as a plan does not leave them in the file, or to the load
        device where there is none."""
        held = self.held
        if self.applied is not None:
            return
        try:
            if held.applied is None:
                left, held.filed = frozenset[str](), 0
                if plan is not None:
                    left, held.filed = left_in_file(held.network, plan.filed, plan.resident), plan.filed
                target = self.load_device if plan is None else torch.device("cpu")
                self._fill(held.network, target, lambda name: name not in left)
            held.wear(self.loras, self.info, self.load_device)
        except BaseException:  # cancelled, or a bad file: half of a model is of no use to anybody
            self._forget()
            raise

    def _fill(self, network: nn.Module, device: torch.device, only: Callable[[str], bool]) -> None:
        fill(network, self.info, device, self.load_device, only=only, on_tensor=host.cancel_point)

    def _forget(self) -> None:
        """The weights are read again at their next use."""
        self.placing.forget()
        self.held.forget(build_transformer(self.info, self.engine, self.load_device))
        self.model.network = self.held.network

    def leave(self) -> None:
        """Somebody else has the weights: none of them stays in this process."""
        if self.held.applied is not None:
            host.back_to_ram(self)
            self._forget()
            self.tell_host(0)

    def partially_load(self, *args: Any, **kwargs: Any) -> int:
        if self.held.filed:
            self._forget()
        self.read()
        return super().partially_load(*args, **kwargs)

    def move(self, device: torch.device) -> None:
        """What was in RAM once stays there, so that leaving the device copies nothing; unless RAM is short."""
        held = self.held
        if held.applied is None or held.filed:
            return
        if device.type == "cpu":
            held.home = held.home or Home(held.network)
            held.home.leave()
            return
        self.placing.forget()
        if held.home is None:
            super().move(device)
            return
        held.home.copy_to(device)
        if not host.ram_to_spare():
            held.home = None

    def network(self, attention: str) -> nn.Module:
        """The transformer with the attention backend that the sampler asks for; weights are shared, never copied."""
        self.read()
        return self._with(attention)

    def resting_network(self, attention: str, plan: Plan) -> nn.Module:
        """The same, with its weights in RAM, or in the file as far as the plan leaves them there."""
        if self.held.applied is not None and not plan.suits(self.held.filed):
            self._forget()
        self.read(plan)
        network = self._with(attention)
        if not self.held.filed:
            self.held.home = self.held.home or Home(network)
        return network

    def _with(self, attention: str) -> nn.Module:
        held = self.held
        if attention != self.engine.attention:
            if held.home is not None:
                host.back_to_ram(self)
            held.engine = replace(held.engine, attention=attention)
            held.network = with_attention(held.network, self.info, held.engine, self.load_device)
            self.model.network = held.network
            held.home = None if held.home is None else Home(held.network)
        return held.network

    def activation_bytes(self, samples: Tensor) -> int:
        """Beside the weights, for latents (B, C, T, H, W) or a batch of single frames (B, C, H, W)."""
        shape = samples.shape if samples.ndim == 5 else samples.unsqueeze(2).shape
        dtype = compute_dtype(self.engine, self.info.dtype, self.load_device)
        return transformer_activation_bytes(self.info, shape, dtype, fused=fused_by(self.model.network))


@dataclass(frozen=True)
class LoadedExperts:
    """The two transformers of one model: `high` lays out the video at high noise, `low` draws the rest."""

    high: LoadedTransformer
    low: LoadedTransformer


class LightX2VLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        original, quantised = _model_files()
        return host.schema(
            node_id="LightX2VLoadModel",
            display_name="Load Model (LightX2V)",
            category="LightX2V/loaders",
            description="Loads a video diffusion model. Family, task and storage format are read from the file.",
            inputs=[
                io.Combo.Input(
                    "original_ckpt",
                    options=[*original, NONE],
                    optional=True,
                    tooltip="Models in bf16, fp16 or fp32 of models/diffusion_models (and extra_model_paths) that this "
                    "pack can run: Wan2.1 T2V 14B is 28.6 GB in bf16, HunyuanVideo-1.5 16.7 GB. A sharded "
                    "model is listed once. none: use quantized_ckpt.",
                ),
                _dtype_input(),
                io.Combo.Input(
                    "quantized_ckpt",
                    options=[NONE, *quantised],
                    default=NONE,
                    optional=True,
                    tooltip="The same models in fp8, int8, NVFP4, MXFP8 or GGUF (Wan 14B: 14.5 GB in fp8); what "
                    "becomes of the weights, quant says. Set original_ckpt to none to use it.",
                ),
                _lora_input("LoRAs for this model"),
                _quant_input(),
            ],
            outputs=[host.Model.Output("model", display_name="model")],
        )

    @classmethod
    def fingerprint_inputs(cls, original_ckpt: str = NONE, quantized_ckpt: str = NONE, **_: Any) -> tuple:
        return _fingerprint(original_ckpt, quantized_ckpt)

    @classmethod
    def execute(
        cls,
        original_ckpt: str = NONE,
        dtype: str = "auto",
        quantized_ckpt: str = NONE,
        lora: tuple[Lora, ...] = (),
        quant: str = "auto",
    ) -> io.NodeOutput:
        name = _picked("original_ckpt", original_ckpt, "quantized_ckpt", quantized_ckpt)
        info = identify(host.locate(MODELS, name))
        return io.NodeOutput(_loaded(info, Engine(dtype=dtype, quant=quant), for_expert(lora, info.expert_hint), name))


class LightX2VLoadModelMoE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        original, quantised = _model_files(experts=True)
        return host.schema(
            node_id="LightX2VLoadModelMoE",
            display_name="Load Model MoE (LightX2V)",
            category="LightX2V/loaders",
            description="Loads Wan2.2 A14B: one model for noisy steps, one for the rest. For each, pick an original "
            "or a quantised file.",
            inputs=[
                *cls._pickers("high_noise", "composition and motion, the first steps", original, quantised),
                *cls._pickers("low_noise", "detail, the remaining steps", original, quantised),
                _dtype_input(),
                _lora_input("LoRAs for the experts, each as its own 'expert' says"),
                _quant_input(),
            ],
            outputs=[host.Model.Output("model", display_name="model")],
        )

    @staticmethod
    def _pickers(role: str, makes: str, original: list[str], quantised: list[str]) -> list[io.Input]:
        return [
            io.Combo.Input(
                f"{role}_original_ckpt",
                options=[NONE, *original],
                default=NONE,
                optional=True,
                tooltip=f"The expert for {makes}, in bf16, fp16 or fp32 (28.6 GB in bf16). none: use a quantised one.",
            ),
            io.Combo.Input(
                f"{role}_quantized_ckpt",
                options=[NONE, *quantised],
                default=NONE,
                optional=True,
                tooltip=f"The expert for {makes}, in fp8, int8, NVFP4, MXFP8 or GGUF (14.5 GB in fp8); see quant.",
            ),
        ]

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> tuple:
        return _fingerprint(*(inputs.get(name, NONE) for role in EXPERTS for name in role))

    @classmethod
    def execute(
        cls, dtype: str = "auto", lora: tuple[Lora, ...] = (), quant: str = "auto", **picked: str
    ) -> io.NodeOutput:
        names = [_picked(one, picked.get(one, NONE), other, picked.get(other, NONE)) for one, other in EXPERTS]
        first, second = (identify(host.locate(MODELS, name)) for name in names)
        require_pair(first, second)
        engine = Engine(dtype=dtype, quant=quant)
        high, low = for_expert(lora, "high"), for_expert(lora, "low")
        experts = LoadedExperts(_loaded(first, engine, high, names[0]), _loaded(second, engine, low, names[1]))
        experts.low.placing = experts.high.placing  # they share the GPU's memory where they pass through it
        return io.NodeOutput(experts)


def _dtype_input() -> io.Input:
    return io.Combo.Input(
        "dtype",
        options=list(DTYPES),
        default="auto",
        optional=True,
        tooltip="Compute type. auto: the file's half precision on a GPU, fp32 on the CPU. "
        "Wan 14B is 28.6 GB in bf16 or fp16 and 57.2 GB in fp32.",
    )


def _quant_input() -> io.Input:
    return io.Combo.Input(
        "quant",
        options=list(QUANTS),
        default="auto",
        optional=True,
        tooltip="In what the transformer's layers multiply. auto: as the file is; fp8, int8, NVFP4, MXFP8 and GGUF "
        "stay packed on a GPU that can (Wan 14B: 14.5 instead of 28.6 GB). fp8, int8: a bf16 file is quantised while "
        "loading: half the memory, and layers 1.6 to 2 times as fast on an H100. nvfp4, mxfp8: likewise, to 4.5 and "
        "8.25 bits a weight, at the speed of bf16. none: everything is restored.",
    )


def _lora_input(what: str) -> io.Input:
    return LoraStack.Input(
        "lora",
        optional=True,
        tooltip=f"{what}, from LoRA (LightX2V), any number of them (0.6 GB each at rank 64 for 14B in bf16). They are "
        "added to the weights while loading and cost nothing per step; beside packed weights they are computed.",
    )


def _model_files(*, experts: bool = False) -> tuple[list[str], list[str]]:
    """Names of the models in models/diffusion_models that can be run, or only of those that may be one of two experts:
    plain ones, quantised ones."""
    stored = host.asked(MODELS, _traits)
    names = [name for name, (_, expert) in stored.items() if expert or not experts]
    return [name for name in names if not stored[name][0]], [name for name in names if stored[name][0]]


def _fingerprint(*names: str) -> tuple:
    return tuple(host.fingerprint(MODELS, name) for name in names if name != NONE)


def _picked(original: str, original_name: str, quantised: str, quantised_name: str) -> str:
    """The one name of two pickers; `original` and `quantised` are their names, for messages."""
    names = [name for name in (original_name, quantised_name) if name != NONE]
    if not names:
        raise ValueError(f"{original} and {quantised} are both {NONE}; pick a file in one of them")
    if len(names) > 1:
        raise ValueError(
            f"{original} is {original_name} and {quantised} is {quantised_name}; set one of them to {NONE}: "
            "they are two ways to give the same model"
        )
    return names[0]


def _loaded(info: CheckpointInfo, engine: Engine, loras: tuple[Lora, ...], name: str) -> LoadedTransformer:
    check_loras(loras, info)
    return LoadedTransformer(info, engine, loras, name)


@dataclass(frozen=True)
class LoadedTextEncoder:
    encoder: TextEncoder
    handle: host.EngineHandle


class LightX2VLoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        kinds = host.asked(TEXT_ENCODERS, _text_kind)
        return host.schema(
            node_id="LightX2VLoadTextEncoder",
            display_name="Load Text Encoder (LightX2V)",
            category="LightX2V/loaders",
            description="Loads umT5-xxl, the text encoder of Wan, or Qwen2.5-VL with byT5, those of HunyuanVideo-1.5, "
            "in any published layout, plain or quantised.",
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=[name for name, kind in kinds.items() if kind != BYT5],
                    tooltip="Files of models/text_encoders. Wan: umt5_xxl_fp16.safetensors (11.4 GB), or fp8, int8 and "
                    "GGUF (6.7 GB in fp8). HunyuanVideo-1.5: qwen_2.5_vl_7b.safetensors (16.6 GB, of which 13.2 GB are "
                    "read), or fp8. Without a tokenizer inside the file, Wan's google/umt5-xxl folder must lie next to "
                    "it; Qwen's comes with ComfyUI.",
                ),
                io.Combo.Input(
                    "text_encoder_2",
                    options=[NONE, *(name for name, kind in kinds.items() if kind == BYT5)],
                    default=NONE,
                    optional=True,
                    tooltip="HunyuanVideo-1.5 alone: byt5_small_glyphxl_fp16.safetensors (0.4 GB), which spells out "
                    "text in quotation marks. none: prompts must quote nothing.",
                ),
            ],
            outputs=[host.TextEncoder.Output("encoder", display_name="text encoder")],
        )

    @classmethod
    def fingerprint_inputs(cls, text_encoder: str, text_encoder_2: str = NONE, **_: Any) -> tuple:
        return tuple(host.fingerprint(TEXT_ENCODERS, name) for name in (text_encoder, text_encoder_2) if name != NONE)

    @classmethod
    def execute(cls, text_encoder: str, text_encoder_2: str = NONE) -> io.NodeOutput:
        device, resting = mm.text_encoder_device(), mm.text_encoder_offload_device()
        path = host.locate(TEXT_ENCODERS, text_encoder)
        second = None if text_encoder_2 == NONE else host.locate(TEXT_ENCODERS, text_encoder_2)
        encoder: TextEncoder
        if _text_kind(path) == UMT5:
            if second is not None:
                raise ValueError(f"{text_encoder} is umT5, which has no second encoder; set text_encoder_2 to {NONE}")
            encoder = umt5.load(path, tokenizer=None, dtype=None, device=resting)
        else:
            own = tokenizer_in(path if path.is_dir() else path.parent)
            encoder = hunyuan15.load(path, second, tokenizer=own or host.qwen_vocabulary(), device=resting)
        return io.NodeOutput(LoadedTextEncoder(encoder, host.EngineHandle(host.Housed(encoder.model), device, resting)))


def _traits(path: Path) -> tuple[bool, bool]:
    """Whether a model is quantised, and whether it may be one of two experts."""
    info = identify(path)
    return info.quantised, info.spec.boundary is not None


def _text_kind(path: Path) -> str:
    """Which text encoder a file is; raises CheckpointError for what is none."""
    openers = {QWEN: qwen.open_encoder, BYT5: byt5.open_encoder}
    for kind, open_encoder in openers.items():
        with suppress(CheckpointError):
            open_encoder(path)
            return kind
    umt5.open_encoder(path)
    return UMT5
