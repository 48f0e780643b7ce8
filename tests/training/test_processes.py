"""Whole processes: two on a CPU (gloo) train as one does, and one that is killed goes on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import small_model
from transformers.integrations.deepspeed import is_deepspeed_available

from nextflow_hf.modeling.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration

SCRIPT = """
import json
import sys
import torch
sys.path[:0] = {path!r}
torch.set_num_threads(1)
from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration
from nextflow_hf.training.processes import all_processes
from nextflow_hf.training.recipe import Recipe
from nextflow_hf.training.stages import run_recipe

folder, batch, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
extra, trainer = json.loads(sys.argv[4]), json.loads(sys.argv[5])
assert all_processes().num_processes == 4 // batch

forward = NextFlowForConditionalGeneration.forward


def spoiled(*args, **kwargs):
    # A finite loss with an infinite derivative.
    output = forward(*args, **kwargs)
    output.loss = output.loss + (output.loss - output.loss.detach()).abs().sqrt()
    return output


if extra.pop("spoiled", False):
    NextFlowForConditionalGeneration.forward = spoiled
run_recipe(Recipe(
    stage="decoder",
    output_dir=folder,
    init_from={{"vq": "vq", "tokenizer": "tokenizer", "decoder": "decoder"}},
    source={{"class": "dots:Dots"}},
    stage_args={{"codes": folder + "/codes.safetensors", "read_share": 0.0, "prompt_dropout": 0.0, **extra}},
    trainer={{
        "max_steps": steps, "per_device_train_batch_size": batch, "logging_steps": 1, "save_steps": 2,
        "learning_rate": 1e-3, "disable_tqdm": True, **trainer,
    }},
))
"""


@pytest.fixture
def start(tmp_path, tokenizer):
    """Starts a run by one process or two."""
    vq_model = small_model().vq_model
    model = NextFlowForConditionalGeneration(NextFlowConfig.from_preset("nextflow-mini", vq_config=vq_model.config))
    model.set_vq_model(vq_model)
    model.config.codebook_fingerprint = model.vq_model.fingerprint()
    model.save_pretrained(tmp_path / "decoder")
    model.vq_model.save_pretrained(tmp_path / "vq")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    here = Path(__file__).parent
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(path=[str(here), str(here.parent)]))

    def start(name, processes=1, steps=4, trainer=(), **extra):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launch if processes > 1 else []), str(script), name, str(4 // processes)]
        command += [str(steps), json.dumps(extra), json.dumps(dict(trainer))]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    return start


@pytest.fixture
def run(start, tmp_path):
    """Runs to the end: losses, and the result."""

    def run(name, **arguments):
        process = start(name, **arguments)
        # The first run with DeepSpeed compiles its communication, where there is a compiler.
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses = torch.tensor([entry["loss"] for entry in log if "loss" in entry])
        return losses, NextFlowForConditionalGeneration.from_pretrained(tmp_path / name / "final")

    return run


needs_deepspeed = pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed")


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"fsdp_size": 2},
        {"fsdp_size": 2, "trainer": {"torch_compile_backend": "aot_eager"}},
        pytest.param({"trainer": {"deepspeed": "zero2"}}, marks=needs_deepspeed),
        pytest.param({"trainer": {"deepspeed": "zero3"}}, marks=needs_deepspeed),
    ],
    ids=["data_parallel", "fsdp2", "fsdp2_compiled", "zero2", "zero3"],
)
def test_two_processes_give_the_losses_and_weights_of_one(run, tmp_path, extra):
    losses, model = run("one")
    losses_of_two, model_of_two = run("two", processes=2, **extra)
    torch.testing.assert_close(losses_of_two, losses, atol=1e-4, rtol=1e-5)
    weights, weights_of_two = model.state_dict(), model_of_two.state_dict()
    assert weights.keys() == weights_of_two.keys()
    for name in weights:
        torch.testing.assert_close(weights_of_two[name], weights[name], atol=1e-4, rtol=1e-4)
    code_of_one, code_of_two = (
        {own.name for own in (tmp_path / name / "final").glob("*.py")} for name in ("one", "two")
    )
    assert code_of_one == code_of_two
    average = load_file(tmp_path / "two" / "checkpoint-4" / "ema.safetensors")
    for name, own in load_file(tmp_path / "one" / "checkpoint-4" / "ema.safetensors").items():
        torch.testing.assert_close(average[name], own, atol=1e-4, rtol=1e-4)


@needs_deepspeed
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_a_gradient_that_is_not_finite_stops_a_run_with_deepspeed(start, tmp_path, config):
    process = start("two", processes=2, spoiled=True, trainer={"deepspeed": config})
    _, errors = process.communicate(timeout=300)
    assert process.returncode and "NonFiniteError: The gradient of step 1 has the norm inf" in errors
    assert json.loads((tmp_path / "two" / "nonfinite.json").read_text())["step"] == 1


@needs_deepspeed
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_a_run_with_deepspeed_goes_on_from_its_checkpoint(run, tmp_path, config):
    trainer = {"deepspeed": config, "lr_scheduler_type": "constant"}
    _, whole = run("whole", processes=2, trainer=trainer)
    run("parted", processes=2, steps=2, trainer=trainer)
    shutil.rmtree(tmp_path / "parted" / "final")
    _, parted = run("parted", processes=2, trainer=trainer)
    for (name, one), (_, other) in zip(whole.state_dict().items(), parted.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    "sharded",
    [{"fsdp_size": 2}, pytest.param({"trainer": {"deepspeed": "zero3"}}, marks=needs_deepspeed)],
    ids=["fsdp2", "zero3"],
)
def test_samples_with_weights_that_are_spread_are_refused_before_the_first_step(start, tmp_path, sharded):
    process = start("two", processes=2, sample_every=1, sample_prompts=["dot 1"], **sharded)
    _, errors = process.communicate(timeout=300)
    assert process.returncode and "Leave `sample_every` out" in errors
    assert not list((tmp_path / "two").glob("checkpoint-*"))


def test_a_run_killed_five_times_ends_with_the_same_weights(start, run, tmp_path):
    _, whole = run("whole", steps=20)
    rng = random.Random(0)
    for reached in (2, 4, 10, 14, 18):
        process = start("killed", steps=20)
        deadline = time.monotonic() + 60
        # At some instant of the steps that follow, or of writing the next checkpoint.
        while not (tmp_path / "killed" / f"checkpoint-{reached}").is_dir() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None, process.stderr.read()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "killed" / "final").exists()
    _, resumed = run("killed", steps=20)
    for (name, one), (_, other) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


VQ_SCRIPT = """
import sys
import torch
sys.path[:0] = {path!r}
torch.set_num_threads(1)
from nextflow_hf.modeling.modeling_nextflow_vq import NextFlowVQModel
from nextflow_hf.training import train_vq
from nextflow_hf.training.processes import all_processes
from nextflow_hf.training.recipe import Recipe
from nextflow_hf.training.stages import run_recipe

