"""Training sequences: a document's words and pictures as the tokens, labels and codes that the decoder learns from.

The text around a picture is the chat template's (ChatML), so that training and inference see the same tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ..modeling.configuration_nextflow import NextFlowConfig
from ..modeling.scale_schedule import Grid, all_blocks
from ..processing.processing_nextflow import THINK_OPENING
from .documents import is_learned

IGNORED = -100


class CodedImage(NamedTuple):
    """A picture as codes.

    Attributes:
        codes: The nearest code of every position, scale by scale: what is learned.
        grids: The scales.
        input_codes: What the slots are fed; `codes` where self-correction has sampled none.
    """

    codes: Sequence[int]
    grids: tuple[Grid, ...]
    input_codes: Sequence[int] | None = None


class SequenceBuilder:
    """Builds the sequence of a document.

    A sequence is a dict: `input_ids` and `labels` of equal length, and one entry per image in `codes` (fed),
    `image_labels` (predicted; `IGNORED` in context) and `grids`.

    Args:
        tokenizer: The text tokenizer; a fast one, which tells where a token's text stands.
        config: The decoder's configuration.
        prefix_scales: Train the first so many scales only; a sequence then ends with the last of their slots.

    Raises:
        ValueError: If the tokenizer has more tokens than the decoder has before its codes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: NextFlowConfig, prefix_scales: int | None = None):
        if len(tokenizer) > config.code_start_id:
            raise ValueError(
                f"The text tokenizer has {len(tokenizer)} tokens, but the decoder's codes begin at "
                f"{config.code_start_id}: it was made for another tokenizer."
            )
        self.tokenizer = tokenizer
        self.config = config
        self.prefix_scales = prefix_scales
        self.end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def build(
        self,
        messages: Sequence[dict],
        images: Sequence[CodedImage],
        without_prompt: bool = False,
        shows_last: bool = False,
    ) -> dict:
        """The sequence of a document.

        Args:
            messages: Turns as in chat templates: `role`, and `content` as text or as a list of {"type": "text", "text":
                ...} and {"type": "image"}. Loss is on the turns of the assistant but those whose `weight` is 0. A
                single turn without a role is a document without turns, with loss on everything.
            images: The pictures, in order.
            without_prompt: Leave out all text that stands before the last turn, for classifier-free guidance. Pictures
                stay, as in the branch of `generate` that knows no prompt.
            shows_last: Whether a picture that is all of the last turn shows its finest codes, as one does that
                something may follow.

        Raises:
            ValueError: If pictures and places for them differ in number.
        """
        places = sum(part["type"] == "image" for turn in messages for part in _parts(turn))
        if places != len(images):
            raise ValueError(f"The document has places for {places} pictures, but {len(images)} were given.")
        # A picture that is all of the last turn is looked at by nothing.
        ends_drawing = not shows_last and [part["type"] for part in _parts(messages[-1])] == ["image"]
        if without_prompt:
            answer = {**messages[-1], "role": None}
            seen = len(images) - sum(part["type"] == "image" for part in _parts(answer))
            turns = [[(None, False)] * seen, [*_marked(answer), ("<|im_end|>", True)]]
            return self._join(turns, images, opens=False, ends_drawing=ends_drawing)
        turns = []
        for number, turn in enumerate(messages):
            learned = is_learned(turn)
            before, after = ("", "") if turn["role"] is None else (f"<|im_start|>{turn['role']}\n", "<|im_end|>")
            gap = "\n" if number else ""
            turns.append([(gap + before, False), *_marked(turn, learned), (after, learned)])
        return self._join(turns, images, messages[0]["role"] is not None, ends_drawing)

    def draw(
        self,
        prompt: str | None,
        codes: Sequence[int],
        grids: tuple[Grid, ...],
        input_codes: Sequence[int] | None = None,
    ) -> dict:
        """A prompt and the picture that answers it; loss on the picture. No prompt: the picture alone, for guidance."""
        messages = [{"role": "user", "content": prompt or ""}, {"role": "assistant", "content": [{"type": "image"}]}]
        return self.build(messages, [CodedImage(codes, grids, input_codes)], without_prompt=prompt is None)

    def read(self, question: str, answer: str, codes: Sequence[int], grids: tuple[Grid, ...]) -> dict:
        """A picture with a question, and the answer; loss on the answer."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return self.build(messages, [CodedImage(codes, grids)])

    def _join(self, turns: list[list[tuple]], images: Sequence[CodedImage], opens: bool, ends_drawing: bool) -> dict:
        """Tokens and labels of pieces (text or `None` for an image, whether it is learned)."""
        sequence = {"input_ids": [], "labels": [], "codes": [], "image_labels": [], "grids": []}
        left = list(images)
        waiting: list[tuple[str, bool]] = []
        for text, learned in (piece for turn in turns for piece in turn):
            if text is not None:
                waiting.append((text, learned))
                continue
            self._add_text(sequence, waiting)
            waiting = []
            image = left.pop(0)
            if not self._add_image(sequence, image, learned, is_followed=bool(left) or not ends_drawing):
                return self._without_first_label(sequence)
        self._add_text(sequence, waiting)
        return sequence if opens else self._without_first_label(sequence)

    @staticmethod
    def _without_first_label(sequence: dict) -> dict:
        """Nothing stands before the first token, so nothing predicts it."""
        sequence["labels"][0] = IGNORED
        return sequence

    def _add_text(self, sequence: dict, pieces: list[tuple[str, bool]]) -> None:
        """Tokenize neighbouring pieces as one text, as inference does; a token's label is that of where it starts."""
        text = "".join(piece for piece, _ in pieces)
        if not text:
            return
        learned = [flag for piece, flag in pieces for _ in piece]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        sequence["input_ids"] += encoded.input_ids
        sequence["labels"] += [
            token if learned[start] else IGNORED for token, (start, _) in zip(encoded.input_ids, encoded.offset_mapping)
        ]

    def _add_image(self, sequence: dict, image: CodedImage, learned: bool, is_followed: bool) -> bool:
        """Append an image; whether the sequence goes on behind it."""
        whole = not learned or self.prefix_scales is None or self.prefix_scales >= len(image.grids)
        context = self.config.context_image
        blocks = image.grids[1:] if whole else image.grids[1 : self.prefix_scales]
        if not learned and context == "final":
            blocks = image.grids[-1:]
        elif whole and (is_followed or not learned) and context != "scales":
            blocks = all_blocks(image.grids)
        slots = _cells(blocks)
        sequence["input_ids"] += [self.config.boi_token_id, *[self.config.image_token_id] * slots]
        sequence["labels"] += [self.config.boi_token_id if learned else IGNORED, *[IGNORED] * slots]
        if whole:
            sequence["input_ids"].append(self.config.eoi_token_id)
            sequence["labels"].append(IGNORED)
        codes = list(image.codes)
        predicted = _cells(image.grids[:1] + tuple(blocks)) if learned else 0
        sequence["codes"].append(codes if image.input_codes is None else list(image.input_codes))
        sequence["image_labels"].append(codes[:predicted] + [IGNORED] * (len(codes) - predicted))
        sequence["grids"].append(image.grids)
        return whole

    def collate(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """Pad to the longest sequence on the right, and stack."""
        input_ids = pad_rows([item["input_ids"] for item in items], self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "labels": pad_rows([item["labels"] for item in items], IGNORED),
            **stack_images(items),
            **ids_of(items),
        }


def stack_images(items: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Codes, labels and grids of all images of the sequences, in order; empty if there are none."""
    grids = [own for item in items for own in item["grids"]]
    if not grids:
        return {}
    return {
        "image_codes": pad_rows([own for item in items for own in item["codes"]], -1),
        "image_labels": pad_rows([own for item in items for own in item["image_labels"]], IGNORED),
        "image_grids": torch.nn.utils.rnn.pad_sequence([torch.tensor(own) for own in grids], batch_first=True),
    }


def ids_of(items: Sequence[dict]) -> dict[str, list[str]]:
    """Names of the sequences' records, where they have names, for the report of a step that fails."""
    return {"ids": [item["id"] for item in items]} if all("id" in item for item in items) else {}


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> torch.LongTensor:
    """Rows of unequal length, filled up on the right."""
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long)


def _parts(turn: dict) -> list[dict]:
    content = turn["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _marked(turn: dict, learned: bool = True) -> list[tuple[str | None, bool]]:
    """Pieces of a turn. The tag that opens a thought is not learned: chat templates write it where one is wanted."""
    pieces = [(part["text"] if part["type"] == "text" else None, learned) for part in _parts(turn)]
    first = pieces[0][0]
    if first is not None and first.startswith(THINK_OPENING):
        pieces[:1] = [(THINK_OPENING, False), (first.removeprefix(THINK_OPENING), learned)]
    return pieces


def _cells(grids: Sequence[Grid]) -> int:
    return sum(height * width for height, width in grids)
