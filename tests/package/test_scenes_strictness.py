"""The referee's strictness, and facts and prompts at their limits."""

import numpy as np
import pytest

from nextflow_hf.scenes import (
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    Facts,
    Group,
    Referee,
    Scene,
    SceneObject,
    calibrate,
    facts_match,
    make_prompts,
    render,
    sample_scene,
    scene_for,
)
from nextflow_hf.scenes.calibration import DEFECTS, complete_facts, degrade, spoil
from nextflow_hf.scenes.prompts import keys_in

CIRCLE = Group(1, "circle")
STAR = Group(1, "star")


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("size", [(64, 64), (64, 48), (128, 128)])
def test_spoiled_pictures_fail(defect, size):
    referee, rng = Referee(), np.random.default_rng(11)
    passed = [
        referee.judge(spoil(scene, defect, rng, size), complete_facts(scene)).passed
        for scene in (sample_scene(rng, "test") for _ in range(40))
    ]
    assert not any(passed)


def test_two_specks_spoil_a_picture_and_a_single_odd_pixel_does_not():
    scene = Scene((SceneObject("circle", "red", "small", (0, 0)),))
    picture = render(scene)
    picture[40, 40] = COLORS["blue"]
    assert Referee().judge(picture, complete_facts(scene)).passed
    picture[40:42, 40:43] = picture[50:52, 20:23] = COLORS["blue"]
    assert "explain" in Referee().look(picture).reason


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_strictness_does_not_cost_true_pictures(color, background):
    rng = np.random.default_rng(12)
    facts = Facts((Group(1, "star", color, "small"), Group(1, "cross", color, "small")), None, background)
    scene = scene_for(facts, rng)
    for picture in (render(scene), degrade(render(scene), rng), render(scene, (128, 128))):
        assert Referee().judge(picture, facts).passed


def test_calibration_reports_what_spoiled_pictures_do():
    assert calibrate(100, seed=3)["spoiled_accepts"] == 0
    assert calibrate(5, seed=4) == calibrate(5, seed=4)


def test_claims_find_their_objects_whatever_the_order():
    scene = Scene(
        (SceneObject("circle", "red", "small", (0, 0)), SceneObject("circle", "blue", "small", (2, 2))), "white"
    )
    # The general claim comes first and must leave the red circle to the particular one.
    assert facts_match(Facts((CIRCLE, Group(1, "circle", "red"))), scene)
    assert not facts_match(Facts((Group(1, "circle", "red"), Group(1, "circle", "red"))), scene)


def test_many_objects_are_matched_at_once():
    objects = tuple(SceneObject("circle", "red", "small", (i // 4, i % 4)) for i in range(16))
    assert facts_match(Facts((Group(4, "circle"),) * 4), Scene(objects))
    assert not facts_match(Facts((*(CIRCLE,) * 15, STAR)), Scene(objects))


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_sentences_repeat_only_when_all_were_used(category, split):
    every = {prompt.text for prompt in make_prompts(category, 20_000, split)}
    prompts = make_prompts(category, 100, split)
    assert len({prompt.text for prompt in prompts}) == min(100, len(every))


@pytest.mark.parametrize("category", CATEGORIES)
def test_combinations_take_turns_and_seeds_differ(category):
    number = len(keys_in(category, "test"))
    shown = {
        frozenset((g.count, g.shape, g.color, g.size) for g in p.facts.groups) for p in make_prompts(category, number)
    }
    assert len(shown) > number // 2
    assert make_prompts(category, 50, seed=1) != make_prompts(category, 50, seed=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Group(0, "circle"), "1 to 4"),
        (lambda: Group(5, "circle"), "1 to 4"),
        (lambda: Group(1, "blob"), "shape"),
        (lambda: Group(1, "circle", "beige"), "color"),
        (lambda: Group(1, "circle", None, "huge"), "size"),
        (lambda: Facts((CIRCLE,), None, "plaid"), "background"),
        (lambda: Facts((CIRCLE, STAR), "beside"), "relation"),
        (lambda: Facts((CIRCLE,), "above"), "relation"),
        (lambda: Facts((Group(2, "circle"), STAR), "above"), "relation"),
        (lambda: make_prompts("colors", 3, "dev"), "split"),
        (lambda: scene_for(Facts((Group(1, "circle", None, "large"),) * 2), np.random.default_rng(0)), "no room"),
        (lambda: scene_for(Facts((CIRCLE,) * 9), np.random.default_rng(0)), "no room"),
        (lambda: calibrate(0), "at least one"),
        (lambda: Referee((0, 4)), "lattice"),
        (lambda: spoil(Scene(()), "hole", np.random.default_rng(0)), "empty"),
        (lambda: spoil(Scene(()), "rust", np.random.default_rng(0)), "defect"),
    ],
)
def test_refuses_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
