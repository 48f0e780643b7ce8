"""The small text tokenizer, learned from a source's own words."""

from pathlib import Path

import numpy as np

from ..modeling.configuration_nextflow import MINI_TEXT_VOCAB_SIZE
from ..processing.tokenization_nextflow import train_tokenizer
from .data import load_source
from .recipe import Recipe
from .stage_trainer import check_writable, save_whole


def train_text_tokenizer(recipe: Recipe) -> None:
    """Train a byte-level BPE on prompts, questions and answers.

    `stage_args`: `texts` (pictures whose words are read), `vocab_size`.
    """
    folder = Path(recipe.output_dir)
    check_writable(folder.parent)
    source = load_source(recipe.source)

    def texts():
        for index in range(recipe.stage_args.get("texts", 20_000)):
            rng = np.random.default_rng(index)
            question, answer = source.question(index, rng)
            for role, text in (("user", source.prompt(index, rng)), ("user", question), ("assistant", answer)):
                yield f"{role}\n{text}"

    tokenizer = train_tokenizer(texts(), recipe.stage_args.get("vocab_size", MINI_TEXT_VOCAB_SIZE))
    save_whole(folder, tokenizer.save_pretrained)
