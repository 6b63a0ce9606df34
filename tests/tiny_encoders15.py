"""Small encoders of HunyuanVideo-1.5 with random weights: Qwen2.5-VL's language part, byT5, SigLIP, and a tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from lightx2v.text import qwen
from lightx2v.text.chat import END, SYSTEM, TURN
from lightx2v.text.layout import Sizes
from lightx2v.text.umt5 import empty_network
from lightx2v.vision import siglip

State = dict[str, Tensor]
QWEN = qwen.Sizes(vocab_size=1280, hidden_size=256, num_heads=2, num_kv_heads=1, ffn_size=96, num_layers=5)
BYT5 = Sizes(
    vocab_size=384, hidden_size=1472, num_heads=2, head_dim=192, ffn_size=48, num_layers=3, num_buckets=32
)  # its width and that of its queries are what ComfyUI knows it by
SIGLIP = siglip.Sizes(hidden_size=144, ffn_size=80, num_layers=3, patch_size=14, grid=4)


def drawn(shapes: Iterable[tuple[str, tuple[int, ...]]], seed: int) -> State:
    """Gains far from 1, biases far from 0, attention far from flat."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes:
        noise = torch.randn(shape, generator=generator)
        if "norm" in name and not name.endswith("bias"):
            state[name] = 1 + 0.3 * noise
        elif len(shape) == 1:
            state[name] = 0.2 * noise
        elif "embed" in name or name == "shared.weight" or "relative" in name:
            state[name] = noise
        else:
            sharp = 1.4 if re.search(r"[qk]_proj", name) else 0.15 if ".q." in name else 1  # T5 scales no products
            state[name] = noise * noise[0].numel() ** -0.5 * sharp
    return state


def qwen_state(size: qwen.Sizes = QWEN, *, seed: int = 0) -> State:
    """As in ComfyUI's file: all blocks, the last norm, the head and a little of the vision tower."""
    used = qwen.empty(size).state_dict()
    shapes = {f"model.{name}": tuple(tensor.shape) for name, tensor in used.items()}
    for index in range(size.num_layers - qwen.SKIPPED_BLOCKS, size.num_layers):
        first = [(name, shape) for name, shape in shapes.items() if name.startswith("model.layers.0.")]
        shapes |= {name.replace("layers.0.", f"layers.{index}."): shape for name, shape in first}
    shapes |= {"model.norm.weight": (size.hidden_size,), "lm_head.weight": (size.vocab_size, size.hidden_size)}
    return drawn(shapes.items(), seed) | {"visual.patch_embed.proj.weight": torch.randn(16, 3, 2, 14, 14)}


def byt5_state(size: Sizes = BYT5, *, seed: int = 1) -> State:
    """As in ComfyUI's file."""
    return drawn(((name, tuple(tensor.shape)) for name, tensor in empty_network(size, "T5").state_dict().items()), seed)


def siglip_state(size: siglip.Sizes = SIGLIP, *, seed: int = 2) -> State:
    """As in ComfyUI's file, with what tells it from CLIP of the pooling head."""
    network = siglip.empty(size)
    names = {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in network.state_dict().items()}
    state = drawn(((name, tuple(tensor.shape)) for name, tensor in names.items()), seed)
    return state | {"vision_model.head.probe": torch.randn(1, 1, size.hidden_size)}


def write_tokenizer(folder: Path) -> Path:
    """A byte-level vocabulary trained on the template, with Qwen's two marks, in the files that Qwen's has."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words.train_from_iterator([SYSTEM, "system user assistant\n", "a red cat walks over the wet sand"], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    words.model.save(str(folder))
    marks = {str(words.get_vocab_size() + index): _mark(mark) for index, mark in enumerate((TURN, END))}
    told = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": marks, "pad_token": None, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


def _mark(content: str) -> dict[str, object]:
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, "special": True, **plain}
