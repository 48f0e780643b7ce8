"""The world of scenes: shapes of eight colours on a lattice, and the pictures of them.

A scene is a few objects on a plain background. Small objects sit in a cell of a lattice, large ones on an interior
corner of it and cover 2 x 2 cells, so that a picture holds few bits and a small model can learn to draw it exactly.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "star")
COLORS = {
    "red": (220, 20, 30),
    "green": (20, 150, 40),
    "blue": (30, 60, 230),
    "yellow": (250, 220, 20),
    "orange": (250, 125, 0),
    "purple": (130, 20, 160),
    "cyan": (0, 200, 220),
    "pink": (250, 130, 190),
}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0)}
SIZES = ("small", "large")
# Diameter of an object in lattice cells.
DIAMETERS = {"small": 0.9, "large": 1.8}
# Name of a place -> how it is said.
PLACES = {
    "top left": "at the top left",
    "top": "at the top",
    "top right": "at the top right",
    "left": "on the left",
    "middle": "in the middle",
    "right": "on the right",
    "bottom left": "at the bottom left",
    "bottom": "at the bottom",
    "bottom right": "at the bottom right",
}
_SIDES = (("top", "", "bottom"), ("left", "", "right"))
# A square picture's lattice has so many cells a side; others have about as many cells, about as square.
_LATTICE_SIDE = 4
_SUPERSAMPLE = 8


@dataclass(frozen=True)
class SceneObject:
    """One object.

    Attributes:
        shape: One of `SHAPES`.
        color: One of `COLORS`.
        size: One of `SIZES`.
        cell: (row, column) of the lattice cell of a small object, or of the top left of a large one's 2 x 2 cells.
    """

    shape: str
    color: str
    size: str
    cell: tuple[int, int]

    def __post_init__(self):
        for name, value, known in (
            ("shape", self.shape, SHAPES),
            ("color", self.color, COLORS),
            ("size", self.size, SIZES),
        ):
            if value not in known:
                raise ValueError(f"An object's {name} must be one of {tuple(known)}, got {value!r}.")
        object.__setattr__(self, "cell", (int(self.cell[0]), int(self.cell[1])))

    @property
    def span(self) -> int:
        """Lattice cells covered per side."""
        return 2 if self.size == "large" else 1

    @property
    def center(self) -> tuple[float, float]:
        """(row, column) of the centre in lattice cells."""
        return self.cell[0] + self.span / 2, self.cell[1] + self.span / 2

    @property
    def cells(self) -> frozenset[tuple[int, int]]:
        """Lattice cells covered."""
        row, column = self.cell
        return frozenset((row + i, column + j) for i in range(self.span) for j in range(self.span))


@dataclass(frozen=True)
class Scene:
    """A picture's facts.

    Attributes:
        objects: What it shows; no two objects share a lattice cell.
        background: One of `BACKGROUNDS`.
        lattice: (rows, columns).
    """

    objects: tuple[SceneObject, ...]
    background: str = "white"
    lattice: tuple[int, int] = (4, 4)

    def __post_init__(self):
        object.__setattr__(self, "objects", tuple(self.objects))
        object.__setattr__(self, "lattice", (int(self.lattice[0]), int(self.lattice[1])))
        if self.background not in BACKGROUNDS:
            raise ValueError(f"A background must be one of {tuple(BACKGROUNDS)}, got {self.background!r}.")
        taken: set[tuple[int, int]] = set()
        for own in self.objects:
            if any(not (0 <= r < self.lattice[0] and 0 <= c < self.lattice[1]) for r, c in own.cells):
                raise ValueError(f"{own} does not fit a lattice of {self.lattice}.")
            if taken & own.cells:
                raise ValueError(f"{own} overlaps another object.")
            taken |= own.cells

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return {
            "objects": [
                {"shape": o.shape, "color": o.color, "size": o.size, "cell": list(o.cell)} for o in self.objects
            ],
            "background": self.background,
            "lattice": list(self.lattice),
        }

    @classmethod
    def from_dict(cls, data: dict) -> "Scene":
        """Inverse of `to_dict`."""
        objects = tuple(SceneObject(o["shape"], o["color"], o["size"], tuple(o["cell"])) for o in data["objects"])
        return cls(objects, data["background"], tuple(data["lattice"]))


def lattice_for(size: tuple[int, int]) -> tuple[int, int]:
    """Lattice (rows, columns) of a picture of `size` (height, width): 4 x 4 for a square, about 16 cells for any."""
    ratio = math.sqrt(size[0] / size[1])
    return max(1, round(_LATTICE_SIDE * ratio)), max(1, round(_LATTICE_SIDE / ratio))


def named_cells(size: str, lattice: tuple[int, int]) -> dict[tuple[int, int], str]:
    """Cells whose place has a name (a key of `PLACES`), for an object of a size, and the names.

    Where a lattice is so small that a side and the middle are one place, the side names it.
    """
    span = 2 if size == "large" else 1
    rows, columns = (
        {(cells - span) // 2: middle, 0: first, cells - span: last}
        for cells, (first, middle, last) in zip(lattice, _SIDES)
    )
    return {
        (row, column): " ".join(word for word in (vertical, horizontal) if word) or "middle"
        for row, vertical in rows.items()
        for column, horizontal in columns.items()
    }


def cell_named(place: str, size: str, lattice: tuple[int, int]) -> tuple[int, int] | None:
    """The cell of an object of this size at a named place; `None` where the lattice has none."""
    return next((cell for cell, name in named_cells(size, lattice).items() if name == place), None)


def changed(scene: Scene, **changes) -> Scene | None:
    """A scene with other objects or another background; `None` if the objects do not fit."""
    try:
        return replace(scene, **changes)
    except ValueError:
        return None


def relation(a: SceneObject, b: SceneObject) -> str | None:
    """Where `a` lies as seen from `b`: "left of", "right of", "above", "below"; `None` on a diagonal.

    The axis along which the centres lie further apart decides.
    """
    down, right = a.center[0] - b.center[0], a.center[1] - b.center[1]
    if abs(down) == abs(right):
        return None
    if abs(right) > abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"


def render(scene: Scene, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """Picture of a scene: uint8 `(height, width, 3)`.

    Objects have the same shape whatever the aspect ratio: their diameter follows from the shorter lattice pitch.

    Raises:
        ValueError: If the picture is too small for its lattice.
    """
    height, width = size
    pitch_y, pitch_x = height / scene.lattice[0], width / scene.lattice[1]
    if min(pitch_y, pitch_x) < 4:
        raise ValueError(f"A picture of {height}x{width} pixels is too small for a lattice of {scene.lattice}.")
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for own in scene.objects:
        diameter = DIAMETERS[own.size] * min(pitch_y, pitch_x)
        center = own.center[0] * pitch_y, own.center[1] * pitch_x
        alpha, top, left = shape_mask(own.shape, diameter, center)
        y, x = slice(max(top, 0), top + alpha.shape[0]), slice(max(left, 0), left + alpha.shape[1])
        alpha = alpha[y.start - top :, x.start - left :][: height - y.start, : width - x.start, None]
        picture[y, x] += alpha * (np.array(COLORS[own.color], np.float32) - picture[y, x])
    return np.rint(picture).astype(np.uint8)


def shape_mask(shape: str, diameter: float, center: tuple[float, float]) -> tuple[np.ndarray, int, int]:
    """Coverage of an anti-aliased shape.

    Args:
        shape: One of `SHAPES`.
        diameter: Size in pixels.
        center: (y, x) in pixels.

    Returns:
        float32 coverage in [0, 1] `(side, side)`, and the row and column of its top left pixel.
    """
    top, left = int(np.floor(center[0] - diameter / 2)) - 1, int(np.floor(center[1] - diameter / 2)) - 1
    mask = _mask(shape, round(diameter, 4), round(center[0] - top, 4), round(center[1] - left, 4))
    return mask, top, left


@lru_cache(maxsize=4096)
def _mask(shape: str, diameter: float, center_y: float, center_x: float) -> np.ndarray:
    side = int(np.ceil(diameter)) + 3
    canvas = Image.new("L", (side * _SUPERSAMPLE,) * 2)
    points = [
        ((center_x + diameter * x) * _SUPERSAMPLE, (center_y + diameter * y) * _SUPERSAMPLE) for x, y in _outline(shape)
    ]
    ImageDraw.Draw(canvas).polygon(points, fill=255)
    mask = np.asarray(canvas, np.float32).reshape(side, _SUPERSAMPLE, side, _SUPERSAMPLE).mean((1, 3)) / 255
    mask.flags.writeable = False
    return mask


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners (x, y) of a shape of diameter 1 around the origin, y downwards."""
    if shape == "circle":
        return _ring(64, 0.5)
    if shape == "square":
        return [(-0.44, -0.44), (0.44, -0.44), (0.44, 0.44), (-0.44, 0.44)]
    if shape == "triangle":
        return [(0.0, -0.48), (0.5, 0.42), (-0.5, 0.42)]
    if shape == "diamond":
        return [(0.0, -0.5), (0.5, 0.0), (0.0, 0.5), (-0.5, 0.0)]
    if shape == "cross":
        a, b = 0.17, 0.5
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    if shape == "star":
        outer, inner = _ring(5, 0.54), _ring(5, 0.22, turn=0.5)
        return [point for pair in zip(outer, inner) for point in pair]
    raise ValueError(f"A shape must be one of {SHAPES}, got {shape!r}.")


def _ring(corners: int, radius: float, turn: float = 0.0) -> list[tuple[float, float]]:
    angles = (np.arange(corners) + turn) * (2 * np.pi / corners)
    return [(float(radius * np.sin(a)), float(-radius * np.cos(a))) for a in angles]
