"""The scale schedule: which grids of codes an image is drawn in, coarse to fine.

A schedule is fixed by the side lengths S_1 < ... < S_K of its square picture (NextFlow, Table 14). A picture of any
other shape is known by its final grid (H, W), and every coarser grid follows from one rule, which reproduces all
41 x 18 entries of the paper's table::

    grid_1 = (1, 1)        grid_k = (max(1, round(H * S_k / S_K)), max(1, round(W * S_k / S_K)))

with `round` half to even. The first m scales of a schedule are a *prefix*: a lower resolution of the same picture.
This class is the only place in the package that knows the rule.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

Grid = tuple[int, int]

NEXTFLOW_SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
NEXTFLOW_LEVELS = (12, 16, 18)
# Landscape half of NextFlow's Table 14 at 1024 px; the portrait half mirrors it.
_NEXTFLOW_LANDSCAPE_GRIDS = (
    (32, 128), (32, 124), (32, 120), (32, 116), (36, 112), (36, 104), (36, 108), (40, 100), (40, 96), (44, 92),
    (44, 88), (44, 84), (48, 84), (48, 80), (52, 76), (52, 72), (56, 72), (56, 68), (60, 68), (60, 64),
)  # fmt: skip
NEXTFLOW_FINAL_GRIDS = (
    *_NEXTFLOW_LANDSCAPE_GRIDS,
    (64, 64),
    *((width, height) for height, width in reversed(_NEXTFLOW_LANDSCAPE_GRIDS)),
)

MINI_SIDES = (1, 2, 3, 4, 6, 8, 12, 16)
MINI_LEVELS = (4, 6, 8)
MINI_FINAL_GRIDS = ((12, 24), (12, 20), (16, 16), (20, 12), (24, 12))


@dataclass(frozen=True)
class ScaleSchedule:
    """Scales of an image, coarse to fine, for every size and aspect ratio.

    Args:
        sides: Side lengths S_1 < ... < S_K of the square schedule, in grid cells. S_1 must be 1.
        levels: Numbers of scales that make a complete picture (a resolution), ascending; the last one is K.
        final_grids: (height, width) of the aspect-ratio buckets at the highest level, in grid cells.
        downsample: Pixels per grid cell and side.

    Raises:
        ValueError: If the sides, levels or final grids do not form a schedule.
    """

    sides: tuple[int, ...] = NEXTFLOW_SIDES
    levels: tuple[int, ...] = NEXTFLOW_LEVELS
    final_grids: tuple[Grid, ...] = NEXTFLOW_FINAL_GRIDS
    downsample: int = 16

    def __post_init__(self):
        object.__setattr__(self, "sides", tuple(int(side) for side in self.sides))
        object.__setattr__(self, "levels", tuple(int(level) for level in self.levels))
        object.__setattr__(self, "final_grids", tuple((int(h), int(w)) for h, w in self.final_grids))
        if not self.sides or self.sides[0] != 1 or any(a >= b for a, b in zip(self.sides, self.sides[1:])):
            raise ValueError(f"`sides` must start with 1 and strictly grow, got {self.sides}.")
        if not self.levels or any(a >= b for a, b in zip(self.levels, self.levels[1:])):
            raise ValueError(f"`levels` must strictly grow, got {self.levels}.")
        if self.levels[0] < 1 or self.levels[-1] != len(self.sides):
            raise ValueError(f"`levels` must end with the number of sides, {len(self.sides)}, got {self.levels}.")
        if not self.final_grids or any(h < 1 or w < 1 for h, w in self.final_grids):
            raise ValueError(f"`final_grids` must hold positive (height, width) pairs, got {self.final_grids}.")
        if self.downsample < 1:
            raise ValueError(f"`downsample` must be positive, got {self.downsample}.")

    @property
    def num_scales(self) -> int:
        """K, the number of scales of the highest level."""
        return len(self.sides)

    @cached_property
    def resolutions(self) -> dict[int, int]:
        """Side of the square picture in pixels -> number of scales, for each level."""
        return {self.sides[level - 1] * self.downsample: level for level in self.levels}

    def grids(self, final_grid: Grid, num_scales: int | None = None) -> tuple[Grid, ...]:
        """Grids of a picture whose last scale is `final_grid`.

        Args:
            final_grid: (H, W) of the last scale.
            num_scales: Number of scales that leads to `final_grid`; K by default.

        Returns:
            `num_scales` pairs (h_k, w_k), the first (1, 1), the last `final_grid`.
        """
        num_scales = self.num_scales if num_scales is None else num_scales
        if not 1 <= num_scales <= self.num_scales:
            raise ValueError(f"`num_scales` must lie in 1..{self.num_scales}, got {num_scales}.")
        height, width = final_grid
        if height < 1 or width < 1:
            raise ValueError(f"A grid needs at least one cell per side, got {final_grid}.")
        last = self.sides[num_scales - 1]
        if num_scales == 1 and (height, width) != (1, 1):
            raise ValueError(f"A picture of one scale is a single code, got the final grid {final_grid}.")
        finer = ((round(height * side / last), round(width * side / last)) for side in self.sides[1:num_scales])
        return ((1, 1), *((max(1, h), max(1, w)) for h, w in finer))

    def level_for_size(self, height: int, width: int) -> int:
        """Number of scales of the level whose picture area is nearest to `height` x `width` pixels (in ratio)."""
        self._check_size(height, width)
        log_side = 0.5 * math.log(height * width)
        return min(self.levels, key=lambda n: abs(math.log(self.sides[n - 1] * self.downsample) - log_side))

    def buckets(self, num_scales: int | None = None) -> tuple[Grid, ...]:
        """Final grids of all aspect-ratio buckets at the level of `num_scales` scales, without repetition."""
        num_scales = self.num_scales if num_scales is None else num_scales
        return tuple(dict.fromkeys(self.grids(grid)[num_scales - 1] for grid in self.final_grids))

    def nearest_bucket(self, height: int, width: int, num_scales: int | None = None) -> Grid:
        """Final grid of the bucket whose aspect ratio is nearest to `height`/`width` (|log| distance).

        The paper does not state its rule; the logarithm treats portrait and landscape alike.
        """
        self._check_size(height, width)
        num_scales = self.level_for_size(height, width) if num_scales is None else num_scales
        ratio = math.log(height / width)
        return min(self.buckets(num_scales), key=lambda grid: abs(math.log(grid[0] / grid[1]) - ratio))

    def grids_for_size(self, height: int, width: int, num_scales: int | None = None) -> tuple[Grid, ...]:
        """Grids of a picture of exactly `height` x `width` pixels.

        Args:
            height: Height in pixels, a multiple of `downsample`.
            width: Width in pixels, a multiple of `downsample`.
            num_scales: Number of scales; by default the level of nearest area.

        Raises:
            ValueError: If the size is not a positive multiple of `downsample`.
        """
        self._check_size(height, width)
        if height % self.downsample or width % self.downsample:
            near = [max(1, round(side / self.downsample)) * self.downsample for side in (height, width)]
            raise ValueError(
                f"An image size must be a multiple of {self.downsample} pixels, got {height}x{width}; "
                f"the nearest is {near[0]}x{near[1]}."
            )
        num_scales = self.level_for_size(height, width) if num_scales is None else num_scales
        return self.grids((height // self.downsample, width // self.downsample), num_scales)

    def check_grids(self, grids: Sequence[Grid]) -> None:
        """Raise `ValueError` unless `grids` are the scales of a picture by this schedule's rule."""
        grids = tuple((int(h), int(w)) for h, w in grids)
        if not 1 <= len(grids) <= self.num_scales:
            raise ValueError(f"An image has 1 to {self.num_scales} scales, got {len(grids)}.")
        expected = self.grids(grids[-1], len(grids))
        if grids != expected:
            raise ValueError(
                f"These grids match no schedule: got {grids}, but {len(grids)} scales that end in {grids[-1]} "
                f"are {expected}."
            )

    def image_size(self, final_grid: Grid) -> tuple[int, int]:
        """(height, width) in pixels of a picture whose last scale is `final_grid`."""
        return final_grid[0] * self.downsample, final_grid[1] * self.downsample

    @staticmethod
    def _check_size(height: int, width: int) -> None:
        if height < 1 or width < 1:
            raise ValueError(f"An image size must be positive, got {height}x{width}.")


def all_blocks(grids: tuple[Grid, ...]) -> tuple[Grid, ...]:
    """Grids of the blocks of a picture in a sequence: its scales from the second on, and the final block."""
    return (*grids[1:], grids[-1]) if len(grids) > 1 else ()


def read_blocks(num_slots: int, grids: tuple[Grid, ...]) -> tuple[int, bool] | None:
    """How many of a picture's blocks these slots are, from the first on.

    Returns:
        Their number, and whether it is the final block alone instead; `None` if the slots end within a block.
    """
    cells = [height * width for height, width in all_blocks(grids)]
    total = 0
    for number, own in enumerate([0, *cells]):
        total += own
        if total == num_slots:
            return number, False
    return (1, True) if cells and num_slots == cells[-1] else None
