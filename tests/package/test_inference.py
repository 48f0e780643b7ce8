"""Answers that begin with a thought, in batches."""

import numpy as np
import pytest
from PIL import Image

from nextflow_hf.inference import answer, assistant, draw, load, prepare, tell, think, user

RIDDLES = ["as many stars as one plus two", "a circle in the color of the sky"]


@pytest.fixture(scope="module")
def mini():
    return load("mini")


def test_thinking_and_then_drawing_is_telling(mini):
    """Two prompts of different lengths in one batch, and each told alone."""
    conversations = [[user(text)] for text in RIDDLES]
    thoughts = think(*mini, conversations)
    begun = [[*own, assistant(thought)] for own, thought in zip(conversations, thoughts)]
    pictures = draw(*mini, begun, [4, 5], image_size=(64, 64))
    told = tell(*mini, conversations, [4, 5], enable_thinking=True, max_images=1)
    for thought, picture, parts in zip(thoughts, pictures, told):
        assert parts[0] == thought and thought.startswith("<think>\n") and thought.endswith("\n</think>\n")
        assert np.abs(np.asarray(picture, int) - np.asarray(parts[1], int)).max() <= 1


def test_a_thought_without_an_end_is_closed(mini):
    (thought,) = think(*mini, [[user(RIDDLES[0])]], max_new_tokens=3)
    (whole,) = think(*mini, [[user(RIDDLES[0])]])
    assert thought.endswith("\n</think>\n") and len(thought) < len(whole)


def test_an_answer_goes_on_with_what_was_said(mini):
    model, processor = mini
    picture = draw(model, processor, [[user("a small red circle on the left on a white background")]], [1])[0]
    asked = [user(picture, "describe the picture")]
    (whole,) = answer(model, processor, [asked])
    words = whole.split(" ")
    (rest,) = answer(model, processor, [[*asked, assistant(" ".join(words[:3]))]])
    assert rest == " " + " ".join(words[3:])


@pytest.mark.parametrize(
    ("conversations", "template", "message"),
    [
        (
            [[user("a red circle")], [user("a red circle"), assistant("<think>")]],
            {},
            "Either all conversations or none",
        ),
        ([[user("a red circle"), assistant("a")]], {"enable_thinking": True}, "A thought begins an answer"),
        ([[user("a red circle"), assistant(Image.new("RGB", (64, 64)))]], {}, "not after a picture"),
        ([[]], {}, "no turns"),
    ],
)
def test_conversations_that_cannot_go_on_are_refused(mini, conversations, template, message):
    with pytest.raises(ValueError, match=message):
        prepare(mini[1], conversations, **template)
