"""Recipes: one YAML file per training stage."""

import json
import logging
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"
# Entries by which a run may go on otherwise: how long, what it writes beside its weights, and by how many workers.
_FREE_ENTRIES = re.compile(
    r"output_dir|stage_args\.sample_\w+|trainer\.(max_steps|(save|logging|dataloader)_\w+|report_to|run_name|disable_tqdm)"
)


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of version 1.2: `5.0e14` and `1e-4`, which version 1.1 takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


@dataclass
class Recipe:
    """A training stage.

    Attributes:
        stage: What runs it: a name of `training.stages.STAGES`.
        output_dir: Where checkpoints, logs and the result go.
        preset: Shape of the model, a name of `NextFlowConfig.from_preset`.
        config: Configuration entries that differ from the preset: the decoder's own, `text.` in front for those of its
            language model (of a new one), and in the tokenizer's stages `vq.` for the tokenizer's.
        init_from: By role, e.g. {"teacher": ..., "vq": ..., "decoder": ...}: folders of earlier stages, Hub ids, or
            names of bundled checkpoints (where a whole decoder or refiner is meant).
        source: The pictures; see `training.data.load_source`.
        data: Datasets by name. To extract: what `training.documents.load_reader` takes. To train on: `codes`, the
            folder of an extracted dataset, and `weight`.
        stage_args: What only this stage knows; see its trainer.
        trainer: Arguments of `transformers.TrainingArguments`.
    """

    stage: str
    output_dir: str
    preset: str = "nextflow-mini"
    config: dict = field(default_factory=dict)
    init_from: dict = field(default_factory=dict)
    source: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    stage_args: dict = field(default_factory=dict)
    trainer: dict = field(default_factory=dict)


def load_recipe(name: str, overrides: list[str] = ()) -> Recipe:
    """Read a recipe by name (of the package's own) or path, with `key.sub=value` overrides (values are YAML).

    Raises:
        ValueError: If there is no such recipe, a key is not one of a recipe's, or `stage` or `output_dir` is missing.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        raise ValueError(f"There is no recipe {name!r}; the package has {known}, or give the path of a YAML file.")
    content = yaml.load(path.read_text(), _Loader) or {}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"An override is key=value, got {override!r}.")
        *parents, last = key.split(".")
        place = content
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
        place[last] = yaml.load(value, _Loader)
    # A name with nothing behind it, such as `trainer:`, says nothing.
    content = {name: own for name, own in content.items() if own is not None}
    unknown = set(content) - {own.name for own in fields(Recipe)}
    if unknown:
        raise ValueError(f"Recipe {path.name} has unknown entries {sorted(unknown)}.")
    missing = {"stage", "output_dir"} - set(content)
    if missing:
        raise ValueError(f"Recipe {path.name} lacks {sorted(missing)}.")
    return Recipe(**content)


def note_recipe(recipe: Recipe) -> None:
    """Write a recipe beside its run as `recipe.json`, and warn where the run that is there is another recipe's."""
    folder = Path(recipe.output_dir)
    path = folder / "recipe.json"
    content = json.loads(json.dumps(asdict(recipe), default=str))
    if path.is_file() and ((folder / "final").exists() or any(folder.glob("checkpoint-*"))):
        then, now = flat_entries(json.loads(path.read_text())), flat_entries(content)
        names = sorted(name for name in {*then, *now} if not _FREE_ENTRIES.fullmatch(name))
        changes = [f"{name} {then.get(name)} -> {now.get(name)}" for name in names if then.get(name) != now.get(name)]
        if changes:
            logger.warning(
                "%s holds a run of another recipe, and goes on from its last checkpoint if there is one: %s. To begin "
                "anew, name another `output_dir`, or remove it.",
                *(folder, ", ".join(changes)),
            )
    unfinished = folder / "recipe.json.unfinished"
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)


def flat_entries(entries: dict, above: str = "") -> dict:
    """Entries by their whole names, such as `trainer.seed`."""
    flat = {}
    for name, own in entries.items():
        flat |= flat_entries(own, f"{above}{name}.") if isinstance(own, dict) else {f"{above}{name}": own}
    return flat
