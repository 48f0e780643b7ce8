"""Prompts for evaluation: the six GenEval categories, all of combinations that training never saw."""

import zlib
from dataclasses import dataclass

import numpy as np

from .captions import OPENINGS, Facts, Group, opposite, words_of
from .sampling import CATEGORIES, MAX_OBJECTS, Key, place, position_key, split_of
from .world import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, SceneObject, relation


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

    Every prompt names a combination of the split. Combinations take turns; wording and background vary, and repeat
    only where the category has fewer than `n` sentences.

    Raises:
        ValueError: If there is no such category.
    """
    if category not in CATEGORIES:
        raise ValueError(f"A category is one of {CATEGORIES}, got {category!r}.")
    rng = np.random.default_rng((seed, zlib.crc32(f"{category} {split}".encode())))
    keys = keys_in(category, split)
    order = rng.permutation(len(keys))
    prompts, seen = [], set()
    for index in range(n):
        for _ in range(20):
            facts = _facts(keys[order[index % len(keys)]], rng)
            opening = OPENINGS[rng.integers(len(OPENINGS))] if rng.random() < 0.4 else ""
            text = opening + words_of(facts)
            if text not in seen:
                break
        seen.add(text)
        prompts.append(ScenePrompt(category, text, facts))
    return prompts


def scene_for(facts: Facts, rng: np.random.Generator, lattice: tuple[int, int] = (4, 4)) -> Scene:
    """A random scene that shows exactly what the facts claim."""
    groups = [group for group in facts.groups for _ in range(group.count)]
    while True:
        # What a group leaves open is the same for all its objects and differs between groups.
        colors = dict(zip(facts.groups, rng.permutation(list(COLORS))))
        sizes = [group.size or "small" for group in groups]
        cells = place(rng, sizes, lattice)
        if cells is None:
            continue
        objects = tuple(
            SceneObject(group.shape, group.color or str(colors[group]), size, cell)
            for group, size, cell in zip(groups, sizes, cells)
        )
        if facts.relation is None or relation(objects[0], objects[1]) == facts.relation:
            background = facts.background or tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
            return Scene(objects, background, lattice)


def _facts(key: Key, rng: np.random.Generator) -> Facts:
    category, name = key
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))] if rng.random() < 0.3 else None
    where = None
    words = name.split()
    if category == "single_object":
        groups = [Group(1, words[1], size=words[0])]
    elif category == "colors":
        groups = [Group(1, words[1], words[0])]
    elif category == "counting":
        groups = [Group(int(words[0]), words[2], words[1])]
    elif category == "two_object":
        groups = [Group(1, shape) for shape in words]
    elif category == "position":
        groups, where = [Group(1, words[0]), Group(1, words[-1])], " ".join(words[1:-1])
    else:
        groups = [Group(1, kind.split()[1], kind.split()[0]) for kind in name.split(" + ")]
    if len(groups) == 2 and rng.random() < 0.5:
        groups.reverse()
        where = None if where is None else opposite(where)
    return Facts(tuple(groups), where, background)
