"""Which scenes exist: how they are drawn at random, and which combinations training never sees.

Splits differ in combinations, not in seeds. Each GenEval category has a kind of combination, a *key*:

| category | key | found in |
|---|---|---|
| single_object | (size, shape) | one object |
| colors | (color, shape) | one object |
| counting | (number, color, shape) | 2 to 4 objects alike |
| two_object | {shape, shape} | two objects of different shapes |
| position | (shape, relation, shape) | two objects of different shapes, one left of or above the other |
| color_attr | {(color, shape), (color, shape)} | two objects that differ |

Some keys belong to the test split, some to validation. A training scene has no key of either.
"""

import zlib
from collections.abc import Iterator

import numpy as np

from .world import BACKGROUNDS, COLORS, SHAPES, Scene, SceneObject, named_cells, relation

ARRANGEMENTS = ("free", "orderly", "placed")
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLITS = ("train", "validation", "test")
MAX_OBJECTS = 4
# Shares of scenes with one object, with some alike, with two that differ, with more that differ.
FAMILIES = (0.25, 0.27, 0.38, 0.10)
_TEST_SHARE, _VALIDATION_SHARE = 0.13, 0.07
# Share of large objects where places have names, by the number of objects.
_LARGE_SHARE = {1: 0.55, 2: 0.35, 3: 0.12, 4: 0.06}
# Kinds with few keys are split by hand, so that training still sees every shape and size in each place.
_CHOSEN = {
    ("single_object", "large star"): "test",
    ("single_object", "small diamond"): "test",
    ("single_object", "large triangle"): "validation",
    ("two_object", "circle cross"): "test",
    ("two_object", "square star"): "test",
    ("two_object", "diamond triangle"): "test",
    ("two_object", "diamond square"): "validation",
}

Key = tuple[str, str]


def split_of(key: Key) -> str:
    """The split that a combination belongs to."""
    category, _ = key
    if category in ("single_object", "two_object"):
        return _CHOSEN.get(key, "train")
    share = zlib.crc32(" ".join(key).encode()) / 2**32
    return "test" if share < _TEST_SHARE else "validation" if share < _TEST_SHARE + _VALIDATION_SHARE else "train"


def keys_of(scene: Scene) -> Iterator[Key]:
    """The combinations that a scene shows."""
    objects = scene.objects
    if len(objects) == 1:
        (own,) = objects
        yield "single_object", f"{own.size} {own.shape}"
        yield "colors", f"{own.color} {own.shape}"
        return
    if len({(own.color, own.shape) for own in objects}) == 1:
        yield "counting", f"{len(objects)} {objects[0].color} {objects[0].shape}"
    elif len(objects) == 2:
        a, b = objects
        yield "color_attr", " + ".join(sorted((f"{a.color} {a.shape}", f"{b.color} {b.shape}")))
        if a.shape != b.shape:
            yield "two_object", " ".join(sorted((a.shape, b.shape)))
            where = relation(a, b)
            if where is not None:
                yield position_key(a.shape, where, b.shape)


def position_key(first: str, where: str, second: str) -> Key:
    """A relation's key: the same for "A left of B" and "B right of A"."""
    if where in ("right of", "below"):
        first, second = second, first
        where = {"right of": "left of", "below": "above"}[where]
    return "position", f"{first} {where} {second}"


def is_trained(scene: Scene) -> bool:
    """Whether every combination of the scene belongs to the training split."""
    return all(split_of(key) == "train" for key in keys_of(scene))


def sample_scene(
    rng: np.random.Generator,
    split: str = "train",
    lattice: tuple[int, int] = (4, 4),
    arrangement: str = "free",
    families: tuple[float, ...] = FAMILIES,
) -> Scene:
    """Draw a scene of a split.

    Args:
        rng: Source of randomness.
        split: "train": no held-out combination; "validation" or "test": at least one of that split's.
        lattice: (rows, columns).
        arrangement: "free": objects lie anywhere with a free cell between them. "orderly": what there is decides where
            it lies, but for the axis of two that differ. The codes of one scale are drawn independently of each
            other, so a small model draws an orderly world long before it draws a free one. "placed": each lies at
            a place that has a name, so that a caption can say where (`captions.caption_with_places`).
        families: Shares of scenes with one object, with some alike, with two that differ, with more that differ. The
            first two have few combinations, which a model that sees them often learns by heart.

    Raises:
        ValueError: If there is no such split or arrangement, the shares do not sum to 1, or the lattice has fewer than
            3 x 3 cells.
    """
    if arrangement not in ARRANGEMENTS:
        raise ValueError(f"An arrangement is one of {ARRANGEMENTS}, got {arrangement!r}.")
    if split not in SPLITS:
        raise ValueError(f"A split is one of {SPLITS}, got {split!r}.")
    if min(lattice) < 3:
        raise ValueError(f"Scenes need a lattice of at least 3 x 3 cells, got {lattice}.")
    if len(families) != 4 or min(families) < 0 or abs(sum(families) - 1) > 1e-6:
        raise ValueError(f"`families` are four shares that sum to 1, got {families}.")
    while True:
        scene = _draw(rng, lattice, arrangement, families)
        splits = {split_of(key) for key in keys_of(scene)}
        if (splits <= {"train"}) if split == "train" else (split in splits):
            return scene


