"""`nextflow-hf convert`: published files as checkpoints of ours."""

import argparse
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from qwen_models import tiny_qwen
from safetensors.torch import load_file, save_file
from small_models import small_config
from tokenflow_models import TINY_LM, TINY_PAD, TINY_TOKENIZER, golden, tiny_t2i, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    pipeline,
)

from nextflow_hf import NextFlowConfig, NextFlowForConditionalGeneration, NextFlowVQModel, convert, weight_files
from nextflow_hf.cli import main
from nextflow_hf.modeling import convert_tokenflow
from nextflow_hf.modeling.convert_qwen2_5_vl import start_config
from nextflow_hf.weight_files import WeightFiles, whole_folder, write_shards


@pytest.fixture(autouse=True)
def _tiny_variant(monkeypatch):
    monkeypatch.setitem(convert_tokenflow.TOKENIZERS, "clipb_256", TINY_TOKENIZER)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """TokenFlow's tokenizer and model as they are published, but tiny."""
    folder = tmp_path_factory.mktemp("published")
    weights, _ = golden("tokenflow_tokenizer")
    weights["quantize.codebook_used"] = torch.zeros(131072)
    # Trainers save more than weights.
    others = {"optimizer": {"state": {}}, "args": argparse.Namespace(lr=1e-4), "best": np.float64(0.5)}
    torch.save({"ema": weights, "model": {}, "steps": np.int64(7), **others}, folder / "tokenizer.pt")
    t2i = folder / "t2i"
    t2i.mkdir()
    weights, _ = golden("tokenflow_t2i")
    names = sorted(weights)
    index = {}
    for number, part in enumerate((names[:10], names[10:])):
        save_file({name: weights[name] for name in part}, t2i / f"model-{number}.safetensors")
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
    (t2i / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (t2i / "config.json").write_text(json.dumps({"model_type": "llava_llama", **TINY_LM}))
    llama_like_tokenizer().save_pretrained(t2i)
    return folder


def llama_like_tokenizer(codes: int = 128) -> PreTrainedTokenizerFast:
    """Words up to id 63, [PAD], and a token for every code; <img> is three plain tokens."""
    words = ["a", "red", "blue", "circle", "square", *(f"word{number}" for number in range(52))]
    vocabulary = ["<unk>", "<s>", "</s>", *words, "<", "img", ">", "/"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"pad_token": "[PAD]"})
    fast.add_tokens([f"<vq_token_{code}>" for code in range(codes)])
    return fast


def contents(folder) -> set[str]:
    return {own.name for own in folder.iterdir()} if folder.exists() else set()


# ---- TokenFlow -------------------------------------------------------------------------------------------------------


