"""What a demo clip shows, and the English that says so.

One clip shows one coloured shape that moves over one backdrop. `caption` writes a sentence for such a clip, `parse`
reads the attributes back out of a sentence. Words of objects and backdrops do not overlap (an object is never navy), so
a sentence needs no deeper reading than its words and their order.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# The first word of each list is the plain one; the others are synonyms that captions use now and then.
SHAPES: Mapping[str, Sequence[str]] = {
    "circle": ("circle", "ball", "disc"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle",),
    "ring": ("ring", "donut", "hoop"),
    "cross": ("cross", "plus sign"),
}
COLOURS: Mapping[str, Sequence[str]] = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink", "magenta"),
}
BACKDROP_COLOURS: Mapping[str, Sequence[str]] = {
    "black": ("black",),
    "white": ("white",),
    "gray": ("gray", "grey"),
    "navy": ("navy",),
    "olive": ("olive",),
    "brown": ("brown",),
}
BACKDROPS = ("plain", "gradient", "vertical stripes", "horizontal stripes")
DIRECTIONS = ("left", "right", "up", "down", "up left", "up right", "down left", "down right")
STATIONARY: Mapping[str, Sequence[str]] = {
    "spin": ("spins", "rotates", "is spinning", "turns around", "is rotating"),
    "grow": ("grows", "gets bigger", "is growing", "expands"),
    "shrink": ("shrinks", "gets smaller", "is shrinking"),
    "still": ("stays still", "does not move", "stands still"),
}
MOTIONS = (*DIRECTIONS, *STATIONARY)
SIZES: Mapping[str, Sequence[str]] = {"medium": ("",), "big": ("big", "large", "huge")}

# How often the sampler draws each value; a spinning circle or ring would look still, so those are redrawn.
MOTION_WEIGHTS = (0.1,) * 4 + (0.085,) * 4 + (0.08, 0.07, 0.07, 0.04)
BACKDROP_WEIGHTS = (0.56, 0.3, 0.07, 0.07)
SIZE_WEIGHTS = (0.75, 0.25)
SPINNABLE = ("square", "triangle", "cross")

_VERBS = ("moves", "slides", "drifts", "goes", "is moving", "flies", "travels")
_HELD_OUT_SEED = 2101
_RESERVED_PAIRS = 400


class GrammarError(ValueError):
    """A prompt that the demo grammar cannot read; the message lists what it knows."""


@dataclass(frozen=True)
class Attributes:
    """What one clip shows.

    backdrop_colours: one name (plain) or two: top then bottom (gradient), in any order (stripes).
    """

    shape: str
    colour: str
    motion: str
    backdrop: str
    backdrop_colours: tuple[str, ...]
    size: str = "medium"

    def __post_init__(self) -> None:
        known = {
            "shape": SHAPES,
            "colour": COLOURS,
            "motion": MOTIONS,
            "backdrop": BACKDROPS,
            "size": SIZES,
        }
        for field, values in known.items():
            if getattr(self, field) not in values:
                raise GrammarError(f"{field} {getattr(self, field)!r} is not one of: {', '.join(values)}")
        count = 1 if self.backdrop == "plain" else 2
        names = self.backdrop_colours
        if len(names) != count or len(set(names)) != count or not set(names) <= set(BACKDROP_COLOURS):
            raise GrammarError(
                f"a {self.backdrop} backdrop takes {count} different colour(s) of {', '.join(BACKDROP_COLOURS)}; "
                f"got {names}"
            )

    def key(self) -> tuple[object, ...]:
        """What makes two clips the same request: stripes have no order, sizes and words do not count."""
        colours = self.backdrop_colours
        ordered = colours if self.backdrop == "gradient" else tuple(sorted(colours))
        return (self.shape, self.colour, self.motion, self.backdrop, ordered)


def _pick(rng: random.Random, values: Sequence[str], weights: Sequence[float] | None = None) -> str:
    # Only rng.random() is promised to stay the same between Python versions, and the held-out pairs must.
    if weights is None:
        return values[int(rng.random() * len(values))]
    left = rng.random() * sum(weights)
    for value, weight in zip(values, weights, strict=True):
        left -= weight
        if left < 0:
            return value
    return values[-1]


def sample_attributes(rng: random.Random) -> Attributes:
    """Draw one clip's attributes."""
    motion = _pick(rng, MOTIONS, MOTION_WEIGHTS)
    shape = _pick(rng, SPINNABLE if motion == "spin" else tuple(SHAPES))
    backdrop = _pick(rng, BACKDROPS, BACKDROP_WEIGHTS)
    first = _pick(rng, tuple(BACKDROP_COLOURS))
    second = _pick(rng, [name for name in BACKDROP_COLOURS if name != first])
    size = "medium" if motion in ("grow", "shrink") else _pick(rng, tuple(SIZES), SIZE_WEIGHTS)
    colours = (first,) if backdrop == "plain" else (first, second)
    return Attributes(shape, _pick(rng, tuple(COLOURS)), motion, backdrop, colours, size)


