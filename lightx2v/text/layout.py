"""Names and sizes of umT5 encoder checkpoints.

Three layouts hold the same tensors. Wan's own release names them `blocks.0.attn.q.weight` (Wan-Video/Wan2.1,
wan/modules/t5.py); transformers names them `encoder.block.0.layer.0.SelfAttention.q.weight`; GGUF files name them
`enc.blk.0.attn_q.weight` (ggml-org/llama.cpp, gguf-py/gguf/constants.py). ComfyUI's repackaged files use transformers'
names and add the sentencepiece model as a uint8 tensor. Inside, transformers' names are used.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lightx2v.checkpoint import CheckpointError, Header, block_numbers
from lightx2v.kinds import in_words

EMBEDDED_TOKENIZER = "spiece_model"
EMBEDDING = "shared.weight"
TIED_EMBEDDING = "encoder.embed_tokens.weight"

_TOP = {"token_embedding.weight": EMBEDDING, "norm.weight": "encoder.final_layer_norm.weight"}
_BLOCK = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
_GGUF_TOP = {"token_embd.weight": EMBEDDING, "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
_GGUF_BLOCK = {
    "attn_norm": "norm1",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_o": "attn.o",
    "attn_rel_b": "pos_embedding.embedding",
    "ffn_norm": "norm2",
    "ffn_gate": "ffn.gate.0",
    "ffn_up": "ffn.fc1",
    "ffn_down": "ffn.fc2",
}
_GGUF = re.compile(r"^enc\.blk\.(\d+)\.(\w+)\.weight$")
_BLOCK_TO_ORIGINAL = {ours: original for original, ours in _BLOCK.items()}
_TOP_TO_ORIGINAL = {ours: original for original, ours in _TOP.items()}
_ORIGINAL_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")
_OUR_BLOCK = re.compile(r"^encoder\.block\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Sizes:
    """What the shapes in a header say about the encoder."""

    vocab_size: int
    hidden_size: int
    num_heads: int
    head_dim: int
    ffn_size: int
    num_layers: int
    num_buckets: int  # of relative positions


def from_original(name: str) -> str:
    """Wan's name of a tensor -> transformers'; a name that Wan does not use comes back unchanged."""
    if block := _ORIGINAL_BLOCK.match(name):
        index, rest = block.groups()
        return f"encoder.block.{index}.{_BLOCK[rest]}" if rest in _BLOCK else name
    return _TOP.get(name, name)


def to_original_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of transformers' UMT5EncoderModel -> the names of Wan's own checkpoint.

    The second name of the tied embedding is dropped. Raises ValueError for a name that the layout has no place for.
    """
    original = {}
    for name, tensor in state.items():
        if name == TIED_EMBEDDING and EMBEDDING in state:
            continue
        block = _OUR_BLOCK.match(name)
        rest = _BLOCK_TO_ORIGINAL.get(block[2]) if block else None
        if block and rest:
            original[f"blocks.{block[1]}.{rest}"] = tensor
        elif name in _TOP_TO_ORIGINAL:
            original[_TOP_TO_ORIGINAL[name]] = tensor
        else:
            raise ValueError(f"'{name}' is not a tensor of a umT5 encoder; expected the names of UMT5EncoderModel")
    return original


def from_gguf(name: str) -> str:
    """The name in a GGUF file -> transformers'; any other name comes back unchanged."""
    block = _GGUF.match(name)
    if block and block[2] in _GGUF_BLOCK:
        return from_original(f"blocks.{block[1]}.{_GGUF_BLOCK[block[2]]}.weight")
    return _GGUF_TOP.get(name, name)


def renames(header: Header) -> Callable[[str], str | None]:
    """How this checkpoint's names become transformers'; None for tensors that are no weights.

    header: with packed weights found (`lightx2v.quant.find_packed`).
    Raises CheckpointError for files that are no umT5 encoder.
    """
    names = header.tensors.keys()
    if "token_embedding.weight" in names and "blocks.0.attn.q.weight" in names:
        rename: Callable[[str], str | None] = from_original
    elif "token_embd.weight" in names and "enc.blk.0.attn_q.weight" in names:
        rename = from_gguf
    elif EMBEDDING in names or TIED_EMBEDDING in names:
        rename = _from_transformers(duplicate=EMBEDDING in names)
    else:
        raise CheckpointError(
            f"{header.path}: this is {in_words(header)}, not a umT5 text encoder; expected token_embedding.weight "
            "(Wan's own file), shared.weight (transformers, ComfyUI) or token_embd.weight (GGUF); use "
            "models_t5_umt5-xxl-enc-bf16.pth or umt5_xxl_fp16.safetensors"
        )
    return lambda name: None if name == EMBEDDED_TOKENIZER else rename(name)


def _from_transformers(*, duplicate: bool) -> Callable[[str], str | None]:
    def rename(name: str) -> str | None:
        if name == TIED_EMBEDDING:
            return None if duplicate else EMBEDDING
        return name

    return rename


def sizes(header: Header, rename: Callable[[str], str | None]) -> Sizes:
    """Read the encoder's sizes from the shapes of its first block.

    Raises CheckpointError where a tensor needed for that is missing, or where the blocks are T5's instead of umT5's.
    """
    shapes = {target: info.shape for name, info in header.tensors.items() if (target := rename(name))}
    blocks = block_numbers(header.path, shapes, _OUR_BLOCK)
    if not blocks or blocks != set(range(len(blocks))):
        raise CheckpointError(
            f"{header.path}: expected encoder blocks 0, 1, 2 ... without a gap, found {len(blocks)} with numbers up to "
            f"{max(blocks, default=None)}; download the file again"
        )
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    if f"encoder.block.0.{bias}" in shapes and len(blocks) > 1 and f"encoder.block.1.{bias}" not in shapes:
        raise CheckpointError(
            f"{header.path}: a T5 encoder, which shares one position table; Wan needs umT5, which has one in every "
            "block: use umt5_xxl_fp16.safetensors"
        )
    vocab_size, hidden_size = _matrix(header, shapes, EMBEDDING)
    num_buckets, num_heads = _matrix(header, shapes, f"encoder.block.0.{bias}")
    attention_size, _ = _matrix(header, shapes, "encoder.block.0.layer.0.SelfAttention.q.weight")
    ffn_size, _ = _matrix(header, shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    if attention_size % num_heads:
        raise CheckpointError(f"{header.path}: {attention_size} query channels do not divide into {num_heads} heads")
    head_dim = attention_size // num_heads
    return Sizes(vocab_size, hidden_size, num_heads, head_dim, ffn_size, len(blocks), num_buckets)


def _matrix(header: Header, shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    shape = shapes.get(name)
    if shape is None:
        raise CheckpointError(f"{header.path}: no tensor is '{name}'; the file is incomplete or of another model")
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{header.path}: '{name}' is {list(shape)}, not a matrix; the file is of another model")
    return shape[0], shape[1]
