"""The refiner: a denoiser of diffusers' told what the codes say, and its pipeline."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from PIL import Image
from small_models import SMALL_UNET as UNET
from small_models import small_config
from transformers import PreTrainedTokenizerFast

import nextflow_hf
from nextflow_hf import NextFlowRefinerModel, NextFlowRefinerPipeline
from nextflow_hf.modeling.modeling_nextflow_vq import NextFlowVQModel
from nextflow_hf.modeling.modeling_refiner import refiner_condition

FLUX = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": [4, 6, 6],
    "guidance_embeds": True,
}
BASES = {"UNet2DConditionModel": UNET, "FluxTransformer2DModel": FLUX}
# Of the small tokenizer: semantic, pixel, decoded.
WIDTHS = {"semantic_dim": 6, "pixel_dim": 4, "feature_dim": 16}


def build_refiner(base: str = "UNet2DConditionModel", seed: int = 0, **own) -> NextFlowRefinerModel:
    torch.manual_seed(seed)
    captions = {"caption_vocab_size": 20} if base.startswith("UNet") else {}
    config = {"condition_channels": 4, "patch_size": 2, **captions, **WIDTHS, **own}
    model = NextFlowRefinerModel(base_class=base, base_config=BASES[base], **config).eval()
    with torch.no_grad():
        # Output layers that are zero at first would hide everything.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", "a", "red", "blue", "circle", "star"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="module")
def vq_model() -> NextFlowVQModel:
    torch.manual_seed(0)
    return NextFlowVQModel(small_config().vq_config).eval()


def build_pipeline(vq_model, base: str = "UNet2DConditionModel", **own) -> NextFlowRefinerPipeline:
    refiner = build_refiner(base, **own)
    tokenizer = None if refiner.caption_embedding is None else build_tokenizer()
    pipeline = NextFlowRefinerPipeline(refiner, FlowMatchEulerDiscreteScheduler(), vq_model, tokenizer=tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=sorted(BASES))
def pipeline(request, vq_model) -> NextFlowRefinerPipeline:
    return build_pipeline(vq_model, request.param)


def pictures(number: int = 2, side: int = 32) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(number)]


def said(pipeline, prompts: list[str]) -> dict:
    """The captions as this pipeline takes them."""
    if pipeline.tokenizer is not None:
        return {"prompt": prompts}
    rng = generator(sum(map(len, prompts)))
    return {
        "prompt_embeds": torch.randn(len(prompts), 3, 12, generator=rng),
        "pooled_prompt_embeds": torch.randn(len(prompts), 10, generator=rng),
    }


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the model -------------------------------------------------------------------------------------------------------


def inputs_of(model: NextFlowRefinerModel, batch: int = 2) -> dict:
    rng = generator(1)
    return {
        "sample": torch.randn(batch, 3, 16, 16, generator=rng),
        "timestep": torch.tensor([100.0, 700.0])[:batch],
        "condition": torch.randn(batch, 26, 2, 2, generator=rng),
        "image": torch.randn(batch, 3, 16, 16, generator=rng),
        **caption_of(model, batch),
    }


def caption_of(model: NextFlowRefinerModel, batch: int) -> dict:
    if model.caption_embedding is None:
        return {"encoder_hidden_states": torch.randn(batch, 3, 12, generator=generator(2))}
    return {
        "caption_ids": torch.tensor([[2, 3, 5], [2, 4, 6]])[:batch],
        "caption_mask": torch.ones(batch, 3, dtype=torch.long),
    }


@pytest.mark.parametrize("base", sorted(BASES))
def test_every_input_matters_and_rows_do_not_mix(base):
    model = build_refiner(base)
    inputs = inputs_of(model)
    whole = model(**inputs).sample
    assert whole.shape == (2, 3, 16, 16)
    for row in range(2):
        alone = model(**{name: own[row : row + 1] for name, own in inputs.items()}).sample
        torch.testing.assert_close(alone, whole[row : row + 1], atol=1e-4, rtol=1e-4)
    (caption,) = set(inputs) & {"caption_ids", "encoder_hidden_states"}
    changed = {**inputs, caption: inputs[caption].flip(0)}
    for name in ("sample", "timestep", "condition", "image"):
        other = {**inputs, name: inputs[name].flip(0)}
        assert not torch.allclose(model(**other).sample, whole, atol=1e-4), name
    assert not torch.allclose(model(**changed).sample, whole, atol=1e-5)
    assert not torch.allclose(model(**inputs, upsampling=2).sample, whole, atol=1e-4)
    mixed = model(**inputs, upsampling=torch.tensor([1, 2])).sample
    torch.testing.assert_close(mixed[:1], whole[:1], atol=1e-4, rtol=1e-4)


def test_the_condition_is_what_the_codes_say(vq_model):
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    encoding = vq_model.encode(pixels)
    condition = refiner_condition(vq_model, encoding.codes, encoding.grids)
    assert condition.shape == (2, 6 + 4 + 16, 4, 4)
    torch.testing.assert_close(condition[:, :10], encoding.features)
    decoded = vq_model.semantic_decoder(encoding.features[:, :6])
    torch.testing.assert_close(condition[:, 10:, 1, 2], decoded[:, 1 * 4 + 2])


@pytest.mark.parametrize("base", sorted(BASES))
def test_a_pretrained_base_is_left_as_it_is_at_first(base):
    torch.manual_seed(0)
    channels = {"in_channels": 12, "out_channels": 12}
    own = (UNet2DConditionModel if base.startswith("UNet") else FluxTransformer2DModel).from_config(
        {**BASES[base], **channels}
    )
    torch.nn.init.normal_((own.conv_out if base.startswith("UNet") else own.proj_out).weight, std=0.1)
    model = NextFlowRefinerModel.from_base(own.eval(), patch_size=2, condition_channels=4, **WIDTHS).eval()
    inputs = {name: own for name, own in inputs_of(model).items() if name != "encoder_hidden_states"}
    states = torch.randn(2, 5, 12, generator=generator(3))
    output = model(**inputs, encoder_hidden_states=states).sample
    other = {**inputs, "condition": 9 * inputs["condition"], "image": -inputs["image"]}
    torch.testing.assert_close(model(**other, encoder_hidden_states=states).sample, output)
    if base.startswith("UNet"):
        squares = torch.nn.functional.pixel_unshuffle(inputs["sample"], 2)
        expected = own(squares, inputs["timestep"], encoder_hidden_states=states).sample
        torch.testing.assert_close(output, torch.nn.functional.pixel_shuffle(expected, 2), atol=1e-5, rtol=1e-5)
    # New inputs are learned, so they have gradients.
    output = model.train()(**inputs, encoder_hidden_states=states).sample
    output.square().mean().backward()
    layer = model.denoiser.conv_in if base.startswith("UNet") else model.denoiser.x_embedder
    assert layer.weight.grad[:, 12:].abs().sum() > 0


@pytest.mark.parametrize("sigma", [0.02, 0.3, 0.8, 1.0])
def test_the_velocity_begins_as_the_best_guess_from_sample_and_image(sigma):
    """With a base that adds nothing no other linear guess is better, and what is left has the scale that is said."""
    model = build_refiner(image_error=0.2)
    for name in ("weight", "bias"):
        torch.nn.init.zeros_(getattr(model.denoiser.conv_out, name))
    rng = generator(0)
    image = torch.randn(64, 3, 16, 16, generator=rng)
    picture = image + 0.2 * torch.randn(image.shape, generator=rng)
    noise = torch.randn(image.shape, generator=rng)
    sample = (1 - sigma) * picture + sigma * noise
    with torch.no_grad():
        guess = model(sample, 1000 * sigma, torch.zeros(64, 26, 2, 2), image).sample
    left = (noise - picture) - guess
    expected = model.velocity_scale(torch.tensor([sigma])).item()
    assert left.std().item() == pytest.approx(expected, rel=0.02)
    # What is left tells nothing of what the guess was made from.
    for known in (sample, image):
        assert abs((left * known).mean().item()) < 0.02


def test_sdxl_takes_the_caption_as_a_vector_too():
    unet = {**UNET, "addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet["projection_class_embeddings_input_dim"] = 6 * 4 + 10
    torch.manual_seed(0)
    model = NextFlowRefinerModel(base_config=unet, condition_channels=4, patch_size=2, **WIDTHS).eval()
    torch.nn.init.normal_(model.denoiser.conv_out.weight, std=0.1)
    assert model.takes_pooled_caption
    inputs = {name: own for name, own in inputs_of(model).items() if name != "encoder_hidden_states"}
    first = model(**inputs).sample
    assert not torch.allclose(model(**inputs, pooled_projections=torch.ones(2, 10)).sample, first, atol=1e-5)


def test_what_does_not_fit_is_refused():
    model = build_refiner()
    inputs = inputs_of(model)
    for name, own, message in (
        ("sample", torch.zeros(2, 4, 16, 16), "`sample` must have"),
        ("sample", torch.zeros(2, 3, 15, 16), "multiples of 2"),
        ("condition", torch.zeros(2, 25, 2, 2), "`condition` must have"),
        ("image", None, "`image` must have"),
        ("image", torch.zeros(2, 3, 8, 8), "`image` must have"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**inputs, name: own})
    with pytest.raises(ValueError, match="base of a refiner is one of"):
        NextFlowRefinerModel(base_class="DiT")
    with pytest.raises(ValueError, match="`image_error` is above 0"):
        NextFlowRefinerModel(base_config=UNET, image_condition=False, image_error=0.1)
    with pytest.raises(ValueError, match="A projector"):
        NextFlowRefinerModel(base_config=UNET, projector="cnn")
    with pytest.raises(ValueError, match="embeds no captions"):
        build_refiner(caption_vocab_size=None)(**inputs)
    with pytest.raises(ValueError, match="attends to a caption's padding"):
        build_refiner("FluxTransformer2DModel", caption_vocab_size=20)
    with pytest.raises(ValueError, match="`upsampling` is one of"):
        model(**inputs, upsampling=3)
    with pytest.raises(ValueError, match="in patches of 1 make 3"):
        NextFlowRefinerModel.from_base(UNet2DConditionModel.from_config({**UNET, "in_channels": 12}), **WIDTHS)


# ---- the pipeline ----------------------------------------------------------------------------------------------------


def test_same_seed_same_picture_and_a_batch_is_one_by_one(pipeline):
    images, prompts = pictures(), ["a red circle", "a blue star"]
    seeds = (3, 4)
    captions = said(pipeline, prompts)

    def draw(shift=0):
        generators = [generator(seed + shift) for seed in seeds]
        return pipeline(images, generator=generators, output_type="pt", **captions).images

    whole = draw()
    assert torch.equal(whole, draw())
    assert not torch.allclose(draw(shift=1), whole, atol=1e-3)
    for row, seed in enumerate(seeds):
        own = {name: value[row : row + 1] for name, value in captions.items()}
        alone = pipeline(images[row], generator=generator(seed), output_type="pt", **own).images
        torch.testing.assert_close(alone, whole[row : row + 1], atol=1e-4, rtol=1e-4)


def test_codes_and_the_picture_they_came_from_are_the_same_input(pipeline, vq_model):
    (image,) = pictures(1)
    encoding = vq_model.encode(pipeline.image_processor.preprocess(image))
    options = {"strength": 1.0, "output_type": "pt", "num_inference_steps": 3}
    if pipeline.refiner.config.image_condition:
        pipeline = build_pipeline(vq_model, pipeline.refiner.config.base_class, image_condition=False)
    by_codes = pipeline(codes=encoding.codes, grids=encoding.grids, generator=generator(0), **options).images
    by_image = pipeline(image, generator=generator(0), **options).images
    torch.testing.assert_close(by_codes, by_image, atol=1e-4, rtol=1e-4)
    listed = pipeline(codes=list(encoding.codes), grids=encoding.grids, generator=generator(0), **options).images
    assert torch.equal(listed, by_codes)


def test_strength_goes_from_untouched_to_anew(vq_model):
    pipeline = build_pipeline(vq_model)
    images = pictures()
    untouched = pipeline(images, strength=0).images
    assert all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(untouched, images))
    assert untouched[0] is not images[0]
    tensor = torch.rand(1, 3, 32, 32, generator=generator(0))
    torch.testing.assert_close(pipeline(tensor, strength=0, output_type="pt").images, tensor)
    assert pipeline(images[0], strength=0, upsampling=2).images[0].size == (64, 64)
    changes, steps = [], []
    for strength in (0.1, 0.5, 1.0):
        drawn = pipeline(tensor, strength=strength, generator=generator(0), output_type="pt", num_inference_steps=10)
        changes.append((drawn.images - tensor).abs().mean().item())
        steps.append(pipeline.num_timesteps)
    assert steps == [1, 5, 10]
    assert changes[0] < changes[1] < changes[2]
    for given in (tensor, tensor[0].permute(1, 2, 0).numpy()):
        kept = pipeline(given, strength=0, output_type="pt" if torch.is_tensor(given) else "np").images
        assert np.array_equal(
            np.asarray(kept), np.asarray(given)[None] if kept.ndim > given.ndim else np.asarray(given)
        )


@pytest.mark.parametrize("settings", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}])
@pytest.mark.parametrize("strength", [0.05, 0.4, 1.0])
def test_strength_is_the_noise_at_which_painting_begins(vq_model, settings, strength):
    pipeline = build_pipeline(vq_model)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    pipeline(pictures()[0], strength=strength, num_inference_steps=5)
    sigmas = pipeline.scheduler.sigmas
    assert sigmas[0].item() == pytest.approx(strength, abs=1e-4)
    assert len(sigmas) == max(1, round(5 * strength)) + 1 and sigmas[-2] > 0.01
    pipeline(pictures()[0], sigmas=[0.7, 0.2])
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([0.7, 0.2, 0.0], abs=1e-4)


def test_doubling_and_outputs(pipeline):
    images = pictures()
    shown = pipeline(images, upsampling=2, num_inference_steps=2, generator=generator(0))
    assert [own.size for own in shown.images] == [(64, 64)] * 2
    arrays = pipeline(images, upsampling=2, num_inference_steps=2, generator=generator(0), output_type="np").images
    assert np.abs(arrays[0] * 255 - np.array(shown.images[0])).max() <= 0.5 + 1e-3
    (tuple_form,) = pipeline(images[0], num_inference_steps=2, return_dict=False)
    assert len(tuple_form) == 1
    several = pipeline(images, num_inference_steps=2, num_images_per_prompt=3, output_type="latent").images
    assert several.shape == (6, 3, 32, 32)


def test_supersampling_is_doubling_and_averaging(vq_model, tmp_path):
    pipeline = build_pipeline(vq_model)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    doubled = pipeline(pictures(), upsampling=2, generator=generator(0), **options).images
    pipeline = NextFlowRefinerPipeline(**pipeline.components, supersampling=2)
    pipeline.save_pretrained(tmp_path)
    pipeline = NextFlowRefinerPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    same = pipeline(pictures(), generator=generator(0), **options).images
    torch.testing.assert_close(same, torch.nn.functional.avg_pool2d(doubled, 2), atol=1e-5, rtol=1e-5)
    assert torch.equal(pipeline(pictures(), upsampling=2, generator=generator(0), **options).images, doubled)
    (kept,) = pipeline(pictures()[0], strength=0).images
    assert np.array_equal(np.asarray(kept), np.asarray(pictures()[0]))
    with pytest.raises(ValueError, match="`supersampling` is one of"):
        NextFlowRefinerPipeline(**pipeline.components, supersampling=3)


def test_schedulers_can_be_exchanged(vq_model):
    pipeline = build_pipeline(vq_model)
    options = {"generator": generator(0), "num_inference_steps": 4, "strength": 0.5, "output_type": "pt"}
    first = pipeline(pictures()[0], **options).images
    for scheduler in (
        FlowMatchHeunDiscreteScheduler(),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ):
        pipeline.scheduler = scheduler
        drawn = pipeline(pictures()[0], **{**options, "generator": generator(0)}).images
        assert drawn.shape == first.shape and torch.isfinite(drawn).all()
    for scheduler in (DDIMScheduler(), DPMSolverMultistepScheduler(prediction_type="flow_prediction")):
        pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match="predicts velocities of a flow"):
            pipeline(pictures()[0])
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="sets its own sigmas"):
        pipeline(pictures()[0], sigmas=[0.5])
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    noisy = [pipeline(pictures()[0], **{**options, "generator": generator(0)}).images for _ in range(2)]
    assert torch.equal(*noisy), "noise of the scheduler's own comes from the generator too"


def test_pictures_come_in_every_mode(vq_model):
    pipeline = build_pipeline(vq_model)
    (image,) = pictures(1)

    def draw(own):
        return pipeline(own, generator=generator(0), num_inference_steps=2, output_type="pt").images

    expected = draw(image)
    array = np.asarray(image)
    torch.testing.assert_close(draw(array), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(draw(array / 255), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(draw(image.convert("RGBA")), expected, atol=1e-5, rtol=1e-5)
    clear = Image.new("RGBA", image.size, (9, 9, 9, 0))
    torch.testing.assert_close(draw(clear), draw(Image.new("RGB", image.size, "white")))
    assert torch.isfinite(draw(image.convert("L"))).all()
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    torch.testing.assert_close(draw(deep), draw(image.convert("L")))
    bytes_ = torch.from_numpy(array.copy()).movedim(-1, 0)[None]
    torch.testing.assert_close(draw(bytes_), expected, atol=1e-5, rtol=1e-5)
    for wrong in (array.astype(np.float32), torch.rand(1, 3, 32, 32) * 2 - 1):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            draw(wrong)


def test_an_offloaded_tokenizer_is_woken(vq_model):
    pipeline = build_pipeline(vq_model)
    woken = []

    class Hook:
        def pre_forward(self, module, *args, **kwargs):
            woken.append(module)

    vq_model._hf_hook = Hook()
    try:
        pipeline(pictures()[0], num_inference_steps=1)
    finally:
        del vq_model._hf_hook
    assert woken and woken[0] is vq_model


def test_callbacks_change_stop_and_leave_nothing_behind(vq_model):
    pipeline = build_pipeline(vq_model)
    (image,) = pictures(1)

    def draw(callback=None):
        return pipeline(
            image, generator=generator(0), num_inference_steps=5, output_type="pt", callback_on_step_end=callback
        ).images

    whole, seen = draw(), []

    def stop(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tuple(tensors["latents"].shape)))
        if step == 1:
            pipe._interrupt = True
        return tensors

    stopped = draw(stop)
    assert [own[0] for own in seen] == [0, 1] and not torch.allclose(stopped, whole)
    assert seen[0][1] > seen[1][1]

    def fail(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(fail)
    assert torch.equal(draw(), whole)
    zeroed = draw(lambda pipe, step, timestep, tensors: {"latents": torch.zeros_like(tensors["latents"])})
    torch.testing.assert_close(zeroed, torch.full_like(zeroed, 0.5))
    with pytest.raises(ValueError, match="A callback may have"):
        pipeline(image, callback_on_step_end_tensor_inputs=["noise"])


def test_saved_and_loaded_in_every_way(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "own")
    captions = said(pipeline, ["a red circle"])
    options = {"generator": generator(0), "num_inference_steps": 2, "output_type": "pt", **captions}
    expected = pipeline(pictures()[0], **options).images
    for loaded in (
        NextFlowRefinerPipeline.from_pretrained(tmp_path / "own"),
        DiffusionPipeline.from_pretrained(tmp_path / "own"),
    ):
        loaded.set_progress_bar_config(disable=True)
        assert isinstance(loaded, NextFlowRefinerPipeline)
        drawn = loaded(pictures()[0], **{**options, "generator": generator(0)}).images
        torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)
    index = (tmp_path / "own" / "model_index.json").read_text()
    assert '"nextflow_hf"' in index and "modeling.modeling_refiner" not in index


def test_the_hub_check_knows_the_classes(pipeline, tmp_path):
    """What `from_pretrained` does with a Hub id before it downloads anything."""
    import json

    from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders

    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    custom, folders = _get_custom_components_and_folders("owner/name", index, files, files)
    assert not custom and {"refiner", "vq_model", "scheduler"} <= set(folders)


def test_a_hub_id_is_loaded_from_the_cache(vq_model, tmp_path):
    """The layout that a download leaves, found by its id."""
    pipeline = build_pipeline(vq_model)
    folder = tmp_path / "models--owner--name"
    pipeline.save_pretrained(folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    options = {"num_inference_steps": 2, "output_type": "pt"}
    expected = pipeline(pictures(), generator=generator(0), **options).images
    for own in (NextFlowRefinerPipeline, DiffusionPipeline):
        loaded = own.from_pretrained("owner/name", cache_dir=tmp_path, local_files_only=True)
        loaded.set_progress_bar_config(disable=True)
        drawn = loaded(pictures(), generator=generator(0), **options).images
        torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)


def test_latents_of_a_vae(vq_model):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        shift_factor=0.1,
        scaling_factor=0.5,
    ).eval()
    refiner = build_refiner(sample_channels=4, patch_size=1)
    pipeline = NextFlowRefinerPipeline(refiner, FlowMatchEulerDiscreteScheduler(), vq_model, vae=vae)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae_scale_factor == 2
    latents = pipeline(pictures()[0], upsampling=2, num_inference_steps=2, output_type="latent").images
    assert latents.shape == (1, 4, 32, 32)
    assert pipeline(pictures()[0], upsampling=2, num_inference_steps=2).images[0].size == (64, 64)
    pixels = pipeline.image_processor.preprocess(pictures())
    round_trip = pipeline._to_pixels(pipeline._to_latents(pixels))
    torch.testing.assert_close(round_trip, vae.decode(vae.encode(pixels).latent_dist.mode()).sample)


def test_guidance_and_captions(vq_model):
    pipeline = build_pipeline(vq_model)
    options = {"num_inference_steps": 3, "output_type": "pt"}

    def draw(**more):
        return pipeline(pictures()[0], generator=generator(0), **options, **more).images

    plain, told = draw(), draw(prompt="a red circle")
    assert not torch.allclose(plain, told, atol=1e-4)
    assert torch.equal(draw(guidance_scale=3.0), plain), "there is no caption to go towards"
    torch.testing.assert_close(draw(prompt="a red circle", guidance_scale=0.0), plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(draw(prompt="a red circle", guidance_scale=3.0), told, atol=1e-4)


def test_input_that_cannot_be_refined_is_refused(vq_model):
    pipeline = build_pipeline(vq_model)
    (image,) = pictures(1)
    encoding = vq_model.encode(pipeline.image_processor.preprocess(image))
    for inputs, message in (
        ({}, "either `image` or `codes`"),
        ({"image": image, "codes": encoding.codes, "grids": encoding.grids}, "either `image` or `codes`"),
        ({"codes": encoding.codes}, "belong together"),
        ({"image": image, "upsampling": 4}, "`upsampling` is one of"),
        ({"image": image, "upsampling": 2.0}, "`upsampling` is one of"),
        ({"image": []}, "empty list"),
        ({"image": image, "strength": 1.5}, "`strength` must lie"),
        ({"image": image, "num_inference_steps": 0}, "`num_inference_steps` must be"),
        ({"image": image, "num_images_per_prompt": 0}, "`num_images_per_prompt` must be"),
        ({"image": image, "sigmas": []}, "`sigmas` are shares"),
        ({"image": image, "sigmas": [0.2, 0.9]}, "from high to low"),
        ({"image": image, "prompt": "a", "prompt_embeds": torch.zeros(1, 1, 12)}, "not both"),
        ({"image": image, "prompt_embeds": torch.zeros(2, 1, 12)}, "of 2 captions were given for 1"),
        ({"image": image, "pooled_prompt_embeds": torch.zeros(1, 4)}, "takes no `pooled"),
        ({"image": image, "output_type": "jpg"}, "`output_type` is"),
        ({"image": image, "prompt": ["a", "b"]}, "2 prompts were given for 1"),
        ({"image": image, "generator": [generator(0)] * 2}, "2 generators were given for 1"),
        ({"image": image, "latents": torch.zeros(1, 3, 8, 8)}, "`latents` must have"),
        ({"image": Image.new("RGB", (30, 32))}, "multiples of 8"),
        ({"codes": encoding.codes + 1000, "grids": encoding.grids}, "Codes must lie"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(**inputs)
    pipeline.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer for a `prompt`"):
        pipeline(image, prompt="a circle")


def test_memory_savers_change_nothing(pipeline):
    options = {"num_inference_steps": 2, "output_type": "pt"}
    expected = pipeline(pictures(), generator=generator(0), **options).images
    pipeline.enable_attention_slicing(1)
    torch.testing.assert_close(
        pipeline(pictures(), generator=generator(0), **options).images, expected, atol=1e-4, rtol=1e-4
    )
    pipeline.disable_attention_slicing()
    pipeline.refiner.enable_gradient_checkpointing()
    assert pipeline.refiner.denoiser.is_gradient_checkpointing
    assert set(pipeline.model_cpu_offload_seq.split("->")) <= set(pipeline.components)


def test_exported_at_the_top():
    assert {"NextFlowRefinerModel", "NextFlowRefinerPipeline"} <= set(nextflow_hf.__all__)


# ---- what diffusers' common tests ask of models and pipelines (its distribution has no tests) ------------------------


@pytest.mark.parametrize("base", sorted(BASES))
def test_a_model_is_saved_whole_sharded_as_a_variant_and_in_half(base, tmp_path):
    model = build_refiner(base)
    inputs = inputs_of(model)
    expected = model(**inputs).sample
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    model.save_pretrained(tmp_path / "variant", variant="fp16")
    for name, variant in (("whole", None), ("sharded", None), ("variant", "fp16")):
        loaded = NextFlowRefinerModel.from_pretrained(tmp_path / name, variant=variant)
        assert all(loaded.config[key] == own for key, own in model.config.items() if not key.startswith("_"))
        torch.testing.assert_close(loaded(**inputs).sample, expected, atol=1e-5, rtol=1e-5)
    half = NextFlowRefinerModel.from_pretrained(tmp_path / "whole", torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    halved = {name: own.bfloat16() if own.is_floating_point() else own for name, own in inputs.items()}
    assert (half(**halved).sample.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
    loaded = diffusers.AutoModel.from_pretrained(str(tmp_path / "whole"))
    assert isinstance(loaded, NextFlowRefinerModel)


@pytest.mark.parametrize("base", sorted(BASES))
def test_a_tuple_is_the_same_and_checkpointing_changes_no_gradient(base):
    model = build_refiner(base).train()
    inputs = inputs_of(model)
    (as_tuple,) = model(**inputs, return_dict=False)
    assert torch.equal(as_tuple, model(**inputs).sample)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(**inputs).sample.square().mean().backward()
        gradients.append({name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, own in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], own, atol=1e-5, rtol=1e-4)


def test_an_adapter_is_saved_loaded_fused_and_removed(tmp_path):
    from peft import LoraConfig

    model = build_refiner()
    inputs = inputs_of(model)
    plain = model(**inputs).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = model(**inputs).sample
    assert not torch.allclose(adapted, plain, atol=1e-4)
    model.save_lora_adapter(tmp_path)
    other = build_refiner()
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(other(**inputs).sample, adapted, atol=1e-5, rtol=1e-5)
    other.fuse_lora()
    torch.testing.assert_close(other(**inputs).sample, adapted, atol=1e-4, rtol=1e-4)
    model.unload_lora()
    torch.testing.assert_close(model(**inputs).sample, plain, atol=1e-5, rtol=1e-5)


def test_a_pipeline_is_made_of_parts_and_from_another(vq_model):
    pipeline = build_pipeline(vq_model)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    expected = pipeline(pictures(), generator=generator(0), **options).images
    same = NextFlowRefinerPipeline(**pipeline.components)
    same.set_progress_bar_config(disable=True)
    assert torch.equal(same(pictures(), generator=generator(0), **options).images, expected)
    other = NextFlowRefinerPipeline.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(other(pictures(), generator=generator(0), **options).images, expected)
    assert pipeline.to(torch.float64).refiner.dtype == torch.float64
    pipeline.to(torch.float32)


def test_parts_that_are_left_out_stay_out(vq_model, tmp_path):
    pipeline = NextFlowRefinerPipeline(build_refiner(), FlowMatchEulerDiscreteScheduler(), vq_model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    loaded = NextFlowRefinerPipeline.from_pretrained(tmp_path)
    assert loaded.vae is None and loaded.tokenizer is None
    other = NextFlowRefinerPipeline.from_pretrained(tmp_path, tokenizer=build_tokenizer(), vq_model=vq_model)
    assert other.tokenizer is not None and other.vq_model is vq_model
