"""The referee: looks at any picture and says what it shows, or that it cannot tell.

Steps, all on pixels: find the background on the border, segment what differs from it, take connected pieces, name the
colour of each piece's core, and compare its coverage with every shape at both sizes. A piece that is nothing known,
or that could be two things, makes the whole picture unreadable: the referee never guesses. At last the objects are
drawn again where they were seen, and pixels that they do not explain (holes, stains, missing parts, stray specks) make
the picture unreadable too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from .captions import Facts, facts_match
from .world import BACKGROUNDS, COLORS, DIAMETERS, SHAPES, SIZES, shape_mask

# Distances are Euclidean in RGB (0..255).
_BACKGROUND_TOLERANCE = 45.0
_FOREGROUND_DISTANCE = 50.0
_COLOR_TOLERANCE = 75.0
_COLOR_MARGIN = 12.0
# A piece's core stands out from the background at least this much, relative to its most outstanding pixels.
_CORE_CONTRAST = 0.85
# Share of a piece's core that must have the piece's colour.
_PURITY = 0.8
# Soft intersection over union with the best template, and its lead over the best other shape.
_SHAPE_FIT = 0.72
_SHAPE_MARGIN = 0.025
# Pieces below this share of a lattice cell's area are specks.
_SPECK = 0.03
_SCALES = (0.92, 1.0, 1.08)
# A pixel is unexplained if it is this far from what is drawn again there; so many, as a share of a lattice cell's area,
# are forgiven. Chosen on a trained tokenizer's round trips, which leave fewer, and on `calibration.spoil`, which leaves
# more.
_UNEXPLAINED_DISTANCE = 60.0
_UNEXPLAINED = 0.03
# Edges may lie this far from where they are drawn again, in lattice cells; at least a pixel.
_REACH = 1 / 16


@dataclass(frozen=True)
class SeenObject:
    """An object that the referee recognised.

    Attributes:
        shape: One of `SHAPES`.
        color: One of `COLORS`.
        size: One of `SIZES`.
        center: (row, column) in lattice cells, to the nearest half.
        fit: Soft intersection over union with the shape's template, in [0, 1].
    """

    shape: str
    color: str
    size: str
    center: tuple[float, float]
    fit: float

    @property
    def cell(self) -> tuple[float, float]:
        """(row, column) of the lattice cell in which it begins, as of a [`SceneObject`]; not whole between cells."""
        half = 1.0 if self.size == "large" else 0.5
        return self.center[0] - half, self.center[1] - half


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    Attributes:
        objects: Recognised objects.
        background: One of `BACKGROUNDS`, or `None` if it is none of them.
        lattice: (rows, columns) that the places are counted in.
        reason: Why the picture cannot be read; empty if it can.
    """

    objects: tuple[SeenObject, ...]
    background: str | None
    lattice: tuple[int, int]
    reason: str = ""

    @property
    def readable(self) -> bool:
        """Whether everything in the picture was recognised."""
        return not self.reason


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows exactly what was asked for, and why not."""

    passed: bool
    reason: str


class _Match(NamedTuple):
    """A shape's template at its best place on a piece: its fit, diameter in pixels, and centre (y, x) in pixels."""

    fit: float
    diameter: float
    center: tuple[float, float]


class _Drawn(NamedTuple):
    """An object as it is drawn again: coverage `(height, width)` of the whole picture, and its RGB colour."""

    coverage: np.ndarray
    paint: np.ndarray