def _backdrop_phrase(attributes: Attributes, rng: random.Random | None) -> str:
    colours = attributes.backdrop_colours
    if attributes.backdrop == "plain":
        (name,) = (_word(BACKDROP_COLOURS[c], rng) for c in colours)
        forms: Sequence[str] = (
            f"{_article(name)} background",
            f"a plain {name} background",
            f"a solid {name} background",
            name,
        )
    else:
        first, second = (_word(BACKDROP_COLOURS[c], rng) for c in colours)
        if attributes.backdrop == "gradient":
            forms = (
                f"{_article(first)} to {second} gradient",
                f"a gradient from {first} to {second}",
                f"a background fading from {first} to {second}",
            )
        else:
            if rng is not None and rng.random() < 0.5:
                first, second = second, first
            way = attributes.backdrop.split()[0]
            forms = (f"{way} {first} and {second} stripes", f"a background of {way} {first} and {second} stripes")
    return _word(forms, rng)


def _motion_phrase(motion: str, rng: random.Random | None) -> str:
    if motion in STATIONARY:
        return _word(STATIONARY[motion], rng)
    if " " in motion:
        vertical, sideways = motion.split()
        way = _word(
            (f"{vertical} and {sideways}", f"{vertical} {sideways}", f"diagonally {vertical} and {sideways}"), rng
        )
    elif motion in ("left", "right"):
        way = _word((motion, f"to the {motion}"), rng)
    else:
        way = _word((motion, f"{motion}wards"), rng)
    return f"{_word(_VERBS, rng)} {way}"


def _word(forms: Sequence[str], rng: random.Random | None) -> str:
    # The plain word comes up half the time, so that rare synonyms do not starve it.
    if rng is None or len(forms) == 1 or rng.random() < 0.5:
        return forms[0]
    return _pick(rng, forms)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(attributes: Attributes, rng: random.Random | None = None) -> str:
    """One sentence for a clip; without `rng` the plain one, e.g. "a red circle moves left over a black background"."""
    words = (
        _word(SIZES[attributes.size], rng),
        _word(COLOURS[attributes.colour], rng),
        _word(SHAPES[attributes.shape], rng),
    )
    subject = " ".join(word for word in words if word)
    subject = _article(subject)
    verb = _motion_phrase(attributes.motion, rng)
    place = f"{_word(('over', 'on', 'in front of'), rng)} {_backdrop_phrase(attributes, rng)}"
    style = 0.0 if rng is None else rng.random()
    if style < 0.7:
        sentence = f"{subject} {verb} {place}"
    elif style < 0.85:
        sentence = f"a video of {subject} that {verb} {place}"
    else:
        sentence = f"{place}, {subject} {verb}"
    return sentence + "." if rng is not None and rng.random() < 0.2 else sentence


def vocabulary() -> str:
    """What the grammar knows, for error messages and help."""
    groups = {
        "shapes": [word for words in SHAPES.values() for word in words],
        "colours": [word for words in COLOURS.values() for word in words],
        "motions": [*(f"moves {d}" for d in DIRECTIONS), *(w for words in STATIONARY.values() for w in words)],
        "backgrounds": [
            "a COLOUR background",
            "a gradient from COLOUR to COLOUR",
            "vertical (or horizontal) COLOUR and COLOUR stripes",
        ],
        "background colours": list(BACKDROP_COLOURS),
        "sizes": [word for words in SIZES.values() for word in words if word],
    }
    return "; ".join(f"{name}: {', '.join(words)}" for name, words in groups.items())


def _mentions(text: str, table: Mapping[str, Sequence[str]]) -> list[str]:
    """Values of `table` in the order in which the text names them."""
    found = []
    for value, words in table.items():
        for word in words:
            if word:
                found += [(match.start(), value) for match in re.finditer(rf"\b{re.escape(word)}\b", text)]
    return [value for _, value in sorted(found)]


