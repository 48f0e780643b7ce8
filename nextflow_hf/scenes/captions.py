"""What can be said of a scene: prompts in varied English, one canonical description, and the way back to facts.

Every caption accounts for all objects and says nothing false; it may leave out colours, sizes, the background and
where things lie. Where things lie is said of one as seen from the other ("left of"), or of each in the picture ("at the
top left").
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from .world import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Scene, SceneObject, named_cells, relation

NOTHING = "nothing"
NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
# Those that a group of objects may have.
NUMBERS = {number: NUMBER_WORDS[number] for number in (2, 3, 4)}
PLURALS = {shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
OPENINGS = ("a picture of ", "draw ", "show me ", "an image with ")


@dataclass(frozen=True)
class Group:
    """Objects alike: how many, and what is said of each; `None` where nothing is said.

    Raises:
        ValueError: If this world has no words for it.
    """

    count: int
    shape: str
    color: str | None = None
    size: str | None = None
    place: str | None = None

    def __post_init__(self):
        if self.place is not None and self.count != 1:
            raise ValueError(f"A place is said of one object, not of {self.count}.")
        if self.count != 1 and self.count not in NUMBERS:
            raise ValueError(f"A group has 1 to {max(NUMBERS)} objects, got {self.count!r}.")
        for name, value, known in (
            ("shape", self.shape, SHAPES),
            ("color", self.color, (None, *COLORS)),
            ("size", self.size, (None, *SIZES)),
            ("place", self.place, (None, *PLACES)),
        ):
            if value not in known:
                raise ValueError(f"A group's {name} must be one of {tuple(known)}, got {value!r}.")

    def fits(self, own, lattice: tuple[int, int]) -> bool:
        """Whether an object (with `shape`, `color`, `size`, `cell`) of a scene with this lattice is one of these."""
        return (
            own.shape == self.shape
            and self.color in (None, own.color)
            and self.size in (None, own.size)
            and self.place in (None, named_cells(own.size, lattice).get(own.cell))
        )


@dataclass(frozen=True)
class Facts:
    """What a caption claims: these objects and no others.

    Attributes:
        groups: The objects.
        relation: Where the first of two groups lies as seen from the second, or `None`.
        background: The background, or `None`.

    Raises:
        ValueError: If the relation or the background is unknown, or a relation is claimed of other than two objects.
    """

    groups: tuple[Group, ...]
    relation: str | None = None
    background: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "groups", tuple(self.groups))
        if self.background not in (None, *BACKGROUNDS):
            raise ValueError(f"A background must be one of {tuple(BACKGROUNDS)}, got {self.background!r}.")
        if self.relation not in (None, *RELATION_WORDS):
            raise ValueError(f"A relation must be one of {tuple(RELATION_WORDS)}, got {self.relation!r}.")
        if self.relation is not None and [group.count for group in self.groups] != [1, 1]:
            raise ValueError(f"A relation holds between two groups of one object, got {self.groups}.")

    @property
    def count(self) -> int:
        """Number of objects."""
        return sum(group.count for group in self.groups)


def phrase(group: Group, digits: bool = False) -> str:
    """A group as words: "a small red circle", "three stars", "a star at the top"."""
    words = [word for word in (group.size, group.color) if word]
    if group.count == 1:
        words.append(group.shape)
        article = "an" if words[0][0] in "aeiou" else "a"
        words += [PLACES[group.place]] if group.place else []
        return " ".join((article, *words))
    number = str(group.count) if digits else NUMBERS[group.count]
    return " ".join((number, *words, PLURALS[group.shape]))


def words_of(facts: Facts, relation_words: str | None = None, digits: bool = False) -> str:
    """Facts as a sentence without an opening."""
    phrases = [phrase(group, digits) for group in facts.groups]
    if facts.relation is not None:
        text = f"{phrases[0]} {relation_words or RELATION_WORDS[facts.relation][0]} {phrases[1]}"
    elif len(phrases) == 1:
        text = phrases[0]
    else:
        text = f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return text if facts.background is None else f"{text} on a {facts.background} background"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Words that ask for a scene, different from call to call.

    Objects are named in the scene's order, but two whose relation is told in either; one above another is always told.
    """
    groups, where, background = _claims(scene, rng)
    wording = None if where is None else RELATION_WORDS[where][rng.integers(len(RELATION_WORDS[where]))]
    return _opening(rng) + words_of(Facts(groups, where, background), wording, digits=rng.random() < 0.15)


