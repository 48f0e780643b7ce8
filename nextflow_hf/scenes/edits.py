"""Changes of scenes: single edits with the words that ask for them, and rules that examples can show.

An edit changes one thing and leaves everything else in its place, so that what must stay is as well known as what must
change.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .captions import Group, phrase, tell_objects
from .questions import refer
from .sampling import draw_object, is_trained
from .world import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    cell_named,
    changed,
    named_cells,
)

KINDS = ("recolor", "reshape", "resize", "move", "remove", "add", "background")
MAX_OBJECTS = 4
_TRIES = 60


@dataclass(frozen=True)
class Edit:
    """A change of a scene.

    Attributes:
        kind: One of `KINDS`.
        text: The instruction.
        change: What is different afterwards, in the one wording that is right.
        before: The scene.
        after: The changed scene.
    """

    kind: str
    text: str
    change: str
    before: Scene
    after: Scene

    @property
    def kept(self) -> tuple[SceneObject, ...]:
        """Objects that the edit leaves alone."""
        return tuple(own for own in self.before.objects if own in self.after.objects)

    @property
    def made(self) -> tuple[SceneObject, ...]:
        """Objects that are there only afterwards."""
        return tuple(own for own in self.after.objects if own not in self.before.objects)

    @property
    def step(self) -> str:
        """The change with all that is to know about what changed: "a small red star on the left became a small blue
        star on the left"."""
        gone = tell_objects((own for own in self.before.objects if own not in self.after.objects), self.before)
        made = tell_objects(self.made, self.after)
        if self.kind == "background":
            return self.change
        if self.kind == "remove":
            return f"{gone} is gone"
        return f"{made} came" if self.kind == "add" else f"{gone} became {made}"


