"""Conversations as `Trainer` and TRL's trainer learn them, text and pictures."""

import datasets
import pytest
import torch
from dots import Dots
from PIL import Image
from small_models import save_small_checkpoint
from transformers import AutoModelForMultimodalLM, AutoProcessor, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from nextflow_hf.training.conversation_collator import NextFlowDataCollator
from nextflow_hf.training.sft import NextFlowSFTTrainer

DRAWN, SHOWN = (Image.fromarray(Dots().image(index)) for index in (0, 5))
IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def conversation():
    """A picture that is looked at, one that is drawn, and words."""
    return {
        "messages": [
            {"role": "user", "content": [IMAGE, text("a red circle")]},
            {"role": "assistant", "content": [IMAGE]},
            {"role": "user", "content": [text("a circle")]},
            {"role": "assistant", "content": [text("a star")]},
        ],
        "images": [SHOWN, DRAWN],
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    save_small_checkpoint(folder)
    return folder


@pytest.fixture
def model(checkpoint):
    return AutoModelForMultimodalLM.from_pretrained(checkpoint)


@pytest.fixture
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture
def collator(processor, model):
    return NextFlowDataCollator(processor, model)


def test_what_the_assistant_made_is_learned(collator, processor, model):
    batch = collator([conversation()])
    pixels = processor.image_processor([SHOWN, DRAWN], return_tensors="pt")["pixel_values"]
    codes, _ = model.model.encode_images(pixels)
    assert torch.equal(batch["image_codes"], codes)
    assert torch.equal(batch["image_labels"], torch.stack([torch.full_like(codes[0], -100), codes[1]]))
    labels = batch["labels"][0]
    written = processor.decode(labels[labels != -100])
    assert written == "<|vision_start|><|im_end|>a star<|im_end|>"


def test_pictures_may_stand_in_the_turns(collator):
    row = conversation()
    pictures = iter(row.pop("images"))
    for turn in row["messages"]:
        turn["content"] = [{**part, "image": next(pictures)} if part == IMAGE else part for part in turn["content"]]
    for name, own in collator([row]).items():
        assert torch.equal(own, collator([conversation()])[name]), name


def test_rows_of_text_and_of_pictures_share_a_batch(collator):
    words = {"messages": [{"role": "user", "content": "a star"}, {"role": "assistant", "content": "a circle"}]}
    batch = collator([words, conversation()])
    assert len(batch["input_ids"]) == len(batch["labels"]) == 2 and len(batch["image_labels"]) == 2
    assert "image_codes" not in collator([words])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1]}, "remove_unused_columns=False"),
        ({**conversation(), "images": [SHOWN]}, "places for 2 pictures, but 1"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "special token"),
    ],
)
def test_refuses_rows_that_are_no_conversation(collator, row, message):
    with pytest.raises(ValueError, match=message):
        collator([row])


ARGUMENTS = {
    "max_steps": 2,
    "per_device_train_batch_size": 1,
    "learning_rate": 0.1,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def trainer_of(kind, model, processor, collator, folder):
    arguments = {"data_collator": collator, "train_dataset": datasets.Dataset.from_list([conversation()] * 2)}
    if kind is Trainer:
        return Trainer(model, TrainingArguments(folder, remove_unused_columns=False, **ARGUMENTS), **arguments)
    args = SFTConfig(folder, bf16=False, gradient_checkpointing=False, **ARGUMENTS)
    return kind(model, args, processing_class=processor, **arguments)


@pytest.mark.parametrize("kind", [Trainer, NextFlowSFTTrainer])
def test_trainers_learn_text_and_pictures(kind, model, processor, collator, tmp_path):
    own = model(**collator([conversation()]))
    assert own.image_loss > 0 and own.text_loss > 0
    codes = model.lm_head.weight[model.config.code_start_id :].detach().clone()
    trainer = trainer_of(kind, model, processor, collator, tmp_path)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(own.loss.item(), abs=1e-4) and losses[1] < losses[0]
    assert not torch.equal(codes, model.lm_head.weight[model.config.code_start_id :])


def test_trls_own_loss_is_refused_where_it_would_leave_pictures_out(model, processor, collator, tmp_path):
    with pytest.raises(ValueError, match="NextFlowSFTTrainer"):
        trainer_of(SFTTrainer, model, processor, collator, tmp_path).train()
