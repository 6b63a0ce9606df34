"""The demo text encoder's sentencepiece model, learnt from the caption grammar; ids as T5's: pad 0, eos 1, unk 2."""

from __future__ import annotations

import io
import os
import random
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path

import sentencepiece as spm

from demo.grammar import caption, sample_attributes

PAD, EOS, UNKNOWN = 0, 1, 2
VOCABULARY_SIZE = 184  # about 90 words, 52 letters and digits with and without a space before, punctuation, 3 specials


def _training_lines(captions: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    lines = [caption(sample_attributes(rng), rng) for _ in range(captions)]
    words = sorted({word.strip(".,") for line in lines for word in line.split()})
    # The unigram trainer seeds pieces from the set of distinct words: a word met in one form only would be spelled out.
    lines += [word + mark for word in words for mark in ".,!?" for _ in range(20)]
    lines += [letter for letter in string.ascii_lowercase for _ in range(40)]
    lines += [mark for mark in "0123456789,.!?'-" for _ in range(20)]
    return lines


def make_tokenizer(path: Path, *, captions: int = 20_000, seed: int = 7) -> None:
    """Write a sentencepiece model to `path`; any text can be encoded, letters that it does not know become <unk>."""
    with tempfile.TemporaryDirectory() as scratch:
        # Upper to lower case and nothing else: the usual nmt_nfkc_cf table is 240 kB, this one a few hundred bytes.
        table = Path(scratch) / "lower.tsv"
        table.write_text("".join(f"{ord(c):X}\t{ord(c.lower()):X}\n" for c in string.ascii_uppercase))
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(_training_lines(captions, seed)),
            model_writer=model,
            vocab_size=VOCABULARY_SIZE,
            model_type="unigram",
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNKNOWN,
            bos_id=-1,
            normalization_rule_tsv=str(table),
            character_coverage=1.0,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_bytes(model.getvalue())
    os.replace(fresh, path)


class Tokenizer:
    """Captions to ids."""

    def __init__(self, path: Path) -> None:
        self._model = spm.SentencePieceProcessor(model_file=str(path))

    def __len__(self) -> int:
        return self._model.get_piece_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, closed by </s>."""
        return [[*ids, EOS] for ids in self._model.encode(list(texts))]

    def pieces(self, text: str) -> list[str]:
        """The text as the pieces it is cut into."""
        return self._model.encode(text, out_type=str)
