"""`torch.compile`, layer by layer."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(model: nn.Module, **kwargs) -> None:
    """`torch.compile` for each layer that is trained and the head, in place: layers that are alike share what it makes.

    `torch.compile` of a whole model would compile anew for every batch: what lies where in a row is read in Python. A
    frozen image tokenizer is left as it is, as codes must be the same whoever asks.

    Args:
        model: A model of transformers, or one that wraps it.
        kwargs: What `torch.compile` takes.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and any(own.requires_grad for own in module.parameters()):
            module.compile(**kwargs)
    head = getattr(model, "lm_head", None)
    if head is not None:
        head.compile(**kwargs)


def take_compilation(arguments: dict) -> dict | None:
    """Take `TrainingArguments`' `torch_compile` and what belongs to it out of them, as `compile_layers` takes it.

    `None` where nothing is to be compiled.
    """
    given = {name: arguments.pop(f"torch_compile_{name}", None) for name in ("backend", "mode")}
    given = {name: own for name, own in given.items() if own is not None}
    return given if arguments.pop("torch_compile", False) or given else None
