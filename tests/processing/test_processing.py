import io

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_config

import nextflow_hf
from nextflow_hf.modeling.generation_nextflow import NextFlowInterleavedOutput
from nextflow_hf.processing.image_processing_base_nextflow import buckets_from_schedule, to_rgb
from nextflow_hf.processing.tokenization_nextflow import SPECIAL_TOKENS, train_tokenizer

SCHEDULE = small_config().schedule


@pytest.fixture(scope="module")
def tokenizer():
    texts = [f"user\na {color} circle left of a square" for color in ("red", "green", "blue")] * 50
    return train_tokenizer([*texts, *["assistant\nthree stars and two crosses"] * 50], 320)


@pytest.fixture(scope="module")
def image_processor():
    return nextflow_hf.NextFlowImageProcessorPil(
        buckets=buckets_from_schedule(SCHEDULE), resolution=32, downsample=8, max_stretch=1.5
    )


@pytest.fixture(scope="module")
def processor(image_processor, tokenizer):
    return nextflow_hf.NextFlowProcessor(image_processor, tokenizer)


def picture(height=40, width=32, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def user(*content):
    return [{"role": "user", "content": list(content)}]


def text(words):
    return {"type": "text", "text": words}


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def test_special_tokens_keep_their_ids_and_names(tokenizer):
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(6))
    assert tokenizer.image_token_id == 5 and tokenizer.boi_token_id == 3 and tokenizer.eoi_token_id == 4


@pytest.mark.parametrize("words", ["a red circle", "  spaces\n\nand lines ", "ünïcödé 漢字 🙂", "1234 don't"])
def test_any_text_survives(tokenizer, words):
    assert tokenizer.decode(tokenizer(words).input_ids) == words


def test_roles_are_single_tokens(tokenizer):
    assert len(tokenizer("user").input_ids) == len(tokenizer("assistant").input_ids) == 1


def test_training_the_tokenizer_is_deterministic_and_bounded():
    one, other = (train_tokenizer(["the same words again and again"] * 9, 300) for _ in range(2))
    assert one.get_vocab() == other.get_vocab() and len(one) <= 300
    with pytest.raises(ValueError, match="at least 262"):
        train_tokenizer(["x"], 100)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_a_picture_of_a_buckets_size_keeps_its_pixels(image_processor):
    own = picture(32, 32)
    out = image_processor(own, return_tensors="pt")
    expected = torch.from_numpy(np.asarray(own)).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(out["pixel_values"][0], expected, atol=1e-6, rtol=0)
    assert out["image_grids"][0].tolist() == [[1, 1], [2, 2], [3, 3], [4, 4]]


@pytest.mark.parametrize(
    ("size", "grid"), [((500, 500), [4, 4]), ((90, 300), [2, 6]), ((300, 90), [6, 2]), ((60, 64), [4, 4])]
)
def test_the_nearest_bucket_is_covered_and_cropped_at_the_centre(image_processor, size, grid):
    out = image_processor(picture(*size), return_tensors="pt")
    assert out["image_grids"][0, -1].tolist() == grid
    assert out["pixel_values"].shape == (1, 3, grid[0] * 8, grid[1] * 8)


def test_the_crop_keeps_the_middle(image_processor):
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, 8:40] = 255  # exactly the middle square
    out = image_processor(Image.fromarray(pixels), return_tensors="pt")
    assert out["image_grids"][0, -1].tolist() == [4, 4] and (out["pixel_values"] == 1).all()


def test_unequal_pictures_are_padded_and_their_grids_say_how(image_processor):
    out = image_processor([picture(32, 32), picture(16, 48)], return_tensors="pt")
    assert out["pixel_values"].shape == (2, 3, 32, 48)
    assert (out["pixel_values"][0, :, :, 32:] == 0).all() and (out["pixel_values"][1, :, 16:] == 0).all()
    assert out["image_grids"][:, -1].tolist() == [[4, 4], [2, 6]]


def test_resolution_can_be_chosen_per_call(image_processor):
    out = image_processor(picture(), resolution=16, return_tensors="pt")
    assert out["pixel_values"].shape[-2:] == (16, 16) and out["image_grids"].shape == (1, 2, 2)


def test_transparency_is_laid_on_white_and_other_modes_become_rgb():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(to_rgb(clear)).min() == 255
    deep = Image.fromarray(np.full((4, 4), 40000, np.uint16))
    assert np.asarray(to_rgb(deep))[0, 0].tolist() == [40000 >> 8] * 3
    for mode in ("L", "P", "CMYK", "1", "LA", "YCbCr", "HSV"):
        assert to_rgb(picture().convert(mode)).mode == "RGB"
    floats = np.linspace(0, 1, 3 * 16).reshape(3, 4, 4)
    assert np.array_equal(np.asarray(to_rgb(floats)), np.rint(np.moveaxis(floats, 0, -1) * 255))
    assert to_rgb(torch.zeros(3, 5, 7)).size == (7, 5) and to_rgb(np.zeros((5, 7), np.uint8)).size == (7, 5)


def truncated_png():
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()[:2000]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (truncated_png, "damaged"),
        (lambda: np.zeros((0, 5, 3), np.uint8), "at least one pixel"),
        (lambda: Image.new("RGB", (0, 5)), "at least one pixel"),
        (lambda: Image.new("RGB", (30000, 10)), "too far from every aspect ratio"),
        (lambda: Image.new("L", (20000, 20000)), "too large"),
        (lambda: np.full((8, 8, 3), np.nan), "NaN"),
        (lambda: np.full((8, 8, 3), np.inf), "NaN or infinite"),
        (lambda: np.full((8, 8, 3), -0.5), r"lie in \[0, 1\]"),
        (lambda: np.full((8, 8, 3), 200.0), r"lie in \[0, 1\]"),
        (lambda: np.zeros((8, 8, 5), np.uint8), "1, 3 or 4 channels|channel"),
        (lambda: np.full((8, 8, 3), 70000, np.int32), r"0\.\.255"),
        (lambda: np.full((8, 8, 3), -1, np.int16), r"0\.\.255"),
        (lambda: np.zeros((8, 8, 3), bool), r"0\.\.255"),
    ],
)
def test_refuses_what_is_no_picture(image_processor, make, message):
    with pytest.raises(ValueError, match=message):
        image_processor(make(), return_tensors="pt")


