"""Which function runs which stage of a recipe."""

from collections.abc import Callable

from transformers import set_seed

from .extraction import run_extraction
from .recipe import Recipe
from .train_decoder import train_decoder
from .train_text_tokenizer import train_text_tokenizer
from .train_vq import train_teacher, train_vq

STAGES: dict[str, Callable[[Recipe], None]] = {
    "text_tokenizer": train_text_tokenizer,
    "teacher": train_teacher,
    "vq": train_vq,
    "extract": run_extraction,
    "decoder": train_decoder,
}


def run_recipe(recipe: Recipe) -> None:
    """Run a recipe's stage.

    Raises:
        ValueError: If there is no such stage.
    """
    if recipe.stage not in STAGES:
        raise ValueError(f"A recipe's stage is one of {sorted(STAGES)}, got {recipe.stage!r}.")
    # New weights are drawn before the trainer sets its seed.
    set_seed(recipe.trainer.get("seed", 0))
    STAGES[recipe.stage](recipe)
