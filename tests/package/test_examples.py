"""The scripts of `examples/` as their readers run them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

import nextflow_hf
from nextflow_hf.inference import load

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def pictures(tmp_path):
    """A folder as `datasets` calls an imagefolder."""
    folder = tmp_path / "my pictures"
    folder.mkdir()
    source = nextflow_hf.scenes.SceneSource((100, 90), 4, seed=5)
    lines = []
    for index in range(len(source)):
        Image.fromarray(source.image(index)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"my own picture number {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run_example(tmp_path, *arguments, script="finetune_pictures.py"):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("lora", [[], ["--lora", "4"]], ids=["full", "lora"])
def test_finetune_pictures(tmp_path, pictures, lora):
    arguments = ["--pictures", pictures, "--output", tmp_path / "out", "--steps", "3", "--batch-size", "2"]
    done = run_example(tmp_path, *arguments, "--captions", "--prompt", "my own picture number 1", *lora)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out" / "drawn-0.png").size == (64, 64)
    assert (tmp_path / "out" / "adapter").is_dir() == bool(lora)
    tuned, _ = load(str(tmp_path / "out" / "final"))
    start, _ = load("mini")
    assert tuned.vq_model.fingerprint() == start.vq_model.fingerprint()
    # How it draws is carried over from where it started.
    assert tuned.generation_config.image_temperature == start.generation_config.image_temperature
    moved = [
        name
        for (name, own), (_, before) in zip(tuned.named_parameters(), start.named_parameters(), strict=True)
        if not own.equal(before)
    ]
    assert moved and not any("vq_model" in name for name in moved)
    if lora:
        assert all(name.endswith(("_proj.weight", "linear_1.weight", "linear_2.weight")) for name in moved)


def test_finetune_pictures_refuses_a_folder_without_captions(tmp_path, pictures):
    (pictures / "metadata.jsonl").unlink()
    done = run_example(tmp_path, "--pictures", pictures, "--output", tmp_path / "out", "--steps", "3")
    assert (
        done.returncode != 0
        and "need the columns ['text']" in done.stderr
        and not (tmp_path / "out" / "final").exists()
    )


@pytest.mark.parametrize("lora", [[], ["--use_peft", "--lora_r", "4"]], ids=["full", "lora"])
def test_grpo_scenes(tmp_path, lora):
    settings = "--max_steps 2 --prefix_scales 2 --suffix_temperature 0 --num_generations 2 --logging_steps 1"
    settings += " --per_device_train_batch_size 4 --gradient_checkpointing false --per_category 1 --report_to none"
    done = run_example(tmp_path, "--output_dir", tmp_path / "out", *settings.split(), *lora, script="grpo_scenes.py")
    assert done.returncode == 0, done.stderr
    assert "'reward'" in done.stdout
    if lora:
        trained = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert trained and not any("vq_model" in name for name in trained)
        return
    tuned, _ = load(str(tmp_path / "out"))
    assert tuned.config.abilities == load("mini")[0].config.abilities