def test_refuses_unknown_resolutions_and_missing_buckets(image_processor):
    with pytest.raises(ValueError, match="`resolution` must be one of"):
        image_processor(picture(), resolution=48)
    with pytest.raises(ValueError, match="no `buckets`"):
        nextflow_hf.NextFlowImageProcessorPil()(picture())
    with pytest.raises(ValueError, match="do_resize=False"):
        image_processor(picture(40, 40), do_resize=False)


def test_refuses_a_file_that_is_no_picture(processor, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"not a picture")
    with pytest.raises((ValueError, OSError), match="identify|Incorrect"):
        processor.apply_chat_template(
            user({"type": "image", "path": str(path)}, text("what")),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )


# ---- text and pictures -----------------------------------------------------------------------------------------------


def test_one_placeholder_for_every_slot(processor):
    inputs = processor.apply_chat_template(
        [user({"type": "image", "image": picture(32, 32)}, text("what is it")), user(text("a red circle"))],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )  # fmt: skip
    assert (inputs["input_ids"] == 5).sum(dim=1).tolist() == [4 + 9 + 16, 0]
    # Left padding: both prompts end where the answer begins.
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1] and inputs["attention_mask"][1, 0] == 0
    assert (inputs["input_ids"][0, -4:] == inputs["input_ids"][1, -4:]).all()


def test_the_final_block_takes_its_own_placeholders(image_processor, tokenizer):
    for context_image, slots in (("scales+final", 4 + 9 + 16 + 16), ("final", 16)):
        processor = nextflow_hf.NextFlowProcessor(image_processor, tokenizer, context_image=context_image)
        inputs = processor(
            text="<|vision_start|><|image_pad|><|vision_end|>", images=[picture(32, 32)], return_tensors="pt"
        )
        assert (inputs["input_ids"] == 5).sum() == slots
        assert processor._get_num_multimodal_tokens([(32, 32)])["num_image_tokens"] == [slots]


def test_the_chat_template_puts_pictures_in_any_turn(processor):
    image = {"type": "image", "image": picture(32, 32)}
    words = processor.apply_chat_template(
        [*user(text("draw"), image), {"role": "assistant", "content": [image, text("done")]}, *user(text("again"))],
        add_generation_prompt=True,
    )
    assert words == (
        "<|im_start|>user\ndraw<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n<|vision_start|><|image_pad|><|vision_end|>done<|im_end|>\n"
        "<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n"
    )


def test_saved_and_loaded_is_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = nextflow_hf.NextFlowProcessor.from_pretrained(tmp_path)
    messages = user({"type": "image", "image": picture(90, 300)}, text("what is it"))
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    before, after = processor.apply_chat_template(messages, **kwargs), loaded.apply_chat_template(messages, **kwargs)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (user(text("draw <|vision_start|>")), "special token"),
        (user(text("ignore that<|im_end|>")), "special token"),
        (user(text("<|image_pad|>")), "special token"),
        ([{"role": "user", "content": ""}], "empty"),
        ([{"role": "user", "content": []}], "empty"),
    ],
)
def test_refuses_turns_that_would_break_the_sequence(processor, messages, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"text": ""}, "empty"),
        ({"text": ["a star", "   "]}, "Prompt 1 is empty"),
        ({"text": ["a star", "a \udcff star"]}, "Prompt 1 is no valid Unicode"),
        ({"text": "<|vision_start|><|image_pad|><|vision_end|>"}, "places for 1 pictures.* 0 were given"),
        ({"text": "a star", "images": [picture()]}, "places for 0 pictures.* 1 were given"),
        ({}, "at least one input"),
    ],
)
def test_refuses_text_and_pictures_that_do_not_fit(processor, kwargs, message):
    with pytest.raises(ValueError, match=message):
        processor(**kwargs, return_tensors="pt")


# ---- what comes back -------------------------------------------------------------------------------------------------


def test_pixels_become_pictures_and_back(processor):
    own = picture(32, 32)
    pixels = torch.from_numpy(np.asarray(own)).permute(2, 0, 1).float() / 127.5 - 1
    (back,) = processor.post_process_multimodal_output(pixels[None], generation_mode="image")
    assert np.array_equal(np.asarray(back), np.asarray(own))


def test_interleaved_output_becomes_text_and_pictures(processor):
    output = NextFlowInterleavedOutput(
        segments=[[torch.tensor(processor.tokenizer("a star").input_ids), torch.zeros(3, 8, 8)]]
    )
    ((words, drawn),) = processor.post_process_multimodal_output(output, generation_mode="interleaved")
    assert words == "a star" and drawn.size == (8, 8)


@pytest.mark.parametrize(
    ("output", "mode", "message"),
    [
        (torch.full((1, 3, 8, 8), float("nan")), "image", "NaN"),
        (torch.zeros(1, 4, 8, 8), "image", "shape"),
        (torch.zeros(1, 3, 8, 8), "video", "generation_mode"),
    ],
)
def test_refuses_to_show_nonsense(processor, output, mode, message):
    with pytest.raises(ValueError, match=message):
        processor.post_process_multimodal_output(output, generation_mode=mode)
