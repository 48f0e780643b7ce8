"""Scores of every ability beyond drawing and captions: edits, questions, comparison, examples, subjects, thinking,
stories, words.

Every test is of the test split: what is looked at, and what is to be drawn, show a combination that training never saw.
Judges are the referee and exact words. A score has `score`, and `low` and `high` of its 95 % interval from resampling
the tests.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from .in_words import answer_in_words, reply_in_words
from .inference import answer, assistant, draw, tell, think, user
from .intervals import interval
from .modeling.modeling_nextflow import NextFlowForConditionalGeneration
from .processing.processing_nextflow import NextFlowProcessor
from .scenes import (
    Referee,
    Scene,
    Sign,
    SignReader,
    draw_sign,
    lattice_for,
    render,
    render_sign,
    sample_scene,
    transcript,
)
from .scenes.captions import NOTHING
from .scenes.edits import KINDS as EDITS
from .scenes.edits import Edit, draw_edit, draw_edits, draw_rule, same_picture
from .scenes.questions import KINDS as QUESTION_KINDS
from .scenes.questions import ask
from .scenes.referee import Reading
from .scenes.riddles import draw_riddle
from .scenes.sampling import is_trained
from .scenes.signs import DOCUMENT_SHARE, words_of_sign
from .scenes.source import READ_QUESTION
from .scenes.stories import draw_story
from .scenes.tasks import COMPARE_QUESTION, EXAMPLE_PROMPT, ask_for_subject, draw_reference
from .training.rewards import letters_right

# Ends of the names of scores.
AFTER_A_THOUGHT, IN_WORDS = ", after a thought", ", in words"
# Shares of scenes with one object, with some alike, with two that differ, with more that differ.
_FAMILIES = (0.2, 0.1, 0.5, 0.2)


@dataclass(frozen=True)
class Tested:
    """What is tested, and how.

    Attributes:
        model: The checkpoint's model.
        processor: Its processor.
        size: (height, width) in pixels of the scenes.
        number: Tests of each ability.
        seed: Seed of the tests and of what is drawn.
        split: Which combinations the tests show.
        ways: How what concerns pictures is scored, as ends of the scores' names: at once (""), `AFTER_A_THOUGHT`, or
            `IN_WORDS` ([`in_words.reply_in_words`]).
        sampling: Goes to `generate` where pictures are drawn.
    """

    model: NextFlowForConditionalGeneration
    processor: NextFlowProcessor
    size: tuple[int, int]
    number: int = 200
    seed: int = 0
    split: str = "test"
    ways: tuple[str, ...] = ("",)
    sampling: Mapping = field(default_factory=dict)

    @property
    def lattice(self) -> tuple[int, int]:
        """(rows, columns) of the scenes."""
        return lattice_for(self.size)

    @property
    def resolution(self) -> int:
        """Level at which the model looks at the scenes."""
        schedule = self.model.config.schedule
        return schedule.sides[schedule.level_for_size(*self.size) - 1] * schedule.downsample

    def rng(self, index: int) -> np.random.Generator:
        """Randomness of test `index`."""
        return np.random.default_rng((self.seed, 7, index))

    def scenes(self) -> list[tuple[Scene, np.random.Generator]]:
        """A scene for each test, and what is left of its randomness."""
        drawn = []
        for index in range(self.number):
            rng = self.rng(index)
            drawn.append((sample_scene(rng, self.split, self.lattice, "placed", _FAMILIES), rng))
        return drawn

    def picture(self, scene: Scene) -> Image.Image:
        """A scene's picture."""
        return Image.fromarray(render(scene, self.size))

    def draw(self, conversations: Sequence[list[dict]], way: str = "", **sampling) -> list[Image.Image]:
        """The pictures that answer conversations, in one of `ways`."""
        if way == IN_WORDS:
            return [talk[-1]["content"][-1]["image"] for talk in self.reply(conversations, way, **sampling)]
        begun, settings = self.begun(conversations, way), self._drawing(conversations, sampling)
        return draw(self.model, self.processor, begun, **settings)

    def reply(self, conversations: Sequence[list[dict]], way: str = "", **sampling) -> list[list[dict]]:
        """The conversations with the pictures that answer them, in one of `ways`."""
        if way == IN_WORDS:
            settings = self._drawing(conversations, sampling)
            turns = reply_in_words(self.model, self.processor, conversations, **settings)
            return [[*talk, turn] for talk, turn in zip(conversations, turns)]
        begun = self.begun(conversations, way)
        return [_drawn(talk, picture) for talk, picture in zip(begun, self.draw(begun, way, **sampling))]

    def _drawing(self, conversations: Sequence[list[dict]], sampling: Mapping) -> dict:
        seeds = [self.seed + index for index in range(len(conversations))]
        return {"seeds": seeds, "resolution": self.resolution, "image_size": self.size, **self.sampling, **sampling}

    def answer(self, conversations: Sequence[list[dict]], way: str = "") -> list[str]:
        """The words that answer conversations, in one of `ways`."""
        if way == IN_WORDS:
            return answer_in_words(self.model, self.processor, conversations, resolution=self.resolution)
        return answer(self.model, self.processor, self.begun(conversations, way), resolution=self.resolution)

    def think(self, conversations: Sequence[list[dict]]) -> list[str]:
        """The thoughts before the answers to conversations."""
        return think(self.model, self.processor, conversations, resolution=self.resolution)

    def begun(self, conversations: Sequence[list[dict]], way: str) -> list[list[dict]]:
        """Conversations whose answer begins with a thought, where the way is one of thinking."""
        if way != AFTER_A_THOUGHT or conversations[0][-1]["role"] == "assistant":
            return list(conversations)
        return [[*talk, assistant(own)] for talk, own in zip(conversations, self.think(conversations))]


