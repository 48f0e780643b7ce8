"""Questions, edits, riddles, stories and words: what the tasks say is true of what they show."""

import hashlib
import json
import re

import numpy as np
import pytest
from PIL import Image

from nextflow_hf.abilities import judge_edit, shows
from nextflow_hf.scenes import (
    AnswerPrompts,
    EditPrompts,
    Referee,
    Scene,
    SceneObject,
    SceneReward,
    SignReader,
    TaskRecords,
    WordPrompts,
    answer_reward,
    draw_sign,
    facts_match,
    parse,
    render,
    render_sign,
    sample_scene,
    scene_reward,
    word_reward,
)
from nextflow_hf.scenes.captions import PLURALS
from nextflow_hf.scenes.edits import KINDS as EDITS
from nextflow_hf.scenes.edits import Rule, draw_edit, draw_edits, has_room
from nextflow_hf.scenes.questions import COUNTS, ask, ask_several, refer
from nextflow_hf.scenes.questions import KINDS as QUESTIONS
from nextflow_hf.scenes.renaming import OTHER_COLORS, OTHER_SHAPES
from nextflow_hf.scenes.riddles import KINDS as RIDDLES
from nextflow_hf.scenes.riddles import draw_riddle
from nextflow_hf.scenes.sampling import is_trained
from nextflow_hf.scenes.signs import FREE_PROMPTS, UNTAUGHT_PROMPTS, WORDS, Sign, ask_freely, transcript
from nextflow_hf.scenes.stories import draw_story, replay
from nextflow_hf.scenes.tasks import TASKS
from nextflow_hf.scenes.world import COLORS, PLACES, SHAPES, named_cells
from nextflow_hf.training.rewards import letters_right

CIRCLE = SceneObject("circle", "red", "large", (0, 0))
STAR = SceneObject("star", "red", "small", (3, 3))
SQUARE = SceneObject("square", "blue", "small", (0, 3))
SCENE = Scene((CIRCLE, STAR, SQUARE), "gray")


def scenes(number, split="train", seed=0):
    rng = np.random.default_rng(seed)
    return [(sample_scene(rng, split, (4, 4), "placed", (0.2, 0.2, 0.4, 0.2)), rng) for _ in range(number)]


# ---- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("what", "what is at the top left?", "a large red circle"),
        ("color", "what color is the square?", "blue"),
        ("shape", "what shape is the blue object?", "square"),
        ("size", "what size is the star?", "small"),
        ("where", "where is the blue object?", "at the top right"),
        ("count", "how many red objects are there?", "two"),
        ("count", "how many objects are there?", "three"),
        ("exists", "is there a red circle?", "yes"),
        ("relation", "is the circle to the left of the square?", "yes"),
        ("relation", "is the circle above the square?", "no"),
        ("background", "what color is the background?", "gray"),
    ],
)
def test_questions_of_a_scene(kind, text, answer):
    asked = {own.text: own.answer for seed in range(300) if (own := ask(SCENE, np.random.default_rng(seed), kind))}
    assert asked[text] == answer


def test_words_for_a_thing_fit_it_alone_and_do_not_give_the_answer():
    rng = np.random.default_rng(0)
    assert {refer(SCENE, CIRCLE, rng) for _ in range(30)} == {"the circle", "the large object"}
    assert refer(SCENE, STAR, rng, hidden=("shape",)) == "the small red object"
    twins = Scene((STAR, SceneObject("star", "red", "small", (0, 0))))
    assert refer(twins, twins.objects[0], rng) is None
    for scene, rng in scenes(100):
        for kind in ("color", "shape", "size"):
            own = ask(scene, rng, kind)
            assert own is None or own.answer not in own.text.split()


