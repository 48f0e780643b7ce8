"""A few pictures with text between: stories, instructions that build a picture step by step, and films.

A subject stays the same while the world around it changes, a picture grows object by object, or an object moves.
"""

import re
from dataclasses import dataclass, replace

import numpy as np

from .captions import NUMBER_WORDS, Group, parse, phrase
from .edits import has_room, to_place
from .sampling import SPLITS, draw_object, is_trained, keys_of, split_of
from .world import BACKGROUNDS, PLACES, Scene, SceneObject, cell_named, changed, named_cells

MAX_FRAMES, MAX_STEPS = 5, 3
_TIMES = {"white": "it is day", "gray": "it is evening", "black": "it is night"}
THE_END = "the end"


@dataclass(frozen=True)
class Story:
    """A story in pictures, instructions or a film.

    Attributes:
        prompt: What asks for it.
        texts: What is told before each picture.
        scenes: The pictures.
        subject: The object that is in all of them, as it is in the first; it changes its place alone.
        kind: One of `KINDS`.
    """

    prompt: str
    texts: tuple[str, ...]
    scenes: tuple[Scene, ...]
    subject: SceneObject
    kind: str = "story"

    def expected(self, texts: list[str]) -> list[Scene | None]:
        """What each picture must show where these texts were told: what they say, or the next frame of the film."""
        lattice = self.scenes[0].lattice
        if self.kind != "film":
            return replay(texts, lattice)
        return [*self.scenes[: len(texts)], *[None] * (len(texts) - len(self.scenes))]

    def keeps_subject(self, objects) -> bool:
        """Whether the subject is among objects (of a scene or of a referee's reading), wherever it lies."""
        wanted = (self.subject.shape, self.subject.color, self.subject.size)
        return any((own.shape, own.color, own.size) == wanted for own in objects)


def draw_story(
    rng: np.random.Generator,
    frames: int | None = None,
    lattice: tuple[int, int] = (4, 4),
    split: str = "train",
    kind: str = "story",
) -> Story:
    """A random story, instructions or a film of 2 to 5 frames.

    In training every frame shows trained combinations alone; in another split the first frame, the subject alone, is a
    combination of that split.

    Raises:
        ValueError: If the number of frames is none of 2 to `longest_of(kind, lattice)`, or there is no such split or
            kind.
    """
    if kind not in KINDS:
        raise ValueError(f"A story's kind is one of {tuple(KINDS)}, got {kind!r}.")
    if split not in SPLITS:
        raise ValueError(f"A split is one of {SPLITS}, got {split!r}.")
    longest = longest_of(kind, lattice)
    frames = int(rng.integers(2, longest + 1)) if frames is None else frames
    if not 2 <= frames <= longest:
        raise ValueError(f"A {kind} has 2 to {longest} frames, got {frames}.")
    while True:
        own = KINDS[kind](rng, frames, lattice)
        if own is None:
            continue
        if all(map(is_trained, own.scenes)) if split == "train" else split in map(split_of, keys_of(own.scenes[0])):
            return own


def longest_of(kind: str, lattice: tuple[int, int] = (4, 4)) -> int:
    """The most frames of a story of a kind: instructions put an object a step, a film moves by a cell at least."""
    return {"story": MAX_FRAMES, "instructions": MAX_STEPS, "film": min(MAX_FRAMES, max(lattice))}[kind]


def _subject(rng: np.random.Generator, lattice: tuple[int, int]) -> SceneObject:
    return draw_object(rng, "large" if rng.random() < 0.3 else "small", lattice)


def _name(own: SceneObject) -> str:
    return phrase(Group(1, own.shape, own.color, own.size))


def _told(rng: np.random.Generator, frames: int, lattice: tuple[int, int]) -> Story | None:
    """A story."""
    subject = _subject(rng, lattice)
    name = _name(subject)
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


def _instructed(rng: np.random.Generator, frames: int, lattice: tuple[int, int]) -> Story | None:
    """Instructions for a picture: one object a step."""
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    scene: Scene | None = Scene((), background, lattice)
    texts, scenes, words = [], [], []
    while len(scenes) < frames:
        own = draw_object(rng, "small", lattice) if scenes else _subject(rng, lattice)
        if (own.shape, own.color) in {(each.shape, each.color) for each in scene.objects}:
            return None
        scene = _with(scene, objects=(*scene.objects, own))
        if scene is None:
            return None
        words.append(f"{_name(own)} {PLACES[named_cells(own.size, lattice)[own.cell]]}")
        paper = "" if scenes else f"on a {background} background "
        texts.append(f"step {NUMBER_WORDS[len(scenes) + 1]}: {paper}put {words[-1]}.")
        scenes.append(scene)
    listed = f"{', '.join(words[:-1])} and {words[-1]}"
    prompt = f"show step by step how to make {listed} on a {background} background"
    return Story(prompt, tuple(texts), tuple(scenes), scene.objects[0], "instructions")


def _filmed(rng: np.random.Generator, frames: int, lattice: tuple[int, int]) -> Story | None:
    """A film of an object that goes from one named place to another on a straight line, as evenly as cells allow."""
    subject = _subject(rng, lattice)
    cells = named_cells(subject.size, lattice)
    end = tuple(cells)[rng.integers(len(cells))]
    if max(abs(a - b) for a, b in zip(subject.cell, end)) < frames - 1:
        # It would stand still for a while.
        return None
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    path = np.floor(np.linspace(subject.cell, end, frames) + 0.5).astype(int).tolist()
    scenes = tuple(Scene((replace(subject, cell=tuple(cell)),), background, lattice) for cell in path)
    way = f"from the {cells[subject.cell]} to the {cells[end]}"
    prompt = f"film {_name(subject)} going {way} on a {background} background in {NUMBER_WORDS[frames]} pictures"
    texts = tuple(f"second {NUMBER_WORDS[number]}." for number in range(1, frames + 1))
    return Story(prompt, texts, scenes, subject, "film")


KINDS = {"story": _told, "instructions": _instructed, "film": _filmed}


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
_PUT = re.compile(rf"step \w+: (?:on a (\w+) background )?put (an? .+?) ({'|'.join(PLACES.values())})")
_GOES = re.compile(rf"the (\w+) (\w+) goes to the ({'|'.join(PLACES)})")
_LEAVES = re.compile(r"the (\w+) (\w+) leaves")
_BACKGROUND_OF = {words.removeprefix("it is "): name for name, words in _TIMES.items()}
_PLACE_OF = {words: name for name, words in PLACES.items()}


def replay(texts: list[str], lattice: tuple[int, int] = (4, 4)) -> list[Scene | None]:
    """What each picture of a story or of instructions must show by the texts told until then.

    `None` from where they make no sense.
    """
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
        if found := _PUT.fullmatch(sentence):
            paper, words, place = found.groups()
            if paper is not None and paper not in BACKGROUNDS:
                return None
            return _add(scene if paper is None else replace(scene, background=paper), words, place)
        if found := _COMES.fullmatch(sentence):
            return _add(scene, *found.groups())
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


def _add(scene: Scene, words: str, place: str) -> Scene:
    (group,) = parse(words).groups
    cell = cell_named(_PLACE_OF[place], group.size, scene.lattice)
    return replace(scene, objects=(*scene.objects, SceneObject(group.shape, group.color, group.size, cell)))
