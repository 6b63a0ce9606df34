"""Prompts as a turn of a conversation, in Qwen's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightx2v.checkpoint import CheckpointError
from lightx2v.library import from_transformers

# Blanks and all as the model was trained: its source breaks the text with backslashes, so that the indentation of eight
# is part of it (Tencent-Hunyuan/HunyuanVideo-1.5, PROMPT_TEMPLATE; diffusers, pipeline_hunyuan_video1_5.py).
ASPECTS = (
    "1. The main content and theme of the video.",
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
    "4. background environment, light, style and atmosphere.",
    "5. camera angles, movements, and transitions used in the video.",
)
SYSTEM = (" " * 9).join(
    ("You are a helpful assistant. Describe the video by detailing the following aspects:", *ASPECTS)
)
TURN, END = "<|im_start|>", "<|im_end|>"
FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
FOLDERS = (".", "tokenizer", "llm", "../tokenizer")


@dataclass(frozen=True)
class ChatTokenizer:
    """source: its folder. words: transformers' Qwen2Tokenizer."""

    source: Path
    words: Any

    def asked(self, prompt: str) -> tuple[list[int], int]:
        """The ids of a whole conversation that asks for a video, and where in them the prompt begins.

        An empty prompt is a blank, as in training. Qwen's marks, such as <|im_end|>, are read as marks in a prompt too.
        """
        system, user = f"{TURN}system\n{SYSTEM}{END}\n", f"{TURN}user\n{prompt or ' '}{END}\n"
        return self.ids(f"{system}{user}{TURN}assistant\n")

    def ids(self, conversation: str) -> tuple[list[int], int]:
        """The ids of a conversation written out, and where in them the text of its second turn begins."""
        ids = self._tokens(conversation)
        turn = self.words.convert_tokens_to_ids(TURN)
        starts = [index for index, each in enumerate(ids) if each == turn]
        return ids, starts[1] + len(self._tokens(f"{TURN}user\n"))

    def _tokens(self, text: str) -> list[int]:
        return self.words(text, add_special_tokens=False)["input_ids"]


def find_tokenizer(checkpoint: Path, given: Path | None, vocab_size: int) -> ChatTokenizer:
    """The tokenizer in the folder that was asked for, else one that lies beside the checkpoint.

    vocab_size: rows of the model's embedding.
    Raises CheckpointError where none is found, it cannot be read, or it belongs to another model.
    """
    root = given or (checkpoint if checkpoint.is_dir() else checkpoint.parent)
    found = tokenizer_in(root)
    if found is None:
        places = [root / name for name in FOLDERS]
        raise CheckpointError(
            f"{checkpoint}: no tokenizer of Qwen2.5-VL found; looked for tokenizer.json, or vocab.json and merges.txt, "
            f"in {', '.join(map(str, places))}: put those of Qwen/Qwen2.5-VL-7B-Instruct into {root / 'tokenizer'}"
        )
    (kind,) = from_transformers("Qwen2Tokenizer")
    try:
        words = kind.from_pretrained(str(found), local_files_only=True)
    except Exception as error:  # transformers and its Rust part raise all sorts; all mean the same to the user
        raise CheckpointError(f"{found}: cannot be read as a tokenizer ({error}); download its files again") from error
    tokenizer = ChatTokenizer(found, words)
    largest = max(words.get_vocab().values())
    if not {TURN, END} <= words.get_vocab().keys() or largest >= vocab_size:
        raise CheckpointError(
            f"{found}: {largest + 1} tokens, with{'' if TURN in words.get_vocab() else 'out'} {TURN}, but the encoder "
            f"{checkpoint} has {vocab_size} embedding rows: they do not belong together; use the tokenizer of "
            "Qwen/Qwen2.5-VL-7B-Instruct"
        )
    return tokenizer


def tokenizer_in(root: Path, folders: Sequence[str] = FOLDERS) -> Path | None:
    """The first of these folders of a model's folder that holds a tokenizer, if one does."""
    places = (root / name for name in folders)
    return next(
        (place for place in places if any(all((place / name).is_file() for name in names) for names in FILES)), None
    )
