"""Training sequences: a picture and its words as the tokens, labels and codes that the decoder learns from.

The text around a picture is the chat template's (ChatML), so that training and inference see the same tokens.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ..modeling.configuration_nextflow import NextFlowConfig
from ..modeling.scale_schedule import Grid

IGNORED = -100


class SequenceBuilder:
    """Builds sequences around one picture.

    Args:
        tokenizer: The text tokenizer.
        config: The decoder's configuration.
        prefix_scales: Train the first so many scales only; the sequence then ends with the last of their slots.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: NextFlowConfig, prefix_scales: int | None = None):
        self.tokenizer = tokenizer
        self.config = config
        self.prefix_scales = prefix_scales
        self.end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def draw(self, prompt: str | None, codes: Sequence[int], grids: tuple[Grid, ...]) -> dict:
        """A prompt and the picture that answers it; loss on the picture. No prompt: the picture alone, for guidance."""
        if prompt is None:
            text = []
        else:
            text = self._ids(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
        whole = self.prefix_scales is None or self.prefix_scales >= len(grids)
        blocks = grids[1:] if whole else grids[1 : self.prefix_scales]
        image = [self.config.boi_token_id, *[self.config.image_token_id] * _cells(blocks)]
        labels = [IGNORED if prompt is None else self.config.boi_token_id, *[IGNORED] * _cells(blocks)]
        if whole:
            image += [self.config.eoi_token_id, self.end_of_turn]
            labels += [IGNORED, self.end_of_turn]
        return {
            "input_ids": text + image,
            "labels": [IGNORED] * len(text) + labels,
            "codes": codes,
            "image_labels": codes[: _cells(grids[:1] + blocks)],
            "grids": grids,
        }

    def read(self, question: str, answer: str, codes: Sequence[int], grids: tuple[Grid, ...]) -> dict:
        """A picture with a question, and the answer; loss on the answer."""
        slots = _cells(grids[1:])
        if self.config.context_image == "scales+final":
            slots += _cells(grids[-1:])
        before = self._ids("<|im_start|>user\n")
        image = [self.config.boi_token_id, *[self.config.image_token_id] * slots, self.config.eoi_token_id]
        after = self._ids(f"{question}<|im_end|>\n<|im_start|>assistant\n")
        reply = [*self._ids(answer), self.end_of_turn]
        return {
            "input_ids": before + image + after + reply,
            "labels": [IGNORED] * (len(before) + len(image) + len(after)) + reply,
            "codes": codes,
            "image_labels": [],
            "grids": grids,
        }

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def collate(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """Pad to the longest sequence on the right, and stack."""
        pad = self.tokenizer.pad_token_id
        input_ids = _pad([item["input_ids"] for item in items], pad)
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "labels": _pad([item["labels"] for item in items], IGNORED),
            "image_codes": _pad([item["codes"] for item in items], -1),
            "image_labels": _pad([item["image_labels"] for item in items], IGNORED, _longest(items)),
            "image_grids": torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(item["grids"]) for item in items], batch_first=True
            ),
        }


def _longest(items: list[dict]) -> int:
    return max(len(item["codes"]) for item in items)


def _cells(grids: Sequence[Grid]) -> int:
    return sum(height * width for height, width in grids)


def _pad(rows: list[Sequence[int]], value: int, length: int | None = None) -> torch.LongTensor:
    length = max(len(row) for row in rows) if length is None else length
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
