"""Prompts to umT5 token ids: text cleaning, and the two tokenizer files that are in use."""

import html
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ftfy
import sentencepiece
import tokenizers
import torch

from lightx2v.checkpoint import CheckpointError, Header, read_tensors
from lightx2v.text.layout import EMBEDDED_TOKENIZER

END_ID = 1  # </s>; 0 is <pad> and 2 <unk> in every T5 vocabulary
FILES = ("tokenizer.json", "spiece.model")
FOLDERS = ("google/umt5-xxl", "tokenizer", ".")
# google/umt5-xxl has 256,000 pieces for 256,384 embedding rows: 300 sentinels, then padding to a multiple of 128.
SPARE_ROWS = 512


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and where it came from.

    size: number of ids it can give.
    pieces: cleaned text -> ids, without </s>.
    """

    source: str
    size: int
    pieces: Callable[[str], list[int]]

    def encode(self, text: str) -> list[int]:
        """Cleaned text -> ids that end in </s>, of any length."""
        return [*self.pieces(text), END_ID]


def clean(prompt: str) -> str:
    """Mend broken Unicode, undo HTML escapes (twice: `&amp;lt;` is common) and collapse whitespace.

    The order is Wan's (Wan-Video/Wan2.1, wan/modules/tokenizers.py, clean='whitespace').
    """
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def find_tokenizer(header: Header, given: Path | None, vocab_size: int) -> Tokenizer:
    """The tokenizer that was asked for, else the checkpoint's embedded one, else one that lies beside the checkpoint.

    given: a tokenizer.json or sentencepiece .model file, or a folder that holds one.
    vocab_size: rows of the encoder's embedding.
    Raises CheckpointError where none is found, it cannot be read, or it belongs to another encoder.

    A tokenizer.json turns a literal `</s>` or `<extra_id_0>` in a prompt into that special token, as Wan's own code
    does; a sentencepiece model spells it out as text, as ComfyUI does. Other text gives the same ids from both.
    """
    if given is not None:
        tokenizer = _read_given(Path(given))
    elif EMBEDDED_TOKENIZER in header.tensors:
        tokenizer = _read_embedded(header)
    else:
        tokenizer = _read_beside(header.path)
    spare = vocab_size - tokenizer.size
    if not 0 <= spare <= SPARE_ROWS:
        raise CheckpointError(
            f"{tokenizer.source}: this tokenizer has {tokenizer.size} pieces, but the encoder {header.path} has "
            f"{vocab_size} embedding rows: they do not belong together; use the tokenizer that came with the encoder"
        )
    return tokenizer


def _candidates(folder: Path) -> list[Path]:
    return [folder / inner / name for inner in FOLDERS for name in FILES]


def _read_given(given: Path) -> Tokenizer:
    if given.is_file():
        return _read_file(given)
    if not given.exists():
        raise CheckpointError(f"{given}: no such tokenizer; give a tokenizer.json, a spiece.model or their folder")
    for path in _candidates(given):
        if path.is_file():
            return _read_file(path)
    raise CheckpointError(f"{given}: this folder holds neither tokenizer.json nor spiece.model; give google/umt5-xxl's")


def _read_beside(checkpoint: Path) -> Tokenizer:
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    # A diffusers folder keeps tokenizer/ next to text_encoder/, so one level up counts as beside.
    places = [*_candidates(folder), *(folder.parent / "tokenizer" / name for name in FILES)]
    for path in places:
        if path.is_file():
            return _read_file(path)
    looked = ", ".join(str(path) for path in places)
    raise CheckpointError(
        f"{checkpoint}: no umT5 tokenizer found; looked for {looked}. Put tokenizer.json or spiece.model of "
        f"google/umt5-xxl into {folder / FOLDERS[0]}, or use umt5_xxl_fp16.safetensors, which carries its own"
    )


def _read_file(path: Path) -> Tokenizer:
    if path.suffix == ".json":
        return _from_json(path)
    return _from_sentencepiece(path.read_bytes(), str(path))


def _read_embedded(header: Header) -> Tokenizer:
    ((_, stored),) = read_tensors(header, [EMBEDDED_TOKENIZER])
    proto = stored.contiguous().flatten().view(torch.uint8).numpy().tobytes()  # of whatever type it is said to be
    return _from_sentencepiece(proto, f"{header.path} ({EMBEDDED_TOKENIZER})")


def _from_sentencepiece(proto: bytes, source: str) -> Tokenizer:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto)
    except RuntimeError as error:
        raise CheckpointError(f"{source}: not a sentencepiece model ({len(proto)} bytes); download it again") from error
    _check_end(source, processor.eos_id())
    return Tokenizer(source, processor.get_piece_size(), processor.encode_as_ids)


def _from_json(path: Path) -> Tokenizer:
    with _understood(path):
        fast = tokenizers.Tokenizer.from_file(str(path))
    _check_end(str(path), fast.token_to_id("</s>"))
    # A saved file may ask for padding or for truncation at a length of its own.
    fast.no_padding()
    fast.no_truncation()

    def pieces(text: str) -> list[int]:
        with _understood(path):
            return fast.encode(text, add_special_tokens=False).ids

    return Tokenizer(str(path), fast.get_vocab_size(with_added_tokens=True), pieces)


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """While the tokenizers package is at work: what it raises becomes an error that names the file.

    It raises bare Exception for most damage, also for some that shows at the first text, and its Rust part's panics are
    none of Exception.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise CheckpointError(f"{path}: not a tokenizer.json ({error}); download it again") from error


def _check_end(source: str, end: int | None) -> None:
    if end != END_ID:
        raise CheckpointError(
            f"{source}: expected </s> as token {END_ID}, as in every T5 vocabulary, found {end}; "
            "use the tokenizer of google/umt5-xxl"
        )
