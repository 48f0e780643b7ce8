"""Likelihoods of answers: what is drawn or said is as likely as it was when it was chosen."""

import numpy as np
import pytest
import torch
from PIL import Image

from nextflow_hf.inference import assistant, load, prepare, user
from nextflow_hf.likelihood import answer_log_probs, picture_log_probs
from nextflow_hf.scenes import Scene, SceneObject, render

PICTURE = Image.fromarray(render(Scene((SceneObject("circle", "red", "small", (1, 0)),))))
WIDE = Image.fromarray(render(Scene((SceneObject("star", "blue", "large", (0, 1)),), lattice=(3, 5)), (48, 80)))
ASKED = [[user(PICTURE, "what color is the circle?")], [user(PICTURE, WIDE, "what changed?")]]


@pytest.fixture(scope="module")
def mini():
    return load("mini")


def test_words_are_as_likely_as_when_they_were_said(mini):
    model, processor = mini
    inputs = prepare(processor, ASKED)
    output = model.generate(
        **inputs, max_new_tokens=20, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    said = output.sequences[:, inputs["input_ids"].shape[1] :]
    log_probs = torch.stack(output.logits, dim=1)[..., : model.config.code_start_id].log_softmax(-1)
    log_probs = log_probs.gather(-1, said[..., None])[..., 0]
    wanted = [own[: (row == processor.tokenizer.eos_token_id).int().argmax() + 1] for own, row in zip(log_probs, said)]
    texts = processor.batch_decode(said, skip_special_tokens=True)
    ended = [[*talk, assistant(text)] for talk, text in zip(ASKED, texts)]
    found = answer_log_probs(model, processor, ended)
    torch.testing.assert_close(found, torch.stack([own.sum() for own in wanted]), atol=1e-3, rtol=0)
    # Of words that more may follow, all but their end; and of none, nothing.
    ends = torch.stack([own[-1] for own in wanted])
    torch.testing.assert_close(answer_log_probs(model, processor, ended, goes_on=True), found - ends, atol=1e-3, rtol=0)
    none = [[*talk, assistant("")] for talk in ASKED]
    assert answer_log_probs(model, processor, none, goes_on=True).tolist() == [0.0, 0.0]
    # What a template adds stands before the words.
    thinks = [[*talk, assistant("<think>\n" + text)] for talk, text in zip(ASKED, texts)]
    opening = [[*talk, assistant("<think>\n")] for talk in ASKED]
    rest = answer_log_probs(model, processor, thinks) - answer_log_probs(model, processor, opening, goes_on=True)
    after = answer_log_probs(model, processor, ended, enable_thinking=True)
    torch.testing.assert_close(after, rest, atol=1e-3, rtol=0)
    worse = [[*talk, assistant("seven")] for talk in ASKED]
    assert (answer_log_probs(model, processor, worse, batch_size=1) < found).all()


def test_a_picture_is_as_likely_as_when_it_was_drawn(mini):
    model, processor = mini
    asked = [[user("a red circle")], [user(PICTURE, "make the circle blue")]]
    drawn = model.generate(
        **prepare(processor, asked),
        generation_mode="image",
        seed=[3, 4],
        image_size=(64, 64),
        guidance_scale=0.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
    )
    # The codes of a decoded picture need not be those that it was drawn by.
    given = iter(drawn.codes)
    encode = model.model.encode_images

    def encoded(pixels, grids=None):
        codes, own = encode(pixels, grids)
        return (torch.stack([next(given), next(given)]) if len(codes) == 2 else codes), own

    model.model.encode_images = encoded
    try:
        pictures = processor.post_process_multimodal_output(drawn, generation_mode="image")
        ended = [[*talk, assistant(picture)] for talk, picture in zip(asked, pictures)]
        found = picture_log_probs(model, processor, ended)
    finally:
        del model.model.encode_images
    torch.testing.assert_close(found, torch.stack([own.sum() for own in drawn.log_probs]), atol=2e-3, rtol=1e-5)


def test_pictures_are_scored_one_by_one_as_in_a_batch(mini):
    ended = [
        [user("a small red circle on the left"), assistant(PICTURE)],
        [user("a large blue star"), assistant(WIDE)],
        [user("a large blue star"), assistant(PICTURE)],
        [user(PICTURE, WIDE, "do the same"), assistant(WIDE)],
    ]
    together, apart = (picture_log_probs(*mini, ended, batch_size=size) for size in (4, 1))
    torch.testing.assert_close(together, apart, atol=1e-2, rtol=1e-4)
    assert np.argmax(together[[0, 2]]) == 0


@pytest.mark.parametrize(
    ("score", "ended", "message"),
    [
        (answer_log_probs, [user("a star")], "turn of text alone"),
        (answer_log_probs, [user("a star"), assistant(PICTURE)], "turn of text alone"),
        (picture_log_probs, [user("a star"), assistant("a star")], "turn of its own"),
        (picture_log_probs, [user("a star"), assistant("here: ", PICTURE)], "turn of its own"),
        (picture_log_probs, [assistant(PICTURE)], "no turns"),
    ],
)
def test_refuses_what_ends_otherwise(mini, score, ended, message):
    with pytest.raises(ValueError, match=message):
        score(*mini, [ended])
