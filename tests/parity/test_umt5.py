"""Our umT5 against transformers' own, ComfyUI's own and Wan's formulas: tiny random weights, CPU, float32."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

import tiny_umt5
from lightx2v.text.layout import to_original_layout
from lightx2v.text.umt5 import UMT5, load

PROMPTS = ["", "a small red cat runs", "two dogs sleep near old wooden boats, " * 8, "红猫 zebra (cat:1.3)"]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return tiny_umt5.state_dict()


@pytest.fixture(scope="module")
def proto() -> bytes:
    return tiny_umt5.train_sentencepiece()


@pytest.fixture(scope="module")
def encoder(state, proto, tmp_path_factory) -> UMT5:
    return load(tiny_umt5.save_single(tmp_path_factory.mktemp("umt5"), state, proto))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def padded(encoder: UMT5, prompt: str, length: int = 512) -> tuple[Tensor, Tensor]:
    """ids and mask, both (1, length), of a prompt that needs no cleaning."""
    ids = encoder.tokenizer.encode(prompt.strip())
    assert len(ids) <= length
    mask = torch.zeros(1, length, dtype=torch.long)
    mask[:, : len(ids)] = 1
    return torch.tensor([ids + [0] * (length - len(ids))]), mask


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("options", [{}, {"attn_implementation": "eager"}], ids=["default attention", "eager"])
@torch.no_grad()
def test_equals_transformers_on_padded_and_masked_tokens(encoder, state, prompt, options):
    theirs = tiny_umt5.reference(state, **options)
    ids, mask = padded(encoder, prompt)
    expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    ours = encoder.encode(prompt)
    assert ours.shape == (1, 512, tiny_umt5.SIZES["d_model"]) and ours.dtype == torch.float32
    assert relative(ours, expected) < 1e-6
    assert not ours[:, int(mask.sum()) :].any()


@torch.no_grad()
def test_attention_in_these_weights_is_far_from_flat(encoder, state):
    """Otherwise a wrong position table or a dropped scale would hide below the bound."""
    theirs = tiny_umt5.reference(state, attn_implementation="eager")
    ids, mask = padded(encoder, PROMPTS[2])
    n = int(mask.sum())
    for weights in theirs(input_ids=ids[:, :n], output_attentions=True).attentions:
        assert weights.amax(-1).mean() > 10 / n


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_equals_comfyui_network(comfy, encoder, state, prompt):
    t5 = importlib.import_module("comfy.text_encoders.t5")
    ops = importlib.import_module("comfy.ops")
    config = json.loads((Path(t5.__file__).parent / "umt5_config_xxl.json").read_text()) | tiny_umt5.SIZES
    theirs = t5.T5(config, torch.float32, "cpu", ops.manual_cast)
    theirs.load_state_dict(state)
    ids, mask = padded(encoder, prompt)
    expected = theirs(ids, mask, dtype=torch.float32)[0] * mask[..., None]
    assert relative(encoder.encode(prompt), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_equals_comfyui_text_encode(comfy, tmp_path, proto, dtype):
    """What CLIPTextEncode gives for the same file: same tokens, length, zero rows and values, from half weights too."""
    sd = importlib.import_module("comfy.sd")
    # ComfyUI knows umT5-xxl by its 24 blocks and width 4096; the rest may be small.
    sizes = {"d_ff": 16, "d_kv": 8, "num_heads": 2, "vocab_size": 256}
    full = tiny_umt5.state_dict({**sizes, "d_model": 4096, "num_layers": 24}, seed=1)
    full = {name: tensor.to(dtype) for name, tensor in full.items()} | tiny_umt5.embedded(proto)
    save_file(full, tmp_path / "umt5.safetensors")
    ours = load(tmp_path / "umt5.safetensors")
    native = sd.load_text_encoder_state_dicts(
        [full], clip_type=sd.CLIPType.WAN, model_options={"umt5xxl_model_config": sizes, "dtype": dtype}
    )
    for prompt in ["", "a small red cat runs over sand", "two dogs sleep " * 200]:
        ((expected, _),) = native.encode_from_tokens_scheduled(native.tokenize(prompt))
        context = ours.encode(prompt)
        assert context.shape == expected.shape
        assert torch.equal(context.abs().sum(-1) == 0, expected.abs().sum(-1) == 0)
        # Through 24 float32 layers either side is 0.6e-6 to 1.6e-6 away from float64.
        assert relative(context, expected) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_files_are_computed_in_float32(state, proto, tmp_path, dtype):
    half = {name: tensor.to(dtype) for name, tensor in state.items()}
    ours = load(tiny_umt5.save_single(tmp_path, half, proto))
    assert {p.dtype for name, p in ours.model.named_parameters() if "final" not in name} == {dtype}
    theirs = tiny_umt5.reference({name: tensor.float() for name, tensor in half.items()})
    ids, mask = padded(ours, PROMPTS[2])
    expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    assert relative(ours.encode(PROMPTS[2]), expected) < 1e-6


@torch.no_grad()
def test_residuals_beyond_float16_survive(state, proto, tmp_path):
    loud = {name: tensor * (30000 if name.endswith("wo.weight") else 1) for name, tensor in state.items()}
    half = {name: tensor.half() for name, tensor in loud.items()}
    naive = tiny_umt5.reference({name: tensor.float() for name, tensor in half.items()}).half()
    ours = load(tiny_umt5.save_single(tmp_path, half, proto))
    ids, mask = padded(ours, PROMPTS[1])
    n = int(mask.sum())
    half_arithmetic = naive(input_ids=ids[:, :n]).last_hidden_state.float()
    expected = naive.float()(input_ids=ids[:, :n]).last_hidden_state
    assert relative(half_arithmetic, expected) > 0.05  # float16 arithmetic does hit its ceiling with these weights
    assert relative(ours.encode(PROMPTS[1])[:, :n], expected) < 1e-6


def wan_encoder(weights: dict[str, Tensor], ids: Tensor, num_heads: int) -> Tensor:
    """The encoder written out over Wan's own names, so that no table of ours says which weight does what.

    ids (L) -> (L, D). Sources: Raffel et al. 2020 (T5), Shazeer 2020 (gated GELU), and what the names stand for in
    Wan-Video/Wan2.1, wan/modules/t5.py: `gate` goes through GELU and multiplies `fc1`; every block has its own
    position table.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[name]

    def heads(x: Tensor, name: str) -> Tensor:
        return rearrange(x @ weights[name].T, "l (h d) -> h l d", h=num_heads)

    x = weights["token_embedding.weight"][ids]
    buckets = torch.tensor([[wan_bucket(key - query) for key in range(len(ids))] for query in range(len(ids))])
    for index in range(sum(name.endswith("norm1.weight") for name in weights)):
        block = f"blocks.{index}."
        y = norm(x, block + "norm1.weight")
        q, k, v = (heads(y, f"{block}attn.{name}.weight") for name in "qkv")
        bias = rearrange(weights[block + "pos_embedding.embedding.weight"][buckets], "l s h -> h l s")
        attended = (q @ k.mT + bias).softmax(-1) @ v
        x = x + rearrange(attended, "h l d -> l (h d)") @ weights[block + "attn.o.weight"].T
        y = norm(x, block + "norm2.weight")
        gate = torch.nn.functional.gelu(y @ weights[block + "ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ weights[block + "ffn.fc1.weight"].T)) @ weights[block + "ffn.fc2.weight"].T
    return norm(x, "norm.weight")


def wan_bucket(distance: int) -> int:
    """T5's bucket of a signed distance: 32 of them, half for each side, exact below 8, logarithmic up to 128."""
    side, distance = (16 if distance > 0 else 0), abs(distance)
    if distance < 8:
        return side + distance
    return side + min(15, 8 + int(math.log(distance / 8) / math.log(128 / 8) * 8))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_wans_names_mean_what_wan_means_by_them(proto, tmp_path, prompt):
    generator = torch.Generator().manual_seed(5)
    shapes = {name: tensor.shape for name, tensor in to_original_layout(tiny_umt5.state_dict()).items()}
    weights = {
        name: (1.0 if "norm" in name else 0.0)
        + torch.randn(shape, generator=generator) * (1.0 if "embedding" in name else 0.3 if "norm" in name else 0.07)
        for name, shape in shapes.items()
    }
    torch.save(weights, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    (tmp_path / "spiece.model").write_bytes(proto)
    ours = load(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    ids = torch.tensor(ours.tokenizer.encode(prompt.strip()))
    exact = wan_encoder({name: tensor.double() for name, tensor in weights.items()}, ids, tiny_umt5.SIZES["num_heads"])
    assert relative(ours.encode(prompt)[0, : len(ids)], exact) < 1e-6


def test_every_layout_gives_the_same_conditioning(encoder, state, proto, tmp_path):
    (tmp_path / "spiece.model").write_bytes(proto)
    vocabulary = tmp_path / "spiece.model"
    torch.save(to_original_layout(state), tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    save_file(to_original_layout(state), tmp_path / "original.safetensors")
    single = tiny_umt5.save_single(tmp_path / "single", state, None)
    tied = {n.replace("shared.", "encoder.embed_tokens."): t for n, t in state.items()}
    save_file(tied, tmp_path / "tied_name.safetensors")
    save_file(tied | {"shared.weight": state["shared.weight"].clone()}, tmp_path / "both_names.safetensors")
    tiny_umt5.reference(state).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for path in [
        tmp_path / "models_t5_umt5-xxl-enc-bf16.pth",
        tmp_path / "original.safetensors",
        single,
        tmp_path / "tied_name.safetensors",
        tmp_path / "both_names.safetensors",
        tmp_path / "sharded",
    ]:
        other = load(path, tokenizer=vocabulary)
        for prompt in PROMPTS:
            assert torch.equal(other.encode(prompt), encoder.encode(prompt)), path
