"""Qwen2.5-VL's language part, the text encoder of HunyuanVideo-1.5: transformers' Qwen2, asked as the video model was
trained.

Its vision tower, its head and its last two blocks have no part in the features, and are not read.
"""

import logging
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightx2v.checkpoint import CheckpointError, Header, assign, block_numbers, read_header
from lightx2v.kinds import in_words
from lightx2v.layout import plain_dtype
from lightx2v.library import from_transformers
from lightx2v.quant import find_packed
from lightx2v.text.chat import ChatTokenizer, find_tokenizer
from lightx2v.text.resting import OnBlock, Rename, Widened, before_blocks, stay_packed

if TYPE_CHECKING:
    from transformers import Qwen2Model

# Of the published model (Qwen/Qwen2.5-VL-7B-Instruct, config.json); no shape in a file tells them.
HEAD_DIM = 128
ROPE_THETA = 1e6
NORM_EPS = 1e-6
# The video model reads the states that enter the last but one block: hidden_states[-3] (diffusers,
# pipeline_hunyuan_video1_5.py, num_hidden_layers_to_skip=2).
SKIPPED_BLOCKS = 2
TEXT_TOKENS = 1000  # of the prompt and what closes it (text_len there)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMBEDDING = "embed_tokens.weight"
QUERY = "layers.0.self_attn.q_proj.weight"
NEEDED = (
    "use qwen_2.5_vl_7b.safetensors or qwen_2.5_vl_7b_fp8_scaled.safetensors (ComfyUI), the text_encoder folder of "
    "HunyuanVideo-1.5, or hy15_qwen25vl_llm_encoder_fp8_e4m3_lightx2v.safetensors"
)
_BLOCK = re.compile(r"^layers\.(\d+)\.")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """What the shapes in a header say about the language model."""

    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    num_layers: int  # in the file


@dataclass(frozen=True)
class Qwen:
    """A loaded language model.

    path: the checkpoint, for messages. model: holds every weight that is read; may be moved between devices.
    """

    path: Path
    model: "Qwen2Model"
    tokenizer: ChatTokenizer

    @torch.no_grad()
    def encode(self, prompt: str, *, on_block: OnBlock | None = None) -> Tensor:
        """Prompt -> (1, S, hidden_size) float32, on the model's device: the prompt's tokens and those that close its
        turn. What comes before the prompt is read, and left out.

        Only tokens that count are computed: the attention is causal, so padding behind them would change nothing.
        Raises CheckpointError where the weights produce infinities or NaN.
        """
        ids, start = self.tokenizer.asked(prompt)
        if len(ids) - start > TEXT_TOKENS:
            log.warning(
                "The prompt has %d tokens, %d more than the %d that HunyuanVideo-1.5 was trained on; all are used, but "
                "the later ones may be followed poorly",
                len(ids) - start,
                len(ids) - start - TEXT_TOKENS,
                TEXT_TOKENS,
            )
        tokens = torch.tensor([ids], device=self.model.embed_tokens.weight.device)
        with ExitStack() as hooks:
            before_blocks(self.model.layers, on_block, hooks)
            given = self.model.embed_tokens(tokens).float()
            hidden = self.model(inputs_embeds=given, use_cache=False).last_hidden_state
        if not torch.isfinite(hidden).all():
            raise CheckpointError(
                f"{self.path}: the text encoder gave infinities or NaN (arithmetic in float32, weights held in "
                f"{self.model.embed_tokens.weight.dtype}): the file is damaged, or its weights need a wider dtype"
            )
        return hidden[:, start:]


def open_encoder(path: Path) -> tuple[Header, Sizes]:
    """The header of a Qwen2.5-VL checkpoint, its language part under the names of transformers' Qwen2, and its sizes.

    Raises CheckpointError for any other file.
    """
    header = read_header(path)
    prefix = _prefix(header)
    header = find_packed(header.renamed({name: name.removeprefix(prefix) for name in header.tensors})).header
    return header, _sizes(header)


def _prefix(header: Header) -> str:
    """What stands before the names of the language part."""
    found = [name.removesuffix(EMBEDDING) for name in header.tensors if name.endswith(EMBEDDING)]
    fitting = [prefix for prefix in found if f"{prefix}{QUERY.replace('weight', 'bias')}" in header.tensors]
    if len(fitting) != 1:
        raise CheckpointError(f"{header.path}: this is {in_words(header)}, not a Qwen2.5-VL text encoder; {NEEDED}")
    return fitting[0]