def _one(prompt: str, what: str, values: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(values))
    if len(distinct) != 1:
        told = f"names several ({', '.join(distinct)})" if distinct else "names none that the demo models know"
        raise GrammarError(f"prompt {prompt!r}: need exactly one {what}, it {told}. Known are {vocabulary()}")
    return distinct[0]


def _parse_motion(prompt: str, text: str) -> str:
    ways = _mentions(text, {d: (d, f"{d}wards", f"{d}ward") for d in ("left", "right", "up", "down")})
    # Verbs count in all their forms: "spinning", "grow", "is shrinking".
    stems = {
        "spin": ("spins?", "spinning", "rotates?", "rotating", "turns? around", "turning around"),
        "grow": ("grows?", "growing", "gets? bigger", "getting bigger", "expands?", "expanding"),
        "shrink": ("shrinks?", "shrinking", "gets? smaller", "getting smaller"),
        "still": ("still", "does not move", "not moving", "motionless"),
    }
    verbs = [name for name, forms in stems.items() if any(re.search(rf"\b{form}\b", text) for form in forms)]
    vertical = [way for way in ways if way in ("up", "down")]
    sideways = [way for way in ways if way in ("left", "right")]
    moves = []
    if ways:
        parts = [_one(prompt, "direction", part) for part in (vertical, sideways) if part]
        moves.append(" ".join(parts))
    return _one(prompt, "motion", moves + verbs)


def _parse_backdrop(prompt: str, text: str) -> tuple[str, tuple[str, ...]]:
    colours = tuple(dict.fromkeys(_mentions(text, BACKDROP_COLOURS)))
    if re.search(r"\b(striped?|stripes)\b", text):
        kind = _one(
            prompt, "stripe orientation", _mentions(text, {"vertical": ("vertical",), "horizontal": ("horizontal",)})
        )
        kind += " stripes"
    elif re.search(r"\b(gradient|fading|fades)\b", text):
        kind = "gradient"
    else:
        kind = "plain"
    count = 1 if kind == "plain" else 2
    if len(colours) != count:
        told = ", ".join(colours) or "none"
        raise GrammarError(
            f"prompt {prompt!r}: a {kind} background needs {count} background colour(s), it names {told}. "
            f"Known are {vocabulary()}"
        )
    return kind, colours


def parse(prompt: str) -> Attributes:
    """Read a prompt's attributes; words that carry none are passed over.

    Raises GrammarError, which lists the grammar's words, if a shape, colour, motion or background is missing or two of
    one kind are named.
    """
    text = " ".join(prompt.lower().split())
    shape = _one(prompt, "shape", _mentions(text, SHAPES))
    colour = _one(prompt, "colour", _mentions(text, COLOURS))
    sizes = _mentions(text, SIZES)
    motion = _parse_motion(prompt, text)
    if motion == "spin" and shape not in SPINNABLE:
        raise GrammarError(
            f"prompt {prompt!r}: a spinning {shape} cannot be seen to spin; take one of {', '.join(SPINNABLE)}"
        )
    backdrop, colours = _parse_backdrop(prompt, text)
    return Attributes(shape, colour, motion, backdrop, colours, sizes[0] if sizes else "medium")


def _reserved() -> list[tuple[str, int, Attributes]]:
    """Prompt, seed and content of everything that training leaves out; half the prompts use synonyms."""
    rng = random.Random(_HELD_OUT_SEED)
    found = []
    for index in range(_RESERVED_PAIRS):
        attributes = sample_attributes(rng)
        words = caption(attributes, random.Random(_HELD_OUT_SEED + index) if index % 2 else None)
        found.append((words, int(rng.random() * 2**31), attributes))
    return found


def held_out_pairs(count: int) -> list[tuple[str, int]]:
    """The first `count` of the fixed (prompt, seed) pairs that no training clip matches.

    Raises ValueError beyond the number of such pairs, 400.
    """
    pairs = [(words, seed) for words, seed, _ in _reserved()]
    if not 0 < count <= len(pairs):
        raise ValueError(f"held-out pairs: {count} asked for, 1 to {len(pairs)} exist")
    return pairs[:count]


def training_attributes(count: int, seed: int) -> list[Attributes]:
    """`count` draws for training, none of which asks for what a held-out pair asks for."""
    reserved = {attributes.key() for _, _, attributes in _reserved()}
    rng = random.Random(seed)
    drawn: list[Attributes] = []
    while len(drawn) < count:
        attributes = sample_attributes(rng)
        if attributes.key() not in reserved:
            drawn.append(attributes)
    return drawn
