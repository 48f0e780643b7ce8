"""Extracted documents as training reads them: several datasets mixed by weight, item by number."""

import json
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from .sequences import CodedImage, SequenceBuilder


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
        rng = np.random.default_rng(seed)
        shares = np.array(weights, dtype=np.float64) / sum(weights)
        self.source_of = rng.choice(len(sources), size=length, p=shares).astype(np.int16)
        self.document_of = np.empty(length, dtype=np.int64)
        for number, source in enumerate(sources):
            places = np.flatnonzero(self.source_of == number)
            passes = [rng.permutation(len(source)) for _ in range(-(-len(places) // len(source)))]
            if passes:
                self.document_of[places] = np.concatenate(passes)[: len(places)]

    def __len__(self):
        return len(self.source_of)

    def __getitem__(self, index: int) -> dict:
        name, messages, images = self.sources[self.source_of[index]][int(self.document_of[index])]
        rng = np.random.default_rng((self.seed, index))
        messages = [{**turn, "content": [_one_wording(part, rng) for part in turn["content"]]} for turn in messages]
        if self.task_inversion and _is_text_to_image(messages) and rng.random() < self.task_inversion:
            (asked, answered), image = messages, images[0]
            messages = [{**answered, "role": "user"}, {**asked, "role": "assistant"}]
            # A picture that is looked at is fed what was stored as its input, and learned no more.
            images = [image._replace(codes=image.input_codes)]
        answers_with_a_picture = messages[-1]["role"] == "assistant" and any(
            part["type"] == "image" for part in messages[-1]["content"]
        )
        without_prompt = answers_with_a_picture and rng.random() < self.prompt_dropout
        return {"id": name, **self.builder.build(messages, images, without_prompt)}


def _is_text_to_image(messages: list[dict]) -> bool:
    kinds = [(turn["role"], [part["type"] for part in turn["content"]]) for turn in messages]
    return kinds == [("user", ["text"]), ("assistant", ["image"])]


def _one_wording(part: dict, rng: np.random.Generator) -> dict:
    if part["type"] == "text" and isinstance(part["text"], list):
        return {**part, "text": part["text"][rng.integers(len(part["text"]))]}
    return part
