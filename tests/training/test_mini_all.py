"""`nextflow-hf train mini-all`, from nothing: its recipes as they are, with few records and steps."""

import yaml

from nextflow_hf.inference import draw, load, user
from nextflow_hf.training.recipe import RECIPES, load_recipe
from nextflow_hf.training.stages import run_recipe

FEW = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "num_generations": 2,
    "dataloader_num_workers": 0,
    "save_steps": 1000,
    "logging_steps": 1,
}


def shrunk(recipe: dict, folder: str) -> dict:
    """The recipe with few records, steps and rows, and its results in a folder in place of `runs/mini`."""
    if "trainer" in recipe:
        recipe["trainer"] |= {name: value for name, value in FEW.items() if name in recipe["trainer"]}
    for dataset in recipe.get("data", {}).values():
        dataset.get("args", {})["num_records"] = 6
    stage = recipe.get("stage_args", {})
    stage |= {name: value for name, value in {"texts": 60, "min_frequency": 2}.items() if name in stage}
    return yaml.safe_load(yaml.safe_dump(recipe).replace("runs/mini", folder))


def test_everything_in_the_box_is_made_by_one_command(tmp_path, monkeypatch):
    chain = load_recipe("mini-all")
    names = chain.stage_args["recipes"]
    for name in names:
        recipe = shrunk(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()), str(tmp_path / "mini"))
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    chain.stage_args["recipes"] = [str(tmp_path / f"{name}.yaml") for name in names]
    chain.output_dir = str(tmp_path / "mini")
    run_recipe(chain)
    made = {path.name for path in (tmp_path / "mini").iterdir()}
    assert {"vq-small", "grpo", "vq-128", "look", "refiner-doubled"} <= made
    for name in ("look", "think"):
        assert (tmp_path / "mini" / name / "adapter" / "adapter_model.safetensors").is_file()
    for name, side in (("grpo", 64), ("pretrain-128", 128)):
        model, processor = load(str(tmp_path / "mini" / name / "final"))
        (picture,) = draw(model, processor, [[user("a red circle")]], [0])
        assert picture.size == (side, side)
