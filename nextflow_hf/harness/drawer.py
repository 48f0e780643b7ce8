"""What draws a benchmark's pictures: a checkpoint, or anything with the same three methods."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import transformers
from PIL import Image

from ..inference import load, own_resolution, prepare, user


class Drawing(NamedTuple):
    """A picture to be drawn: of a prompt, perhaps with pictures, from a seed."""

    key: str
    prompt: str
    sources: tuple[Image.Image, ...]
    seed: int


class Drawer(Protocol):
    """Draws pictures; each depends on its own [`Drawing`] alone."""

    def settings(self) -> dict:
        """All that moves a picture and is not in the command: as JSON knows it."""

    def check(self, prompt: str, sources: Sequence[Image.Image]) -> None:
        """Raise `ValueError` if a prompt with these pictures cannot be drawn."""

    def draw(self, drawings: Sequence[Drawing]) -> list[Image.Image]:
        """A picture for each."""


def seed_of(seed: int, prompt: int, sample: int) -> int:
    """Seed of one picture, from the run's seed, the prompt's place and the sample's: nothing else moves it."""
    return int(np.random.SeedSequence((seed, prompt, sample)).generate_state(1)[0])


class CheckpointDrawer:
    """Draws with a checkpoint.

    Args:
        checkpoint: "mini", a folder or a Hub id.
        size: (height, width) in pixels; `None` draws prompts at the checkpoint's first size, and edits of one picture
            at that picture's aspect ratio.
        device: Where the model runs; by default on the accelerator, if there is one.
        negative_prompt: What guidance leads away from.
        sampling: Goes to `generate`.
    """

    def __init__(
        self,
        checkpoint: str,
        size: tuple[int, int] | None = None,
        device: str | None = None,
        negative_prompt: str | None = None,
        **sampling,
    ):
        self._model, self._processor = load(checkpoint, device)
        self._size, self._sampling, self._negative = size, sampling, {}
        if negative_prompt is not None:
            negative = prepare(self._processor, [[user(negative_prompt)]]).to(self._model.device)
            self._negative = {
                "negative_prompt_ids": negative["input_ids"],
                "negative_prompt_attention_mask": negative["attention_mask"],
            }

    def settings(self) -> dict:
        """See [`Drawer`]."""
        names = ("guidance_scale", "temperature", "top_k", "top_p")
        chosen = self._model._image_sampling(**{name: self._sampling.get(name) for name in names})
        return {
            "sampling": vars(chosen),
            "resampling": getattr(self._model.generation_config, "image_resampling", None),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": self._model.device.type,
            "revision": getattr(self._model.config, "_commit_hash", None),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def check(self, prompt: str, sources: Sequence[Image.Image]) -> None:
        """See [`Drawer`]."""
        prepare(self._processor, [[user(prompt)]])
        for own in sources:
            self._processor.image_processor.bucket_of(own.height, own.width)

    def draw(self, drawings: Sequence[Drawing]) -> list[Image.Image]:
        """See [`Drawer`]."""
        # Pictures of one call are looked at on one level, and all of them or none keep the size of what they edit.
        kinds = [
            (own_resolution(self._model, own.sources[-1]) if own.sources else None, len(own.sources) == 1)
            for own in drawings
        ]
        pictures: dict[int, Image.Image] = {}
        for kind in dict.fromkeys(kinds):
            places = [place for place, own in enumerate(kinds) if own == kind]
            pictures |= zip(places, self._draw([drawings[place] for place in places], *kind))
        return [pictures[place] for place in range(len(drawings))]

    def _draw(self, drawings: Sequence[Drawing], level: int | None, is_edit: bool) -> list[Image.Image]:
        conversations = [[user(*own.sources, own.prompt)] for own in drawings]
        inputs = prepare(self._processor, conversations, level).to(self._model.device)
        sizes = {} if self._size is None else {"image_size": self._size}
        if self._size is None and is_edit:
            sizes = {"image_size": [self._seen_size(grids) for grids in inputs["image_grids"].tolist()]}
        output = self._model.generate(
            **inputs,
            **self._negative,
            generation_mode="image",
            seed=[own.seed for own in drawings],
            **sizes,
            **self._sampling,
        )
        return self._processor.post_process_multimodal_output(output, generation_mode="image")

    def _seen_size(self, grids: list[list[int]]) -> tuple[int, int]:
        """(height, width) in pixels of a picture as the model sees it; scales are padded with zeros."""
        return self._model.config.schedule.image_size(tuple([own for own in grids if own[0]][-1]))
