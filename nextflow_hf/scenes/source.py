"""Scenes as training data."""

import numpy as np

from .captions import caption, caption_with_places, describe
from .sampling import FAMILIES, sample_scene
from .signs import DOCUMENT_SHARE, Sign, draw_sign, render_sign, transcript, words_of_sign
from .world import Scene, lattice_for, render

QUESTION = "describe the picture"
# Asks for `captions.tell_all`: everything, with places.
WHOLE_QUESTION = "describe the picture with places"
READ_QUESTION = "what is written?"


class SceneSource:
    """Pictures of random scenes with their words; item i is the same in every run (`training.data.PairSource`).

    Args:
        size: (height, width) in pixels, or a list of sizes that take turns.
        num_pictures: How many.
        seed: Different seeds give different scenes.
        split: Which combinations may appear.
        arrangement: "orderly", "placed" or "free"; see `sample_scene`.
        families: Shares of the kinds of scenes; see `sample_scene`.
    """

    def __init__(
        self,
        size: tuple[int, int] | list[tuple[int, int]] = (64, 64),
        num_pictures: int = 100_000,
        seed: int = 0,
        split: str = "train",
        arrangement: str = "orderly",
        families: tuple[float, ...] = FAMILIES,
    ):
        self.sizes = tuple(map(tuple, np.atleast_2d(size).tolist()))
        self.num_pictures = num_pictures
        self.seed = seed
        self.split = split
        self.arrangement = arrangement
        self.families = tuple(families)

    def __len__(self) -> int:
        return self.num_pictures

    def scene(self, index: int) -> Scene:
        """Facts of picture `index`."""
        rng = np.random.default_rng((self.seed, index))
        return sample_scene(rng, self.split, lattice_for(self.size(index)), self.arrangement, self.families)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels of picture `index`."""
        return self.sizes[index % len(self.sizes)]

    def image(self, index: int) -> np.ndarray:
        """Picture `index`: uint8 `(height, width, 3)`."""
        return render(self.scene(index), self.size(index))

    def prompt(self, index: int, rng: np.random.Generator) -> str:
        """Words that ask for picture `index`."""
        tell = caption_with_places if self.arrangement == "placed" else caption
        return tell(self.scene(index), rng)

    def question(self, index: int, rng: np.random.Generator) -> tuple[str, str]:
        """A request to describe picture `index`, and its description."""
        return QUESTION, describe(self.scene(index))


class SignSource:
    """Pictures of words with what asks for them (`training.data.PairSource`).

    Args:
        num_pictures: How many.
        seed: Different seeds give different signs.
        split: Which words may appear.
        document_share: Share of documents with a title and a list.
        font: Path of a TrueType font instead of Pillow's own.
    """

    def __init__(
        self,
        num_pictures: int = 100_000,
        seed: int = 0,
        split: str = "train",
        document_share: float = DOCUMENT_SHARE,
        font: str | None = None,
    ):
        self.num_pictures, self.seed, self.split = num_pictures, seed, split
        self.document_share, self.font = document_share, font

    def __len__(self) -> int:
        return self.num_pictures

    def sign(self, index: int) -> Sign:
        """What picture `index` says."""
        return draw_sign(np.random.default_rng((self.seed, index)), self.split, self.document_share)

    def image(self, index: int) -> np.ndarray:
        """Picture `index`: uint8 `(height, width, 3)`."""
        return render_sign(self.sign(index), self.font)

    def prompt(self, index: int, rng: np.random.Generator) -> str:
        """Words that ask for picture `index`."""
        return words_of_sign(self.sign(index), rng)

    def question(self, index: int, rng: np.random.Generator) -> tuple[str, str]:
        """The question what is written, and the answer."""
        return READ_QUESTION, transcript(self.sign(index))


class SceneRecords:
    """Scenes as a dataset's records, for extraction (`docs/data.md`): with 8 wordings to draw, or one description.

    Args:
        task: "draw" for records of kind `text_to_image`, "describe" for `image_to_text`.
        source: Arguments of [`SceneSource`].

    Raises:
        ValueError: If there is no such task.
    """

    WORDINGS = 8

    def __init__(self, task: str, **source):
        if task not in ("draw", "describe"):
            raise ValueError(f'A task is "draw" or "describe", got {task!r}.')
        self.task = task
        self.source = SceneSource(**source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} records, got number {index}.")
        scene = self.source.scene(index)
        record = {"id": f"scene {self.source.seed}.{index}", "image": self.source.image(index)}
        if self.task == "describe":
            return {**record, "question": QUESTION, "text": describe(scene)}
        rng = np.random.default_rng((self.source.seed, index, 1))
        return {**record, "text": [self.source.prompt(index, rng) for _ in range(self.WORDINGS)]}
