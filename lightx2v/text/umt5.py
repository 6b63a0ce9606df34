"""umT5, the text encoder of Wan2.1: transformers' UMT5EncoderModel, fed and framed as Wan was trained."""

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightx2v.checkpoint import CheckpointError, Header, assign, read_header
from lightx2v.guidance import Conditioning
from lightx2v.layout import plain_dtype
from lightx2v.library import from_transformers
from lightx2v.quant import find_packed
from lightx2v.text.layout import Sizes, renames, sizes
from lightx2v.text.resting import OnBlock, Widened, before_blocks, stay_packed
from lightx2v.text.tokenizer import Tokenizer, clean, find_tokenizer

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

TEXT_TOKENS = 512  # text_len of every Wan2.1 config (Wan-Video/Wan2.1, wan/configs/shared_config.py)
FINAL_NORM = "encoder.final_layer_norm.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UMT5:
    """A loaded text encoder.

    path: the checkpoint, for messages.
    model: holds every weight; it may be moved between devices between two calls.
    """

    path: Path
    model: "UMT5EncoderModel"
    tokenizer: Tokenizer

    @torch.no_grad()
    def encode(self, prompt: str, *, on_block: OnBlock | None = None) -> Tensor:
        """Prompt -> conditioning (1, L, hidden_size), float32, on the encoder's device.

        L is 512, or the number of tokens where the prompt has more: nothing is cut, a warning says so. Rows after </s>
        are exactly zero. An empty prompt is </s> alone.

        Weights such as `(word:1.3)` mean nothing here: Wan reads them literally, and so does this.

        Raises CheckpointError where the weights produce infinities or NaN.
        """
        ids = self.tokenizer.encode(clean(prompt))
        if len(ids) > TEXT_TOKENS:
            log.warning(
                "The prompt has %d tokens, %d more than the %d that Wan was trained on; all are used, "
                "but the later ones may be followed poorly",
                len(ids),
                len(ids) - TEXT_TOKENS,
                TEXT_TOKENS,
            )
        hidden = self._run(ids, on_block)
        if not torch.isfinite(hidden).all():
            raise CheckpointError(
                f"{self.path}: the text encoder gave infinities or NaN (arithmetic in float32, weights held in "
                f"{self.model.shared.weight.dtype}): the file is damaged, or its weights need a wider dtype"
            )
        context = hidden.new_zeros(1, max(TEXT_TOKENS, len(ids)), hidden.shape[-1])
        context[:, : len(ids)] = hidden
        return context

    def condition(self, prompt: str, *, on_block: OnBlock | None = None) -> Conditioning:
        """The same as what a Wan is told."""
        return Conditioning(self.encode(prompt, on_block=on_block))

    def _run(self, ids: list[int], on_block: OnBlock | None) -> Tensor:
        """Token ids (n) -> hidden states (1, n, hidden_size).

        Only the prompt's own tokens are computed. That equals encoding 512 padded and masked ones: a masked key has
        weight zero, and relative positions do not depend on the length.
        """
        blocks = self.model.encoder.block
        tokens = torch.tensor([ids], device=self.model.shared.weight.device)
        with ExitStack() as hooks:
            before_blocks(blocks, on_block, hooks)
            return self.model(inputs_embeds=self.model.shared(tokens).float()).last_hidden_state


def open_encoder(path: Path) -> tuple[Header, Sizes]:
    """The header of a umT5 encoder and its sizes; raises CheckpointError for any other file."""
    header = find_packed(read_header(path)).header
    return header, sizes(header, renames(header))


def load(
    path: Path, *, tokenizer: Path | None = None, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> UMT5:
    """Load a umT5 encoder and the tokenizer that belongs to it.

    path: Wan's models_t5_umt5-xxl-enc-bf16.pth, ComfyUI's umt5_xxl_fp16.safetensors, transformers' file or folder, or
    one of these in fp8, int8 or GGUF.
    tokenizer: a tokenizer.json or sentencepiece model, or its folder; None looks inside and beside the checkpoint.
    dtype: how the weights are held (float32, bfloat16, float16). None: as in the file; fp8 and int8 layers stay packed,
    GGUF's blocks are restored to the type of the file's plain weights. Arithmetic is always float32.
    Raises CheckpointError, before any weight is read, for files that are no umT5 encoder, for quantisation that is not
    known, and for a missing or foreign tokenizer.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: expected one of {', '.join(map(str, DTYPES))}, or None for the file's own")
    header, found = open_encoder(path)
    rename = renames(header)
    words = find_tokenizer(header, tokenizer, found.vocab_size)
    model = empty_network(found)
    if dtype is None:
        header, rename = stay_packed(model, header, rename)
    restored = {rename(name) for name, info in header.tensors.items() if info.packed}

    def held(name: str) -> torch.dtype | None:
        if name == FINAL_NORM:
            return torch.float32
        return dtype or (plain_dtype(header) if name in restored else None)

    assign(model, header, rename=rename, dtype=held, device=device)
    model.set_input_embeddings(model.shared)
    for index, block in enumerate(model.encoder.block):
        model.encoder.block[index] = Widened(block)
    return UMT5(header.path, model.eval().requires_grad_(False), words)


def empty_network(found: Sizes, family: str = "UMT5") -> Any:
    """The network on the meta device, without the second name of its tied embedding: UMT5EncoderModel, or the
    T5EncoderModel of family "T5"."""
    make_config, make_network = from_transformers(f"{family}Config", f"{family}EncoderModel")
    config = make_config(
        vocab_size=found.vocab_size,
        d_model=found.hidden_size,
        d_kv=found.head_dim,
        d_ff=found.ffn_size,
        num_layers=found.num_layers,
        num_heads=found.num_heads,
        relative_attention_num_buckets=found.num_buckets,
        feed_forward_proj="gated-gelu",
        attn_implementation="eager",  # read by PreTrainedConfig
    )
    with torch.device("meta"):
        model = make_network(config)
    model.encoder.set_input_embeddings(None)
    return model
