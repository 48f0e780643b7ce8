"""Conversations with pictures as batches for trainers of others: transformers' `Trainer`, and TRL's by `sft.py`."""

from collections.abc import Sequence

import torch
from PIL import Image

from ..modeling.modeling_nextflow import NextFlowForConditionalGeneration
from ..processing.processing_nextflow import NextFlowProcessor
from .documents import BrokenRecordError, DocumentReader
from .sequences import CodedImage, SequenceBuilder


class NextFlowDataCollator:
    """Rows of conversations -> the model's inputs and labels, the same sequences that the packaged stages train on.

    The assistant's turns are learned, its text and the pictures that it draws; what others say and show is only looked
    at. Pictures are encoded by the model's own image tokenizer, so batches are made where the model is: leave
    `dataloader_num_workers` at 0. `Trainer` needs `remove_unused_columns=False`.

    Args:
        processor: The processor of the checkpoint.
        model: The model that is trained; one with an adapter as well.

    Raises:
        ValueError: If the text tokenizer is of another model.
    """

    def __init__(self, processor: NextFlowProcessor, model: NextFlowForConditionalGeneration):
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.image_processor = processor.image_processor
        self.builder = SequenceBuilder(processor.tokenizer, self.model.config)

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Rows with `messages`, and their pictures in `images` as TRL has it or in the turns as chat templates do.

        Returns:
            `input_ids`, `attention_mask` and `labels` `(batch, length)`, padded on the right; where there are pictures
            `image_codes` and `image_labels` `(images, num_codes)` and `image_grids` `(images, scales, 2)`.

        Raises:
            ValueError: If a row is no conversation, or its pictures and the places for them differ in number.
        """
        reader = DocumentReader([_with_images(row) for row in rows], "messages")
        documents = [document for _, document in reader.read(0, len(rows))]
        for document in documents:
            if isinstance(document, BrokenRecordError):
                raise document
        coded = iter(self._encode([picture for document in documents for picture in document.images]))
        return self.builder.collate(
            [self.builder.build(own.messages, [next(coded) for _ in own.images]) for own in documents]
        )

    def _encode(self, pictures: list[Image.Image]) -> list[CodedImage]:
        if not pictures:
            return []
        inputs = self.image_processor(pictures, return_tensors="pt")
        codes, grids = self.model.model.encode_images(inputs["pixel_values"], inputs["image_grids"])
        return [CodedImage(own[own >= 0].tolist(), shape) for own, shape in zip(codes, grids)]


def _with_images(row: dict) -> dict:
    """The row with the pictures that stand in its turns as its `images`."""
    if row.get("messages") is None:
        raise ValueError(
            f"A row is a conversation in `messages`, got the columns {sorted(row)}. `Trainer` keeps them with "
            'remove_unused_columns=False; TRL\'s trainers need dataset_kwargs={"skip_prepare_dataset": True}, too, '
            "where rows have no `images`."
        )
    if row.get("images") is not None:
        return row
    turns = [turn["content"] for turn in row["messages"] if not isinstance(turn["content"], str)]
    pictures = [part["image"] for content in turns for part in content if part.get("image") is not None]
    return {**row, "images": pictures}
