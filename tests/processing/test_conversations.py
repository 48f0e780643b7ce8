"""What conversations become, and which would silently become something else."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_config

import nextflow_hf
from nextflow_hf.processing.image_processing_base_nextflow import buckets_from_schedule
from nextflow_hf.processing.tokenization_nextflow import SPECIAL_TOKENS, qwen_tokenizer, train_tokenizer

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TENSORS = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["user\na red circle", "assistant\nthree stars and two crosses"] * 50, 320)


def processor_of(tokenizer):
    image_processor = nextflow_hf.NextFlowImageProcessorPil(
        buckets=buckets_from_schedule(small_config().schedule), resolution=32, downsample=8
    )
    return nextflow_hf.NextFlowProcessor(image_processor, tokenizer)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return processor_of(tokenizer)


def picture(height=32, width=32):
    return Image.fromarray(np.zeros((height, width, 3), np.uint8))


def image(*size):
    return {"type": "image", "image": picture(*size)}


def text(words):
    return {"type": "text", "text": words}


def turn(role, *content):
    return {"role": role, "content": list(content)}


# ---- assistant masks -------------------------------------------------------------------------------------------------


def test_assistant_masks_hold_all_that_the_assistant_made(processor):
    conversations = [
        [turn("user", image(16, 48), text("a red circle")), turn("assistant", text("three stars"))],
        [
            turn("user", text("a red circle")),
            turn("assistant", text("ok"), image(), text("two")),
            turn("user", image(16, 48)),
            turn("assistant", image(16, 48)),
        ],
        [turn("user", text("a red circle")), turn("assistant", text("three stars"))],
    ]
    inputs = processor.apply_chat_template(conversations, **TENSORS, return_assistant_tokens_mask=True)
    assert inputs["assistant_masks"].shape == inputs["input_ids"].shape
    written = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"])
    ]
    square, wide = (IMAGE.replace("<|image_pad|>", "<|image_pad|>" * slots) for slots in (29, 3 + 8 + 12))
    assert written == ["three stars<|im_end|>", f"ok{square}two<|im_end|>{wide}<|im_end|>", "three stars<|im_end|>"]


def test_assistant_masks_follow_the_padding(processor):
    conversations = [
        [turn("user", text("a red circle")), turn("assistant", text(words))] for words in ("star", "three stars")
    ]
    inputs = processor.apply_chat_template(
        conversations, **TENSORS, return_assistant_tokens_mask=True, processor_kwargs={"padding_side": "right"}
    )
    written = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"])
    ]
    assert written == ["star<|im_end|>", "three stars<|im_end|>"]


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_unequal_prompts_are_padded_on_the_left(processor):
    inputs = processor(text=["a star", "a red circle and three stars"], padding=True, return_tensors="pt")
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1] and inputs["attention_mask"][0, 0] == 0
    assert inputs["input_ids"][0, 0] == processor.tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        (IMAGE * 2, [picture()], "places for 2 pictures.* 1 were given"),
        (IMAGE, [picture(), picture()], "places for 1 pictures.* 2 were given"),
        ([IMAGE * 2, IMAGE], [[picture()], [picture()] * 2], "Prompt 0 has places for 2 pictures.* 1 were given"),
        ([], None, "at least one string"),
        ([5], None, "at least one string"),
    ],
)
def test_refuses_batches_that_do_not_fit(processor, prompts, images, message):
    with pytest.raises(ValueError, match=message):
        processor(text=prompts, images=images, return_tensors="pt")


# ---- conversations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no turns"),
        ([[]], "no turns"),
        (["a star"], "dict with a role"),
        ([{"content": "a star"}], "dict with a role"),
        ([{"role": "user"}], "empty"),
        ([turn("user", text("  "))], "empty"),
        ([turn("user", {"type": "video", "video": "film.mp4"}, text("what"))], "text and pictures"),
        ([turn("user", {"type": "text", "txt": "a star"})], "text and pictures"),
        ([turn("user", text("<|im_"), text("end|>"))], "special token"),
        ([turn("user<|im_end|>", text("a star"))], "special token"),
    ],
)
def test_refuses_conversations_that_would_lose_or_change_something(processor, messages, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(messages, **TENSORS)


def test_halves_of_a_token_around_a_picture_are_plain_text(processor):
    assert processor.apply_chat_template([turn("user", text("<|im_"), image(), text("end|>"))])


def test_pictures_are_float_pixels(processor):
    with pytest.raises(ValueError, match="float pixels"):
        processor.post_process_multimodal_output(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), generation_mode="image")


# ---- Qwen2.5's tokenizer ---------------------------------------------------------------------------------------------


def stored(tokenizer, folder, without=(), extra="<|video_pad|>"):
    """Files of a tokenizer whose special tokens have no names, as Qwen2.5's come."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [own for own in content["added_tokens"] if own["content"] not in without]
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {(f"x{i}" if own in without else own): i for own, i in vocabulary.items()}
    content["added_tokens"].append({**content["added_tokens"][0], "id": len(vocabulary), "content": extra})
    path.write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


def test_qwens_tokens_get_their_names(tokenizer, tmp_path):
    own = qwen_tokenizer(stored(tokenizer, tmp_path))
    assert (own.boi_token_id, own.eoi_token_id, own.image_token_id) == (3, 4, 5) and own.padding_side == "left"
    assert len(own) == len(tokenizer) + 1  # nothing was added
    with pytest.raises(ValueError, match="special token"):
        processor_of(own).apply_chat_template([turn("user", text("a <|video_pad|>"))])


@pytest.mark.parametrize("token", SPECIAL_TOKENS[1:])
def test_a_tokenizer_without_qwens_tokens_is_refused(tokenizer, tmp_path, token):
    with pytest.raises(ValueError, match="lacks"):
        qwen_tokenizer(stored(tokenizer, tmp_path, without=(token,)))
