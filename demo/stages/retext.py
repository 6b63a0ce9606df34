"""Stage 6, where it is needed: a fresh text encoder for a transformer that can already draw.

An encoder whose weights grew too large (see demo.optim) gives a word another meaning in every sentence, and the
transformer follows half of what it reads. The drawing is fine then and only the reading has to be learnt again: a new
encoder starts with each word at the mean of what the old one made of it, and trains with the transformer's text
embedding and cross-attention, at high noise, where the text decides. That is so little that a CPU can do it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from demo.optim import Optimizer, Settings, plateau
from demo.stages.export import TEXT_ENCODER, TOKENIZER
from demo.stages.pool import Pool
from demo.stages.run import Run
from demo.stages.t2v import Mixture, Networks, is_matrix, new_networks, training_loss
from demo.tokenizer import PAD
from lightx2v.models.wan.spec import keep_float32
from lightx2v.text import umt5

SETTINGS = Settings(rate=1e-3, matrix_rate=1e-3, average=0.998)
MIXTURE = Mixture(noises=1, noise_shift=6.0, uniform=0.05, gibberish=0.005)
CLIPS = 16
READING = ("text_embedding", "cross_attn", "norm3")
RESIDUAL_SHARE = 0.3  # of a fresh encoder's residual branches: words start out nearly alone


@torch.no_grad()
def _word_means(folder: Path, ids: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """What the exported encoder makes of each piece, averaged over captions ids (N, TOKENS).

    Returns (vocabulary, 4096) means and (vocabulary,) whether a piece occurred.
    """
    encoder = umt5.load(folder / TEXT_ENCODER, tokenizer=folder / TOKENIZER, device="cpu").model
    total, count = torch.zeros(vocabulary, encoder.shared.weight.shape[1]), torch.zeros(vocabulary)
    for row in ids.long():
        pieces = row[row != PAD]
        hidden = encoder(inputs_embeds=encoder.shared(pieces[None]).float()).last_hidden_state[0]
        total.index_add_(0, pieces, hidden)
        count.index_add_(0, pieces, torch.ones(len(pieces)))
    return total / count.clamp(min=1)[:, None], count > 0


@torch.no_grad()
def _start_encoder(networks: Networks, means: Tensor, known: Tensor) -> None:
    encoder = networks.encoder
    level = means[known].square().mean().sqrt()
    rows = means / means.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
    encoder.shared.weight[known] = 0.5 * rows[known].to(encoder.shared.weight.device)
    encoder.encoder.final_layer_norm.weight.fill_(float(level))
    for block in encoder.encoder.block:
        block.layer[0].SelfAttention.o.weight.mul_(RESIDUAL_SHARE)
        block.layer[1].DenseReluDense.wo.weight.mul_(RESIDUAL_SHARE)


def _prepare(run: Run, start_from: Mapping[str, Tensor], vocabulary: int) -> Networks:
    """Networks with the old transformer and a fresh encoder; only what reads text can be trained."""
    networks = new_networks(run, vocabulary)
    for name, weight in networks.transformer.named_parameters():
        half = not run.dry and not keep_float32(name)
        weight.data = start_from[f"transformer.{name}"].to(run.device, torch.bfloat16 if half else torch.float32)
        weight.requires_grad_(any(part in name for part in READING))
    return networks


def refit_text(
    run: Run, pool: Pool, folder: Path, start_from: Mapping[str, Tensor], vocabulary: int, seconds: float
) -> dict[str, Tensor]:
    """Train for `seconds`; returns all weights, those that were not trained included.

    folder: where the old encoder's file and tokenizer are. start_from: weights as `train_t2v` returns them.
    """
    networks = _prepare(run, start_from, vocabulary)
    _start_encoder(networks, *_word_means(folder, pool.ids[:1500, 0].cpu(), vocabulary))
    optimizer = Optimizer(networks.named_parameters(), SETTINGS, is_matrix)
    generator, start, clips = run.generator(5), time.monotonic(), 2 if run.dry else CLIPS
    errors: list[float] = []
    while (progress := (time.monotonic() - start) / seconds) < 1:
        loss, error = training_loss(networks, pool, clips, generator, MIXTURE)
        loss.backward()
        optimizer.step(plateau(progress, warm=0.01, decay=0.4))
        errors.append(float(error))
        if optimizer.steps % 100 == 0:
            mean = sum(errors) / len(errors)
            run.log(f"retext {optimizer.steps} error {mean:.4f} at {time.monotonic() - start:.0f} s")
            if not math.isfinite(mean):
                raise FloatingPointError(f"the loss is {mean} after {optimizer.steps} steps")
            errors.clear()
    run.report("retext", {"steps": optimizer.steps, "batch": clips, "seconds": round(time.monotonic() - start, 1)})
    return {**{name: value.float() for name, value in start_from.items()}, **optimizer.averaged()}