# ---- seeing ----------------------------------------------------------------------------------------------------------


def score_questions(tested: Tested) -> dict:
    """Exact answers to questions of every kind, as many of each; and what always the kind's likeliest would score."""
    questions = []
    for number, (scene, rng) in enumerate(tested.scenes()):
        kind = QUESTION_KINDS[number % len(QUESTION_KINDS)]
        # Not every scene has a question of every kind.
        while (own := ask(scene, rng, kind)) is None:
            scene = sample_scene(rng, tested.split, tested.lattice, "placed", _FAMILIES)
        questions.append((own, tested.picture(scene)))
    kinds = np.array([own.kind for own, _ in questions])
    likeliest = sum(
        Counter(own.answer for own, _ in questions if own.kind == kind).most_common(1)[0][1] for kind in set(kinds)
    )
    conversations = [[user(picture, own.text)] for own, picture in questions]
    result = {}
    for way in tested.ways:
        answers = tested.answer(conversations, way)
        right = np.array([own.answer == said.strip() for (own, _), said in zip(questions, answers)], float)
        result[f"questions{way}"] = interval(right)
        for kind in QUESTION_KINDS:
            if (kinds == kind).any():
                result[f"questions: {kind}{way}"] = interval(right[kinds == kind])
    result["questions: by the likeliest answer of each kind"] = round(likeliest / len(questions), 4)
    return result


def score_comparison(tested: Tested) -> dict:
    """Exact answers to what changed between two pictures."""
    pairs, wanted = [], []
    for number, own in enumerate(edits_of(tested)):
        # Now and then of two pictures that are the same.
        is_same = number % 8 == 7
        pairs.append((own.before, own.before if is_same else own.after))
        wanted.append(NOTHING if is_same else own.change)
    conversations = [[user(*map(tested.picture, pair), COMPARE_QUESTION)] for pair in pairs]
    result = {}
    for way in tested.ways:
        answers = tested.answer(conversations, way)
        result[f"comparison{way}"] = interval([right == said.strip() for right, said in zip(wanted, answers)])
    return result


# ---- editing ---------------------------------------------------------------------------------------------------------


def score_edits(tested: Tested) -> dict:
    """Single edits: whether what was to change did, whether the rest was kept, and both with nothing else there."""
    edits = edits_of(tested)
    referee = Referee(tested.lattice)
    conversations = [[user(tested.picture(own.before), own.text)] for own in edits]
    result = {}
    for way in tested.ways:
        pictures = tested.draw(conversations, way)
        verdicts = np.array([judge_edit(own, referee.look(picture)) for own, picture in zip(edits, pictures)], float)
        for place, name in enumerate(("followed", "kept", "exact")):
            result[f"edits: {name}{way}"] = interval(verdicts[:, place])
    return result


def judge_edit(edit: Edit, reading: Reading) -> tuple[bool, bool, bool]:
    """Whether a picture shows the change, keeps what was to be kept, and is exactly the changed scene."""
    shown = _shown(reading)
    is_background = edit.kind == "background"
    gone = _shown(edit.before) - _shown(edit.after)
    if is_background:
        followed = reading.background == edit.after.background
    else:
        # What is not recognised is not gone.
        followed = reading.readable and _objects(edit.made) <= shown and not gone & shown
    kept = _objects(edit.kept) <= shown and (is_background or reading.background == edit.before.background)
    return followed, kept, reading.readable and shows(reading, edit.after)


