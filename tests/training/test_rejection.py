"""A decoder's own pictures, kept where rewards pass them."""

import json

import pytest
import torch
from small_models import save_small_checkpoint

from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration
from nextflow_hf.training.coded_documents import CodedDocuments
from nextflow_hf.training.recipe import Recipe
from nextflow_hf.training.stages import run_recipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_small_checkpoint(folder)
    return folder


class Prompts:
    """Words that number themselves."""

    def __init__(self, number=10, images=False):
        self.number, self.images = number, images

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        row = {"id": f"p{index}", "prompt": [{"role": "user", "content": f"dot {index}"}], "number": index}
        return {**row, "images": ["a picture"]} if self.images else row


def odd(prompts, drawn, number, **columns):
    """1 for pictures of odd numbers, and nothing said of the number 4."""
    assert len(prompts) == len(drawn) == len(number)
    return [None if own == 4 else float(own % 2) for own in number]


def recipe_of(checkpoint, folder, **stage_args):
    stage_args = {"rewards": [{"function": "test_rejection:odd"}], "image_sizes": [[16, 16], [32, 32]], **stage_args}
    return Recipe(
        stage="rejection",
        output_dir=str(folder),
        init_from={"decoder": str(checkpoint)},
        source={"class": "test_rejection:Prompts"},
        stage_args={"shard_size": 4, "batch_size": 3, **stage_args},
    )


def test_pictures_that_pass_are_kept_as_they_were_drawn(checkpoint, tmp_path):
    recipe = recipe_of(checkpoint, tmp_path / "own")
    run_recipe(recipe)
    model = NextFlowForConditionalGeneration.from_pretrained(checkpoint).eval()
    documents = CodedDocuments(tmp_path / "own", model.vq_model.fingerprint())
    assert documents.manifest["records"] == 10 and documents.manifest["image_sizes"] == [[16, 16], [32, 32]]
    kept = {name: (messages, images) for name, messages, images in map(documents.__getitem__, range(len(documents)))}
    assert sorted(kept) == ["p1", "p3", "p5", "p7", "p9"]
    for name, (messages, (image,)) in kept.items():
        assert messages[0]["content"] == [{"type": "text", "text": f"dot {name[1:]}"}]
        assert model.config.schedule.image_size(image.grids[-1]) == (32, 32)
        assert len(image.codes) == sum(height * width for height, width in image.grids)
        assert image.input_codes == image.codes
    # The missing shard is made again, to the byte; nothing else is.
    lost = tmp_path / "own" / "shard-00001.parquet"
    before, others = lost.read_bytes(), [tmp_path / "own" / f"shard-{own:05d}.parquet" for own in (0, 2)]
    times = [own.stat().st_mtime_ns for own in others]
    lost.unlink()
    run_recipe(recipe)
    assert lost.read_bytes() == before and [own.stat().st_mtime_ns for own in others] == times
    recipe.stage_args["threshold"] = 0.5
    with pytest.raises(ValueError, match=r"threshold 1\.0 -> 0\.5"):
        run_recipe(recipe)


def test_a_threshold_counts_the_weighted_sum(checkpoint, tmp_path):
    rewards = [{"function": "test_rejection:odd", "weight": 0.5}, {"function": "test_rejection:odd", "weight": 0.25}]
    run_recipe(recipe_of(checkpoint, tmp_path / "none", rewards=rewards, threshold=0.8))
    assert json.loads((tmp_path / "none/manifest.json").read_text())["documents"] == 0
    with pytest.raises(ValueError, match="holds no documents"):
        CodedDocuments(tmp_path / "none")
    run_recipe(recipe_of(checkpoint, tmp_path / "some", rewards=rewards, threshold=0.75))
    assert json.loads((tmp_path / "some/manifest.json").read_text())["documents"] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage_args": {"rewards": []}}, "names no reward"),
        ({"stage_args": {}}, "names no reward"),
        ({"stage_args": {"rewards": [{"function": "test_rejection:even"}]}}, "test_rejection:even"),
        ({"source": {"class": "test_rejection:Prompts", "images": True}}, "p0 has pictures"),
    ],
)
def test_refuses_what_it_cannot_draw(checkpoint, tmp_path, changes, message):
    recipe = recipe_of(checkpoint, tmp_path / "own")
    for name, value in changes.items():
        setattr(recipe, name, value)
    with pytest.raises(ValueError, match=message):
        run_recipe(recipe)
    assert not (tmp_path / "own").exists()


def test_refuses_a_size_that_the_decoder_does_not_draw(checkpoint, tmp_path):
    model = NextFlowForConditionalGeneration.from_pretrained(checkpoint)
    assert model.config.trained_image_sizes is None or [48, 16] not in model.config.trained_image_sizes
    with pytest.raises(ValueError, match="multiple of"):
        run_recipe(recipe_of(checkpoint, tmp_path / "own", image_sizes=[[17, 16]]))
    assert torch.is_grad_enabled() and not (tmp_path / "own").exists()
