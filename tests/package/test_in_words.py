"""Conversations in words: what becomes of their pictures, and what a model makes of them."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from nextflow_hf import ADAPTERS, MINI
from nextflow_hf import in_words as way
from nextflow_hf.conversations import in_words
from nextflow_hf.evaluation import weights_hash
from nextflow_hf.in_words import (
    add_adapter,
    answer_in_words,
    draw_in_words,
    edit_in_words,
    look,
    looking,
    reply_in_words,
    think_and_answer,
    thinking,
)
from nextflow_hf.inference import answer, assistant, draw, load, user
from nextflow_hf.scenes import Referee, Scene, SceneObject, TaskRecords, facts_match, parse, render

PICTURE = Image.fromarray(
    render(Scene((SceneObject("circle", "red", "small", (1, 0)), SceneObject("star", "blue", "large", (0, 2)))))
)
EDIT = [user(PICTURE, "make the circle green")]


@pytest.fixture(scope="module")
def mini():
    model, processor = load("mini")
    add_adapter(model, "mini")
    return model, processor


def texts(conversation):
    return ["".join(part["text"] for part in turn["content"]) for turn in conversation]


def test_words_take_the_places_of_pictures():
    talk = [
        {"role": "system", "content": "draw well"},
        user(PICTURE, "make it blue"),
        assistant("here it is: ", PICTURE),
        user("what changed from ", PICTURE, "?"),
    ]
    told = in_words(talk, ["a red star", "a blue star", "a star"])
    assert texts(told) == [
        "draw well",
        "a picture of a red star. make it blue",
        "here it is: a blue star",
        "what changed from a picture of a star. ?",
    ]
    assert [turn["role"] for turn in told] == [turn["role"] for turn in talk]
    assert in_words([user("a red star")], []) == [user("a red star")]


@pytest.mark.parametrize(("descriptions", "message"), [([], "more pictures"), (["one", "two"], "fewer pictures")])
def test_every_picture_needs_its_description(descriptions, message):
    with pytest.raises(ValueError, match=message):
        in_words(EDIT, descriptions)


@pytest.mark.parametrize("task", ["edit", "edit_turns", "compare", "in_context", "subject", "ask"])
def test_told_records_are_those_of_pictures_in_words(task):
    referee = Referee((4, 4))
    records = TaskRecords(task, num_records=8, seed=5), TaskRecords(task, num_records=8, seed=5, told=1.0)
    for shown, told in zip(*records):
        assert told["images"] == [] and len(told["messages"]) == len(shown["messages"])
        # Every turn is learned.
        assert not any("weight" in turn for turn in told["messages"])
        pictures = iter(shown["images"])
        for turn, own in zip(shown["messages"], told["messages"]):
            for part, words in zip(turn["content"], own["content"], strict=True):
                if part["type"] == "text":
                    assert words == part
                    continue
                text = words["text"].removeprefix("a picture of ").removesuffix(". ")
                assert (own["role"] == "user") == (text != words["text"])
                assert facts_match(parse(text), referee.look(next(pictures)))


def test_words_in_pictures_are_not_told():
    with pytest.raises(ValueError, match="not told in words"):
        TaskRecords("sign", told=0.5)


def test_everything_is_described_with_places():
    for record in TaskRecords("describe", num_records=6, seed=6):
        question, said = record["messages"]
        assert question["content"][1]["text"] == "describe the picture with places"
        facts = parse(said["content"][0]["text"])
        assert all(group.size and group.color and group.place for group in facts.groups) and facts.background
        assert facts_match(facts, Referee((4, 4)).look(record["images"][0]))


def test_drawing_in_words_is_looking_thinking_and_drawing(mini):
    (told,) = look(*mini, [EDIT])
    assert texts(told)[0].startswith("a picture of ") and texts(told)[0].endswith("make the circle green")
    (prompt,) = answer_in_words(*mini, [EDIT])
    ((_, said),) = think_and_answer(*mini, [told])
    assert said == prompt
    (picture,) = draw_in_words(*mini, [EDIT], [3], image_size=(64, 64), drafts=1)
    drafting = GenerationConfig.from_pretrained(ADAPTERS["mini"])
    (again,) = draw(*mini, [[user(prompt)]], [3], image_size=(64, 64), generation_config=drafting)
    assert np.array_equal(picture, again)
    assert np.array_equal(picture, edit_in_words(*mini, PICTURE, "make the circle green", seed=3, drafts=1))
    greedy = {"guidance_scale": 0.0, "temperature": 0.0}
    own, plain = (
        draw_in_words(*mini, [EDIT], [3], image_size=(64, 64), drafts=1, **greedy),
        draw(*mini, [[user(prompt)]], [3], image_size=(64, 64), **greedy),
    )
    assert np.array_equal(own[0], plain[0])


def test_a_conversation_in_words_goes_on_from_what_was_meant(mini):
    (turn,) = reply_in_words(*mini, [EDIT], [3], image_size=(64, 64), drafts=1)
    *thought, part = turn["content"]
    ((wanted, _),) = think_and_answer(*mini, look(*mini, [EDIT]))
    assert [own["text"] for own in thought] == ([wanted] if wanted else [])
    assert np.array_equal(part["image"], draw_in_words(*mini, [EDIT], [3], image_size=(64, 64), drafts=1)[0])
    (prompt,) = answer_in_words(*mini, [EDIT])
    assert part["description"] == prompt
    said = {**turn, "content": [*thought, {**part, "description": "a small pink cross"}]}
    again = user("make the background gray")
    (told,) = look(*mini, [[*EDIT, said, again]])
    assert texts(told)[:2] == [texts(look(*mini, [EDIT])[0])[0], f"{wanted}a small pink cross"]
    # Whoever looks at the picture itself is not told what it was to be.
    plain = {**turn, "content": [*thought, {"type": "image", "image": part["image"]}]}
    pictures = [draw(*mini, [[*EDIT, own, again]], [5], image_size=(64, 64))[0] for own in (said, plain)]
    assert np.array_equal(*pictures)


BEFORE, AFTER = ({"type": "image", "description": f"a {own} star"} for own in ("red", "blue"))


@pytest.mark.parametrize(
    ("asked", "reverse", "expected"),
    [
        # An edit is checked by comparing.
        (
            [user(BEFORE, "make the star blue")],
            [user("a picture of a red star. ", "a picture of one. ", "what changed?"), assistant("A\n</think>\n")],
            "two",
        ),
        # So is one of what was drawn before.
        (
            [user(BEFORE, "make it blue"), assistant("<think>\nB\n</think>\n", AFTER), user("make it red")],
            [user("a picture of a blue star. ", "a picture of one. ", "what changed?"), assistant("A\n</think>\n")],
            "two",
        ),
        # A comparison is checked by editing.
        (
            [user(BEFORE, AFTER, "what changed?")],
            [user("a picture of a red star. ", "one"), assistant("A\n</think>\na blue star")],
            "two",
        ),
        # "Nothing" is right of what is told alike, and of nothing else.
        ([user(BEFORE, BEFORE, "one?")], "nothing", "one"),
        ([user(BEFORE, AFTER, "two?")], "nothing", "two"),
        # Of three pictures, and of none, the likeliest is taken.
        ([user(BEFORE, AFTER, BEFORE, "do the same")], None, "one"),
        ([user("a star")], None, "one"),
    ],
)
def test_what_changes_is_checked_the_other_way_round(mini, monkeypatch, asked, reverse, expected):
    model, _ = mini
    scored = []

    def guessed(model, processor, talks, guesses, **kwargs):
        assert kwargs["enable_thinking"] and guesses == 3
        # The third comes to no words.
        said = ["A\n</think>\none", "B\n</think>\ntwo ", "C without an end"]
        if reverse == "nothing":
            said = ["A\n</think>\nnothing", "B\n</think>\ntwo", "C"]
        return said * len(talks), torch.tensor([-1.0, -3.5, -0.5] * len(talks))

    def log_probs(model, processor, conversations, *args, **kwargs):
        assert kwargs["goes_on"] and kwargs["enable_thinking"]
        scored.extend(conversations)
        # The first is found unlikely beyond the least that counts: -1.0 - 3.0 against -3.5 - 0.3.
        return torch.tensor([-50.0, -1.0] * (len(conversations) // 2) if reverse != "nothing" else [-1.0, -1.0])

    monkeypatch.setattr(way, "guess", guessed)
    monkeypatch.setattr(way, "answer_log_probs", log_probs)
    monkeypatch.setattr(model, "thinks_in_words", True)
    told = look(*mini, [asked] * 2)
    found = think_and_answer(*mini, told, guesses=3)
    if reverse == "nothing":
        # -1.0 against -3.5 - 0.3 where they are alike, else -1.0 - 3.0.
        assert {words for _, words in found} == {"nothing" if expected == "one" else "two"} and len(scored) == 2
        return
    assert found == [(f"<think>\n{'A' if expected == 'one' else 'B'}\n</think>\n", expected)] * 2
    assert len(scored) == (0 if reverse is None else 4)
    if reverse is not None:
        assert texts(scored[0]) == texts(reverse)


def test_whoever_did_not_learn_to_think_answers_at_once(mini, monkeypatch):
    monkeypatch.setattr(mini[0], "thinks_in_words", False)
    monkeypatch.setattr(way, "answer", lambda model, processor, talks, *args, **kwargs: [" a star "] * len(talks))
    assert think_and_answer(*mini, [[user("a star")]] * 2) == [("", "a star")] * 2


def test_an_answer_that_has_begun_goes_on(mini, monkeypatch):
    monkeypatch.setattr(mini[0], "thinks_in_words", True)
    begun = [user(PICTURE, "where is the star?"), assistant("<think>\na large blue star at the top right\n</think>\n")]
    (said,) = answer_in_words(*mini, [begun])
    told = look(*mini, [begun])
    with thinking(mini[0]):
        assert said == answer(*mini, told)[0].strip()


def test_a_whole_checkpoint_says_itself_whether_it_thinks(monkeypatch):
    model, processor = load("mini")
    begun = []

    def guessed(model, processor, talks, guesses, **kwargs):
        begun.append(kwargs["enable_thinking"])
        return ["A\n</think>\na star"] * guesses * len(talks), torch.zeros(guesses * len(talks))

    monkeypatch.setattr(way, "guess", guessed)
    monkeypatch.setattr(way, "answer", lambda *args, **kwargs: ["a circle"])
    assert think_and_answer(model, processor, [[user("a star")]]) == [("", "a circle")]
    model.generation_config.enable_thinking = True
    assert think_and_answer(model, processor, [[user("a star")]]) == [("<think>\nA\n</think>\n", "a star")]
    assert begun and all(begun)


def test_the_draft_that_goes_best_with_its_prompt_is_kept(mini, monkeypatch):
    prompts = ["a small red circle", "a large blue star"]
    monkeypatch.setattr(way, "look", lambda model, processor, conversations, *args, **kwargs: conversations)
    monkeypatch.setattr(way, "think_and_answer", lambda *args, **kwargs: [("", own) for own in prompts])
    read, drawn = iter([[-5.0, -1.0], [-2.0, -3.0]]), iter([[-10.0, -60.0], [-20.0, -10.0]])
    scored = []

    def log_probs(model, processor, conversations, resolution, scores):
        scored.append([own[-1]["content"][0].get("text") for own in conversations])
        return torch.tensor(next(scores))

    monkeypatch.setattr(way, "answer_log_probs", partial(log_probs, scores=read))
    monkeypatch.setattr(way, "picture_log_probs", partial(log_probs, scores=drawn))
    plain = {"temperature": 1.0, "top_p": 0.9, "guidance_scale": 0.0}
    kept = draw_in_words(*mini, [EDIT, EDIT], [3, 4], drafts=2, image_size=(64, 64), **plain)
    assert scored == [prompts, [None, None]] * 2
    # -5.5 and -4.0 of the first, -3.0 and -3.5 of the second; a second draft has a seed of its own.
    drafts = draw(*mini, [[user(own)] for own in prompts], [3 + 1_000_003, 4 + 1_000_003], image_size=(64, 64), **plain)
    assert all(np.abs(np.asarray(own, int) - np.asarray(draft, int)).max() <= 1 for own, draft in zip(kept, drafts))


def test_of_several_guesses_the_one_that_would_be_drawn_so_is_chosen(mini, monkeypatch):
    talk = [[user(PICTURE, "what is it?")], [user("no picture")]]
    (plain, _) = look(*mini, talk, guesses=1)
    offered = []

    def log_probs(model, processor, conversations, *args):
        assert all(own[-1]["content"] == [talk[0][0]["content"][0]] for own in conversations)
        offered.extend(own[0]["content"][0]["text"] for own in conversations)
        return torch.tensor([-1000.0 * (index != 3) for index in range(len(conversations))])

    monkeypatch.setattr(way, "picture_log_probs", log_probs)
    (told, other) = look(*mini, talk, guesses=4)
    assert len(set(offered)) == 4 and texts(plain)[0].startswith(f"a picture of {offered[0].strip()}")
    assert texts(told) == [f"a picture of {offered[3].strip()}. what is it?"] and texts(other) == ["no picture"]


def test_who_does_not_draw_reads_word_after_word(mini, monkeypatch):
    plain = look(*mini, [EDIT], guesses=1)
    monkeypatch.setattr(mini[0].config, "abilities", ["caption", "text"])
    assert look(*mini, [EDIT]) == plain


def test_what_is_not_told_in_words_is_not_changed_by_the_adapter(mini):
    """Drawn and answered at once as without it, before and after it was on; text alone only while it is on."""
    plain = load("mini")
    told = look(*mini, [EDIT])
    for talk in (EDIT, [user("a red circle")]):
        assert np.array_equal(draw(*plain, [talk], [5])[0], draw(*mini, [talk], [5])[0])
    asked = [[user(PICTURE, "what color is the star?")]]
    assert answer(*plain, asked) == answer(*mini, asked)
    with pytest.raises(ValueError, match="not trained for 'text'"):
        answer(*mini, told)


def test_the_bundled_adapter_is_of_the_bundled_weights():
    log = json.loads((Path(ADAPTERS["mini"]) / "evaluation.json").read_text())
    assert log["settings"]["weights_sha256"] == weights_hash(MINI)


def test_an_adapter_of_another_model_is_refused_and_leaves_nothing():
    words, its_processor = load("mini-words")
    asked = [[user('the word "OPEN" in green')]]
    (before,) = draw(words, its_processor, asked, [3], image_size=(48, 80))
    with pytest.raises(ValueError, match="another shape"):
        add_adapter(words, "mini")
    assert not hasattr(words, "peft_config")
    assert np.array_equal(before, draw(words, its_processor, asked, [3], image_size=(48, 80))[0])


def test_one_adapter_may_look_and_another_think(tmp_path):
    """Each on for its own part; a folder without `think` has one for both."""
    bundled = Path(ADAPTERS["mini"])
    for place, scale, settings in ((tmp_path, 1.0, {}), (tmp_path / "think", 2.0, {"enable_thinking": True})):
        place.mkdir(exist_ok=True)
        weights = load_file(bundled / "adapter_model.safetensors")
        save_file({name: scale * own for name, own in weights.items()}, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text((bundled / "adapter_config.json").read_text())
        GenerationConfig(image_top_k=scale, **settings).save_pretrained(place)

    def outputs(model):
        """Of one layer that the adapters change: while looking, while thinking, and else."""
        layer, given = model.model.connector.linear_1, torch.ones(1, model.model.connector.linear_1.in_features)
        with looking(model):
            looked = layer(given)
        with thinking(model):
            thought = layer(given)
        return looked, thought, layer(given)

    model, _ = load("mini")
    plain = model.model.connector.linear_1(torch.ones(1, model.model.connector.linear_1.in_features))
    hashes = [weights_hash(str(tmp_path))]
    add_adapter(model, str(tmp_path))
    assert model.thinks_in_words and model.drafting.image_top_k == 1.0
    looked, thought, off = outputs(model)
    assert torch.equal(off, plain) and not torch.allclose(looked, plain)
    torch.testing.assert_close(thought - plain, 4 * (looked - plain), atol=1e-4, rtol=1e-3)

    shutil.rmtree(tmp_path / "think")
    hashes.append(weights_hash(str(tmp_path)))
    model, _ = load("mini")
    add_adapter(model, str(tmp_path))
    looked, thought, off = outputs(model)
    assert not model.thinks_in_words and torch.equal(looked, thought) and torch.equal(off, plain)
    assert len(set(hashes)) == 2


@pytest.mark.parametrize("folder", ["", "think"])
def test_an_adapter_that_is_not_whole_is_refused_and_leaves_nothing(tmp_path, folder):
    for place in (tmp_path, tmp_path / "think"):
        shutil.copytree(ADAPTERS["mini"], place, dirs_exist_ok=True, ignore=lambda *_: ["think"])
    weights = load_file(tmp_path / folder / "adapter_model.safetensors")
    weights.pop("base_model.model.model.connector.linear_1.lora_B.weight")
    save_file(weights, tmp_path / folder / "adapter_model.safetensors")
    model, _ = load("mini")
    with pytest.raises(ValueError, match=r"lacks 1 of its weights, such as 'model.connector.linear_1.lora_B"):
        add_adapter(model, str(tmp_path))
    assert not getattr(model, "peft_config", None)
    (tmp_path / "think" / "adapter_model.safetensors").unlink()
    shutil.copy(Path(ADAPTERS["mini"]) / "adapter_model.safetensors", tmp_path)
    with pytest.raises(OSError, match="adapter_model"):
        add_adapter(model, str(tmp_path))
    assert not getattr(model, "peft_config", None)
    add_adapter(model, "mini")


def test_a_second_adapter_is_refused(mini):
    with pytest.raises(ValueError, match="already exists"):
        add_adapter(mini[0], "mini")


def test_no_draft_and_no_guess_are_refused(mini):
    with pytest.raises(ValueError, match="At least one draft"):
        draw_in_words(*mini, [EDIT], [3], drafts=0)
    with pytest.raises(ValueError, match="At least one guess"):
        look(*mini, [EDIT], guesses=0)


def test_no_words_are_not_drawn(mini, monkeypatch):
    given = []

    def nothing(model, processor, told, batch_size, max_new_tokens, guesses):
        given.append((max_new_tokens, guesses))
        return [("<think>\n</think>\n", "")]

    monkeypatch.setattr(way, "think_and_answer", nothing)
    with pytest.raises(ValueError, match="no words for conversation 0 in 7 tokens"):
        draw_in_words(*mini, [EDIT], [3], guesses=1, max_new_tokens=7)
    assert given == [(7, 1)]
