import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dots import SQUARE, Dots, codes_of
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from small_models import small_config, small_model
from transformers import AutoProcessor, GenerationConfig, Trainer, TrainerState, TrainingArguments

import nextflow_hf
from nextflow_hf.cli import main
from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration
from nextflow_hf.modeling.modeling_nextflow_vq import NextFlowVQModel
from nextflow_hf.processing.image_processing_base_nextflow import buckets_from_schedule
from nextflow_hf.processing.processing_nextflow import NextFlowProcessor
from nextflow_hf.training import stages
from nextflow_hf.training.code_extraction import extract_codes
from nextflow_hf.training.coded_documents import CodedDocuments, MixedSequences
from nextflow_hf.training.data import MixedSource, import_class, load_source, to_pixels
from nextflow_hf.training.documents import load_reader
from nextflow_hf.training.grpo import NextFlowGRPOConfig
from nextflow_hf.training.recipe import RECIPES, Recipe, load_recipe
from nextflow_hf.training.sequences import CodedImage, SequenceBuilder
from nextflow_hf.training.stage_trainer import (
    EmaCallback,
    NonFiniteError,
    check_writable,
    checkpoint_bytes,
    run_stage,
    save_whole,
)
from nextflow_hf.training.stages import STAGES, run_recipe
from nextflow_hf.training.train_decoder import DrawAndReadDataset, _set_entries
from nextflow_hf.training.train_vq import _mean_losses, by_size, train_teacher
from nextflow_hf.training.zero import CONFIGS, check_zero, zero_arguments

# ---- sequences -------------------------------------------------------------------------------------------------------


def processor_of(builder):
    image_processor = nextflow_hf.NextFlowImageProcessorPil(
        buckets=buckets_from_schedule(builder.config.schedule), resolution=32, downsample=8
    )
    return nextflow_hf.NextFlowProcessor(image_processor, builder.tokenizer)


def test_training_and_inference_see_the_same_tokens(builder):
    """The text around a picture is the chat template's, token for token."""
    processor = processor_of(builder)
    picture = {"type": "image", "image": Dots().image(0)}
    drawing = [
        {"role": "user", "content": [{"type": "text", "text": "draw dot 1"}]},
        {"role": "assistant", "content": [picture]},
    ]
    reading = [
        {"role": "user", "content": [picture, {"type": "text", "text": "which"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "dot 1"}]},
    ]
    for own, messages in (
        (builder.draw("draw dot 1", codes_of(), SQUARE), drawing),
        (builder.read("which", "dot 1", codes_of(), SQUARE), reading),
    ):
        expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        # The template ends a turn with a line end, which no prediction needs.
        assert own["input_ids"] == expected["input_ids"][0, :-1].tolist()


def test_loss_is_on_the_response_alone(builder):
    drawing = builder.draw("draw dot 1", codes_of(), SQUARE)
    labelled = [token for token in drawing["labels"] if token != -100]
    assert labelled == [builder.config.boi_token_id, builder.end_of_turn]
    assert drawing["image_labels"] == [codes_of()]
    reading = builder.read("which", "dot 1", codes_of(), SQUARE)
    labelled = [token for token in reading["labels"] if token != -100]
    assert builder.tokenizer.decode(labelled) == "dot 1<|im_end|>" and set(reading["image_labels"][0]) == {-100}


def test_what_opens_a_thought_is_the_template_s(builder):
    """Loss on it would teach a model to think unasked."""
    turn = {"role": "assistant", "content": [{"type": "text", "text": "<think>\ndot 1\n</think>\ndot 2"}]}
    own = builder.build([{"role": "user", "content": "which"}, turn], [])
    labelled = [token for token in own["labels"] if token != -100]
    assert builder.tokenizer.decode(labelled) == "dot 1\n</think>\ndot 2<|im_end|>"
    assert "<think>\ndot 1" in builder.tokenizer.decode(own["input_ids"])
    later = [{"type": "text", "text": "dot 1 <think>\n"}]
    own = builder.build([{"role": "user", "content": "which"}, {"role": "assistant", "content": later}], [])
    labelled = [token for token in own["labels"] if token != -100]
    assert builder.tokenizer.decode(labelled) == "dot 1 <think>\n<|im_end|>"


IMAGE = {"type": "image"}
# Of a recipe for an accelerator, on a CPU: one small step that changes nothing.
ONE_STILL_STEP = (
    "trainer.max_steps=1",
    "trainer.learning_rate=0.0",
    "trainer.per_device_train_batch_size=1",
    "trainer.dataloader_num_workers=0",
)


def two_turns(**first) -> list[dict]:
    """A picture is drawn, then changed."""
    words = [{"type": "text", "text": "dot 1"}]
    return [
        {"role": "user", "content": words},
        {"role": "assistant", "content": [IMAGE], **first},
        {"role": "user", "content": words},
        {"role": "assistant", "content": [IMAGE]},
    ]


@pytest.mark.parametrize(
    ("context_image", "drawn", "shown"), [("scales", 29, 29), ("scales+final", 45, 45), ("final", 45, 16)]
)
def test_a_picture_that_something_follows_shows_its_finest_codes(builder_of, context_image, drawn, shown):
    builder = builder_of(context_image=context_image, levels=(3, 4))
    slots = lambda item: sum(token == builder.config.image_token_id for token in item["input_ids"])  # noqa: E731
    pictures = [CodedImage(codes_of(), SQUARE)] * 2
    assert slots(builder.draw("dot 1", codes_of(), SQUARE)) == 29
    assert slots(builder.read("which", "dot 1", codes_of(), SQUARE)) == shown
    assert slots(builder.build(two_turns(), pictures)) == drawn + 29
    assert slots(builder.build(two_turns()[:2], pictures[:1], shows_last=True)) == drawn
    # A turn of no weight is only looked at.
    looked_at = builder.build(two_turns(weight=0), pictures)
    assert slots(looked_at) == shown + 29
    assert [set(own) == {-100} for own in looked_at["image_labels"]] == [True, False]
    # Where text and pictures take turns, drawing does not know which picture is the last.
    for content in ([IMAGE, {"type": "text", "text": "dot 1"}], [{"type": "text", "text": "dot 1"}, IMAGE]):
        assert slots(builder.build([{"role": None, "content": content}], pictures[:1])) == drawn


def test_without_a_prompt_only_the_picture_is_left(builder):
    """What guidance's other branch sees in `generate`."""
    sequence = builder.draw(None, codes_of(), SQUARE)
    assert sequence["input_ids"][:2] == [builder.config.boi_token_id, builder.config.image_token_id]
    assert sequence["labels"][0] == -100


