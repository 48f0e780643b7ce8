"""The processes of a run."""

from datetime import timedelta

import torch
from accelerate import PartialState


def all_processes() -> PartialState:
    """What this process knows of the others, under `torchrun` or `accelerate launch`, with or without accelerators.

    Without one, accelerate joins processes only when it is told that the CPU is meant. They wait for one another for up
    to a day: one that has extracted its share has nothing else to do.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
