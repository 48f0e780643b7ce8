"""Prompts for evaluation: the six GenEval categories, all of combinations that training never saw."""

import zlib
from dataclasses import dataclass
from itertools import product, zip_longest

import numpy as np

from .captions import OPENINGS, Facts, Group, opposite, words_of
from .sampling import CATEGORIES, MAX_OBJECTS, SPLITS, Key, place, position_key, split_of
from .world import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, SceneObject, relation

# Share of prompts with an opening ("draw ...") and of prompts that name a background, as in training captions.
_OPENING_SHARE, _BACKGROUND_SHARE = 0.4, 0.3
# Random placements tried before a scene is said to be impossible.
_TRIES = 1000


@dataclass(frozen=True)
class ScenePrompt:
    """A prompt and what a picture of it must show."""

    category: str
    text: str
    facts: Facts


def keys_in(category: str, split: str) -> list[Key]:
    """All combinations of a category that belong to a split."""
    kinds = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    names = {
        "single_object": [f"{size} {shape}" for size in SIZES for shape in SHAPES],
        "colors": kinds,
        "counting": [f"{number} {kind}" for number in range(2, MAX_OBJECTS + 1) for kind in kinds],
        "two_object": [f"{a} {b}" for a in sorted(SHAPES) for b in sorted(SHAPES) if a < b],
        "position": [
            position_key(a, where, b)[1] for a in SHAPES for b in SHAPES if a != b for where in ("left of", "above")
        ],
        "color_attr": [f"{a} + {b}" for a in sorted(kinds) for b in sorted(kinds) if a < b],
    }
    return [(category, name) for name in names[category] if split_of((category, name)) == split]


def make_prompts(category: str, n: int = 100, split: str = "test", seed: int = 0) -> list[ScenePrompt]:
    """`n` prompts of a category, the same in every run.

    Every prompt names a combination of the split. Combinations take turns; wording and background vary, and a sentence
    repeats only when the category has fewer than `n`, after all of them.

    Raises:
        ValueError: If there is no such category or split.
    """
    if category not in CATEGORIES:
        raise ValueError(f"A category is one of {CATEGORIES}, got {category!r}.")
    if split not in SPLITS:
        raise ValueError(f"A split is one of {SPLITS}, got {split!r}.")
    rng = np.random.default_rng((seed, zlib.crc32(f"{category} {split}".encode())))
    keys = keys_in(category, split)
    turns = zip_longest(*(_sentences(keys[index], rng) for index in rng.permutation(len(keys))))
    distinct = [prompt for turn in turns for prompt in turn if prompt is not None]
    return [distinct[index % len(distinct)] for index in range(n)]


def scene_for(facts: Facts, rng: np.random.Generator, lattice: tuple[int, int] = (4, 4)) -> Scene:
    """A random scene that shows exactly what the facts claim.

    Raises:
        ValueError: If the lattice has no room for it.
    """
    groups = [group for group in facts.groups for _ in range(group.count)]
    sizes = [group.size or "small" for group in groups]
    for _ in range(_TRIES):
        # What a group leaves open is the same for all its objects and, while colours last, differs between groups.
        paints = [str(color) for color in rng.permutation(list(COLORS))]
        colors = {group: paints[index % len(paints)] for index, group in enumerate(facts.groups)}
        cells = place(rng, sizes, lattice)
        if cells is None:
            continue
        objects = tuple(
            SceneObject(group.shape, group.color or colors[group], size, cell)
            for group, size, cell in zip(groups, sizes, cells)
        )
        if facts.relation is None or relation(*objects) == facts.relation:
            background = facts.background or tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
            return Scene(objects, background, lattice)
    raise ValueError(f"A lattice of {lattice} has no room for {words_of(facts)!r} with a free cell between objects.")


def _sentences(key: Key, rng: np.random.Generator) -> list[ScenePrompt]:
    """Everything that is asked about a combination, in random order with plain wordings likelier to come first."""
    category, _ = key
    orders, openings, backgrounds = _orders(key), ("", *OPENINGS), (None, *BACKGROUNDS)
    options = list(product(orders, openings, backgrounds))
    weights = [
        (_OPENING_SHARE / len(OPENINGS) if opening else 1 - _OPENING_SHARE)
        * (_BACKGROUND_SHARE / len(BACKGROUNDS) if background else 1 - _BACKGROUND_SHARE)
        / len(orders)
        for _, opening, background in options
    ]
    prompts = []
    for index in rng.choice(len(options), len(options), replace=False, p=weights):
        (groups, where), opening, background = options[index]
        facts = Facts(groups, where, background)
        prompts.append(ScenePrompt(category, opening + words_of(facts), facts))
    return prompts


def _orders(key: Key) -> list[tuple[tuple[Group, ...], str | None]]:
    """Groups and relation of a combination, named from either end."""
    category, name = key
    where = None
    words = name.split()
    if category == "single_object":
        groups = (Group(1, words[1], size=words[0]),)
    elif category == "colors":
        groups = (Group(1, words[1], words[0]),)
    elif category == "counting":
        groups = (Group(int(words[0]), words[2], words[1]),)
    elif category == "two_object":
        groups = tuple(Group(1, shape) for shape in words)
    elif category == "position":
        groups, where = (Group(1, words[0]), Group(1, words[-1])), " ".join(words[1:-1])
    else:
        groups = tuple(Group(1, kind.split()[1], kind.split()[0]) for kind in name.split(" + "))
    if len(groups) == 1:
        return [(groups, where)]
    return [(groups, where), (groups[::-1], None if where is None else opposite(where))]
