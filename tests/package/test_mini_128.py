"""The bundled checkpoint of twice the side: it goes on where mini's scales end."""

import numpy as np
import pytest

from nextflow_hf.inference import describe_pictures, draw_prompts, load
from nextflow_hf.scenes import Referee, make_prompts
from nextflow_hf.scenes.world import lattice_for


@pytest.fixture(scope="module")
def loaded():
    return load("mini-128")


def test_its_codes_are_those_of_mini(loaded):
    mini, _ = load("mini")
    assert loaded[0].vq_model.fingerprint() == mini.vq_model.fingerprint()
    assert loaded[0].config.trained_image_sizes[0] == [128, 128]


@pytest.mark.parametrize(
    ("size", "num_scales", "shown"),
    [
        ((128, 128), None, (128, 128)),
        ((128, 128), 6, (64, 64)),
        ((96, 160), None, (96, 160)),
        ((64, 64), None, (64, 64)),
    ],
)
def test_it_draws_what_is_asked_for_at_every_size(loaded, size, num_scales, shown):
    # Unseen combinations, of which one may fail.
    prompts = make_prompts("two_object", 4)
    more = {} if num_scales is None else {"num_scales": num_scales}
    pictures = draw_prompts(*loaded, [own.text for own in prompts], range(4), image_size=size, **more)
    assert {own.size[::-1] for own in pictures} == {shown}
    referee = Referee(lattice_for(size))
    assert np.sum([referee.judge(own, prompt.facts).passed for own, prompt in zip(pictures, prompts)]) >= 3


def test_it_reads_what_it_draws(loaded):
    prompts = ["two red circles on a black background", "a large blue star on a white background"]
    said = describe_pictures(*loaded, draw_prompts(*loaded, prompts, [0, 1]))
    assert "two" in said[0] and "red" in said[0] and "star" in said[1]