def draw_edit(scene: Scene, rng: np.random.Generator, kind: str | None = None, trained: bool = True) -> Edit | None:
    """A random edit of a scene; `None` where none of the kind was found.

    Args:
        scene: What to change.
        rng: Source of randomness.
        kind: One of `KINDS`; any by default.
        trained: Whether the changed scene may only show combinations of the training split.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"An edit is of one of the kinds {KINDS}, got {kind!r}.")
    for _ in range(_TRIES):
        name = kind or KINDS[rng.integers(len(KINDS))]
        found = _EDITS[name](scene, rng)
        if found is None or found[2] is None:
            continue
        text, change, after = found
        if not same_picture(after, scene) and has_room(after) and (not trained or is_trained(after)):
            return Edit(name, text, change, scene, after)
    return None


def draw_edits(scene: Scene, rng: np.random.Generator, number: int, trained: bool = True) -> list[Edit]:
    """Up to `number` edits, each of what the last one left."""
    edits: list[Edit] = []
    for _ in range(number):
        own = draw_edit(scene, rng, trained=trained)
        if own is None:
            break
        edits.append(own)
        scene = own.after
    return edits


def has_room(scene: Scene) -> bool:
    """Whether no two objects touch: between any two there is a free cell."""
    around = [
        {(row + i, column + j) for row, column in own.cells for i in (-1, 0, 1) for j in (-1, 0, 1)}
        for own in scene.objects
    ]
    return all(not around[i] & own.cells for i in range(len(around)) for own in scene.objects[i + 1 :])


def same_picture(first: Scene, second: Scene) -> bool:
    """Whether two scenes look the same, in whatever order their objects are."""
    return first.background == second.background and set(first.objects) == set(second.objects)


def _changed(scene: Scene, own: SceneObject, **changes) -> Scene | None:
    """The scene with one object changed; `None` if it does not fit."""
    new = replace(own, **changes)
    return changed(scene, objects=tuple(new if other is own else other for other in scene.objects))


def _target(
    scene: Scene, rng: np.random.Generator, hidden: tuple[str, ...] = ()
) -> tuple[SceneObject, str, str] | None:
    """An object, words that ask for it, and the words by which a change of it is always told."""
    own = scene.objects[rng.integers(len(scene.objects))]
    words = refer(scene, own, rng, hidden)
    return None if words is None else (own, words, refer(scene, own, hidden=hidden))


def _other(options: tuple[str, ...], current: str, rng: np.random.Generator) -> str:
    left = [option for option in options if option != current]
    return left[rng.integers(len(left))]


def _recolor(scene: Scene, rng: np.random.Generator):
    target = _target(scene, rng)
    if target is None:
        return None
    own, words, name = target
    color = _other(tuple(COLORS), own.color, rng)
    after = _changed(scene, own, color=color)
    return f"make {words} {color}", f"{name} became {color}", after


def _reshape(scene: Scene, rng: np.random.Generator):
    target = _target(scene, rng)
    if target is None:
        return None
    own, words, name = target
    shape = _other(SHAPES, own.shape, rng)
    return f"turn {words} into a {shape}", f"{name} became a {shape}", _changed(scene, own, shape=shape)


def _resize(scene: Scene, rng: np.random.Generator):
    target = _target(scene, rng, hidden=("size",))
    if target is None:
        return None
    own, words, name = target
    size = _other(SIZES, own.size, rng)
    # It keeps its named place, where it has one in the new size as well.
    cell = cell_named(named_cells(own.size, scene.lattice).get(own.cell), size, scene.lattice)
    if cell is None:
        return None
    after = _changed(scene, own, size=size, cell=cell)
    return None if after is None else (f"make {words} {size}", f"{name} became {size}", after)


def _move(scene: Scene, rng: np.random.Generator):
    target = _target(scene, rng)
    if target is None:
        return None
    own, words, name = target
    places = list(named_cells(own.size, scene.lattice).items())
    cell, place = places[rng.integers(len(places))]
    after = _changed(scene, own, cell=cell)
    if after is None:
        return None
    return f"move {words} {to_place(place)}", f"{name} moved {to_place(place)}", after


def _remove(scene: Scene, rng: np.random.Generator):
    target = _target(scene, rng)
    if target is None or len(scene.objects) == 1:
        return None
    own, words, name = target
    left = tuple(other for other in scene.objects if other is not own)
    return f"remove {words}", f"{name} is gone", replace(scene, objects=left)


def _add(scene: Scene, rng: np.random.Generator):
    if len(scene.objects) == MAX_OBJECTS:
        return None
    own = draw_object(rng, "small" if rng.random() < 0.7 else "large", scene.lattice)
    where = PLACES[named_cells(own.size, scene.lattice)[own.cell]]
    words = phrase(Group(1, own.shape, own.color, own.size))
    after = changed(scene, objects=(*scene.objects, own))
    return f"add {words} {where}", f"{words} came {where}", after


def _background(scene: Scene, rng: np.random.Generator):
    background = _other(tuple(BACKGROUNDS), scene.background, rng)
    after = replace(scene, background=background)
    return f"make the background {background}", f"the background became {background}", after


def to_place(place: str) -> str:
    """Where something goes: "to the top left"."""
    return f"to the {place}"


_EDITS: dict[str, Callable] = {
    "recolor": _recolor,
    "reshape": _reshape,
    "resize": _resize,
    "move": _move,
    "remove": _remove,
    "add": _add,
    "background": _background,
}


# ---- rules that examples show ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """The same change for every scene, however many objects it has.

    Attributes:
        kind: "color", "shape" or "background": what becomes `value` everywhere; or "mirror": left and right change.
        value: The colour, shape or background.
    """

    kind: str
    value: str | None = None

    @property
    def words(self) -> str:
        """The rule, told: "everything becomes red"."""
        if self.kind == "mirror":
            return "left and right change sides"
        what = "the background" if self.kind == "background" else "everything"
        return f"{what} becomes {phrase(Group(1, self.value)) if self.kind == 'shape' else self.value}"

    def __call__(self, scene: Scene) -> Scene:
        """The changed scene."""
        if self.kind == "background":
            return replace(scene, background=self.value)
        if self.kind == "mirror":
            columns = scene.lattice[1]
            mirrored = (replace(own, cell=(own.cell[0], columns - own.span - own.cell[1])) for own in scene.objects)
            return replace(scene, objects=tuple(mirrored))
        return replace(scene, objects=tuple(replace(own, **{self.kind: self.value}) for own in scene.objects))


def draw_rule(rng: np.random.Generator) -> Rule:
    """A random rule."""
    options = {"color": tuple(COLORS), "shape": SHAPES, "background": tuple(BACKGROUNDS), "mirror": (None,)}
    kind = tuple(options)[rng.integers(len(options))]
    return Rule(kind, options[kind][rng.integers(len(options[kind]))])
