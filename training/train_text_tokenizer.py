"""The small text tokenizer, learned from the words of training itself."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..modeling.configuration_nextflow import MINI_TEXT_VOCAB_SIZE
from ..processing.tokenization_nextflow import train_tokenizer
from .data import load_source
from .documents import load_reader
from .recipe import Recipe
from .stage_trainer import check_writable, save_whole


def train_text_tokenizer(recipe: Recipe) -> None:
    """Train a byte-level BPE on a source's prompts, questions and answers, or on the texts of datasets.

    `stage_args`: `texts` (pictures of the source, or records of each dataset, whose words are read), `vocab_size`,
    `min_frequency` (of pairs that are merged).

    Raises:
        ValueError: If the recipe names neither `data` nor a `source`, or both.
    """
    if bool(recipe.data) == bool(recipe.source):
        raise ValueError("A text tokenizer's recipe needs either `data` (datasets) or a `source` of pictures.")
    folder = Path(recipe.output_dir)
    check_writable(folder.parent)
    number = recipe.stage_args.get("texts", 20_000)
    texts = _texts_of_source(recipe.source, number) if recipe.source else _texts_of_data(recipe.data, number)
    vocab_size = recipe.stage_args.get("vocab_size", MINI_TEXT_VOCAB_SIZE)
    tokenizer = train_tokenizer(texts, vocab_size, recipe.stage_args.get("min_frequency", 0))
    save_whole(folder, tokenizer.save_pretrained)


def _texts_of_source(spec: dict, number: int) -> Iterator[str]:
    source = load_source(spec)
    for index in range(number):
        rng = np.random.default_rng(index)
        question, answer = source.question(index, rng)
        for role, text in (("user", source.prompt(index, rng)), ("user", question), ("assistant", answer)):
            yield f"{role}\n{text}"


def _texts_of_data(data: dict[str, dict], number: int) -> Iterator[str]:
    for spec in data.values():
        yield from load_reader(spec).texts(number)
