import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from nextflow_hf.scenes import (
    CATEGORIES,
    COLORS,
    SHAPES,
    SIZES,
    Facts,
    Group,
    Referee,
    Scene,
    SceneObject,
    SceneRecords,
    SceneSource,
    calibrate,
    caption,
    caption_with_places,
    describe,
    facts_match,
    is_complete,
    lattice_for,
    make_prompts,
    parse,
    relation,
    render,
    sample_scene,
    scene_for,
)
from nextflow_hf.scenes.prompts import keys_in
from nextflow_hf.scenes.sampling import ARRANGEMENTS, keys_of, split_of
from nextflow_hf.scenes.world import named_cells


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [sample_scene(rng) for _ in range(3000)]


def test_families_are_drawn_by_their_shares():
    rng = np.random.default_rng(0)
    shares = (0.1, 0.15, 0.45, 0.3)
    scenes = [sample_scene(rng, arrangement="orderly", families=shares) for _ in range(2000)]
    alone = np.mean([len(scene.objects) == 1 for scene in scenes])
    several = np.mean(
        [len(scene.objects) > 2 and len({(o.color, o.shape) for o in scene.objects}) > 1 for scene in scenes]
    )
    # Scenes with a held-out combination are drawn anew, which takes from the families whose combinations are few.
    assert 0.06 < alone < 0.11 and 0.35 < several < 0.45


def test_training_never_sees_a_held_out_combination(scenes):
    assert all(split_of(key) == "train" for scene in scenes for key in keys_of(scene))


def test_training_sees_every_color_shape_size_and_number(scenes):
    lone = [scene.objects[0] for scene in scenes if len(scene.objects) == 1]
    assert {own.shape for own in lone} == set(SHAPES) and {own.color for own in lone} == set(COLORS)
    assert {own.size for own in lone} == set(SIZES)
    assert set(Counter(len(scene.objects) for scene in scenes)) == {1, 2, 3, 4}
    pairs = [scene.objects for scene in scenes if len(scene.objects) == 2]
    assert {relation(*pair) for pair in pairs} == {"left of", "right of", "above", "below", None}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_other_splits_always_show_one_of_theirs(split):
    rng = np.random.default_rng(1)
    for _ in range(100):
        assert split in {split_of(key) for key in keys_of(sample_scene(rng, split))}


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_category_has_combinations_in_every_split(category):
    sizes = {split: len(keys_in(category, split)) for split in ("train", "validation", "test")}
    assert sizes["train"] > sizes["test"] >= 2 and sizes["validation"] >= 1


def test_captions_are_true_and_can_be_read_back(scenes):
    rng = np.random.default_rng(2)
    for scene in scenes:
        facts = parse(caption(scene, rng))
        assert facts is not None and facts_match(facts, scene)


def test_a_place_in_a_caption_decides_where_an_object_lies():
    rng = np.random.default_rng(2)
    for _ in range(500):
        scene = sample_scene(rng, arrangement="placed")
        facts = parse(caption_with_places(scene, rng))
        assert facts is not None and all(group.place for group in facts.groups) and facts_match(facts, scene)
        assert facts_match(facts, Referee().look(render(scene)))
    star = Group(1, "star", place="top left")
    assert facts_match(Facts((star,)), Scene((SceneObject("star", "red", "small", (0, 0)),)))
    assert not facts_match(Facts((star,)), Scene((SceneObject("star", "red", "small", (0, 3)),)))
    assert not facts_match(Facts((star,)), Scene((SceneObject("star", "red", "small", (0, 2)),)))
    with pytest.raises(ValueError, match="no name"):
        caption_with_places(Scene((SceneObject("star", "red", "small", (0, 2)),)), rng)


