"""Which function runs which stage of a recipe."""

import os
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from transformers import set_seed

from .. import ADAPTERS, BUNDLED, REFINERS
from .difference_adapter import make_adapter
from .extraction import ExtractionSettings, run_extraction
from .recipe import RECIPES, Recipe, flat_entries, load_recipe
from .rejection import REJECTION_DEFAULTS, run_rejection
from .train_decoder import train_decoder
from .train_grpo import train_grpo
from .train_text_tokenizer import train_text_tokenizer
from .train_vq import train_teacher, train_vq


def run_chain(recipe: Recipe) -> None:
    """Run the recipes that `stage_args.recipes` names, one after another; those whose result is there are skipped.

    The chain's own `trainer` arguments (such as `bf16: true` on an accelerator) go to each of them that has a trainer
    and does not say otherwise, and what they write goes into the chain's `output_dir`. Everything else is each
    recipe's own.

    Raises:
        ValueError: If one of them is missing or unknown, or the chain has entries that none of them would get, before
            the first runs.
        ImportError: If one of them needs TRL, and it is not installed.
    """
    lost = [name for name in ("config", "init_from", "source", "data") if getattr(recipe, name)]
    if lost:
        raise ValueError(f"A chain's recipes have their own {lost}; run the one that is meant by itself.")
    recipes = [load_recipe(name) for name in recipe.stage_args["recipes"]]
    if any(own.stage == "grpo" for own in recipes) and find_spec("trl") is None:
        raise ImportError('One of the recipes is reinforcement learning: pip install "nextflow-hf[rl]".')
    _move(recipes, Path(recipe.output_dir))
    for own in recipes:
        if own.trainer:
            own.trainer = {**recipe.trainer, **own.trainer}
        if not is_done(own):
            run_recipe(own)


def _move(recipes: list[Recipe], folder: Path) -> None:
    """Let recipes write into a folder and read each other's results there; what others made stays where it is."""
    written = {Path(own.output_dir) for own in recipes}
    base = os.path.commonpath([path.parent for path in written])

    def moved(path: str) -> str:
        is_theirs = not written.isdisjoint((Path(path), *Path(path).parents))
        return str(folder / Path(path).relative_to(base)) if is_theirs else path

    for own in recipes:
        own.output_dir = moved(own.output_dir)
        own.init_from = {role: moved(start) for role, start in own.init_from.items()}
        for dataset in own.data.values():
            if "codes" in dataset:
                dataset["codes"] = moved(dataset["codes"])


def is_done(recipe: Recipe) -> bool:
    """Whether the result of a recipe is there."""
    folder = Path(recipe.output_dir)
    if recipe.stage == "extract":
        return all((folder / name / "manifest.json").is_file() for name in recipe.data)
    results = {"text_tokenizer": "tokenizer.json", "rejection": "manifest.json", "adapter": "adapter"}
    return (folder / results.get(recipe.stage, "final")).exists()


def _train_refiner(recipe: Recipe) -> None:
    # Here and not above: diffusers' pipelines take seconds to import, which no other stage should cost.
    from .train_refiner import train_refiner

    train_refiner(recipe)


STAGES: dict[str, Callable[[Recipe], None]] = {
    "text_tokenizer": train_text_tokenizer,
    "teacher": train_teacher,
    "vq": train_vq,
    "extract": run_extraction,
    "rejection": run_rejection,
    "decoder": train_decoder,
    "adapter": make_adapter,
    "grpo": train_grpo,
    "refiner": _train_refiner,
    "chain": run_chain,
}

# What each of them knows of `stage_args`.
STAGE_ARGS: dict[str, set[str]] = {
    "text_tokenizer": {"texts", "vocab_size", "min_frequency"},
    "teacher": {"text_layers", "max_text_length", "ema_decay"},
    "vq": {"phase", "new_codebook", "keep_weight", "ema_decay"},
    "extract": {own.name for own in fields(ExtractionSettings)},
    "rejection": set(REJECTION_DEFAULTS),
    "decoder": {
        *("trained", "lora", "head_rows"),
        *("prefix_scales", "prompt_dropout", "attn_implementation", "fsdp_size", "dtype", "ema_decay"),
        *("abilities", "sampling", "thinks", "image_sizes", "sample_prompts", "sample_every", "image_size"),
        *("sequences", "task_inversion", "packing", "codes", "read_share", "epochs"),
    },
    "adapter": {"lora"},
    "grpo": {"rewards", "region_func", "lora", "blend", "dtype"},
    "refiner": {
        *("base_pipeline", "base_dtype", "lora", "doubled", "caption_dropout"),
        *("gradient_checkpointing", "supersampling", "shift", "ema_decay"),
    },
    "chain": {"recipes"},
}

