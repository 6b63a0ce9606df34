"""Tiny umT5 encoders with random weights, and tokenizers trained on the spot, for the tests of lightx2v.text."""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

# No two sizes are alike, so that none can stand in for another.
SIZES = {"d_model": 96, "d_kv": 16, "num_heads": 3, "d_ff": 80, "num_layers": 4, "vocab_size": 256}
WORDS = (
    "a small red cat runs slowly over wet sand under the bright evening sky while camera pans left "
    "two dogs sleep near old wooden boats 0123456789 ,.!?()<>&:;'\" "
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 红猫"
)


def state_dict(sizes: dict[str, int] = SIZES, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under transformers' names, large enough that attention is far from flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        names = {name: p.shape for name, p in UMT5EncoderModel(UMT5Config(**sizes)).named_parameters()}
    state = {}
    for name, shape in names.items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            state[name] = 1 + 0.3 * noise
        elif "relative_attention_bias" in name or name == "shared.weight":
            state[name] = 1.5 * noise
        elif ".q." in name:
            state[name] = noise * (shape[1] * 4) ** -0.5
        else:
            state[name] = noise * shape[1] ** -0.5
    return state


def reference(state: dict[str, Tensor], sizes: dict[str, int] = SIZES, **options: object) -> UMT5EncoderModel:
    """transformers' encoder, built and loaded the ordinary way."""
    model = UMT5EncoderModel(UMT5Config(**sizes, **options))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"encoder.embed_tokens.weight"} and not unexpected
    model.tie_weights()
    assert torch.equal(model.encoder.embed_tokens.weight, state["shared.weight"])
    return model.eval()


def train_sentencepiece(vocab_size: int = 250, rule: str = "nmt_nfkc", **options: object) -> bytes:
    words = WORDS.split()
    lines = [" ".join(words[i:] + words[:i]) for i in range(len(words))] * 5
    buffer = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=buffer,
        vocab_size=vocab_size,
        model_type="unigram",
        normalization_rule_name=rule,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **(ids | options),
    )
    return buffer.getvalue()


def to_fast(proto: bytes) -> Tokenizer:
    """The same vocabulary as a tokenizer.json, laid out as T5's converted tokenizers are."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    fast = Tokenizer(
        models.Unigram(pieces, unk_id=2, byte_fallback=any(processor.is_byte(i) for i in range(len(pieces))))
    )
    if charsmap := _field(_field(proto, 3), 2):
        fast.normalizer = normalizers.Precompiled(charsmap)
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    fast.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return fast


def _field(message: bytes, wanted: int) -> bytes:
    """Last length-delimited field `wanted` of a protobuf message: 3 is the normalizer of a model, 2 its table."""
    stream, found = io.BytesIO(message), b""
    while (key := _varint(stream)) is not None:
        number, kind = key >> 3, key & 7
        if kind == 2:
            value = stream.read(_varint(stream))
            found = value if number == wanted else found
        elif kind == 0:
            _varint(stream)
        else:
            stream.read({1: 8, 5: 4}[kind])
    return found


def _varint(stream: io.BytesIO) -> int | None:
    value, shift = 0, 0
    while byte := stream.read(1):
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
        shift += 7
    return None


def embedded(proto: bytes) -> dict[str, Tensor]:
    return {"spiece_model": torch.frombuffer(bytearray(proto), dtype=torch.uint8)}


def save_single(folder: Path, state: dict[str, Tensor], proto: bytes | None) -> Path:
    """ComfyUI's layout (with the sentencepiece model) or transformers' single file (without)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "umt5.safetensors"
    save_file(state | (embedded(proto) if proto else {}), path)
    return path
