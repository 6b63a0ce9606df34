"""The judge reads rendered clips without an error, and is not fooled by others."""

from dataclasses import replace

import pytest
import torch

from demo.grammar import held_out_pairs, parse
from demo.judge import judge, score
from demo.world import attributes_of, render, sample_scene, scene_of


@pytest.fixture(scope="module")
def true_clips():
    attributes = [parse(prompt) for prompt, _ in held_out_pairs(48)]
    return attributes, render(scene_of(attributes), torch.Generator().manual_seed(5)).frames


@pytest.fixture(scope="module")
def true_findings(true_clips):
    return judge(true_clips[1])


def test_true_clips_score_full_marks(true_clips, true_findings):
    rates = score(true_findings, true_clips[0]).rates()
    assert rates == dict.fromkeys(rates, 1.0)


def other(attributes, field):
    swaps = {
        "colour": {"colour": "blue" if attributes.colour != "blue" else "red"},
        "shape": {"shape": "square" if attributes.shape != "square" else "cross"},
        "motion": {"motion": "left" if attributes.motion != "left" else "up"},
        "backdrop": {"backdrop": "plain", "backdrop_colours": ("navy",)}
        if attributes.backdrop_colours != ("navy",)
        else {"backdrop_colours": ("white",)},
    }
    return replace(attributes, **swaps[field])


@pytest.mark.parametrize("field", ["colour", "shape", "motion", "backdrop"])
def test_a_wrong_attribute_scores_nothing_and_only_there(true_clips, true_findings, field):
    rates = score(true_findings, [other(a, field) for a in true_clips[0]]).rates()
    untouched = {"colour", "shape", "motion", "backdrop"} - {field}
    assert rates[field] == 0 and rates["everything"] == 0
    assert all(rates[name] == 1 for name in untouched)
    assert (rates["direction"] == 0) == (field == "motion")


def test_reversed_clips_go_the_other_way(true_clips):
    attributes, clips = true_clips
    moving = [i for i, a in enumerate(attributes) if "left" in a.motion or "right" in a.motion]
    rates = score(judge(clips[moving].flip(2)), [attributes[i] for i in moving]).rates()
    assert rates["direction"] == 0 and rates["shape"] == 1


def test_a_turned_gradient_is_another_gradient(true_clips):
    attributes, clips = true_clips
    chosen = [i for i, a in enumerate(attributes) if a.backdrop == "gradient"]
    rates = score(judge(clips[chosen].flip(3)), [attributes[i] for i in chosen]).rates()
    assert rates["backdrop"] == 0 and rates["colour"] == 1


@pytest.mark.parametrize("kind", ["noise", "blank", "backdrop only"])
def test_clips_without_an_object_get_nothing_right(true_clips, kind):
    attributes, clips = true_clips
    fakes = {
        "noise": torch.rand(8, 3, 17, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        "blank": torch.zeros(8, 3, 17, 128, 128),
        "backdrop only": clips[:8, :, :, :8, :8].repeat(1, 1, 1, 16, 16) * 0.2,
    }
    rates = score(judge(fakes[kind]), attributes[:8]).rates()
    assert rates["shape"] == rates["everything"] == 0


def test_small_noise_changes_nothing(true_clips, true_findings):
    attributes, clips = true_clips
    noisy = clips + 0.05 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(1))
    rates = score(judge(noisy), attributes).rates()
    assert rates == dict.fromkeys(rates, 1.0)


@pytest.mark.parametrize("shape", [(2, 3, 17, 128), (2, 1, 17, 128, 128), (2, 3, 4, 128, 128)])
def test_other_tensors_are_refused(shape):
    with pytest.raises(ValueError, match="clips to judge are"):
        judge(torch.zeros(shape))


def test_counts_must_match(true_clips, true_findings):
    with pytest.raises(ValueError, match="48 clips were judged, 2 attributes"):
        score(true_findings, true_clips[0][:2])


def test_rendering_repeats_and_stays_inside():
    scene = sample_scene(6, torch.Generator().manual_seed(2))
    first, again = (render(scene, torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(first.frames, again.frames)
    assert first.frames.shape == (6, 3, 17, 128, 128) and first.coverage.shape == (6, 17, 128, 128)
    assert first.frames.abs().max() <= 1
    border = torch.cat([first.coverage[..., :1].flatten(), first.coverage[..., -1:].flatten()])
    assert border.max() == 0
    scores = score(judge(first.frames), attributes_of(scene)).rates()
    assert scores["everything"] == 1
