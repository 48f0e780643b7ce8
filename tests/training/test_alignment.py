"""From a converted Qwen2.5-VL into the first stage of training."""

import pytest
import torch
from qwen_models import tiny_qwen
from small_models import small_config

from nextflow_hf import NextFlowForConditionalGeneration, NextFlowVQModel
from nextflow_hf.cli import main
from nextflow_hf.training.recipe import Recipe
from nextflow_hf.training.stages import run_recipe


@pytest.fixture
def align(tmp_path):
    """Convert, then run a step of the alignment stage; the function returns the weights before and after it."""
    torch.manual_seed(1)
    NextFlowVQModel(small_config().vq_config).save_pretrained(tmp_path / "vq")
    tiny_qwen(tmp_path / "qwen")
    start = tmp_path / "start"
    assert main(["convert", "qwen2.5-vl", str(tmp_path / "qwen"), str(start), "--tokenizer", str(tmp_path / "vq")]) == 0

    def run(weight_decay: float = 0.0, **stage_args):
        recipe = Recipe(
            stage="decoder",
            output_dir=str(tmp_path / "align"),
            init_from={"tokenizer": str(start), "vq": str(tmp_path / "vq"), "decoder": str(start)},
            source={"class": "dots:Dots"},
            stage_args={
                "trained": ["model.connector", "lm_head"],
                "codes": str(tmp_path / "codes.npz"),
                "read_share": 0.5,
                "abilities": ["text", "image", "caption"],
                **stage_args,
            },
            trainer={
                "max_steps": 1,
                "per_device_train_batch_size": 8,
                "learning_rate": 1e-2,
                "lr_scheduler_type": "constant",
                "weight_decay": weight_decay,
                "max_grad_norm": 1.0,
                "disable_tqdm": True,
            },
        )
        run_recipe(recipe)
        models = [
            NextFlowForConditionalGeneration.from_pretrained(own) for own in (start, tmp_path / "align" / "final")
        ]
        return [own.state_dict() for own in models]

    return run


def test_alignment_moves_the_connector_and_the_rows_of_codes(align):
    before, after = align(head_rows="codes", ema_decay=0.9)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("model.connector.")} | {"lm_head.weight"}
    rows = (before["lm_head.weight"] != after["lm_head.weight"]).any(dim=1)
    assert not rows[:300].any() and rows[300:].any()


def test_without_it_the_whole_head_moves(align):
    before, after = align()
    assert (before["lm_head.weight"] != after["lm_head.weight"])[:300].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_rows": "new"}, "must be"),
        ({"head_rows": "codes", "trained": ["model.connector"]}, "not trained"),
        ({"head_rows": "codes", "weight_decay": 0.1}, "weight_decay"),
    ],
)
def test_what_would_move_other_rows_is_refused(align, arguments, message):
    with pytest.raises(ValueError, match=message):
        align(**arguments)