def test_every_place_has_a_cell_of_its_own():
    assert sorted(named_cells("small", (4, 4)).values()) == sorted(named_cells("large", (4, 4)).values())
    assert len(set(named_cells("small", (3, 5)).values())) == 9
    # Two rows are left for a large object in three.
    assert set(named_cells("large", (3, 5)).values()) == {
        f"{vertical}{horizontal}" for vertical in ("top", "bottom") for horizontal in (" left", "", " right")
    }


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48), (64, 128)])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_scenes_of_any_aspect_ratio_are_told_and_read_back(size, arrangement):
    source = SceneSource(size, 40, seed=3, arrangement=arrangement)
    referee = Referee(lattice_for(size))
    for index in range(len(source)):
        facts = parse(source.prompt(index, np.random.default_rng(index)))
        assert facts is not None and facts_match(facts, source.scene(index))
        assert referee.judge(source.image(index), facts).passed
        if arrangement != "orderly":
            continue
        cells = [cell for own in source.scene(index).objects for cell in own.cells]
        near = {(row + i, column + j) for row, column in cells for i in (-1, 0, 1) for j in (-1, 0, 1)}
        assert len(cells) == len(set(cells)) and len(near) > len(cells)


def test_descriptions_are_complete(scenes):
    for scene in scenes:
        facts = parse(describe(scene))
        assert facts is not None and is_complete(facts) and facts_match(facts, scene)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("a star", Facts((Group(1, "star"),))),
        ("draw three red crosses", Facts((Group(3, "cross", "red"),))),
        ("2 stars on a black background", Facts((Group(2, "star"),), None, "black")),
        (
            "a red circle to the left of a blue square",
            Facts((Group(1, "circle", "red"), Group(1, "square", "blue")), "left of"),
        ),
        (
            "a star at the top left and a red circle on the right on a gray background",
            Facts((Group(1, "star", place="top left"), Group(1, "circle", "red", place="right")), None, "gray"),
        ),
        ("a cross under a star.", Facts((Group(1, "cross"), Group(1, "star")), "below")),
    ],
)
def test_parse(text, facts):
    assert parse(text) == facts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "two stars at the top",
        "a star at the side",
        "red",
        "a red",
        "two red circle square",
        "a circle left of two stars",
        "seven stars",
    ],
)
def test_parse_refuses_what_is_no_caption(text):
    assert parse(text) is None


def test_items_do_not_depend_on_order_or_run():
    one, other = SceneSource(seed=3), SceneSource(seed=3)
    other.scene(17)
    assert one.scene(5) == other.scene(5) and np.array_equal(one.image(5), other.image(5))
    assert one.prompt(5, np.random.default_rng(1)) == other.prompt(5, np.random.default_rng(1))
    assert SceneSource(seed=4).scene(5) != one.scene(5)


def test_records_show_what_the_source_shows():
    source = SceneSource(num_pictures=5, seed=3)
    drawn, described = (SceneRecords(task, num_pictures=5, seed=3) for task in ("draw", "describe"))
    assert len(drawn) == len(described) == 5 and drawn[2]["text"] == SceneRecords("draw", seed=3)[2]["text"]
    for index in range(5):
        assert (drawn[index]["image"] == source.image(index)).all()
        assert all(facts_match(parse(text), source.scene(index)) for text in drawn[index]["text"])
        assert described[index]["text"] == describe(source.scene(index))
    with pytest.raises(ValueError, match="draw"):
        SceneRecords("paint")


def test_in_an_orderly_scene_contents_decide_places():
    """But for the axis of two that differ, and the caption always tells when it is the vertical one."""
    rng = np.random.default_rng(0)
    places = {}
    for _ in range(2000):
        scene = sample_scene(rng, arrangement="orderly")
        alike = len({(own.color, own.shape) for own in scene.objects}) == 1
        if len(scene.objects) == 2 and not alike:
            where = relation(*scene.objects)
            assert where in ("left of", "above")
            if where == "above":
                assert parse(caption(scene, rng)).relation in ("above", "below")
        else:
            key = (len(scene.objects), alike, tuple(own.size for own in scene.objects))
            cells = tuple(own.cell for own in scene.objects)
            assert places.setdefault(key, cells) == cells


def test_facts_survive_json(scenes):
    for scene in scenes[:50]:
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_a_large_picture_is_a_small_one_in_detail():
    scene = Scene((SceneObject("star", "red", "large", (1, 1)), SceneObject("circle", "cyan", "small", (0, 0))))
    large = Image.fromarray(render(scene, (256, 256))).resize((64, 64), Image.Resampling.BOX)
    assert np.abs(np.asarray(large, float) - render(scene, (64, 64))).mean() < 1.5


