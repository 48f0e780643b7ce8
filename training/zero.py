"""DeepSpeed ZeRO: which configuration a recipe names, and what of it would spoil a run."""

import json
import os
from pathlib import Path

from transformers.integrations.deepspeed import is_deepspeed_available
from transformers.utils import strtobool

CONFIGS = Path(__file__).parent / "launch"


def zero_arguments(arguments: dict) -> dict:
    """`TrainingArguments` of a recipe with `deepspeed` resolved.

    `deepspeed` is the name of a configuration of the package ("zero2", "zero3"), the path of a JSON file, or its
    content. `bf16` becomes DeepSpeed's `torch_autocast`: its own `bf16` would round the weights themselves, and with
    them the frozen image tokenizer and the rotary frequencies.

    Raises:
        ValueError: If there is no such configuration, or no launcher has started the process.
        ImportError: If DeepSpeed is not installed.
    """
    arguments = dict(arguments)
    named = arguments.get("deepspeed")
    if not named and not strtobool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")):
        return arguments
    if not is_deepspeed_available():
        raise ImportError("The recipe needs DeepSpeed, which is not installed: pip install nextflow-hf[deepspeed]")
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("DeepSpeed is started by a launcher, for one process too: torchrun, or accelerate launch.")
    if named:
        config = named if isinstance(named, dict) else json.loads(_path_of(named).read_text())
        if arguments.pop("bf16", False):
            config = {**config, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
        arguments["deepspeed"] = config
    return arguments


def _path_of(name: str) -> Path:
    path = Path(name) if name.endswith(".json") else CONFIGS / f"{name}.json"
    if not path.is_file():
        known = sorted(config.stem for config in CONFIGS.glob("*.json"))
        raise ValueError(f"There is no DeepSpeed configuration {name!r}; the package has {known}, or give a JSON file.")
    return path


def check_zero(config: dict) -> None:
    """Raise `ValueError` where DeepSpeed would hold weights in a way in which they cannot be averaged or saved."""
    rounded = [name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled") is True]
    if rounded:
        raise ValueError(
            f"DeepSpeed's `{rounded[0]}` rounds the weights, the image tokenizer's and the averaged ones too. "
            "Name `deepspeed` in the recipe's `trainer`, with `bf16: true` beside it: that computes in bfloat16 and "
            "keeps weights in float32 (`torch_autocast`)."
        )
    zero = config.get("zero_optimization", {})
    if zero.get("offload_param", {}).get("device", "none") != "none":
        raise ValueError("Weights that DeepSpeed offloads (`offload_param`) cannot be averaged; offload the optimizer.")
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError("ZeRO-3 saves whole weights only with `stage3_gather_16bit_weights_on_model_save: true`.")
