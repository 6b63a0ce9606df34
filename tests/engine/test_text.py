"""umT5 around the network: cleaning, tokenizers and where they are found, framing, cancelling, refusals."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tiny_umt5
from lightx2v.checkpoint import DTYPES, CheckpointError, Header, TensorInfo
from lightx2v.quant import find_packed
from lightx2v.quant.microscaled import for_file
from lightx2v.text.layout import Sizes, from_original, renames, sizes, to_original_layout
from lightx2v.text.tokenizer import clean
from lightx2v.text.umt5 import UMT5, load
from lightx2v_kernels.microscaled import restore_mxfp8, restore_nvfp4

MANIFESTS = Path(__file__).resolve().parents[1] / "formats" / "manifests"
PROMPT = "a small red cat runs"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return tiny_umt5.state_dict()


@pytest.fixture(scope="module")
def proto() -> bytes:
    return tiny_umt5.train_sentencepiece()


@pytest.fixture(scope="module")
def encoder(state, proto, tmp_path_factory) -> UMT5:
    return load(tiny_umt5.save_single(tmp_path_factory.mktemp("umt5"), state, proto))


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a\tcat \n\n runs  ", "a cat runs"),
        ("cats &amp; dogs", "cats & dogs"),
        ("a &amp;lt;cat&amp;gt;", "a <cat>"),
        ("<b> &amp;lt;cat", "<b> <cat"),  # where there are tags ftfy itself undoes no escapes
        ("the cat\u2019s \u201ctoy\u201d", 'the cat\'s "toy"'),  # ftfy straightens quotes
        ("cafÃ© at night", "café at night"),
        ("ｆｕｌｌ　ｗｉｄｔｈ", "full width"),
        ("no\u00a0break\u2003space", "no break space"),
        ("a (red:1.3) [cat] {x}", "a (red:1.3) [cat] {x}"),
        ("nul\x00 and half\ud800", "nul and half\ufffd"),
        ("", ""),
        (" &nbsp; ", ""),
    ],
)
def test_clean(raw, cleaned):
    assert clean(raw) == cleaned


@pytest.mark.parametrize(
    "options", [{"rule": "nmt_nfkc"}, {"rule": "identity"}, {"byte_fallback": True, "vocab_size": 400}]
)
def test_both_tokenizer_files_give_the_same_ids(tmp_path, options):
    proto = tiny_umt5.train_sentencepiece(**options)
    fast = tiny_umt5.to_fast(proto)
    fast.enable_truncation(3)
    fast.enable_padding(length=900)
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "spiece.model").write_bytes(proto)
    rows = fast.get_vocab_size()
    checkpoint = tiny_umt5.save_single(
        tmp_path / "model", tiny_umt5.state_dict({**tiny_umt5.SIZES, "vocab_size": rows}), None
    )
    one = load(checkpoint, tokenizer=tmp_path / "tokenizer.json").tokenizer
    other = load(checkpoint, tokenizer=tmp_path / "spiece.model").tokenizer
    assert one.size == other.size
    texts = ["", PROMPT, "A Red CAT, (sand:1.3)!", "红猫 runs，fast", "猫猫猫 🦙🦙 zzz ½ ﬁre", "x" * 60, "sand " * 700]
    for text in texts:
        ids = one.encode(clean(text))
        assert ids == other.encode(clean(text)), text
        assert ids[-1] == 1 and 1 not in ids[:-1]
    assert len(one.encode(texts[-1])) > 700  # the file's own truncation and padding do not apply
    assert {len(one.encode(text)) for text in texts[:2]} != {1}


def test_tokenizer_is_found_beside_the_checkpoint(state, proto, tmp_path):
    places = ["google/umt5-xxl/spiece.model", "tokenizer/tokenizer.json", "spiece.model", "../tokenizer/spiece.model"]
    for place in places:
        folder = tmp_path / place.replace("/", "_") / "text_encoder"
        checkpoint = tiny_umt5.save_single(folder, state, None)
        file = folder / place
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".json":
            tiny_umt5.to_fast(proto).save(str(file))
        else:
            file.write_bytes(proto)
        for path in (checkpoint, folder):
            found = load(path).tokenizer
            assert Path(found.source).resolve() == file.resolve()
            assert found.encode(PROMPT)[-1] == 1 and len(found.encode(PROMPT)) > 3


def test_tokenizer_order_is_argument_then_embedded_then_beside(state, proto, tmp_path):
    checkpoint = tiny_umt5.save_single(tmp_path, state, proto)
    (tmp_path / "spiece.model").write_bytes(proto)
    assert "spiece_model" in load(checkpoint).tokenizer.source
    given = tmp_path / "elsewhere"
    given.mkdir()
    (given / "spiece.model").write_bytes(proto)
    assert load(checkpoint, tokenizer=given).tokenizer.source == str(given / "spiece.model")
    tiny_umt5.to_fast(proto).save(str(given / "tokenizer.json"))
    assert load(checkpoint, tokenizer=given).tokenizer.source == str(given / "tokenizer.json")  # what Wan itself reads


def test_an_embedded_tokenizer_of_another_type_is_refused(state, tmp_path):
    checkpoint = tiny_umt5.save_single(tmp_path, {**state, "spiece_model": torch.ones(64, dtype=torch.bfloat16)}, None)
    with pytest.raises(CheckpointError, match=r"spiece_model\): not a sentencepiece model \(128 bytes\)"):
        load(checkpoint)


def test_missing_tokenizer_names_the_places(state, tmp_path):
    checkpoint = tiny_umt5.save_single(tmp_path / "models", state, None)
    with pytest.raises(CheckpointError) as error:
        load(checkpoint)
    message = str(error.value)
    for words in ["google/umt5-xxl/tokenizer.json", "tokenizer/spiece.model", "umt5_xxl_fp16.safetensors"]:
        assert words in message
    assert str(tmp_path) in message
    with pytest.raises(CheckpointError, match=r"nowhere: no such tokenizer"):
        load(checkpoint, tokenizer=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor spiece\.model"):
        load(checkpoint, tokenizer=tmp_path / "models")


def test_unusable_tokenizers_are_refused(state, proto, tmp_path):
    checkpoint = tiny_umt5.save_single(tmp_path, state, proto)
    bad = {
        "pointer.model": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not a sentencepiece model"),
        "empty.model": (b"", "not a sentencepiece model"),
        "cut.model": (proto[: len(proto) // 2], "not a sentencepiece model"),
        "pointer.json": (b"version https://git-lfs.github.com/spec/v1\n", "not a tokenizer.json"),
        "config.json": (b'{"vocab_size": 1}', "not a tokenizer.json"),
        "binary.json": (b"\xff\xfe\x00", "not a tokenizer.json"),
        "llama.model": (tiny_umt5.train_sentencepiece(bos_id=1, eos_id=2, unk_id=0, pad_id=-1), "expected </s>"),
        "large.model": (tiny_umt5.train_sentencepiece(400, byte_fallback=True), "do not belong together"),
    }
    for name, (content, message) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as error:
            load(checkpoint, tokenizer=tmp_path / name)
        assert name in str(error.value)
    wide = tiny_umt5.save_single(tmp_path / "wide", tiny_umt5.state_dict({**tiny_umt5.SIZES, "vocab_size": 900}), proto)
    with pytest.raises(CheckpointError, match="do not belong together"):
        load(wide)


def test_rows_after_the_end_are_zero(encoder):
    for prompt in ["", PROMPT]:
        count = len(encoder.tokenizer.encode(prompt))
        context = encoder.encode(prompt)
        assert context.shape == (1, 512, 96) and context.dtype == torch.float32 and not context.requires_grad
        assert context[0, :count].abs().sum(-1).min() > 0
        assert not context[0, count:].any()
    assert torch.equal(encoder.encode(" \n&nbsp;"), encoder.encode(""))
    assert not torch.equal(encoder.encode("cat dog"), encoder.encode("dog cat"))
    encoder.encode(PROMPT).mul_(2)  # an ordinary tensor, not an inference tensor


def test_long_prompts_are_kept_and_warned_about(encoder, caplog):
    ids = encoder.tokenizer.pieces("sand")
    exact = "sand " * ((512 - 1) // len(ids))
    assert encoder.encode(exact).shape[1] == 512 and not caplog.records
    prompt = "sand " * 600
    count = len(encoder.tokenizer.encode(clean(prompt)))
    context = encoder.encode(prompt)
    assert context.shape[1] == count > 512
    assert context[0].abs().sum(-1).min() > 0
    (record,) = caplog.records
    assert f"{count} tokens" in record.getMessage() and f"{count - 512} more than the 512" in record.getMessage()


def test_prompt_weights_are_read_literally(encoder):
    assert encoder.tokenizer.encode(clean("(cat:1.3)")) != encoder.tokenizer.encode("cat")
    assert not torch.equal(encoder.encode("(cat:1.3)"), encoder.encode("cat"))


def test_a_call_can_be_cancelled_between_blocks(encoder):
    seen = []
    watched = encoder.encode(PROMPT, on_block=lambda index, total: seen.append((index, total)))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]

    class Cancelled(Exception):
        pass

    def cancel(index: int, total: int) -> None:
        seen.append(index)
        if index == 2:
            raise Cancelled

    seen.clear()
    with pytest.raises(Cancelled):
        encoder.encode(PROMPT, on_block=cancel)
    assert seen == [0, 1, 2]
    assert torch.equal(encoder.encode(PROMPT), watched) and seen == [0, 1, 2]  # nothing of the hook stays


def test_embedding_is_held_once_and_everything_is_on_its_device(state, proto, tmp_path):
    half = {name: tensor.half() for name, tensor in state.items()}
    model = load(tiny_umt5.save_single(tmp_path, half, proto), dtype=torch.bfloat16).model
    assert model.encoder.embed_tokens is model.shared and not model.training
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(t.is_meta or t.requires_grad for t in tensors)
    assert sum(p.numel() for p in tensors) == sum(t.numel() for t in state.values())
    assert {p.dtype for name, p in model.named_parameters() if "final_layer_norm" not in name} == {torch.bfloat16}
    moved = model.to("meta")  # a memory manager may move the module: nothing may stay behind
    assert all(t.is_meta for t in [*moved.parameters(), *moved.buffers()])


def test_original_layout_round_trip(state):
    original = to_original_layout(state | {"encoder.embed_tokens.weight": state["shared.weight"]})
    assert "blocks.3.ffn.gate.0.weight" in original and "token_embedding.weight" in original
    back = {from_original(name): tensor for name, tensor in original.items()}
    assert back.keys() == state.keys() and all(back[name] is tensor for name, tensor in state.items())
    with pytest.raises(ValueError, match=r"decoder\.block\.0"):
        to_original_layout(state | {"decoder.block.0.x": torch.zeros(1)})


def wrong_states(state: dict[str, Tensor], proto: bytes) -> dict[str, tuple[dict[str, Tensor], str]]:
    original = to_original_layout(state)
    small = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.block.1.")}
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    t5 = {name: tensor for name, tensor in state.items() if bias not in name or "block.0." in name}
    wo = "encoder.block.2.layer.1.DenseReluDense.wo.weight"
    q = "encoder.block.0.layer.0.SelfAttention.q"
    gate = "blocks.0.ffn.gate.0.weight"
    fp8 = {f"{q}.weight": state[f"{q}.weight"].to(torch.float8_e4m3fn)}
    int8 = {gate: original[gate].to(torch.int8)}
    patch = {"patch_embedding.weight": torch.zeros(2), "blocks.0.self_attn.q.weight": torch.zeros(2)}
    vae = {"decoder.head.0.gamma": torch.zeros(2), "encoder.conv1.weight": torch.zeros(2)}
    return {
        "vae": (vae, "this is a Wan2.1 VAE, with 16 latent channels, not a umT5 text encoder"),
        "dit": (patch, "this is a Wan transformer, not a umT5"),
        "clip": ({"text_model.x": torch.zeros(2)}, "unknown .2 tensors, first 'text_model.x'"),
        "empty": ({}, "a file without tensors"),
        "fp8": (
            state | fp8 | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)},
            rf"'{q}.weight' \(float8_e4m3fn\) has lost its",
        ),
        "int8": (original | int8 | {f"{gate}_scale": torch.ones(79, 1)}, "has a scale .* that does not belong to"),
        "nvfp4": (state | {f"{q}.weight_scale_2": torch.zeros(1)}, "no comfy_quant mark says"),
        "gap": (small, "without a gap"),
        "t5": (t5, "T5 encoder"),
        "no_blocks": ({"shared.weight": state["shared.weight"]}, "without a gap"),
        "missing": ({name: tensor for name, tensor in state.items() if name != wo}, "missing"),
        "extra": (state | {"lm_head.weight": torch.zeros(2, 2)}, "no place"),
        "shape": (state | {wo: torch.zeros(96, 7)}, "model expects"),
        "heads": (state | {f"{q}.weight": torch.zeros(50, 96)}, "do not divide"),
        "flat": (state | {"shared.weight": torch.zeros(256)}, "not a matrix"),
    }


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp8"])
def test_layers_in_nvfp4_and_mxfp8_are_restored(scheme, state, proto, tmp_path):
    names = [name for name, tensor in state.items() if ".SelfAttention.q.weight" in name and tensor.ndim == 2]
    packed, restored = dict(state), dict(state)
    for name in names:
        made = for_file(state[name], scheme, "lightx2v", name)
        packed |= {name.removesuffix("weight") + leaf: tensor for leaf, tensor in made.items()}
        if scheme == "mxfp8":
            restored[name] = restore_mxfp8(made["weight"], made["weight_scale"].view(torch.uint8))
        else:
            unit = (1 / made["weight_global_scale"]).reshape(1)
            restored[name] = restore_nvfp4(made["weight"], made["weight_scale"].view(torch.uint8), unit, False)
    found = load(tiny_umt5.save_single(tmp_path / "packed", packed, proto)).encode(PROMPT)
    wanted = load(tiny_umt5.save_single(tmp_path / "restored", restored, proto)).encode(PROMPT)
    assert names and torch.equal(found, wanted)
    assert not torch.equal(wanted, load(tiny_umt5.save_single(tmp_path / "plain", state, proto)).encode(PROMPT))


def test_wrong_files_are_refused_in_words(state, proto, tmp_path):
    for name, (wrong, message) in wrong_states(state, proto).items():
        path = tmp_path / f"{name}.safetensors"
        save_file(wrong | tiny_umt5.embedded(proto) if wrong else {}, path)
        with pytest.raises(CheckpointError, match=message) as error:
            load(path)
        assert str(path) in str(error.value)


def test_damaged_files_are_refused_in_words(state, proto, tmp_path):
    whole = tiny_umt5.save_single(tmp_path, state, proto).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save(to_original_layout(state), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    torch.save({"step": 3, "model": torch.nn.Linear(2, 2)}, tmp_path / "code.pth")
    for name in ["cut.safetensors", "cut.pth", "code.pth", "absent.safetensors"]:
        with pytest.raises(CheckpointError, match=name):
            load(tmp_path / name, tokenizer=tmp_path)


def test_broken_weights_and_wrong_dtypes_are_refused(state, proto, tmp_path):
    name = "encoder.block.1.layer.0.layer_norm.weight"
    broken = state | {name: torch.full_like(state[name], float("nan"))}
    encoder = load(tiny_umt5.save_single(tmp_path, broken, proto))
    with pytest.raises(CheckpointError, match=r"umt5.safetensors.*infinities or NaN.*torch.float32"):
        encoder.encode(PROMPT)
    with pytest.raises(ValueError, match="float8_e4m3fn: expected one of"):
        load(tmp_path / "umt5.safetensors", dtype=torch.float8_e4m3fn)


PUBLISHED = {
    "wan_umt5_xxl_enc_bf16": 0,
    "umt5_xxl_transformers_bf16": 0,
    "comfyui_umt5_xxl_fp16": 0,
    "comfyui_umt5_xxl_fp8_e4m3fn_scaled": 168,
    "lightx2v_umt5_xxl_enc_fp8": 168,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_are_recognised(name):
    found = find_packed(published(name))
    rename = renames(found.header)
    assert sizes(found.header, rename) == Sizes(256384, 4096, 64, 64, 10240, 24, 32)
    mapped = {target for key in found.header.tensors if (target := rename(key))}
    assert mapped == set(tiny_umt5.state_dict({**tiny_umt5.SIZES, "num_layers": 24}))
    assert sum(info.packed is not None for info in found.header.tensors.values()) == PUBLISHED[name]
    assert set(found.unused) <= {"scaled_fp8"}


def published(name: str) -> Header:
    tensors = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))["tensors"]
    path = Path(name)
    return Header(path, {k: TensorInfo(DTYPES[t["dtype"]], tuple(t["shape"]), path) for k, t in tensors.items()}, {})


def in_8_bits(state: dict[str, Tensor], dtype: torch.dtype, *, rows: bool) -> tuple[dict[str, Tensor], dict, dict]:
    """The linear layers rounded; their scales by weight; what both stand for."""
    stored, scales, expected = dict(state), {}, dict(state)
    largest = 127 if dtype == torch.int8 else 448
    for name, tensor in state.items():
        if any(part in name for part in ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "wi_", "wo")):
            scales[name] = (tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().max()) / largest
            scaled = tensor / scales[name]
            stored[name] = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
            expected[name] = stored[name].float() * scales[name]
    return stored, scales, expected


def quantised_encoders(state: dict[str, Tensor], proto: bytes, folder: Path) -> dict[str, tuple[Path, dict]]:
    """Every published way to store the encoder in 8 bits: the path, and the weights that must come out."""
    found = {}
    stored, scales, expected = in_8_bits(state, torch.float8_e4m3fn, rows=False)
    extra = {name.removesuffix("weight") + "scale_weight": scale for name, scale in scales.items()}
    extra["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    found["comfyui"] = (tiny_umt5.save_single(folder / "comfyui", stored | extra, proto), expected)
    for name, dtype in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
        stored, scales, expected = in_8_bits(state, dtype, rows=True)
        whole = to_original_layout(stored)
        whole |= {key + "_scale": scale for key, scale in to_original_layout(scales).items()}
        folder.joinpath(name).mkdir()
        torch.save(whole, folder / name / f"models_t5_{name}.pth")
        (folder / name / "spiece.model").write_bytes(proto)
        found[name] = (folder / name / f"models_t5_{name}.pth", expected)
    return found


def test_quantised_encoders_encode_as_what_they_stand_for(state, proto, tmp_path):
    original = load(tiny_umt5.save_single(tmp_path, state, proto)).encode(PROMPT)
    for name, (path, expected) in quantised_encoders(state, proto, tmp_path).items():
        plain = load(tiny_umt5.save_single(tmp_path / f"plain_{name}", expected, proto)).encode(PROMPT)
        assert not torch.equal(plain, original)
        resting = load(path)
        assert torch.equal(resting.encode(PROMPT), plain), name
        restored = load(path, dtype=torch.float32)
        assert torch.equal(restored.encode(PROMPT), plain), name
        found = {key.replace(".block.layer.", ".layer."): p for key, p in restored.model.named_parameters()}
        assert found.keys() == expected.keys() and all(torch.equal(found[key], t) for key, t in expected.items())
        assert held_bytes(resting) < 0.75 * held_bytes(restored), name
        packed = {p.dtype for key, p in resting.model.named_parameters() if "wo" in key or ".q." in key}
        assert packed == {torch.int8 if name == "int8" else torch.float8_e4m3fn}


def held_bytes(encoder: UMT5) -> int:
    return sum(t.nbytes for t in [*encoder.model.parameters(), *encoder.model.buffers()])


def test_fp8_without_scales_and_outside_of_the_layers(state, proto, tmp_path):
    """Files that were merely cast: layers stay fp8, embedding and norms are restored."""
    cast = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    encoder = load(tiny_umt5.save_single(tmp_path, cast, proto))
    plain = load(tiny_umt5.save_single(tmp_path / "plain", {k: t.float() for k, t in cast.items()}, proto))
    assert torch.equal(encoder.encode(PROMPT), plain.encode(PROMPT))
    assert encoder.model.shared.weight.dtype == torch.bfloat16
    assert {p.dtype for key, p in encoder.model.named_parameters() if ".q." in key} == {torch.float8_e4m3fn}


def test_gguf_encoder(state, proto, tmp_path):
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter
    from gguf.quants import dequantize, quantize
    from gguf.tensor_mapping import get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.T5ENCODER, tiny_umt5.SIZES["num_layers"])
    writer, expected = GGUFWriter(tmp_path / "umt5-encoder-Q8_0.gguf", "t5encoder"), {}
    for name, tensor in state.items():
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            packed = quantize(tensor.numpy(), GGMLQuantizationType.Q8_0)
            writer.add_tensor(names.get_name(name, (".weight",)), packed, raw_dtype=GGMLQuantizationType.Q8_0)
            expected[name] = torch.from_numpy(dequantize(packed, GGMLQuantizationType.Q8_0))
        else:
            writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
            expected[name] = tensor
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "spiece.model").write_bytes(proto)
    encoder = load(tmp_path / "umt5-encoder-Q8_0.gguf")
    plain = load(tiny_umt5.save_single(tmp_path / "plain", expected, proto))
    assert torch.equal(encoder.encode(PROMPT), plain.encode(PROMPT))