agreed = []


class Agreement(train_vq.CodebookCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model)
        from accelerate.utils import gather

        for own in (model.codebook.pixel.weight, model.codebook.usage, model.pixel_decoder.conv_in.weight):
            first, second = gather(own.detach()[None]).unbind()
            agreed.append(torch.equal(first, second))


train_vq.CodebookCallback = Agreement
mixed = {{
    "class": "nextflow_hf.training.data:MixedSource",
    "sources": [{{"class": "dots:Dots"}}, {{"class": "dots:Dots", "size": 64, "weight": 0.2}}],
    "num_pictures": 300,
}}
run_recipe(Recipe(
    stage="vq",
    output_dir="run",
    init_from={{"vq": "vq", "teacher": "teacher"}},
    config={{"vq.dead_code_threshold": 0.5}},
    source=mixed,
    stage_args={{"phase": "joint"}},
    trainer={{"max_steps": 6, "per_device_train_batch_size": 3, "learning_rate": 1e-3, "disable_tqdm": True}},
))
assert len(agreed) == 18 and all(agreed), agreed
NextFlowVQModel.from_pretrained("run/final")
"""


def test_the_tokenizers_of_two_processes_with_pictures_of_other_sizes_stay_one(tmp_path):
    """Neither waits for the other where it has more sizes in a step, and dead codes move alike in both."""
    vq_model = small_model().vq_model
    vq_model.save_pretrained(tmp_path / "vq")
    vq_model.semantic_encoder.save_pretrained(tmp_path / "teacher")
    here = Path(__file__).parent
    script = tmp_path / "train.py"
    script.write_text(VQ_SCRIPT.format(path=[str(here), str(here.parent)]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(launch, cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
