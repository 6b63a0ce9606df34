"""The two text encoders of HunyuanVideo-1.5 as one: Qwen2.5-VL reads the prompt, byT5 the letters that it quotes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lightx2v.guidance import Conditioning
from lightx2v.text import byt5, qwen


@dataclass(frozen=True)
class HunyuanText:
    """glyphs: None where no file was given; then prompts must quote nothing. model: both networks."""

    language: qwen.Qwen
    glyphs: byt5.ByT5 | None = None
    model: nn.ModuleList = field(init=False)

    def __post_init__(self) -> None:
        given = [encoder.model for encoder in (self.language, self.glyphs) if encoder is not None]
        object.__setattr__(self, "model", nn.ModuleList(given))

    def condition(self, prompt: str, *, on_block: Callable[[int, int], None] | None = None) -> Conditioning:
        """Raises ValueError for a prompt that quotes text where there is no byT5."""
        if self.glyphs is None and byt5.glyph_prompt(prompt) is not None:
            raise ValueError(
                f"the prompt quotes text, which needs byT5 beside {self.language.path.name}: load "
                "byt5_small_glyphxl_fp16.safetensors as the second text encoder, or leave the quotation marks out"
            )
        context = self.language.encode(prompt, on_block=on_block)
        return Conditioning(context, glyphs=None if self.glyphs is None else self.glyphs.encode(prompt))


def load(
    language: Path, glyphs: Path | None, *, tokenizer: Path | None = None, device: torch.device | str = "cpu"
) -> HunyuanText:
    """Load both; raises CheckpointError as each of them does. See `qwen.load` for the tokenizer."""
    if glyphs is not None:
        byt5.open_encoder(glyphs)  # a wrong small file is told before the large one is read
    words = qwen.load(language, tokenizer=tokenizer, device=device)
    return HunyuanText(words, None if glyphs is None else byt5.load(glyphs, device=device))
