"""How far the referee can be trusted: its errors on pictures whose facts are known."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from .captions import Facts, Group, facts_match
from .referee import Referee
from .sampling import sample_scene
from .world import COLORS, DIAMETERS, SHAPES, Scene, lattice_for, render

DEFECTS = ("half missing", "half another colour", "hole", "stray patch")


def calibrate(n: int = 1000, size: tuple[int, int] = (64, 64), seed: int = 0, split: str = "test") -> dict[str, float]:
    """Measure the referee on `n` held-out renderings, clean and degraded as a tokenizer would degrade them.

    Args:
        n: Number of pictures.
        size: (height, width) in pixels.
        seed: Which scenes.
        split: Whose combinations.

    Returns:
        `error` and `error_degraded`: share of pictures not read exactly (objects, colours, shapes, sizes, places,
        background). `false_accepts` and `false_accepts_degraded`: share of near misses (a colour, a shape or the
        number of objects changed) that pass as the original. `spoiled_accepts`: share of pictures with a visible
        defect (`spoil`) that pass as undamaged.

    Raises:
        ValueError: If `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"Calibration needs at least one picture, got {n}.")
    lattice = lattice_for(size)
    referee = Referee(lattice)
    rng = np.random.default_rng(seed)
    # Spoiling has randomness of its own, so that it does not change which pictures the other rates are measured on.
    spoil_rng = np.random.default_rng((seed, 1))
    names = ("error", "error_degraded", "false_accepts", "false_accepts_degraded", "spoiled_accepts")
    counts = dict.fromkeys(names, 0)
    for _ in range(n):
        scene = sample_scene(rng, split, lattice)
        picture = render(scene, size)
        claimed = complete_facts(near_miss(scene, rng))
        for suffix, own in (("", picture), ("_degraded", degrade(picture, rng))):
            reading = referee.look(own)
            exact = reading.readable and reading.background == scene.background and _seen(reading) == _seen(scene)
            counts[f"error{suffix}"] += not exact
            counts[f"false_accepts{suffix}"] += reading.readable and facts_match(claimed, reading)
        defect = DEFECTS[spoil_rng.integers(len(DEFECTS))]
        counts["spoiled_accepts"] += referee.judge(spoil(scene, defect, spoil_rng, size), complete_facts(scene)).passed
    return {name: count / n for name, count in counts.items()}


def degrade(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a mediocre decoder does to a picture: blur, noise, and a shift of colours."""
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7)), np.float32)
    noisy = blurred + rng.normal(0, 6, picture.shape) + rng.normal(0, 6, (1, 1, 3))
    return np.rint(noisy.clip(0, 255)).astype(np.uint8)


def spoil(scene: Scene, defect: str, rng: np.random.Generator, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """A picture of the scene with one visible defect.

    Args:
        scene: A scene with at least one object.
        defect: One of `DEFECTS`: half of an object is missing, or has another colour; it has a hole of half its
            diameter; or a stray patch of a third of a cell's width lies in a free cell.
        rng: Source of randomness.
        size: (height, width) in pixels.

    Returns:
        uint8 `(height, width, 3)`.

    Raises:
        ValueError: If there is no such defect, or the scene has no object or no free cell to spoil.
    """
    if defect not in DEFECTS:
        raise ValueError(f"A defect is one of {DEFECTS}, got {defect!r}.")
    if not scene.objects:
        raise ValueError("An empty scene cannot be spoiled.")
    pitch = np.array(size) / scene.lattice
    index = int(rng.integers(len(scene.objects)))
    own = scene.objects[index]
    others = list(scene.objects)
    if defect == "half another colour":
        others[index] = replace(own, color=_other(own.color, COLORS, rng))
    else:
        del others[index]
    center = own.center
    if defect == "stray patch":
        taken = frozenset().union(*(own.cells for own in scene.objects))
        free = [cell for cell in np.ndindex(scene.lattice) if cell not in taken]
        if not free:
            raise ValueError("A scene without a free cell has no room for a stray patch.")
        row, column = free[rng.integers(len(free))]
        center = row + 0.5, column + 0.5
    y, x = (np.indices(size) + 0.5) - (np.array(center) * pitch)[:, None, None]
    if defect == "stray patch":
        where, picture = np.maximum(abs(y), abs(x)) < pitch.min() / 6, np.array(COLORS[own.color])
    else:
        picture = render(replace(scene, objects=tuple(others)), size)
        if defect == "hole":
            where = np.hypot(y, x) < DIAMETERS[own.size] * pitch.min() / 4
        else:
            where = (y, x, -y, -x)[rng.integers(4)] > 0
    return np.where(where[..., None], picture, render(scene, size)).astype(np.uint8)


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one object of another colour or shape, or one object fewer."""
    index = int(rng.integers(len(scene.objects)))
    own = scene.objects[index]
    change = rng.integers(3 if len(scene.objects) > 1 else 2)
    others = list(scene.objects)
    if change == 0:
        others[index] = replace(own, color=_other(own.color, COLORS, rng))
    elif change == 1:
        others[index] = replace(own, shape=_other(own.shape, SHAPES, rng))
    else:
        del others[index]
    return replace(scene, objects=tuple(others))


def complete_facts(scene: Scene) -> Facts:
    """Everything that can be claimed of a scene's objects."""
    return Facts(tuple(Group(1, own.shape, own.color, own.size) for own in scene.objects), None, scene.background)


def _other(value: str, options: Iterable[str], rng: np.random.Generator) -> str:
    return str(rng.choice([option for option in options if option != value]))


def _seen(scene) -> list[tuple]:
    return sorted((own.shape, own.color, own.size, own.center) for own in scene.objects)
