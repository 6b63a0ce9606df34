"""Captions say what attributes hold, and `parse` reads it back."""

import random

import pytest

from demo.grammar import (
    SHAPES,
    Attributes,
    GrammarError,
    caption,
    held_out_pairs,
    parse,
    sample_attributes,
    training_attributes,
)


def test_captions_read_back():
    rng = random.Random(3)
    for _ in range(500):
        attributes = sample_attributes(rng)
        for text in (caption(attributes), caption(attributes, rng)):
            read = parse(text)
            assert read.key() == attributes.key() and read.size == attributes.size, text


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A RED ball drifting upwards on black!", Attributes("circle", "red", "up", "plain", ("black",))),
        (
            "a huge violet plus sign, rotating, on horizontal grey and white stripes",
            Attributes("cross", "purple", "spin", "horizontal stripes", ("gray", "white"), "big"),
        ),
        (
            "over a gradient from navy to olive, a pink disc goes down and to the left",
            Attributes("circle", "pink", "down left", "gradient", ("navy", "olive")),
        ),
        ("a green box gets smaller on brown", Attributes("square", "green", "shrink", "plain", ("brown",))),
    ],
)
def test_prompts_in_other_words(prompt, expected):
    assert parse(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("a red dragon moves left over black", "exactly one shape, it names none"),
        ("a red circle and a blue circle move left over black", r"exactly one colour, it names several \(red, blue\)"),
        ("a red circle over black", "exactly one motion, it names none"),
        ("a red circle moves up and down over black", r"exactly one direction, it names several \(up, down\)"),
        ("a red circle moves left and grows over black", "exactly one motion, it names several"),
        ("a red circle moves left", r"a plain background needs 1 background colour\(s\), it names none"),
        ("a red circle moves left over black and white stripes", "exactly one stripe orientation"),
        ("a red circle spins over black", "cannot be seen to spin"),
        ("a red donut spins over black", "cannot be seen to spin"),
        ("", "exactly one shape"),
    ],
)
def test_unreadable_prompts_say_what_the_grammar_knows(prompt, complaint):
    with pytest.raises(GrammarError, match=complaint) as error:
        parse(prompt)
    if "spin" not in complaint:
        assert "triangle" in str(error.value) and "turquoise" in str(error.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"shape": "hexagon"}, "'hexagon' is not one of"),
        ({"backdrop": "gradient"}, "takes 2 different"),
        ({"backdrop_colours": ("red",)}, "takes 1 different"),
    ],
)
def test_attributes_are_checked(change, complaint):
    plain = {"shape": "ring", "colour": "red", "motion": "left", "backdrop": "plain", "backdrop_colours": ("black",)}
    with pytest.raises(GrammarError, match=complaint):
        Attributes(**{**plain, **change})


def test_held_out_pairs_are_fixed_and_kept_from_training():
    pairs = held_out_pairs(200)
    assert pairs[:20] == held_out_pairs(20)
    assert pairs[0] == ("a blue cross moves down and right over an olive background", 1866063730)
    assert len({seed for _, seed in pairs}) == 200
    asked = {parse(prompt).key() for prompt, _ in pairs}
    assert not asked & {attributes.key() for attributes in training_attributes(3000, seed=1)}
    assert {parse(prompt).shape for prompt, _ in pairs} == set(SHAPES)
    with pytest.raises(ValueError, match="401 asked for"):
        held_out_pairs(401)