def test_relations_that_are_denied_do_not_hold():
    axis = {"to the left of": (1, -1), "to the right of": (1, 1), "above": (0, -1), "below": (0, 1)}
    denied = 0
    for scene, rng in scenes(200):
        own = ask(scene, rng, "relation")
        if own is None or own.answer == "yes":
            continue
        denied += 1
        (words,) = (words for words in axis if words in own.text)
        first, second = own.text.removeprefix("is ").removesuffix("?").split(f" {words} ")
        a, b = (next(o for o in scene.objects if refer_fits(scene, o, said)) for said in (first, second))
        place, sign = axis[words]
        assert sign * (a.center[place] - b.center[place]) <= 0, own.text
    assert denied > 20


def refer_fits(scene, own, said):
    return any(refer(scene, own, np.random.default_rng(seed)) == said for seed in range(20))


def test_several_questions_differ():
    for scene, rng in scenes(50):
        texts = [own.text for own in ask_several(scene, rng, 5)]
        assert len(texts) == len(set(texts)) >= 4
    with pytest.raises(ValueError, match="one of the kinds"):
        ask(SCENE, np.random.default_rng(0), "why")
    assert len(QUESTIONS) == 9


# ---- edits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_changes_one_thing(kind):
    found = 0
    for scene, rng in scenes(80):
        own = draw_edit(scene, rng, kind)
        if own is None:
            continue
        found += 1
        assert own.kind == kind and has_room(own.after) and is_trained(own.after)
        added, removed = len(own.made), len(scene.objects) - len(own.kept)
        expected = {"add": (1, 0), "remove": (0, 1), "background": (0, 0)}.get(kind, (1, 1))
        assert (added, removed) == expected
        assert (own.after.background != scene.background) == (kind == "background")
    assert found > 10


def test_a_picture_of_the_changed_scene_passes_and_others_do_not():
    referee = Referee()
    for scene, rng in scenes(40):
        own = draw_edit(scene, rng)
        assert judge_edit(own, referee.look(render(own.after))) == (True, True, True)
        followed, kept, exact = judge_edit(own, referee.look(render(own.before)))
        assert not followed and kept and not exact
    edits = draw_edits(SCENE, np.random.default_rng(1), 3)
    assert [own.before for own in edits[1:]] == [own.after for own in edits[:-1]]


def test_rules_apply_to_every_object():
    assert {own.color for own in Rule("color", "pink")(SCENE).objects} == {"pink"}
    mirrored = Rule("mirror")(SCENE)
    assert [own.cell for own in mirrored.objects] == [(0, 2), (3, 0), (0, 0)]
    assert Rule("mirror")(mirrored) == SCENE
    rules = [Rule("color", "pink"), Rule("shape", "star"), Rule("background", "black"), Rule("mirror")]
    assert [own.words for own in rules] == [
        "everything becomes pink",
        "everything becomes a star",
        "the background becomes black",
        "left and right change sides",
    ]
    assert np.abs(render(SCENE)[:, ::-1].astype(int) - render(mirrored)).mean() < 1


# ---- riddles and stories ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RIDDLES)
def test_a_thought_ends_in_what_is_to_be_drawn(kind):
    for split in ("train", "test"):
        for seed in range(30):
            own = draw_riddle(np.random.default_rng(seed), split, kind)
            assert parse(own.thought.rsplit(". so ", 1)[1]) == own.facts
            assert parse(own.text) is None, "a riddle must not be a plain prompt"


def test_sums_are_right():
    values = {word: number for number, word in enumerate(("one", "two", "three", "four", "five", "six"), 1)}
    for seed in range(60):
        own = draw_riddle(np.random.default_rng(seed), kind=("sum", "difference")[seed % 2])
        first, sign, second = own.text.split(" as ")[-1].split()
        total = values[first] + (1 if sign == "plus" else -1) * values[second]
        assert own.facts.count == total


def test_stories_can_be_read_back():
    for split in ("train", "test"):
        for seed in range(40):
            story = draw_story(np.random.default_rng(seed), split=split)
            for told, shown in zip(replay(list(story.texts)), story.scenes, strict=True):
                assert set(told.objects) == set(shown.objects) and told.background == shown.background
            assert all(story.keeps_subject(scene.objects) for scene in story.scenes)
            assert all(map(is_trained, story.scenes)) == (split == "train")
    assert replay(["it is day. a small red circle is on the left.", "the blue star leaves.", "it becomes night."])[
        1:
    ] == [None, None]