def place(
    rng: np.random.Generator, sizes: list[str], lattice: tuple[int, int] = (4, 4)
) -> list[tuple[int, int]] | None:
    """Random cells for objects of these sizes with a free cell between any two; `None` if this try found none."""
    taken: set[tuple[int, int]] = set()
    cells = []
    for size in sizes:
        span = 2 if size == "large" else 1
        free = [
            (row, column)
            for row in range(lattice[0] - span + 1)
            for column in range(lattice[1] - span + 1)
            if not taken & _covered(row, column, span)
        ]
        if not free:
            return None
        row, column = free[rng.integers(len(free))]
        cells.append((row, column))
        taken |= _covered(row, column, span, margin=1)
    return cells


def place_by_name(
    rng: np.random.Generator, sizes: list[str], lattice: tuple[int, int] = (4, 4)
) -> list[tuple[int, int]] | None:
    """Random places that have names, with a free cell between any two objects; `None` if this try found none."""
    taken: set[tuple[int, int]] = set()
    cells = []
    for size in sizes:
        named = list(named_cells(size, lattice))
        row, column = named[rng.integers(len(named))]
        span = 2 if size == "large" else 1
        if taken & _covered(row, column, span):
            return None
        cells.append((row, column))
        taken |= _covered(row, column, span, margin=1)
    return cells


def _covered(row: int, column: int, span: int, margin: int = 0) -> set[tuple[int, int]]:
    """Cells of an object that begins at (row, column), and those within `margin` of it."""
    reach = range(-margin, span + margin)
    return {(row + i, column + j) for i in reach for j in reach}


def arrange(
    rng: np.random.Generator, sizes: list[str], alike: bool, lattice: tuple[int, int] = (4, 4)
) -> list[tuple[int, int]]:
    """Where objects of these sizes lie in an orderly scene, in reading order.

    One lies in the middle; two side by side or, where they differ, one above the other; three and four in the quarters.
    Two that have no room one way lie the other.
    """
    spans = [2 if size == "large" else 1 for size in sizes]
    middles = [((lattice[0] - span) // 2, (lattice[1] - span) // 2) for span in spans]
    if len(sizes) == 1:
        return middles
    last_row, last_column = lattice[0] - spans[-1], lattice[1] - spans[-1]
    if len(sizes) > 2:
        return [(0, 0), (0, last_column), (last_row, 0), (last_row, last_column)][: len(sizes)]
    across, down = (cells > sum(spans) for cells in (lattice[1], lattice[0]))
    if (alike or rng.random() < 0.5 or not down) and across:
        return [(middles[0][0], 0), (middles[1][0], last_column)]
    return [(0, middles[0][1]), (last_row, middles[1][1])]


def orderly_scene(facts, rng: np.random.Generator, lattice: tuple[int, int] = (4, 4)) -> Scene:
    """An orderly scene of one group of objects alike, whose colour is known."""
    (group,) = facts.groups
    size = group.size or ("large" if group.count == 1 and rng.random() < 0.6 else "small")
    cells = arrange(rng, [size] * group.count, alike=True, lattice=lattice)
    background = facts.background or _pick(rng, tuple(BACKGROUNDS))
    return Scene(tuple(SceneObject(group.shape, group.color, size, cell) for cell in cells), background, lattice)


def draw_object(rng: np.random.Generator, size: str, lattice: tuple[int, int] = (4, 4)) -> SceneObject:
    """A random object of a size, at a place that has a name."""
    cells = list(named_cells(size, lattice))
    color, shape = _kind(rng)
    return SceneObject(shape, color, size, cells[rng.integers(len(cells))])


def _draw(rng: np.random.Generator, lattice: tuple[int, int], arrangement: str, families: tuple[float, ...]) -> Scene:
    while True:
        kinds, sizes = _draw_contents(rng, families)
        if arrangement == "placed":
            sizes = ["large" if rng.random() < _LARGE_SHARE[len(sizes)] else "small" for _ in sizes]
            cells = place_by_name(rng, sizes, lattice)
        elif arrangement == "orderly":
            # Objects alike lie next to each other in reading order; of two, either may be the large one.
            kinds = sorted(kinds, key=kinds.index)
            if len(kinds) == 2 and rng.random() < 0.5:
                kinds, sizes = kinds[::-1], sizes[::-1]
            cells = arrange(rng, sizes, alike=len(set(kinds)) == 1, lattice=lattice)
        else:
            cells = place(rng, sizes, lattice)
        if cells is not None:
            break
    objects = tuple(SceneObject(shape, color, size, cell) for (color, shape), size, cell in zip(kinds, sizes, cells))
    return Scene(objects, _pick(rng, tuple(BACKGROUNDS)), lattice)


def _draw_contents(rng: np.random.Generator, families: tuple[float, ...]) -> tuple[list[tuple[str, str]], list[str]]:
    """(color, shape) and size of each object. Large objects come first, where there is still room."""
    family = rng.choice(4, p=families)
    if family == 0:
        return [_kind(rng)], ["large" if rng.random() < 0.6 else "small"]
    if family == 1:
        number = int(rng.integers(2, MAX_OBJECTS + 1))
        return [_kind(rng)] * number, ["small"] * number
    number = 2 if family == 2 else int(rng.integers(3, MAX_OBJECTS + 1))
    while True:
        kinds = [_kind(rng) for _ in range(number)]
        if len(set(kinds)) > 1:
            break
    return kinds, [*(["large"] if number == 2 and rng.random() < 0.3 else ["small"]), *["small"] * (number - 1)]


def _kind(rng: np.random.Generator) -> tuple[str, str]:
    return _pick(rng, tuple(COLORS)), _pick(rng, SHAPES)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]
