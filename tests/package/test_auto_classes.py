import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import save_small_checkpoint
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

import nextflow_hf


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved random model with its processor, as a user would have it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_small_checkpoint(folder)
    return folder


def draw(model, processor):
    messages = [{"role": "user", "content": [{"type": "text", "text": "a red circle"}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    return model.generate(**inputs, generation_mode="image", image_size=(32, 32), seed=3)


def test_all_auto_classes_load_a_checkpoint(checkpoint):
    assert type(AutoConfig.from_pretrained(checkpoint)) is nextflow_hf.NextFlowConfig
    assert type(AutoModel.from_pretrained(checkpoint)) is nextflow_hf.NextFlowModel
    for auto_class in (AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModelForCausalLM):
        assert type(auto_class.from_pretrained(checkpoint)) is nextflow_hf.NextFlowForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(checkpoint)) is nextflow_hf.NextFlowProcessor
    assert AutoTokenizer.from_pretrained(checkpoint).image_token_id == 5
    assert isinstance(AutoImageProcessor.from_pretrained(checkpoint), nextflow_hf.NextFlowImageProcessorPil)


def test_new_weights_of_a_checkpoints_configuration_are_saved_and_loaded(checkpoint, tmp_path):
    """They are tied to no tokenizer: the configuration's was the checkpoint's."""
    config = AutoConfig.from_pretrained(checkpoint)
    config.codebook_fingerprint = "0123456789abcdef"
    AutoModelForMultimodalLM.from_config(config).save_pretrained(tmp_path)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert loaded.config.codebook_fingerprint is None and config.codebook_fingerprint == "0123456789abcdef"


def test_registering_again_changes_nothing(checkpoint):
    nextflow_hf.register()
    assert type(AutoModel.from_pretrained(checkpoint)) is nextflow_hf.NextFlowModel


def test_the_tokenizer_alone_is_an_auto_model(checkpoint, tmp_path):
    vq_model = AutoModelForMultimodalLM.from_pretrained(checkpoint).vq_model
    vq_model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).fingerprint() == vq_model.fingerprint()


def test_any_to_any_draws_without_torchvision(checkpoint):
    pipe = pipeline("any-to-any", model=str(checkpoint))
    (record,) = pipe(text="a red circle", generation_mode="image", seed=3, image_size=(32, 32))
    expected = draw(pipe.model, pipe.processor)
    (picture,) = pipe.processor.post_process_multimodal_output(expected, generation_mode="image")
    assert record["input_text"] == "a red circle"
    assert np.array_equal(np.asarray(record["generated_image"]), np.asarray(picture))


def test_any_to_any_draws_for_a_chat(checkpoint):
    pipe = pipeline("any-to-any", model=str(checkpoint))
    messages = [{"role": "user", "content": [{"type": "text", "text": "a red circle"}]}]
    record = pipe(messages, generation_mode="image", seed=3, image_size=(32, 32))
    assert (record[0] if isinstance(record, list) else record)["generated_image"].size == (32, 32)


def test_any_to_any_draws_lists_in_batches_and_refuses_what_it_does_not_know(checkpoint):
    pipe = pipeline("any-to-any", model=str(checkpoint))
    drawing = {"generation_mode": "image", "seed": 3, "image_size": (32, 32)}
    prompts = ["a red circle", "two blue stars at the top", "a star"]
    before = Image.new("RGB", (32, 32), "red")

    def pictures(*args, **kwargs):
        records = pipe(*args, **drawing, **kwargs)
        flat = [own for record in records for own in (record if isinstance(record, list) else [record])]
        return [np.asarray(own["generated_image"], int) for own in flat]

    alone = [pictures(prompt)[0] for prompt in prompts]
    # Rounding may move a level.
    assert np.abs(np.stack(pictures(prompts)) - alone).max() <= 1
    batches = pictures([{"text": prompt} for prompt in prompts], batch_size=2)
    assert np.abs(np.stack(batches) - alone).max() <= 1
    edits = [pictures(text=prompt, images=before)[0] for prompt in prompts]
    assert np.abs(np.stack(pictures(text=prompts, images=[before] * 3)) - edits).max() <= 1
    guided = [pictures(prompts[0], guidance_scale=20.0, **own)[0] for own in ({}, {"negative_prompt": "two squares"})]
    assert not np.array_equal(*guided)
    for call, message in (
        (lambda: pictures("a star", num_inference_steps=3), "does not know"),
        (lambda: pictures(text=prompts, images=[before]), "Pictures for 1 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_any_to_any_answers_about_a_picture(checkpoint):
    pipe = pipeline("any-to-any", model=str(checkpoint))
    content = [{"type": "image", "image": Image.new("RGB", (32, 32))}, {"type": "text", "text": "what is it"}]
    out = pipe([{"role": "user", "content": content}], return_full_text=False, max_new_tokens=4)
    assert isinstance(out[0]["generated_text"], str)


def test_any_to_any_says_where_text_and_pictures_in_turn_come_from(checkpoint):
    with pytest.raises(ValueError, match="nextflow_hf.inference.tell"):
        pipeline("any-to-any", model=str(checkpoint))(text="a story", generation_mode="interleaved")


def test_text_to_image(checkpoint):
    pipe = pipeline("text-to-image", model=str(checkpoint))
    one = pipe("a red circle", seed=3, image_size=(32, 32))
    many = pipe(["a red circle", "a star"], seed=3, image_size=(32, 32))
    assert one.size == (32, 32) and len(many) == 2
    assert np.array_equal(np.asarray(one), np.asarray(many[0]))
    # Whatever the batch, and with a seed for each.
    prompts = ["a red circle", "two blue stars at the top", "a star"]
    for seed in (3, np.int64(3), [3, 4, 5]):
        alone = pipe(prompts, seed=seed, image_size=(32, 32))
        together = pipe(prompts, seed=seed, image_size=(32, 32), batch_size=2)
        own = [seed] * 3 if isinstance(seed, (int, np.integer)) else seed
        for prompt, number, *pictures in zip(prompts, own, alone, together):
            expected = np.asarray(pipe(prompt, seed=[number], image_size=(32, 32)))
            assert all(np.array_equal(np.asarray(picture), expected) for picture in pictures)
    away = pipe(prompts, seed=3, image_size=(32, 32), negative_prompt="a square", guidance_scale=2.0)
    batch = pipe(prompts, seed=3, image_size=(32, 32), negative_prompt="a square", guidance_scale=2.0, batch_size=3)
    assert all(np.array_equal(np.asarray(own), np.asarray(other)) for own, other in zip(away, batch))
    with pytest.raises(ValueError, match="2 seeds were given for 3 prompts"):
        pipe(prompts, seed=[1, 2])
    with pytest.raises(ValueError, match="does not know"):
        pipe("a star", num_inference_steps=20)


def test_image_text_to_text(checkpoint):
    pipe = pipeline("image-text-to-text", model=str(checkpoint))
    content = [{"type": "image", "image": Image.new("RGB", (32, 32))}, {"type": "text", "text": "what is it"}]
    out = pipe(text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
    assert isinstance(out[0]["generated_text"], str)


def test_remote_code_draws_the_same_without_the_package(checkpoint, tmp_path):
    """A checkpoint that carries its code, loaded where `nextflow_hf` cannot be imported."""
    folder = tmp_path / "with_code"
    model = AutoModelForMultimodalLM.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    expected = draw(model, processor)
    script = textwrap.dedent(
        f"""
        import importlib.abc, json, sys

        class Blocked(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "nextflow_hf":
                    raise ImportError("nextflow_hf is not installed here")

        sys.meta_path.insert(0, Blocked())
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor
        folder = {str(folder)!r}
        AutoModel.from_pretrained(folder, trust_remote_code=True)
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        messages = [{{"role": "user", "content": [{{"type": "text", "text": "a red circle"}}]}}]
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        out = model.generate(**inputs, generation_mode="image", image_size=(32, 32), seed=3)
        assert "nextflow_hf" not in sys.modules
        print(json.dumps([out.codes[0].tolist(), out.images[0].double().sum().item()]))
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**__import__("os").environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    codes, total = json.loads(run.stdout.strip().splitlines()[-1])
    assert codes == expected.codes[0].tolist()
    assert total == expected.images[0].double().sum().item()


def test_importing_the_package_adds_little_to_torch_and_transformers():
    script = (
        "import sys, nextflow_hf; print('diffusers' in sys.modules, 'datasets' in sys.modules, 'trl' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False", "False"]


def test_modules_that_travel_with_a_checkpoint_import_only_their_siblings():
    root = Path(nextflow_hf.__file__).parent.parent
    names = [path.name for room in ("modeling", "processing") for path in (root / room).glob("*.py")]
    names = [name for name in names if name != "__init__.py"]
    assert len(names) == len(set(names))
    for room in ("modeling", "processing"):
        for path in (root / room).glob("*.py"):
            for line in path.read_text().splitlines():
                assert not line.strip().startswith(
                    ("from ..", "from . import", "from nextflow_hf", "import nextflow_hf")
                )


def test_lora_trains_saves_and_draws(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForMultimodalLM.from_pretrained(checkpoint)
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj", "linear_1", "linear_2"]))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    processor = AutoProcessor.from_pretrained(checkpoint)
    adapted = draw(lora.eval(), processor)
    lora.save_pretrained(tmp_path)
    plain = AutoModelForMultimodalLM.from_pretrained(checkpoint).eval()
    assert not torch.equal(draw(plain, processor).log_probs[0], adapted.log_probs[0])
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.equal(draw(loaded, processor).codes[0], adapted.codes[0])
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(draw(merged, processor).log_probs[0], adapted.log_probs[0], atol=1e-4, rtol=0)