def test_without_a_prompt_pictures_that_were_given_stay(builder_of):
    """In an edit guidance's other branch sees them in `generate`, and no words."""
    builder = builder_of(context_image="final", levels=(3, 4))
    pictures = [CodedImage(codes_of(), SQUARE)] * 2
    edit = [
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "dot 1"}]},
        {"role": "assistant", "content": [IMAGE]},
    ]
    own = builder.build(edit, pictures, without_prompt=True)
    whole = builder.build(edit, pictures)
    prompt = whole["input_ids"][: len(whole["input_ids"]) - 29 - 3]
    model = NextFlowForConditionalGeneration(builder.config)
    ids, mask = model._unconditional(torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long), None, None)
    seen = ids[mask > 0].tolist()
    assert seen.count(builder.config.image_token_id) == 16
    assert own["input_ids"] == [*seen, *whole["input_ids"][-29 - 3 :]]
    assert [set(labels) == {-100} for labels in own["image_labels"]] == [True, False]
    assert own["labels"][: len(seen)] == [-100] * len(seen)


def test_a_prefix_stops_after_its_last_slot(builder):
    prefix = SequenceBuilder(builder.tokenizer, builder.config, prefix_scales=3).draw(None, codes_of(), SQUARE)
    assert len(prefix["input_ids"]) == 1 + 4 + 9
    assert prefix["image_labels"] == [codes_of(14) + [-100] * 16]
    assert prefix["grids"] == [SQUARE]  # the picture's length is still told


def test_collated_loss_equals_the_mean_of_the_items(builder):
    torch.manual_seed(0)
    model = nextflow_hf.NextFlowForConditionalGeneration(builder.config).eval()
    items = [builder.draw("draw dot 1", codes_of(), SQUARE), builder.draw("dot 2", codes_of()[::-1], SQUARE)]
    together = model(**builder.collate(items))
    alone = [model(**builder.collate([item])) for item in items]
    torch.testing.assert_close(together.image_loss, sum(own.image_loss for own in alone) / 2)
    mixed = model(**builder.collate([items[0], builder.read("which", "dot 1", codes_of(), SQUARE)]))
    torch.testing.assert_close(mixed.image_loss, alone[0].image_loss)


def test_items_do_not_depend_on_when_they_are_read(builder):
    codes = np.arange(8 * 30).reshape(8, 30) % 32
    dataset = DrawAndReadDataset(Dots(), codes, SQUARE, builder, read_share=0.4, prompt_dropout=0.3, epochs=4)
    assert len(dataset) == 32
    first = [dataset[index] for index in range(32)]
    assert [dataset[index] for index in reversed(range(32))][::-1] == first
    kinds = [
        "read" if own["image_labels"][0][0] == -100 else "bare" if own["input_ids"][0] == 3 else "draw" for own in first
    ]
    assert {"read", "bare", "draw"} == set(kinds)


# ---- codes -----------------------------------------------------------------------------------------------------------


def test_extracted_codes_are_the_tokenizers_and_are_reused(tmp_path):
    vq_model = small_model().vq_model
    path = tmp_path / "codes.safetensors"
    codes, grids = extract_codes(Dots(), vq_model, path, batch_size=3)
    expected = vq_model.encode(torch.from_numpy(to_pixels(np.stack([Dots().image(i) for i in range(8)]))))
    assert np.array_equal(codes, expected.codes.numpy()) and grids == expected.grids
    before = path.stat().st_mtime_ns
    again, _ = extract_codes(Dots(), vq_model, path)
    assert np.array_equal(again, codes) and path.stat().st_mtime_ns == before


def test_codes_of_another_tokenizer_or_source_are_refused(tmp_path):
    path = tmp_path / "codes.safetensors"
    extract_codes(Dots(), small_model().vq_model, path)
    with pytest.raises(ValueError, match="Remove it"):
        extract_codes(Dots(), small_model(seed=4).vq_model, path)
    with pytest.raises(ValueError, match="Remove it"):
        extract_codes(Dots(pictures=9), small_model().vq_model, path)

    class Negatives(Dots):
        def image(self, index):
            return 255 - super().image(index)

    with pytest.raises(ValueError, match="other pictures"):
        extract_codes(Negatives(), small_model().vq_model, path)


# ---- running ---------------------------------------------------------------------------------------------------------


class Interrupt(Exception):
    pass


def train_small(folder, max_steps=6, stop_at=None):
    """A few steps of the tokenizer; `stop_at` kills the run during that step."""
    torch.manual_seed(0)
    model = NextFlowVQModel(small_config().vq_config)
    recipe = Recipe(
        stage="vq",
        output_dir=str(folder),
        trainer={
            "max_steps": max_steps,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "save_steps": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
        },
    )
    calls = []

    def loss(model, batch):
        calls.append(1)
        if stop_at is not None and len(calls) == stop_at:
            raise Interrupt
        return model(batch["pixels"], generator=torch.Generator().manual_seed(0))

    pictures = [{"pixels": torch.from_numpy(to_pixels(Dots().image(i)))} for i in range(8)]
    collate = lambda items: {"pixels": torch.stack([item["pixels"] for item in items])}  # noqa: E731
    return run_stage(recipe, model, pictures, collate, loss)


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    whole = train_small(tmp_path / "whole")
    with pytest.raises(Interrupt):
        train_small(tmp_path / "killed", stop_at=4)
    resumed = train_small(tmp_path / "killed")
    for (name, one), (_, other) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_the_log_has_every_loss(tmp_path):
    train_small(tmp_path, max_steps=2)
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert {"pixel_loss", "semantic_loss", "codebook_loss", "commitment_loss"} <= log[0].keys()


def test_the_average_is_saved_with_every_checkpoint(tmp_path):
    train_small(tmp_path, max_steps=2)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    average, weights = load_file(checkpoint / "ema.safetensors"), load_file(checkpoint / "model.safetensors")
    name = "pixel_decoder.conv_in.weight"
    assert average[name].shape == weights[name].shape and not torch.equal(average[name], weights[name])


def test_a_folder_is_whole_or_absent(tmp_path):
    target = tmp_path / "final"

    def fail(folder):
        (folder / "half").write_text("half")
        raise Interrupt

    with pytest.raises(Interrupt):
        save_whole(target, fail)
    assert not target.exists()
    save_whole(target, lambda folder: (folder / "file").write_text("one"))
    with pytest.raises(Interrupt):
        save_whole(target, fail)
    assert (target / "file").read_text() == "one"
    save_whole(target, lambda folder: (folder / "file").write_text("two"))
    assert (target / "file").read_text() == "two" and {path.name for path in tmp_path.iterdir()} == {"final"}


def test_an_average_of_weights_in_bfloat16_follows_them():
    """By less a step than bfloat16 can tell apart."""
    model = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    torch.nn.init.constant_(model.weight, 0.02)
    ema = EmaCallback(0.9999, None)
    ema.on_train_begin(None, None, None, model=model)
    torch.nn.init.constant_(model.weight, 0.04)
    for step in range(100_000, 101_000):
        ema.on_step_end(None, TrainerState(global_step=step), None, model=model)
    start, end = 0.02, 0.04
    expected = end - (end - start) * 0.9999**1000
    assert ema.average["weight"].dtype == torch.bfloat16
    assert ema.average["weight"].float().mean().item() == pytest.approx(expected, rel=0.01)


def test_an_unwritable_folder_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot write"):
        check_writable(tmp_path / "file" / "run")