def test_tokenizer_is_converted_from_the_published_kind_of_file(published, tmp_path, capsys):
    source, target = str(published / "tokenizer.pt"), tmp_path / "tokenizer"
    assert main(["convert", "tokenflow-tokenizer", source, str(target), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "1 weights quantize.codebook_used* are left out: a log of training." in said and "NextFlowVQModel" in said
    assert contents(tmp_path) == set()
    assert main(["convert", "tokenflow-tokenizer", source, str(target)]) == 0
    converted, direct = NextFlowVQModel.from_pretrained(target), tiny_tokenizer()
    for name, own in direct.state_dict().items():
        assert torch.equal(converted.state_dict()[name], own), name
    assert "MIT" in (target / "README.md").read_text()
    assert contents(tmp_path) == {"tokenizer"}
    assert main(["convert", "tokenflow-tokenizer", source, str(target)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_text_to_image_model_is_converted_and_draws_through_the_pipeline(published, tmp_path):
    target = tmp_path / "t2i"
    arguments = ["convert", "tokenflow-t2i", str(published / "t2i"), str(target)]
    assert main([*arguments, "--tokenizer", str(published / "tokenizer.pt")]) == 0
    model = AutoModelForMultimodalLM.from_pretrained(target).eval()
    direct = tiny_t2i()
    for name, own in direct.state_dict().items():
        assert torch.equal(model.state_dict()[name], own), name
    assert model.config.code_start_id == 65 and model.config.image_start_ids == [60, 61, 62]
    assert model.generation_config.image_guidance_scale == 7.5

    model.config.prompt_length = 12
    processor = AutoProcessor.from_pretrained(target)
    inputs = processor(["a red circle", "a square"])
    assert inputs["input_ids"].tolist() == [[1, 3, 4, 6, 60, 61, 62], [TINY_PAD, 1, 3, 7, 60, 61, 62]]
    drawn = model.generate(**inputs, seed=3)
    draw = pipeline("text-to-image", model=model, processor=processor)
    picture = draw("a red circle", seed=3)
    assert picture.size == (256, 256)
    levels = [np.asarray(own).astype(int) for own in (picture, processor.post_process_multimodal_output(drawn)[0])]
    assert abs(levels[0] - levels[1]).max() <= 1
    away = draw("a red circle", negative_prompt="blue", seed=3)
    assert away.tobytes() != picture.tobytes()
    with pytest.raises(ValueError, match="takes 128"):
        processor("a " * 200)
    with pytest.raises(ValueError, match="one user's turn"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image", "image": picture}]}])


def test_published_weights_in_bfloat16_stay_so_and_codes_do_not(published, tmp_path):
    source, target = tmp_path / "source", tmp_path / "t2i"
    shutil.copytree(published / "t2i", source)
    for file in source.glob("*.safetensors"):
        save_file({name: own.bfloat16() for name, own in load_file(file).items()}, file)
    tokenizer = str(published / "tokenizer.pt")
    assert main(["convert", "tokenflow-t2i", str(source), str(target), "--tokenizer", tokenizer]) == 0
    model = AutoModelForMultimodalLM.from_pretrained(target).eval()
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.vq_model.codebook.semantic.weight.dtype == torch.float32
    assert model.vq_model.fingerprint() == tiny_tokenizer().fingerprint()
    output = model.generate(**AutoProcessor.from_pretrained(target)("a red circle"), seed=3, resampling=[{"top_k": 1}])
    assert output.images[0].shape == (3, 256, 256) and torch.isfinite(output.images[0]).all()


def test_converted_model_draws_from_the_command_line(published, tmp_path):
    target = tmp_path / "t2i"
    tokenizer = str(published / "tokenizer.pt")
    assert main(["convert", "tokenflow-t2i", str(published / "t2i"), str(target), "--tokenizer", tokenizer]) == 0
    arguments = ["--checkpoint", str(target), "--output", str(tmp_path / "pictures"), "--negative-prompt", "blue"]
    # The tiny model's learned positions end where its own prompts do, so this is about the way there.
    assert main(["generate", "a red circle", *arguments, "--top-k", "1"]) == 0
    assert contents(tmp_path / "pictures") == {"0000.png"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": 100}, "side by side for the 128 codes"),
        ({"config": {"rope_scaling": {"type": "linear", "factor": 2}}}, "scales its rotary positions"),
        ({"config": {"num_attention_heads": None}}, "num_attention_heads"),
        ({"drop": "model.lvl_embed.weight"}, "1 weights are missing: model.lvl_embed.weight"),
        ({"add": "model.other.weight"}, "1 weights are not known: model.other.weight"),
        ({"reshape": "model.norm.weight"}, "1 weights have another shape: model.norm.weight"),
        ({"lose": True}, "names \\['model-1.safetensors'\\], which are not in"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(published, tmp_path, capsys, change, message):
    source = tmp_path / "source"
    shutil.copytree(published / "t2i", source)
    weights, _ = golden("tokenflow_t2i")
    if "tokenizer" in change:
        llama_like_tokenizer(change["tokenizer"]).save_pretrained(source)
    if "config" in change:
        own = {"model_type": "llava_llama", **TINY_LM, **change["config"]}
        own = {name: value for name, value in own.items() if value is not None}
        (source / "config.json").write_text(json.dumps(own))
    if {"drop", "add", "reshape"} & set(change):
        weights.pop(change.get("drop"), None)
        if "add" in change:
            weights[change["add"]] = torch.zeros(3)
        if "reshape" in change:
            weights[change["reshape"]] = torch.zeros(3)
        for file in source.glob("model*"):
            file.unlink()
        save_file(weights, source / "model.safetensors")
    if "lose" in change:
        (source / "model-1.safetensors").unlink()
    target = str(tmp_path / "target")
    tokenizer = str(published / "tokenizer.pt")
    assert main(["convert", "tokenflow-t2i", str(source), target, "--tokenizer", tokenizer]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert contents(tmp_path) == {"source"}


class Malice:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def test_broken_and_hostile_files_are_refused(published, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (published / "tokenizer.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"model": {"weight": Malice()}}))
    torch.save({"model": Malice()}, tmp_path / "code2.pt")
    (tmp_path / "short.safetensors").write_bytes(
        (published / "t2i" / "model-0.safetensors").read_bytes()[:-1000],
    )
    (tmp_path / "text.pt").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "rubbish.pt").write_bytes(whole[:4000] + bytes(2000) + whole[6000:])
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model.safetensors.index.json").write_text("{}")
    before = contents(tmp_path)
    for name, message in (
        ("short.pt", "cut off"),
        ("code.pt", "holds more than tensors"),
        ("code2.pt", "system, which could run code"),
        ("short.safetensors", "cut off"),
        ("text.pt", "no file of weights: it begins with b'not weights'"),
        ("pointer.pt", "a Git LFS pointer"),
        ("rubbish.pt", "is cut off, no file of weights"),
        ("index", "no `weight_map`"),
        ("list.pt", "no weights by name"),
        ("absent.pt", "no file or folder"),
        ("owner/name", "could not be downloaded"),
    ):
        assert main(["convert", "tokenflow-tokenizer", name, "target"]) == 2
        said = capsys.readouterr().err
        assert message in said, (name, said)
    assert contents(tmp_path) == before
    assert main(["convert", "tokenflow-tokenizer", "a/b", "target", "--variant", "clipb_224"]) == 2
    assert "No file of clipb_224 was published" in capsys.readouterr().err
    source = str(published / "tokenizer.pt")
    assert main(["convert", "tokenflow-tokenizer", source, "target", "--variant", "siglip_384"]) == 2
    assert "its weights are those of clipb_256" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(published, tmp_path, capsys, monkeypatch):
    arguments = ["convert", "tokenflow-tokenizer", str(published / "tokenizer.pt"), str(tmp_path / "target")]
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(weight_files.shutil, "disk_usage", lambda path: usage)
        assert main(arguments) == 2
    assert "are free in" in capsys.readouterr().err and contents(tmp_path) == set()

    written = []

    def save(tensors, path, metadata):
        if written:
            raise OSError(28, "No space left on device")
        written.append(save_file(tensors, path, metadata=metadata))

    monkeypatch.setattr(weight_files, "save_file", save)
    monkeypatch.setattr(weight_files.write_shards, "__defaults__", (200_000,))
    assert main(arguments) == 2
    assert written and "No space left" in capsys.readouterr().err
    assert contents(tmp_path) == set()


def test_the_text_tokenizer_may_be_as_llama_s(published, tmp_path, capsys, monkeypatch):
    """The published folder has a `tokenizer.model`, which no other test reads."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    source = tmp_path / "source"
    shutil.copytree(published / "t2i", source)
    (source / "tokenizer.json").unlink()
    text = iter(["a red circle and a blue square", "<img> </img>", "a lighthouse at dusk"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text,
        model_prefix=str(source / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    tokens = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "[PAD]": 300,
        **{f"<vq_token_{code}>": 301 + code for code in range(128)},
    }
    added = {str(index): {"content": token, "special": True} for token, index in tokens.items()}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]"}
    own = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "added_tokens_decoder": added, **names}
    (source / "tokenizer_config.json").write_text(json.dumps(own))
    weights, _ = golden("tokenflow_t2i")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.nn.functional.pad(weights[name], (0, 0, 0, 429 - 193))
    for file in source.glob("model*"):
        file.unlink()
    save_file(weights, source / "model.safetensors")
    arguments = ["convert", "tokenflow-t2i", str(source), str(tmp_path / "t2i")]
    arguments += ["--tokenizer", str(published / "tokenizer.pt")]
    with monkeypatch.context() as patch:
        patch.setattr(convert, "_is_installed", lambda name: name != "sentencepiece")
        assert main(arguments) == 2
    assert "nextflow-hf[convert]" in capsys.readouterr().err
    assert main(arguments) == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "t2i")
    opening = processor.tokenizer.convert_ids_to_tokens(processor.image_start_ids)
    assert "".join(opening).replace("▁", "") == "<img>"
    (ids,) = processor("a red circle")["input_ids"].tolist()
    assert ids[0] == 1 and ids[-len(opening) :] == processor.image_start_ids
    assert processor.tokenizer.decode(ids[1 : -len(opening)]).strip() == "a red circle"


# ---- files -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As a signal would."""


def shards_of(tensors, made, until=None):
    def make(skip):
        for number, (name, own) in enumerate(tensors.items()):
            if name not in skip:
                if number == until:
                    raise Killed
                made.append(name)
                yield name, own

    return make


TENSORS = {f"weight{number}": torch.full((100,), float(number)) for number in range(10)}


def test_a_killed_conversion_goes_on_where_it_was(tmp_path):
    target, made = tmp_path / "target", []
    with pytest.raises(Killed), whole_folder(target, "plan", 0) as folder:
        write_shards(folder, shards_of(TENSORS, made, until=7), TENSORS, max_bytes=1000)
    assert not target.exists()
    # Cut off by more than a kill.
    (tmp_path / "target.unfinished" / "model-00002.safetensors").write_bytes(b"cut off")
    made.clear()
    with whole_folder(target, "plan", 0) as folder:
        write_shards(folder, shards_of(TENSORS, made), TENSORS, max_bytes=1000)
    assert made == [f"weight{number}" for number in (*range(2, 4), *range(6, 10))]
    files = WeightFiles(target)
    assert set(files.shapes()) == set(TENSORS)
    assert all(torch.equal(files.load(name), own) for name, own in TENSORS.items())
    assert contents(tmp_path) == {"target"}
    assert contents(target) == {
        "model.safetensors.index.json",
        *(f"model-0000{own}.safetensors" for own in range(1, 6)),
    }


@pytest.mark.parametrize("step", ["replace", "unlink"])
def test_a_kill_at_the_end_loses_nothing(tmp_path, monkeypatch, step):
    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        if step == "replace":
            real = os.replace
            patch.setattr(
                weight_files.os, "replace", lambda a, b: real(a, b) if Path(b) != target else raise_(Killed())
            )
        else:
            real = Path.unlink
            patch.setattr(
                Path,
                "unlink",
                lambda self, missing_ok=False: raise_(Killed()) if self.name == "plan.txt" else real(self, missing_ok),
            )
        with pytest.raises(Killed), whole_folder(target, "plan", 0) as folder:
            (folder / "weights").write_bytes(b"weights")
    if step == "replace":
        assert contents(tmp_path) == {"target.unfinished"}
        with whole_folder(target, "plan", 0) as folder:
            assert contents(folder) == {"plan.txt", "weights"}
    assert (target / "weights").read_bytes() == b"weights" and contents(tmp_path) == {"target"}


def raise_(error):
    raise error


def test_another_plan_begins_anew_and_what_is_no_conversion_s_is_left_alone(tmp_path):
    unfinished = tmp_path / "target.unfinished"
    unfinished.mkdir()
    (unfinished / "model-00001.safetensors").write_bytes(b"old")
    with pytest.raises(ValueError, match="in the way"), whole_folder(tmp_path / "target", "plan", 0):
        pass
    assert contents(unfinished) == {"model-00001.safetensors"}
    (unfinished / "plan.txt").write_text("another")
    with whole_folder(tmp_path / "target", "plan", 0) as folder:
        assert contents(folder) == {"plan.txt"}


def test_a_plan_is_of_these_very_files(published, image_tokenizer, tmp_path):
    """What a resumed conversion goes by: other content under the same name is another plan."""
    source = tmp_path / "qwen"
    tiny_qwen(source)
    before = convert.plan_qwen2_5_vl(str(source), str(image_tokenizer))
    assert convert.plan_qwen2_5_vl(str(source), str(image_tokenizer)).sources == before.sources
    assert convert.plan_qwen2_5_vl(str(source), str(image_tokenizer), seed=1).sources != before.sources
    other = tmp_path / "vq"
    NextFlowVQModel(small_config().vq_config).save_pretrained(other)
    assert convert.plan_qwen2_5_vl(str(source), str(other)).sources != before.sources
    file = next(source.glob("*.safetensors"))
    os.utime(file, ns=(0, 0))
    assert convert.plan_qwen2_5_vl(str(source), str(image_tokenizer)).sources != before.sources


# ---- Qwen2.5-VL ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq")
    torch.manual_seed(1)
    NextFlowVQModel(small_config().vq_config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_qwen_keeps_its_language_model(tmp_path, image_tokenizer, tied):
    source, target = tmp_path / "qwen", tmp_path / "start"
    qwen = tiny_qwen(source, tied)
    assert len(list(source.glob("*.safetensors"))) > 1
    arguments = ["convert", "qwen2.5-vl", str(source), str(target), "--tokenizer", str(image_tokenizer)]
    assert main(arguments) == 0
    model = NextFlowForConditionalGeneration.from_pretrained(target).eval()
    ids = torch.randint(10, 290, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        ours, theirs = model(ids, attention_mask=mask).logits, qwen(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask > 0][:, :300], theirs[mask > 0], atol=1e-5, rtol=0)
    new = model.get_output_embeddings().weight[300:]
    old = qwen.get_output_embeddings().weight
    torch.testing.assert_close(new, old.mean(dim=0).expand(32, -1), atol=1e-6, rtol=0)
    vq_model = NextFlowVQModel.from_pretrained(image_tokenizer)
    assert model.config.codebook_fingerprint == vq_model.fingerprint() == model.vq_model.fingerprint()
    assert model.config.abilities == ["text"]
    with pytest.raises(ValueError, match="not trained for 'image'"):
        model.generate(ids, generation_mode="image")
    again = tmp_path / "again"
    assert main([*arguments[:3], str(again), *arguments[4:]]) == 0
    for file in target.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_a_new_image_tokenizer_begins_with_a_siglip2(tmp_path):
    config = small_config().vq_config
    vision = {**config.vision_config.to_dict(), "vision_use_head": True}
    text = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    siglip = Siglip2Model(Siglip2Config(vision_config=vision, text_config={**text, "num_attention_heads": 2}))
    siglip.save_pretrained(tmp_path / "siglip")
    model = convert.with_semantic_encoder(config, WeightFiles(tmp_path / "siglip"))
    for name, own in model.semantic_encoder.state_dict().items():
        assert torch.equal(own, siglip.vision_model.state_dict()[name]), name


def test_a_start_with_a_new_image_tokenizer(tmp_path):
    """The command without `--tokenizer`, on a SigLIP2 that is tiny but for its patches."""
    tiny_qwen(tmp_path / "qwen")
    vision = {**small_config().vq_config.vision_config.to_dict(), "patch_size": 16}
    text = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    siglip = Siglip2Model(Siglip2Config(vision_config=vision, text_config={**text, "num_attention_heads": 2}))
    siglip.save_pretrained(tmp_path / "siglip")
    target = tmp_path / "start"
    arguments = ["convert", "qwen2.5-vl", str(tmp_path / "qwen"), str(target)]
    assert main([*arguments, "--semantic-encoder", str(tmp_path / "siglip"), "--seed", "4"]) == 0
    model = NextFlowForConditionalGeneration.from_pretrained(target)
    for name, own in model.vq_model.semantic_encoder.state_dict().items():
        assert torch.equal(own, siglip.vision_model.state_dict()[name]), name
    assert model.config.vq_config.codebook_size == 32768 and model.vq_model.fingerprint()
    assert "license: other" in (target / "README.md").read_text()
    assert json.loads((target / "processor_config.json").read_text())["image_processor"]["downsample"] == 16


def test_qwen_in_the_names_of_transformers_classes(tmp_path, image_tokenizer):
    """Fine-tuned copies may be saved so, and tied ones with their head."""
    tiny_qwen(tmp_path / "qwen", tied=True)
    weights = {}
    for file in (tmp_path / "qwen").glob("*.safetensors"):
        for name, own in load_file(file).items():
            own_name = (
                name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}"
            )
            weights[own_name] = own
        file.unlink()
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()
    (tmp_path / "qwen" / "model.safetensors.index.json").unlink()
    save_file(weights, tmp_path / "qwen" / "model.safetensors")
    (tmp_path / "qwen" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    arguments = ["convert", "qwen2.5-vl", str(tmp_path / "qwen"), str(tmp_path / "start")]
    assert main([*arguments, "--tokenizer", str(image_tokenizer)]) == 0
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "start")
    old = weights["model.language_model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight[:300], old)
    assert "license: apache-2.0" in (tmp_path / "start" / "README.md").read_text()


def test_what_cannot_be_a_start_is_refused(tmp_path, image_tokenizer, capsys):
    tiny_qwen(tmp_path / "qwen")
    source, target = str(tmp_path / "qwen"), str(tmp_path / "start")
    both = ["--tokenizer", str(image_tokenizer), "--semantic-encoder", "x/y"]
    for arguments, message in (
        ([source, target, *both], "not both"),
        ([str(image_tokenizer), target, "--tokenizer", str(image_tokenizer)], "not a Qwen2.5-VL"),
        ([source, target, "--tokenizer", source], "not an image tokenizer"),
        ([source, target, "--semantic-encoder", source], "is no SigLIP2"),
    ):
        assert main(["convert", "qwen2.5-vl", *arguments]) == 2
        said = capsys.readouterr().err
        assert any(part in said for part in message.split("|")), said
    assert contents(tmp_path) == {"qwen"}


def test_the_published_7b_configuration_becomes_the_preset(tmp_path):
    """Qwen2.5-VL-7B's config.json is written in the flat way of older versions."""
    published = {
        "model_type": "qwen2_5_vl",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 28,
        "torch_dtype": "bfloat16",
        "vision_config": {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584},
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    source, preset = AutoConfig.from_pretrained(tmp_path), NextFlowConfig()
    own = start_config(
        source.text_config,
        preset.vq_config,
        source.tie_word_embeddings,
        boi_token_id=151652,
        eoi_token_id=151653,
        image_token_id=151655,
    )
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "rms_norm_eps", "vocab_size", "layer_types"):
        assert getattr(own.text_config, name) == getattr(preset.text_config, name), name
    rope = {name: own.text_config.rope_parameters[name] for name in ("rope_theta", "mrope_section", "rope_type")}
    assert rope == {name: preset.text_config.rope_parameters[name] for name in rope}
    assert (own.code_start_id, own.tie_word_embeddings) == (preset.code_start_id, preset.tie_word_embeddings)
    with pytest.raises(ValueError, match="boi_token_id"):
        start_config(source.text_config, preset.vq_config, False, boi_token_id=152064)


def test_a_converted_model_draws_where_the_package_is_not_installed(published, tmp_path):
    target = tmp_path / "t2i"
    tokenizer = str(published / "tokenizer.pt")
    assert main(["convert", "tokenflow-t2i", str(published / "t2i"), str(target), "--tokenizer", tokenizer]) == 0
    settings = "seed=3, guidance_scale=2.0, top_k=1"
    script = textwrap.dedent(
        f"""
        import json, sys, torch
        sys.modules["nextflow_hf"] = None
        from transformers import AutoModelForMultimodalLM, AutoProcessor

        torch.set_num_threads(1)
        model = AutoModelForMultimodalLM.from_pretrained({str(target)!r}, trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained({str(target)!r}, trust_remote_code=True)
        output = model.generate(**processor("a red circle"), {settings})
        print(json.dumps(output.codes[0].tolist()))
        """
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    model, processor = AutoModelForMultimodalLM.from_pretrained(target).eval(), AutoProcessor.from_pretrained(target)
    expected = model.generate(**processor("a red circle"), seed=3, guidance_scale=2.0, top_k=1)
    assert json.loads(run.stdout.strip().splitlines()[-1]) == expected.codes[0].tolist()
