"""What the variants start from: an exported text-to-video folder, its text encoder frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from demo.optim import Settings
from demo.stages.export import TRANSFORMER, import_t2v
from demo.stages.pool import TOKENS, Pool, tokenizer_of
from demo.stages.run import Run
from demo.stages.t2v import (
    CLIPS,
    TEXT_DIM,
    Mixture,
    Networks,
    new_encoder,
    training_kernels,
    training_loss,
)
from demo.tokenizer import EOS
from lightx2v.checkpoint import Header, read_header
from lightx2v.models.wan.spec import HEAD_DIM, WanConfig, keep_float32, read_config
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v_kernels import Kernels, select

SETTINGS = Settings(rate=8e-4, matrix_rate=1e-3, matrix_decay=0.02, average=0.997)
BATCH = CLIPS * Mixture().noises  # one size for all forward passes, so that they share compiled code
DRY_CLIPS = 1


@dataclass(frozen=True)
class Base:
    """An exported folder. weights: the transformer's, float32 on the CPU; encoder: frozen, on the run's device."""

    config: WanConfig
    weights: Mapping[str, Tensor]
    encoder: UMT5EncoderModel
    header: Header

    def with_encoder(self, transformer: WanTransformer) -> Networks:
        return Networks(self.encoder, transformer)


def load_base(run: Run, folder: Path) -> Base:
    """Read a folder that `demo.stages.export` wrote; the run's state must hold its tokenizer."""
    weights = import_t2v(folder)
    encoder = new_encoder(len(tokenizer_of(run)), run.device, run.generator(20))
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            weight.copy_(weights[f"encoder.{name}"])
    header = read_header(folder / TRANSFORMER)
    prefix = "transformer."
    own = {name.removeprefix(prefix): value.float() for name, value in weights.items() if name.startswith(prefix)}
    return Base(read_config(header), own, encoder.requires_grad_(False), header)


def _filled(model: WanTransformer, weights: Mapping[str, Tensor], dtype: torch.dtype) -> WanTransformer:
    model.load_state_dict(dict(weights))
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(torch.float32 if keep_float32(name) else dtype)
    return model


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def trainable(run: Run, config: WanConfig, weights: Mapping[str, Tensor]) -> WanTransformer:
    """A transformer with the training kernels, in the dtypes that the engine runs."""
    model = _filled(WanTransformer(config, training_kernels()).to(run.device), weights, _dtype(run.device))
    if run.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    return model


def runnable(config: WanConfig, weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """A transformer as the engine would load it."""
    kernels: Kernels = select(attention="torch_sdpa", device=device, dtype=_dtype(device), head_dim=HEAD_DIM)
    model = WanTransformer(config, kernels).to(device)
    return _filled(model, weights, _dtype(device)).eval().requires_grad_(False)


def named(transformer: WanTransformer) -> list[tuple[str, nn.Parameter]]:
    """Parameters under the names that `demo.stages.t2v.is_matrix` reads."""
    return [(f"transformer.{name}", weight) for name, weight in transformer.named_parameters()]


def unnamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `named`, of an optimiser's averages."""
    return {name.removeprefix("transformer."): value for name, value in weights.items()}


def keep_blocks(base: Base, kept: Sequence[int]) -> tuple[WanConfig, dict[str, Tensor]]:
    """The same transformer with only some of its blocks."""
    weights = {name: value for name, value in base.weights.items() if not name.startswith("blocks.")}
    for new, old in enumerate(kept):
        prefix = f"blocks.{old}."
        for name, value in base.weights.items():
            if name.startswith(prefix):
                weights[f"blocks.{new}.{name.removeprefix(prefix)}"] = value
    return replace(base.config, num_layers=len(kept)), weights


@torch.no_grad()
def choose_blocks(run: Run, base: Base, pool: Pool, count: int, mixture: Mixture) -> list[int]:
    """The `count` blocks to keep: again and again the one is dropped whose absence raises the loss least."""
    model = _plain(run, base)
    blocks, kept = list(model.blocks), list(range(len(model.blocks)))
    clips = DRY_CLIPS if run.dry else CLIPS
    networks = base.with_encoder(model)

    def loss_of(chosen: Sequence[int]) -> float:
        model.blocks = nn.ModuleList([blocks[index] for index in chosen])
        generator = run.generator(21)
        return sum(float(training_loss(networks, pool, clips, generator, mixture)[0]) for _ in range(2))

    while len(kept) > count:
        losses = {index: loss_of([other for other in kept if other != index]) for index in kept}
        kept.remove(min(losses, key=losses.__getitem__))
    run.log(f"blocks {kept} of {len(blocks)} stay")
    return kept


def _plain(run: Run, base: Base) -> WanTransformer:
    """The base transformer with the training kernels, never compiled: for a few forward passes."""
    model = WanTransformer(base.config, training_kernels()).to(run.device)
    return _filled(model, base.weights, _dtype(run.device)).requires_grad_(False)


def warm_up(run: Run, base: Base) -> None:
    """Compile a block at the training's shapes, so that a later process finds it in the compiler's cache."""
    networks, device = base.with_encoder(trainable(run, base.config, base.weights)), run.device
    pool = Pool(
        torch.randn(CLIPS, 16, 5, 16, 16, device=device).half(),
        torch.zeros(CLIPS, 5, 16, 16, dtype=torch.uint8, device=device),
        torch.full((CLIPS, 1, TOKENS), EOS, dtype=torch.int16, device=device),
    )
    for _ in range(2):
        training_loss(networks, pool, CLIPS, run.generator(9))[0].backward()
    noise = torch.randn(BATCH, 16, 5, 16, 16, device=device)
    context = torch.randn(BATCH, TOKENS + 1, TEXT_DIM, device=device).to(_dtype(device))
    with torch.inference_mode():
        networks.transformer(noise, torch.full((BATCH,), 900.0, device=device), context)
    run.synchronize()
    run.log("compiled")