def test_an_extended_tokenizer_keeps_its_codes_and_goes_on_after_a_kill(tmp_path):
    small_model().vq_model.save_pretrained(tmp_path / "vq")

    def recipe(folder, size=48):
        return Recipe(
            stage="vq",
            output_dir=str(tmp_path / folder),
            init_from={"vq": str(tmp_path / "vq")},
            source={"class": "dots:Dots", "pictures": 256},
            config={"vq.codebook_size": size},
            stage_args={"phase": "extend", "ema_decay": 0.5},
            trainer={
                "max_steps": 4,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
                "save_steps": 2,
                "logging_steps": 1,
                "disable_tqdm": True,
                "use_cpu": True,
            },
        )

    run_recipe(recipe("run"))
    before = NextFlowVQModel.from_pretrained(tmp_path / "vq")
    after = NextFlowVQModel.from_pretrained(tmp_path / "run" / "final")
    assert after.codebook.size == 48
    assert torch.equal(after.codebook.table()[:32], before.codebook.table())
    changed = {
        name.split(".")[0]
        for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        if old.shape == new.shape and not torch.equal(old, new)
    }
    assert changed == {"pixel_encoder", "pixel_proj", "post_pixel_proj", "pixel_decoder"}
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert "keep_loss" in log[0]
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    run_recipe(recipe("run"))
    again = NextFlowVQModel.from_pretrained(tmp_path / "run" / "final").state_dict()
    assert all(torch.equal(own, again[name]) for name, own in after.state_dict().items())
    run_recipe(recipe("same", size=32))
    assert NextFlowVQModel.from_pretrained(tmp_path / "same" / "final").fingerprint() == before.fingerprint()
    with pytest.raises(ValueError, match=r"name a larger `vq.codebook_size`"):
        run_recipe(recipe("smaller", size=16))


def test_sources_are_mixed_by_weight_and_the_same_every_time(monkeypatch):
    specs = [{"class": "dots:Dots", "weight": 3}, {"class": "dots:Dots", "size": 64}]
    source, again = MixedSource(specs, 200, seed=1), MixedSource(specs, 200, seed=1)
    sides = [source.image(index).shape[0] for index in range(len(source))]
    assert 30 < sides.count(64) < 70 and set(sides) == {32, 64}
    assert all(np.array_equal(source.image(index), again.image(index)) for index in range(20))
    assert source.question(3, None) == ("which", "dot 3")
    with pytest.raises(ValueError, match="positive weight"):
        MixedSource([{"class": "dots:Dots", "weight": 0}])


