"""Prompts that say what to draw only to one who works it out: sums, mixed colours, opposites, things of the world.

Each comes with the thought that solves it. The thought ends in the plain prompt, so that a model which writes it down
before it draws has only to draw what it wrote.
"""

from dataclasses import dataclass

import numpy as np

from .captions import NUMBER_WORDS, Facts, Group, phrase, words_of
from .sampling import split_of
from .world import COLORS, SHAPES

KINDS = ("sum", "difference", "color", "shape", "both")
# What a colour is known by: things that have it, and colours that mix to it.
COLOR_CLUES = {
    "red": ("blood", "a ripe tomato"),
    "green": ("grass", "blue mixed with yellow"),
    "blue": ("the deep sea", "the sky at noon"),
    "yellow": ("a lemon", "the sun"),
    "orange": ("a carrot", "red mixed with yellow"),
    "purple": ("a plum", "red mixed with blue"),
    "cyan": ("ice", "green mixed with blue"),
    "pink": ("a piglet", "red mixed with white"),
}
SHAPE_CLUES = {
    "circle": ("like a wheel", "like a coin"),
    "square": ("like a chess board", "with four equal sides"),
    "triangle": ("with three sides", "like a slice of pizza"),
    "cross": ("like a plus sign", "as on a flag of Switzerland"),
    "diamond": ("like a kite", "like a square on its tip"),
    "star": ("with five points", "like a sheriff's badge"),
}


@dataclass(frozen=True)
class Riddle:
    """A prompt that must be worked out.

    Attributes:
        kind: One of `KINDS`.
        text: The prompt.
        thought: How it is worked out, ending in the plain prompt.
        facts: What a picture must show.
    """

    kind: str
    text: str
    thought: str
    facts: Facts


def draw_riddle(rng: np.random.Generator, split: str = "train", kind: str | None = None) -> Riddle:
    """A random riddle whose answer is a combination of the split.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"A riddle is of one of the kinds {KINDS}, got {kind!r}.")
    while True:
        own = _draw(rng, kind or KINDS[rng.integers(len(KINDS))])
        (group,) = own.facts.groups
        category = "colors" if group.count == 1 else "counting"
        key = f"{group.color} {group.shape}" if group.count == 1 else f"{group.count} {group.color} {group.shape}"
        if split_of((category, key)) == split:
            return own


def _draw(rng: np.random.Generator, kind: str) -> Riddle:
    color, shape = tuple(COLORS)[rng.integers(len(COLORS))], SHAPES[rng.integers(len(SHAPES))]
    count, steps = 1, []
    said_color, said_shape, said_count = color, shape, None
    if kind == "sum":
        count = int(rng.integers(2, 5))
        first = int(rng.integers(1, count))
        terms = NUMBER_WORDS[first], NUMBER_WORDS[count - first]
        said_count = f"{terms[0]} plus {terms[1]}"
        steps.append(f"{said_count} is {NUMBER_WORDS[count]}")
    elif kind == "difference":
        count = int(rng.integers(1, 5))
        taken = int(rng.integers(1, 7 - count))
        said_count = f"{NUMBER_WORDS[count + taken]} minus {NUMBER_WORDS[taken]}"
        steps.append(f"{said_count} is {NUMBER_WORDS[count]}")
    if kind in ("color", "both"):
        said_color = COLOR_CLUES[color][rng.integers(2)]
        steps.append(f"{said_color} is {color}")
    if kind in ("shape", "both"):
        said_shape = SHAPE_CLUES[shape][rng.integers(2)]
        steps.append(f"a shape {said_shape} is a {shape}")
    facts = Facts((Group(count, shape, color),))
    steps.append(f"so {words_of(facts)}")
    if said_count is not None:
        plural = phrase(Group(2, shape, color)).removeprefix("two ")
        text = f"as many {plural} as {said_count}"
    elif kind == "color":
        text = f"a {shape} in the color of {said_color}"
    elif kind == "shape":
        text = f"{phrase(Group(1, 'circle', color)).removesuffix(' circle')} shape {said_shape}"
    else:
        text = f"a shape {said_shape} in the color of {said_color}"
    return Riddle(kind, text, ". ".join(steps), facts)
