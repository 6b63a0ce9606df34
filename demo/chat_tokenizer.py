"""The demo language model's tokenizer: byte-level BPE as Qwen2.5's, learnt from the chat template and the grammar."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from demo.grammar import caption, sample_attributes
from lightx2v.text.chat import END, SYSTEM, TURN, ChatTokenizer

PAD = "<|endoftext|>"
MARKS = (PAD, TURN, END)  # in Qwen's order
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
VOCABULARY_SIZE = 540  # at most: 256 bytes and what joins them to the words of the template and the grammar
# Qwen/Qwen2.5-VL-7B-Instruct, tokenizer.json: where text is cut before bytes are joined.
CUTS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _training_lines(captions: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    lines = [caption(sample_attributes(rng), rng) for _ in range(captions)]
    return [*lines, *[SYSTEM, "system\n", "user\n", "\n", "assistant\n"] * 40]


def make_tokenizer(folder: Path, *, captions: int = 10_000, seed: int = 7) -> Path:
    """Write vocab.json, merges.txt and tokenizer_config.json; any text can be encoded."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_pattern(), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(MARKS),
        min_frequency=20,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words.train_from_iterator(_training_lines(captions, seed), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    words.model.save(str(folder))
    first = words.get_vocab_size()
    told = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(first + index): _mark(mark) for index, mark in enumerate(MARKS)},
        "add_prefix_space": False,
        "model_max_length": 131072,
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": None,
        "bos_token": None,
    }
    (folder / FILES[2]).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return folder


def _pattern() -> Any:
    from tokenizers import Regex

    return Regex(CUTS)


def _mark(content: str) -> dict[str, object]:
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, "special": True, **plain}


def read_tokenizer(folder: Path) -> ChatTokenizer:
    """As the engine reads it."""
    from transformers import Qwen2Tokenizer

    return ChatTokenizer(folder, Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True))
