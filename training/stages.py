"""Which function runs which stage of a recipe."""

from collections.abc import Callable
from pathlib import Path

from transformers import set_seed

from .extraction import run_extraction
from .recipe import Recipe, load_recipe
from .train_decoder import train_decoder
from .train_grpo import train_grpo
from .train_text_tokenizer import train_text_tokenizer
from .train_vq import train_teacher, train_vq


def run_chain(recipe: Recipe) -> None:
    """Run the recipes that `stage_args.recipes` names, one after another; those whose result is there are skipped.

    The chain's own `trainer` arguments (such as `bf16: true` on an accelerator) go to each of them that has a trainer
    and does not say otherwise.

    Raises:
        ValueError: If one of them is missing or unknown, before the first runs.
    """
    for own in [load_recipe(name) for name in recipe.stage_args["recipes"]]:
        if own.trainer:
            own.trainer = {**recipe.trainer, **own.trainer}
        if not is_done(own):
            run_recipe(own)


def is_done(recipe: Recipe) -> bool:
    """Whether the result of a recipe is there."""
    folder = Path(recipe.output_dir)
    if recipe.stage == "extract":
        return all((folder / name / "manifest.json").is_file() for name in recipe.data)
    return (folder / ("tokenizer.json" if recipe.stage == "text_tokenizer" else "final")).exists()


def _train_refiner(recipe: Recipe) -> None:
    # Here and not above: diffusers' pipelines take seconds to import, which no other stage should cost.
    from .train_refiner import train_refiner

    train_refiner(recipe)


STAGES: dict[str, Callable[[Recipe], None]] = {
    "text_tokenizer": train_text_tokenizer,
    "teacher": train_teacher,
    "vq": train_vq,
    "extract": run_extraction,
    "decoder": train_decoder,
    "grpo": train_grpo,
    "refiner": _train_refiner,
    "chain": run_chain,
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