def caption_with_places(scene: Scene, rng: np.random.Generator) -> str:
    """Words that ask for a scene and say where in the picture each object lies, different from call to call.

    Raises:
        ValueError: If an object lies where no place has a name.
    """
    show_color, show_size = rng.random() < 0.85, rng.random() < 0.4 or any(own.span > 1 for own in scene.objects)
    groups = []
    for own in scene.objects:
        place = named_cells(own.size, scene.lattice).get(own.cell)
        if place is None:
            raise ValueError(f"There is no name for the place of {own} in a lattice of {scene.lattice}.")
        groups.append(Group(1, own.shape, own.color if show_color else None, own.size if show_size else None, place))
    background = scene.background if rng.random() < 0.3 else None
    return _opening(rng) + words_of(Facts(tuple(groups), None, background))


def tell_all(scene: Scene) -> str:
    """Words for everything about a scene: objects in reading order, sizes, colours, the places that have names, the
    background."""
    groups = tuple(_whole(own, scene) for own in sorted(scene.objects, key=lambda own: own.center))
    return words_of(Facts(groups, None, scene.background))


def tell_objects(objects: Iterable[SceneObject], scene: Scene) -> str:
    """Objects of a scene as [`tell_all`] names them, in the order given; "nothing" for none."""
    return ", ".join(phrase(_whole(own, scene)) for own in objects) or NOTHING


def _whole(own: SceneObject, scene: Scene) -> Group:
    return Group(1, own.shape, own.color, own.size, named_cells(own.size, scene.lattice).get(own.cell))


def _opening(rng: np.random.Generator) -> str:
    return OPENINGS[rng.integers(len(OPENINGS))] if rng.random() < 0.4 else ""


def _claims(scene: Scene, rng: np.random.Generator) -> tuple[tuple[Group, ...], str | None, str | None]:
    """Groups, relation and background that a caption tells."""
    objects = list(scene.objects)
    show_color = rng.random() < 0.75
    kinds = Counter((own.shape, own.color) for own in objects)
    background = scene.background if rng.random() < 0.3 else None
    where = None
    if len(kinds) == 1:
        own = objects[0]
        size = own.size if len(objects) == 1 and rng.random() < 0.8 else None
        groups = [Group(len(objects), own.shape, own.color if show_color else None, size)]
    elif len(objects) == 2:
        where = relation(*objects)
        if where in ("left of", "right of") and rng.random() < 0.5:
            where = None
        if where is not None and rng.random() < 0.5:
            objects, where = objects[::-1], opposite(where)
        a, b = objects
        show_size = a.size != b.size and rng.random() < 0.6
        # Two objects of one shape are told apart by their colours.
        show_color = show_color or a.shape == b.shape
        groups = [
            Group(1, own.shape, own.color if show_color else None, own.size if show_size else None) for own in (a, b)
        ]
    else:
        groups = [Group(count, shape, color) for (shape, color), count in kinds.items()]
    return tuple(groups), where, background


def describe(scene: Scene) -> str:
    """The one complete description of a scene: objects in reading order, sizes, colours, relation, background."""
    objects = sorted(scene.objects, key=lambda own: own.center)
    kinds = Counter((own.shape, own.color, own.size) for own in objects)
    groups = tuple(Group(count, *kind) for kind, count in kinds.items())
    where = relation(*objects) if len(objects) == 2 and len(groups) == 2 else None
    return words_of(Facts(groups, where, scene.background))