def score_conversations(tested: Tested, turns: int = 3) -> dict:
    """Several edits in one conversation, each of the picture that the model drew before: the last is exactly right.

    In words, each is of what the model meant to draw ([`in_words.reply_in_words`]).
    """
    wanted = []
    for scene, rng in tested.scenes():
        edits: list[Edit] = []
        # The last may not undo what the others did.
        while len(edits) < turns or is_trained(edits[-1].after) or same_picture(edits[-1].after, scene):
            edits = draw_edits(scene, rng, turns, trained=False)
        wanted.append(edits)
    referee = Referee(tested.lattice)
    result = {}
    for way in tested.ways:
        conversations = [[user(tested.picture(edits[0].before), edits[0].text)] for edits in wanted]
        # In words nobody looks at the pictures on the way, so these need no choice of drafts.
        on_the_way = {"drafts": 1} if way == IN_WORDS else {}
        for turn in range(1, turns):
            replied = tested.reply(conversations, way, **on_the_way)
            conversations = [[*talk, user(edits[turn].text)] for talk, edits in zip(replied, wanted)]
        pictures = tested.draw(conversations, way)
        right = [shows(referee.look(picture), edits[-1].after) for picture, edits in zip(pictures, wanted)]
        result[f"{turns} edits in a row{way}"] = interval(right)
    return result