# What each of them needs, whatever its recipe; see `_needed` for what depends on that.
REQUIRED: dict[str, list[str]] = {
    "teacher": ["init_from.tokenizer", "source.class"],
    "vq": ["source.class"],
    "extract": ["init_from.vq"],
    "rejection": ["init_from.decoder", "source.class"],
    "decoder": ["init_from.tokenizer", "init_from.vq"],
    "adapter": ["init_from.decoder", "init_from.trained", "stage_args.lora.target_modules"],
    "grpo": ["init_from.decoder", "source.class"],
    "refiner": ["init_from.vq", "source.class"],
    "chain": ["stage_args.recipes"],
}


def _needed(recipe: Recipe) -> list[str]:
    """Entries without which a recipe cannot run."""
    needed = list(REQUIRED.get(recipe.stage, ()))
    if recipe.stage == "vq":
        goes_on = recipe.stage_args.get("phase") in ("extend", "decoder")
        needed.append("init_from.vq" if goes_on else "init_from.teacher")
    if recipe.stage == "decoder" and recipe.source:
        needed.append("stage_args.codes")
    elif recipe.stage == "decoder" and recipe.data:
        needed += ["stage_args.sequences", *(f"data.{name}.codes" for name in recipe.data)]
    return needed


def run_recipe(recipe: Recipe) -> None:
    """Run a recipe's stage.

    Raises:
        ValueError: If there is no such stage, it does not know one of the `stage_args` or lacks an entry, or a folder
            of `init_from` is not there.
    """
    if recipe.stage not in STAGES:
        raise ValueError(f"A recipe's stage is one of {sorted(STAGES)}, got {recipe.stage!r}.")
    unknown = set(recipe.stage_args) - STAGE_ARGS[recipe.stage]
    if unknown:
        raise ValueError(
            f"The stage {recipe.stage!r} does not know the `stage_args` {sorted(unknown)}; it knows "
            f"{sorted(STAGE_ARGS[recipe.stage])}."
        )
    entries = flat_entries(vars(recipe))
    missing = [name for name in _needed(recipe) if entries.get(name) is None]
    if missing:
        raise ValueError(
            f"A recipe of the stage {recipe.stage!r} needs {missing}; write them into it, or name them as in "
            f"{missing[0]}=..."
        )
    recipe.init_from = {role: _found(role, own) for role, own in recipe.init_from.items()}
    # New weights are drawn before the trainer sets its seed.
    set_seed(recipe.trainer.get("seed", 0))
    STAGES[recipe.stage](recipe)


def _found(role: str, start: str) -> str:
    """Where a stage starts from: the folder of what is bundled, or one in it, a folder that is there, or a Hub id."""
    bundled = {"refiner": REFINERS, "adapter": ADAPTERS}.get(role, BUNDLED)
    name, _, part = start.partition("/")
    path = Path(start).expanduser()
    if name in bundled and (not part or not path.exists()):
        path = Path(bundled[name]) / part
        if not path.is_dir():
            raise ValueError(f"`init_from.{role}` is {start!r}, but what is bundled as {name!r} has no {part!r}.")
    # A Hub id has at most one slash.
    if path.exists() or (len(path.parts) <= 2 and not path.is_absolute()):
        return str(path)
    makers = [own.stem for own in sorted(RECIPES.glob("*.yaml")) if path in _results_of(load_recipe(own.stem))]
    hint = f" (`nextflow-hf train {makers[0]}` makes it)" if makers else ""
    raise ValueError(f"`init_from.{role}` is {start!r}, which is not there{hint}; name another as init_from.{role}=...")


def _results_of(recipe: Recipe) -> set[Path]:
    """Where the results of a recipe lie."""
    folder = Path(recipe.output_dir)
    if recipe.stage == "adapter":
        return {folder / "adapter"}
    return {folder, folder / "final"} | ({folder / "adapter"} if "lora" in recipe.stage_args else set())