def test_the_decoder_phase_trains_a_wider_pixel_decoder_on_codes_that_stay(tmp_path):
    before = small_model().vq_model
    before.save_pretrained(tmp_path / "vq")
    wider = [2 * own for own in before.config.decoder_channels]
    recipe = Recipe(
        stage="vq",
        output_dir=str(tmp_path / "wide"),
        init_from={"vq": str(tmp_path / "vq")},
        source={"class": "dots:Dots", "pictures": 300},
        config={"vq.decoder_channels": wider},
        stage_args={"phase": "decoder"},
        trainer={"max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True},
    )
    run_recipe(recipe)
    after = NextFlowVQModel.from_pretrained(tmp_path / "wide" / "final")
    assert after.config.decoder_channels == wider and after.fingerprint() == before.fingerprint()
    assert after.pixel_decoder.conv_in.weight.shape[0] == wider[-1]
    moved = {
        name.split(".")[0]
        for name, own in before.state_dict().items()
        if not torch.equal(own, after.state_dict()[name]) and not name.startswith("codebook.usage")
    }
    assert moved == {"pixel_decoder", "post_pixel_proj"}
    recipe.output_dir, recipe.config = str(tmp_path / "other"), {"vq.codebook_size": 48}
    with pytest.raises(ValueError, match='The phase "decoder" changes'):
        run_recipe(recipe)


def test_the_decoder_phase_learns_to_show_first_scales_as_smaller_pictures(tmp_path):
    start = small_model().vq_model
    start.save_pretrained(tmp_path / "vq")
    recipe = Recipe(
        stage="vq",
        output_dir=str(tmp_path / "own"),
        init_from={"vq": str(tmp_path / "vq")},
        source={"class": "dots:Dots"},
        config={"vq.scale_dropout": 0.0, "vq.prefix_scales": [3]},
        stage_args={"phase": "decoder", "ema_decay": 0.5},
        trainer={
            "max_steps": 30,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        },
    )
    run_recipe(recipe)
    trained = NextFlowVQModel.from_pretrained(tmp_path / "own" / "final").eval()
    assert trained.fingerprint() == start.fingerprint() and trained.config.prefix_scales == [3]
    pixels = torch.from_numpy(to_pixels(np.stack([Dots().image(index) for index in range(8)])))
    wanted = F.interpolate(pixels, size=(24, 24), mode="bicubic", antialias=True).clamp(-1, 1)
    errors = []
    for model in (start.eval(), trained):
        encoding = model.encode(pixels)
        first = encoding.codes[:, : sum(h * w for h, w in encoding.grids[:3])]
        errors.append(F.mse_loss(model.decode(first, encoding.grids[:3]), wanted).item())
    log = json.loads((tmp_path / "own" / "trainer_state.json").read_text())["log_history"]
    losses = [own["prefix_loss"] for own in log if "prefix_loss" in own]
    assert losses[0] == pytest.approx(errors[0], rel=0.2)
    assert losses[-1] < 0.7 * losses[0] and errors[1] < 0.7 * errors[0]
    # Pictures that have no more scales than that are shown whole alone.
    recipe.output_dir, recipe.source["size"] = str(tmp_path / "small"), 16
    recipe.trainer["max_steps"] = 2
    run_recipe(recipe)
    log = json.loads((tmp_path / "small" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["loss"] > 0 and not any("prefix_loss" in own for own in log)
    recipe.config["vq.scale_dropout"] = 0.1
    with pytest.raises(ValueError, match="need all scales"):
        run_recipe(recipe)


def test_a_codebook_grows_in_the_joint_phase_alone(tmp_path):
    small_model().vq_model.save_pretrained(tmp_path / "vq")
    small_model().vq_model.semantic_encoder.save_pretrained(tmp_path / "teacher")
    recipe = Recipe(
        stage="vq",
        output_dir=str(tmp_path / "grown"),
        init_from={"teacher": str(tmp_path / "teacher"), "vq": str(tmp_path / "vq")},
        source={"class": "dots:Dots", "pictures": 300},
        config={"vq.codebook_size": 48},
        stage_args={"phase": "joint"},
        trainer={"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True},
    )
    run_recipe(recipe)
    assert NextFlowVQModel.from_pretrained(tmp_path / "grown" / "final").codebook.size == 48
    recipe.output_dir, recipe.stage_args = str(tmp_path / "other"), {"phase": "pixel"}
    with pytest.raises(ValueError, match='phase "joint" makes a new codebook'):
        run_recipe(recipe)


@pytest.mark.parametrize("phase", ["pixel", "joint", "extend"])
@pytest.mark.parametrize("entry", ["decoder_channels", "pixel_distance_weight", "sides"])
def test_a_tokenizer_that_goes_on_keeps_what_its_weights_were_made_for(phase, entry, tmp_path):
    """Else it would be trained as it was, and saved as what it is not."""
    vq_model = small_model().vq_model
    vq_model.save_pretrained(tmp_path / "vq")
    vq_model.semantic_encoder.save_pretrained(tmp_path / "teacher")
    recipe = Recipe(
        stage="vq",
        output_dir=str(tmp_path / "run"),
        init_from={"teacher": str(tmp_path / "teacher"), "vq": str(tmp_path / "vq")},
        source={"class": "dots:Dots", "pictures": 300},
        config={f"vq.{entry}": getattr(vq_model.config, entry)},
        stage_args={"phase": phase},
    )
    with pytest.raises(ValueError, match="A tokenizer that goes on changes"):
        run_recipe(recipe)


def test_the_text_tokenizer_learns_from_datasets(tmp_path):
    data = {"dots": {"kind": "messages", "class": "nextflow_hf.scenes:TaskRecords", "args": {"task": "edit"}}}
    recipe = Recipe("text_tokenizer", str(tmp_path / "own"), data=data, stage_args={"texts": 50, "vocab_size": 300})
    run_recipe(recipe)
    assert (tmp_path / "own" / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match="either `data`"):
        run_recipe(Recipe("text_tokenizer", str(tmp_path / "none")))


def test_the_recipes_run_one_after_another(tmp_path, monkeypatch):
    """All stages on a tiny shape: every file that a stage reads, the stage before has written."""
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "vq-pixel", "vq-joint", "vq-decoder", "extract-32", "extract-64", "pretrain-64"):
        if name == "teacher":
            run_recipe(load_recipe("mini-tokenizer", ["stage_args.texts=50"]))
        recipe = load_recipe(f"mini-{name}")
        if recipe.trainer:
            recipe.trainer |= {"max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True}
            recipe.trainer |= {"disable_tqdm": True, "dataloader_num_workers": 0}
        for spec in recipe.data.values():
            if "args" in spec:
                spec["args"]["num_records"] = 5
        if name == "pretrain-64":
            heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
            shape = {"hidden_size": 64, "intermediate_size": 64, **heads}
            recipe.config |= {f"text.{entry}": value for entry, value in shape.items()}
            recipe.trainer["per_device_train_batch_size"] = 1
        run_recipe(recipe)
    model = nextflow_hf.NextFlowForConditionalGeneration.from_pretrained(Path("runs/mini/pretrain-64/final"))
    assert model.config.abilities == ["image", "caption", "edit", "interleaved"]
    assert model.config.trained_image_sizes == [[64, 64], [48, 80], [80, 48]]
    assert model.generation_config.image_temperature == recipe.stage_args["sampling"]["temperature"]
    shutil.rmtree("runs")


def test_a_chain_hands_its_trainer_arguments_and_its_folder_on(tmp_path, monkeypatch):
    """`nextflow-hf train mini-all trainer.bf16=true output_dir=...`: the first is for what trains and says nothing."""
    ran = {}
    monkeypatch.setattr(stages, "run_recipe", lambda recipe: ran.update({recipe.output_dir: recipe}))
    monkeypatch.chdir(tmp_path)
    chain = Recipe(
        "chain",
        "other",
        trainer={"bf16": True},
        stage_args={"recipes": ["mini-extract-64", "mini-pretrain-64", "mini-grpo"]},
    )
    stages.run_chain(chain)
    codes, pretraining, rewards = (ran[f"other/{name}"] for name in ("codes-64", "pretrain-64", "grpo"))
    assert codes.trainer == {}
    # What a recipe says itself stands.
    assert rewards.trainer["bf16"] is False
    assert pretraining.trainer["bf16"] and pretraining.trainer["max_steps"] > 2
    # They read each other's results there, and those of other recipes where these put them.
    assert rewards.init_from == {"decoder": "other/pretrain-64/final"}
    assert pretraining.init_from == {"tokenizer": "runs/mini/tokenizer", "vq": "runs/mini/vq-decoder/final"}
    assert pretraining.data["edit"]["codes"] == "other/codes-64/edit"
    assert pretraining.data["draw-32"]["codes"] == "runs/mini/codes-32/draw"


@pytest.mark.parametrize("name", ["mini-all", "mini-words"])
def test_a_chain_leaves_its_recipes_folders_where_they_are(name, monkeypatch):
    ran = []
    monkeypatch.setattr(stages, "run_recipe", ran.append)
    monkeypatch.setattr(stages, "is_done", lambda recipe: False)
    chain = load_recipe(name)
    stages.run_chain(chain)
    assert ran == [
        dataclasses.replace(load_recipe(own), trainer=recipe.trainer)
        for own, recipe in zip(chain.stage_args["recipes"], ran, strict=True)
    ]


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_numbers_of_recipes_are_numbers():
    """YAML 1.1 takes `5.0e14` for text."""
    assert load_recipe("7b-align").stage_args["packing"]["capacity"] == 5e14
    trainer = load_recipe("7b-align", ["trainer.learning_rate=1e-4", "trainer.max_steps=5"]).trainer
    assert trainer["learning_rate"] == 1e-4 and type(trainer["max_steps"]) is int


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_bundled_recipes_are_complete(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.stage in STAGES
    if "num_pictures" in recipe.source:
        assert len(load_source({**recipe.source, "num_pictures": 3})) == 3
    elif recipe.source:
        assert callable(import_class(recipe.source["class"]))
    for name in recipe.stage_args.get("recipes", ()):
        load_recipe(name)
    if recipe.trainer:
        arguments = NextFlowGRPOConfig if recipe.stage == "grpo" else TrainingArguments
        arguments(output_dir=str(tmp_path), **{**recipe.trainer, "report_to": [], "bf16": False})
    for spec in recipe.data.values() if recipe.stage == "extract" else ():
        if "class" in spec:
            (document,) = (own for _, own in load_reader(spec).read(0, 1))
            # What is told in words has none.
            assert bool(document.images) != (spec["args"].get("told") == 1.0)


def test_a_recipe_without_a_folder_for_its_result_is_refused(tmp_path):
    (tmp_path / "own.yaml").write_text("stage: decoder")
    with pytest.raises(ValueError, match="lacks.*output_dir"):
        load_recipe(str(tmp_path / "own.yaml"))


def test_a_missing_start_names_the_recipe_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="nextflow-hf train mini-teacher"):
        run_recipe(load_recipe("mini-vq-pixel"))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        # Two recipes write into this folder.
        ([], r"runs/mini/think/final', which is not there \(`nextflow-hf train mini-think` makes it\)"),
        (["init_from.trained=runs/mini/think/adapter"], r"\(`nextflow-hf train mini-think-adapter` makes it\)"),
        (["init_from.trained=mini/nothing"], "bundled as 'mini' has no 'nothing'"),
    ],
)
def test_what_is_not_there_is_made_by_the_recipe_that_is_named(tmp_path, monkeypatch, start, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run_recipe(load_recipe("mini-think-adapter", ["init_from.decoder=mini", *start]))


def test_a_bundled_checkpoint_is_a_start_by_its_name(monkeypatch):
    ran = []
    monkeypatch.setitem(STAGES, "grpo", ran.append)
    run_recipe(load_recipe("mini-grpo", ["init_from.decoder=mini"]))
    assert ran[0].init_from["decoder"] == nextflow_hf.MINI


def test_the_bundled_checkpoint_and_adapter_are_all_that_mini_look_starts_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["extract", "mini-extract-look", "init_from.vq=mini", "data.describe.args.num_records=6"])
    start = [f"init_from.{role}=mini" for role in ("tokenizer", "vq", "decoder", "adapter")]
    run_recipe(load_recipe("mini-look", [*start, *ONE_STILL_STEP]))
    before, after = (
        load_file(Path(folder) / "adapter_model.safetensors")
        for folder in (nextflow_hf.ADAPTERS["mini"], "runs/mini/look/adapter")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], own.float()) for name, own in before.items())