def _sizes(header: Header) -> Sizes:
    blocks = block_numbers(header.path, header.tensors, _BLOCK)
    if blocks != set(range(len(blocks))) or len(blocks) <= SKIPPED_BLOCKS:
        raise CheckpointError(
            f"{header.path}: expected blocks 0, 1, 2 ... without a gap and more than {SKIPPED_BLOCKS} of them, found "
            f"{len(blocks)} with numbers up to {max(blocks, default=None)}; download the file again"
        )
    vocab_size, hidden_size = _matrix(header, EMBEDDING)
    query, _ = _matrix(header, QUERY)
    key, _ = _matrix(header, "layers.0.self_attn.k_proj.weight")
    ffn_size, _ = _matrix(header, "layers.0.mlp.gate_proj.weight")
    if query % HEAD_DIM or key % HEAD_DIM:
        raise CheckpointError(
            f"{header.path}: {query} query and {key} key channels do not divide into heads of {HEAD_DIM}; {NEEDED}"
        )
    return Sizes(vocab_size, hidden_size, query // HEAD_DIM, key // HEAD_DIM, ffn_size, len(blocks))


def _matrix(header: Header, name: str) -> tuple[int, int]:
    shape = header.shape(name) or ()
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{header.path}: '{name}' is {list(shape) or 'missing'}, expected a matrix; {NEEDED}")
    return shape[0], shape[1]


def load(
    path: Path, *, tokenizer: Path | None = None, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Qwen:
    """Load the language part of Qwen2.5-VL and the tokenizer that belongs to it.

    path: a folder or file in transformers' layout, with or without the vision tower, in bf16, fp16, fp8 or int8.
    tokenizer: the folder of tokenizer.json, or of vocab.json and merges.txt; None looks beside the checkpoint.
    dtype: how the weights are held (float32, bfloat16, float16). None: as in the file; fp8 and int8 layers stay packed.
        Arithmetic is always float32.
    Raises CheckpointError, before any weight is read, for files that are another model, for quantisation that is not
    known, and for a missing or foreign tokenizer.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: expected one of {', '.join(map(str, DTYPES))}, or None for the file's own")
    header, found = open_encoder(path)
    words = find_tokenizer(header.path, tokenizer, found.vocab_size)
    model = empty(found)
    rename = used_by(model)
    restored = {name for name, info in header.tensors.items() if info.packed}
    if dtype is None:
        header, rename = stay_packed(model, header, rename)
        restored = {name for name in restored if header.tensors[name].packed}

    def held(name: str) -> torch.dtype | None:
        return dtype or (plain_dtype(header) if name in restored else None)

    assign(model, header, rename=rename, dtype=held, device=device)
    for index, block in enumerate(model.layers):
        model.layers[index] = Widened(block)
    model.rotary_emb.to(device)
    return Qwen(header.path, model.eval().requires_grad_(False), words)


def used_by(model: "Qwen2Model") -> Rename:
    """The network's name of a tensor; None for the vision tower, the head, and what follows the last block in use."""

    def used(name: str) -> str | None:
        block = _BLOCK.match(name)
        return name if name == EMBEDDING or (block and int(block[1]) < len(model.layers)) else None

    return used


def empty(found: Sizes) -> "Qwen2Model":
    """The blocks that are used on the meta device, and no last norm: the video model reads the states before it."""
    make_config, make_network = from_transformers("Qwen2Config", "Qwen2Model")
    config = make_config(
        vocab_size=found.vocab_size,
        hidden_size=found.hidden_size,
        intermediate_size=found.ffn_size,
        num_hidden_layers=found.num_layers - SKIPPED_BLOCKS,
        num_attention_heads=found.num_heads,
        num_key_value_heads=found.num_kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=128000,
        rms_norm_eps=NORM_EPS,
        rope_theta=ROPE_THETA,
        attn_implementation="sdpa",  # read by PreTrainedConfig
    )
    with torch.device("meta"):
        model = make_network(config)
    model.norm = nn.Identity()
    model.rotary_emb = type(model.rotary_emb)(config=config)  # its frequencies are in no file
    return model
