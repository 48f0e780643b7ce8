import json
from pathlib import Path

import pytest

from nextflow_hf.modeling.scale_schedule import MINI_FINAL_GRIDS, MINI_LEVELS, MINI_SIDES, ScaleSchedule

ROWS = json.loads((Path(__file__).parent / "nextflow_scale_schedules.json").read_text())
PAPER = ScaleSchedule()
MINI = ScaleSchedule(MINI_SIDES, MINI_LEVELS, MINI_FINAL_GRIDS, downsample=8)


def test_reproduces_every_entry_of_the_papers_table():
    assert len(ROWS) == 41
    for row in ROWS:
        assert PAPER.grids(tuple(row["scales"][-1])) == tuple(tuple(grid) for grid in row["scales"])
    assert {tuple(row["scales"][-1]) for row in ROWS} == set(PAPER.final_grids)


@pytest.mark.parametrize("schedule", [PAPER, MINI])
def test_a_lower_level_is_a_prefix_of_the_same_picture(schedule):
    for final_grid in schedule.final_grids:
        whole = schedule.grids(final_grid)
        for level in schedule.levels:
            assert schedule.grids(whole[level - 1], level) == whole[:level]


def test_resolutions():
    assert PAPER.resolutions == {256: 12, 512: 16, 1024: 18}
    assert MINI.resolutions == {32: 4, 64: 6, 128: 8}


def test_codes_of_the_square_pictures():
    totals = {size: sum(h * w for h, w in PAPER.grids_for_size(size, size)) for size in (256, 512, 1024)}
    assert totals == {256: 900, 512: 3684, 1024: 10084}


@pytest.mark.parametrize(
    ("size", "grid"),
    [((1000, 1000), (64, 64)), ((500, 2000), (32, 128)), ((2000, 500), (128, 32)), ((1080, 1920), (48, 84))],
)
def test_nearest_bucket(size, grid):
    assert PAPER.nearest_bucket(*size, num_scales=18) == grid


def test_portrait_mirrors_landscape():
    for height, width in ((300, 700), (640, 480), (1024, 260)):
        assert PAPER.nearest_bucket(height, width) == PAPER.nearest_bucket(width, height)[::-1]


def test_any_other_size_by_the_same_rule():
    assert MINI.grids_for_size(128, 64) == ((1, 1), (4, 2), (6, 3), (8, 4), (12, 6), (16, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MINI.grids_for_size(60, 64), "multiple of 8"),
        (lambda: MINI.grids_for_size(0, 64), "positive"),
        (lambda: MINI.grids_for_size(64, -8), "positive"),
        (lambda: MINI.grids((0, 4)), "at least one cell"),
        (lambda: MINI.grids((4, 4), 9), "num_scales"),
        (lambda: MINI.grids((2, 2), 1), "single code"),
        (lambda: MINI.check_grids([(1, 1), (2, 3), (3, 3), (4, 4)]), "match no schedule"),
        (lambda: MINI.check_grids([]), "1 to 8 scales"),
        (lambda: ScaleSchedule(sides=(2, 3), levels=(2,)), "start with 1"),
        (lambda: ScaleSchedule(sides=(1, 3, 2), levels=(3,)), "strictly grow"),
        (lambda: ScaleSchedule(sides=(1, 2), levels=(3,)), "number of sides"),
        (lambda: ScaleSchedule(sides=(1, 2), levels=(2,), final_grids=((0, 1),)), "positive"),
    ],
)
def test_refuses_what_is_no_schedule(call, message):
    with pytest.raises(ValueError, match=message):
        call()