class Referee:
    """Reads pictures of scenes.

    Args:
        lattice: (rows, columns) of the pictures.

    Raises:
        ValueError: If the lattice has no cells.
    """

    def __init__(self, lattice: tuple[int, int] = (4, 4)):
        if min(lattice) < 1:
            raise ValueError(f"The referee needs a lattice with at least one row and one column, got {lattice}.")
        self.lattice = lattice

    def judge(self, image, facts: Facts) -> Verdict:
        """Whether the picture shows the facts' objects, no others, and is readable throughout.

        Args:
            image: uint8 `(height, width, 3)` or a PIL image.
            facts: What it should show.
        """
        reading = self.look(image)
        if not reading.readable:
            return Verdict(False, reading.reason)
        if facts_match(facts, reading):
            return Verdict(True, "")
        seen = ", ".join(f"{own.size} {own.color} {own.shape}" for own in reading.objects) or "nothing"
        return Verdict(False, f"shows {seen} on {reading.background}")

    def look(self, image) -> Reading:
        """Read a picture.

        Args:
            image: uint8 `(height, width, 3)` or a PIL image.

        Raises:
            ValueError: If it is not a picture, or too small for the lattice.
        """
        pixels = _as_pixels(image)
        pitch = min(pixels.shape[0] / self.lattice[0], pixels.shape[1] / self.lattice[1])
        if pitch < 8:
            raise ValueError(
                f"The referee needs at least 8 pixels a lattice cell; {pixels.shape[1]}x{pixels.shape[0]} pixels give "
                f"{pitch:.1f}."
            )
        background = _background(pixels)
        if background is None:
            return Reading((), None, self.lattice, "the background is none of the known ones")
        ground = np.array(BACKGROUNDS[background], np.float32)
        distance = np.linalg.norm(pixels - ground, axis=-1)
        objects, drawn = [], []
        for piece in _pieces(distance > _FOREGROUND_DISTANCE):
            if piece.sum() < _SPECK * pitch**2:
                continue
            seen = self._recognise(pixels, ground, piece, pitch)
            if isinstance(seen, str):
                return Reading(tuple(objects), background, self.lattice, seen)
            objects.append(seen[0])
            drawn.append(seen[1])
        reach = max(1, round(_REACH * pitch))
        if _unexplained(pixels, ground, drawn, reach) > _UNEXPLAINED * pitch**2:
            reason = "something is there that the objects do not explain"
            return Reading(tuple(objects), background, self.lattice, reason)
        return Reading(tuple(objects), background, self.lattice)

    def _recognise(self, pixels, ground, piece, pitch) -> tuple[SeenObject, _Drawn] | str:
        """The object a piece is, with what it looks like undamaged; or why it is none."""
        # Thin parts are blurred into the background; the colour is that of what stands out most.
        distance = np.linalg.norm(pixels - ground, axis=-1)
        core = _erode(piece) if _erode(piece).sum() >= 4 else piece
        core = core & (distance >= _CORE_CONTRAST * np.quantile(distance[core], 0.9))
        color = _color(pixels[core])
        if color is None:
            return "a piece has no known colour, or several"
        paint = np.array(COLORS[color], np.float32)
        rows, columns = np.nonzero(piece)
        box = (
            slice(max(rows.min() - 3, 0), rows.max() + 4),
            slice(max(columns.min() - 3, 0), columns.max() + 4),
        )
        near = _dilate(_dilate(piece))[box]
        axis = paint - ground
        coverage = ((pixels[box] - ground) @ axis / (axis @ axis)).clip(0, 1) * near
        fits = _fits(coverage, pitch)
        if not fits:
            return "a piece is too small or too large for an object"
        (shape, size), match = max(fits.items(), key=lambda item: item[1].fit)
        rival = max((other.fit for (name, _), other in fits.items() if name != shape), default=0.0)
        if match.fit < _SHAPE_FIT or match.fit - rival < _SHAPE_MARGIN:
            return "a piece has no known shape, or several"
        y, x = match.center[0] + box[0].start, match.center[1] + box[1].start
        cell_y, cell_x = pixels.shape[0] / self.lattice[0], pixels.shape[1] / self.lattice[1]
        center = (round(2 * y / cell_y) / 2, round(2 * x / cell_x) / 2)
        whole = _on_canvas(*shape_mask(shape, match.diameter, (y, x)), pixels.shape[:2])
        return SeenObject(shape, color, size, center, match.fit), _Drawn(whole, paint)


def _as_pixels(image) -> np.ndarray:
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"The referee reads PIL images and uint8 arrays (height, width, 3), got {found}.")
    return image.astype(np.float32)


def _background(pixels: np.ndarray) -> str | None:
    """The known background that most of the border shows."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    shares = {
        name: (np.linalg.norm(border - np.array(paint), axis=-1) < _BACKGROUND_TOLERANCE).mean()
        for name, paint in BACKGROUNDS.items()
    }
    name = max(shares, key=shares.get)
    return name if shares[name] >= 0.6 else None


def _color(core: np.ndarray) -> str | None:
    """The colour that nearly all of a piece's core has."""
    paints = np.array(list(COLORS.values()), np.float32)
    distances = np.linalg.norm(np.median(core, axis=0) - paints, axis=-1)
    best, second = np.sort(distances)[:2]
    if best > _COLOR_TOLERANCE or second - best < _COLOR_MARGIN:
        return None
    own = np.linalg.norm(core[:, None] - paints, axis=-1).argmin(axis=1) == distances.argmin()
    return tuple(COLORS)[int(distances.argmin())] if own.mean() >= _PURITY else None


def _unexplained(pixels: np.ndarray, ground: np.ndarray, drawn: list[_Drawn], reach: int) -> int:
    """Number of pixels that look neither like the background nor like the objects where these are drawn.

    Args:
        pixels: float32 `(height, width, 3)`.
        ground: The background's RGB colour.
        drawn: The objects.
        reach: How far edges may have moved, in pixels; so near to an edge any blend of object and background will do.
    """
    off = pixels - ground
    to_ground = np.linalg.norm(off, axis=-1)
    distance = np.full(to_ground.shape, np.inf, np.float32)
    for coverage, paint in drawn:
        axis = paint - ground
        low, high = _extreme(coverage, reach, np.min), _extreme(coverage, reach, np.max)
        blend = (off @ axis / (axis @ axis)).clip(low, high)
        to_object = np.linalg.norm(off - blend[..., None] * axis, axis=-1)
        distance = np.where(high > 0, np.minimum(distance, to_object), distance)
    distance = np.where(np.isinf(distance), to_ground, distance)
    return int((distance > _UNEXPLAINED_DISTANCE).sum())


