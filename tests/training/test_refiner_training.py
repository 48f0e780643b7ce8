"""The refiner's stage, its LoRA, large bases from a folder, and the ways it follows a model that draws."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from safetensors.torch import load_file
from small_models import SMALL_UNET as UNET
from small_models import save_small_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForMultimodalLM,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    pipeline,
)

from nextflow_hf import NextFlowRefinerPipeline
from nextflow_hf.cli import main
from nextflow_hf.training.recipe import Recipe
from nextflow_hf.training.stages import run_recipe


class Stripes:
    """Pictures of 64x64 pixels: stripes of two kinds."""

    def __len__(self):
        return 64

    def image(self, index):
        picture = np.zeros((64, 64, 3), np.uint8)
        picture[:, :: 2 + index % 2] = 255
        return picture

    def prompt(self, index, rng):
        return f"stripes {index % 2}"

    def question(self, index, rng):
        return "what", self.prompt(index, rng)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_small_checkpoint(folder)
    return folder


@pytest.fixture
def parts(checkpoint, tmp_path):
    """A tokenizer for pictures and one for words, in folders."""
    model = AutoModelForMultimodalLM.from_pretrained(checkpoint)
    model.vq_model.save_pretrained(tmp_path / "vq")
    return {"vq": str(tmp_path / "vq"), "tokenizer": str(checkpoint)}


def recipe_of(parts, folder, steps=4, **own) -> Recipe:
    return Recipe(
        **{
            "stage": "refiner",
            "output_dir": str(folder),
            "init_from": parts,
            "config": {"base_config": UNET, "condition_channels": 4, "patch_size": 2},
            "source": {"class": f"{__name__}:Stripes"},
            "stage_args": {"doubled": 0.4, "ema_decay": 0.9},
            "trainer": {
                "max_steps": steps,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
                "save_steps": 2,
                "dataloader_num_workers": 0,
                "logging_steps": 1,
            },
            **own,
        }
    )


def test_a_killed_run_goes_on_to_the_same_weights(parts, tmp_path):
    run_recipe(recipe_of(parts, tmp_path / "whole"))
    whole = load_file(tmp_path / "whole" / "final" / "refiner" / "diffusion_pytorch_model.safetensors")
    run_recipe(recipe_of(parts, tmp_path / "again"))
    # As if it had been killed after its second step.
    shutil.rmtree(tmp_path / "again" / "final")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    run_recipe(recipe_of(parts, tmp_path / "again"))
    again = load_file(tmp_path / "again" / "final" / "refiner" / "diffusion_pytorch_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_loss_falls_and_the_result_refines(parts, tmp_path):
    own = recipe_of(parts, tmp_path / "run", steps=40)
    own.trainer.update(learning_rate=3e-3, save_steps=40, report_to=["tensorboard"])
    run_recipe(own)
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    assert any("x2_loss" in entry for entry in log)
    refiner = NextFlowRefinerPipeline.from_pretrained(tmp_path / "run" / "final")
    refiner.set_progress_bar_config(disable=True)
    (picture,) = refiner(Image.new("RGB", (32, 32)), prompt="stripes 1", upsampling=2, num_inference_steps=2).images
    assert picture.size == (64, 64)


def test_lora_trains_adapters_and_what_is_new(parts, tmp_path):
    run_recipe(recipe_of(parts, tmp_path / "first", steps=2))
    before = load_file(tmp_path / "first" / "final" / "refiner" / "diffusion_pytorch_model.safetensors")
    stage = {"lora": {"r": 2, "target_modules": ["to_q", "to_v"], "init_lora_weights": "gaussian"}, "ema_decay": 0.5}
    own = recipe_of(
        {**parts, "refiner": str(tmp_path / "first" / "final")}, tmp_path / "second", 3, config={}, stage_args=stage
    )
    own.trainer.update(learning_rate=1e-2)
    run_recipe(own)
    after = load_file(tmp_path / "second" / "final" / "refiner" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys(), "merged"
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"condition_proj.weight", "denoiser.conv_in.weight"} <= moved
    assert any("to_q" in name for name in moved)
    assert not any("resnets" in name for name in moved)


def words(name: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "</s>", "stripes", "0", "1"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=8
    )


def test_a_base_of_flux_is_taken_from_its_pipeline(parts, tmp_path):
    torch.manual_seed(0)
    text = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            block_out_channels=[8, 8],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
            norm_num_groups=4,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, num_attention_heads=2, max_position_embeddings=8)),
        tokenizer=words("clip"),
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=8, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
            )
        ),
        tokenizer_2=words("t5"),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
    ).save_pretrained(tmp_path / "flux")
    own = recipe_of(
        {"vq": parts["vq"], "base": str(tmp_path / "flux")},
        tmp_path / "run",
        steps=2,
        config={"condition_channels": 4, "projector": "mlp"},
        stage_args={
            "base_pipeline": "FluxPipeline",
            "lora": {"r": 2, "target_modules": ["to_q"]},
            "gradient_checkpointing": True,
        },
    )
    run_recipe(own)
    refiner = NextFlowRefinerPipeline.from_pretrained(tmp_path / "run" / "final")
    refiner.set_progress_bar_config(disable=True)
    assert refiner.vae is not None and refiner.refiner.config.sample_channels == 4
    inputs = {"prompt_embeds": torch.randn(1, 5, 12), "pooled_prompt_embeds": torch.randn(1, 16)}
    assert refiner(Image.new("RGB", (32, 32)), num_inference_steps=2, **inputs).images[0].size == (32, 32)
    # Going on without the base's text encoders would be training without captions.
    start = {"vq": parts["vq"], "refiner": str(tmp_path / "run" / "final")}
    with pytest.raises(ValueError, match="name it as `init_from.base`"):
        run_recipe(recipe_of(start, tmp_path / "on", config={}))
    run_recipe(recipe_of(start, tmp_path / "on", steps=1, config={}, stage_args={"caption_dropout": 1.0}))


def test_recipes_that_cannot_work_are_refused_before_anything_is_loaded(parts, tmp_path):
    for change, message in (
        ({"stage_args": {"doubled": 1.5}}, "`doubled` is a share"),
        ({"init_from": {"tokenizer": "a"}}, r"needs \['init_from.vq'\]"),
        ({"init_from": {**parts, "refiner": "b"}}, "keeps its configuration; leave"),
        ({"init_from": {**parts, "base": "a"}, "stage_args": {}}, "`base_pipeline` is one of"),
    ):
        with pytest.raises(ValueError, match=message):
            run_recipe(Recipe(**{**vars(recipe_of(parts, tmp_path / "run")), **change}))
    assert not (tmp_path / "run").exists()


# ---- behind a model that draws ---------------------------------------------------------------------------------------


@pytest.fixture
def refiner_folder(parts, tmp_path):
    run_recipe(recipe_of(parts, tmp_path / "refiner", steps=2))
    return str(tmp_path / "refiner" / "final")


def test_a_pipeline_and_a_refiner_are_one_call(checkpoint, refiner_folder):
    draw = pipeline("text-to-image", model=str(checkpoint))
    options = {"seed": 3, "image_size": (32, 32)}
    plain = draw("a red circle", **options)
    both = draw | refiner_folder
    refined = both("a red circle", **options)
    assert not np.array_equal(np.asarray(plain), np.asarray(refined))
    assert np.array_equal(np.asarray(both("a red circle", **options)), np.asarray(refined))
    assert np.array_equal(np.asarray(draw("a red circle", **options)), np.asarray(plain)), "the first is as it was"
    named = pipeline("text-to-image", model=str(checkpoint), refiner=refiner_folder)
    assert np.array_equal(np.asarray(named("a red circle", **options)), np.asarray(refined))
    doubled = both("a red circle", refining={"upsampling": 2, "num_inference_steps": 2}, **options)
    assert doubled.size == (64, 64)
    untouched = both("a red circle", refining={"strength": 0}, **options)
    assert np.array_equal(np.asarray(untouched), np.asarray(plain))
    listed = both("a red circle", image_size=(32, 32), seed=[3])
    assert np.array_equal(np.asarray(listed), np.asarray(refined))
    twice = [both("a red circle", image_size=(32, 32), generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert np.array_equal(*map(np.asarray, twice))
    for call, message in (
        (lambda: draw("a star", refining={"strength": 0.5}), "name one as `refiner`"),
        (lambda: both("a star", refining={"steps": 5}), "A refiner's settings are"),
        (lambda: both("a star", refining={"strength": 5}), "`strength` must lie"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_command_line_refines(checkpoint, refiner_folder, tmp_path, capsys):
    command = ["generate", "a red circle", "--checkpoint", str(checkpoint), "--size", "32x32", "--seed", "3"]
    assert main([*command, "--output", str(tmp_path / "plain")]) == 0
    refining = ["--refiner", refiner_folder, "--double", "--refiner-steps", "2"]
    assert main([*command, *refining, "--output", str(tmp_path / "large")]) == 0
    assert Image.open(tmp_path / "plain" / "0003.png").size == (32, 32)
    assert Image.open(tmp_path / "large" / "0003.png").size == (64, 64)
    for wrong, message in (
        (["--double"], "are the refiner's"),
        (["--strength", "0.2"], "are the refiner's"),
        (["--refiner", refiner_folder, "--strength", "1.5"], "`strength` must lie"),
        (["--refiner", refiner_folder, "--refiner-steps", "0"], "`num_inference_steps` must be"),
    ):
        assert main([*command, *wrong, "--output", str(tmp_path / "none")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_refiner_of_another_tokenizer_is_refused(checkpoint, refiner_folder):
    refiner = NextFlowRefinerPipeline.from_pretrained(refiner_folder)
    with torch.no_grad():
        refiner.vq_model.codebook.pixel.weight.add_(1.0)
    with pytest.raises(ValueError, match="trained on the codes of the image tokenizer"):
        pipeline("text-to-image", model=str(checkpoint)) | refiner