def score_masks(tested: Tested) -> dict:
    """Edits within a mask: whether they follow, and how far pixels beyond one cell of its edge move.

    The change is the mean absolute difference from the original in 8-bit levels; beside it that of the tokenizer's own
    round trip, which is what an edit without a mask would leave at best.
    """
    edits = [draw_edit(scene, rng, "recolor", trained=False) for scene, rng in tested.scenes()]
    edits = [own for own in edits if own is not None][: a_quarter(tested.number)]
    changes, trips, followed = [], [], []
    referee = Referee(tested.lattice)
    downsample = tested.model.config.schedule.downsample
    for own in edits:
        (made,) = own.made
        mask = np.zeros(tested.size, np.uint8)
        pitch = [side // cells for side, cells in zip(tested.size, tested.lattice)]
        row, column = made.cell
        mask[row * pitch[0] : (row + made.span) * pitch[0], column * pitch[1] : (column + made.span) * pitch[1]] = 1
        before = tested.picture(own.before)
        (after,) = tested.draw([[user(before, own.text)]], mask=torch.from_numpy(mask), image_size=None)
        outside = _grown(mask, downsample) == 0
        # Of small pictures nothing may lie so far from a large object.
        changes.append(_difference(before, after)[outside])
        followed.append(judge_edit(own, referee.look(after))[0])
        codes, grids = tested.model.model.encode_images(_pixels(before))
        (trip,) = tested.processor.post_process_multimodal_output(
            tested.model.vq_model.decode(codes, grids[0]), generation_mode="image"
        )
        trips.append(_difference(before, trip)[outside])
    return {
        "masked edits: followed": interval(followed),
        "masked edits: change outside, levels": round(float(np.concatenate(changes).mean()), 4),
        "masked edits: the tokenizer's own change outside, levels": round(float(np.concatenate(trips).mean()), 4),
    }


# ---- examples and subjects -------------------------------------------------------------------------------------------


def score_examples(tested: Tested, examples: int = 2) -> dict:
    """A rule shown by pairs of pictures, and the same query without them."""
    with_examples, without, wanted = [], [], []
    for befores, afters in examples_of(tested, examples):
        pictures = [tested.picture(own) for pair in zip(befores, afters) for own in pair]
        with_examples.append([user(*pictures[:-1], EXAMPLE_PROMPT)])
        without.append([user(pictures[-2], EXAMPLE_PROMPT)])
        wanted.append(afters[-1])
    referee = Referee(tested.lattice)
    result = {}
    for name, conversations in (("in-context edits", with_examples), ("in-context edits, no examples", without)):
        for way in tested.ways:
            pictures = tested.draw(conversations, way)
            result[name + way] = interval([shows(referee.look(own), scene) for own, scene in zip(pictures, wanted)])
    return result


def examples_of(tested: Tested, examples: int = 2) -> list[tuple[list[Scene], list[Scene]]]:
    """For each test scenes before and after a rule, of which the last pair is the query and its answer."""
    found = []
    for _, rng in tested.scenes():
        while True:
            rule = draw_rule(rng)
            befores = [
                sample_scene(rng, tested.split, tested.lattice, "placed", (0.3, 0.1, 0.5, 0.1))
                for _ in range(examples + 1)
            ]
            afters = [rule(scene) for scene in befores]
            if not any(map(same_picture, befores, afters)) and not is_trained(afters[-1]):
                break
        found.append((befores, afters))
    return found


def score_subjects(tested: Tested) -> dict:
    """An object from a picture, drawn in a new setting."""
    conversations, wanted = [], []
    for _, rng in tested.scenes():
        while True:
            scene = sample_scene(rng, tested.split, tested.lattice, "placed", (0.3, 0.0, 0.6, 0.1))
            kinds = [(own.shape, own.color, own.size) for own in scene.objects]
            if kinds[0] not in kinds[1:]:
                break
        conversations.append([user(tested.picture(draw_reference(scene, rng)), ask_for_subject(scene))])
        wanted.append(scene)
    referee = Referee(tested.lattice)
    result = {}
    for way in tested.ways:
        pictures = tested.draw(conversations, way)
        result[f"subject-driven{way}"] = interval([shows(referee.look(own), one) for own, one in zip(pictures, wanted)])
    return result


# ---- thinking and telling --------------------------------------------------------------------------------------------


def score_thinking(tested: Tested) -> dict:
    """Riddles drawn at once, and after a thought."""
    riddles = [draw_riddle(tested.rng(index), tested.split) for index in range(tested.number)]
    conversations = [[user(own.text)] for own in riddles]
    referee = Referee(tested.lattice)
    at_once = tested.draw(conversations)
    told = tell(
        tested.model,
        tested.processor,
        conversations,
        [tested.seed + index for index in range(tested.number)],
        enable_thinking=True,
        image_size=tested.size,
        max_images=1,
        max_new_tokens=80,
    )
    thought = [next((part for part in parts if isinstance(part, Image.Image)), None) for parts in told]
    right = {
        "riddles, drawn at once": [referee.judge(own, riddle.facts).passed for own, riddle in zip(at_once, riddles)],
        "riddles, after a thought": [
            own is not None and referee.judge(own, riddle.facts).passed for own, riddle in zip(thought, riddles)
        ],
    }
    return {name: interval(own) for name, own in right.items()}


def score_stories(tested: Tested, kind: str = "story") -> dict:
    """Stories, instructions or films: whether the subject is in every frame asked for, and which frames are as the
    texts until then (in a film: the prompt) say. Of instructions also whether the last frame is what was asked for.
    """
    number = a_quarter(tested.number)
    stories = [draw_story(tested.rng(index), None, tested.lattice, tested.split, kind) for index in range(number)]
    told = tell(
        tested.model,
        tested.processor,
        [[user(own.prompt)] for own in stories],
        [tested.seed + 10 * index for index in range(number)],
        image_size=tested.size,
        max_images=8,
        max_new_tokens=200,
    )
    referee = Referee(tested.lattice)
    kept, as_told, lengths, ends = [], [], [], []
    for story, parts in zip(stories, told):
        readings = [referee.look(part) for part in parts if isinstance(part, Image.Image)]
        texts = [part for part, after in itertools.pairwise(["", *parts]) if isinstance(after, Image.Image)]
        scenes = story.expected([own if isinstance(own, str) else "" for own in texts])
        lengths.append(len(readings) == len(story.scenes))
        kept.append(lengths[-1] and all(story.keeps_subject(own.objects) for own in readings))
        right = [scene is not None and shows(reading, scene) for reading, scene in zip(readings, scenes, strict=True)]
        as_told.append(np.mean(right) if right else 0.0)
        ends.append(bool(readings) and shows(readings[-1], story.scenes[-1]))
    name = {"story": "stories", "instructions": "instructions", "film": "films"}[kind]
    result = {
        f"{name}: subject in every frame": interval(kept),
        f"{name}: frames as told": interval(as_told),
        f"{name}: as many frames as asked": interval(lengths),
    }
    if kind == "instructions":
        result[f"{name}: end as asked"] = interval(ends)
    return result


def score_instructions(tested: Tested) -> dict:
    """Pictures built step by step."""
    return score_stories(tested, "instructions")


def score_films(tested: Tested) -> dict:
    """Short films of an object that moves."""
    return score_stories(tested, "film")


# ---- words -----------------------------------------------------------------------------------------------------------


def score_words(
    tested: Tested,
    document_share: float = DOCUMENT_SHARE,
    prompt_of: Callable[[Sign], str] = words_of_sign,
    **sampling,
) -> dict:
    """Words and lists drawn, and read: whole texts, and letters (1 - normalised edit distance).

    `prompt_of` asks for a sign. Reading is left out where the checkpoint was not trained to read. `sampling` goes to
    `generate`.
    """
    signs = [draw_sign(tested.rng(index), tested.split, document_share) for index in range(tested.number)]
    seeds = [tested.seed + index for index in range(tested.number)]
    reader, right, letters = SignReader(), np.zeros(tested.number), np.zeros(tested.number)
    is_list = np.array([bool(own.items) for own in signs])
    for chosen in (~is_list, is_list):
        places = np.flatnonzero(chosen)
        if not len(places):
            continue
        pictures = draw(
            tested.model,
            tested.processor,
            [[user(prompt_of(signs[place]))] for place in places],
            [seeds[place] for place in places],
            image_size=signs[places[0]].size,
            **sampling,
        )
        for place, picture in zip(places, pictures):
            read, sign = reader.read(picture), signs[place]
            right[place] = read.lines == (sign.text, *sign.items)
            letters[place] = letters_right("\n".join(read.lines), "\n".join((sign.text, *sign.items)))
    result = {}
    for name, chosen in (("words", ~is_list), ("lists", is_list)):
        if chosen.any():
            result[f"{name} drawn"] = interval(right[chosen])
            result[f"{name} drawn: letters"] = interval(letters[chosen])
    if can(tested.model, "caption"):
        conversations = [[user(Image.fromarray(render_sign(own)), READ_QUESTION)] for own in signs]
        answers = answer(tested.model, tested.processor, conversations)
        result["words read"] = interval([said.strip() == transcript(own) for said, own in zip(answers, signs)])
    return result


# ---- all of them -----------------------------------------------------------------------------------------------------

# Ability of a checkpoint's configuration -> what is then scored.
SCORES: dict[str, tuple[Callable, ...]] = {
    "caption": (score_questions, score_comparison),
    "edit": (score_edits, score_conversations, score_masks, score_examples, score_subjects),
    "interleaved": (score_thinking, score_stories, score_instructions, score_films),
}


# What can be done by way of words.
SCORES_IN_WORDS = (
    *(score_questions, score_comparison, score_edits),
    *(score_conversations, score_examples, score_subjects),
)


def score_abilities(tested: Tested) -> dict:
    """Scores of all that the checkpoint says it can do with scenes, beyond drawing and captions."""
    result = {}
    for name, scores in SCORES.items():
        if can(tested.model, name):
            for score in scores:
                result |= score(tested)
    return result


def can(model: NextFlowForConditionalGeneration, ability: str) -> bool:
    """Whether a checkpoint says that it was trained for an ability, or says nothing."""
    return model.config.abilities is None or ability in model.config.abilities


def shows(reading: Reading, scene: Scene) -> bool:
    """Whether a picture shows exactly a scene: the same objects in the same cells, on the same background."""
    return reading.readable and reading.background == scene.background and _shown(reading) == _shown(scene)


def _shown(seen: Reading | Scene) -> frozenset:
    return _objects(seen.objects)


def _objects(objects) -> frozenset:
    return frozenset((own.shape, own.color, own.size, tuple(own.cell)) for own in objects)


def _drawn(conversation: list[dict], picture: Image.Image) -> list[dict]:
    """A conversation with the picture that answers it, behind a thought where there is one."""
    *before, last = conversation
    turn = assistant(picture)
    if last["role"] == "user":
        return [*conversation, turn]
    return [*before, {**turn, "content": [*last["content"], *turn["content"]]}]


def a_quarter(tests: int) -> int:
    """Tests of what takes long, where others have so many."""
    return max(1, tests // 4)


def edits_of(tested: Tested) -> list[Edit]:
    """An edit for each test, of each kind in turn."""
    edits = []
    for number, (scene, rng) in enumerate(tested.scenes()):
        own = draw_edit(scene, rng, EDITS[number % len(EDITS)], trained=False)
        while own is None or is_trained(own.after):
            scene = sample_scene(rng, tested.split, tested.lattice, "placed", _FAMILIES)
            own = draw_edit(scene, rng, EDITS[number % len(EDITS)], trained=False)
        edits.append(own)
    return edits


def _grown(mask: np.ndarray, cells: int) -> np.ndarray:
    kernel = 2 * cells + 1
    return torch.nn.functional.max_pool2d(torch.from_numpy(mask)[None].float(), kernel, stride=1, padding=cells)[
        0
    ].numpy()


def _pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


def _difference(first: Image.Image, second: Image.Image) -> np.ndarray:
    """Mean absolute difference over channels in 8-bit levels: float32 `(height, width)`."""
    return np.abs(np.asarray(first, np.float32) - np.asarray(second, np.float32)).mean(axis=-1)
