"""How far the referee can be trusted: its errors on pictures whose facts are known."""

from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from .captions import Facts, Group, facts_match
from .referee import Referee
from .sampling import sample_scene
from .world import COLORS, SHAPES, Scene, render


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
        number of objects changed) that pass as the original.
    """
    referee = Referee()
    rng = np.random.default_rng(seed)
    counts = dict.fromkeys(("error", "error_degraded", "false_accepts", "false_accepts_degraded"), 0)
    for _ in range(n):
        scene = sample_scene(rng, split)
        picture = render(scene, size)
        claimed = complete_facts(near_miss(scene, rng))
        for suffix, own in (("", picture), ("_degraded", degrade(picture, rng))):
            reading = referee.look(own)
            exact = reading.readable and reading.background == scene.background and _seen(reading) == _seen(scene)
            counts[f"error{suffix}"] += not exact
            counts[f"false_accepts{suffix}"] += reading.readable and facts_match(claimed, reading)
    return {name: count / n for name, count in counts.items()}


def degrade(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a mediocre decoder does to a picture: blur, noise, and a shift of colours."""
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7)), np.float32)
    noisy = blurred + rng.normal(0, 6, picture.shape) + rng.normal(0, 6, (1, 1, 3))
    return np.rint(noisy.clip(0, 255)).astype(np.uint8)


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one object of another colour or shape, or one object fewer."""
    index = int(rng.integers(len(scene.objects)))
    own = scene.objects[index]
    change = rng.integers(3 if len(scene.objects) > 1 else 2)
    others = list(scene.objects)
    if change == 0:
        others[index] = replace(own, color=str(rng.choice([c for c in COLORS if c != own.color])))
    elif change == 1:
        others[index] = replace(own, shape=str(rng.choice([s for s in SHAPES if s != own.shape])))
    else:
        del others[index]
    return replace(scene, objects=tuple(others))


def complete_facts(scene: Scene) -> Facts:
    """Everything that can be claimed of a scene's objects."""
    return Facts(tuple(Group(1, own.shape, own.color, own.size) for own in scene.objects), None, scene.background)


def _seen(scene) -> list[tuple]:
    return sorted((own.shape, own.color, own.size, own.center) for own in scene.objects)
