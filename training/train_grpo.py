"""The reinforcement learning stage: [`NextFlowGRPOTrainer`] from a recipe."""

import importlib
import logging
from functools import partial
from pathlib import Path

import torch

from .data import load_source
from .processes import all_processes
from .recipe import Recipe, note_recipe
from .stage_trainer import (
    FiniteCallback,
    NonFiniteError,
    check_writable,
    checkpoint_bytes,
    leave_out_cudnn_attention,
    report_nonfinite,
    save_whole,
)
from .zero import check_zero, zero_arguments

logger = logging.getLogger(__name__)


def train_grpo(recipe: Recipe) -> None:
    """Let a decoder learn from rewards.

    `init_from`: `decoder`, a whole checkpoint. `source`: a class of rows with `prompt` and whatever the rewards need.
    `trainer`: arguments of [`NextFlowGRPOConfig`]. `stage_args`: `rewards` (each a `function`, "module:name", its
    `weight`, and `args` where it is a class), `region_func` ("module:name"), `lora` (arguments of `peft.LoraConfig`;
    the result has the adapter in `adapter` and is merged in `final`), and `blend`: `final` lies this far on the way
    from the weights of the start (0) to those after training (1, the default), which gives up a part of the reward for
    what was not rewarded (WiSE-FT, arXiv 2109.01903). `dtype` of the weights: float32, in which small steps are not
    lost; below `lora` the checkpoint's own. A run that was killed goes on; a warning says where it was another
    recipe's, or has no step left.

    Raises:
        ImportError: If TRL is not installed.
        ValueError: If there is no reward, one cannot be found, `blend` is not in (0, 1], or weights would be spread.
        NonFiniteError: If a gradient is NaN or infinite, before it can spoil the weights; the ids of the prompts are
            then in `nonfinite.json`.
    """
    try:
        from datasets import Dataset

        from .grpo import NextFlowGRPOConfig, NextFlowGRPOTrainer
    except ImportError as error:
        raise ImportError('Reinforcement learning needs TRL: pip install "nextflow-hf[rl]".') from error
    from transformers import AutoModelForMultimodalLM, AutoProcessor, TrainerState
    from transformers.trainer import TRAINER_STATE_NAME

    stage, output = recipe.stage_args, Path(recipe.output_dir)
    # Before rewards load models: each process takes its own accelerator.
    all_processes()
    arguments = zero_arguments(recipe.trainer)
    if "deepspeed" in arguments:
        # TRL's default on an accelerator, by which DeepSpeed would round the weights; `zero_arguments` has read ours.
        arguments["bf16"] = False
    if isinstance(config := arguments.get("deepspeed"), dict):
        check_zero(config)
        if config.get("zero_optimization", {}).get("stage") == 3:
            raise ValueError('ZeRO-3 spreads the weights that rollouts need whole; name "zero2", or use `lora`.')
    rewards = [load_named(own["function"], own.get("args")) for own in stage.get("rewards", [])]
    if not rewards:
        raise ValueError("`stage_args.rewards` names no reward.")
    blend = stage.get("blend", 1.0)
    if not 0 < blend <= 1:
        raise ValueError(f"`blend` must lie in (0, 1], got {blend}.")
    weights = [float(own.get("weight", 1.0)) for own in stage["rewards"]]
    dtype = stage.get("dtype", "auto" if "lora" in stage else "float32")
    model = AutoModelForMultimodalLM.from_pretrained(recipe.init_from["decoder"], dtype=dtype)
    taken = {"output_dir", "reward_weights"} & set(recipe.trainer)
    if taken:
        raise ValueError(
            f"{sorted(taken)} come from `output_dir` and `stage_args.rewards`; leave them out of `trainer`."
        )
    check_writable(output)
    leave_out_cudnn_attention()
    model.vq_model.requires_grad_(False)
    processor = AutoProcessor.from_pretrained(recipe.init_from["decoder"])
    rows = load_source(recipe.source)
    peft_config = None
    if "lora" in stage:
        from peft import LoraConfig

        peft_config = LoraConfig(**stage["lora"])
    trainer = NextFlowGRPOTrainer(
        model,
        rewards,
        args=NextFlowGRPOConfig(output_dir=str(output), reward_weights=weights, **{"report_to": "none", **arguments}),
        processing_class=processor,
        region_func=load_named(stage["region_func"], None) if "region_func" in stage else None,
        train_dataset=Dataset.from_list([rows[index] for index in range(len(rows))]),
        peft_config=peft_config,
        callbacks=[FiniteCallback()],
    )
    if trainer.is_deepspeed_enabled:
        check_zero(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
    # What is trained is known by now; a checkpoint has Adam's two moments of it.
    check_writable(output, bytes_needed=checkpoint_bytes(trainer.model, copies=2))
    if trainer.is_world_process_zero():
        note_recipe(recipe)
    checkpoint = _last_checkpoint(output)
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)) if checkpoint else None
    was_finished = state is not None and state.global_step >= trainer.args.max_steps > 0
    if was_finished:
        # Killed between its last step and its result; going on would take a step more.
        logger.warning("%s has all of max_steps=%d: nothing is trained.", checkpoint, trainer.args.max_steps)
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = state
    else:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except NonFiniteError as error:
            raise report_nonfinite(output, error, trainer.state.global_step + 1, trainer.rolled_out) from error
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if peft_config is not None:
        save_whole(output / "adapter", trained.save_pretrained)
        trained = trained.merge_and_unload()
    trained.requires_grad_(True)
    if blend < 1:
        start = AutoModelForMultimodalLM.from_pretrained(recipe.init_from["decoder"], dtype=dtype).state_dict()
        with torch.no_grad():
            for name, own in trained.named_parameters():
                own.copy_(torch.lerp(start[name].to(own), own, blend))
    if not (was_finished and (output / TRAINER_STATE_NAME).is_file()):
        trainer.save_state()
    if trainer.is_world_process_zero():
        # A checkpoint's card; the result lies elsewhere, and `blend` may have changed it.
        (output / "README.md").unlink(missing_ok=True)
    save_whole(output / "final", partial(_save, trained, processor))


def _last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; the trainer's state is written last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[-1]))) if whole else None


def _save(model, processor, folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def load_named(name: str, args: dict | None):
    """What "module:name" names; a class is made with `args`.

    Raises:
        ValueError: If there is no such function or class.
    """
    module, _, own = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), own)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"There is no {name!r}; name a function or class as module:name.") from error
    return found(**(args or {})) if isinstance(found, type) else found
