"""The scores' own bounds: who copies what is shown gets nothing, who does what is asked gets everything."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from nextflow_hf import abilities
from nextflow_hf.scenes import Referee, SignReader, draw_sign, render, render_sign, transcript
from nextflow_hf.scenes.riddles import draw_riddle
from nextflow_hf.scenes.sampling import is_trained, orderly_scene
from nextflow_hf.scenes.signs import words_of_sign
from nextflow_hf.scenes.stories import THE_END, draw_story

EMPTY_THOUGHT = "<think>\n</think>\n"
CONFIG = SimpleNamespace(abilities=None, schedule=SimpleNamespace(downsample=8))


class Copying(abilities.Tested):
    """Draws the last picture that it was shown, and answers with the last words that were said; thinks nothing."""

    def draw(self, conversations, way="", **sampling):
        return [
            [part["image"] for turn in own for part in turn["content"] if part["type"] == "image"][-1]
            for own in conversations
        ]

    def answer(self, conversations, way=""):
        return [own[-1]["content"][-1]["text"] for own in conversations]

    def think(self, conversations):
        return [EMPTY_THOUGHT] * len(conversations)


class Told(abilities.Tested):
    """Draws and says what the test holds in store for it."""

    answers: list = []

    def draw(self, conversations, way="", **sampling):
        return self.answers

    def think(self, conversations):
        return [EMPTY_THOUGHT] * len(conversations)

    answer = draw


class Thinking(Told):
    """Draws rightly after a thought, and in the wrong order at once."""

    def draw(self, conversations, way="", **sampling):
        asked = self.begun(conversations, way)
        assert all(own[-1]["content"][0]["text"] == EMPTY_THOUGHT for own in asked if len(own) % 2 == 0)
        return self.answers if len(asked[0]) % 2 == 0 else self.answers[::-1]


def build(kind, number=28, thinks=False):
    ways = ("", abilities.AFTER_A_THOUGHT) if thinks else ("",)
    return kind(SimpleNamespace(config=CONFIG), None, (64, 64), number, seed=3, ways=ways)


@pytest.mark.parametrize(
    ("score", "names"),
    [
        (abilities.score_edits, ["edits: followed", "edits: exact"]),
        (abilities.score_conversations, ["3 edits in a row"]),
        (abilities.score_examples, ["in-context edits", "in-context edits, no examples"]),
        (abilities.score_subjects, ["subject-driven"]),
        (abilities.score_comparison, ["comparison"]),
        (abilities.score_questions, ["questions"]),
    ],
)
def test_who_copies_gets_nothing(score, names):
    result = score(build(Copying, thinks=True))
    for end in ("", abilities.AFTER_A_THOUGHT):
        assert [result[name + end]["score"] for name in names] == [0.0] * len(names)


def test_who_edits_and_compares_rightly_gets_everything():
    own = build(Told)
    edits = abilities.edits_of(own)
    assert not any(is_trained(edit.after) for edit in edits)
    object.__setattr__(own, "answers", [own.picture(edit.after) for edit in edits])
    result = abilities.score_edits(own)
    assert all(result[f"edits: {name}"]["score"] == 1 for name in ("followed", "kept", "exact"))
    object.__setattr__(own, "answers", ["nothing" if n % 8 == 7 else edit.change for n, edit in enumerate(edits)])
    assert abilities.score_comparison(own)["comparison"]["score"] == 1


def test_an_unreadable_picture_follows_no_removal():
    own = build(abilities.Tested, 60)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    edit = next(edit for edit in abilities.edits_of(own) if edit.kind == "remove")
    assert abilities.judge_edit(edit, Referee().look(noise)) == (False, False, False)


def test_thoughts_are_scored_by_their_pictures(monkeypatch):
    own = build(Told, 6)
    right = []
    for index in range(6):
        rng = own.rng(index)
        riddle = draw_riddle(rng, "test")
        right.append(own.picture(orderly_scene(riddle.facts, rng)))
    object.__setattr__(own, "answers", right[::-1])
    # Two of the thoughts end without a picture.
    told = [["<think>\n", picture] for picture in right[:4]] + [["<think>\n"]] * 2
    monkeypatch.setattr(abilities, "tell", lambda *args, **kwargs: told)
    result = abilities.score_thinking(own)
    assert result["riddles, after a thought"]["score"] == pytest.approx(4 / 6, abs=1e-3)
    assert result["riddles, drawn at once"]["score"] < 0.5


@pytest.mark.parametrize("score", [abilities.score_edits, abilities.score_conversations])
def test_edits_are_scored_after_thoughts_as_well_where_that_is_asked_for(score):
    own = build(Thinking, thinks=True)
    object.__setattr__(own, "answers", [own.picture(edit.after) for edit in abilities.edits_of(own)])
    scores = score(own)
    assert any(name.endswith(abilities.AFTER_A_THOUGHT) for name in scores)
    if "edits: exact" in scores:
        assert scores["edits: exact, after a thought"]["score"] == 1 > scores["edits: exact"]["score"]
    plain = build(Thinking)
    object.__setattr__(plain, "answers", own.answers)
    assert set(score(plain)) == {name for name in scores if not name.endswith(abilities.AFTER_A_THOUGHT)}


def test_stories_are_scored_by_what_they_tell(monkeypatch):
    own = build(abilities.Tested, 8)
    stories = [draw_story(own.rng(index), lattice=(4, 4), split="test") for index in range(2)]
    assert not any(is_trained(story.scenes[0]) for story in stories)
    frames = [[Image.fromarray(render(scene)) for scene in story.scenes] for story in stories]
    whole = [[part for pair in zip(story.texts, own) for part in pair] for story, own in zip(stories, frames)]
    # The first as it should be; the second begins with a picture, and lacks one.
    told = [[*whole[0], THE_END], whole[1][1:-2]]
    monkeypatch.setattr(abilities, "tell", lambda *args, **kwargs: told)
    result = abilities.score_stories(own)
    assert result["stories: subject in every frame"]["score"] == 0.5
    assert result["stories: as many frames as asked"]["score"] == 0.5
    expected = (1 + 0 / (len(frames[1]) - 1)) / 2
    assert result["stories: frames as told"]["score"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("kind", "name"), [("instructions", "instructions"), ("film", "films")])
def test_instructions_and_films_are_scored_frame_by_frame(monkeypatch, kind, name):
    own = build(abilities.Tested, 8)
    stories = [draw_story(own.rng(index), None, (4, 4), "test", kind) for index in range(2)]
    frames = [[Image.fromarray(render(scene)) for scene in story.scenes] for story in stories]
    # The first as it should be, the second with its first picture again in place of the last.
    frames[1][-1] = frames[1][0]
    told = [[part for pair in zip(story.texts, own) for part in pair] for story, own in zip(stories, frames)]
    monkeypatch.setattr(abilities, "tell", lambda *args, **kwargs: told)
    result = abilities.score_stories(own, kind)
    assert result[f"{name}: subject in every frame"]["score"] == 1
    expected = (1 + (len(frames[1]) - 1) / len(frames[1])) / 2
    assert result[f"{name}: frames as told"]["score"] == pytest.approx(expected, abs=1e-3)
    if kind == "instructions":
        assert result["instructions: end as asked"]["score"] == 0.5


def test_words_are_scored_by_what_is_read(monkeypatch):
    own = build(abilities.Tested, 12)
    signs = [draw_sign(own.rng(index), "test") for index in range(12)]
    by_prompt = {words_of_sign(sign): sign for sign in signs}

    def drawn(model, processor, conversations, seeds, **kwargs):
        asked = [by_prompt[turns[0]["content"][0]["text"]] for turns in conversations]
        assert all(sign.size == kwargs["image_size"] for sign in asked)
        return [Image.fromarray(render_sign(sign)) for sign in asked]

    monkeypatch.setattr(abilities, "draw", drawn)
    monkeypatch.setattr(abilities, "answer", lambda *args: [transcript(sign) for sign in signs])
    result = abilities.score_words(own)
    assert {name: one["score"] for name, one in result.items()} == dict.fromkeys(result, 1.0)
    assert {"words drawn", "lists drawn: letters", "words read"} <= set(result)
    assert SignReader().read(render_sign(signs[0])).shows(signs[0])
    signs = [draw_sign(own.rng(index), "test", 0.0) for index in range(12)]
    by_prompt |= {words_of_sign(sign): sign for sign in signs}
    alone = abilities.score_words(own, document_share=0.0)
    assert "words drawn" in alone and "lists drawn" not in alone
