"""Conversations about scenes: records for extraction and training, one task after another.

Every record is of kind `messages` (`docs/data.md`), so that one dataset class serves all tasks. Where pictures are
given, `thinks` is the share of records that first think: they write down what the answer rests on (the objects that are
meant, what becomes of which, the rule that examples show), and then answer or draw.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature

import numpy as np

from ..conversations import in_words
from ..processing.processing_nextflow import THINK_CLOSING, THINK_OPENING
from .captions import NOTHING, Group, caption, caption_with_places, describe, phrase, tell_all, tell_objects
from .edits import draw_edit, draw_edits, draw_rule, same_picture
from .questions import KINDS, Question, ask_several, in_reading_order
from .renaming import rename
from .riddles import draw_riddle
from .sampling import FAMILIES, is_trained, orderly_scene, sample_scene
from .signs import draw_sign, render_sign, transcript, words_of_sign
from .source import QUESTION, READ_QUESTION, WHOLE_QUESTION
from .stories import THE_END, draw_story, longest_of
from .world import BACKGROUNDS, PLACES, Scene, lattice_for, named_cells, render

COMPARE_QUESTION = "what changed?"
EXAMPLE_PROMPT = "do the same"
SUBJECT_PROMPT = "this object"
# A place for a picture among the parts of a turn.
IMAGE = object()


class TaskRecords:
    """Records of one task.

    Args:
        task: A name of `TASKS`.
        size: (height, width) in pixels, or a list of sizes that take turns; signs have their own.
        num_records: How many.
        seed: Different seeds give different records.
        arrangement: How scenes are arranged; see `sample_scene`.
        families: Shares of the kinds of scenes; see `sample_scene`.
        told: Share of the records that are in words alone, as `conversations.in_words` makes them: descriptions with
            everything in the place of pictures.
        renamed: Share of these in which colours or shapes have other names; see `rename`.
        options: What only this task knows; see the functions of this module.

    Raises:
        ValueError: If there is no such task, it does not know an option, or its pictures are not told in words.
    """

    def __init__(
        self,
        task: str,
        size: tuple[int, int] | list[tuple[int, int]] = (64, 64),
        num_records: int = 10_000,
        seed: int = 0,
        arrangement: str = "placed",
        families: tuple[float, ...] = FAMILIES,
        told: float = 0.0,
        renamed: float = 0.0,
        **options,
    ):
        if task not in TASKS:
            raise ValueError(f"A task is one of {sorted(TASKS)}, got {task!r}.")
        known = list(signature(TASKS[task]).parameters)[3:]
        if set(options) - set(known):
            raise ValueError(f"The task {task!r} has the options {known}, not {sorted(set(options) - set(known))}.")
        if told and task == "sign":
            raise ValueError("Pictures of words are not told in words; leave `told` out.")
        self.task, self.num_records, self.seed = task, num_records, seed
        self.told, self.renamed = told, renamed
        self.sizes = tuple(map(tuple, np.atleast_2d(size).tolist()))
        self.arrangement, self.families, self.options = arrangement, tuple(families), options

    def __len__(self) -> int:
        return self.num_records

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.num_records:
            raise IndexError(f"There are {self.num_records} records, got number {index}.")
        rng = np.random.default_rng((self.seed, index))
        size = self.sizes[index % len(self.sizes)]

        def scene() -> Scene:
            return sample_scene(rng, "train", lattice_for(size), self.arrangement, self.families)

        while True:
            record = TASKS[self.task](rng, scene, size, **self.options)
            if record is not None:
                messages, shown = record
                if _chosen(rng, self.told):
                    # In words every turn is learned, those that were only looked at, too.
                    turns = [{name: own for name, own in turn.items() if name != "weight"} for turn in messages]
                    messages, shown = in_words(turns, map(tell_all, shown)), []
                    if _chosen(rng, self.renamed):
                        messages = rename(messages, rng)
                images = [render(own, size) if isinstance(own, Scene) else own for own in shown]
                return {"id": f"{self.task} {self.seed}.{index}", "messages": messages, "images": images}


def user(*parts) -> dict:
    """A user's turn of texts and places for pictures (`IMAGE`)."""
    return {"role": "user", "content": [_part(own) for own in parts]}


