"""Questions about scenes with one right answer each: what, which colour, how large, where, how many, whether.

A thing is asked about by words that fit it alone, and that do not give the answer away.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .captions import NUMBERS, PLURALS, RELATION_WORDS, Group, phrase
from .world import COLORS, PLACES, SHAPES, Scene, SceneObject, named_cells, relation

COUNTS = ("none", "one", *NUMBERS.values())
KINDS = ("what", "shape", "color", "size", "where", "count", "exists", "relation", "background")


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: One of `KINDS`.
        text: The question.
        answer: The right answer.
        about: The objects that the answer is found by looking at, in the question's or reading order; `None` where it
            is found by looking at the background.
    """

    kind: str
    text: str
    answer: str
    about: tuple[SceneObject, ...] | None = None


def ask(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Question | None:
    """A random question about a scene; `None` if it has no question of this kind.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind is None:
        kinds = list(rng.permutation(KINDS))
        return next(own for own in (_ASK[name](scene, rng) for name in kinds) if own is not None)
    if kind not in KINDS:
        raise ValueError(f"A question is of one of the kinds {KINDS}, got {kind!r}.")
    return _ASK[kind](scene, rng)


def ask_several(scene: Scene, rng: np.random.Generator, number: int, kinds: Sequence[str] = KINDS) -> list[Question]:
    """Up to `number` different questions about a scene, of `kinds` in random order.

    Raises:
        ValueError: If one of the kinds is not of `KINDS`.
    """
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"Questions are of some of the kinds {KINDS}, got {list(kinds)}.")
    found: dict[str, Question] = {}
    for turn in range(3 * number):
        if turn % len(kinds) == 0:
            shuffled = list(rng.permutation(kinds))
        own = _ASK[shuffled[turn % len(kinds)]](scene, rng)
        if own is not None:
            found.setdefault(own.text, own)
        if len(found) == number:
            break
    return list(found.values())


def refer(
    scene: Scene, own: SceneObject, rng: np.random.Generator | None = None, hidden: tuple[str, ...] = ()
) -> str | None:
    """Words that fit one object of a scene alone: "the red circle", "the large object".

    Args:
        scene: The scene.
        own: One of its objects.
        rng: Chooses among the shortest; without it, the shape is said before the colour, and that before the size.
        hidden: Of "size", "color" and "shape" what must not be said.

    Returns:
        `None` if no such words fit it alone.
    """
    told = [name for name in ("shape", "color", "size") if name not in hidden]
    for number in range(1, len(told) + 1):
        options = [names for names in combinations(told, number) if _fit(scene, own, names) == 1]
        if options:
            names = options[0 if rng is None else rng.integers(len(options))]
            words = [getattr(own, name) for name in ("size", "color") if name in names]
            return " ".join(("the", *words, own.shape if "shape" in names else "object"))
    return None


def _fit(scene: Scene, own: SceneObject, names: tuple[str, ...]) -> int:
    return sum(all(getattr(other, name) == getattr(own, name) for name in names) for other in scene.objects)


def in_reading_order(objects: Iterable[SceneObject]) -> tuple[SceneObject, ...]:
    """Objects from top to bottom, and from left to right."""
    return tuple(sorted(objects, key=lambda own: own.center))


def _one_of(scene: Scene, rng: np.random.Generator) -> SceneObject:
    return scene.objects[rng.integers(len(scene.objects))]


def _what(scene: Scene, rng: np.random.Generator) -> Question | None:
    own = _one_of(scene, rng)
    place = named_cells(own.size, scene.lattice).get(own.cell)
    others = [named_cells(other.size, scene.lattice).get(other.cell) for other in scene.objects if other is not own]
    if place is None or place in others:
        return None
    return Question("what", f"what is {PLACES[place]}?", phrase(Group(1, own.shape, own.color, own.size)), (own,))


def _attribute(name: str, wording: str) -> Callable:
    def question(scene: Scene, rng: np.random.Generator) -> Question | None:
        own = _one_of(scene, rng)
        words = "the object" if len(scene.objects) == 1 else refer(scene, own, rng, hidden=(name,))
        return None if words is None else Question(name, wording.format(words), getattr(own, name), (own,))

    return question


def _where(scene: Scene, rng: np.random.Generator) -> Question | None:
    own = _one_of(scene, rng)
    place = named_cells(own.size, scene.lattice).get(own.cell)
    words = refer(scene, own, rng)
    if place is None or words is None:
        return None
    return Question("where", f"where is {words}?", PLACES[place], (own,))


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    choice = rng.integers(4)
    own = _one_of(scene, rng)
    if choice == 0:
        return Question(
            "count", "how many objects are there?", COUNTS[len(scene.objects)], in_reading_order(scene.objects)
        )
    # Now and then of what is not there.
    color = own.color if rng.random() < 0.8 else tuple(COLORS)[rng.integers(len(COLORS))]
    shape = own.shape if rng.random() < 0.8 else SHAPES[rng.integers(len(SHAPES))]
    words, fits = {
        1: (f"{color} objects", lambda other: other.color == color),
        2: (PLURALS[shape], lambda other: other.shape == shape),
        3: (f"{color} {PLURALS[shape]}", lambda other: (other.color, other.shape) == (color, shape)),
    }[int(choice)]
    found = list(filter(fits, scene.objects))
    return Question("count", f"how many {words} are there?", COUNTS[len(found)], in_reading_order(found))


def _exists(scene: Scene, rng: np.random.Generator) -> Question:
    own = _one_of(scene, rng)
    there = {(other.color, other.shape) for other in scene.objects}
    kind = (own.color, own.shape)
    if rng.random() < 0.5:
        # What is not there mostly differs from something there in one thing alone.
        while kind in there:
            change = rng.integers(3)
            color = tuple(COLORS)[rng.integers(len(COLORS))] if change != 1 else own.color
            shape = SHAPES[rng.integers(len(SHAPES))] if change != 0 else own.shape
            kind = (color, shape)
    alike = in_reading_order(other for other in scene.objects if other.shape == kind[1])
    words = phrase(Group(1, kind[1], kind[0]))
    return Question("exists", f"is there {words}?", "yes" if kind in there else "no", alike)


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.objects) < 2:
        return None
    first, second = (scene.objects[place] for place in rng.permutation(len(scene.objects))[:2])
    where = relation(first, second)
    words = [refer(scene, own, rng) for own in (first, second)]
    if where is None or None in words:
        return None
    claimed, answer = where, "yes"
    if rng.random() < 0.5:
        # What is said to be false must be false along its own axis too.
        down, right = (a - b for a, b in zip(first.center, second.center))
        false = [
            name
            for name, offset in (("left of", -right), ("right of", right), ("above", -down), ("below", down))
            if offset <= 0
        ]
        claimed, answer = false[rng.integers(len(false))], "no"
    return Question("relation", f"is {words[0]} {RELATION_WORDS[claimed][0]} {words[1]}?", answer, (first, second))


def _background(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("background", "what color is the background?", scene.background)


_ASK: dict[str, Callable] = {
    "what": _what,
    "shape": _attribute("shape", "what shape is {}?"),
    "color": _attribute("color", "what color is {}?"),
    "size": _attribute("size", "what size is {}?"),
    "where": _where,
    "count": _count,
    "exists": _exists,
    "relation": _relation,
    "background": _background,
}