def test_mini_think_starts_from_the_box_too_and_ends_as_an_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = [f"data.{name}.args.num_records=6" for name in load_recipe("mini-extract-think").data]
    main(["extract", "mini-extract-think", "init_from.vq=mini", *few])
    start = [f"init_from.{role}=mini" for role in ("tokenizer", "vq", "decoder")]
    run_recipe(load_recipe("mini-think", [*start, "init_from.adapter=mini/think", *ONE_STILL_STEP]))
    run_recipe(load_recipe("mini-think-adapter", ["init_from.decoder=mini"]))
    wanted, made = (
        PeftModel.from_pretrained(NextFlowForConditionalGeneration.from_pretrained(nextflow_hf.MINI), folder)
        .merge_and_unload()
        .state_dict()
        for folder in (Path(nextflow_hf.ADAPTERS["mini"]) / "think", "runs/mini/think/adapter")
    )
    for name, own in wanted.items():
        torch.testing.assert_close(made[name], own, atol=1e-4, rtol=0, msg=name)
    assert GenerationConfig.from_pretrained("runs/mini/think/adapter").enable_thinking


@pytest.mark.parametrize(
    ("recipe", "missing"),
    [
        (Recipe("teacher", "x", source={"class": "dots:Dots"}), "init_from.tokenizer"),
        (Recipe("vq", "x", source={"class": "dots:Dots"}, init_from={"vq": "mini"}), "init_from.teacher"),
        (Recipe("vq", "x", source={"class": "dots:Dots"}, stage_args={"phase": "extend"}), "init_from.vq"),
        (Recipe("extract", "x", data={"draw": {}}), "init_from.vq"),
        (Recipe("grpo", "x", source={"class": "dots:Dots"}), "init_from.decoder"),
        (Recipe("decoder", "x", source={"class": "dots:Dots"}, init_from={"vq": "mini", "tokenizer": "mini"}), "codes"),
        (Recipe("decoder", "x", data={"draw": {"weight": 1}}), "data.draw.codes"),
        (Recipe("decoder", "x", data={"draw": {"codes": "y"}}), "stage_args.sequences"),
        (Recipe("chain", "x"), "stage_args.recipes"),
    ],
)
def test_a_recipe_that_lacks_what_its_stage_needs_is_told_so(recipe, missing):
    with pytest.raises(ValueError, match=f"needs .*{missing}'"):
        run_recipe(recipe)


def test_names_with_nothing_behind_them_say_nothing(tmp_path):
    (tmp_path / "own.yaml").write_text("stage: decoder\noutput_dir: x\ntrainer:\ndata:\n")
    recipe = load_recipe(str(tmp_path / "own.yaml"), ["trainer.max_steps=5"])
    assert recipe.trainer == {"max_steps": 5} and recipe.data == {}
    (tmp_path / "own.yaml").write_text("")
    with pytest.raises(ValueError, match="lacks"):
        load_recipe(str(tmp_path / "own.yaml"))


def test_overrides():
    recipe = load_recipe("mini-pretrain-64", ["trainer.max_steps=7", "stage_args.abilities=[image]"])
    assert recipe.trainer["max_steps"] == 7 and recipe.stage_args["abilities"] == ["image"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_recipe("no-such-recipe"), "no recipe"),
        (lambda: load_recipe("mini-grpo", ["trainer.max_steps"]), "key=value"),
        (lambda: load_recipe("mini-grpo", ["speed=3"]), "unknown entries"),
        (lambda: load_source({"size": [64, 64]}), "module:name"),
        (lambda: load_source({"class": "nextflow_hf.scenes:NoSuchSource"}), "cannot be imported"),
        (lambda: run_recipe(Recipe(stage="dream", output_dir="x")), "stage is one of"),
        (lambda: run_recipe(load_recipe("mini-grpo", ["stage_args.blent=0.5"])), r"does not know .* \['blent'\]"),
        (lambda: run_recipe(load_recipe("mini-grpo", ["init_from.decoder=/no/such"])), "init_from.decoder.*not there"),
        (lambda: run_recipe(load_recipe("mini-all", ["config.context_image=final"])), "have their own"),
        (lambda: train_teacher(Recipe("teacher", "x", config={"vq.pixel_dimm": 3})), "pixel_dimm"),
    ],
)
def test_refuses_recipes_that_cannot_run(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- failures --------------------------------------------------------------------------------------------------------


def train_dots(folder, loss=None, max_steps=4, **trainer):
    """A few steps of a linear model on numbered records."""
    recipe = Recipe(
        stage="decoder",
        output_dir=str(folder),
        trainer={
            "max_steps": max_steps,
            "per_device_train_batch_size": 2,
            "save_steps": 2,
            "disable_tqdm": True,
            "use_cpu": True,
            **trainer,
        },
    )
    torch.manual_seed(0)
    config = small_config().vq_config
    model = NextFlowVQModel(config)
    pictures = [{"id": f"dot-{i}", "pixels": torch.from_numpy(to_pixels(Dots().image(i)))} for i in range(8)]

    def collate(items):
        return {"pixels": torch.stack([own["pixels"] for own in items]), "ids": [own["id"] for own in items]}

    def plain(model, batch):
        return model(batch["pixels"], generator=torch.Generator().manual_seed(0))

    return run_stage(recipe, model, pictures, collate, loss or plain)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_records(tmp_path):
    calls = []

    def loss(model, batch):
        output = model(batch["pixels"], generator=torch.Generator().manual_seed(0))
        calls.append(batch)
        if len(calls) == 6:
            output.loss = output.loss * float("nan")
        return output

    with pytest.raises(NonFiniteError, match="loss of step 3 is nan"):
        train_dots(tmp_path, loss, gradient_accumulation_steps=2)
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["step"] == 3 and len(report["ids"]) == 4 and all(own.startswith("dot-") for own in report["ids"])
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    def loss(model, batch):
        output = model(batch["pixels"], generator=torch.Generator().manual_seed(0))
        # Finite, with an infinite derivative.
        output.loss = output.loss + (output.loss - output.loss.detach()).abs().sqrt()
        return output

    with pytest.raises(NonFiniteError, match="gradient of step 1"):
        train_dots(tmp_path, loss)
    assert len(json.loads((tmp_path / "nonfinite.json").read_text())["ids"]) == 2


def test_a_run_killed_before_its_result_takes_it_from_the_last_checkpoint(tmp_path):
    whole = train_dots(tmp_path)
    log = (tmp_path / "trainer_state.json").read_text()
    again = train_dots(tmp_path, lambda model, batch: pytest.fail("trained again"))
    for (name, one), (_, other) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    assert (
        json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == json.loads(log)["global_step"] == 4
    )


def test_a_folder_with_a_run_of_another_recipe_is_gone_on_with_and_told(tmp_path, caplog):
    train_dots(tmp_path, max_steps=2)
    train_dots(tmp_path, max_steps=4, save_steps=1)
    assert "another recipe" not in caplog.text
    train_dots(tmp_path, max_steps=4, learning_rate=0.5)
    assert "another recipe" in caplog.text and "trainer.learning_rate None -> 0.5" in caplog.text
    assert "max_steps=4: nothing is trained" in caplog.text
    assert json.loads((tmp_path / "recipe.json").read_text())["trainer"]["learning_rate"] == 0.5


def test_checkpoints_of_an_adapted_model_need_no_room_for_the_rest():
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(1000, 1000, bias=False))
    assert checkpoint_bytes(model, copies=3) == 4 * 4 * 1000 * 1000
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    assert checkpoint_bytes(adapted, copies=3) == 4 * 4 * 2 * 2000