def _extreme(values: np.ndarray, reach: int, take: Callable) -> np.ndarray:
    """Minimum or maximum (`take`) over the square of pixels at most `reach` away; the border's values go on beyond."""
    for axis in (0, 1):
        padded = np.pad(values, [(reach, reach) if axis == side else (0, 0) for side in (0, 1)], mode="edge")
        values = take(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=axis), axis=-1)
    return values


def _on_canvas(mask: np.ndarray, top: int, left: int, size: tuple[int, int]) -> np.ndarray:
    """A mask placed at (top, left) of an empty canvas `(height, width)`; what lies beyond is cut off."""
    canvas = np.zeros(size, np.float32)
    rows = slice(max(top, 0), max(min(top + mask.shape[0], size[0]), 0))
    columns = slice(max(left, 0), max(min(left + mask.shape[1], size[1]), 0))
    canvas[rows, columns] = mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return canvas


def _fits(coverage: np.ndarray, pitch: float) -> dict[tuple[str, str], _Match]:
    """Soft intersection over union of a piece with each shape and size of about its area, centres of mass aligned."""
    fits: dict[tuple[str, str], _Match] = {}
    for shape in SHAPES:
        for size in SIZES:
            for scale in _SCALES:
                diameter = DIAMETERS[size] * pitch * scale
                area = _moments(shape, diameter)[0]
                if not 0.5 < coverage.sum() / area < 2.0:
                    continue
                center = _aligned(coverage, shape, diameter)
                mask, top, left = shape_mask(shape, diameter, center)
                overlap, total = _overlap(coverage, mask, top, left)
                match = _Match(overlap / total, diameter, center)
                if (shape, size) not in fits or match.fit > fits[shape, size].fit:
                    fits[shape, size] = match
    return fits


def _overlap(coverage: np.ndarray, mask: np.ndarray, top: int, left: int) -> tuple[float, float]:
    """Sums of the pixelwise minimum and maximum of a piece and a template placed at (top, left)."""
    overlap = np.minimum(coverage, _on_canvas(mask, top, left, coverage.shape)).sum()
    return float(overlap), float(coverage.sum() + mask.sum() - overlap)


def _moments(shape: str, diameter: float) -> tuple[float, float, float]:
    """Area of a shape, and its centre of mass as (y, x) seen from its centre, in pixels."""
    mask, top, left = shape_mask(shape, diameter, (0.0, 0.0))
    y, x = _mass(mask)
    return float(mask.sum()), y + top, x + left


def _mass(coverage: np.ndarray) -> tuple[float, float]:
    """Centre of mass (y, x); the middle of pixel (0, 0) is (0.5, 0.5)."""
    total = coverage.sum()
    rows, columns = np.arange(coverage.shape[0]) + 0.5, np.arange(coverage.shape[1]) + 0.5
    return float((coverage.sum(1) * rows).sum() / total), float((coverage.sum(0) * columns).sum() / total)


def _aligned(coverage: np.ndarray, shape: str, diameter: float) -> tuple[float, float]:
    """Where a shape's centre must lie for the centres of mass to agree, to a quarter pixel (templates are cached)."""
    _, offset_y, offset_x = _moments(shape, diameter)
    y, x = _mass(coverage)
    return round(4 * (y - offset_y)) / 4, round(4 * (x - offset_x)) / 4


def _pieces(mask: np.ndarray) -> list[np.ndarray]:
    """Connected pieces of a mask, corners counting as contact, in reading order of their first pixel."""
    remaining = mask.copy()
    height, width = mask.shape
    pieces = []
    for start in zip(*np.nonzero(mask)):
        if not remaining[start]:
            continue
        piece = np.zeros_like(mask)
        stack = [start]
        remaining[start] = False
        while stack:
            row, column = stack.pop()
            piece[row, column] = True
            for y in range(max(row - 1, 0), min(row + 2, height)):
                for x in range(max(column - 1, 0), min(column + 2, width)):
                    if remaining[y, x]:
                        remaining[y, x] = False
                        stack.append((y, x))
        pieces.append(piece)
    return pieces


def _erode(mask: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours belong to the mask too."""
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _dilate(mask: np.ndarray) -> np.ndarray:
    """The mask and the pixels next to it."""
    padded = np.pad(mask, 1)
    return mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
