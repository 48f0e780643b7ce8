"""A dataset's pictures, cut to the schedule's aspect ratios, for the tokenizer's stages."""

import logging

import numpy as np

from ..modeling.configuration_nextflow import NextFlowConfig
from ..processing.image_processing_base_nextflow import buckets_from_schedule
from ..processing.image_processing_pil_nextflow import NextFlowImageProcessorPil
from .documents import BrokenRecordError, Document, load_reader

logger = logging.getLogger(__name__)


class DatasetPictures:
    """The first picture of every record and its words, as a [`PairSource`](data.py).

    A broken record is logged by its id, and the next one that is whole takes its place.

    Args:
        data: The dataset; see `load_reader`. It must not be streamed, as items are addressed by number.
        resolution: Level of the schedule, as the side of its square picture in pixels.
        preset: Whose schedule: a name of `NextFlowConfig.from_preset`.
        max_broken: Broken records after which it stops.

    Raises:
        ValueError: If the dataset is streamed or empty; when items are read, if too many records are broken.
    """

    def __init__(self, data: dict, resolution: int, preset: str = "nextflow-7b", max_broken: int = 100):
        self.reader = load_reader(data)
        if self.reader.is_streamed or not len(self.reader):
            raise ValueError("Pictures are addressed by number: the dataset must not be streamed, and not be empty.")
        schedule = NextFlowConfig.from_preset(preset).schedule
        self.image_processor = NextFlowImageProcessorPil(
            buckets=buckets_from_schedule(schedule), resolution=resolution, downsample=schedule.downsample
        )
        self.max_broken = max_broken
        self.broken: set[int] = set()

    def __len__(self) -> int:
        return len(self.reader)

    def image(self, index: int) -> np.ndarray:
        """Picture `index`, resized and cropped to its nearest aspect ratio: uint8 `(height, width, 3)`."""
        pixels = self.image_processor(self._document(index).images[:1], return_tensors="np")["pixel_values"][0]
        return np.rint((np.moveaxis(pixels, 0, -1) + 1) * 127.5).astype(np.uint8)

    def prompt(self, index: int, rng: np.random.Generator) -> str:
        """One of the wordings that come with picture `index`."""
        wordings = _wordings(self._document(index))
        return wordings[rng.integers(len(wordings))]

    def question(self, index: int, rng: np.random.Generator) -> tuple[str, str]:
        """A request to describe picture `index`, and its words."""
        return "describe the picture", self.prompt(index, rng)

    def _document(self, index: int) -> Document:
        for number in range(index, index + len(self)):
            number %= len(self)
            ((_, document),) = self.reader.read(number, number + 1)
            if not isinstance(document, BrokenRecordError):
                try:
                    if not document.images or not _wordings(document):
                        raise ValueError("a picture with words is needed")
                    self.image_processor.bucket_of(document.images[0].height, document.images[0].width)
                    return document
                except ValueError as error:
                    document = BrokenRecordError(f"record {document.id}: {error}")
            if number not in self.broken:
                self.broken.add(number)
                logger.warning("left out: %s", document)
            if len(self.broken) > self.max_broken:
                break
        raise ValueError(f"{len(self.broken)} records are broken, more than max_broken={self.max_broken}: {document}")


def _wordings(document: Document) -> list[str]:
    """Ways to say what the picture shows; none where a document has no words."""
    turns = document.messages
    # Where a turn answers with words, they are about the picture, and what was asked may be anything.
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    texts = [part["text"] for turn in (*answers, *turns) for part in turn["content"] if part["type"] == "text"]
    return texts[0] if texts and isinstance(texts[0], list) else texts[:1]
