"""byT5, which tells HunyuanVideo-1.5 how quoted text is spelled: transformers' T5 encoder over bytes, in the fine-tuned
form of Glyph-SDXL-v2."""

import logging
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightx2v.checkpoint import CheckpointError, Header, assign, block_numbers, read_header
from lightx2v.kinds import in_words
from lightx2v.layout import plain_dtype
from lightx2v.quant import find_packed
from lightx2v.text.layout import Sizes
from lightx2v.text.resting import OnBlock, Widened, before_blocks
from lightx2v.text.umt5 import empty_network

if TYPE_CHECKING:
    from transformers import T5EncoderModel

QUOTED = re.compile(r"\"(.*?)\"|“(.*?)”")
BYTE_OFFSET, END_ID = 3, 1  # of every byT5: <pad>, </s> and <unk> come before the bytes (google/byt5-small)
TEXT_TOKENS = 256  # byt5_max_length of HunyuanVideo-1.5
# In front of transformers' names: nothing, or Glyph-SDXL-v2's own trainer.
PREFIXES = ("", "module.text_tower.")
EMBEDDING, TIED_EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"
QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
NEEDED = "use byt5_small_glyphxl_fp16.safetensors (ComfyUI), Glyph-SDXL-v2's byt5_model.pt or diffusers' text_encoder_2"
_BLOCK = re.compile(r"^encoder\.block\.(\d+)\.")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ByT5:
    """A loaded glyph encoder. path: for messages. model: holds every weight; may be moved between devices."""

    path: Path
    model: "T5EncoderModel"

    @torch.no_grad()
    def encode(self, prompt: str, *, on_block: OnBlock | None = None) -> Tensor | None:
        """What a prompt quotes -> (1, S, hidden_size) float32, on the encoder's device; None where it quotes nothing.

        Raises CheckpointError where the weights produce infinities or NaN.
        """
        if (asked := glyph_prompt(prompt)) is None:
            return None
        ids = byte_ids(asked)
        if len(ids) > TEXT_TOKENS:
            log.warning("The quoted text has %d bytes; all after the first %d are left out", len(ids), TEXT_TOKENS - 1)
            ids = [*ids[: TEXT_TOKENS - 1], END_ID]
        tokens = torch.tensor([ids], device=self.model.shared.weight.device)
        with ExitStack() as hooks:
            before_blocks(self.model.encoder.block, on_block, hooks)
            hidden = self.model(inputs_embeds=self.model.shared(tokens).float()).last_hidden_state
        if not torch.isfinite(hidden).all():
            raise CheckpointError(f"{self.path}: the glyph encoder gave infinities or NaN: the file is damaged")
        return hidden


def glyph_prompt(prompt: str) -> str | None:
    """What byT5 is told of a prompt: `Text "OPEN". Text "24 h". `, each quotation once; None where nothing is quoted.

    Quotation marks are "..." and “...”. Colours and typefaces, which Glyph-SDXL-v2 can be told behind each text, are
    never named: the video model was trained without (diffusers, pipeline_hunyuan_video1_5.py, extract_glyph_texts).
    """
    quoted = list(dict.fromkeys(straight or curly for straight, curly in QUOTED.findall(prompt)))
    return ". ".join(f'Text "{text}"' for text in quoted) + ". " if quoted else None


def byte_ids(text: str) -> list[int]:
    """byT5's tokens are the bytes of UTF-8; </s> closes them."""
    return [*(byte + BYTE_OFFSET for byte in text.encode("utf-8")), END_ID]


def open_encoder(path: Path) -> tuple[Header, Sizes]:
    """The header of a byT5 encoder under transformers' names, and its sizes; raises CheckpointError for others."""
    header = read_header(path)
    prefix = next((prefix for prefix in PREFIXES if prefix + QUERY in header.tensors), None)
    if prefix is None:
        raise CheckpointError(f"{header.path}: this is {in_words(header)}, not byT5; {NEEDED}")
    named = {name: name.removeprefix(prefix) for name in header.tensors if name.startswith(prefix)}
    tied = EMBEDDING not in named.values()
    named = {
        name: EMBEDDING if tied and ours == TIED_EMBEDDING else ours
        for name, ours in named.items()
        if tied or ours != TIED_EMBEDDING
    }
    header = find_packed(header.renamed(named)).header
    return header, _sizes(header)


def _sizes(header: Header) -> Sizes:
    blocks = block_numbers(header.path, header.tensors, _BLOCK)
    second = f"encoder.block.1.{BIAS}"
    if blocks != set(range(len(blocks))) or second in header.tensors:
        wrong = "every block has a position table" if second in header.tensors else "blocks are missing"
        raise CheckpointError(f"{header.path}: this is {in_words(header)}, not byT5 ({wrong}); {NEEDED}")
    shapes = [
        header.shape(name) or ()
        for name in (EMBEDDING, QUERY, f"encoder.block.0.{BIAS}", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    ]
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[1][0] % shapes[2][1]:
        raise CheckpointError(f"{header.path}: the first block of byT5 is incomplete; {NEEDED}")
    (vocab_size, hidden_size), (query, _), (num_buckets, num_heads), (ffn_size, _) = shapes
    if vocab_size < 256 + BYTE_OFFSET:
        raise CheckpointError(
            f"{header.path}: {vocab_size} embedding rows, but bytes need {256 + BYTE_OFFSET}; {NEEDED}"
        )
    return Sizes(vocab_size, hidden_size, num_heads, query // num_heads, ffn_size, len(blocks), num_buckets)


def load(path: Path, *, device: torch.device | str = "cpu") -> ByT5:
    """Load the glyph encoder, its weights held as in the file; arithmetic is always float32.

    Raises CheckpointError, before any weight is read, for a file that is damaged or another model.
    """
    header, found = open_encoder(path)
    model = empty_network(found, "T5")
    restored = {name for name, info in header.tensors.items() if info.packed}

    def used(name: str) -> str | None:
        return name if name == EMBEDDING or name.startswith("encoder.") else None

    def held(name: str) -> torch.dtype | None:
        return torch.float32 if "final_layer_norm" in name else plain_dtype(header) if name in restored else None

    assign(model, header, rename=used, dtype=held, device=device)
    model.set_input_embeddings(model.shared)
    for index, block in enumerate(model.encoder.block):
        model.encoder.block[index] = Widened(block)
    return ByT5(header.path, model.eval().requires_grad_(False))