def assistant(*parts, **more) -> dict:
    """An assistant's turn."""
    return {"role": "assistant", "content": [_part(own) for own in parts], **more}


def _part(own) -> dict:
    return {"type": "image"} if own is IMAGE else {"type": "text", "text": own}


def _draw(rng, scene, size, wordings: int = 6, places: bool = True):
    """A prompt in several wordings, and the picture. `places`: whether the prompt says where things lie."""
    own = scene()
    tell = caption_with_places if places else caption
    return [user([tell(own, rng) for _ in range(wordings)]), assistant(IMAGE)], [own]


def _ask(rng, scene, size, questions: int = 5, describes: float = 0.5, thinks: float = 0.0, kinds: Sequence = KINDS):
    """A picture, and questions of some kinds about it in turn; a share of them begins with its description."""
    own = scene()
    does_think = _chosen(rng, thinks)
    asked = ask_several(own, rng, questions, kinds)
    if not asked:
        return None
    if rng.random() < describes:
        asked.insert(0, Question("describe", QUESTION, describe(own), in_reading_order(own.objects)))
    messages = []
    for number, one in enumerate(asked):
        thought = thought_turn(_seen(one, own)) if does_think else ""
        messages += [user(*([] if number else [IMAGE]), one.text), assistant(thought + one.answer)]
    return messages, [own]


def _seen(one: Question, scene: Scene) -> str:
    return f"a {scene.background} background" if one.about is None else tell_objects(one.about, scene)


def _describe(rng, scene, size):
    """A picture, and everything about it."""
    own = scene()
    return [user(IMAGE, WHOLE_QUESTION), assistant(tell_all(own))], [own]


def _edit(rng, scene, size, thinks: float = 0.0):
    """A picture and an instruction; the changed picture."""
    own = draw_edit(scene(), rng)
    if own is None:
        return None
    thought = [thought_turn(own.step)] if _chosen(rng, thinks) else []
    return [user(IMAGE, own.text), assistant(*thought, IMAGE)], [own.before, own.after]


def _edit_turns(rng, scene, size, turns: int = 3, thinks: float = 0.0):
    """A conversation of several edits, of which the last is learned; what came before is looked at."""
    own = draw_edits(scene(), rng, int(rng.integers(2, turns + 1)))
    if len(own) < 2:
        return None
    does_think = _chosen(rng, thinks)
    messages = []
    for number, edit in enumerate(own, 1):
        thought = [thought_turn(edit.step)] if does_think else []
        weight = {} if number == len(own) else {"weight": 0}
        messages += [user(*([] if messages else [IMAGE]), edit.text), assistant(*thought, IMAGE, **weight)]
    return messages, [own[0].before, *(edit.after for edit in own)]


def _compare(rng, scene, size, thinks: float = 0.0):
    """Two pictures, and what is different."""
    own = draw_edit(scene(), rng)
    if own is None:
        return None
    same = rng.random() < 0.15
    after = own.before if same else own.after
    answer = NOTHING if same else own.change
    if _chosen(rng, thinks):
        answer = thought_turn(NOTHING if same else own.step) + answer
    return [user(IMAGE, IMAGE, COMPARE_QUESTION), assistant(answer)], [own.before, after]


def _in_context(rng, scene, size, examples: int = 2, thinks: float = 0.0):
    """Pairs of pictures that show a rule, and a picture to apply it to."""
    rule = draw_rule(rng)
    befores = [scene() for _ in range(examples + 1)]
    afters = [rule(own) for own in befores]
    # An example in which nothing changes shows nothing.
    if not all(map(is_trained, afters)) or any(map(same_picture, befores, afters)):
        return None
    pairs = [own for pair in zip(befores, afters) for own in pair]
    thought = [thought_turn(rule.words)] if _chosen(rng, thinks) else []
    return [user(*[IMAGE] * (2 * examples + 1), EXAMPLE_PROMPT), assistant(*thought, IMAGE)], pairs