def test_instructions_end_in_what_was_asked_for():
    for split in ("train", "test"):
        for seed in range(40):
            own = draw_story(np.random.default_rng(seed), split=split, kind="instructions")
            for told, shown in zip(own.expected(list(own.texts)), own.scenes, strict=True):
                assert set(told.objects) == set(shown.objects) and told.background == shown.background
            assert [len(scene.objects) for scene in own.scenes] == list(range(1, len(own.scenes) + 1))
            words = own.prompt.removeprefix("show step by step how to make ")
            for each in own.scenes[-1].objects:
                assert f"{each.color} {each.shape} {PLACES[named_cells(each.size, (4, 4))[each.cell]]}" in words
    assert own.expected(["step one: on a pale background put a small red circle on the left."]) == [None]


def test_films_move_one_object_step_by_step():
    for split in ("train", "test"):
        for seed in range(40):
            own = draw_story(np.random.default_rng(seed), split=split, kind="film")
            cells = [scene.objects[0].cell for scene in own.scenes]
            assert len(set(cells)) == len(cells) == len(own.texts)
            steps = np.diff(cells, axis=0)
            assert (np.abs(steps - steps.mean(0)) < 1).all(), "evenly"
            names = named_cells(own.subject.size, (4, 4))
            assert f"from the {names[cells[0]]} to the {names[cells[-1]]}" in own.prompt
            assert own.expected(["anything"] * (len(cells) + 1)) == [*own.scenes, None]


def test_a_story_of_no_kind_is_refused():
    with pytest.raises(ValueError, match="kind is one of"):
        draw_story(np.random.default_rng(0), kind="opera")
    with pytest.raises(ValueError, match="2 to 3 frames, got 4"):
        draw_story(np.random.default_rng(0), 4, kind="instructions")
    with pytest.raises(ValueError, match="2 to 4 frames, got 5"):
        draw_story(np.random.default_rng(0), 5, kind="film")


# ---- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_reader_reads_what_was_written(split):
    rng, reader = np.random.default_rng(0), SignReader()
    for _ in range(80):
        sign = draw_sign(rng, split)
        noisy = np.clip(render_sign(sign) + rng.normal(0, 10, (*sign.size, 3)), 0, 255).astype(np.uint8)
        assert reader.read(noisy).shows(sign), sign


def test_prompts_for_words_are_rewarded_for_just_those_words():
    prompts = WordPrompts(20, seed=3)
    for row in prompts:
        assert f'"{row["words"]}"' in row["prompt"][0]["content"] and row["words"] not in WORDS
    wanted = [row["words"] for row in prompts]
    drawn = [Image.fromarray(render_sign(Sign(word, "red"))) for word in wanted]
    assert word_reward([row["prompt"] for row in prompts], drawn, wanted) == [2.0] * 20
    assert max(word_reward([None] * 19, drawn[1:], ["QZJ"] * 19)) < 1
    # Half of them in other ways.
    free = WordPrompts(60, seed=3, free_share=0.5)
    ways = [row["prompt"][0]["content"] for row in free]
    assert all(f'"{row["words"]}"' in way for row, way in zip(free, ways))
    usual = sum(re.fullmatch(r'the word "\w+" in \w+( on a \w+ background)?', way) is not None for way in ways)
    assert 20 < usual < 40
    # Some ways are kept from rewards as well, so that a score can tell what was taught from what carried over.
    sign, rng = Sign("OPEN", "red"), np.random.default_rng(0)
    kept, taught = ({ask_freely(sign, rng, own) for _ in range(40)} for own in (UNTAUGHT_PROMPTS, FREE_PROMPTS))
    assert len(kept) == len(taught) == 3 and not kept & taught


