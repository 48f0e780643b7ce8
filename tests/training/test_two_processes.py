"""Two processes on a CPU (gloo) train as one does."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from small_models import small_model

SCRIPT = """
import sys
import torch
sys.path[:0] = {path!r}
torch.set_num_threads(1)
from nextflow_hf.training.processes import all_processes
from nextflow_hf.training.recipe import Recipe
from nextflow_hf.training.stages import run_recipe

folder, batch = sys.argv[1], int(sys.argv[2])
assert all_processes().num_processes == 4 // batch
run_recipe(Recipe(
    stage="decoder",
    output_dir=folder,
    init_from={{"vq": "vq", "tokenizer": "tokenizer"}},
    source={{"class": "dots:Dots"}},
    config={{"text.num_hidden_layers": 1}},
    stage_args={{"codes": folder + "/codes.safetensors", "read_share": 0.0, "prompt_dropout": 0.0}},
    trainer={{
        "max_steps": 4, "per_device_train_batch_size": batch, "logging_steps": 1, "save_steps": 2,
        "learning_rate": 1e-3, "disable_tqdm": True,
    }},
))
"""


def test_two_processes_give_the_losses_and_weights_of_one(tmp_path, tokenizer):
    small_model().vq_model.save_pretrained(tmp_path / "vq")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    here = Path(__file__).parent
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(path=[str(here), str(here.parent)]))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    losses, weights = [], []
    for name, prefix, batch in (("one", [], 4), ("two", launch, 2)):
        command = [sys.executable, *prefix, str(script), name, str(batch)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses.append(torch.tensor([entry["loss"] for entry in log if "loss" in entry]))
        weights.append(load_file(tmp_path / name / "final" / "model.safetensors"))
        assert (tmp_path / name / "checkpoint-4" / "ema.safetensors").is_file()
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-5)
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=1e-4)