def test_a_disk_without_room_is_an_error_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="GB left"):
        check_writable(tmp_path, bytes_needed=10**18)


def test_checkpoints_that_lie_there_need_no_more_room(tmp_path, monkeypatch):
    """A run that goes on has written two of its three."""
    free = shutil.disk_usage(tmp_path)._replace(free=1500)
    monkeypatch.setattr("nextflow_hf.training.stage_trainer.shutil.disk_usage", lambda path: free)
    with pytest.raises(ValueError, match="GB left"):
        check_writable(tmp_path, bytes_needed=3000)
    for name in ("checkpoint-2", "checkpoint-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(1000))
    check_writable(tmp_path, bytes_needed=3000)


def test_a_plain_trainer_evaluates_and_leaves_the_codes(builder, tmp_path):
    """transformers' own, on what it knows: labels."""
    model = NextFlowForConditionalGeneration(builder.config)
    before = model.vq_model.fingerprint()
    items = [builder.read("which", f"dot {index}", codes_of(), SQUARE) for index in range(4)]

    def collate(items):
        batch = builder.collate(items)
        del batch["image_labels"]
        return batch

    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=0.1, remove_unused_columns=False,
        eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True, report_to=[], use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, collate, train_dataset=items, eval_dataset=items)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert model.vq_model.fingerprint() == before
    model.save_pretrained(tmp_path / "final")
    assert not any(own.requires_grad for own in type(model).from_pretrained(tmp_path / "final").vq_model.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bf16": {"enabled": True}}, "rounds the weights"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload the optimizer"),
        ({"zero_optimization": {"stage": 3}}, "saves whole weights"),
    ],
)
def test_refuses_a_deepspeed_configuration_that_spoils_the_result(config, message):
    with pytest.raises(ValueError, match=message):
        check_zero(config)


def test_bundled_deepspeed_configurations(monkeypatch):
    monkeypatch.setattr("nextflow_hf.training.zero.is_deepspeed_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    for path in CONFIGS.glob("*.json"):
        config = zero_arguments({"deepspeed": path.stem, "bf16": True})["deepspeed"]
        check_zero(config)
        # The weights stay in float32.
        assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"} and "bf16" not in config
    with pytest.raises(ValueError, match="has \\['zero2', 'zero3'\\]"):
        zero_arguments({"deepspeed": "zero4"})
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match="torchrun"):
        zero_arguments({"deepspeed": "zero2"})
    monkeypatch.setattr("nextflow_hf.training.zero.is_deepspeed_available", lambda: False)
    with pytest.raises(ImportError, match="pip install"):
        zero_arguments({"deepspeed": "zero2"})


@pytest.fixture
def train_on_codes(tmp_path, tokenizer):
    """Extract two datasets; the function trains a one-layer decoder on them and returns the result's folder."""
    vq_model = small_model().vq_model
    vq_model.save_pretrained(tmp_path / "vq")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    dots = {"class": "dots:DotRecords", "args": {"pictures": 8}, "columns": {"text": "words"}}
    run_recipe(
        Recipe(
            stage="extract",
            output_dir=str(tmp_path / "codes"),
            init_from={"vq": str(tmp_path / "vq")},
            data={"draw": {"kind": "text_to_image", **dots}, "read": {"kind": "image_to_text", **dots}},
            stage_args={"resolution": 32, "top_k": 4, "shard_size": 3},
        )
    )

    def train(name, max_steps, decoder=None, trainer=(), adapter=None, **stage_args):
        start = {"decoder": str(tmp_path / decoder / "final")} if decoder else {}
        start |= {"adapter": str(tmp_path / adapter / "adapter")} if adapter else {}
        recipe = Recipe(
            stage="decoder",
            output_dir=str(tmp_path / name),
            init_from={"vq": str(tmp_path / "vq"), "tokenizer": str(tmp_path / "tokenizer"), **start},
            data={
                "draw": {"codes": str(tmp_path / "codes" / "draw"), "weight": 2},
                "read": {"codes": str(tmp_path / "codes" / "read")},
            },
            config={} if decoder else {"text.num_hidden_layers": 1},
            stage_args={"sequences": 200, "image_size": [32, 32], **stage_args},
            trainer={
                "max_steps": max_steps,
                "per_device_train_batch_size": 2,
                "lr_scheduler_type": "constant",
                "learning_rate": 1e-2,
                "save_steps": 2,
                "logging_steps": 1,
                "disable_tqdm": True,
                **dict(trainer),
            },
        )
        run_recipe(recipe)
        return tmp_path / name

    return train


def weights_in(folder):
    return load_file(folder / "final" / "model.safetensors")


def test_the_decoder_trains_on_packed_documents_of_extracted_datasets(train_on_codes):
    """Without a break and with one: the same weights."""
    packed = {
        "attn_implementation": "block_varlen",
        "packing": {"unit": "flops", "capacity": 2e8, "max_tokens": 400, "window": 16},
    }
    folder = train_on_codes("whole", 4, **packed)
    shutil.rmtree(train_on_codes("parted", 2, **packed) / "final")
    whole, parted = weights_in(folder), weights_in(train_on_codes("parted", 4, **packed))
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
    # A break after all sequences were seen once: a few of them fill a row or two.
    few = {**packed, "sequences": 6}
    again = train_on_codes("again", 8, **few)
    shutil.rmtree(train_on_codes("broken", 6, **few) / "final")
    whole, parted = weights_in(again), weights_in(train_on_codes("broken", 8, **few))
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert {"text_loss", "image_loss", "scale_4_loss"} <= log[0].keys()
    # A recipe's own shape loads as it was trained, and knows what sizes it has seen.
    config = NextFlowForConditionalGeneration.from_pretrained(folder / "final").config
    assert config.text_config.num_hidden_layers == 1 and config.trained_image_sizes == [[32, 32]]
    # It is a whole checkpoint, with the processor that fits it.
    processor = AutoProcessor.from_pretrained(folder / "final")
    assert isinstance(processor, NextFlowProcessor) and processor.image_processor.resolution == 32


