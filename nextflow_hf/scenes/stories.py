"""Stories of a few pictures with text between: a subject that stays the same while the world around it changes."""

import re
from dataclasses import dataclass, replace

import numpy as np

from .captions import NUMBER_WORDS, Group, parse, phrase
from .edits import has_room, to_place
from .sampling import SPLITS, draw_object, is_trained, keys_of, split_of
from .world import BACKGROUNDS, PLACES, Scene, SceneObject, cell_named, changed, named_cells

MAX_FRAMES = 5
_TIMES = {"white": "it is day", "gray": "it is evening", "black": "it is night"}
THE_END = "the end"


@dataclass(frozen=True)
class Story:
    """A story in pictures.

    Attributes:
        prompt: What asks for it.
        texts: What is told before each picture.
        scenes: The pictures.
        subject: The object that is in all of them, as it is in the first; it changes its place alone.
    """

    prompt: str
    texts: tuple[str, ...]
    scenes: tuple[Scene, ...]
    subject: SceneObject

    def keeps_subject(self, objects) -> bool:
        """Whether the subject is among objects (of a scene or of a referee's reading), wherever it lies."""
        wanted = (self.subject.shape, self.subject.color, self.subject.size)
        return any((own.shape, own.color, own.size) == wanted for own in objects)


def draw_story(
    rng: np.random.Generator, frames: int | None = None, lattice: tuple[int, int] = (4, 4), split: str = "train"
) -> Story:
    """A random story of 2 to 5 frames.

    In training every frame shows trained combinations alone; in another split the first frame, the subject alone, is a
    combination of that split.

    Raises:
        ValueError: If the number of frames is none of 2 to 5, or there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"A split is one of {SPLITS}, got {split!r}.")
    frames = int(rng.integers(2, MAX_FRAMES + 1)) if frames is None else frames
    if not 2 <= frames <= MAX_FRAMES:
        raise ValueError(f"A story has 2 to {MAX_FRAMES} frames, got {frames}.")
    while True:
        own = _draw(rng, frames, lattice)
        if own is None:
            continue
        if all(map(is_trained, own.scenes)) if split == "train" else split in map(split_of, keys_of(own.scenes[0])):
            return own


def _draw(rng: np.random.Generator, frames: int, lattice: tuple[int, int]) -> Story | None:
    subject = draw_object(rng, "large" if rng.random() < 0.3 else "small", lattice)
    name = phrase(Group(1, subject.shape, subject.color, subject.size))
    the = f"the {subject.color} {subject.shape}"
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    scene = Scene((subject,), background, lattice)
    place = named_cells(subject.size, lattice)[subject.cell]
    texts, scenes = [f"{_TIMES[background]}. {name} is {PLACES[place]}."], [scene]
    while len(scenes) < frames:
        step = _STEPS[rng.integers(len(_STEPS))](rng, scene, the)
        if step is None:
            return None
        text, scene = step
        texts.append(text)
        scenes.append(scene)
    return Story(f"tell a story of {name} in {NUMBER_WORDS[frames]} pictures", tuple(texts), tuple(scenes), subject)


def _with(scene: Scene, **changes) -> Scene | None:
    after = changed(scene, **changes)
    return after if after is not None and after != scene and has_room(after) else None


def _go(rng: np.random.Generator, scene: Scene, the: str) -> tuple[str, Scene] | None:
    """The subject goes somewhere."""
    subject, *others = scene.objects
    cells = list(named_cells(subject.size, scene.lattice).items())
    cell, place = cells[rng.integers(len(cells))]
    after = _with(scene, objects=(replace(subject, cell=cell), *others))
    return None if after is None else (f"{the} goes {to_place(place)}.", after)


def _come(rng: np.random.Generator, scene: Scene, the: str) -> tuple[str, Scene] | None:
    """Somebody comes."""
    if len(scene.objects) == 3:
        return None
    own = draw_object(rng, "small", scene.lattice)
    if (own.shape, own.color) in {(each.shape, each.color) for each in scene.objects}:
        return None
    after = _with(scene, objects=(*scene.objects, own))
    place = named_cells(own.size, scene.lattice)[own.cell]
    words = phrase(Group(1, own.shape, own.color, own.size))
    return None if after is None else (f"{words} comes {PLACES[place]}.", after)


def _leave(rng: np.random.Generator, scene: Scene, the: str) -> tuple[str, Scene] | None:
    """Somebody leaves."""
    subject, *others = scene.objects
    if not others:
        return None
    gone = others[rng.integers(len(others))]
    left = [own for own in others if own is not gone]
    after = _with(scene, objects=(subject, *left))
    return None if after is None else (f"the {gone.color} {gone.shape} leaves.", after)


def _turn(rng: np.random.Generator, scene: Scene, the: str) -> tuple[str, Scene] | None:
    """It becomes day, evening or night."""
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    after = _with(scene, background=background)
    return None if after is None else (f"{_TIMES[background].replace('is', 'becomes')}.", after)


_STEPS = (_go, _go, _come, _leave, _turn)


# ---- reading a story back --------------------------------------------------------------------------------------------

_TIME = re.compile(r"it (?:is|becomes) (day|evening|night)")
_COMES = re.compile(rf"(an? .+?) (?:is|comes) ({'|'.join(PLACES.values())})")
_GOES = re.compile(rf"the (\w+) (\w+) goes to the ({'|'.join(PLACES)})")
_LEAVES = re.compile(r"the (\w+) (\w+) leaves")
_BACKGROUND_OF = {words.removeprefix("it is "): name for name, words in _TIMES.items()}
_PLACE_OF = {words: name for name, words in PLACES.items()}


def replay(texts: list[str], lattice: tuple[int, int] = (4, 4)) -> list[Scene | None]:
    """What each picture of a story must show by the texts told until then; `None` from where they make no sense."""
    scenes: list[Scene | None] = []
    scene: Scene | None = Scene((), "white", lattice)
    for text in texts:
        for sentence in text.strip().removesuffix(".").split(". "):
            scene = None if scene is None else _apply(scene, sentence)
        scenes.append(scene)
    return scenes


def _apply(scene: Scene, sentence: str) -> Scene | None:
    try:
        if found := _TIME.fullmatch(sentence):
            return replace(scene, background=_BACKGROUND_OF[found[1]])
        if found := _COMES.fullmatch(sentence):
            (group,) = parse(found[1]).groups
            cell = cell_named(_PLACE_OF[found[2]], group.size, scene.lattice)
            return replace(scene, objects=(*scene.objects, SceneObject(group.shape, group.color, group.size, cell)))
        if found := _GOES.fullmatch(sentence) or _LEAVES.fullmatch(sentence):
            (own,) = (each for each in scene.objects if (each.color, each.shape) == (found[1], found[2]))
            others = tuple(each for each in scene.objects if each is not own)
            if found.re is _LEAVES:
                return replace(scene, objects=others)
            return replace(scene, objects=(replace(own, cell=cell_named(found[3], own.size, scene.lattice)), *others))
    except (ValueError, AttributeError, KeyError, TypeError):
        # No such object, two of them, no room, or words for nothing of this world.
        return None
    return None
