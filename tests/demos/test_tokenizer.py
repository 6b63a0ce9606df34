"""The tokenizer has T5's ids, knows every word of the grammar and survives everything else."""

import random

import pytest

from demo.grammar import caption, sample_attributes
from demo.stages.pool import TOKENS, pad_ids
from demo.tokenizer import EOS, PAD, UNKNOWN, VOCABULARY_SIZE, Tokenizer, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "deep" / "spiece.model"
    make_tokenizer(path, captions=4000)
    return Tokenizer(path)


def test_every_word_of_a_caption_is_one_piece(tokenizer):
    rng = random.Random(11)
    for _ in range(300):
        text = caption(sample_attributes(rng), rng)
        words = text.replace(",", " ,").replace(".", " .").split()
        (ids,) = tokenizer.encode([text])
        assert len(ids) <= TOKENS and ids[-1] == EOS and UNKNOWN not in ids
        assert len(ids) - 1 == len(words), tokenizer.pieces(text)


def test_case_does_not_matter_and_the_empty_prompt_is_eos(tokenizer):
    assert tokenizer.encode(["A Red CIRCLE moves left"]) == tokenizer.encode(["a red circle moves left"])
    assert tokenizer.encode([""]) == [[EOS]]


@pytest.mark.parametrize("text", ["色调艳丽，过曝", "éà\t\n<extra_id_0> </s>", "🟥" * 50, "x" * 2000, "\x00"])
def test_any_text_is_encoded(tokenizer, text):
    (ids,) = tokenizer.encode([text])
    assert ids[-1] == EOS and all(0 < i < len(tokenizer) for i in ids)


def test_size(tokenizer):
    assert 90 < len(tokenizer) <= VOCABULARY_SIZE


def test_padding_refuses_what_training_cannot_take():
    assert pad_ids([[5, EOS]]).tolist() == [[5, EOS] + [PAD] * (TOKENS - 2)]
    with pytest.raises(ValueError, match="40 tokens"):
        pad_ids([[5] * 40])
