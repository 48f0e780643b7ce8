"""`torch.compile`, layer by layer."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling.chunked_cross_entropy import compile_loss


def has_decoder(model: nn.Module) -> bool:
    """Whether a model has a head, and so a decoder, whose layers `compile_layers` is for."""
    return getattr(model, "lm_head", None) is not None


def compile_layers(model: nn.Module, **kwargs) -> None:
    """`torch.compile` for each layer that is trained and the head's loss, in place: layers that are alike share it.

    `torch.compile` of a whole model would compile anew for every batch: what lies where in a row is read in Python. A
    frozen image tokenizer is left as it is, as codes must be the same whoever asks.

    Args:
        model: A model of transformers, or one that wraps it.
        kwargs: What `torch.compile` takes.
    """
    compiled: dict[type, type] = {}
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and any(own.requires_grad for own in module.parameters()):
            own = type(module)
            if own not in compiled:
                compiled[own] = _compiled_class(own, kwargs)
            module.__class__ = compiled[own]
    if has_decoder(model):
        compile_loss(model.lm_head, **kwargs)


def _compiled_class(own: type[nn.Module], settings: dict) -> type[nn.Module]:
    """A layer's class with a compiled `forward`.

    Not `module.compile()`: where transformers' checkpoint is in `forward` (5.23; in 5.17 it is in `__call__`), that
    would compile the checkpoint, too, and one with a break inside, such as attention's, is not compiled at all. Around
    the `forward` of a new class transformers puts a checkpoint of its own.
    """
    compiled = torch.compile(own.forward, **settings)

    def forward(self, *args, **kwargs):
        return compiled(self, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        # Copies are not compiled, as those of what `module.compile()` was called on.
        return own.__new__, (own,), *own.__reduce_ex__(self, protocol)[2:]

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (own,), {**names, "forward": forward, "__reduce_ex__": __reduce_ex__})


def take_compilation(arguments: dict) -> dict | None:
    """Take `TrainingArguments`' `torch_compile` and what belongs to it out of them, as `compile_layers` takes it.

    `None` where nothing is to be compiled.
    """
    given = {name: arguments.pop(f"torch_compile_{name}", None) for name in ("backend", "mode")}
    given = {name: own for name, own in given.items() if own is not None}
    return given if arguments.pop("torch_compile", False) or given else None
