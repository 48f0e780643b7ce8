"""Extracted documents as training reads them: several datasets mixed by weight, item by number."""

import hashlib
import json
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from .documents import is_learned
from .sequences import CodedImage, SequenceBuilder

# Items whose order is drawn at a time.
_BLOCK = 65_536
_BLOCKS_KEPT = 32
# Share of the pictures at the end of a document that show their finest codes all the same.
_SHOWN_ENDINGS = 0.1


class CodedDocuments(Dataset):
    """Documents that `extract` wrote for one dataset.

    Args:
        folder: The dataset's folder, with its manifest.
        fingerprint: Fingerprint of the tokenizer that the decoder has; codes of another are refused.

    Raises:
        ValueError: If the extraction was not finished, a shard is missing, or the codes are another tokenizer's.
    """

    def __init__(self, folder: str | Path, fingerprint: str | None = None):
        import datasets

        folder = Path(folder)
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise ValueError(f"{folder} has no manifest.json: run the extraction to its end first.")
        self.manifest = json.loads(manifest.read_text())
        found = self.manifest["codebook_fingerprint"]
        if fingerprint is not None and found != fingerprint:
            raise ValueError(f"{folder} holds codes of the tokenizer {found}, but the decoder's is {fingerprint}.")
        files = [folder / own["file"] for own in self.manifest["shards"]]
        missing = [str(own) for own in files if not own.is_file()]
        if missing:
            raise ValueError(f"The manifest of {folder} lists shards that are not there: {missing}.")
        if not self.manifest["documents"]:
            raise ValueError(f"{folder} holds no documents.")
        self.rows = datasets.Dataset.from_parquet([str(own) for own in files])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[str, list[dict], list[CodedImage]]:
        """Id, messages, and the pictures as codes."""
        row = self.rows[index]
        images = [
            CodedImage(codes, tuple(tuple(grid) for grid in grids), fed)
            for codes, grids, fed in zip(row["codes"], row["grids"], row["input_codes"])
        ]
        return row["id"], json.loads(row["messages"]), images


class MixedSequences(Dataset):
    """Sequences of several datasets, mixed by weight; item i is the same in every run and on every rank.

    Every dataset is gone through in a new random order each time before one of its documents comes again.

    Args:
        sources: The datasets.
        weights: Share of the items that each gives, to be normalised.
        builder: Makes the sequences.
        length: Number of items.
        prompt_dropout: Share of the documents whose answer is a picture that lose their prompt, for guidance.
        task_inversion: Share of the prompts answered by one picture that are turned round: the picture asks, the prompt
            answers (NextFlow section 6.7).
        seed: Seed of the order and of all that is drawn.

    Raises:
        ValueError: If weights and datasets differ in number, or a weight is not positive.
    """

    def __init__(
        self,
        sources: list[CodedDocuments],
        weights: list[float],
        builder: SequenceBuilder,
        length: int,
        prompt_dropout: float = 0.1,
        task_inversion: float = 0.0,
        seed: int = 0,
    ):
        if len(weights) != len(sources) or not sources or min(weights) <= 0:
            raise ValueError(f"Each of {len(sources)} datasets needs a positive weight, got {weights}.")
        self.sources, self.builder, self.seed = sources, builder, seed
        self.prompt_dropout, self.task_inversion = prompt_dropout, task_inversion
        self.length = length
        shares = np.array(weights, dtype=np.float64) / sum(weights)
        if min(shares) * _BLOCK < 2:
            raise ValueError(f"The weights {weights} differ by more than {_BLOCK // 2} times.")
        self.bounds = np.concatenate([[0.0], np.cumsum(shares)[:-1], [1.0]])
        self.blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self):
        return self.length

    def place_of(self, index: int) -> tuple[int, int]:
        """Which dataset item `index` comes from, and which of its documents."""
        if not 0 <= index < self.length:
            raise IndexError(f"There are {self.length} items, got number {index}.")
        block, place = divmod(index, _BLOCK)
        if block not in self.blocks:
            # Items are read nearly in order, or there are few of them.
            if len(self.blocks) == _BLOCKS_KEPT:
                self.blocks.pop(next(iter(self.blocks)))
            self.blocks[block] = self._draw_block(block)
        numbers, ranks = self.blocks[block]
        number, rank = int(numbers[place]), int(ranks[place])
        size = len(self.sources[number])
        return number, shuffled(rank % size, size, key=f"{self.seed} {number} {rank // size}")

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the items of a block, the dataset, and the how manieth item of that dataset each is.

        Block by block, so that the order of billions of items needs no memory. A block's numbers of items follow from
        the weights, so it can be drawn without those before it.
        """
        before, after = np.floor(block * _BLOCK * self.bounds), np.floor((block + 1) * _BLOCK * self.bounds)
        first, stop = np.diff(before).astype(np.int64), np.diff(after).astype(np.int64)
        numbers = np.repeat(np.arange(len(first)), stop - first)
        np.random.default_rng((self.seed, block)).shuffle(numbers)
        ranks = np.empty(_BLOCK, dtype=np.int64)
        for number in range(len(first)):
            ranks[numbers == number] = np.arange(first[number], stop[number])
        return numbers, ranks

    def __getitem__(self, index: int) -> dict:
        number, document = self.place_of(index)
        name, messages, images = self.sources[number][document]
        rng = np.random.default_rng((self.seed, index))
        messages = [{**turn, "content": [_one_wording(part, rng) for part in turn["content"]]} for turn in messages]
        if self.task_inversion and _is_text_to_image(messages) and rng.random() < self.task_inversion:
            asked, answered = messages
            messages = [{**answered, "role": "user"}, {**asked, "role": "assistant"}]
            # A picture that is looked at is fed what was stored as its input, and learned no more.
            images = [own._replace(codes=own.input_codes) for own in images]
        answers_with_a_picture = (
            messages[-1]["role"] == "assistant"
            and is_learned(messages[-1])
            and any(part["type"] == "image" for part in messages[-1]["content"])
        )
        without_prompt = answers_with_a_picture and rng.random() < self.prompt_dropout
        # Where text and pictures take turns, drawing cannot know that a picture is the last: a few are shown, so that
        # the model learns to end its turn behind the final block as well.
        shows_last = rng.random() < _SHOWN_ENDINGS
        return {"id": name, **self.builder.build(messages, images, without_prompt, shows_last)}


def shuffled(index: int, size: int, key: str) -> int:
    """Item `index` of a random order of `size` items, without making the order.

    A Feistel network permutes the next power of four; what falls outside goes round again.
    """
    half = max(1, (size - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            digest = hashlib.blake2s(f"{key} {turn} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest) & mask)
        index = left << half | right
        if index < size:
            return index


def _is_text_to_image(messages: list[dict]) -> bool:
    kinds = [(turn["role"], [part["type"] for part in turn["content"]]) for turn in messages]
    return kinds == [("user", ["text"]), ("assistant", ["image"])]


def _one_wording(part: dict, rng: np.random.Generator) -> dict:
    if part["type"] == "text" and isinstance(part["text"], list):
        return {**part, "text": part["text"][rng.integers(len(part["text"]))]}
    return part
