"""Recipes: one YAML file per training stage."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

RECIPES = Path(__file__).parent / "recipes"


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
    content = yaml.load(path.read_text(), _Loader)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"An override is key=value, got {override!r}.")
        *parents, last = key.split(".")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = yaml.load(value, _Loader)
    unknown = set(content) - {own.name for own in fields(Recipe)}
    if unknown:
        raise ValueError(f"Recipe {path.name} has unknown entries {sorted(unknown)}.")
    missing = {"stage", "output_dir"} - set(content)
    if missing:
        raise ValueError(f"Recipe {path.name} lacks {sorted(missing)}.")
    return Recipe(**content)