def _subject(rng, scene, size, thinks: float = 0.0):
    """A picture of one object; the same object in a new setting."""
    own = scene()
    places = _places(own)
    kinds = [(each.shape, each.color, each.size) for each in own.objects]
    if None in places or kinds[0] in kinds[1:]:
        return None
    reference = draw_reference(own, rng)
    if not is_trained(reference):
        return None
    thought = [thought_turn(tell_objects(reference.objects, reference))] if _chosen(rng, thinks) else []
    return [user(IMAGE, ask_for_subject(own)), assistant(*thought, IMAGE)], [reference, own]


def draw_reference(scene: Scene, rng: np.random.Generator) -> Scene:
    """The first object of a scene alone, at another place on another background."""
    subject = scene.objects[0]
    cells = [cell for cell in named_cells(subject.size, scene.lattice) if cell != subject.cell]
    backgrounds = [name for name in BACKGROUNDS if name != scene.background]
    own = replace(subject, cell=cells[rng.integers(len(cells))])
    return Scene((own,), backgrounds[rng.integers(len(backgrounds))], scene.lattice)


def ask_for_subject(scene: Scene) -> str:
    """Words that ask for a scene whose first object is that of a picture: "this object on the left and ..."."""
    words = []
    for own, place in zip(scene.objects, _places(scene)):
        name = phrase(Group(1, own.shape, own.color, own.size)) if words else SUBJECT_PROMPT
        words.append(f"{name} {PLACES[place]}")
    text = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"{text} on a {scene.background} background"


def _places(scene: Scene) -> list[str | None]:
    return [named_cells(own.size, scene.lattice).get(own.cell) for own in scene.objects]


def _think(rng, scene, size, thinks: float = 0.75):
    """A riddle and its picture; a share of them is thought through first."""
    own = draw_riddle(rng)
    picture = orderly_scene(own.facts, rng, lattice_for(size))
    if not is_trained(picture):
        return None
    prompt = user(own.text)
    if rng.random() < thinks:
        return [prompt, assistant(thought_turn(own.thought), IMAGE)], [picture]
    return [prompt, assistant(IMAGE)], [picture]


def thought_turn(thought: str) -> str:
    """How an assistant's turn shows a thought before its answer (Qwen's form)."""
    return f"{THINK_OPENING}{thought}\n{THINK_CLOSING}"


def _chosen(rng: np.random.Generator, share: float) -> bool:
    """True for a share; with none, the randomness stays as it is."""
    return share > 0 and rng.random() < share


def _story(rng, scene, size, frames: int = 5, kind: str = "story"):
    """A story, instructions or a film of several pictures with text between."""
    longest = min(frames, longest_of(kind, lattice_for(size)))
    own = draw_story(rng, int(rng.integers(2, longest + 1)), lattice_for(size), kind=kind)
    parts = [part for text in own.texts for part in (text, IMAGE)]
    return [user(own.prompt), assistant(*parts, THE_END)], list(own.scenes)


def _sign(rng, scene, size, reads: float = 0.35, documents: float = 0.25):
    """Words to draw; a share of them to read."""
    own = draw_sign(rng, "train", documents)
    if rng.random() < reads:
        return [user(IMAGE, READ_QUESTION), assistant(transcript(own))], [render_sign(own)]
    return [user([words_of_sign(own, rng) for _ in range(2)]), assistant(IMAGE)], [render_sign(own)]


TASKS: dict[str, Callable] = {
    "draw": _draw,
    "ask": _ask,
    "describe": _describe,
    "edit": _edit,
    "edit_turns": _edit_turns,
    "compare": _compare,
    "in_context": _in_context,
    "subject": _subject,
    "think": _think,
    "story": _story,
    "sign": _sign,
}