def test_edits_are_rewarded_for_the_changed_scene_alone(monkeypatch):
    made = []

    def recorded(*args, **kwargs):
        made.append(draw_edit(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr("nextflow_hf.scenes.rewards.draw_edit", recorded)
    rows = list(EditPrompts(30, seed=4))
    edits = [own for own in made if own is not None]
    prompts, wanted = [row["prompt"] for row in rows], [row["wanted"] for row in rows]
    assert [row["prompt"][0]["content"] for row in rows] == [own.text for own in edits]
    afters = [Image.fromarray(render(own.after, (64, 64))) for own in edits]
    assert scene_reward(prompts, afters, wanted) == [1.0] * 30
    befores = scene_reward(prompts, [row["images"][0] for row in rows], wanted)
    assert max(befores) <= 0.5
    assert SceneReward(processes=2)(prompts, [None, *(row["images"][0] for row in rows[1:])], wanted)[1:] == befores[1:]


def test_answers_are_rewarded_to_the_letter():
    rows = list(AnswerPrompts(40, seed=5, describes=0.5))
    wanted = [row["wanted"] for row in rows]
    said = [[{"role": "assistant", "content": f"{own}\n"}] for own in wanted]
    assert answer_reward(None, said, wanted) == [1.0] * 40
    assert answer_reward(None, [f"{own} or so" for own in wanted], wanted) == [0.0] * 40
    described = [row for row in rows if row["id"].startswith("description")]
    assert 10 < len(described) < 30
    for row in described:
        assert facts_match(parse(row["wanted"]), Referee((4, 4)).look(row["images"][0]))


def test_the_reader_does_not_guess():
    reader = SignReader()
    assert reader.read(np.full((48, 80, 3), 255, np.uint8)).text == ""
    noise = np.random.default_rng(0).integers(0, 256, (48, 80, 3)).astype(np.uint8)
    assert not set(reader.read(noise).text) - {"?"}
    spoiled = render_sign(Sign("SUN", "red"))
    spoiled[8:40, 32:48] = spoiled[8:40, 32:48][::-1, ::-1].copy()
    spoiled[20:24, 32:48] = (220, 20, 30)
    assert reader.read(Image.fromarray(spoiled)).text != "SUN"
    with pytest.raises(ValueError, match="A sign has"):
        reader.read(np.zeros((64, 64, 3), np.uint8))


def test_words_of_the_splits_do_not_meet():
    rng = np.random.default_rng(0)
    words = {
        split: {line for _ in range(300) for own in [draw_sign(rng, split)] for line in (own.text, *own.items)}
        for split in ("train", "validation", "test")
    }
    assert not words["train"] & set(WORDS) and not words["validation"] & words["test"]
    assert words["test"] | words["validation"] <= set(WORDS)


def test_signs_that_cannot_be_written_are_refused():
    for make in (
        lambda: Sign("lower", "red"),
        lambda: Sign("TOOLONG", "red"),
        lambda: Sign("OK", "brown"),
        lambda: Sign("FOUR", "red", items=("A",)),
    ):
        with pytest.raises(ValueError):
            make()
    assert letters_right("SUN", "SUN") == 1 and letters_right("", "SUN") == 0
    assert letters_right("SIN", "SUN") == pytest.approx(2 / 3)
    assert transcript(Sign("PET", "red", items=("CAT", "DOG"))) == "PET: CAT, DOG"


# ---- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_records_are_conversations_and_the_same_every_time(task):
    records = TaskRecords(task, (32, 32), 12, seed=3)
    for index in range(len(records)):
        own, again = records[index], TaskRecords(task, (32, 32), 12, seed=3)[index]
        assert own["messages"] == again["messages"]
        assert all(np.array_equal(*pair) for pair in zip(own["images"], again["images"], strict=True))
        roles = [turn["role"] for turn in own["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        places = sum(part["type"] == "image" for turn in own["messages"] for part in turn["content"])
        assert places == len(own["images"]) > 0


def test_pictures_of_a_task_show_trained_combinations_alone():
    referee = Referee()
    for task in ("draw", "ask", "edit", "in_context", "subject", "think", "story"):
        for index in range(8):
            for image in TaskRecords(task, (64, 64), 8, seed=4)[index]["images"]:
                reading = referee.look(image)
                assert reading.readable
                objects = tuple(
                    SceneObject(own.shape, own.color, own.size, tuple(round(c) for c in own.cell))
                    for own in reading.objects
                )
                assert is_trained(Scene(objects, reading.background)), task


def test_a_drawn_prompt_says_what_the_picture_shows():
    for index in range(30):
        record = TaskRecords("draw", (64, 64), 30, seed=5)[index]
        reading = Referee().look(record["images"][0])
        for text in record["messages"][0]["content"][0]["text"]:
            assert facts_match(parse(text), reading)
    assert not shows(Referee().look(render(SCENE)), Scene((CIRCLE,), "gray"))
    with pytest.raises(ValueError, match="A task is one of"):
        TaskRecords("fly")
    with pytest.raises(ValueError, match=r"has the options \['frames', 'kind'\]"):
        TaskRecords("story", questions=3)
    assert len(list(TaskRecords("edit", num_records=2))) == 2


def thought_of(turn):
    """The thought of an assistant's turn, and the words after it."""
    opening, _, rest = turn["content"][0]["text"].partition("<think>\n")
    thought, closing, words = rest.partition("\n</think>\n")
    assert not opening and thought and closing
    return thought, words


@pytest.mark.parametrize("task", ["edit", "edit_turns"])
def test_a_thought_before_an_edited_picture_tells_what_becomes_of_which(task):
    kinds = set()
    for record in TaskRecords(task, num_records=40, seed=4, thinks=1.0):
        *_, turn = record["messages"]
        assert turn["content"][1] == {"type": "image"}
        thought, words = thought_of(turn)
        before, after = (Referee().look(own) for own in record["images"][-2:])
        assert not words
        if thought.startswith("the background became "):
            assert thought == f"the background became {after.background}" and before.background != after.background
            kinds.add("background")
            continue
        gone, verb, made = re.fullmatch(r"(.+?) (became|is gone|came)(?: (.+))?", thought).groups()
        kinds.add(verb)
        gone, made = {"became": (gone, made), "is gone": (gone, None), "came": (None, gone)}[verb]
        there = [shown_once(gone, own) for own in (before, after)], [shown_once(made, own) for own in (before, after)]
        assert there == ([gone is not None, False], [False, made is not None])
    assert kinds == {"background", "became", "is gone", "came"}


def shown_once(words, reading):
    """Whether a picture shows one object of these words, which say everything about it."""
    if words is None:
        return False
    (group,) = parse(words).groups
    return sum(group.fits(own, reading.lattice) for own in reading.objects) == 1


def test_a_thought_before_going_by_examples_is_their_rule():
    rules = set()
    for record in TaskRecords("in_context", num_records=30, seed=4, thinks=1.0):
        thought, words = thought_of(record["messages"][-1])
        readings = [Referee().look(own) for own in record["images"]]
        rules.add(thought.rpartition(" ")[0])
        for after in readings[1::2]:
            shown = {own.color for own in after.objects} | {f"a {own.shape}" for own in after.objects}
            what, _, value = thought.partition(" becomes ")
            assert value in ("", after.background if what == "the background" else value) and not words
            assert what != "everything" or value in shown
    assert rules == {"everything becomes", "everything becomes a", "the background becomes", "left and right change"}


def test_thoughts_about_pictures_name_the_objects_that_the_answer_rests_on():
    for record in TaskRecords("ask", num_records=40, seed=4, thinks=1.0):
        reading = Referee().look(record["images"][0])
        for question, turn in zip(record["messages"][::2], record["messages"][1::2]):
            text = question["content"][-1]["text"]
            thought, answer = thought_of(turn)
            if text == "what color is the background?":
                assert answer == reading.background and thought == f"a {answer} background"
                continue
            told = [] if thought == "nothing" else thought.split(", ")
            assert all(shown_once(own, reading) for own in told)
            if text == "describe the picture":
                assert facts_match(parse(answer), reading) and len(told) == len(reading.objects)
            elif text.startswith("how many"):
                assert COUNTS[len(told)] == answer
            elif text.startswith("is there"):
                wanted = text.removeprefix("is there ").removesuffix("?").split()[1:]
                assert answer == ("yes" if any(set(wanted) <= set(own.split()) for own in told) else "no")
            elif text.startswith("is "):
                assert len(told) == 2
            else:
                assert len(told) == 1 and answer in told[0]


def test_a_thought_before_a_subject_names_it():
    for record in TaskRecords("subject", num_records=12, seed=4, thinks=1.0):
        thought, words = thought_of(record["messages"][-1])
        assert shown_once(thought, Referee().look(record["images"][0])) and not words


def test_thoughts_about_two_pictures_tell_what_becomes_of_which():
    for record in TaskRecords("compare", num_records=40, seed=4, thinks=1.0):
        thought, words = thought_of(record["messages"][-1])
        verbs = [verb for verb in ("became", "moved", "is gone", "came", "nothing") if re.search(rf"\b{verb}\b", words)]
        assert len(verbs) == 1 and verbs[0].replace("moved", "became") in thought
        before, after = (Referee().look(own) for own in record["images"])
        if thought.endswith(" came"):
            assert shown_once(thought.removesuffix(" came"), after)
        elif not thought.startswith(("nothing", "the background")):
            assert shown_once(re.split(r" became | is gone", thought)[0], before)


@pytest.mark.parametrize(
    ("task", "digest"),
    [
        ("ask", "94f2a5b98928"),
        ("edit", "f49d8ff2b6a4"),
        ("edit_turns", "914dc46cf450"),
        ("compare", "4a8972255442"),
        ("in_context", "f39c1b040e8f"),
        ("subject", "1acf2130982c"),
    ],
)
def test_records_without_thoughts_are_those_that_mini_was_trained_on(task, digest):
    record = TaskRecords(task, num_records=3, seed=4)[2]
    content = json.dumps(record["messages"]).encode() + b"".join(own.tobytes() for own in record["images"])
    assert hashlib.sha256(content).hexdigest()[:12] == digest


@pytest.mark.parametrize("task", ["draw", "ask", "edit", "compare", "in_context", "subject"])
def test_renamed_records_keep_to_their_new_names(task):
    """Nothing changes but the names: what comes back under the old ones is the same record."""
    plain = TaskRecords(task, num_records=60, seed=5, told=1.0)
    renamed = TaskRecords(task, num_records=60, seed=5, told=1.0, renamed=1.0)
    shapes = {*SHAPES, *PLURALS.values()}
    kinds = set()
    for pair in zip(plain, renamed):
        parts = [[part for turn in own["messages"] for part in turn["content"]] for own in pair]
        texts = [str([(part["text"], part.get("description")) for part in own]) for own in parts]
        # "an orange" becomes "a ripe".
        one, other = (["a" if word == "an" else word for word in re.findall("[a-z]+", own)] for own in texts)
        names = {}
        for before, after in zip(one, other, strict=True):
            assert names.setdefault(before, after) == after
        assert len(set(names.values())) == len(names)
        changed = {before for before, after in names.items() if before != after}
        assert changed and changed <= shapes | {*COLORS}
        kinds.add((bool(changed & {*COLORS}), bool(changed & shapes)))
    assert kinds == {(True, False), (False, True), (True, True)}
    assert all(len({*names}) == len(names) for names in (OTHER_COLORS, OTHER_SHAPES))
    assert not ({*OTHER_COLORS} & {*OTHER_SHAPES}) and not (shapes | {*COLORS}) & {*OTHER_COLORS, *OTHER_SHAPES}
    assert not any(own[0] in "aeiou" for own in (*OTHER_COLORS, *OTHER_SHAPES))
