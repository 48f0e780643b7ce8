"""The processes of a run."""

import torch
from accelerate import PartialState


def all_processes() -> PartialState:
    """What this process knows of the others, under `torchrun` or `accelerate launch`, with or without accelerators.

    Without one, accelerate joins processes only when it is told that the CPU is meant.
    """
    return PartialState(cpu=not torch.accelerator.is_available())