def test_documents_are_read_in_their_order_and_a_break_changes_nothing(train_on_codes, monkeypatch):
    read = []
    item = MixedSequences.__getitem__
    monkeypatch.setattr(MixedSequences, "__getitem__", lambda own, index: (read.append(index), item(own, index))[1])
    folder = train_on_codes("whole", 4)
    assert read[:8] == [*range(8)]
    shutil.rmtree(train_on_codes("parted", 2) / "final")
    whole, parted = weights_in(folder), weights_in(train_on_codes("parted", 4))
    assert all(torch.equal(whole[name], parted[name]) for name in whole)


@pytest.mark.parametrize(
    "packing, message",
    [
        ({"unit": "seconds", "capacity": 10}, "The `unit` of packing is one of"),
        ({"unit": "tokens", "capacity": 10, "attention_weight": 0.5}, "equal length know no `attention_weight`"),
        ({"unit": "flops", "capacity": 10, "attention_weight": -1}, "`attention_weight` must be positive"),
    ],
)
def test_a_packing_that_cannot_be_is_refused(train_on_codes, packing, message):
    with pytest.raises(ValueError, match=message):
        train_on_codes("refused", 1, packing=packing)


def test_the_size_of_the_recipe_comes_first(train_on_codes, monkeypatch):
    sizes = [[16, 48], [32, 32], [48, 16]]
    monkeypatch.setattr(
        "nextflow_hf.training.train_decoder.CodedDocuments",
        lambda *args: WithSizes(*args, sizes=sizes),
    )
    config = NextFlowForConditionalGeneration.from_pretrained(train_on_codes("sizes", 1) / "final").config
    assert config.trained_image_sizes == [[32, 32], [16, 48], [48, 16]]


class WithSizes(CodedDocuments):
    """Extracted documents whose manifest tells of these picture sizes."""

    def __init__(self, *args, sizes):
        super().__init__(*args)
        self.manifest["image_sizes"] = sizes


def test_samples_are_drawn_by_a_decoder_that_could_not_draw_before(train_on_codes):
    train_on_codes("reads", 1, abilities=["caption"])
    samples = {"sample_prompts": ["dot 1"], "sample_every": 1}
    folder = train_on_codes("draws", 1, decoder="reads", abilities=["image"], **samples)
    assert (folder / "samples" / "step-000001.png").is_file()
    for settings, message in (
        ({"abilities": ["caption"]}, '"image"'),
        ({"image_size": [16, 16]}, "cannot be drawn"),
        ({"sample_prompts": []}, "name some"),
        ({"sampling": {"guidance": 3.0}}, r"not \['guidance'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            train_on_codes("never", 1, **{**samples, **settings})


def test_entries_that_a_decoder_does_not_have_are_refused():
    for entries, message in (
        ({"contxt_image": "final"}, "contxt_image"),
        ({"text.hidden_size": 8}, "text.hidden_size"),
    ):
        with pytest.raises(ValueError, match=message):
            _set_entries(small_model(), entries)


def test_losses_of_the_scales_and_sample_sheets_are_in_tensorboard(train_on_codes):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    samples = {"sample_prompts": ["dot 1", "dot 2"], "sample_every": 2}
    folder = train_on_codes("run", 2, trainer={"report_to": ["tensorboard"]}, **samples)
    (events,) = folder.glob("runs/*/events.*")
    log = EventAccumulator(str(events)).Reload()
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    for name in ("loss", "text_loss", "image_loss", *(f"scale_{scale}_loss" for scale in (1, 2, 3, 4))):
        expected = [(entry["step"], pytest.approx(entry[name])) for entry in history if name in entry]
        assert expected and [(own.step, own.value) for own in log.Scalars(f"train/{name}")] == expected
    (sheet,) = log.Images("samples")
    # Four rows of two pictures.
    assert (sheet.step, sheet.height, sheet.width) == (2, 4 * 32, 2 * 32)
    logged, kept = Image.open(io.BytesIO(sheet.encoded_image_string)), Image.open(folder / "samples/step-000002.png")
    assert np.array_equal(np.asarray(logged), np.asarray(kept))


def test_alignment_moves_the_connector_and_the_head_alone(train_on_codes):
    before = weights_in(train_on_codes("before", 1))
    after = weights_in(train_on_codes("after", 2, decoder="before", trained=["model.connector"]))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("model.connector") for name in moved)


@pytest.mark.parametrize(
    ("stage_args", "message"),
    [
        ({"trained": ["model.conector"]}, "begins with \\['model.conector'\\]"),
        ({"trained": ["lm_head"], "lora": {}}, "not both"),
        ({"trained": ["*proj"]}, r"'\*proj', which is no regular expression"),
        ({"fsdp_size": 2}, "saved one"),
    ],
)
def test_refuses_parts_that_cannot_be_trained(train_on_codes, stage_args, message):
    with pytest.raises(ValueError, match=message):
        train_on_codes("bad", 1, **stage_args)


def test_lora_trains_resumes_and_is_merged(train_on_codes, tmp_path):
    train_on_codes("base", 1)
    lora = {"lora": {"r": 2, "target_modules": "all-linear", "exclude_modules": ".*vq_model.*|lm_head"}}
    folder = train_on_codes("whole", 4, decoder="base", **lora)
    shutil.rmtree(train_on_codes("parted", 2, decoder="base", **lora) / "final")
    whole, parted = weights_in(folder), weights_in(train_on_codes("parted", 4, decoder="base", **lora))
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
    assert load_file(folder / "adapter" / "adapter_model.safetensors").keys()
    settings = {"attn_implementation": "block_varlen", "sampling": {"guidance_scale": 0.0, "top_k": 77}}
    sampled = train_on_codes("sampled", 1, decoder="base", **lora, **settings)
    assert GenerationConfig.from_pretrained(sampled / "final").image_top_k == 77

    base = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "base" / "final")
    start = {name: own.clone() for name, own in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().state_dict()
    for name, own in NextFlowForConditionalGeneration.from_pretrained(folder / "final").state_dict().items():
        torch.testing.assert_close(merged[name], own, atol=1e-6, rtol=1e-5)
        linear = "proj.weight" in name or "connector.linear" in name
        if not linear or "vq_model" in name:
            assert torch.equal(own, start[name]), name
    # Killed between its last checkpoint and its result.
    shutil.rmtree(folder / "final")
    again = weights_in(train_on_codes("whole", 4, decoder="base", **lora))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_an_adapter_is_trained_further(train_on_codes):
    train_on_codes("base", 1)
    lora = {"lora": {"r": 2, "target_modules": ["q_proj", "linear_1"]}}
    whole = weights_in(train_on_codes("whole", 3, decoder="base", **lora))
    stands, moves = (
        weights_in(train_on_codes(name, 1, "base", {"learning_rate": rate}, adapter="whole"))
        for name, rate in (("stands", 0.0), ("moves", 1e-2))
    )
    adapted = [name for name in whole if not torch.equal(whole[name], moves[name])]
    assert adapted and all("q_proj" in name or "connector.linear_1" in name for name in adapted)
    for name in whole:
        torch.testing.assert_close(whole[name], stands[name], atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="leave `head_rows`"):
        train_on_codes("never", 1, "base", adapter="whole", head_rows="codes")


def test_whole_weights_begin_with_an_adapter_merged_and_end_as_one(train_on_codes, tmp_path):
    base = weights_in(train_on_codes("base", 1))
    lora = {"r": 2, "target_modules": "all-linear", "exclude_modules": ".*vq_model.*|lm_head"}
    merged = weights_in(train_on_codes("adapted", 3, decoder="base", lora=lora))
    trained = {"trained": [r"model\.(language_model\.layers\.\d+|connector)\..*(proj|linear_.)\.weight"]}
    stands = train_on_codes("stands", 1, "base", {"learning_rate": 0.0}, "adapted", thinks=True, **trained)
    for name, own in weights_in(stands).items():
        torch.testing.assert_close(own, merged[name], atol=1e-6, rtol=1e-5)
    assert not (stands / "adapter").exists()
    moved = weights_in(train_on_codes("moved", 3, "base", adapter="adapted", **trained))
    changed = {name for name in base if not torch.equal(base[name], moved[name])}
    assert changed and all(re.fullmatch(trained["trained"][0], name) for name in changed)

    def cut(name, rank, start="moved"):
        start = {"decoder": str(tmp_path / "base" / "final"), "trained": str(tmp_path / start / "final")}
        stage_args = {"lora": {**lora, "r": rank, "lora_alpha": 3 * rank}}
        run_recipe(Recipe(stage="adapter", output_dir=str(tmp_path / name), init_from=start, stage_args=stage_args))
        decoder = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "base" / "final")
        return PeftModel.from_pretrained(decoder, tmp_path / name / "adapter").merge_and_unload().state_dict()

    # At rank 2 what was learned at rank 2 comes out whole; what whole weights learned wants every rank, and of fewer
    # each brings it nearer.
    two = cut("two", 2, "stands")
    for name, own in merged.items():
        torch.testing.assert_close(two[name], own, atol=1e-5, rtol=1e-4)
    left = [
        sum(float((own[name] - moved[name]).square().sum()) for name in moved)
        for own in (base, cut("one", 1), cut("some", 16), cut("all", 512))
    ]
    assert left == sorted(left, reverse=True) and left[0] > 10 * left[2] > 0 and left[3] < 1e-6 * left[0]
    assert GenerationConfig.from_pretrained(tmp_path / "two" / "adapter").enable_thinking is True
    assert not hasattr(GenerationConfig.from_pretrained(tmp_path / "all" / "adapter"), "enable_thinking")


