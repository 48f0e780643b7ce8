"""What training reads: pictures with words, from wherever they come."""

import importlib
from typing import Protocol

import numpy as np


class PairSource(Protocol):
    """Pictures that can be described and asked for. Items are addressed by number, so that runs resume exactly.

    `nextflow_hf.scenes` has one; any object with these methods will do.
    """

    def __len__(self) -> int:
        """Number of pictures."""

    def image(self, index: int) -> np.ndarray:
        """Picture `index`: uint8 `(height, width, 3)`."""

    def prompt(self, index: int, rng: np.random.Generator) -> str:
        """Words that ask for picture `index`; may differ from call to call."""

    def question(self, index: int, rng: np.random.Generator) -> tuple[str, str]:
        """A question about picture `index` and its answer."""


class MixedSource:
    """Pictures of several sources, mixed by weight; item i is the same in every run.

    Args:
        sources: What [`load_source`] takes, each with a `weight`.
        num_pictures: How many.
        seed: Seed of the order.

    Raises:
        ValueError: If a weight is not positive.
    """

    def __init__(self, sources: list[dict], num_pictures: int = 1_000_000, seed: int = 0):
        weights = np.array([spec.get("weight", 1.0) for spec in sources], np.float64)
        if not len(weights) or weights.min() <= 0:
            raise ValueError(f"Each source needs a positive weight, got {weights.tolist()}.")
        self.sources = [
            load_source({name: value for name, value in spec.items() if name != "weight"}) for spec in sources
        ]
        self.shares = weights / weights.sum()
        self.num_pictures, self.seed = num_pictures, seed

    def __len__(self) -> int:
        return self.num_pictures

    def _place(self, index: int) -> tuple[PairSource, int]:
        source = self.sources[np.random.default_rng((self.seed, index)).choice(len(self.sources), p=self.shares)]
        return source, index % len(source)

    def image(self, index: int) -> np.ndarray:
        """Picture `index`: uint8 `(height, width, 3)`."""
        source, own = self._place(index)
        return source.image(own)

    def prompt(self, index: int, rng: np.random.Generator) -> str:
        """Words that ask for picture `index`."""
        source, own = self._place(index)
        return source.prompt(own, rng)

    def question(self, index: int, rng: np.random.Generator) -> tuple[str, str]:
        """A question about picture `index` and its answer."""
        source, own = self._place(index)
        return source.question(own, rng)


def load_source(spec: dict) -> PairSource:
    """Build a source from a recipe's `source` entry.

    Args:
        spec: `class`: "module:name" of the source's class; everything else goes to its constructor.

    Raises:
        ValueError: If the entry names no importable class.
    """
    spec = dict(spec)
    return import_class(spec.pop("class", None))(**spec)


def import_class(path: str | None):
    """The class that a recipe names as "module:name".

    Raises:
        ValueError: If it names no importable class.
    """
    module_name, _, name = (path or "").partition(":")
    if not name:
        raise ValueError(f'A recipe\'s `source` needs `class: "module:name"`, got {path!r}.')
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The recipe's source {path!r} cannot be imported: {error}") from error


def to_pixels(images: np.ndarray) -> np.ndarray:
    """uint8 `(..., height, width, 3)` -> float32 `(..., 3, height, width)` in [-1, 1]."""
    return np.moveaxis(images.astype(np.float32) / 127.5 - 1.0, -1, -3)