_NUMBER_OF = {"a": 1, "an": 1, **{word: number for number, word in NUMBERS.items()}, **{str(n): n for n in NUMBERS}}
_SHAPE_OF = {**{shape: shape for shape in SHAPES}, **{plural: shape for shape, plural in PLURALS.items()}}
_PHRASE = (
    rf"(?P<number{{0}}>{'|'.join(_NUMBER_OF)})(?: (?P<size{{0}}>{'|'.join(SIZES)}))?"
    rf"(?: (?P<color{{0}}>{'|'.join(COLORS)}))? (?P<shape{{0}}>{'|'.join(_SHAPE_OF)})"
    rf"(?: (?P<place{{0}}>{'|'.join(PLACES.values())}))?"
)
_PLACE_OF = {words: place for place, words in PLACES.items()}
_WHERE_OF = {wording: where for where, wordings in RELATION_WORDS.items() for wording in wordings}
_CAPTION = re.compile(
    rf"^(?:{'|'.join(OPENINGS)})?(?P<body>.+?)(?: on a (?P<background>{'|'.join(BACKGROUNDS)}) background)?$"
)
_RELATED = re.compile(rf"^{_PHRASE.format(1)} (?P<where>{'|'.join(_WHERE_OF)}) {_PHRASE.format(2)}$")
_ONE = re.compile(rf"^{_PHRASE.format(1)}$")


def parse(text: str) -> Facts | None:
    """A caption's facts; `None` if it is not a sentence of this world."""
    whole = _CAPTION.match(text.strip().lower().removesuffix("."))
    if whole is None:
        return None
    related = _RELATED.match(whole["body"])
    if related is not None:
        groups = (_group(related, 1), _group(related, 2))
        if any(group.count != 1 for group in groups):
            return None
        return Facts(groups, _WHERE_OF[related["where"]], whole["background"])
    phrases = [_ONE.match(part) for part in re.split(r", | and ", whole["body"])]
    if any(part is None or (part["place1"] and _NUMBER_OF[part["number1"]] > 1) for part in phrases):
        return None
    return Facts(tuple(_group(part, 1) for part in phrases), None, whole["background"])


def _group(match: re.Match, index: int) -> Group:
    return Group(
        _NUMBER_OF[match[f"number{index}"]],
        _SHAPE_OF[match[f"shape{index}"]],
        match[f"color{index}"],
        match[f"size{index}"],
        _PLACE_OF.get(match[f"place{index}"]),
    )


def facts_match(facts: Facts, scene) -> bool:
    """Whether a scene (or a referee's reading of a picture) shows exactly what the facts claim."""
    objects = scene.objects
    if facts.background not in (None, scene.background) or facts.count != len(objects):
        return False
    if facts.relation is not None:
        first, second = facts.groups
        return any(
            first.fits(a, scene.lattice) and second.fits(b, scene.lattice) and relation(a, b) == facts.relation
            for a, b in permutations(objects)
        )
    wanted = [group for group in facts.groups for _ in range(group.count)]
    taken_by: dict[int, int] = {}

    def find(index: int, tried: set[int]) -> bool:
        """Give claim `index` an object; whoever holds it moves to another (augmenting paths)."""
        for place, own in enumerate(objects):
            if place not in tried and wanted[index].fits(own, scene.lattice):
                tried.add(place)
                if place not in taken_by or find(taken_by[place], tried):
                    taken_by[place] = index
                    return True
        return False

    return all(find(index, set()) for index in range(len(wanted)))


def is_complete(facts: Facts) -> bool:
    """Whether the facts state every object's colour and size, and the background."""
    return facts.background is not None and all(group.color and group.size for group in facts.groups)


def opposite(where: str) -> str:
    """The relation seen from the other object."""
    return _OPPOSITE[where]