def test_what_an_adapter_cannot_hold_is_told_or_refused(train_on_codes, tmp_path, caplog):
    train_on_codes("base", 1)
    train_on_codes("other", 2, decoder="base")

    def cut(**lora):
        start = {"decoder": str(tmp_path / "base" / "final"), "trained": str(tmp_path / "other" / "final")}
        run_recipe(Recipe("adapter", str(tmp_path / "cut"), init_from=start, stage_args={"lora": lora} if lora else {}))

    cut(target_modules=["q_proj"])
    assert "no layers of the adapter" in caplog.text and "norm" in caplog.text
    with pytest.raises(ValueError, match=r"needs \['stage_args.lora.target_modules'\]"):
        cut()
    with pytest.raises(ValueError, match="embed_tokens', which is no linear layer"):
        cut(target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"leave \['use_dora'\] of `lora` out"):
        cut(target_modules=["q_proj"], use_dora=True)
    shutil.copytree(nextflow_hf.MINI, tmp_path / "other" / "final", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="different shapes"):
        cut(target_modules=["q_proj"])


def test_inverted_tasks_ask_for_the_words(train_on_codes, tmp_path, tokenizer):
    folder = train_on_codes("short", 1)
    builder = SequenceBuilder(tokenizer, NextFlowForConditionalGeneration.from_pretrained(folder / "final").config)
    documents = CodedDocuments(tmp_path / "codes" / "draw")
    straight, mixed, inverted = (
        MixedSequences([documents], [1], builder, length=200, prompt_dropout=0.0, task_inversion=share)
        for share in (0.0, 0.25, 1.0)
    )
    learned = [
        sum(any(label >= 0 for label in item["image_labels"][0]) for item in items)
        for items in (straight, mixed, inverted)
    ]
    assert learned[0] == 200 and 130 < learned[1] < 170 and learned[2] == 0
    item = inverted[3]
    words = tokenizer.decode([label for label in item["labels"] if label >= 0])
    name, messages, images = documents[inverted.place_of(3)[1]]
    assert item["id"] == name and words.removesuffix("<|im_end|>") in messages[0]["content"][0]["text"]
    assert item["codes"][0] == images[0].input_codes


def test_a_chain_runs_what_has_not_run(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setitem(STAGES, "teacher", lambda recipe: (ran.append(recipe.output_dir), make(recipe.output_dir)))

    def make(folder):
        (tmp_path / folder / "final").mkdir(parents=True)

    monkeypatch.chdir(tmp_path)
    for name in "ab":
        start = 'init_from: {tokenizer: mini}\nsource: {class: "dots:Dots"}'
        (tmp_path / f"{name}.yaml").write_text(f"stage: teacher\noutput_dir: runs/{name}\ntrainer:\n{start}\n")
    chain = Recipe(stage="chain", output_dir="runs", stage_args={"recipes": ["a.yaml", "b.yaml"]})
    make("runs/a")
    run_recipe(chain)
    assert ran == ["runs/b"]
    (tmp_path / "runs" / "manifest.json").write_text("{}")
    assert stages.is_done(Recipe("rejection", "runs")) and not stages.is_done(Recipe("grpo", "runs"))
    with pytest.raises(ValueError, match="no recipe"):
        run_recipe(Recipe(stage="chain", output_dir="runs", stage_args={"recipes": ["a.yaml", "c.yaml"]}))


def test_pictures_of_several_sizes_weigh_as_in_one_batch(tmp_path):
    """The step's loss is the mean over pictures, whatever their sizes."""
    images = [
        np.full((32, 32, 3), 10, np.uint8),
        np.full((32, 64, 3), 20, np.uint8),
        np.full((32, 32, 3), 30, np.uint8),
    ]
    square, wide = by_size(images)
    assert square.shape == (2, 3, 32, 32) and wide.shape == (1, 3, 32, 64)
    model = small_model().vq_model.eval()
    with torch.no_grad():
        outputs = [model(pixels, semantic_targets=model.semantic_features(pixels)) for pixels in (square, wide)]
    joined = _mean_losses(outputs, [2, 1])
    torch.testing.assert_close(joined.pixel_loss, (2 * outputs[0].pixel_loss + outputs[1].pixel_loss) / 3)