def test_any_aspect_ratio():
    scene = Scene((SceneObject("circle", "red", "small", (0, 7)),), lattice=(4, 8))
    assert render(scene, (64, 128)).shape == (64, 128, 3)
    assert Referee((4, 8)).look(render(scene, (64, 128))).objects[0].center == (0.5, 7.5)


@pytest.mark.parametrize("category", CATEGORIES)
def test_prompts_are_of_unseen_combinations_and_can_be_shown(category):
    rng = np.random.default_rng(5)
    referee = Referee()
    prompts = make_prompts(category, 100)
    assert prompts == make_prompts(category, 100) and len(prompts) == 100
    for prompt in prompts:
        assert parse(prompt.text) == prompt.facts
        scene = scene_for(prompt.facts, rng)
        assert "test" in {split_of(key) for key in keys_of(scene)}
        assert referee.judge(render(scene), prompt.facts).passed


def test_the_referee_errs_in_less_than_one_in_a_hundred():
    errors = calibrate(400)
    assert errors["error"] < 0.01 and errors["error_degraded"] < 0.01
    assert errors["false_accepts"] == 0 and errors["false_accepts_degraded"] == 0


def picture_of(*objects, background="white"):
    return render(Scene(tuple(objects), background))


RED_CIRCLE = SceneObject("circle", "red", "small", (0, 0))


@pytest.mark.parametrize("background", ["white", "gray", "black"])
def test_the_referee_sees_an_empty_picture(background):
    reading = Referee().look(picture_of(background=background))
    assert reading.readable and reading.objects == () and reading.background == background


def halved(picture):
    picture = picture.copy()
    picture[:9, :16] = 255
    return picture


def two_colored(picture):
    picture = picture.copy()
    red = (picture == picture[8, 8]).all(-1)
    red[:, 8:] = False
    picture[red] = COLORS["blue"]
    return picture


@pytest.mark.parametrize(
    "spoil",
    [
        halved,
        two_colored,
        lambda p: np.random.default_rng(0).integers(0, 256, p.shape).astype(np.uint8),
        lambda p: np.roll(p, 8, axis=1),  # half of it beyond the border
        lambda p: (p * 0.4 + np.array([100, 90, 60])).astype(np.uint8),
    ],
)
def test_the_referee_does_not_guess(spoil):
    facts = Facts((Group(1, "circle", "red"),))
    picture = picture_of(RED_CIRCLE)
    assert Referee().judge(picture, facts).passed
    spoiled = spoil(np.roll(picture, -16, axis=1) if spoil.__name__ == "<lambda>" else picture)
    assert not Referee().judge(spoiled, facts).passed


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.full((64, 64, 3), np.nan),
        np.zeros((16, 16, 3), np.uint8),
        "picture.png",
    ],
)
def test_the_referee_refuses_what_is_no_picture(bad):
    with pytest.raises(ValueError, match="referee"):
        Referee().look(bad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SceneObject("hexagon", "red", "small", (0, 0)), "shape"),
        (lambda: SceneObject("circle", "beige", "small", (0, 0)), "color"),
        (lambda: SceneObject("circle", "red", "huge", (0, 0)), "size"),
        (lambda: Scene((SceneObject("circle", "red", "large", (3, 3)),)), "does not fit"),
        (lambda: Scene((RED_CIRCLE, RED_CIRCLE)), "overlaps"),
        (lambda: Scene((), "plaid"), "background"),
        (lambda: render(Scene(()), (8, 8)), "too small"),
        (lambda: sample_scene(np.random.default_rng(0), "dev"), "split"),
        (lambda: sample_scene(np.random.default_rng(0), "train", (2, 2)), "lattice"),
        (lambda: sample_scene(np.random.default_rng(0), arrangement="tidy"), "arrangement"),
        (lambda: sample_scene(np.random.default_rng(0), families=(0.5, 0.5)), "four shares"),
        (lambda: Group(1, "star", place="behind"), "place"),
        (lambda: Group(2, "star", place="top"), "one object"),
        (lambda: make_prompts("style"), "category"),
    ],
)
def test_refuses_scenes_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
